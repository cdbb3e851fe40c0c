"""Verifying: whatever is wrong with a data set is found, at the right place, under the right name, in one line."""

from __future__ import annotations

import inspect
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import xxhash
from conftest import RunModule, contents, pack_here, serially
from damage import FAULTS, Copy, Fault, PacketsFault, find_problems
from indexed import command

from shard_tools.common.cli import CommandError
from shard_tools.format import ledger
from shard_tools.format.dataset import DATASET_FILE, ShardInfo, index_name, make_dataset, read_dataset
from shard_tools.format.index import read_index
from shard_tools.format.ledger import Failure
from shard_tools.format.tar import BLOCK, padding, tar_header
from shard_tools.verify import __main__ as verify
from shard_tools.verify import inspection, shard_check
from shard_tools.verify.decoding import decode_sample
from shard_tools.verify.inspection import check_shard
from shard_tools.verify.problems import KINDS, Problem

Capture = pytest.CaptureFixture[str]
Found = set[tuple[str | None, str]]  # key, kind; of the shard under test


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Copy:
    return Copy(dataset, tmp_path / "copy")


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (None, "every byte is as it was packed"),
        ("--quick", "sizes, headers and indexes are as they were packed; payloads were not read"),
        ("--deep", "every byte is as it was packed, and every sample can be decoded"),
    ],
)
def test_a_whole_data_set_is_exit_code_0(dataset: Path, capsys: Capture, option: str | None, says: str) -> None:
    before = contents(dataset)
    assert command(verify, dataset, *([option] if option else [])) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"{dataset}: 40 samples in 10 shards: {says}\n", "")
    assert contents(dataset) == before


def test_problems_are_exit_code_1_and_one_line_each(copy: Copy, run_module: RunModule) -> None:
    row = copy.rows[0]
    copy.flip(row["payload_offset"] + 5)
    (copy.folder / "train-000003.parquet").unlink()
    done = run_module("shard_tools.verify", copy.folder, check=False)
    assert (done.returncode, done.stderr) == (1, "")
    total, index, payload = sorted(done.stdout.splitlines())
    assert total == f"{copy.folder}: 40 samples in 10 shards: 2 problems"
    assert index == (
        "missing_index: train-000003.tar: train-000003.parquet does not exist; repair it: python -m shard_tools.repair "
        f"{copy.folder}"
    )
    expected = f"payload_mismatch: {copy.shard}, key {row['key']}, byte {row['payload_offset']}: {row['key']}.webm does"
    assert payload.startswith(expected)


def test_json_is_one_object_a_problem(copy: Copy, capsys: Capture) -> None:
    row = copy.rows[0]
    copy.flip(row["payload_offset"] + 5)
    assert command(verify, copy.folder, "--json") == 1
    out, err = capsys.readouterr()
    [problem] = [json.loads(line) for line in out.splitlines()]
    assert list(problem) == ["shard", "key", "kind", "offset", "detail", "remedy"]
    assert (problem["shard"], problem["key"], problem["kind"], problem["offset"]) == (
        copy.shard, row["key"], "payload_mismatch", row["payload_offset"])  # fmt: skip
    assert err == f"{copy.folder}: 40 samples in 10 shards: 1 problem\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--quick", "--deep"], "not allowed with"),
        (["--from-failures", "missing"], "missing: no such run or file"),
        (["--from-failures", "tests"], "neither a run nor a data set"),
    ],
)
def test_usage_errors_are_one_line(dataset: Path, capsys: Capture, arguments: list[str], says: str) -> None:
    with pytest.raises((CommandError, SystemExit)) as caught:
        verify.main([str(dataset), *arguments])
    [line] = (capsys.readouterr().err or str(caught.value)).splitlines()
    assert says in line


# --- each kind of damage --------------------------------------------------------------------------------------------

DAMAGES: list[Callable[[Copy], Found]] = []


def damage(function: Callable[[Copy], Found]) -> None:
    """A function that damages the shard under test, and returns what is to be found in it."""
    DAMAGES.append(function)


@damage
def unreadable_index(copy: Copy) -> Found:
    copy.parquet.unlink()
    copy.parquet.mkdir()
    return {(None, "unreadable")}


@damage
def index_mismatch_for_what_is_not_parquet(copy: Copy) -> Found:
    copy.parquet.write_bytes(b"PAR1" * 40)
    return {(None, "index_mismatch")}


@damage
def truncated_within_a_sample_names_it_and_all_behind_it(copy: Copy) -> Found:
    copy.cut(copy.rows[1]["payload_offset"] + 100)
    return {(row["key"], "truncated") for row in copy.rows[1:]}


