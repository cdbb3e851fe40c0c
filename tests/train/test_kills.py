"""SIGKILL at random moments of a run, and --resume each time: its end is that of the undisturbed run, to the bit."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_killed_run_ends_as_the_undisturbed_one(dataset, repository, tmp_path):
    script = repository / "benchmarks/kill_train.py"
    out = tmp_path / "result.json"
    done = subprocess.run(
        [
            sys.executable,
            str(script),
            str(dataset),
            "--kills",
            "3",
            "--steps",
            "60",
            "--longest",
            "0.3",
            "--out",
            str(out),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert result["kills"] == 3
    assert result["differs"] == []
    # The checkpoint before the one that was being written is there, whole.
    assert result["most_steps_lost"] <= 2 * result["checkpoint_every"] + 1
