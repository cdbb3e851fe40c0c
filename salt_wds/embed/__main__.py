"""`python -m salt_wds.embed`."""

from salt_wds.embed.embed import main
from shard_tools.common.cli import run

if __name__ == "__main__":
    run(main)
