"""`python -m shard_tools.describe`."""

from shard_tools.common.cli import run
from shard_tools.describe.facts import main

if __name__ == "__main__":
    run(main)
