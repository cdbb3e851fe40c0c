"""The failure ledger: what was written is read back, and a crash in the middle of a line costs that line only."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_tools.format import ledger
from shard_tools.format.ledger import Failure

FIELDS = ["time", "stage", "dataset", "shard", "key", "offset", "rank", "worker", "pid", "epoch", "position",
          "error", "message", "traceback", "action", "attempt"]  # fmt: skip
FULL = Failure(
    time="2026-01-01T12:00:00.000+00:00", stage="decode", dataset="ssv2", shard="train-000012.tar", key="78687",
    offset=1536, rank=0, worker=3, pid=4711, epoch=1, position=777, error="DecodeError", message="the video ends early",
    traceback="ValueError: decode.py:1 f", action="substituted", attempt=0,
)  # fmt: skip
SPARSE = Failure(stage="pack", error="BadVideoError", message="empty", action="skipped")


def test_records_come_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "failures/rank0.jsonl"
    ledger.append(path, [FULL])
    ledger.append(path, [SPARSE, FULL])
    assert ledger.read(path) == ([FULL, SPARSE, FULL], 0)


def test_a_line_has_the_fields_of_the_contract_and_null_for_the_rest() -> None:
    record = json.loads(SPARSE.to_line())
    assert list(record) == FIELDS
    assert {name for name, value in record.items() if value is not None} == {"stage", "error", "message", "action"}
    assert sorted(FIELDS) == sorted(field.name for field in dataclasses.fields(Failure))


@given(st.text(), st.text())
def test_any_text_is_one_line(message: str, key: str) -> None:
    line = dataclasses.replace(SPARSE, message=message, key=key).to_line()
    assert line.count("\n") == 1
    assert json.loads(line.encode())["message"] == message.encode(errors="replace").decode()


@pytest.mark.parametrize(
    "line",
    [b"no JSON", b"{}", FULL.to_line()[:40].encode(),
     FULL.to_line().replace('"decode"', '"x"').encode(), FULL.to_line().replace('"substituted"', '"x"').encode(),
     FULL.to_line().replace('"train-000012.tar"', '["list"]').encode(), FULL.to_line().replace("1536", '"x"').encode()],
)  # fmt: skip
def test_a_line_that_is_no_record_is_counted(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rank0.jsonl"
    path.write_bytes(FULL.to_line().encode() + b"\n" + line + b"\n" + SPARSE.to_line().encode())
    assert ledger.read(path) == ([FULL, SPARSE], 1)


def test_an_unknown_stage_or_action_cannot_be_recorded() -> None:
    with pytest.raises(ValueError, match="stage 'lunch' is none of pack, read"):
        dataclasses.replace(SPARSE, stage="lunch")
    with pytest.raises(ValueError, match="action 'ignored' is none of skipped"):
        dataclasses.replace(SPARSE, action="ignored")
    assert dataclasses.replace(SPARSE, action=None).action is None


def test_lines_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "rank0.jsonl"
    ledger.append(path, [FULL])
    long = dataclasses.replace(FULL, message="x" * 5000)
    threads = [threading.Thread(target=lambda: [ledger.append(path, [long] * 3) for _ in range(10)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.read(path) == ([FULL] + [long] * 120, 0)


def test_ledgers_are_found_in_runs_and_data_sets(tmp_path: Path) -> None:
    for name in ("failures/rank1.jsonl", "failures/rank0.jsonl", "failures.jsonl", "metrics.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in ledger.find_ledgers(tmp_path)]
    assert found == ["failures/rank0.jsonl", "failures/rank1.jsonl", "failures.jsonl"]
    assert ledger.find_ledgers(tmp_path / "metrics.jsonl") == [tmp_path / "metrics.jsonl"]


def test_a_traceback_is_one_line_innermost_first_with_its_causes() -> None:
    def inner() -> None:
        raise KeyError("lost")

    def outer() -> None:
        try:
            inner()
        except KeyError as error:
            raise ValueError("no such\nthing") from error

    with pytest.raises(ValueError, match="no such") as caught:
        outer()
    text = ledger.compact_traceback(caught.value)
    assert len(text.splitlines()) == 1
    first, second = text.split(" | from ")
    assert first.startswith("ValueError: test_ledger.py:")
    assert " outer < " in first
    assert second.startswith("KeyError: test_ledger.py:")
    assert second.endswith(" outer")
