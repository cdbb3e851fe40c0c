"""CUDA code of the step, generated and compiled by Inductor and Triton without a GPU; run by test_generated_code.py.

    python tests/played_gpu.py generate FOLDER     # codegen at base.toml's shapes, few blocks: FOLDER/graphs.json
    python tests/played_gpu.py saved FOLDER        # bytes kept for the backward pass: FOLDER/saved.json
    python tests/played_gpu.py compile FOLDER CC   # FOLDER's kernels to cubins for sm_90 or sm_120: prints failures

`start` runs it with stand-ins for the CUDA runtime and driver that say yes to everything. What asks torch for a device
is replaced here, by private names of torch 2.15. Not played: autotuning, capture and replay of CUDA graphs, time.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
TORCH = "2.15"

# --- the launcher: neither torch nor a GPU ------------------------------------------------------------------------

_HEADER = "#define cudaError_t int\n#include <string.h>\n"
_RUNTIME = {
    "cudaGetDeviceCount(int *n)": "*n = 1;",
    "cudaGetDevice(int *n)": "*n = 0;",
    "cudaSetDevice(int d)": "",
    "cudaGetLastError(void)": "",
    "cudaPeekAtLastError(void)": "",
    "cudaDeviceGetStreamPriorityRange(int *a, int *b)": "*a = 0; *b = -5;",
    "cudaStreamIsCapturing(void *s, int *p)": "*p = 0;",
    "cudaDriverGetVersion(int *v)": "*v = 13020;",
    "cudaDeviceSynchronize(void)": "",
    "cudaStreamSynchronize(void *s)": "",
    "cudaStreamQuery(void *s)": "",
    "cudaEventCreateWithFlags(void **e, unsigned f)": "*e = (void *)1;",
    "cudaEventRecord(void *e, void *s)": "",
    "cudaStreamWaitEvent(void *s, void *e, unsigned f)": "",
}
_DRIVER = (
    "CtxGetCurrent",
    "CtxSetCurrent",
    "DeviceGet",
    "DeviceGetAttribute",
    "DevicePrimaryCtxRetain",
    "FuncGetAttribute",
    "FuncSetAttribute",
    "FuncSetCacheConfig",
    "GetErrorString",
    "LaunchCooperativeKernel",
    "LaunchKernel",
    "LinkAddData_v2",
    "LinkComplete",
    "LinkCreate_v2",
    "ModuleGetFunction",
    "ModuleLoad",
    "ModuleLoadData",
    "ModuleLoadDataEx",
    "ModuleUnload",
    "OccupancyMaxActiveBlocksPerMultiprocessor",
    "PointerGetAttribute",
    "TensorMapEncodeTiled",
    "Init",
    "CtxGetDevice",
    "CtxGetLimit",
    "CtxSetLimit",
    "StreamIsCapturing",
)


def start(folder: Path, *words: object, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """Run this file with the stand-ins, which are built into the folder; raises what subprocess.run raises."""
    stub = folder / "stub"
    if not stub.exists():
        stub.mkdir(parents=True)
        driver = "".join(f"int cu{name}() {{return 0;}}\n" for name in _DRIVER)
        driver += "int cuDevicePrimaryCtxGetState(int d, unsigned *f, int *a) {*f = 0; *a = 1; return 0;}\n"
        driver += "int cuDriverGetVersion(int *v) {*v = 13020; return 0;}\n"
        runtime = _HEADER + "".join(f"int {name} {{{body} return 0;}}\n" for name, body in _RUNTIME.items())
        for name, text, options in (
            ("libcuda.so.1", driver, ["-Wl,-soname,libcuda.so.1"]),
            ("libruntime.so", runtime, []),
        ):
            command = ["gcc", "-w", "-shared", "-fPIC", *options, "-x", "c", "-", "-o", str(stub / name)]
            subprocess.run(command, input=text, text=True, check=True)
    environment = os.environ | {
        "LD_PRELOAD": str(stub / "libruntime.so"),
        "LD_LIBRARY_PATH": str(stub),
        "PYTHONPATH": str(REPOSITORY),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    command = [sys.executable, __file__, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


# --- torch believes that there is an H200 -------------------------------------------------------------------------


def play(capability: int = 90) -> None:
    """Replace what torch, Inductor and Triton ask of a device."""
    import torch
    import torch._dynamo
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.set_num_threads(1)
    with FakeTensorMode():
        torch.empty(4, 6, device="cuda")[..., :3]  # before the device is played: what this loads looks for one

    properties = types.SimpleNamespace(
        name="NVIDIA H200", major=capability // 10, minor=capability % 10, multi_processor_count=132, warp_size=32,
        total_memory=141 << 30, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
        max_threads_per_block=1024, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472, L2_cache_size=50 << 20, is_integrated=0, gcnArchName="",
        clock_rate=1980000, memory_clock_rate=2600000, memory_bus_width=6144, uuid="x",
    )  # fmt: skip
    stream = types.SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1)

    class Device:
        def __init__(self, *args: Any, **options: Any) -> None: ...

        def __enter__(self) -> Device:
            return self

        def __exit__(self, *error: Any) -> bool:
            return False

    def returns(value: Any) -> Any:
        return lambda *args, **options: value

    cuda: Any = torch.cuda
    for name, value in {
        "_lazy_init": None, "is_available": True, "current_device": 0, "device_count": 1, "is_initialized": False,
        "is_bf16_supported": True, "get_device_name": "NVIDIA H200", "synchronize": None, "_device_count_nvml": 1,
        "get_device_capability": divmod(capability, 10), "get_device_properties": properties, "current_stream": stream,
        "mem_get_info": (140 << 30, 141 << 30), "is_current_stream_capturing": False, "set_rng_state": None,
    }.items():  # fmt: skip
        setattr(cuda, name, returns(value))
    cuda.get_rng_state = lambda *args: torch.empty(16, dtype=torch.uint8, device="cpu")
    cuda.device = cuda._DeviceGuard = Device
    core: Any = torch._C
    for name, value in {
        "_accelerator_getDeviceIndex": 0, "_accelerator_setDeviceIndex": None, "_accelerator_getStream": stream,
        "_cuda_getCurrentRawStream": 0, "_cuda_getDevice": 0, "_cuda_isCurrentStreamCapturing": False,
    }.items():  # fmt: skip
        setattr(core, name, returns(value))
    accelerator: Any = torch.accelerator
    accelerator.current_device_index, accelerator.is_available = returns(0), returns(False)

    import torch.cuda.amp.common as amp

    amp.amp_definitely_not_available = returns(False)  # type: ignore[assignment]
    _play_triton(capability)
    _play_inductor(Device, properties, capability, returns)


def _play_triton(capability: int) -> None:
    import torch
    import torch.utils._triton as found
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        class utils:  # noqa: N801
            @staticmethod
            def get_device_properties(index: int) -> dict[str, int]:
                return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

        binary_ext = "cubin"

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cuda", 0)

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, index: int) -> None: ...

        def get_current_stream(self, index: int = 0) -> int:
            return 0

        def get_device_interface(self) -> Any:
            return torch.cuda

        def is_active(self) -> bool:
            return True

        def map_python_to_cpp_type(self, kind: str) -> str:
            return "int"

    triton.runtime.driver.set_active(Driver())
    for name in ("has_triton", "has_triton_package"):
        setattr(found, name, lambda *args, **options: True)


def _play_inductor(device: type, properties: Any, capability: int, returns: Any) -> None:
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    import torch._inductor.fx_passes.fuse_attention as attention
    import torch._inductor.fx_passes.pad_mm as padding
    from torch._dynamo.device_interface import CudaInterface

    interface: Any = CudaInterface
    for name, value in {
        "is_available": True, "get_compute_capability": capability, "is_triton_capable": True, "set_device": None,
        "raise_if_triton_unavailable": None, "current_device": 0, "get_raw_stream": 0, "is_bf16_supported": True,
        "get_device_properties": properties,
    }.items():  # fmt: skip
        setattr(interface, name, staticmethod(returns(value)))
    for name, value in {"get_device_properties": properties, "current_device": 0, "set_device": None}.items():
        setattr(interface.Worker, name, staticmethod(returns(value)))
    interface.device = device
    inductor.compile_threads = 1
    inductor.fx_graph_cache = inductor.fx_graph_remote_cache = functorch.enable_autograd_cache = False
    functorch.force_non_lazy_backward_lowering = True
    attention._sfdp_init = padding._pad_mm_init = lambda *args, **options: None  # both run on the device
    inductor.shape_padding = inductor.joint_graph_constant_folding = False
    inductor.triton.cudagraphs = True


# --- what the tests look at ---------------------------------------------------------------------------------------


class Recorder:
    """An Inductor whose graphs are kept: code, kernels, why CUDA graphs would be skipped, bytes for the backward pass.

    Without `code`, graphs are partitioned and not lowered, which is fast.
    """

    def __init__(self, *, code: bool) -> None:
        import torch._inductor.async_compile as compiling
        from torch._inductor import compile_fx

        self.code, self.graphs = code, list[dict[str, Any]]()
        self._kernels: list[tuple[str, str]] = []
        self._compile, self._lower = compile_fx.compile_fx, compile_fx.compile_fx_inner
        compiler: Any = compiling.AsyncCompile

        def triton(own: Any, name: str, source: str, device_str: str = "cuda") -> Any:
            self._kernels.append((name, source))
            return types.SimpleNamespace(run=lambda *args, **options: None)

        compiler.triton, compiler.wait = triton, lambda own, scope: None
        compiler.wakeup = classmethod(lambda cls: None)

    def __call__(self, graph: Any, inputs: Any, **options: Any) -> Any:
        return self._compile(graph, inputs, inner_compile=self._inner)

    def _inner(self, graph: Any, examples: Any, **options: Any) -> Any:
        first, made = len(self._kernels), None
        if self.code:
            made = self._lower(copy.deepcopy(graph), examples, **options)
        replay = getattr(made, "cudagraph_info", None)
        self.graphs.append({
            "backward": bool(options.get("is_backward")),
            "saved": _bytes_out(graph),
            "kernels": self._kernels[first:],
            "skipped": getattr(made, "disabled_cudagraphs_reason", None),
            "more_reasons": [str(reason) for reason in getattr(replay, "cudagraph_fail_reasons", [])],
        })  # fmt: skip

        def run(args: Any) -> Any:
            values = list(args)
            if isinstance(args, list):
                args.clear()
            return graph(*values)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _bytes_out(graph: Any) -> int:
    """Of what a graph returns and was not given."""
    import torch

    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    given = {node for node in graph.graph.nodes if node.op == "placeholder"}
    values = [n.meta["val"] for n in output.args[0] if isinstance(n, torch.fx.Node) and n not in given]
    return sum(value.numel() * value.element_size() for value in values)


def compile_step(checkpointing: str, depth: int, *, code: bool) -> list[dict[str, Any]]:
    """Graphs of base.toml's step of 64 clips with networks of `depth` blocks: targets, loss, and its backward pass."""
    import torch
    import torch.nn.functional as F  # noqa: N812
    from torch._subclasses.fake_tensor import FakeTensorMode

    sys.path.insert(0, str(REPOSITORY / "tests"))
    from salt_wds.bench.estimate import replace_tensors
    from salt_wds.config import load_config
    from salt_wds.models.build import build_models
    from salt_wds.train.diagnostics import PositionMean
    from salt_wds.train.step import make_forward
    from salt_wds.train.tuning import synthetic_batch

    def flash(q: Any, k: Any, v: Any, *args: Any, scale: float | None = None, **options: Any) -> Any:
        """torch's choice of a kernel asks the device."""
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[0]

    F.scaled_dot_product_attention = flash
    words = ["teacher.weights=random", f"teacher.random_depth={depth}", f"student.depth={depth}"]
    words += [f"student.predictor_depth={depth}", f"train.checkpointing={checkpointing}", "data.shards=none"]
    config = load_config(REPOSITORY / "configs/base.toml", words)
    models = build_models(config, torch.device("cpu"))
    one, clips = synthetic_batch(config, 1, torch.device("cpu")), config.data.batch_size
    torch._dynamo.reset()
    recorder = Recorder(code=code)
    with FakeTensorMode(allow_non_fake_inputs=False):
        gpu = torch.device("cuda", 0)
        means = PositionMean(config.num_tokens, models.teacher.width)
        for module in (models.teacher, models.student, means):
            replace_tensors(module, gpu)
        models.student.set_checkpointing(checkpointing)  # type: ignore[arg-type]
        forward = make_forward(config, models.teacher, models.student, gpu, means)
        batch = [torch.empty((clips, *t.shape[1:]), dtype=t.dtype, device=gpu) for t in one]
        with torch.no_grad():
            targets = torch.compile(forward.targets, backend=recorder, fullgraph=True)(*batch)
        torch.compile(forward.loss, backend=recorder, fullgraph=True)(*batch, targets)
    return recorder.graphs


