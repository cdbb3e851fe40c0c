"""export --push: what a hub receives, and how it fails, with a small hub that runs here."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub.repocard import metadata_load
from run_maker import make_run

import salt_wds
from salt_wds.export import __main__ as export
from salt_wds.models import hub
from shard_tools.common.cli import CommandError

PROBE = {
    "classes": ["a", "b"],
    "encoders": {
        "student": {"step": 20, "top1": 0.7125}, "student_ema": {"step": 20, "top1": 0.75},
        "random": {"step": None, "top1": 0.5},
    },
}  # fmt: skip


class Hub(ThreadingHTTPServer):
    """Takes the calls of one upload, and keeps the files. With `refuses`, a token has no rights."""

    def __init__(self, refuses=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuses, self.created, self.files, self.tokens = refuses, [], {}, set()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.server.refuses:
            self.answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.address}/someone/encoder"})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.address}/someone/encoder/commit/1", "commitOid": "1"})
        else:
            assert self.path == "/api/validate-yaml"
            self.answer({"errors": [], "warnings": []})

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "run"
    make_run(folder, ema=True, teacher__weights="OpenGVLab/VideoMAEv2-Base")
    (folder / "probes").mkdir()
    (folder / "probes/motion.json").write_text(json.dumps(PROBE))
    return folder


def push(run, out, address, *options):
    """Run the command with this hub, which the client reads when it is imported."""
    environment = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "salt_wds.export", str(run), str(out), "--push", "someone/encoder", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_the_hub_receives_the_folder_and_its_card(run, tmp_path):
    server = Hub()
    done = push(run, tmp_path / "out", server.address)
    assert done.returncode == 0, done.stderr
    assert f"pushed: {server.address}/someone/encoder" in done.stdout
    assert server.created == [{"name": "encoder", "organization": "someone", "private": True}] or (
        server.created[0]["name"] == "encoder" and server.created[0].get("visibility", "private") == "private"
    )
    assert server.tokens == {"Bearer hf_secret"}
    assert server.files == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(server.files) == {"README.md", "config.json", "model.safetensors"}
    (tmp_path / "received").mkdir()
    for name, data in server.files.items():
        (tmp_path / "received" / name).write_bytes(data)
    assert salt_wds.load_encoder(tmp_path / "received").width == 32
    head = metadata_load(tmp_path / "received/README.md")
    assert head["license"] == "cc-by-nc-4.0"
    (index,) = head["model-index"]
    found = {result["dataset"]["name"]: result["metrics"] for result in index["results"]}
    assert [(m["type"], m["value"]) for m in found["motion"]] == [("accuracy", 0.7125)]
    assert [(m["type"], m["value"]) for m in found["shards"]] == [("loss", 0.95), ("r2", 0.01)]
    assert 'load_encoder(snapshot_download("someone/encoder"))' in server.files["README.md"].decode()


@pytest.mark.slow
def test_a_hub_that_refuses_or_is_gone_leaves_the_export_and_one_line(run, tmp_path):
    for name, address in (("refused", Hub(refuses=True).address), ("gone", "http://127.0.0.1:9")):
        done = push(run, tmp_path / name, address)
        assert done.returncode == 1
        assert "hf upload someone/encoder" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert salt_wds.load_encoder(tmp_path / name).config.step == 20


def test_results_are_those_of_the_exported_weights_only(run, tmp_path):
    def accuracies(*options):
        assert export.main([str(run), str(tmp_path / "out"), "--overwrite", *options]) == 0
        (index,) = metadata_load(tmp_path / "out/README.md")["model-index"]
        return [m["value"] for r in index["results"] for m in r["metrics"] if m["type"] == "accuracy"]

    assert accuracies() == [0.7125]
    assert accuracies("--ema") == [0.75]
    (run / "probes/motion.json").write_text(json.dumps(PROBE).replace('"step": 20', '"step": 10'))
    assert accuracies() == []


def test_nothing_is_pushed_without_the_flag_a_token_and_a_name(run, tmp_path, monkeypatch):
    def fail(*args):
        raise AssertionError("a hub was asked")

    monkeypatch.setattr(hub, "HfApi", fail)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    with pytest.raises(CommandError, match=r"^--push a/b: no token for the hub; run `hf auth login`, or set HF_TOKEN$"):
        export.main([str(run), str(tmp_path / "new"), "--push", "a/b"])
    for name in ("encoder", "a/b/c", "a//b", "../x", "https://huggingface.co/a/b", ""):
        with pytest.raises(CommandError, match="not the name of a repository"):
            export.main([str(run), str(tmp_path / "new"), "--push", name])
    assert not (tmp_path / "new").exists()
