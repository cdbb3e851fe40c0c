"""Files of the hub: from the cache, or an answer in one line within seconds."""

import socket
import time
from unittest import mock

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from salt_wds.models import hub
from shard_tools.common.cli import CommandError


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def test_no_network_is_one_line_within_10_seconds(monkeypatch, empty_cache, caplog, capfd):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(hub, "hf_hub_url", lambda *_: f"http://127.0.0.1:{port}/a/b")  # nobody listens
    started = time.monotonic()
    with pytest.raises(CommandError) as raised:
        hub.fetch("a/b", ("config.json",), "teacher.weights", "download it")
    assert time.monotonic() - started < 10
    message = str(raised.value)
    assert message.startswith("teacher.weights: a/b is not in the cache, and the hub does not give it (")
    assert message.endswith("); download it")
    assert "\n" not in message
    assert (caplog.text, *capfd.readouterr()) == ("", "", "")  # no retry is logged


@pytest.mark.parametrize("kind", [GatedRepoError, RepositoryNotFoundError, OSError])
def test_a_refusal_of_the_hub_is_one_line(monkeypatch, empty_cache, kind):
    def refuse(url, timeout):
        raise kind("no,\nlog in", response=mock.Mock(headers={})) if kind is not OSError else kind("no,\nlog in")

    monkeypatch.setattr(hub, "get_hf_file_metadata", refuse)
    with pytest.raises(CommandError, match=rf"\({kind.__name__}: no, log in.*\); download it$"):
        hub.fetch("a/b", ("config.json",), "teacher.weights", "download it")


def test_cached_files_need_no_network(empty_cache, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).touch()
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("0" * 40)
    found = hub.fetch("a/b", ("config.json", "model.safetensors"), "x", "y")
    assert found == [snapshot / "config.json", snapshot / "model.safetensors"]
