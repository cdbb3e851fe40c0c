"""What workers count for `bench loader`: frames decoded for those used, and the share of the payload that is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import pack_here
from video_maker import make_video

from salt_wds.config import Config, load_config
from salt_wds.data.loader import Loader
from salt_wds.data.order import sample_rng
from salt_wds.data.views import training_view
from shard_tools.video.packet_table import LEAST_CHUNKED

CLIPS = 4
Count = Callable[..., tuple[Counter[str], list[int], int]]


@pytest.fixture
def count(tmp_path: Path, repository: Path) -> Count:
    def count(payload: bytes, *options: str) -> tuple[Counter[str], list[int], int]:
        """The counts of a batch of clips of this video, the last frame of each clip, and bytes read beside the JSON."""
        (tmp_path / "root/class").mkdir(parents=True)
        (tmp_path / "root/class/video.mp4").write_bytes(payload)
        assert pack_here(tmp_path / "root", "--out", tmp_path / "shards", *options) == 0
        settings = [f"data.shards={tmp_path / 'shards'}", f"data.batch_size={CLIPS}", "data.num_workers=0"]
        config: Config = load_config(repository / "configs" / "tiny.toml", settings)
        loader = Loader(config, tmp_path / "failures.jsonl")
        batch, row = next(iter(loader)), loader.catalog.row(0, 0)
        last = []
        for position in batch["positions"]:
            rng = sample_rng(config.train.seed, position)
            last.append(int(training_view(row.num_frames, row.width, row.height, config.data, rng)[0][-1]))
        return batch["counts"], last, batch["bytes"] - CLIPS * row.json_size

    return count


def h264(frames: int, **options: str) -> bytes:
    """Noise with one key frame, at the start."""
    settings = {"preset": "ultrafast", "qp": "16", "g": "1000", "sc_threshold": "0", **options}
    return make_video(160, 120, frames, "libx264", container="mp4", noise=True, options=settings)


def test_far_key_frames_are_decoded_up_to_the_last_frame_of_a_clip(count: Count) -> None:
    payload = h264(64)
    assert len(payload) > LEAST_CHUNKED
    counts, last, read = count(payload)
    assert counts["used"] == CLIPS * 8
    assert counts["decoded"] == sum(number + 1 for number in last) > 2 * counts["used"]
    assert counts["payload"] == CLIPS * len(payload)
    assert counts["payload_read"] == read < counts["payload"]


def test_frames_that_the_decoder_skips_are_not_counted(count: Count) -> None:
    counts, last, _ = count(h264(64, bf="3", b_strategy="0"))
    assert counts["used"] < counts["decoded"] < sum(number + 1 for number in last)


@pytest.mark.parametrize("tier", ["mjpeg", "y4m"])
def test_a_frame_tier_decodes_and_reads_the_frames_of_the_clip(count: Count, tier: str) -> None:
    counts, _, read = count(h264(64), "--frames", tier)
    assert counts["decoded"] == counts["used"] == CLIPS * 8
    assert counts["payload_read"] == read == pytest.approx(counts["payload"] * 8 / 64, rel=0.02)


def test_frames_of_a_short_video_count_once(count: Count) -> None:
    counts, _, read = count(h264(5))
    assert counts["decoded"] == CLIPS * 5
    assert counts["used"] == CLIPS * 3  # 0, 2 and 4, then the last one again
    assert counts["payload_read"] == read == counts["payload"]
