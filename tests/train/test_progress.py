"""The bar on a real terminal, lines elsewhere, and the warning when data limits a run."""

from __future__ import annotations

import os
import pty
import resource
import subprocess
import sys
import termios
from collections import Counter

import pytest

from salt_wds.train.progress import InputBound, Progress

RUN = """
import logging
from salt_wds.train.progress import Progress
logging.basicConfig(level=logging.INFO)
progress = Progress(2, 5)
for step in (3, 4, 5):
    progress.advance()
    logging.warning("warning %d", step)
    line = {"step": step, "loss": 0.5, "r2": 0.25, "clips_per_sec": 12.0, "data_wait_share": 0.5}
    progress.show(line, f"step {step} as a line")
progress.close()
"""


def test_a_bar_on_a_terminal(repository):
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 160))
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=repository, stdout=subprocess.PIPE, stderr=child, text=True, check=True
    )
    os.close(child)
    shown = b""
    try:
        while part := os.read(parent, 65536):
            shown += part
    except OSError:  # Linux says so when the other end is closed and everything was read
        pass
    os.close(parent)
    text = shown.decode()
    assert done.stdout == ""
    assert "5/5" in text
    assert "loss 0.5000, R2 +0.250, 12.0 clips/s, wait 50%" in text
    assert [f"warning {n}" in text for n in (3, 4, 5)] == [True] * 3


def test_lines_elsewhere_even_on_a_full_disk(tmp_path, monkeypatch):
    """Nothing is printed while the disk is full, and the run continues."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "out.txt").open("w") as out:
        monkeypatch.setattr("sys.stdout", out)
        progress = Progress(0, 3)
        try:
            for step in (1, 2, 3):
                resource.setrlimit(resource.RLIMIT_FSIZE, (5 if step == 2 else limits[0], limits[1]))
                progress.show({}, f"step {step}")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    printed = (tmp_path / "out.txt").read_text().splitlines()
    assert (printed[0], printed[-1]) == ("step 1", "step 3")


# --- input-bound --------------------------------------------------------------------------------------------------

DECODING = Counter(read=1.0, decode=20.0, crop=5.0)
READING, AUGMENTING = Counter(DECODING, read=30.0), Counter(DECODING, augment=40.0)


def warnings(shares, watch=None, ms=DECODING):
    watch = watch or InputBound(4, 8, ["webm"], "shards")
    return [watch.observe(share, ms) for share in shares]


def test_three_intervals_in_a_row_after_the_first():
    assert warnings([0.9, 0.2, 0.2, 0.1, 0.2, 0.2]) == [None] * 6
    *before, warning = warnings([0.9, 0.2, 0.2, 0.125])
    assert before == [None] * 3
    assert warning.startswith(
        "input-bound: 12% of the time was spent waiting for data, and over 10% in each of the last 3"
    )


def test_not_at_every_interval_again():
    found = [n for n, warning in enumerate(warnings([0.5] * 60), 1) if warning]
    assert found == [4, 24, 44]


@pytest.mark.parametrize(
    ("workers", "extensions", "ms", "remedy"),
    [
        (4, ["webm"], DECODING, "raise data.num_workers from 4, up to the 8 cores, or pack with --frames mjpeg or y4m"),
        (8, ["webm"], DECODING, "are the limit: pack with --frames mjpeg or y4m"),
        (8, ["mjpeg"], DECODING, "are the limit: pack with --frames y4m"),
        (8, ["y4m"], DECODING, "are the limit: use more cores"),
        (4, ["webm"], READING, "check the drive with python -m shard_tools.bench shards"),
        (4, ["webm"], AUGMENTING, "the run's own stages are the limit"),
        (0, ["webm"], DECODING, "set data.num_workers"),
    ],
)
def test_the_remedy_is_for_what_limits(workers, extensions, ms, remedy):
    (warning,) = filter(None, warnings([0.5] * 4, InputBound(workers, 8, extensions, "shards"), ms))
    assert remedy in warning
