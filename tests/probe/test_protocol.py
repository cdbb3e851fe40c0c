"""The published protocol: the shipped configuration has it to the letter; every difference is named."""

from __future__ import annotations

import pytest

from salt_wds.config import load_config, read_config
from salt_wds.probe import protocol
from salt_wds.probe.config import ProbeConfig


@pytest.fixture
def deviations(repository):
    """`deviations(settings of the probe, settings of the run)` with the shipped configurations."""

    def deviations(probe=(), run=(), *, kept=False):
        config = read_config(ProbeConfig, repository / "configs" / "probe_ssv2.toml", probe)
        run_config = load_config(repository / "configs" / "base.toml", run)
        return protocol.deviations(config, run_config, kept=kept)

    return deviations


AS_PUBLISHED = ("data.frame_stride=4", "data.size=256")


def test_the_shipped_protocol_differs_only_in_what_cannot_be_chosen(deviations):
    selection, *always = deviations(run=AS_PUBLISHED)
    assert selection.startswith("0.05 of the training clips choose the probe of top1; published: the best on")
    assert tuple(always) == protocol._ALWAYS


@pytest.mark.parametrize(
    ("probe", "run", "kept", "line"),
    [
        ((), ("data.size=224",), False, "data.size = 224; published: 256"),
        ((), ("data.frame_stride=2",), False, "data.frame_stride = 2; published: 4"),
        (("probe.heads=12",), (), False, "probe.heads = 12; published: 16"),
        (("data.crop_scale=[0.5, 1.0]",), (), False, "data.crop_scale = [0.5, 1]; published: [0.08, 1]"),
        (("data.train_clips=9",), (), False, "data.train_clips = 9; published: unset"),
        ((), (), True, "kept features have data.train_views = 1; published: a new view every epoch"),
    ],
)
def test_every_difference_is_a_line(deviations, probe, run, kept, line):
    assert line in deviations(probe, (*AS_PUBLISHED, *run), kept=kept)


def test_one_block_is_a_quick_look(deviations):
    (line,) = deviations(["probe.blocks=1"])
    assert line.startswith("probe.blocks = 1: a quick look")
