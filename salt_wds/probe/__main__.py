"""`python -m salt_wds.probe`."""

from salt_wds.probe.probe import main
from shard_tools.common.cli import run

if __name__ == "__main__":
    run(main)