def compile_kernels(folder: Path, capability: int) -> dict[str, Any]:
    """Compile each different kernel with ptxas: how many, and those that failed."""
    from torch._inductor.codecache import PyCodeCache

    done, failed = set(), []
    for graph in json.loads((folder / "graphs.json").read_text()):
        for name, source in graph["kernels"]:
            if (key := re.sub(name, "K", source)) in done:
                continue
            done.add(key)
            try:
                kernel = getattr(PyCodeCache.load(re.sub(r"cc=\d+", f"cc={capability}", source)), name)
                kernel._precompile_config(next(iter(kernel.configs)))
            except Exception as error:  # whatever it is, it is what the test wants to show
                failed.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    return {"compiled": len(done) - len(failed), "failed": failed}


def main(what: str, folder: Path, *more: str) -> None:
    play(*map(int, more))
    with contextlib.redirect_stdout(sys.stderr):
        if what == "generate":
            result: Any = compile_step("off", 1, code=True)
            (folder / "graphs.json").write_text(json.dumps(result))
        elif what == "saved":
            result = {
                name: [compile_step(name, depth, code=False)[1]["saved"] for depth in (1, 2)]
                for name in ("off", "selective", "full")
            }
            (folder / "saved.json").write_text(json.dumps(result))
        else:
            result = compile_kernels(folder, *map(int, more))
            (folder / f"compiled-{more[0]}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
