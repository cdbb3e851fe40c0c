"""What all commands do the same way: names, options, exit codes, one-line errors, and a traceback for a bug."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, run_module

import salt_wds.__main__
import shard_tools.__main__
import shard_tools.format
from shard_tools.common import cli
from shard_tools.common.cli import Parser, describe_os_error, one_line

INTERRUPTED = "interrupted; everything committed so far is kept\n"
COMMANDS = [
    f"{package}.{name}"
    for package, module in (("shard_tools", shard_tools.__main__), ("salt_wds", salt_wds.__main__))
    for name in module.COMMANDS
]


def run_main(body: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command whose `main` has this body."""
    code = (
        "import errno, os, signal, sys, time\nfrom shard_tools.common.cli import CommandError, run\n"
        f"def main(argv):\n    {body}\nrun(main)\n"
    )
    defaults = {"stdout": subprocess.PIPE, "preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}
    options = defaults | options
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(
        command, cwd=REPOSITORY, text=True, stderr=subprocess.PIPE, check=False, timeout=60, **options
    )


# --- exit codes and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("return 0", 0, ""),
        ("return 1", 1, ""),
        ("raise CommandError('a: missing;\\n  look there')", 2, "error: a: missing; look there\n"),
        ("raise CommandError('a\\x1b[2J\\x9b: missing')", 2, "error: a\\x1b[2J\\x9b: missing\n"),
        ("open('/missing/file')", 2, "error: /missing/file: No such file or directory; check the path\n"),
        ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130, INTERRUPTED),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 130, INTERRUPTED),
        ("os.kill(os.getpid(), signal.SIGHUP); time.sleep(9)", 130, INTERRUPTED),
    ],
)
def test_exit_codes_and_one_line_errors(body: str, code: int, stderr: str) -> None:
    done = run_main(body)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", stderr)


def test_a_second_signal_does_not_interrupt_the_clean_up_after_the_first() -> None:
    """Impatient users, and batch systems that send one to the group and one to the process."""
    kill = "os.kill(os.getpid(), signal.{})"
    done = run_main(
        f"try:\n        {kill.format('SIGTERM')}; time.sleep(9)\n"
        f"    finally:\n        {kill.format('SIGINT')}; time.sleep(.2); print('clean')"
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "clean\n", INTERRUPTED)


def test_a_signal_within_an_exec_ends_with_130(tmp_path: Path) -> None:
    """dataclasses and torch are made by `exec`; CPython ends `-m` with SIGINT after a KeyboardInterrupt in one."""
    (tmp_path / "interrupted.py").write_text(
        "from shard_tools.common.cli import run\n"
        "run(lambda _: exec('import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, INTERRUPTED)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(number: signal.Signals) -> None:
    """`command &` in a script ignores SIGINT, and nohup SIGHUP."""
    ignore = lambda: signal.signal(number, signal.SIG_IGN)  # noqa: E731
    done = run_main(f"os.kill(os.getpid(), {int(number)}); return 0", preexec_fn=ignore)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["shard_tools.repair", "salt_wds.probe", "shard_tools repair"])
def test_ctrl_c_while_a_command_loads_leaves_no_traceback(module: str, tmp_path: Path) -> None:
    (tmp_path / "pydantic.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", *module.split(), "--help"], cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("body", ["raise KeyError('ours')", "raise OSError(errno.EBADF, 'ours')"])
def test_a_bug_keeps_its_traceback(body: str) -> None:
    done = run_main(body)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ours" in done.stderr


@pytest.mark.parametrize("body", ["print('x' * 100_000, flush=True)", "print('x'); return 0", None])
def test_a_closed_pipe_stops_the_command_without_a_message(body: str | None) -> None:
    """`command | head`: the work that was left is not done, so the exit code is not 0. None: the list of commands."""
    read, write = os.pipe()
    os.close(read)
    listing = "from shard_tools.common.cli import dispatch; dispatch('shard_tools', {'pack': 'pack'}); return 0"
    try:
        done = run_main(body or listing, stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (130, "")


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this machine")
    with Path("/dev/full").open("w") as full:
        done = run_main("print('x', flush=True)", stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith("error: No space left on device; ")


def test_any_file_name_can_be_printed() -> None:
    done = run_main("print('caf\\udce9', chr(233)); raise CommandError('caf\\udce9')")
    assert (done.returncode, done.stdout, done.stderr) == (2, "caf\\udce9 é\n", "error: caf\\udce9\n")
    assert one_line("a\n\tb\r\n c\u2028d\u202e\u3000\x1b") == "a b c d\\u202e\u3000\\x1b"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENOTDIR, errno.EROFS, errno.EFBIG, errno.EMFILE])
