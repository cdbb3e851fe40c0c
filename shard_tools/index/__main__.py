"""`python -m shard_tools.index`."""

from shard_tools.common.cli import run
from shard_tools.index.indexing import main

if __name__ == "__main__":
    run(main)
