"""Kill, crash and stop workers and their fork server at random moments; the sequence of samples must not change.

    python benchmarks/disturb_loader.py SHARDS --disturbances 100 --out benchmarks/results/disturb_loader.json

One signal in four goes to the fork server, and after half of these one to its successor while it starts. The sequence
is compared with that of an undisturbed run. Exit code 1 if it differs, a loss is missing in the ledger, or a process,
descriptor or piece of shared memory is left behind.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import random
import signal
import sys
import tempfile
import threading
import time
from itertools import islice
from pathlib import Path

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from salt_wds.config import load_config
from salt_wds.data.loader import Loader
from shard_tools.format import ledger

SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGSTOP)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--disturbances", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    configs = Path(__file__).parents[1] / "configs"
    settings = ["data.batch_size=8", "data.num_workers=2", "data.timeout_s=4.0", "data.max_recoveries=1000"]
    config = load_config(configs / "tiny.toml", [f"data.shards={args.shards}", *settings])
    with tempfile.TemporaryDirectory() as folder:
        result = disturb(config, Path(folder), args.disturbances, random.Random(args.seed))
    result |= {"torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return (
        0
        if result["same_sequence"] and result["in_ledger"] >= result["recoveries"] and not result["left_behind"]
        else 1
    )


def disturb(config, folder: Path, disturbances: int, rng: random.Random) -> dict:
    warm_up = iter(Loader(config, folder / "warm_up.jsonl"))  # starts the fork server, which stays
    next(warm_up)
    warm_up.close()
    before = belongings()
    loader = Loader(config, folder / "disturbed.jsonl")
    in_flight = [loader.spec.in_flight.array]  # in a list, so that it can be let go of below
    sent: list[str] = []
    stop = threading.Event()

    thread = threading.Thread(target=send_signals, args=(in_flight, disturbances, rng, stop, sent), daemon=True)
    started = time.monotonic()
    iterator = iter(loader)
    batches = [content(next(iterator))]
    thread.start()
    while thread.is_alive():
        batches.append(content(next(iterator)))
        time.sleep(0.05)  # a trainer that is at work
    batches += [content(next(iterator)) for _ in range(8)]
    seconds = time.monotonic() - started
    stop.set()
    iterator.close()
    failures, _ = ledger.read(folder / "disturbed.jsonl")
    lost = [f for f in failures if f.stage in ("crash", "hang")]
    del loader, iterator
    in_flight.clear()

    quiet = iter(Loader(config, folder / "quiet.jsonl"))
    reference = [content(batch) for batch in islice(quiet, len(batches))]
    quiet.close()
    del quiet, thread
    gc.collect()
    time.sleep(1.0)
    behind = {name: count - before[name] for name, count in belongings().items()}
    return {
        "batches": len(batches),
        "samples": sum(len(keys) for keys, *_ in batches),
        "seconds": round(seconds, 1),
        "disturbances": {name: sent.count(name) for name in sorted(set(sent))},
        "recoveries": len({f.time for f in lost}),
        "in_ledger": len(lost),
        "quarantined": sum(f.action == "quarantined" for f in lost),
        "same_sequence": batches == reference,
        "left_behind": {name: count for name, count in behind.items() if count > 0},
    }


def send_signals(in_flight: list, count: int, rng: random.Random, stop: threading.Event, sent: list[str]) -> None:
    """Send `count` signals to workers and fork servers at random moments; names of what was hit go to `sent`.

    Args:
        in_flight: the loader's in-flight table, in a list.
    """

    def send(pid: int, number: signal.Signals, name: str) -> None:
        try:
            if pid and psutil.Process(pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                os.kill(pid, number)
                sent.append(name)
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass  # it is gone already: not a disturbance

    while len(sent) < count and not stop.is_set():
        time.sleep(rng.uniform(0.0, 2.0))
        if rng.randrange(4):
            number = rng.choice(SIGNALS)
            send(int(in_flight[0]["pid"][rng.randrange(2)]), number, number.name)
            continue
        known = fork_servers()
        for pid in known:
            send(pid, signal.SIGKILL, "fork server")
        deadline = time.monotonic() + (10.0 if rng.randrange(2) else 0.0)
        while time.monotonic() < deadline and not stop.is_set():
            if new := fork_servers() - known:
                send(new.pop(), signal.SIGKILL, "fork server that starts")
                break
            time.sleep(0.01)
        while not stop.is_set() and not all(p and psutil.pid_exists(p) for p in in_flight[0]["pid"].tolist()):
            time.sleep(0.1)  # a server needs seconds to start


def fork_servers() -> set[int]:
    """Process numbers of the fork servers of this process."""
    found = set()
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "multiprocessing.forkserver" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


def belongings() -> dict[str, int]:
    """What this process has of the machine: child processes, open descriptors, shared arrays, semaphores."""
    links = [
        os.readlink(f"/proc/self/fd/{d}") for d in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{d}")
    ]
    return {
        "processes": len(psutil.Process().children(recursive=True)),
        "descriptors": len(links),
        "shared_arrays": sum("memfd:salt-wds" in link for link in links),
        "semaphores": Path("/proc/self/maps").read_text().count("/dev/shm/sem.mp"),
    }


def content(batch) -> tuple:
    return tuple(batch["keys"]), int(batch["clips"].long().sum()), int(batch["mask"].long().sum())


if __name__ == "__main__":
    sys.exit(main())
