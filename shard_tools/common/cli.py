"""The command line of every command of both packages: options, one-line errors, exit codes.

Exit codes: 0 fine; 1 ran, and found or left problems; 2 usage or configuration; 130 interrupted. A user's mistake is
reported in one line (what, where, what to do) without a traceback. A bug keeps its traceback.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

OK, PROBLEMS, USAGE, INTERRUPTED = 0, 1, 2, 130

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SIZE_UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}

_CONTROL = {number: f"\\x{number:02x}" for number in (*range(0x20), *range(0x7F, 0xA0))}  # a terminal obeys them
_CONTROL |= {number: f"\\u{number:04x}" for number in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}  # text order
_BREAKS = re.compile(r"[ \t\n\v\f\r\x1c-\x1e\x85\u2028\u2029]+")  # not the wide space that a name may have

T = TypeVar("T")

_REMEDIES = {
    errno.ENOSPC: "make room there and run the same command again; it continues where it stopped",
    errno.EDQUOT: "raise the quota or make room there and run the same command again; it continues where it stopped",
    errno.EACCES: "give this user access to it, or name another folder",
    errno.EPERM: "give this user access to it, or name another folder",
    errno.EROFS: "the file system is read-only; name a folder on a writable one",
    errno.ENOENT: "check the path",
    errno.ENAMETOOLONG: "a part of the path is too long; check the path",
    errno.ELOOP: "the path is a link to itself; check it",
    errno.ENOTDIR: "a file stands where a folder is needed; check the path",
    errno.EISDIR: "a folder stands where a file is needed; check the path",
    errno.EEXIST: "something else stands there already; name another path",
    errno.EFBIG: "raise the limit on file sizes (`ulimit -f`), or choose smaller files",
    errno.ENOMEM: "make room in memory, or take fewer workers",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.EIO: "the device reported an input/output error; check the disk (dmesg), then run the same command again",
}


class CommandError(Exception):
    """A mistake in usage, configuration or environment: one line for the user, exit code 2."""


# --- options ------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors and the options that several commands share.

    Args:
        command: the module, such as "shard_tools.verify".
        exit_codes: what each means, such as "0 whole; 1 problems, one line each; 2 usage"; 130 is added where it has
            no meaning of its own.
        page: the page in docs/ that explains the command at length, without its suffix.
        options: of argparse.ArgumentParser.
    """

    def __init__(
        self, command: str = "", description: str = "", exit_codes: str = "", page: str = "", **options: Any
    ) -> None:
        if command:
            options["prog"] = _program(command)
        if exit_codes:
            codes = exit_codes if "130" in exit_codes else f"{exit_codes}; 130 interrupted"
            options["epilog"] = f"Exit codes: {codes}." + (f" More in docs/{page}.md." if page else "")
        super().__init__(description=description, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(fail(f"{message}; see {self.prog} --help"))

    def add_dataset(self) -> None:
        """The argument `dir`: the folder of a data set."""
        self.add_argument("dir", type=path, metavar="DIR", help="folder of the data set (holds dataset.json)")

    def add_json(self, help: str = "print one JSON object instead of text") -> None:
        self.add_argument("--json", action="store_true", help=help)

    def add_workers(self, what: str = "worker processes") -> None:
        """The option `--workers N`; its default is the number of cores this process may use."""
        cores = available_cores()
        self.add_argument(
            "--workers", type=positive_int, default=cores, metavar="N", help=f"{what} (default {cores}, the cores)"
        )

    def add_config(self, what: str = "TOML file of the run, see configs/") -> None:
        """The options `--config FILE` and `--set SECTION.KEY=VALUE` (a list of texts)."""
        self.add_argument("--config", type=path, required=True, metavar="FILE", help=what)
        self.add_argument(
            "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a key; repeatable"
        )

    def add_device(self) -> None:
        self.add_argument(
            "--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: a GPU if there is one"
        )


def _program(command: str) -> str:
    """The command as the user called it: `python -m shard_tools.pack`, or `shard-tools pack`."""
    package, _, name = command.partition(".")
    script = package.replace("_", "-")
    by_script = any(Path(word).name == script for word in sys.orig_argv[:3])
    return f"{script} {name}" if by_script else f"python -m {command}"


def available_cores() -> int:
    """The number of cores this process may use."""
    return len(os.sched_getaffinity(0))


def path(text: str) -> Path:
    """The path in an argument, `~` expanded."""
    return Path(text).expanduser()


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """The parser of an argument that is a whole number within limits."""

    def parse(text: str) -> int:
        number = int(text) if re.fullmatch(r"[0-9]{1,19}", text) else least - 1
        if number < least or (most is not None and number > most):
            limits = f"from {least}" + (f" to {most}" if most is not None else "")
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {limits}")
        return number

    return parse


positive_int = whole_number(1)
seed_number = whole_number(0, 2**63 - 1)


def positive_float(text: str) -> float:
    """The number above 0 in an argument."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def size_in_bytes(text: str) -> int:
    """The bytes in an argument such as 256MiB."""
    match = re.fullmatch(r"([0-9]{1,15})\s*([A-Z]*)", text.strip().upper())
    if match is None or match[2] not in _SIZE_UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 256MiB")
    return int(match[1]) * _SIZE_UNITS[match[2]]


def slice_number(text: str) -> tuple[int, int]:
    """The slice i of N of an array job in an argument such as 0/8."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None or not int(match[1]) <= int(match[2]) or int(match[2]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a slice such as 0/8: i/N, i from 0 or 1 up to N")
    return int(match[1]), int(match[2])