def test_errors_of_the_operating_system_name_path_and_remedy(number: int) -> None:
    text = describe_os_error(OSError(number, os.strerror(number), "/data/x"))
    assert text.startswith(f"/data/x: {os.strerror(number)}; ")
    assert len(text.partition("; ")[2]) > 10


# --- commands and their options -------------------------------------------------------------------------------------


def test_every_command_is_listed(repository: Path) -> None:
    found = {".".join(path.relative_to(repository).parts[:2]).removesuffix(".py")
             for package in ("shard_tools", "salt_wds") for path in (repository / package).rglob("*.py")
             if "    run(main" in path.read_text()}  # fmt: skip
    assert found == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_a_screen_and_unknown_options_are_one_line(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = (repository / command.replace(".", "/")).is_dir()
    main = importlib.import_module(f"{command}.__main__" if folder else command).main
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert text.startswith(f"usage: python -m {command} ")
    assert "Exit codes: 0 " in " ".join(text.split())
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 80
    with pytest.raises(SystemExit) as left:
        main(["x", "--no-such-option"])
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert line.startswith("error: ")
    assert line.endswith(" --help")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["shard_tools"], 0, "usage: shard-tools COMMAND ..."),
        (["salt_wds", "--help"], 0, "train      train a student encoder against a frozen teacher"),
        (["salt_wds", "tarin"], 2, "error: salt-wds: no command 'tarin'; did you mean train? see salt-wds --help"),
        (["shard_tools", "failures", "/missing"], 2, "error: /missing: no such run or file"),
    ],
)
def test_one_program_runs_all_commands(words: list[str], code: int, says: str) -> None:
    done = run_module(*words, check=False)
    assert done.returncode == code
    assert says in done.stdout + done.stderr


def test_usage_shows_how_the_command_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "shard_tools.pack", "shard-tools", "x", "shard-tools"])
    assert Parser("shard_tools.pack").prog == "python -m shard_tools.pack"
    monkeypatch.setattr(sys, "orig_argv", ["/venv/bin/python", "/venv/bin/shard-tools", "pack", "x"])
    assert Parser("shard_tools.pack").prog == "shard-tools pack"


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (cli.positive_int, "1", 1),
        (cli.positive_int, "0", "'0' is not a whole number from 1"),
        (cli.positive_int, "1.5", "'1.5' is not a whole number from 1"),
        (cli.whole_number(2, 31), "32", "'32' is not a whole number from 2 to 31"),
        (cli.seed_number, str(2**63), f"'{2**63}' is not a whole number from 0 to {2**63 - 1}"),
        (cli.positive_float, "1e-3", 1e-3),
        (cli.positive_float, "0", "'0' is not a number above 0"),
        (cli.positive_float, "nan", "'nan' is not a number above 0"),
        (cli.positive_float, "x", "'x' is not a number above 0"),
        (cli.size_in_bytes, "256MiB", 256 * 2**20),
        (cli.size_in_bytes, "1 gb", 10**9),
        (cli.size_in_bytes, "-1", "'-1' is not a size such as 256MiB"),
        (cli.comma_separated(cli.positive_int), "1,2, 4", (1, 2, 4)),
        (cli.comma_separated(cli.one_of("a", "b")), "a,c", "'c' is none of a, b"),
        (cli.path, "~/x", Path.home() / "x"),
    ],
)
def test_types_of_arguments(parse: Callable[[str], object], text: str, value: object) -> None:
    try:
        assert parse(text) == value
    except argparse.ArgumentTypeError as error:
        assert str(error) == value  # noqa: PT017


def test_public_names_are_loaded_at_first_use() -> None:
    code = "import sys, salt_wds, shard_tools.format; print({'torch', 'pydantic', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("set()\n", "")
    for module in (salt_wds, shard_tools.format):
        assert all(callable(getattr(module, name)) for name in module.__all__)
        assert not hasattr(module, "load_nothing")
