"""`python -m shard_tools.pack ROOT`: a folder of videos becomes checked WebDataset shards.

Shards are written by independent processes into a hidden folder beside the result, and moved into place at the end,
all of them on the disk by then (staging.py). So a pack may be killed at any moment, also by a power cut: the same
command goes on where it stopped, and the result is the same to the byte.
"""

from __future__ import annotations

from shard_tools.common.cli import run
from shard_tools.common.processes import start_fork_server
from shard_tools.pack.options import parse
from shard_tools.pack.ray_executor import require_ray


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.executor == "ray":
        require_ray()
    elif not args.finish and not args.dry_run:
        # what workers need takes longest to load: it does so beside all that follows
        start_fork_server(["shard_tools.pack.pack_shard", "shard_tools.pack.schedule"])
    from shard_tools.pack.packing import pack

    return pack(args)


if __name__ == "__main__":
    run(main)
