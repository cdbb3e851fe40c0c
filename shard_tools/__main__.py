"""`shard-tools COMMAND` and `python -m shard_tools COMMAND`."""

from shard_tools.common.cli import dispatch

COMMANDS = {
    "pack": "pack a folder of videos into checked WebDataset shards",
    "verify": "check every byte of a data set against its hashes",
    "repair": "make damaged shards again from their source videos",
    "index": "make tars that other tools wrote a data set",
    "describe": "print facts about a data set, and draw a sheet of clips",
    "failures": "count and list the failure records of a run or a data set",
    "bench": "measure how fast the drive gives shards and samples",
    "synth": "generate videos of labelled motions",
}


def main() -> None:
    dispatch("shard_tools", COMMANDS)


if __name__ == "__main__":
    main()
