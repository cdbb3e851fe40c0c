"""Encoders for transformers: loaded by its own classes, with the run's tokens, or refused with the reason."""

import json
import subprocess
import sys

import pytest
import torch
from run_maker import make_run
from transformers import AutoImageProcessor, AutoModel, VideoMAEForVideoClassification, VideoMAEModel

from salt_wds.export import __main__ as export
from salt_wds.models.exported import load_encoder
from salt_wds.models.frozen import student_of
from salt_wds.models.teacher import load_teacher
from shard_tools.common.cli import CommandError

CPU = torch.device("cpu")


def write(run, out, *options):
    assert export.main([str(run), str(out), "--transformers", *options]) == 0
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers") / "run"
    make_run(folder, ema=True, student__positions="sincos")
    return folder


@pytest.fixture(scope="module")
def out(run):
    return write(run, run.parent / "encoder")


def clip():
    return torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(3))


def assert_same_tokens(model, run, **options):
    with torch.no_grad():
        tokens = model.eval()(clip().transpose(1, 2)).last_hidden_state
        expected = student_of(run, CPU, **options).network.encode(clip())
    assert tokens.std() > 0.5
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [VideoMAEModel, AutoModel])
def test_tokens_are_those_of_the_run(run, out, kind):
    model, report = kind.from_pretrained(out, output_loading_info=True)
    assert type(model) is VideoMAEModel
    assert not any(report.get(problem) for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_tokens(model, run)


def test_the_average_and_a_dense_student_too(run, tmp_path):
    assert_same_tokens(VideoMAEModel.from_pretrained(write(run, tmp_path / "mean", "--ema")), run, ema=True)
    make_run(tmp_path / "run", student__positions="sincos", student__mode="dense", data__num_frames=4)
    assert_same_tokens(VideoMAEModel.from_pretrained(write(tmp_path / "run", tmp_path / "out")), tmp_path / "run")


@pytest.mark.slow
def test_without_this_package(out):
    """What the card says, in a Python that cannot import it."""
    code = out.joinpath("README.md").read_text().split("```python\n")[1].split("```")[0]
    lines = [
        "import sys; sys.modules['salt_wds'] = sys.modules['shard_tools'] = None",
        "import numpy as np; frames = list(np.random.default_rng(0).integers(0, 256, (4, 40, 50, 3), dtype=np.uint8))",
        code,
        "print(*tokens.shape)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=out.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["1", "8", "32"]), done.stderr


def test_the_processor_is_the_encoders(out):
    processor = AutoImageProcessor.from_pretrained(out)
    frames = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    pixels = processor(list(frames), return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(pixels[0], (frames / 255 - mean) / std, atol=1e-5, rtol=1e-5)
    assert processor([torch.zeros(3, 40, 61, dtype=torch.uint8)] * 4, return_tensors="pt")["pixel_values"].shape == (
        1, 4, 3, 32, 32,
    )  # fmt: skip


def test_it_can_be_fine_tuned(out):
    torch.manual_seed(0)
    model = VideoMAEForVideoClassification.from_pretrained(out, num_labels=2, use_mean_pooling=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        losses.append(model(clip().transpose(1, 2), labels=torch.tensor([0, 1])).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_it_can_teach_another_run(run, out):
    teacher = load_teacher(str(out), size=32, num_frames=4)
    encoder = student_of(run, CPU).network.encoder
    encoder.norm = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(teacher(clip()), encoder(clip()), atol=1e-4, rtol=1e-4)


def test_facts_of_the_run_are_in_the_config_and_an_older_one_is_replaced(run, out, tmp_path):
    facts = json.loads((out / "config.json").read_text())["salt_wds"]
    assert (facts["frame_stride"], facts["step"], facts["ema"]) == (2, 20, False)
    assert {path.name for path in out.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    with pytest.raises(CommandError, match=r"an encoder for transformers; load it with VideoMAEModel\.from_pretrained"):
        load_encoder(out)
    assert "library_name: transformers" in (out / "README.md").read_text()
    write(run, write(run, tmp_path / "out"), "--overwrite")


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({}, ["--transformers"], "positions are learned, and VideoMAEModel has VideoMAE's fixed table only"),
        ({"arch": "deit3_small_patch16_224"}, ["--transformers"], r"Unexpected key.*encoder\.layer\.0\.ls1\.gamma"),
        ({"arch": "vit_base_patch16_clip_224"}, ["--transformers"], r"Missing key.*projection\.bias"),
        ({"arch": "vit_small_patch16_18x2_224"}, ["--transformers"], "blocks of the kind ParallelThingsBlock"),
        ({"positions": "sincos"}, ["--timm"], "no positions for an image; use --transformers"),
    ],
)
def test_what_another_tool_cannot_hold_is_refused(tmp_path, settings, options, message):
    settings = {f"student__{key}": value for key, value in settings.items()}
    fixed = {"student__positions": "sincos"} if "student__arch" in settings else {}
    make_run(tmp_path / "run", **fixed, **settings)
    with pytest.raises(CommandError, match=message):
        export.main([str(tmp_path / "run"), str(tmp_path / "out"), *options])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
