"""What all commands do the same way: exit codes, one line for a user's mistake, a traceback for one of ours."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, RunModule

from shard_tools.common.cli import describe_os_error, one_line


def run_main(body: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command whose `main` has this body."""
    code = (
        "import errno, os, signal, sys, time\nfrom shard_tools.common.cli import CommandError, run\n"
        f"def main(argv):\n    {body}\nrun(main)\n"
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=REPOSITORY, text=True, stderr=subprocess.PIPE,
        check=False, timeout=60, **({"stdout": subprocess.PIPE} | options),
    )  # fmt: skip


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_value_of_main_is_the_exit_code(code: int) -> None:
    done = run_main(f"return {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("raise CommandError('a: missing;\\n  look there')", 2, "error: a: missing; look there\n"),
        ("open('/missing/file')", 2, "error: /missing/file: No such file or directory; check the path\n"),
        (
            "os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
            130,
            "interrupted; everything committed so far is kept\n",
        ),
        (
            "os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)",
            130,
            "interrupted; everything committed so far is kept\n",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_line(body: str, code: int, stderr: str) -> None:
    done = run_main(body)
    assert (done.returncode, done.stderr) == (code, stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_cut_short_what_the_first_began(number: int) -> None:
    """Impatient users, and batch systems that send one to the group and one to the process."""
    kill = f"os.kill(os.getpid(), {number})"
    done = run_main(
        f"try:\n        {kill}; time.sleep(9)\n    finally:\n        {kill}; time.sleep(.2); print('clean')"
    )
    assert (done.returncode, done.stdout) == (130, "clean\n")
    assert done.stderr == "interrupted; everything committed so far is kept\n"


def test_what_the_shell_keeps_from_the_keyboard_stays_so() -> None:
    """`command &` in a script: it ignores Ctrl-C."""
    done = run_main("os.kill(os.getpid(), signal.SIGINT); return 0", preexec_fn=ignore_interrupts)
    assert (done.returncode, done.stderr) == (0, "")


def ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@pytest.mark.parametrize("module", ["shard_tools.repair", "salt_wds.probe"])
def test_ctrl_c_while_a_command_loads_leaves_no_traceback(module: str, tmp_path: Path) -> None:
    (tmp_path / "pydantic.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stderr=subprocess.PIPE, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize(
    "body", ["raise KeyError('ours')", "raise OSError(errno.EBADF, 'ours')", "raise OSError('ours')"]
)
def test_a_mistake_of_ours_keeps_its_traceback(body: str) -> None:
    done = run_main(body)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ours" in done.stderr


def test_a_reader_that_reads_no_further_stops_the_command_without_noise() -> None:
    """`command | head`: what it did not come to is not done, so that is no exit code 0."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = run_main("print('x' * 100_000, flush=True)", stdout=write)
        assert (done.returncode, done.stderr) == (130, "")
        done = run_main("print('x'); return 0", stdout=write)
        assert (done.returncode, done.stderr) == (130, "")
    finally:
        os.close(write)


def test_a_usage_error_is_one_line(run_module: RunModule) -> None:
    done = run_module("shard_tools.verify", "--unknown", check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("; see python -m shard_tools.verify --help\n")


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this machine")
    with Path("/dev/full").open("w") as full:
        done = run_main("print('x', flush=True)", stdout=full)
    assert done.returncode == 2
    assert done.stderr.startswith("error: No space left on device; ")


def test_any_name_can_be_printed() -> None:
    done = run_main("print('caf\\udce9', chr(233)); raise CommandError('caf\\udce9')")
    assert done.returncode == 2
    assert done.stdout == "caf\\udce9 é\n"
    assert done.stderr == "error: caf\\udce9\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENOTDIR, errno.EROFS, errno.EFBIG, errno.EMFILE])
def test_errors_of_the_operating_system_name_path_and_remedy(number: int) -> None:
    path, what, remedy = describe_os_error(OSError(number, os.strerror(number), "/data/x")).partition(
        os.strerror(number)
    )
    assert (path, what) == ("/data/x: ", os.strerror(number))
    assert len(remedy) > 10


def test_one_line_is_one_line() -> None:
    assert one_line("a\n\tb\r\n c\u2028d") == "a b c d"


@pytest.mark.parametrize("command", ["pack", "verify", "failures", "synth"])
def test_every_command_explains_itself_and_refuses_unknown_flags(command: str, run_module: RunModule) -> None:
    done = run_module(f"shard_tools.{command}", "--help")
    assert "usage: python -m shard_tools." in done.stdout
    assert done.stderr == ""
    done = run_module(f"shard_tools.{command}", "x", "--no-such-flag", check=False)
    assert done.returncode == 2
    assert len([line for line in done.stderr.splitlines() if "error: " in line]) == 1
    assert "Traceback" not in done.stderr
