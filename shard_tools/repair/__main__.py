"""`python -m shard_tools.repair`."""

from shard_tools.common.cli import run
from shard_tools.repair.repair import main

if __name__ == "__main__":
    run(main)
