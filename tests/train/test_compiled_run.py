"""30 steps of the real trainer through dynamo, with accumulation, validation and probe between: all compile once."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from train_runs import config_maker, lines

from salt_wds.train import loop, trainer
from salt_wds.train.distributed import World

STEPS = 30
SETTINGS = {
    "train__steps": STEPS, "train__checkpoint_every": 15, "train__log_every": 10, "train__compile": "max-autotune",
    "train__validate_every": 10, "train__validate_batches": 1, "train__probe_every": 15, "train__precision": "bf16",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at all
@pytest.mark.parametrize("checkpointing", ["off", "full"])
@pytest.mark.parametrize(("parallel", "micro_batch"), [(None, 4), (None, 2), ("ddp", 1), ("fsdp2", 1)])
def test_no_step_after_the_first_compiles(dataset, tmp_path, monkeypatch, parallel, micro_batch, checkpointing):
    graphs, after, real = [], [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda function, mode, **options: real(function, backend=backend, **options))
    update = loop.Loop.update

    def counted(self, *args):
        update(self, *args)
        after.append(len(graphs))

    monkeypatch.setattr(loop.Loop, "update", counted)
    torch._dynamo.reset()
    counters.clear()
    settings = SETTINGS | {"train__micro_batch": micro_batch, "train__checkpointing": checkpointing}
    with contextlib.ExitStack() as stack:
        if parallel:  # wrapped as one of two ranks, in a group of one process
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            stack.callback(dist.destroy_process_group)
            monkeypatch.setattr(trainer, "join", lambda *_: World(torch.device("cpu"), 0, 2))
            monkeypatch.setattr(trainer, "leave", lambda world: None)
            settings["train__parallel"] = parallel
        assert trainer.train(config_maker(dataset, tmp_path)(**settings)) == 0
    assert after == [after[0]] * STEPS
    assert after[0] == len(graphs) >= 2  # targets and loss
    if parallel is None:
        assert after[0] == 2
        assert not counters["graph_break"]
    line = lines(tmp_path / "run")[STEPS]
    assert {"val_loss", "knn_top1"} <= line.keys()
