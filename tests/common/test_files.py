"""Files that survive a crash: replaced as a whole or not at all, locked, and appended line by line."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import contents

from shard_tools.common.cli import CommandError
from shard_tools.common.files import append_lines, lock, read_json_lines, replace_file, replace_folder, write_atomic


def fill(path: Path, text: str) -> None:
    with replace_folder(path) as folder:
        (folder / "a").write_text(text)


@pytest.mark.parametrize("write", [lambda path, text: write_atomic(path, text.encode()), fill], ids=["file", "folder"])
def test_a_replacement_that_fails_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, str], None]
) -> None:
    write(tmp_path / "x", "old")
    write(tmp_path / "x", "new")
    before = contents(tmp_path)
    assert list(before.values()) == [b"new"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(OSError, match=r"full: '.*x"):
            write(tmp_path / "x", "newer")
    assert contents(tmp_path) == before


def test_an_exception_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(FileNotFoundError, match="elsewhere"), replace_file(tmp_path / "x"):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(FileNotFoundError) as caught:  # names the file, not the temporary one that could not be made
        write_atomic(tmp_path / "missing" / "x", b"")
    assert str(caught.value.filename) == str(tmp_path / "missing" / "x")
    with pytest.raises(KeyboardInterrupt), replace_folder(tmp_path / "y") as folder:
        interrupted(folder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", [True, False])
def test_a_lock_excludes_all_others_unless_both_are_shared(tmp_path: Path, folder: bool) -> None:
    path = tmp_path if folder else tmp_path / "lock"
    if not folder:
        path.touch()
    with lock(path, "busy"):
        for shared in (True, False):
            with pytest.raises(CommandError, match="busy"), lock(path, "busy", shared=shared):
                pass
    shared_twice = lock(path, "busy", shared=True), lock(path, "busy", shared=True)
    with shared_twice[0], shared_twice[1], pytest.raises(CommandError, match="busy"), lock(path, "busy"):
        pass
    with lock(path, "busy"):
        pass


def test_lines_after_one_that_a_crash_cut_short_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.jsonl"
    append_lines(path, ['{"a": 1}', '{"a": 2}'])
    with path.open("ab") as file:
        file.write(b'{"a": 3')
    append_lines(path, ['{"a": "\udce9"}'])
    append_lines(path, [])
    with path.open("ab") as file:
        file.write(b"\n\n[1]\n\xff\n" + b"[" * 100_000 + b"\n")
    assert read_json_lines(path) == ([{"a": 1}, {"a": 2}, {"a": "?"}], 4)
