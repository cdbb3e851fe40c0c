"""Tars of other tools, and hostile ones: samples as webdataset makes them, everything else refused by name."""

from __future__ import annotations

import functools
import gc
import io
import os
import pickle
import random
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import contents
from damage import flip
from indexed import command, failures_of, rows_of
from video_maker import make_video

from shard_tools.common.cli import CommandError
from shard_tools.format.dataset import read_dataset
from shard_tools.format.tar import BLOCK, ShardDamage, padding, tar_header
from shard_tools.index import __main__ as index
from shard_tools.index.tar_reader import TarStream, iter_members, read_samples, split_name
from shard_tools.verify import __main__ as verify

Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def webm() -> bytes:
    return make_video(48, 32, 6)


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return make_video(40, 24, 4, codec="mpeg4", container="mp4")


# --- what other tools write -----------------------------------------------------------------------------------------


def by_webdataset(path: Path, members: Members, **options: object) -> None:
    import webdataset

    samples: dict[str, dict] = {}
    for name, data in members:
        if (named := split_name(name)) is not None:
            samples.setdefault(named[0], {"__key__": named[0]})[named[1]] = data
    with webdataset.TarWriter(str(path), encoder=False, **options) as writer:
        for sample in samples.values():
            writer.write(sample)


def by_gnu_tar(*options: str) -> Callable[[Path, Members], None]:
    def write(path: Path, members: Members) -> None:
        files = path.with_name("files")
        for name, data in members:
            (files / name).parent.mkdir(parents=True, exist_ok=True)
            (files / name).write_bytes(data)
            os.utime(files / name, (1, 1.5))
        subprocess.run(["tar", "-C", files, "--sort=name", *options, "-cf", path, "."], check=True)
        shutil.rmtree(files)

    return write


def by_tarfile(**options: object) -> Callable[[Path, Members], None]:
    def write(path: Path, members: Members) -> None:
        with tarfile.open(path, "w", **options) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size, info.mtime, info.uid, info.uname = len(data), 12345.678, 2_000_000, "jemand"
                tar.addfile(info, io.BytesIO(data))

    return write


WRITERS = {
    "webdataset": by_webdataset,
    "webdataset-pax": functools.partial(by_webdataset, format="PAX_FORMAT", mtime=1.25),  # as older versions write
    "gnu-gnu": by_gnu_tar("--format=gnu"),
    "gnu-oldgnu": by_gnu_tar("--format=oldgnu"),
    "gnu-ustar": by_gnu_tar("--format=ustar"),
    "gnu-posix": by_gnu_tar("--format=posix"),
    "gnu-v7": by_gnu_tar("--format=v7"),
    "tarfile-gnu": by_tarfile(format=tarfile.GNU_FORMAT),
    "tarfile-ustar": by_tarfile(format=tarfile.USTAR_FORMAT),
    "tarfile-pax": by_tarfile(format=tarfile.PAX_FORMAT, pax_headers={"comment": "a global header"}),
}


NAMES = (
    "北京_001",
    "cafe\u0301",
    "caf\xe9",
    "видео",
    "क्\u200dष",
    "👩\u200d🔬",
    "a\u3000b",
    "n" * 120,
    "d" * 90 + "/" + "é" * 60,
)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
@pytest.mark.parametrize("writer", [name for name in WRITERS if name not in ("webdataset", "gnu-v7")
                                    and "ustar" not in name])  # fmt: skip
