"""Temperatures, throttling and memory: what the system tells is read, what it does not tell is missing."""

import ctypes

import pytest
import torch
from train_runs import config_maker, lines

from salt_wds.runs import health
from salt_wds.runs.health import drive_health, machine_health, worst
from salt_wds.train.trainer import train


def sensor(folder, number, name, **files):
    path = folder / f"hwmon{number}"
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    for file, value in files.items():
        (path / file).write_text(f"{value}\n")


def test_the_drive_closest_to_its_limit_counts(tmp_path):
    assert drive_health(tmp_path / "none") == {}
    sensor(tmp_path, 0, "coretemp", temp1_input=99000, temp1_max=100000)
    assert drive_health(tmp_path) == {}
    sensor(tmp_path, 1, "nvme", temp1_input=60850, temp1_max=81850, temp1_crit=84850)
    sensor(tmp_path, 2, "drivetemp", temp1_input=50000, temp1_crit=55000)
    sensor(tmp_path, 3, "nvme", temp1_input=90000)  # without a limit
    sensor(tmp_path, 4, "nvme")  # asleep
    assert drive_health(tmp_path) == {"drive_temperature_c": 50.0, "drive_margin_c": 5.0}


def test_a_drive_without_a_limit_has_no_margin(tmp_path):
    sensor(tmp_path, 0, "nvme", temp1_input=40000)
    sensor(tmp_path, 1, "nvme", temp1_input=45000)
    assert drive_health(tmp_path) == {"drive_temperature_c": 45.0}


def test_the_worst_of_the_ranks():
    ranks = [{"gpu_temperature_c": 60.0, "host_memory_free_gb": 9.0}, {"gpu_temperature_c": 70.0}, {}]
    assert worst([*ranks, {"host_memory_free_gb": 4.0, "drive_margin_c": 3.0}]) == {
        "gpu_temperature_c": 70.0, "host_memory_free_gb": 4.0, "drive_margin_c": 3.0,
    }  # fmt: skip


class Nvml:
    """The driver's library with a GPU at 83 degrees."""

    def __init__(self, reasons, problem=0):
        self.reasons, self.problem = reasons, problem

    def nvmlDeviceGetTemperature(self, handle, kind, value):  # noqa: N802
        ctypes.cast(value, ctypes.POINTER(ctypes.c_uint))[0] = 83
        return 0

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle, value):  # noqa: N802
        ctypes.cast(value, ctypes.POINTER(ctypes.c_ulonglong))[0] = self.reasons
        return self.problem


@pytest.mark.parametrize(
    ("reasons", "throttled"),
    [(0x0, 0.0), (0x1, 0.0), (0x4, 0.0), (0x8, 1.0), (0x20, 1.0), (0x40 | 0x4, 1.0), (0x80, 1.0), (0x2, 0.0)],
)
def test_a_gpu_is_throttled_by_heat_and_power_supply_not_by_its_own_limit(monkeypatch, reasons, throttled):
    monkeypatch.setattr(health, "_open_gpu", lambda index: (Nvml(reasons), None))
    found = machine_health(torch.device("cuda", 0))
    assert (found["gpu_temperature_c"], found["gpu_throttled"]) == (83.0, throttled)
    monkeypatch.setattr(health, "_open_gpu", lambda index: (Nvml(reasons, problem=3), None))
    assert "gpu_throttled" not in machine_health(torch.device("cuda", 0))
    monkeypatch.setattr(health, "_open_gpu", lambda index: None)
    assert "gpu_temperature_c" not in machine_health(torch.device("cuda", 0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_gpu_has_a_temperature():
    found = machine_health(torch.device("cuda"))
    assert 10 < found["gpu_temperature_c"] < 110
    assert found["gpu_throttled"] in (0.0, 1.0)


def test_every_line_of_metrics_has_what_is_known(dataset, tmp_path, monkeypatch):
    config = config_maker(dataset, tmp_path)("run", train__steps=1)
    sensor(tmp_path / "hwmon", 0, "nvme", temp1_input=60000, temp1_max=80000)
    monkeypatch.setattr(health, "_HWMON", tmp_path / "hwmon")
    assert train(config) == 0
    line = lines(tmp_path / "run")[1]
    assert (line["drive_temperature_c"], line["drive_margin_c"]) == (60.0, 20.0)
    assert line["host_memory_free_gb"] > 0
    assert line["weight_decay"] == config.optim.weight_decay
