"""Preflight as a test: `PREFLIGHT_CONFIG=configs/base.toml pytest tests/test_dataloader_preflight.py`.

Without PREFLIGHT_CONFIG it checks this machine with configs/tiny.toml on generated clips. PREFLIGHT_SET holds
overrides, separated by white space (`data.num_workers=8 teacher.weights=random`), and PREFLIGHT_BATCHES the batches of
the worker check. Add `-rP` to see the numbers.
"""

import os
import re
from pathlib import Path

import pytest
import torch

from salt_wds.config import load_config
from salt_wds.preflight import checks

BATCHES = int(os.environ.get("PREFLIGHT_BATCHES", "20"))


@pytest.fixture(scope="module")
def config(repository, request):
    path = os.environ.get("PREFLIGHT_CONFIG")
    overrides = os.environ.get("PREFLIGHT_SET", "").split()
    if path is not None:
        return load_config(Path(path), overrides)
    generated = request.getfixturevalue("dataset")
    return load_config(repository / "configs" / "tiny.toml", [f"data.shards={generated}", *overrides])


@pytest.fixture
def ledger_path(tmp_path):
    return tmp_path / "failures.jsonl"


def test_a_single_batch_is_whole(config, ledger_path):
    print(checks.check_single_batch(config, ledger_path))


@pytest.mark.slow
def test_workers_hold_under_stress_and_give_shared_memory_back(config, ledger_path):
    print(checks.check_workers(config, ledger_path, BATCHES))


def test_teacher_and_student_take_a_batch(config, ledger_path):
    print(checks.check_models(config, ledger_path))


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        (None, "finds Python.h"),
        ("no-such-compiler", "CC = no-such-compiler: No such file or directory; install gcc"),
        ("gcc -nostdinc", "cannot compile for Python, which train.compile needs: "),
    ],
)
def test_a_compiler_that_triton_cannot_use_is_told(config, monkeypatch, compiler, words):
    assert "not needed" in checks.check_compiler(config)
    compiled = config.changed(train={"compile": "default"})
    monkeypatch.setattr(checks, "pick_device", lambda name: torch.device("cuda"))
    if compiler is None:
        monkeypatch.delenv("CC", raising=False)
        assert words in checks.check_compiler(compiled)
    else:
        monkeypatch.setenv("CC", compiler)
        with pytest.raises(checks.CheckFailed, match=re.escape(words)):
            checks.check_compiler(compiled)