@damage
def truncated_between_samples_where_tarfile_ends_silently(copy: Copy) -> Found:
    copy.cut(copy.rows[2]["json_offset"] - BLOCK)
    return {(row["key"], "truncated") for row in copy.rows[2:]}


@damage
def truncated_in_the_final_zeros(copy: Copy) -> Found:
    copy.cut(-BLOCK)
    return {(None, "truncated")}


@damage
def truncated_for_a_size_beyond_the_file_that_is_not_allocated(copy: Copy) -> Found:
    copy.rebuild([*copy.members()[:2], tar_header("evil.json", 8**11 - 1)])
    return {(row["key"], "truncated") for row in copy.rows[1:]}


@damage
def bad_header_does_not_hide_what_is_behind_it(copy: Copy) -> Found:
    copy.flip(copy.rows[0]["payload_offset"] - BLOCK + 10)
    copy.flip(copy.rows[2]["payload_offset"] + 7)
    copy.flip(copy.rows[2]["json_offset"] - 300)
    first, _, third = (row["key"] for row in copy.rows[:3])
    return {(first, "bad_header"), (third, "bad_header"), (third, "payload_mismatch")}


@damage
def missing_member_that_is_a_json(copy: Copy) -> Found:
    members = copy.members()
    copy.rebuild(members[:-2] + members[-1:])
    return {(copy.rows[-1]["key"], "missing_member"), (copy.rows[-1]["key"], "index_mismatch")}


@damage
def members_in_another_order(copy: Copy) -> Found:
    members = copy.members()
    copy.rebuild([members[1], members[0], *members[2:]])
    return {(copy.rows[0]["key"], "index_mismatch")}


@damage
def duplicate_key_in_an_index(copy: Copy) -> Found:
    copy.write_index([*copy.rows, copy.rows[0]])
    return {(None, "index_mismatch"), (copy.rows[0]["key"], "duplicate_key")}


@damage
def extra_member(copy: Copy) -> Found:
    copy.rebuild([*copy.members(), tar_header("stray.json", 2) + b"{}" + padding(2)])
    return {("stray", "extra_member")}


@damage
def index_mismatch_for_a_sample_that_occurs_twice(copy: Copy) -> Found:
    members = copy.members()
    copy.rebuild(members + members[:2])
    return {(copy.rows[0]["key"], "index_mismatch")}


@damage
def index_mismatch_for_a_row_too_few(copy: Copy) -> Found:
    copy.write_index(copy.rows[1:])
    return {(None, "index_mismatch"), (copy.rows[0]["key"], "index_mismatch")}


@damage
def missing_index_leaves_a_tar_that_is_checked(copy: Copy) -> Found:
    copy.parquet.unlink()
    copy.flip(copy.rows[0]["payload_offset"])
    return {(None, "missing_index"), (None, "dataset_mismatch")}


@damage
def dataset_mismatch_for_a_tar_of_another_length_and_the_same_content(copy: Copy) -> Found:
    copy.edit(lambda data: data.extend(bytes(20 * BLOCK)))
    return {(None, "dataset_mismatch")}


@pytest.mark.parametrize("function", DAMAGES, ids=lambda function: function.__name__)
def test_damage_is_found_at_its_place(copy: Copy, function: Callable[[Copy], Found]) -> None:
    expected = function(copy)
    problems = copy.problems()
    assert {(problem.key, problem.kind) for problem in problems} == expected
    assert {problem.shard for problem in problems} == {copy.shard}
    assert len({str(problem) for problem in problems}) == len(problems)


def test_absurd_values_in_an_index_are_no_reads_beyond_the_file(copy: Copy) -> None:
    copy.flip(copy.rows[0]["json_offset"] - BLOCK)  # so that members are looked for by the index
    absurd = [{"payload_size": 2**62}, {"payload_offset": -5}, {"json_size": -1}, {"json_offset": 2**62}]
    copy.write_index([row | change for row, change in zip(copy.rows, absurd, strict=False)])
    assert (copy.shard, copy.rows[1]["key"], "truncated") in copy.found()


