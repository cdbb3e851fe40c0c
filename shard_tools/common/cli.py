"""What every command of both packages does the same way: exit codes and one-line errors (design, section 3).

0 fine; 1 ran, and found or left problems; 2 usage or configuration; 130 interrupted. A user's mistake is told in one
line (what, where, what to do), never as a traceback; a bug of ours keeps its traceback.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

OK, PROBLEMS, USAGE, INTERRUPTED = 0, 1, 2, 130

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
    """A mistake in usage, configuration or surroundings: one line for the user, exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line, too."""

    def error(self, message: str) -> NoReturn:
        self.exit(fail(f"{message}; see {self.prog} --help"))


def one_line(text: object) -> str:
    """The text without line breaks: one problem, one line, whatever names and messages hold."""
    return " ".join(str(text).split())


def describe_os_error(error: OSError) -> str:
    """One line for an operating system error: what failed, on which path, what to do."""
    where = f"{error.filename}: " if error.filename else ""
    remedy = _REMEDIES.get(error.errno or 0)
    what = error.strerror or str(error)
    return f"{where}{what}" + (f"; {remedy}" if remedy else "")


def run(main: Callable[[list[str] | None], int], leave: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Run a command's `main` and leave with its exit code, by `sys.exit` unless told otherwise.

    `CommandError` and operating system errors that a user can mend become one line on stderr and exit 2; Ctrl-C and
    SIGTERM become exit 130. Anything else is a bug of ours and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, _interrupt)  # a polite kill ends like Ctrl-C
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as shells start what runs in the background
        signal.signal(signal.SIGINT, _interrupt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be printable
    try:
        code = main(None)
        print(end="", flush=True)
    except CommandError as error:
        code = fail(str(error))
    except KeyboardInterrupt:
        print("interrupted; everything committed so far is kept", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:  # `... | head`: nobody reads on. The work stopped there, so this is not exit code 0
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes there once more at exit
        code = INTERRUPTED
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        code = fail(describe_os_error(error))
    leave(code)


def _interrupt(number: int, frame: object) -> NoReturn:
    """Raise KeyboardInterrupt, once: what is cleaned up because of it is not to be interrupted by a second one."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: None)  # unlike SIG_IGN, programs that are started do not inherit it
    raise KeyboardInterrupt


def fail(message: str) -> int:
    """Print one error line and return exit code 2."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    return USAGE
