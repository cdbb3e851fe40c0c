"""Videos -> checked WebDataset shards. Never imports torch or salt_wds."""

import signal
import sys

__version__ = "0.1.0"

if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while a command loads, Ctrl-C ends it without a traceback