def test_unreadable(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_disk(*args: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shard_check, "read_members", broken_disk)
    assert {problem.kind for problem in find_problems(copy.folder)} == {"unreadable"}


def test_dataset_mismatch_for_whatever_was_edited(copy: Copy, capsys: Capture) -> None:
    path = copy.folder / DATASET_FILE
    original = path.read_text()
    edits: dict[str, Callable[[dict], object]] = {
        "name": lambda record: record.update(name="another"),
        "class": lambda record: record["classes"].reverse(),
        "seed": lambda record: record.update(seed=5),
        "samples": lambda record: record["splits"]["train"].update(samples=31),
        "shard hash": lambda record: record["splits"]["train"]["shards"][0].update(xxh3="0" * 16),
        "own hash": lambda record: record.update(xxh3="0" * 16),
        "a field more": lambda record: record.update(comment="harmless"),
        "shard twice": lambda record: record["splits"]["train"]["shards"].append(
            record["splits"]["train"]["shards"][0]
        ),
    }
    for name, edit in edits.items():
        record = json.loads(original)
        edit(record)
        path.write_text(json.dumps(record, indent=1) + "\n")
        assert (None, None, "dataset_mismatch") in copy.found(), name
    path.write_text(original.replace("\n", "\r\n"))
    assert copy.found() == {(None, None, "dataset_mismatch")}
    old = read_dataset(copy.folder)
    path.write_bytes(make_dataset(old.name, old.frames, old.plan_hash, 0, {}, ()).to_json())
    capsys.readouterr()
    assert command(verify, copy.folder) == 1
    assert "dataset_mismatch: dataset.json: it lists no shards; pack again" in capsys.readouterr().out


def test_every_random_fault_is_found_at_its_place(dataset: Path, tmp_path: Path) -> None:
    rng = random.Random(20)
    blind = {"json", "payload", "padding", "end_mark", "zeroed_block"}  # what --quick need not see
    for number, name in enumerate(FAULTS * 3):
        copy = Copy(dataset, tmp_path / str(number))
        fault = Fault(copy, rng, name)
        found = copy.found()
        assert {(fault.shard, fault.key, kind) for kind in fault.kinds} & found, (number, name, fault.row, found)
        quick = {problem.shard for problem in copy.problems(depth="quick")}
        assert quick or name in blind, (number, name)
        if fault.shard:  # nothing else is blamed
            assert {shard for shard, _, _ in found} == {fault.shard}, (number, name, found)
            assert quick <= {fault.shard}, (number, name)
        shutil.rmtree(copy.folder)


def test_every_kind_of_problem_has_a_test() -> None:
    text = Path(__file__).read_text() + inspect.getsource(Fault) + inspect.getsource(PacketsFault)
    assert not [kind for kind in KINDS if f'"{kind}"' not in text]


# --- the other depths -----------------------------------------------------------------------------------------------


def test_quick_sees_sizes_headers_and_indexes_and_reads_no_payload(copy: Copy) -> None:
    for row in copy.rows:
        copy.flip(row["payload_offset"] + 7)
    assert command(verify, copy.folder, "--quick") == 0
    copy.flip(copy.rows[1]["json_offset"] - 100)
    copy.cut(copy.rows[-1]["payload_offset"] + 5)
    copy.folder.joinpath("train-000002.parquet").write_bytes(b"PAR1")
    copy.folder.joinpath("train-000003.tar").unlink()
    assert {(p.shard, p.key, p.kind) for p in copy.problems(depth="quick")} == {
        (copy.shard, copy.rows[1]["key"], "bad_header"),
        (copy.shard, copy.rows[-1]["key"], "truncated"),
        (copy.shard, None, "truncated"),
        ("train-000002.tar", None, "index_mismatch"),
        ("train-000003.tar", None, "missing_shard"),
    }


def test_undecodable(copy: Copy) -> None:
    """A video that was broken before it was packed: every hash fits."""
    row, data = copy.rows[2], bytearray(copy.tar.read_bytes())
    start, end = row["payload_offset"], row["payload_offset"] + row["payload_size"]
    data[start + 300 : end] = bytes(end - start - 300)
    copy.tar.write_bytes(data)
    rows = [r | {"xxh3_payload": xxhash.xxh3_64_intdigest(data[start:end])} if r is row else r for r in copy.rows]
    copy.write_index(rows, consistent=True)
    copy.forge(xxh3=xxhash.xxh3_64_hexdigest(data))
    assert copy.found() == set()
    [problem] = copy.problems(depth="deep")
    assert (problem.shard, problem.key, problem.kind, problem.offset) == (copy.shard, row["key"], "undecodable", start)
    copy.flip(row["json_offset"])
    assert {problem.kind for problem in copy.problems(depth="deep")} == {"json_mismatch"}  # to be repaired first


@pytest.mark.parametrize("tier", ["mjpeg", "y4m"])
def test_deep_decodes_frame_tiers(videos: Path, tmp_path: Path, tier: str) -> None:
    out = tmp_path / "out"
    pack_here(videos, "--out", out, "--frames", tier, "--limit", 3)
    assert not find_problems(out, "deep")
    [info] = read_dataset(out).splits["train"].shards
    for number, row in enumerate(read_index(out / index_name(info.file)).to_pylist()):
        with (out / info.file).open("r+b") as file:
            file.seek(row["payload_offset"] + row["payload_size"] - 100)
            file.write(b"damaged")
        problem = decode_sample(out, False, (info.file, number))
        assert problem is not None
        assert (problem.kind, problem.detail) == (
            "undecodable", f"frame 23 does not match its hash in {row['key']}.json")  # fmt: skip


# --- shards that kill their process, or go away -----------------------------------------------------------------------


def decode_that_crashes(folder: Path, foreign: bool, sample: tuple[str, int]) -> Problem | None:
    """Stands in for decode_sample, in a worker process."""
    if sample[1] == 0:
        os.kill(os.getpid(), signal.SIGSEGV)
    return None


def check_that_crashes(folder: Path, foreign: bool, quick: bool, info: ShardInfo) -> list[Problem]:
    """Stands in for check_shard, in a worker process."""
    if info.file == "train-000001.tar":
        os.kill(os.getpid(), signal.SIGSEGV)
    return check_shard(folder, foreign, quick, info)


def test_a_shard_that_kills_its_process_is_named_and_the_others_are_checked(
    copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "check_shard", check_that_crashes)
    copy.parquet.with_name("train-000003.parquet").unlink()
    found = inspection.find_problems(copy.folder, read_dataset(copy.folder), 2, "quick")
    assert {(problem.shard, problem.kind) for problem in found} == {
        ("train-000001.tar", "unreadable"), ("train-000003.tar", "missing_index")}  # fmt: skip


@pytest.mark.slow
def test_deep_names_the_sample_that_kills_its_decoder(
    copy: Copy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(inspection, "decode_sample", decode_that_crashes)
    ledger.append(tmp_path / "run.jsonl", [Failure("crash", "WorkerDied", "m", "quarantined", shard=copy.shard)])
    assert verify.main([str(copy.folder), "--deep", "--from-failures", str(tmp_path / "run.jsonl")]) == 1
    row = copy.rows[0]
    assert capsys.readouterr().out.splitlines() == [
        f"undecodable: {copy.shard}, key {row['key']}, byte {row['payload_offset']}: decoding it kills the process; "
        "fetch the video again and pack again, or leave it: training skips the video, and names it",
        f"{copy.folder}: {len(copy.rows)} samples in 1 shards: 1 problem",
    ]


def test_a_shard_that_disappears_during_the_check_is_missing(copy: Copy) -> None:
    def disappearing(function: Callable, tasks: list, workers: int) -> object:
        shutil.rmtree(copy.folder, ignore_errors=True)
        return serially(function, tasks, workers)

    with mock.patch.object(inspection, "run_local", disappearing):
        found = list(inspection.find_problems(copy.folder, read_dataset(copy.folder), 1))
    assert {problem.kind for problem in found} == {"missing_shard", "missing_index"}


# --- the failure records of a run -------------------------------------------------------------------------------------


def test_only_the_shards_that_a_run_names_are_checked(copy: Copy, tmp_path: Path, capsys: Capture) -> None:
    copy.flip(copy.rows[0]["payload_offset"])
    copy.folder.joinpath("train-000003.parquet").unlink()  # which the run has not met
    shards = [copy.shard, f"elsewhere/{copy.shard}", "train-000000.tar", "other-000000.tar", None]
    failures = [Failure("read", "HashMismatch", "m", "substituted", shard=shard) for shard in shards]
    ledger_file = tmp_path / "run/failures/rank0.jsonl"
    ledger.append(ledger_file, failures)
    for run in (tmp_path / "run", ledger_file):
        assert command(verify, copy.folder, "--from-failures", run) == 1
        unknown, problem, verdict = capsys.readouterr().out.splitlines()
        assert unknown == f"other-000000.tar: named by {run}, not part of this data set"
        assert problem.startswith(f"payload_mismatch: {copy.shard}, key {copy.rows[0]['key']}")
        assert verdict.endswith(" samples in 2 shards: 1 problem")


def test_a_run_that_names_no_shard(dataset: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert command(verify, dataset, "--from-failures", tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{tmp_path}: names no shard of this data set"
