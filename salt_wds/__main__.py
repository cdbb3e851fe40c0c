"""`salt-wds COMMAND` and `python -m salt_wds COMMAND`."""

from shard_tools.common.cli import dispatch

COMMANDS = {
    "preflight": "check data, workers, memory and models before a long run",
    "latents": "run the teacher once, and store its tokens to train from",
    "train": "train a student encoder against a frozen teacher",
    "evaluate": "measure the held-out loss and the features of a checkpoint",
    "report": "write one HTML page about a run, or several side by side",
    "probe": "measure a run's frozen encoder with probes on labelled clips",
    "export": "write the encoder of a run for use elsewhere",
    "embed": "write one vector for every video",
    "replay": "write the metrics of a run to TensorBoard or Weights & Biases",
    "bench": "measure the loader, the training step, or both together",
    "demo": "run all of it on generated video, in minutes",
}


def main() -> None:
    dispatch("salt_wds", COMMANDS)


if __name__ == "__main__":
    main()
