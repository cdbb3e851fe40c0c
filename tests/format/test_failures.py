"""The failures command: what failed, counted and named, from a run, a data set or one file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from shard_tools import failures
from shard_tools.common.cli import CommandError
from shard_tools.format import ledger
from shard_tools.format.ledger import Failure

ONE = Failure(stage="decode", error="DecodeError", message="ends early", action="substituted", shard="train-000001.tar",
              key="78687", rank=0, worker=3)  # fmt: skip
TWO = dataclasses.replace(ONE, key="11", message="two\nlines\r\nof it", stage="read", error="OSError", worker=1)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A training run with three failures of two samples and half a line."""
    ledger.append(tmp_path / "failures/rank0.jsonl", [ONE, TWO])
    ledger.append(tmp_path / "failures/rank1.jsonl", [ONE])
    with (tmp_path / "failures/rank1.jsonl").open("a") as file:
        file.write(ONE.to_line()[:30])
    return tmp_path


def test_a_run_is_summarised_and_its_samples_named(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failures.main([str(run_folder)]) == 1
    assert capsys.readouterr().out == (
        f"{run_folder}: 3 failures of 2 samples\n"
        "  1 lines are not failure records (cut short by a crash, or edited)\n"
        "by stage:\n       2  decode\n       1  read\n"
        "by error:\n       2  DecodeError\n       1  OSError\n"
        "by shard:\n       3  train-000001.tar\n"
        "by worker:\n       2  rank 0 worker 3\n       1  rank 0 worker 1\n"
        "samples:\n"
        "       2  train-000001.tar 78687: decode: DecodeError: ends early (substituted)\n"
        "       1  train-000001.tar 11: read: OSError: two lines of it (substituted)\n"
    )


def test_json_has_the_same_counts(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert failures.main([str(run_folder), "--json"]) == 1
    counts = json.loads(capsys.readouterr().out)
    assert (counts["failures"], counts["damaged_lines"]) == (3, 1)
    assert counts["stage"] == {"decode": 2, "read": 1}


def test_runs_data_sets_and_any_file_can_be_read(
    run_folder: Path, tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").touch()
    assert failures.main([str(tmp_path / "run")]) == 0
    assert failures.main([str(dataset)]) == 0
    assert capsys.readouterr().out.count("0 failures of 0 samples") == 2
    assert failures.main([str(run_folder / "failures/rank0.jsonl"), "--keys", "1"]) == 1
    assert "  ... and 1 more (--keys 2)" in capsys.readouterr().out
    assert failures.main([str(dataset / "train-000000.tar")]) == 1
    for path, says in ((tmp_path / "missing", "no such run or file"), (dataset.parent, "neither a run nor a data set")):
        with pytest.raises(CommandError, match=says):
            failures.main([str(path)])
