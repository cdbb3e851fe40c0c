"""Verifying: whatever is wrong with a data set is found, at the right place, under the right name, in one line."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import xxhash
from conftest import RunModule, contents, pack_here, serially

from shard_tools.format import ledger
from shard_tools.format.dataset import DATASET_FILE, Dataset, ShardInfo, index_name, make_dataset, read_dataset
from shard_tools.format.index import index_bytes, parse_index
from shard_tools.format.ledger import Failure
from shard_tools.format.tar import BLOCK, padding, tar_header
from shard_tools.verify import __main__ as verify
from shard_tools.verify import inspection, shard_check
from shard_tools.verify.hashes import prove
from shard_tools.verify.shard_check import KINDS, Problem, check_shard

Rows = list[dict]


class Copy:
    """A copy of the data set, to be damaged in the shard under test."""

    def __init__(self, dataset: Path, folder: Path) -> None:
        self.folder = shutil.copytree(dataset, folder)
        self.shard = read_dataset(folder).splits["train"].shards[1].file
        self.tar, self.parquet = folder / self.shard, folder / index_name(self.shard)
        self.rows: Rows = parse_index(self.parquet.read_bytes()).to_pylist()
        self.forged = False

    def problems(self, depth: str = "whole") -> list[Problem]:
        """What verify finds, in this process; every problem has a known kind and is told in one line."""
        proof = prove(self.folder, 1)
        with mock.patch.object(inspection, "run_local", serially):
            found = list(inspection.problems_of(self.folder, read_dataset(self.folder), 1, depth))
        if not self.forged:  # what the close look finds is never proven to be whole, and named shards are not proven
            assert proof.whole == (not found) or depth != "whole"
            assert not proof.proven & {problem.shard for problem in found}
        for problem in found:
            assert problem.kind in KINDS
            assert len(str(problem).splitlines()) == 1
            assert problem.remedy
        return found

    def found(self) -> set[tuple[str | None, str | None, str]]:
        return {(problem.shard, problem.key, problem.kind) for problem in self.problems()}

    def edit(self, change: Callable[[bytearray], object]) -> None:
        """Change the bytes of the tar."""
        data = bytearray(self.tar.read_bytes())
        change(data)
        self.tar.write_bytes(data)

    def flip(self, offset: int) -> None:
        def change(data: bytearray) -> None:
            data[offset] ^= 0x10

        self.edit(change)

    def members(self) -> list[bytes]:
        """The tar in pieces: header, data and padding of each member."""
        data, starts = self.tar.read_bytes(), []
        for row in self.rows:
            starts += [row["json_offset"] - BLOCK, row["payload_offset"] - BLOCK]
        last = self.rows[-1]["payload_offset"] + self.rows[-1]["payload_size"]
        starts.append(last + -last % BLOCK)
        return [data[a:b] for a, b in itertools.pairwise(starts)]

    def rebuild(self, members: list[bytes], consistent: bool = False) -> None:
        """A tar of these members; `consistent`: with index and dataset.json made to fit, as a forger would."""
        data = b"".join(members) + bytes(2 * BLOCK)
        self.tar.write_bytes(data + bytes(-len(data) % (20 * BLOCK)))
        if consistent:
            self.forge(xxh3=xxhash.xxh3_64_hexdigest(self.tar.read_bytes()), bytes=self.tar.stat().st_size)

    def write_index(self, rows: Rows, consistent: bool = False) -> None:
        self.parquet.write_bytes(index_bytes(rows))
        if consistent:
            self.forge(index_xxh3=xxhash.xxh3_64_hexdigest(self.parquet.read_bytes()), samples=len(rows))

    def forge(self, **changed: object) -> None:
        """Change what dataset.json says of the shard, with totals and hash that fit."""
        self.forged = True
        old = read_dataset(self.folder)
        shards = {
            name: [ShardInfo(**(vars(i) | changed)) if i.file == self.shard else i for i in split.shards]
            for name, split in old.splits.items()
        }
        new = make_dataset(old.name, old.frames, old.plan_hash, old.seed, shards, old.classes)
        (self.folder / DATASET_FILE).write_bytes(new.to_json())


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Copy:
    return Copy(dataset, tmp_path / "copy")


# --- whole ----------------------------------------------------------------------------------------------------------


def test_a_whole_data_set_is_exit_code_0(dataset: Path, run_module: RunModule) -> None:
    before = contents(dataset)
    done = run_module("shard_tools.verify", dataset)
    assert done.stdout == f"{dataset}: 40 samples in 10 shards: every byte is as it was packed\n"
    assert done.stderr == ""
    assert contents(dataset) == before


def test_problems_are_exit_code_1_and_one_line_each(copy: Copy, run_module: RunModule) -> None:
    row = copy.rows[0]
    copy.flip(row["payload_offset"] + 5)
    (copy.folder / "train-000003.parquet").unlink()
    done = run_module("shard_tools.verify", copy.folder, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = sorted(done.stdout.splitlines())
    assert len(lines) == 3
    assert lines[0] == f"{copy.folder}: 40 samples in 10 shards: 2 problems"
    assert lines[1].startswith("missing_index: train-000003.tar: train-000003.parquet is not there; mend it: python -m")
    expected = f"payload_mismatch: {copy.shard}, key {row['key']}, byte {row['payload_offset']}: {row['key']}.webm does"
    assert lines[2].startswith(expected)


def test_json_is_one_object_a_problem(copy: Copy, run_module: RunModule) -> None:
    row = copy.rows[0]
    copy.flip(row["payload_offset"] + 5)
    done = run_module("shard_tools.verify", copy.folder, "--json", check=False)
    [problem] = [json.loads(line) for line in done.stdout.splitlines()]
    assert list(problem) == ["shard", "key", "kind", "offset", "detail", "remedy"]
    assert (problem["shard"], problem["key"], problem["kind"], problem["offset"]) == (
        copy.shard, row["key"], "payload_mismatch", row["payload_offset"])  # fmt: skip
    assert (done.returncode, done.stderr) == (1, f"{copy.folder}: 40 samples in 10 shards: 1 problem\n")


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "it has no dataset.json"), ("{", "dataset.json: damaged"), ('{"format_version": 9}', "format version 9")],
)
def test_what_is_no_data_set_is_exit_code_2_in_one_line(
    tmp_path: Path, run_module: RunModule, content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / DATASET_FILE).write_text(content)
    done = run_module("shard_tools.verify", tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert says in line


@pytest.mark.parametrize(
    "arguments", [["missing"], ["file"], [".", "--workers", "0"], [".", "--workers", "x"], [".", "--x"]]
)
def test_usage_errors_are_exit_code_2(tmp_path: Path, run_module: RunModule, arguments: list[str]) -> None:
    (tmp_path / "file").touch()
    done = run_module("shard_tools.verify", tmp_path / arguments[0], *arguments[1:], check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error: " in line]) == 1


# --- each kind ------------------------------------------------------------------------------------------------------


def test_missing_shard(copy: Copy) -> None:
    copy.tar.unlink()
    assert copy.found() == {(copy.shard, None, "missing_shard")}


def test_extra_shard(copy: Copy) -> None:
    shutil.copy(copy.tar, copy.folder / "train-000099.tar")
    shutil.copy(copy.parquet, copy.folder / "other.parquet")
    assert copy.found() == {("train-000099.tar", None, "extra_shard"), ("other.parquet", None, "extra_shard")}


def test_unreadable(copy: Copy, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_disk(*args: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shard_check, "read_members", broken_disk)
    copy.forged = True  # only the close look meets this disk
    assert {problem.kind for problem in copy.problems()} == {"unreadable"}


def test_unreadable_index(copy: Copy) -> None:
    copy.parquet.unlink()
    copy.parquet.mkdir()
    assert copy.found() == {(copy.shard, None, "unreadable")}


def test_truncated_within_a_sample_names_it_and_all_behind_it(copy: Copy) -> None:
    cut = copy.rows[1]["payload_offset"] + 100
    copy.edit(lambda data: data.__delitem__(slice(cut, None)))
    assert copy.found() == {(copy.shard, row["key"], "truncated") for row in copy.rows[1:]}
    members = 2 * len(copy.rows) - 3
    assert len(copy.problems()) == members  # each once


def test_truncated_between_samples_names_all_behind_it(copy: Copy) -> None:
    cut = copy.rows[2]["json_offset"] - BLOCK  # where tarfile ends without a word
    copy.edit(lambda data: data.__delitem__(slice(cut, None)))
    assert copy.found() == {(copy.shard, row["key"], "truncated") for row in copy.rows[2:]}


def test_truncated_in_the_final_zeros(copy: Copy) -> None:
    copy.edit(lambda data: data.__delitem__(slice(-BLOCK, None)))
    assert copy.found() == {(copy.shard, None, "truncated")}


def test_bad_header_does_not_hide_what_is_behind_it(copy: Copy) -> None:
    copy.flip(copy.rows[0]["payload_offset"] - BLOCK + 10)
    copy.flip(copy.rows[2]["payload_offset"] + 7)
    copy.flip(copy.rows[2]["json_offset"] - 300)
    assert copy.found() == {
        (copy.shard, copy.rows[0]["key"], "bad_header"),
        (copy.shard, copy.rows[2]["key"], "bad_header"),
        (copy.shard, copy.rows[2]["key"], "payload_mismatch"),
    }


def test_bad_header_for_padding_that_is_not_zero(copy: Copy) -> None:
    row = copy.rows[1]
    copy.flip(row["json_offset"] + row["json_size"] + 1)
    assert copy.found() == {(copy.shard, row["key"], "bad_header")}


def test_payload_mismatch_and_json_mismatch(copy: Copy) -> None:
    copy.flip(copy.rows[0]["payload_offset"])
    copy.flip(copy.rows[1]["json_offset"])
    assert copy.found() == {
        (copy.shard, copy.rows[0]["key"], "payload_mismatch"),
        (copy.shard, copy.rows[1]["key"], "json_mismatch"),
    }


def test_missing_member(copy: Copy) -> None:
    members = copy.members()
    copy.rebuild(members[:-1])
    assert (copy.shard, copy.rows[-1]["key"], "missing_member") in copy.found()
    copy.rebuild(members[:-2] + members[-1:])
    assert (copy.shard, copy.rows[-1]["key"], "missing_member") in copy.found()


def test_extra_member(copy: Copy) -> None:
    copy.rebuild([*copy.members(), tar_header("stray.webm", 600) + bytes(600) + padding(600)])
    assert (copy.shard, "stray", "extra_member") in copy.found()


def test_duplicate_key_within_a_shard(copy: Copy) -> None:
    members = copy.members()
    copy.rebuild(members + members[:2])
    assert (copy.shard, copy.rows[0]["key"], "duplicate_key") in copy.found()


def test_duplicate_key_across_shards(copy: Copy) -> None:
    other = Copy(copy.folder, copy.folder.with_name("second"))
    first = read_dataset(copy.folder).splits["train"].shards[0].file
    for name in (first, index_name(first)):
        shutil.copy(copy.folder / name, other.tar if name.endswith("tar") else other.parquet)
    other.forge(**{k: v for k, v in vars(read_dataset(copy.folder).splits["train"].shards[0]).items() if k != "file"})
    keys = {row["key"] for row in parse_index(other.parquet.read_bytes()).to_pylist()}
    assert other.found() == {(other.shard, key, "duplicate_key") for key in keys}


def test_duplicate_key_in_an_index(copy: Copy) -> None:
    copy.write_index([*copy.rows, copy.rows[0]], consistent=True)
    assert copy.found() == {(copy.shard, copy.rows[0]["key"], "duplicate_key")}


@pytest.mark.parametrize("column", ["label", "json_offset", "json_size", "payload_offset", "payload_size", "ext",
                                    "xxh3_json", "xxh3_payload", "num_frames", "width", "height"])  # fmt: skip
def test_index_mismatch_names_the_row_whatever_column_was_edited(copy: Copy, column: str) -> None:
    row = copy.rows[1]
    edited = row | {column: "mp4" if column == "ext" else row[column] ^ 1}
    copy.write_index([copy.rows[0], edited, *copy.rows[2:]])
    assert copy.found() == {(copy.shard, None, "index_mismatch"), (copy.shard, row["key"], "index_mismatch")}


def test_index_mismatch_when_an_edit_was_covered_up(copy: Copy) -> None:
    row = copy.rows[1]
    copy.write_index([copy.rows[0], row | {"num_frames": 25, "label": None}, *copy.rows[2:]], consistent=True)
    [problem] = copy.problems()
    assert (problem.key, problem.kind) == (row["key"], "index_mismatch")
    assert problem.detail.endswith("label, num_frames")


def test_index_mismatch_for_a_row_too_few(copy: Copy) -> None:
    copy.write_index(copy.rows[1:])
    assert {kind for _, _, kind in copy.found()} == {"index_mismatch"}
    assert (copy.shard, copy.rows[0]["key"], "index_mismatch") in copy.found()


@pytest.mark.parametrize("content", [b"", b"no parquet", b"PAR1" * 40])
def test_index_mismatch_for_what_is_no_parquet(copy: Copy, content: bytes) -> None:
    copy.parquet.write_bytes(content)
    assert copy.found() == {(copy.shard, None, "index_mismatch")}


def test_absurd_values_in_an_index_are_no_reads_beyond_the_file(copy: Copy) -> None:
    copy.flip(copy.rows[0]["json_offset"] - BLOCK)  # so that members are looked for by the index
    absurd = [{"payload_size": 2**62}, {"payload_offset": -5}, {"json_size": -1}, {"json_offset": 2**62}]
    copy.write_index([row | change for row, change in zip(copy.rows, absurd, strict=False)])
    assert (copy.shard, copy.rows[1]["key"], "truncated") in copy.found()


def test_missing_index_still_has_the_tar_checked(copy: Copy) -> None:
    copy.parquet.unlink()
    assert copy.found() == {(copy.shard, None, "missing_index")}
    copy.flip(copy.rows[0]["payload_offset"])
    assert copy.found() == {(copy.shard, None, "missing_index"), (copy.shard, None, "dataset_mismatch")}


def edits(dataset: Dataset) -> dict[str, Callable[[dict], object]]:
    return {
        "name": lambda record: record.update(name="another"),
        "class": lambda record: record["classes"].reverse(),
        "seed": lambda record: record.update(seed=5),
        "samples": lambda record: record["splits"]["train"].update(samples=31),
        "shard bytes": lambda record: record["splits"]["train"]["shards"][0].update(bytes=1024),
        "shard hash": lambda record: record["splits"]["train"]["shards"][0].update(xxh3="0" * 16),
        "own hash": lambda record: record.update(xxh3="0" * 16),
        "a field more": lambda record: record.update(comment="harmless"),
        "shard twice": lambda record: record["splits"]["train"]["shards"].append(
            record["splits"]["train"]["shards"][0]
        ),
    }


def test_dataset_mismatch_for_whatever_was_edited(copy: Copy) -> None:
    path = copy.folder / DATASET_FILE
    original = path.read_text()
    for name, edit in edits(read_dataset(copy.folder)).items():
        record = json.loads(original)
        edit(record)
        path.write_text(json.dumps(record, indent=1) + "\n")
        assert (None, None, "dataset_mismatch") in copy.found(), name
    path.write_text(original.replace("\n", "\r\n"))
    assert copy.found() == {(None, None, "dataset_mismatch")}


def test_dataset_mismatch_for_another_tar_of_the_same_content(copy: Copy) -> None:
    copy.edit(lambda data: data.extend(bytes(20 * BLOCK)))
    assert copy.found() == {(copy.shard, None, "dataset_mismatch")}


def test_dataset_mismatch_for_a_sample_of_another_split_or_class(copy: Copy) -> None:
    old = read_dataset(copy.folder)
    shards = {"train": old.splits["train"].shards, "test": old.splits["validation"].shards}
    new = make_dataset(old.name, old.frames, old.plan_hash, old.seed, shards, old.classes[:3])
    for info in old.splits["test"].shards:
        (copy.folder / info.file).unlink()
        (copy.folder / index_name(info.file)).unlink()
    (copy.folder / DATASET_FILE).write_bytes(new.to_json())
    copy.forged = True
    details = [problem.detail for problem in copy.problems()]
    assert sum("belongs to split validation, the shard to test" in detail for detail in details) == 6
    assert any("label 3 is none of the 3 classes" in detail for detail in details)
    assert {kind for _, _, kind in copy.found()} == {"dataset_mismatch"}


@pytest.mark.parametrize("text", [b"{}", b"[", b"\xff", b'{"key": 5}', b"[" * 300], ids=repr)
def test_json_mismatch_for_what_is_no_sample_though_all_hashes_fit(copy: Copy, text: bytes) -> None:
    row = copy.rows[0]
    start, size = row["json_offset"], row["json_size"]
    copy.edit(lambda data: data.__setitem__(slice(start, start + size), text.ljust(size)))
    copy.write_index([row | {"xxh3_json": xxhash.xxh3_64_intdigest(text.ljust(size))}, *copy.rows[1:]], consistent=True)
    copy.forge(xxh3=xxhash.xxh3_64_hexdigest(copy.tar.read_bytes()))
    assert copy.found() == {(copy.shard, row["key"], "json_mismatch")}


# --- the other depths -----------------------------------------------------------------------------------------------


def test_quick_sees_sizes_headers_and_indexes_and_reads_no_payload(copy: Copy, run_module: RunModule) -> None:
    for row in copy.rows:
        copy.flip(row["payload_offset"] + 7)
    done = run_module("shard_tools.verify", copy.folder, "--quick")
    says = "sizes, headers and indexes are as they were packed; payloads were not read"
    assert done.stdout == f"{copy.folder}: 40 samples in 10 shards: {says}\n"
    copy.flip(copy.rows[1]["json_offset"] - 100)
    copy.edit(lambda data: data.__delitem__(slice(copy.rows[-1]["payload_offset"] + 5, None)))
    copy.folder.joinpath("train-000002.parquet").write_bytes(b"PAR1")
    copy.folder.joinpath("train-000003.tar").unlink()
    assert {(p.shard, p.key, p.kind) for p in copy.problems(depth="quick")} == {
        (copy.shard, copy.rows[1]["key"], "bad_header"),
        (copy.shard, copy.rows[-1]["key"], "truncated"),
        (copy.shard, None, "truncated"),
        ("train-000002.tar", None, "index_mismatch"),
        ("train-000003.tar", None, "missing_shard"),
    }


def test_quick_finds_the_faults_it_can_see(dataset: Path, tmp_path: Path) -> None:
    rng = random.Random(4)
    blind = {"json", "payload", "padding", "end_mark", "zeroed_block"}
    seen = 0
    for number in range(40):
        copy = Copy(dataset, tmp_path / str(number))
        fault = Fault(copy, rng)
        found = {problem.shard for problem in copy.problems(depth="quick")}
        assert found <= {fault.shard} or fault.shard is None, (number, fault.name)
        assert found or fault.name in blind, (number, fault.name)
        seen += bool(found)
        shutil.rmtree(copy.folder)
    assert seen > 20


def broken_video(copy: Copy) -> dict:
    """Break a video as if it had been packed so: every hash fits."""
    row, data = copy.rows[2], bytearray(copy.tar.read_bytes())
    start, end = row["payload_offset"], row["payload_offset"] + row["payload_size"]
    data[start + 300 : end] = bytes(end - start - 300)
    copy.tar.write_bytes(data)
    rows = [r | {"xxh3_payload": xxhash.xxh3_64_intdigest(data[start:end])} if r is row else r for r in copy.rows]
    copy.write_index(rows, consistent=True)
    copy.forge(xxh3=xxhash.xxh3_64_hexdigest(copy.tar.read_bytes()))
    return row


def test_undecodable(copy: Copy) -> None:
    row = broken_video(copy)
    assert copy.found() == set()
    [problem] = copy.problems(depth="deep")
    assert (problem.shard, problem.key, problem.kind, problem.offset) == (
        copy.shard, row["key"], "undecodable", row["payload_offset"])  # fmt: skip
    copy.flip(row["json_offset"])
    assert {problem.kind for problem in copy.problems(depth="deep")} == {"json_mismatch"}  # to be mended first


@pytest.mark.parametrize("tier", ["mjpeg", "y4m"])
def test_deep_decodes_frame_tiers(videos: Path, tmp_path: Path, tier: str) -> None:
    out = tmp_path / "out"
    pack_here(videos, "--out", out, "--frames", tier, "--limit", 3)
    dataset = read_dataset(out)
    with mock.patch.object(inspection, "run_local", serially):
        assert not list(inspection.problems_of(out, dataset, 1, "deep"))
    [info] = dataset.splits["train"].shards
    for _, row in shard_check.deep_tasks(out, info):
        with (out / info.file).open("r+b") as file:
            file.seek(row["payload_offset"] + row["payload_size"] - 100)
            file.write(b"damaged")
        problem = shard_check.decode_problem(out, (info.file, row))
        assert problem is not None
        assert (problem.kind, problem.detail) == (
            "undecodable", f"frame 23 does not match its hash in {row['key']}.json")  # fmt: skip


def decode_that_dies(folder: Path, task: tuple[str, dict]) -> object:
    if task[1]["key"] == os.environ.get("DEADLY_KEY"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return None


def deep_check_that_dies(folder: Path, classes: tuple[str, ...], task: tuple[str, ShardInfo]) -> object:
    with mock.patch.object(shard_check, "decode_problem", decode_that_dies):
        return shard_check.check_deep(folder, classes, task)


def test_deep_names_the_sample_that_kills_its_decoder(copy: Copy, run_module: RunModule, tmp_path: Path) -> None:
    row = copy.rows[1]
    (tmp_path / "deadly.py").write_text(
        "import sys\nfrom shard_tools.verify import __main__ as verify, shard_check\nimport test_verify\n"
        "if __name__ == '__main__':\n"  # in this process alone: workers are given these functions by name
        "    shard_check.check_deep = test_verify.deep_check_that_dies\n"
        "    shard_check.decode_problem = test_verify.decode_that_dies\n"
        "    sys.exit(verify.main(sys.argv[1:]))\n"
    )
    ledger.append(tmp_path / "run.jsonl", [Failure("crash", "WorkerDied", "m", "quarantined", shard=copy.shard)])
    places = os.pathsep.join(
        str(path) for path in (Path(__file__).parent, Path(__file__).parents[1], Path(__file__).parents[2])
    )
    done = subprocess.run(
        [sys.executable, tmp_path / "deadly.py", copy.folder, "--deep", "--from-failures", tmp_path / "run.jsonl"],
        env={**os.environ, "DEADLY_KEY": row["key"], "PYTHONPATH": places},
        capture_output=True, text=True, check=False, timeout=100,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[:-1] == [
        f"undecodable: {copy.shard}, key {row['key']}, byte {row['payload_offset']}: decoding it kills the process; "
        "fetch the video again and pack again, or leave it: training passes over it, and names it"
    ], done.stderr
    assert (done.returncode, lines[-1]) == (1, f"{copy.folder}: {len(copy.rows)} samples in 1 shards: 1 problem")


def test_deep_of_a_whole_data_set(dataset: Path, run_module: RunModule) -> None:
    done = run_module("shard_tools.verify", dataset, "--deep", "--workers", 2)
    assert done.stdout.endswith(": every byte is as it was packed, and every sample can be decoded\n")


# --- what a run's ledger names ----------------------------------------------------------------------------------------


def test_only_the_shards_that_a_run_names_are_checked(copy: Copy, tmp_path: Path, run_module: RunModule) -> None:
    copy.flip(copy.rows[0]["payload_offset"])
    copy.folder.joinpath("train-000003.parquet").unlink()  # no run has met it
    shards = [copy.shard, f"elsewhere/{copy.shard}", "train-000000.tar", "other-000000.tar", None]
    failures = [Failure("read", "HashMismatch", "m", "substituted", shard=shard) for shard in shards]
    ledger_file = tmp_path / "run/failures/rank0.jsonl"
    ledger.append(ledger_file, failures)
    for run in (tmp_path / "run", ledger_file):
        done = run_module("shard_tools.verify", copy.folder, "--from-failures", run, check=False)
        unknown, problem, verdict = done.stdout.splitlines()
        assert unknown == f"other-000000.tar: named by {run}, not part of this data set"
        assert problem.startswith(f"payload_mismatch: {copy.shard}, key {copy.rows[0]['key']}")
        assert verdict.endswith(" samples in 2 shards: 1 problem")
        assert done.returncode == 1


def test_a_run_that_names_no_shard(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert verify.main([str(dataset), "--from-failures", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{tmp_path}: names no shard of this data set"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--from-failures", "missing"], "missing: no such run or ledger file"),
        (["--from-failures", "tests"], "neither a run nor a ledger"),
        (["--quick", "--deep"], "not allowed with"),
    ],
)
def test_usage_errors_of_the_depths(dataset: Path, run_module: RunModule, arguments: list[str], says: str) -> None:
    done = run_module("shard_tools.verify", dataset, *arguments, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr.splitlines()[-1]


# --- hostile tars ---------------------------------------------------------------------------------------------------


def hostile(name: str, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(member, field, value)
    return member, b"x" * member.size


HOSTILE = {
    "a path out of the folder": hostile("../../evil.json", size=10),
    "an absolute path": hostile("/tmp/evil.json", size=10),
    "a folder in the name": hostile("a/evil.json", size=10),
    "a symbolic link": hostile("evil.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": hostile("evil.json", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "a device": hostile("evil.json", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
    "a pipe": hostile("evil.json", type=tarfile.FIFOTYPE),
    "a folder": hostile("evil", type=tarfile.DIRTYPE),
    "a long name": hostile("n" * 200 + ".json", size=10),
    "a PAX header": hostile("ü.json", size=10),
    "line breaks in the name": hostile("a\nb\rc.json", size=10),
    "an owner": hostile("evil.json", size=10, uid=1000, uname="root"),
    "no extension": hostile("evil", size=10),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_members_are_named_and_touch_nothing(dataset: Path, tmp_path: Path, case: str) -> None:
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        copy = Copy(dataset, tmp_path / str(tar_format))
        member, data = HOSTILE[case]
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
            try:
                tar.addfile(member, io.BytesIO(data))
            except ValueError:  # this format cannot hold it
                continue
        members = copy.members()
        size = len(buffer.getvalue().rstrip(b"\0"))
        copy.rebuild([*members[:2], buffer.getvalue()[: size + -size % BLOCK], *members[2:]])
        before = contents(tmp_path)
        found = copy.found()
        assert (copy.shard, copy.rows[1]["key"], "bad_header") in found  # where the index has the next sample
        assert {shard for shard, _, _ in found} == {copy.shard}
        assert contents(tmp_path) == before


def test_a_size_beyond_the_file_is_truncated_and_asks_for_no_memory(copy: Copy) -> None:
    members = copy.members()
    copy.rebuild([*members[:2], tar_header("evil.json", 8**11 - 1)])
    kinds = {kind for _, _, kind in copy.found()}
    assert "truncated" in kinds


def test_unexpected_order_of_members(copy: Copy) -> None:
    members = copy.members()
    copy.rebuild([members[1], members[0], *members[2:]])
    found = copy.found()
    assert (copy.shard, copy.rows[0]["key"], "missing_member") in found
    copy.rebuild([members[0], members[2], members[1], members[3], *members[4:]])
    assert {key for _, key, _ in copy.found()} == {copy.rows[0]["key"], copy.rows[1]["key"]}


def test_a_forged_shard_with_fitting_hashes_is_still_checked(copy: Copy) -> None:
    copy.rebuild([*copy.members(), tar_header("stray.json", 2) + b"{}" + padding(2)], consistent=True)
    assert copy.found() == {(copy.shard, "stray", "extra_member"), (copy.shard, "stray", "missing_member")}


# --- anything -------------------------------------------------------------------------------------------------------


class Fault:
    """One random fault in the shard under test, and what may be said of it."""

    def __init__(self, copy: Copy, rng: random.Random) -> None:
        self.copy, self.rng = copy, rng
        self.row = rng.choice(copy.rows)
        self.shard: str | None = copy.shard
        self.key: str | None = self.row["key"]
        self.kinds: set[str] = set()
        self.name = rng.choice([name for name in vars(Fault) if not name.startswith("_")])
        getattr(self, self.name)()

    def _flip(self, start: int, end: int) -> None:
        offset, bit = self.rng.randrange(start, end), 1 << self.rng.randrange(8)
        self.copy.edit(lambda data: data.__setitem__(offset, data[offset] ^ bit))

    def header(self) -> None:
        start = self.row[self.rng.choice(("json_offset", "payload_offset"))]
        self._flip(start - BLOCK, start)
        self.kinds = {"bad_header"}

    def json(self) -> None:
        self._flip(self.row["json_offset"], self.row["json_offset"] + self.row["json_size"])
        self.kinds = {"json_mismatch"}

    def payload(self) -> None:
        self._flip(self.row["payload_offset"], self.row["payload_offset"] + self.row["payload_size"])
        self.kinds = {"payload_mismatch"}

    def padding(self) -> None:
        end = self.row["json_offset"] + self.row["json_size"]
        self._flip(end, end + -end % BLOCK)
        self.kinds = {"bad_header"}

    def end_mark(self) -> None:
        row = self.copy.rows[-1]
        end = row["payload_offset"] + row["payload_size"]
        self._flip(end + -end % BLOCK, self.copy.tar.stat().st_size)
        self.key, self.kinds = None, {"bad_header"}

    def zeroed_block(self) -> None:
        first, last = self.row["json_offset"] - BLOCK, self.row["payload_offset"] + self.row["payload_size"]
        start = self.rng.randrange(first, last - BLOCK, BLOCK)
        self.copy.edit(lambda data: data.__setitem__(slice(start, start + BLOCK), bytes(BLOCK)))
        self.kinds = {"bad_header", "json_mismatch", "payload_mismatch"}

    def cut_anywhere(self) -> None:
        cut = self.rng.randrange(self.row["json_offset"] - BLOCK, self.row["payload_offset"] + self.row["payload_size"])
        self.copy.edit(lambda data: data.__delitem__(slice(cut, None)))
        self.kinds = {"truncated"}

    def cut_between_members(self) -> None:
        cut = self.row[self.rng.choice(("json_offset", "payload_offset"))] - BLOCK
        self.copy.edit(lambda data: data.__delitem__(slice(cut, None)))
        self.kinds = {"truncated"}

    def swapped_members(self) -> None:
        members = self.copy.members()
        first, second = self.rng.sample(range(len(members)), 2)
        members[first], members[second] = members[second], members[first]
        self.copy.rebuild(members)
        self.key = self.copy.rows[first // 2]["key"]
        self.kinds = {"missing_member", "index_mismatch"}

    def deleted_shard(self) -> None:
        self.copy.tar.unlink()
        self.key, self.kinds = None, {"missing_shard"}

    def stray_shard(self) -> None:
        self.shard = f"test-{self.rng.randrange(100, 999999):06}.tar"
        (self.copy.folder / self.shard).write_bytes(self.rng.randbytes(1000))
        self.key, self.kinds = None, {"extra_shard"}

    def edited_index(self) -> None:
        column = self.rng.choice([name for name in self.row if name not in ("key", "ext")])
        edited = self.row | {column: self.row[column] ^ 1 << self.rng.randrange(8)}
        self.copy.write_index([edited if row is self.row else row for row in self.copy.rows])
        self.kinds = {"index_mismatch"}

    def flipped_parquet(self) -> None:
        data = bytearray(self.copy.parquet.read_bytes())
        data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        self.copy.parquet.write_bytes(data)
        self.key, self.kinds = None, {"index_mismatch"}

    def edited_dataset(self) -> None:
        path = self.copy.folder / DATASET_FILE
        record = json.loads(path.read_text())
        shard = self.rng.choice(record["splits"]["train"]["shards"])
        field = self.rng.choice(("bytes", "samples", "xxh3", "index_xxh3"))
        shard[field] = shard[field] + 1 if field in ("bytes", "samples") else shard[field][::-1]
        path.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
        self.shard, self.key, self.kinds = None, None, {"dataset_mismatch"}


def test_every_random_fault_is_found_at_its_place(dataset: Path, tmp_path: Path) -> None:
    rng = random.Random(20)
    names = set()
    for number in range(80):
        copy = Copy(dataset, tmp_path / str(number))
        fault = Fault(copy, rng)
        names.add(fault.name)
        found = copy.found()
        assert {(fault.shard, fault.key, kind) for kind in fault.kinds} & found, (number, fault.name, fault.row, found)
        if fault.shard:  # nothing else is blamed
            assert {shard for shard, _, _ in found} == {fault.shard}, (number, fault.name, found)
        shutil.rmtree(copy.folder)
    assert len(names) == len([name for name in vars(Fault) if not name.startswith("_")])


# --- while it runs --------------------------------------------------------------------------------------------------


def test_a_shard_that_disappears_before_it_is_read_is_missing(copy: Copy) -> None:
    info = read_dataset(copy.folder).splits["train"].shards[1]
    copy.tar.unlink()
    [problem] = check_shard(copy.folder, (), ("train", info)).problems
    assert (problem.shard, problem.kind) == (copy.shard, "missing_shard")

    def disappearing(function: Callable, tasks: list, workers: int) -> object:
        shutil.rmtree(copy.folder, ignore_errors=True)
        return serially(function, tasks, workers)

    with mock.patch.object(inspection, "run_local", disappearing):
        found = list(inspection.problems_of(copy.folder, read_dataset(copy.folder), 1))
    assert {problem.kind for problem in found} == {"missing_shard", "missing_index"}


def check_that_dies(folder: Path, classes: tuple[str, ...], task: tuple[str, ShardInfo]) -> object:
    if task[1].file == "train-000001.tar":
        os.kill(os.getpid(), signal.SIGSEGV)
    return check_shard(folder, classes, task)


def test_a_shard_that_kills_its_reader_is_named_and_the_others_are_read(
    copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_check, "check_shard", check_that_dies)
    copy.parquet.with_name("train-000003.parquet").unlink()
    found = list(inspection.problems_of(copy.folder, read_dataset(copy.folder), 1))
    assert {(problem.shard, problem.kind) for problem in found} == {
        ("train-000001.tar", "unreadable"),
        ("train-000003.tar", "missing_index"),
    }


def test_every_kind_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert not [kind for kind in KINDS if f"def test_{kind}" not in text]
