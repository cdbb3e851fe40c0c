"""Files from and to the Hugging Face hub, with an error within seconds if there is no network."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

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


class PushFailed(Exception):
    """The hub did not take a folder; the message says why, in one line."""


def check_can_push(repository: str) -> None:
    """Refuse what could not be pushed, before anything is written.

    Raises:
        CommandError: not OWNER/NAME, or no token.
    """
    try:
        validate_repo_id(repository)
        if repository.count("/") != 1:
            raise HFValidationError("expected OWNER/NAME")
    except HFValidationError as error:
        raise CommandError(f"--push {repository}: not the name of a repository ({one_line(error)[:200]})") from None
    if get_token() is None:
        raise CommandError(f"--push {repository}: no token for the hub; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repository: str) -> str:
    """Upload a folder as a commit to a model repository, made private if there is none yet; returns its address.

    Raises:
        PushFailed: the hub refuses it, or does not answer.
    """
    api = HfApi(library_name="salt-wds")
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload an encoder of salt-wds")
    except Exception as error:  # the client raises HTTP, validation and disk errors of many kinds
        raise PushFailed(f"{repository}: {type(error).__name__}: {one_line(error)[:300]}") from None
    return str(address)