def one_of(*valid: str) -> Callable[[str], str]:
    """The parser of an argument that is one of these words; for use with `comma_separated`."""

    def parse(text: str) -> str:
        if text not in valid:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(valid)}")
        return text

    return parse


def comma_separated(parse: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """The parser of an argument such as 1,2,4 whose parts `parse` reads."""
    return lambda text: tuple(parse(part.strip()) for part in text.split(","))


# --- errors and exit codes ----------------------------------------------------------------------------------------


def one_line(text: object) -> str:
    """The text without line breaks; a control character, such as those that clear a terminal, becomes `\\x1b`."""
    return _BREAKS.sub(" ", str(text)).strip().translate(_CONTROL)


def describe_os_error(error: OSError) -> str:
    """One line for an operating system error: what failed, on which path, what to do."""
    where = f"{error.filename}: " if error.filename else ""
    remedy = _REMEDIES.get(error.errno or 0)
    what = error.strerror or str(error)
    return f"{where}{what}" + (f"; {remedy}" if remedy else "")


def run(main: Callable[[list[str] | None], int], leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run a command's `main` and end the process with its exit code, by default through `sys.exit`.

    `CommandError` and operating system errors that a user can fix become one line on stderr and exit 2; Ctrl-C, SIGTERM
    and SIGHUP become exit 130. Any other exception is a bug and keeps its traceback.
    """
    for number in _STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # `command &` in a script ignores SIGINT, nohup SIGHUP
            signal.signal(number, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may be unprintable
    try:
        code = main(None)
        print(end="", flush=True)
    except CommandError as error:
        code = fail(str(error))
    except KeyboardInterrupt:
        # A KeyboardInterrupt inside an `exec` (dataclasses and torch use it) makes CPython end the process with SIGINT
        # instead of our exit code; the next `exec` clears that flag.
        exec("")
        print("interrupted; everything committed so far is kept", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:  # `... | head`: the reader is gone; the work stopped there, so the exit code is not 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it again at exit
        code = INTERRUPTED
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        code = fail(describe_os_error(error))
    leave(code)


def dispatch(package: str, commands: Mapping[str, str]) -> None:
    """Run the command of `package` that the first argument names, as `python -m PACKAGE.COMMAND` does.

    Args:
        commands: what each command does, in a line.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the command loads, Ctrl-C ends it without a traceback
    script = package.replace("_", "-")
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        lines = [f"  {command:<{max(map(len, commands))}}  {what}" for command, what in commands.items()]
        text = f"usage: {script} COMMAND ...\n\n" + "\n".join(lines) + f"\n\nOptions of each: {script} COMMAND --help"
        run(lambda _: print(text) or OK)
    elif name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        sys.exit(fail(f"{script}: no command {name!r}; {hint}see {script} --help"))
    else:
        del sys.argv[1]
        runpy.run_module(f"{package}.{name}", run_name="__main__", alter_sys=True)


def _interrupt(number: int, frame: object) -> NoReturn:
    """Raise KeyboardInterrupt, once: a second signal must not interrupt the clean-up after the first."""
    for each in _STOP_SIGNALS:
        signal.signal(each, lambda *_: None)  # unlike SIG_IGN, child processes do not inherit it
    raise KeyboardInterrupt


def fail(message: str) -> int:
    """Print one error line and return exit code 2."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    return USAGE
