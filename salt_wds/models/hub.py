"""Files from the Hugging Face hub, with an error within seconds if there is no network."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError

from shard_tools.common.cli import CommandError, one_line

_TIMEOUT = 4.0  # seconds for each address of the hub


def fetch(repository: str, files: tuple[str, ...], key: str, remedy: str) -> list[Path]:
    """Files of a repository: from the local cache if they are there, otherwise downloaded.

    Args:
        key: the setting that asked for them, for the error message.
        remedy: what to do without the hub, for the error message.

    Raises:
        CommandError: they are not in the cache, and the hub does not give them.
    """
    try:
        try:
            return [Path(hf_hub_download(repository, name, local_files_only=True)) for name in files]
        except LocalEntryNotFoundError:
            # One request without retries first: the client's download retries for half a minute without a network.
            get_hf_file_metadata(hf_hub_url(repository, files[0]), timeout=_TIMEOUT)
            return [Path(hf_hub_download(repository, name)) for name in files]
    except Exception as error:  # the client raises HTTP, cache and disk errors of many kinds
        raise CommandError(
            f"{key}: {repository} is not in the cache, and the hub does not give it ({type(error).__name__}: "
            f"{one_line(error)[:300]}); {remedy}"
        ) from None
