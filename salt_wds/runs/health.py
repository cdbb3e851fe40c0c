"""What the machine says about itself: heat of GPU and drives, a GPU that is slowed down, free memory.

Where the system does not tell, the number is missing. NVML, the library of NVIDIA's driver, is called directly: torch
would need a package for it.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from salt_wds.data.memory import available_memory

_NVML = "libnvidia-ml.so.1"
_CORE_SENSOR = 0  # NVML_TEMPERATURE_GPU
# HwSlowdown, SwThermalSlowdown, HwThermalSlowdown, HwPowerBrakeSlowdown of nvml.h. SwPowerCap is left out: under load
# a healthy GPU runs at the limit of its power.
_THROTTLED = 0x8 | 0x20 | 0x40 | 0x80
_HWMON = Path("/sys/class/hwmon")
_DRIVES = ("nvme", "drivetemp")  # names of the kernel's drivers
_LEAST = {"host_memory_free_gb", "drive_margin_c"}  # the smaller, the worse


def machine_health(device: torch.device) -> dict[str, float]:
    """`host_memory_free_gb`; `drive_temperature_c` of the drive closest to its limit, and `drive_margin_c` to that;
    `gpu_temperature_c`, and `gpu_throttled` (1 if heat or the power supply slow it down now)."""
    gpu = _gpu_health(device) if device.type == "cuda" else {}
    return {"host_memory_free_gb": available_memory()[0] / 1e9, **drive_health(_HWMON), **gpu}


def worst(ranks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The worst value of each number over ranks."""
    found: dict[str, float] = {}
    for name, value in (item for rank in ranks for item in rank.items()):
        found[name] = (min if name in _LEAST else max)(value, found.get(name, value))
    return found


def drive_health(hwmon: Path) -> dict[str, float]:
    """Temperature and margin of the drive closest to its limit, among those whose driver reports them."""
    drives = []
    for folder in hwmon.glob("hwmon*"):
        try:
            if (folder / "name").read_text().strip() in _DRIVES:
                heat = int((folder / "temp1_input").read_text()) / 1e3
                limits = [path for name in ("temp1_max", "temp1_crit") if (path := folder / name).is_file()]
                drives.append((int(limits[0].read_text()) / 1e3 - heat if limits else None, heat))
        except (OSError, ValueError):  # a drive that sleeps, or was taken out
            continue
    if not drives:
        return {}
    margin, heat = min(drives, key=lambda drive: (drive[0] is None, drive[0], -drive[1]))
    return {"drive_temperature_c": heat, **({"drive_margin_c": margin} if margin is not None else {})}


def _gpu_health(device: torch.device) -> dict[str, float]:
    found = _open_gpu(torch.cuda.current_device() if device.index is None else device.index)
    if found is None:
        return {}
    nvml, handle = found
    heat, reasons, numbers = ctypes.c_uint(), ctypes.c_ulonglong(), {}
    if not nvml.nvmlDeviceGetTemperature(handle, _CORE_SENSOR, ctypes.byref(heat)):
        numbers["gpu_temperature_c"] = float(heat.value)
    if not nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle, ctypes.byref(reasons)):
        numbers["gpu_throttled"] = float(bool(reasons.value & _THROTTLED))
    return numbers


@functools.cache
def _open_gpu(index: int) -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """NVML, and its handle of torch's GPU of this index; None where there is no such library or GPU."""
    try:
        nvml = ctypes.CDLL(_NVML)
        _ = nvml.nvmlDeviceGetTemperature, nvml.nvmlDeviceGetCurrentClocksThrottleReasons
    except (OSError, AttributeError):  # no driver, or one without these calls
        return None
    handle = ctypes.c_void_p()
    name = f"GPU-{torch.cuda.get_device_properties(index).uuid}".encode()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(handle)):
        return None
    return nvml, handle
