"""`python -m salt_wds.export`."""

from salt_wds.export.write import main
from shard_tools.common.cli import run

if __name__ == "__main__":
    run(main)