def test_names_may_be_long_and_of_any_script(
    writer: str, mp4: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import webdataset

    (tmp_path / "tars").mkdir()
    path = tmp_path / "tars/видео-0.tar"
    WRITERS[writer](path, [(f"{name}.{ext}", data) for name in NAMES for ext, data in (("cls", b"0"), ("mp4", mp4))])
    assert command(index, tmp_path / "tars") == 0
    keys = [sample["__key__"] for sample in webdataset.WebDataset([str(path)], shardshuffle=False)]
    gc.collect()
    assert [row["key"] for row in rows_of(tmp_path / "tars", path.name)] == keys
    assert len(keys) == len(NAMES)
    assert [command(verify, tmp_path / "tars", *more) for more in ([], ["--quick"], ["--deep"])] == [0, 0, 0]
    flip(path, rows_of(tmp_path / "tars", path.name)[0]["payload_offset"])
    capsys.readouterr()
    assert command(verify, tmp_path / "tars") == 1
    assert f"payload_mismatch: {path.name}, key {keys[0]}, byte" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
@pytest.mark.parametrize("writer", WRITERS)
def test_samples_are_those_of_plain_webdataset(writer: str, webm: bytes, mp4: bytes, tmp_path: Path) -> None:
    import webdataset

    (tmp_path / "tars").mkdir()
    path = tmp_path / "tars/train-0.tar"
    members = [
        ("a1.cls", b"2"), ("a1.json", b'{"caption": "x"}'), ("a1.WEBM", webm), ("a1.txt", b"hallo"),
        ("folder.d/b2.mp4", mp4), ("folder.d/b2.json", b"[1]"),
        ("folder.d/c3.left.mp4", mp4), ("no_extension", b"x"), ("._a.webm", b"x"), ("z-9.webm", webm),
        ("z-9.zjson", b""),
    ]  # fmt: skip
    WRITERS[writer](path, members)
    before = path.read_bytes()
    assert command(index, tmp_path / "tars") == 0
    assert path.read_bytes() == before
    rows = rows_of(tmp_path / "tars", "train-0.tar")
    samples = list(webdataset.WebDataset([str(path)], shardshuffle=False))
    gc.collect()
    assert [row["key"] for row in rows] == [sample["__key__"] for sample in samples]
    assert len(rows) == 4
    for row, sample in zip(rows, samples, strict=True):
        ext = next(name for name in sample if name.endswith(row["ext"]))
        assert before[row["payload_offset"] :][: row["payload_size"]] == sample[ext]
        head = before[row["json_offset"] :][: row["json_size"]]
        assert head == (sample["json"] if sample.get("json", b"").startswith(b"{") else b"")
    assert [row["label"] for row in rows if row["key"].endswith("a1")] == [2]
    assert {(row["num_frames"], row["width"], row["height"]) for row in rows} == {(6, 48, 32), (4, 40, 24)}
    assert [command(verify, tmp_path / "tars", *more) for more in ([], ["--quick"], ["--deep"])] == [0, 0, 0]


def test_the_key_is_webdatasets(tmp_path: Path) -> None:
    from webdataset.tariterators import base_plus_ext

    names = ["a.b", "d.e/f.g", "./a.B.c", "a", ".a", ".a.b", "a/.b", "a/.b.c", "/a.b", "a.", "a//b.c", "ü.é", "a\n.b"]
    for name in names:
        key, ext = base_plus_ext(name)
        assert split_name(name) == (None if key is None else (key, ext.lower()))


@pytest.mark.parametrize(
    ("name", "code", "keys"),
    [
        ("unicode_keys/train-000000.tar", 0, ["北京_001", "café_002", "plain_003", "видео_004"]),
        ("tars/lone_zero_block.tar", 0, ["a0000", "a0001", "a0002"]),
        ("tars/dots.tar", 1, ["movie"]),
    ],
)
def test_tars_that_others_reported(name: str, code: int, keys: list[str], cases: Path, tmp_path: Path) -> None:
    shutil.copy(cases / name, tmp_path / "a.tar")
    assert command(index, tmp_path) == code
    assert [row["key"] for row in rows_of(tmp_path, "a.tar")] == keys
    assert command(verify, tmp_path, "--deep") == 0


def test_an_unsorted_tar_is_told_how_to_be_sorted(webm: bytes, tmp_path: Path) -> None:
    """Members of one sample are not adjacent: webdataset would give each piece by itself."""
    files = [(f"{n}.{ext}", data) for ext, data in (("json", b"{}"), ("webm", webm)) for n in range(3)]
    (tmp_path / "tars").mkdir()
    WRITERS["tarfile-gnu"](tmp_path / "tars/a.tar", files)
    with pytest.raises(
        CommandError, match=r"first: a.tar, key 0: its members are not adjacent: sort .*tar --sort=name"
    ):
        command(index, tmp_path / "tars")
    WRITERS["tarfile-gnu"](
        tmp_path / "tars/b.tar", [("x.webm", webm), *files[:1], *files[3:4], *files[4:], *files[1:3]]
    )
    assert command(index, tmp_path / "tars") == 1
    assert [row["key"] for row in rows_of(tmp_path / "tars", "b.tar")] == ["x", "0"]
    failures = failures_of(tmp_path / "tars")
    assert [(f.shard, f.key) for f in failures] == [
        *(("a.tar", str(n)) for n in range(3)),
        ("b.tar", "1"),
        ("b.tar", "2"),
    ]
    assert all("tar --sort=name" in failure.message for failure in failures)


def test_several_videos_under_one_key_are_named(webm: bytes, tmp_path: Path) -> None:
    """Names with dots, whose key is only what stands before the first."""
    (tmp_path / "tars").mkdir()
    WRITERS["tarfile-gnu"](tmp_path / "tars/a.tar", [(f"movie.{n:03}.webm", webm) for n in range(7)])
    assert command(index, tmp_path / "tars") == 1
    [failure] = failures_of(tmp_path / "tars")
    assert failure.message == (
        "7 videos under one key (000.webm, 001.webm, 002.webm, 003.webm, 004.webm, ...), which ends at the first dot "
        "of a file name; only 000.webm is used: rename the files without dots, or choose with --ext EXT"
    )
    assert command(index, tmp_path / "tars", "--ext", "003.webm") == 0


def test_members_that_are_not_needed_are_not_kept() -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name in ("a.bin", "a.webm"):
            info = tarfile.TarInfo(name)
            info.size = 3 << 20
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    [sample] = read_samples(TarStream(data), lambda sample, ext: 100 if ext == "webm" else 0, Counter())
    assert sample.parts == []
    assert "a.webm: 3145728 bytes, the limit is 100" in str(sample.refusal)


# --- hostile tars ---------------------------------------------------------------------------------------------------


def checked(block: bytes | bytearray) -> bytes:
    """A header block with the checksum that belongs to it."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def header(name: str, size: int = 0, kind: bytes = b"0", link: str = "", magic: bytes = b"ustar\x0000") -> bytes:
    block = bytearray(tar_header(name, size))
    block[156:157], block[157:257], block[257:265] = kind, link.encode().ljust(100, b"\0"), magic
    return checked(block)


def member(name: str, data: bytes) -> bytes:
    return header(name, len(data)) + data + padding(len(data))


def pax(**records: str) -> bytes:
    lines = b""
    for key, value in records.items():
        body = f" {key.replace('__', '.')}={value}\n"
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        lines += f"{length}{body}".encode()
    return header("PaxHeaders/x", len(lines), b"x") + lines + padding(len(lines))


def gnu_long(kind: bytes, name: str) -> bytes:
    data = name.encode() + b"\0"
    return header("././@LongLink", len(data), kind, magic=b"ustar  \0") + data + padding(len(data))


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


# A member between good samples, the end of the key it is named by, and words of the message.
HOSTILE: dict[str, tuple[Callable[[bytes, Path], bytes], str, str]] = {
    "traversal": (lambda v, out: member("../../evil.webm", v), "../../evil", "leads out of the folder"),
    "traversal-inside": (lambda v, out: member("a/../../evil.webm", v), "a/../../evil", "leads out of the folder"),
    "absolute": (lambda v, out: member(f"{out}/evil.webm", v), "/evil", "its name is absolute"),
    "symlink": (lambda v, out: header("bad.webm", 0, b"2", f"{out}/evil.webm"), "bad", "a symbolic link"),
    "hardlink": (lambda v, out: header("bad.webm", 0, b"1", "good0.webm"), "bad", "a hard link"),
    "character-device": (lambda v, out: header("bad.webm", 0, b"3"), "bad", "a character device"),
    "block-device": (lambda v, out: header("bad.webm", 0, b"4"), "bad", "a block device"),
    "fifo": (lambda v, out: header("bad.webm", 0, b"6"), "bad", "a FIFO"),
    "unknown-type": (lambda v, out: header("bad.webm", len(v), b"Z") + v + padding(len(v)), "bad", "unknown type"),
    "pax-name": (lambda v, out: pax(path=f"{out}/evil.webm") + member("bad.webm", v), "/evil", "its name is absolute"),
    "pax-traversal": (lambda v, out: pax(path="a/../../e.webm") + member("bad.webm", v), "../e", "leads out of the"),
    "pax-link": (lambda v, out: pax(linkpath="x") + member("bad.webm", v), "bad", "changes its linkpath"),
    "pax-size": (lambda v, out: pax(size=str(len(v))) + header("bad.webm", 0) + v + padding(len(v)), "bad", "its size"),
    "pax-sparse": (lambda v, out: pax(GNU__sparse__major="1") + member("bad.webm", v), "bad", "GNU.sparse.major"),
    "gnu-long-name": (lambda v, out: gnu_long(b"L", "../" * 40 + "e.webm") + member("x", v), "../e", "leads out"),
    "gnu-endless-name": (lambda v, out: gnu_long(b"L", "e" * 1100 + ".webm") + member("x", v), "eee", "more than 1024"),
    "gnu-long-link": (
        lambda v, out: gnu_long(b"K", "y" * 120) + header("bad.webm", 0, b"2", "y"),
        "bad", "a symbolic link",
    ),
    "gnu-sparse": (
        lambda v, out: header("bad.webm", len(v), b"S", magic=b"ustar  \0") + v + padding(len(v)),
        "bad", "a sparse file",
    ),
    "control-character": (lambda v, out: member("a\n\x1b[2Jb.webm", v), "a\n\x1b[2Jb", "control characters"),
    "bytes-of-no-text": (lambda v, out: checked(b"\xe9" + header("bad.webm", len(v))[1:]) + v + padding(len(v)),
                         "ad", "not UTF-8 text"),
    "pax-damaged": (
        lambda v, out: header("x", 9, b"x") + b"99 path=x" + padding(9) + member("bad.webm", v),
        "\0", "control characters",
    ),
    "pickle": (
        lambda v, out: member("bad.pickle", pickle.dumps(Bomb(out / "evil.webm"))),
        "bad", "no video in it, only pickle",
    ),
}  # fmt: skip
# After these, readers disagree about where the next member begins: the whole tar is left out.
BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "size-beyond-the-file": (lambda v: header("bad.webm", 8**11 - 1) + v, "truncated"),
    "base-256-size-beyond": (lambda v: with_size(b"\x80" + b"\xff" * 11) + v, "truncated"),
    "base-256-size-negative": (lambda v: with_size(b"\xff" * 11 + b"\x00") + v, "negative"),
    "size-no-number": (lambda v: with_size(b"-0000000001\0") + v, "negative"),
    "pax-size-beyond": (lambda v: pax(size="9" * 18) + member("bad.webm", v), "truncated"),
    "pax-size-endless": (lambda v: pax(size="9" * 5000) + member("bad.webm", v), "not a tar header"),
    "pax-size-negative": (lambda v: pax(size="-512") + member("bad.webm", v), "negative"),
    "pax-without-member": (lambda v: pax(mtime="1") + bytes(2 * BLOCK), "extension header without its member"),
    "pax-twice": (lambda v: pax(mtime="1") * 2 + member("bad.webm", v), "two extension headers"),
    "pax-and-gnu-name": (
        lambda v: pax(path="a.webm") + gnu_long(b"L", "b.webm") + member("bad.webm", v),
        "two extension headers",
    ),
    "pax-huge": (lambda v: header("x", 8**11 - 1, b"x") + member("bad.webm", v), "extension header of"),
    "pax-global-path": (lambda v: global_path() + member("bad.webm", v), "changes the path of all members"),
    "link-with-data": (lambda v: header("bad.webm", 512, b"2") + bytes(512), "of a type that has none"),
    "checksum": (lambda v: b"X" + member("bad.webm", v)[1:], "not a tar header"),
    "data-behind-the-end": (lambda v: bytes(2 * BLOCK) + member("bad.webm", v), "after the end-of-archive mark"),
}  # fmt: skip


def with_size(field: bytes) -> bytes:
    block = bytearray(header("bad.webm"))
    block[124:136] = field
    return checked(block)


def global_path() -> bytes:
    block = pax(path="x")
    return checked(block[:156] + b"g" + block[157:BLOCK]) + block[BLOCK:]


def write_tar(path: Path, hostile: bytes, webm: bytes) -> None:
    """A tar of good samples with something between them."""
    good = [member(f"good{n}.json", b"{}") + member(f"good{n}.webm", webm) for n in range(3)]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(good[0] + hostile + good[1] + good[2] + bytes(2 * BLOCK))


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_member_costs_its_sample_and_is_named(kind: str, webm: bytes, tmp_path: Path) -> None:
    make, key, message = HOSTILE[kind]
    (tmp_path / "outside").mkdir()
    write_tar(tmp_path / "tars/x.tar", make(webm, tmp_path / "outside"), webm)
    before = contents(tmp_path)
    assert command(index, tmp_path / "tars") == 1
    [failure] = failures_of(tmp_path / "tars")
    assert (failure.stage, failure.shard, failure.action) == ("pack", "x.tar", "skipped")
    assert failure.time is failure.pid is None  # the same tars give the same file
    assert failure.key is not None
    assert failure.key.endswith(key)
    assert message in failure.message
    assert failure.offset is not None
    assert [row["key"] for row in rows_of(tmp_path / "tars", "x.tar")] == ["good0", "good1", "good2"]
    assert command(verify, tmp_path / "tars") == 0
    new = contents(tmp_path).keys() - before.keys()
    assert new == {"tars/dataset.json", "tars/failures.jsonl", "tars/x.parquet"}
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("kind", BROKEN)
def test_a_tar_that_readers_read_differently_is_left_out_whole(kind: str, webm: bytes, tmp_path: Path) -> None:
    make, message = BROKEN[kind]
    write_tar(tmp_path / "tars/x.tar", make(webm), webm)
    before = contents(tmp_path)
    with pytest.raises(CommandError, match=r"no sample of its 1 tars can be used \(first: x.tar: ") as caught:
        command(index, tmp_path / "tars")
    assert len(str(caught.value).splitlines()) == 1
    assert contents(tmp_path) == before
    write_tar(tmp_path / "tars/y.tar", b"", webm)
    assert command(index, tmp_path / "tars") == 1
    [failure] = failures_of(tmp_path / "tars")
    assert (failure.shard, failure.key) == ("x.tar", None)
    assert message in failure.message
    assert [info.file for info in read_dataset(tmp_path / "tars").shards] == ["y.tar"]
    new = contents(tmp_path).keys() - before.keys()
    assert new == {"tars/dataset.json", "tars/failures.jsonl", "tars/y.parquet", "tars/y.tar"}


@pytest.mark.parametrize("blocks", [0, 1])
def test_a_tar_without_the_whole_end_mark_is_read_with_a_warning(
    blocks: int, webm: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "tars/x.tar", b"", webm)
    size = (tmp_path / "tars/x.tar").stat().st_size - (2 - blocks) * BLOCK
    os.truncate(tmp_path / "tars/x.tar", size)
    assert command(index, tmp_path / "tars") == 0
    warning = capsys.readouterr().err.splitlines()[0]
    assert warning.startswith(f"warning: x.tar ends at byte {size} without the end-of-archive mark of two zero blocks")
    assert [row["key"] for row in rows_of(tmp_path / "tars", "x.tar")] == ["good0", "good1", "good2"]
    assert [command(verify, tmp_path / "tars", *more) for more in ([], ["--quick"], ["--deep"])] == [0, 0, 0]


@pytest.mark.parametrize("cut", ["header", "data", "extension", "everything"])
def test_a_tar_that_was_cut_is_left_out(cut: str, webm: bytes, tmp_path: Path) -> None:
    """Python's tarfile, and so webdataset, ends silently at most of these."""
    write_tar(tmp_path / "tars/y.tar", b"", webm)
    whole = (tmp_path / "tars/y.tar").read_bytes()
    cuts = {
        "header": whole[: -2 * BLOCK - len(member("a", webm)) + 100],
        "data": whole[: -3 * BLOCK],
        "extension": whole[: -2 * BLOCK] + pax(mtime="1"),
        "everything": b"",
    }
    (tmp_path / "tars/x.tar").write_bytes(cuts[cut])
    assert command(index, tmp_path / "tars") == 1
    [failure] = failures_of(tmp_path / "tars")
    assert (failure.shard, failure.error) == ("x.tar", "ShardDamage")
    assert "truncated at byte" in failure.message or cut == "everything"


def test_any_damage_of_a_tar_is_an_error_or_harmless(webm: bytes) -> None:
    """Every byte of every header changed: either nothing of what is read changes, or it is refused."""
    data = pax(mtime="1.5") + member("a.webm", b"video") + bytes(2 * BLOCK)
    entries = list(iter_members(TarStream(io.BytesIO(data))))
    harmless = []
    for place in [*range(BLOCK), *range(2 * BLOCK, 3 * BLOCK)]:
        damaged = bytearray(data)
        damaged[place] ^= 0x15
        try:
            assert list(iter_members(TarStream(io.BytesIO(damaged)))) == entries
            harmless.append(place % BLOCK)
        except ShardDamage:
            pass
    assert set(harmless) <= {155}  # behind the checksum's digits


def test_whatever_a_header_says_only_shard_damage_is_raised() -> None:
    """Headers changed at random, with checksums that fit: members and extensions that tarfile trips over."""
    rng = random.Random(0)
    parts = [
        pax(mtime="1"),
        pax(GNU__sparse__major="1", GNU__sparse__minor="0"),
        pax(GNU__sparse__map="1,2", size="3"),
        gnu_long(b"L", "y" * 120),
        member("a.webm", b"video"),
        header("s.webm", 5, b"S", magic=b"ustar  \0"),
    ]
    outcomes = Counter[str]()
    for _ in range(2000):
        data = bytearray(b"".join(rng.choices(parts, k=4)) + bytes(2 * BLOCK))
        for _ in range(rng.choice([0, 1, 2])):
            place = rng.randrange(len(data))
            data[place] = rng.choice(b"\0 019=\n\x80\xff")
            start = place // BLOCK * BLOCK
            data[start : start + BLOCK] = checked(data[start : start + BLOCK])
        try:
            outcomes["read"] += len(list(iter_members(TarStream(io.BytesIO(data)))))
        except ShardDamage as damage:
            outcomes[damage.kind] += 1
    assert outcomes.keys() == {"read", "bad_header", "truncated"}
