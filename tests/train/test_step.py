"""A step falls back to a simpler compile mode, but not for other faults; in micro-batches it is the whole batch."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from train_runs import small

from salt_wds.config import PATCH, TUBELET
from salt_wds.train.distributed import World, shard_model
from salt_wds.train.step import Forward, Step, make_forward
from salt_wds.train.tuning import _compile_mode, synthetic_batch

CLIPS = (torch.ones(2),) * 3


@pytest.fixture
def weight():
    return nn.Parameter(torch.ones(1))


@pytest.fixture
def forward(weight):
    return Forward(
        targets=lambda clips, colour, mask: clips * 2,
        loss=lambda clips, colour, mask, targets: ((targets * weight).mean(), {"r2": targets.mean()}),
    )


def play_compiler(monkeypatch, fails):
    """Stand in for torch.compile; `fails(mode, calls)` says whether a call of a compiled function raises."""
    tried = []

    def compiler(function, mode):
        def compiled(*args):
            tried.append(mode)
            if fails(mode, tried.count(mode)):
                raise RuntimeError(f"no kernels for {mode}")
            return function(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    return tried


def test_a_compile_mode_that_fails_falls_back(monkeypatch, caplog, forward):
    tried = play_compiler(monkeypatch, lambda mode, calls: mode is not None)
    step = Step(forward, "max-autotune")
    loss, _ = step(*CLIPS)
    assert loss == 2
    assert tried == ["max-autotune", "max-autotune-no-cudagraphs", None, None]  # the teacher's part, then the student's
    assert step.mode == "default"
    assert "compile mode max-autotune failed (RuntimeError: no kernels for max-autotune)" in caplog.text


def test_a_compile_mode_that_fails_later_falls_back_too(monkeypatch, forward, weight):
    """CUDA graphs are recorded in the second pass and replayed in the third; no gradient counts twice."""
    play_compiler(monkeypatch, lambda mode, calls: mode == "max-autotune" and calls > 3)
    step = Step(forward, "max-autotune")
    for _ in range(3):
        weight.grad = None
        loss, _ = step(*CLIPS)
        assert (loss, weight.grad) == (2, 2)
    assert step.mode == "max-autotune-no-cudagraphs"


def test_a_lost_rank_is_no_fault_of_the_compiler(monkeypatch):
    def fail(*args):
        raise torch.distributed.DistNetworkError("connection closed by peer")

    monkeypatch.setattr(torch, "compile", lambda function, mode: fail)
    step = Step(Forward(fail, fail), "max-autotune")
    with pytest.raises(torch.distributed.DistNetworkError):
        step(*CLIPS)
    assert step.mode == "max-autotune"


def test_micro_batches_are_the_whole_batch(forward, weight):
    clips = torch.arange(4.0)
    step = Step(forward, "off", network=nn.Linear(1, 1), micro_batches=2)
    loss, stats = step(clips, torch.zeros(4), torch.zeros(4))
    assert (loss, stats["r2"], weight.grad) == (3, 3, 3)  # of 0, 2, 4 and 6


# --- what is compiled ---------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """Counts the graphs, and the calls of attention that they make."""
    found, real = {"graphs": 0, "attention": 0}, torch.compile

    def backend(graph, inputs):
        modules = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        calls = sum("scaled_dot_product" in str(node.target) for module in modules for node in module.graph.nodes)
        found["graphs"] += 1

        def counted(*args):
            if not any(isinstance(arg, FakeTensor) for arg in args):  # with which DDP's optimizer of graphs calls it
                found["attention"] += calls
            return graph(*args)

        return counted

    monkeypatch.setattr(torch, "compile", lambda function, mode, **options: real(function, backend=backend, **options))
    torch._dynamo.reset()
    return found


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at all
@pytest.mark.parametrize(
    ("parallel", "checkpointing"),
    [
        pytest.param(None, "full", marks=pytest.mark.slow),
        pytest.param("ddp", "full", marks=pytest.mark.slow),
        ("fsdp2", "full"),
        pytest.param("fsdp2", "selective", marks=pytest.mark.slow),
        pytest.param("fsdp2", "off", marks=pytest.mark.slow),
    ],
)
def test_every_attention_is_in_a_compiled_graph_and_none_is_compiled_again(compiled, parallel, checkpointing):
    config, models = small("student.depth=2", "student.predictor_depth=2", "teacher.random_depth=1")
    device, graphs = torch.device("cpu"), []
    batch = synthetic_batch(config, 2, device)

    def losses(network, mode):
        models.student.set_checkpointing(checkpointing)
        step = Step(make_forward(config, models.teacher, network, device), mode, network=network, micro_batches=2)
        models.student.zero_grad()
        for _ in range(3):
            yield step(*batch)[0].item()
            graphs.append(compiled["graphs"])

    with contextlib.ExitStack() as stack:
        expected, network = list(losses(models.student, "off")), models.student
        if parallel is not None:
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            stack.callback(dist.destroy_process_group)
            network = shard_model(models.student, parallel, World(device, 0, 2))
        assert list(losses(network, "default")) == pytest.approx(expected, abs=1e-6)
    assert compiled["attention"] == 3 * 2 * (1 + 2 + 2)  # steps, micro-batches, blocks
    assert graphs[:3] == [0, 0, 0]
    assert graphs[3:] == [compiled["graphs"]] * 3


# --- what a step does not compute ---------------------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Notes every operator with the shape and type of its (first) result."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple | list) else result
        if isinstance(first, torch.Tensor):
            self.found.append((func.overloadpacket.__name__, tuple(first.shape), first.dtype))
        return result

    def count(self, name, shape=None):
        return sum(found == name and (shape is None or shape == size) for found, size, _ in self.found)


def test_the_teacher_multiplies_in_its_own_precision_without_casts():
    """Under autocast, a LayerNorm would give fp32, which is rounded once for each product that reads it."""
    config, models = small("teacher.random_depth=2", "train.precision=bf16")
    batch = synthetic_batch(config, 2, torch.device("cpu"))
    with Operators() as operators:
        make_forward(config, models.teacher, models.student, torch.device("cpu")).targets(*batch)
    norms = [dtype for name, _, dtype in operators.found if name == "native_layer_norm"]
    assert norms == [torch.bfloat16] * 2 * 2
    assert operators.count("addmm") == 1 + 2 * 4  # patches; per block q, k and v at once, projection, MLP
    wide = [
        (name, shape)
        for name, shape, dtype in operators.found
        if dtype == torch.float32 and shape[-1:] == (models.teacher.width,)
    ]
    assert not wide


def test_only_visible_patches_are_converted_and_positions_have_no_gradient_for_each_clip():
    config, models = small("student.depth=1", "student.predictor_depth=1")
    clips, tokens, width = 3, config.num_tokens, models.student.width
    batch = synthetic_batch(config, clips, torch.device("cpu"))
    forward = make_forward(config, models.teacher, models.student, torch.device("cpu"))
    targets = forward.targets(*batch)
    with Operators() as operators:
        forward.loss(*batch, targets)[0].backward()
    pixels = clips * tokens * TUBELET * PATCH * PATCH
    sizes = {math.prod(shape) for _, shape, dtype in operators.found if dtype == torch.float32}
    assert pixels not in sizes
    assert pixels * (tokens - targets.shape[1]) // tokens in sizes
    assert operators.count("new_zeros", (clips, tokens, width)) == 0
    assert operators.count("scatter_add") == 0
    assert models.student.encoder.spatial_positions.grad.abs().max() > 0


# --- gradients of several parts -----------------------------------------------------------------------------------


class Replayed(torch.autograd.Function):
    """weight * clips, whose gradient lies in memory that every backward pass overwrites, as that of a CUDA graph."""

    memory = torch.zeros(1)

    @staticmethod
    def forward(ctx, weight, clips):
        ctx.save_for_backward(clips)
        return weight * clips

    @staticmethod
    def backward(ctx, gradient):
        (clips,) = ctx.saved_tensors
        Replayed.memory.copy_((gradient * clips).sum())
        return Replayed.memory.detach(), None


def test_gradients_that_accumulate_have_memory_of_their_own():
    network = nn.Module()
    network.weight = nn.Parameter(torch.ones(1))
    forward = Forward(
        targets=lambda clips, colour, mask: clips,
        loss=lambda clips, colour, mask, targets: (Replayed.apply(network.weight, clips).mean(), {}),
    )
    clips = torch.arange(8.0)
    step = Step(forward, "off", network=network, micro_batches=4)
    places = set()
    for _ in range(3):
        step(clips, clips, clips)
        assert network.weight.grad.item() == clips.mean()
        places.add(network.weight.grad.data_ptr())
    assert len(places) == 1
    Step(forward, "off", network=network)(clips, clips, clips)  # in one part there is nothing to keep
    assert network.weight.grad.data_ptr() == Replayed.memory.data_ptr()


def test_accumulation_keeps_cuda_graphs():
    assert _compile_mode("max-autotune", world_size=1) == "max-autotune"
    assert _compile_mode("max-autotune", world_size=2) == "max-autotune-no-cudagraphs"
