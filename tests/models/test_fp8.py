"""The teacher's products in fp8: near to bf16, in the blocks only, and refused where the device has none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train_runs import REPOSITORY, small

from salt_wds.config import load_config
from salt_wds.models.build import build_models
from salt_wds.models.fp8 import Fp8Linear, check_fp8, multiply_in_fp8
from salt_wds.train.flops import workload
from shard_tools.common.cli import CommandError

CPU = torch.device("cpu")


def test_a_layer_is_near_to_bf16_whatever_the_size_of_its_rows_and_columns():
    """With one scale for all, the small rows and the small channels would be lost."""
    generator = torch.Generator().manual_seed(0)
    channels, rows = torch.logspace(-5, 2, 48), torch.logspace(-4, 2, 5)[:, None]
    linear = nn.Linear(64, 48).bfloat16()
    with torch.no_grad():
        linear.weight.copy_(torch.randn(48, 64, generator=generator) * channels[:, None])
        linear.bias.zero_()
        tokens = (torch.randn(2, 5, 64, generator=generator) * rows).bfloat16()
        tokens[0, 0] = 0
        exact, found = linear(tokens).float(), Fp8Linear(linear)(tokens)
    assert found.dtype == torch.bfloat16
    assert not found[0, 0].any()
    exact, found = exact / rows / channels, found.float() / rows / channels
    for dims in ((0, 1), (0, 2)):
        assert ((found - exact).square().sum(dim=dims) / exact.square().sum(dim=dims)).sqrt().max() < 0.1


def test_the_teachers_blocks_are_replaced_and_its_tokens_stay_near():
    config, models = small("train.precision=bf16", "teacher.random_depth=2")
    work, patches = workload(config, models.teacher, models.student), models.teacher.network.projection
    r2 = multiply_in_fp8(models.teacher, config)
    assert 0.99 < r2 < 0.999999
    kinds = [type(module) for block in models.teacher.blocks for module in block.modules()]
    assert (kinds.count(Fp8Linear), kinds.count(nn.Linear)) == (2 * 4, 0)
    assert type(patches) is nn.Conv3d
    assert workload(config, models.teacher, models.student) == work  # as many FLOPs


def test_where_there_is_no_fp8_the_run_is_refused_in_a_line(monkeypatch):
    config = load_config(REPOSITORY / "configs" / "tiny.toml", ["teacher.fp8=true", "train.precision=bf16"])
    with pytest.raises(CommandError, match=r"^teacher\.fp8 = true: a CPU does not multiply in fp8; set it to false$"):
        build_models(config, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(
        CommandError, match=r"NVIDIA A100-SXM4-80GB \(compute capability 8\.0\) does not multiply in fp8"
    ):
        check_fp8(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    check_fp8(torch.device("cuda"))


@pytest.mark.parametrize("word", ["objective=pixels", "train.precision=fp32"])
def test_it_needs_a_teacher_that_runs_in_bf16(word):
    with pytest.raises(CommandError, match=r"teacher\.fp8.*needs a teacher that runs in bf16"):
        load_config(REPOSITORY / "configs" / "tiny.toml", ["train.precision=bf16", "teacher.fp8=true", word])
