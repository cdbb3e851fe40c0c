"""Exported encoders: the run's tokens to the bit, strict loading, a complete model card, other tools' formats."""

from __future__ import annotations

import json
import re
import shutil

import cv2
import numpy as np
import pytest
import timm
import torch
from conftest import contents
from huggingface_hub.repocard import metadata_load
from run_maker import make_run
from safetensors.torch import load_file, save_file

import salt_wds
from salt_wds.data.pixels import to_normalised_rgb, yuv_to_rgb
from salt_wds.export import __main__ as export
from salt_wds.export import formats, write
from salt_wds.export.formats import random_clip
from salt_wds.export.model_card import licence_of
from salt_wds.models.exported import fingerprint
from salt_wds.models.frozen import student_of
from shard_tools.common.cli import CommandError
from shard_tools.format.dataset import read_dataset

CPU = torch.device("cpu")
VIDEOMAE = "OpenGVLab/VideoMAEv2-Base"
PROBE = {  # as salt_wds.probe writes them, as far as the card quotes them
    "classes": ["a", "b", "c", "d"],
    "data": {"views": {"segments": 2, "crops": 3}, "clips": {"fit": 90, "evaluation": 1000}},
    "encoders": {
        "student": {
            "step": 20, "top1": 0.7125, "top1_stderr": 0.015, "top5": None, "top1_best": 0.75, "knn": {"top1": 0.5},
            "time_arrow": None,
        },
        "random": {"step": None, "top1": 0.25, "top1_stderr": 0.0125, "top5": None, "knn": None, "time_arrow": None},
    },
    "deviations": ["data.size: 224 (published: 256)"],
}  # fmt: skip


def write_export(run, out, *options):
    assert export.main([str(run), str(out), *options]) == 0
    return salt_wds.load_encoder(out)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    make_run(folder, ema=True)
    return folder


@pytest.fixture(scope="module")
def exported(run):
    out = run.parent / "encoder"
    write_export(run, out)
    return out


@pytest.fixture
def copied(exported, tmp_path):
    """An export of one's own, to be damaged."""
    return shutil.copytree(exported, tmp_path / "copied")


def change_config(folder, **changes):
    table = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**table, **changes}))


# --- the same tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"student__mode": "visible"},
        {"student__mode": "dense", "data__num_frames": 8, "data__size": 48},
        {"student__positions": "sincos"},
        {"student__arch": "deit3_small_patch16_224"},  # layer scale
        {"student__arch": "vit_base_patch16_clip_224"},  # a norm before the blocks, no bias in the patch embedding
        {"student__arch": "vit_small_patch16_18x2_224"},  # blocks of another kind
    ],
)
def test_the_exported_encoder_gives_the_tokens_of_the_run(settings, tmp_path, capsys):
    config = make_run(tmp_path / "run", **settings)
    encoder = write_export(tmp_path / "run", tmp_path / "out")
    assert "largest difference 0\n" in capsys.readouterr().out
    clip = random_clip(encoder.config, seed=5).repeat(2, 1, 1, 1, 1)
    expected = student_of(tmp_path / "run", CPU).network.encode(clip)
    assert expected.shape == (2, config.num_tokens, 32)
    assert torch.equal(encoder(clip), expected)
    assert torch.equal(encoder.pooled(clip), expected.mean(dim=1))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.training


def test_ema_exports_the_moving_average(run, exported, tmp_path):
    mean = write_export(run, tmp_path / "mean", "--ema")
    clip = random_clip(mean.config)
    assert torch.equal(mean(clip), student_of(run, CPU, ema=True).network.encode(clip))
    assert not torch.equal(mean(clip), salt_wds.load_encoder(exported)(clip))
    assert (mean.config.ema, salt_wds.load_encoder(exported).config.ema) == (True, False)


def test_tokens_of_a_bf16_run_are_equal_under_its_autocast(tmp_path):
    config = make_run(tmp_path / "run", train__precision="bf16")
    encoder = write_export(tmp_path / "run", tmp_path / "out")
    clips = torch.randint(0, 256, (2, 4, 32 * 32 * 3 // 2), dtype=torch.uint8)
    colour = torch.tensor([0, 3])
    video = to_normalised_rgb(clips, colour, config.data.size, torch.float32)
    torch.testing.assert_close(encoder.normalise(yuv_to_rgb(clips, colour, 32)), video)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = encoder(video.bfloat16())
    assert torch.equal(tokens.float(), student_of(tmp_path / "run", CPU)(clips, colour))


def test_it_can_be_trained_further(exported):
    encoder = salt_wds.load_encoder(exported).requires_grad_(True).train()
    encoder.pooled(random_clip(encoder.config)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


# --- input --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(exported):
    """The exported encoder. Read-only."""
    return salt_wds.load_encoder(exported)


@pytest.mark.parametrize(("height", "width"), [(40, 55), (61, 32), (32, 32)])
def test_frames_become_the_central_square_resized(encoder, height, width):
    frames = np.random.default_rng(0).integers(0, 256, (1, 4, height, width, 3), dtype=np.uint8)
    side = min(height, width)
    y, x = (height - side) // 2 // 2 * 2, (width - side) // 2 // 2 * 2
    square = frames[0, :, y : y + side, x : x + side].astype(np.float32) / 255
    resized = np.stack([cv2.resize(picture, (32, 32), interpolation=cv2.INTER_LINEAR) for picture in square])
    expected = (resized - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    video = encoder.preprocess(frames)
    assert video.shape == (1, 3, 4, 32, 32)
    np.testing.assert_allclose(video[0].permute(1, 2, 3, 0), expected, atol=1e-4)


def test_frames_that_shrink_much_are_averaged(exported):
    before = torch.get_rng_state()
    encoder = salt_wds.load_encoder(exported)
    assert torch.equal(torch.get_rng_state(), before)
    frames = torch.randint(0, 256, (2, 4, 96, 130, 3), dtype=torch.uint8)
    video = encoder.preprocess(frames)
    x = (130 - 96) // 2 // 2 * 2
    block = frames[1, 2, 3 * 5 : 3 * 6, x + 3 * 7 : x + 3 * 8].float().mean(dim=(0, 1)) / 255  # pixel (5, 7)
    mean, std = torch.tensor(encoder.config.mean), torch.tensor(encoder.config.std)
    torch.testing.assert_close(video[1, :, 2, 5, 7], (block - mean) / std)
    assert encoder.to(torch.bfloat16).preprocess(frames).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 3, 6, 32, 32), (1, 3, 4, 48, 48), (1, 4, 3, 32, 32), (3, 4, 32, 32)])
def test_other_shapes_are_refused(encoder, shape):
    found = re.escape(str(shape))
    with pytest.raises(ValueError, match=rf"{found}, this encoder takes normalised floats \(B, 3, 4, 32, 32\)"):
        encoder(torch.zeros(shape))
    with pytest.raises(
        ValueError, match=r"expected uint8 RGB \(B, 4, H, W, 3\): 4 frames, one in every 2 of the video"
    ):
        encoder.preprocess(torch.zeros(shape, dtype=torch.uint8))


def test_other_types_are_refused(encoder):
    with pytest.raises(ValueError, match=r"torch.uint8 .* encoder.preprocess"):
        encoder(torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="frames are torch"):
        encoder.preprocess(torch.zeros(1, 4, 32, 32, 3))


# --- loading is strict --------------------------------------------------------------------------------------------


def test_other_folders_are_refused_in_a_line(run, tmp_path):
    for folder in (tmp_path / "nowhere", run, tmp_path):
        with pytest.raises(CommandError, match=r"not an exported encoder, it has no config\.json; python -m salt"):
            salt_wds.load_encoder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "x"}, "model_type: Input should be 'salt-wds-encoder'"),
        ({"format_version": 2}, r"format_version: Input should be 1\); export the run again, or use"),
        ({"depth": "x"}, "depth: Input should be a valid integer"),
        ({"colours": "x"}, "colours: Extra inputs are not permitted"),
        ({"num_frames": 6}, r"grid \(2, 2, 2\) is not that of 6 frames of 32"),
        (None, "Invalid JSON"),
    ],
)  # fmt: skip
def test_another_config_is_refused_in_a_line(copied, changes, message):
    if changes is None:
        (copied / "config.json").write_text("{")
    else:
        change_config(copied, **changes)
    with pytest.raises(CommandError, match=message):
        salt_wds.load_encoder(copied)


def test_damaged_weights_are_refused(copied):
    path = copied / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(CommandError, match=r"not the weights that config\.json describes"):
            salt_wds.load_encoder(copied)
    path.unlink()
    with pytest.raises(CommandError, match=r"model\.safetensors: missing"):
        salt_wds.load_encoder(copied)


@pytest.mark.parametrize("change", [{"norm.bias": None}, {"head.bias": torch.zeros(3)}, {"norm.bias": torch.zeros(5)}])
def test_weights_of_another_encoder_are_refused(copied, change):
    path = copied / "model.safetensors"
    tensors = {name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}
    save_file(tensors, path)
    change_config(copied, weights=fingerprint(path).model_dump())
    with pytest.raises(CommandError, match=r"the weights do not fit this version's vit_tiny\w+ .*(norm|head)\.bias"):
        salt_wds.load_encoder(copied)


# --- the command --------------------------------------------------------------------------------------------------


def test_only_an_earlier_export_is_replaced(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for options, message in (((), "not empty"), (("--overwrite",), "--overwrite replaces earlier exports only")):
        with pytest.raises(CommandError, match=message):
            export.main([str(run), str(out), *options])
    assert contents(out) == {"notes.txt": b"mine"}
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError, match="not a folder"):
        export.main([str(run), str(tmp_path / "file"), "--overwrite"])


def test_an_earlier_export_is_replaced_as_a_whole(run, copied, tmp_path):
    (copied / "extra.txt").write_text("of the old one")
    with pytest.raises(CommandError, match="not empty"):
        export.main([str(run), str(copied)])
    assert write_export(run, copied, "--overwrite", "--ema").config.ema
    assert {path.name for path in copied.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]
    (tmp_path / "any.txt").touch()
    assert {path.stat().st_mode for path in copied.iterdir()} == {(tmp_path / "any.txt").stat().st_mode}


def test_a_failed_export_leaves_everything_as_it_was(run, copied, monkeypatch):
    before = contents(copied)

    def fail(*_):
        raise OSError(28, "No space left on device", "here")

    monkeypatch.setattr(write, "model_card", fail)
    with pytest.raises(OSError, match="No space"):
        export.main([str(run), str(copied), "--overwrite"])
    assert contents(copied) == before
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


def test_other_tokens_end_with_exit_code_1_and_no_folder(run, tmp_path, monkeypatch, capsys):
    load = write.load_encoder

    def load_wrongly(folder):
        encoder = load(folder)
        encoder.network.norm.bias[3] += 0.5
        return encoder

    monkeypatch.setattr(write, "load_encoder", load_wrongly)
    assert export.main([str(run), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "model.safetensors: its tokens of a random clip differ by 0.5 from those of the run's encoder" in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_run_leaves_no_output(tmp_path):
    with pytest.raises(CommandError, match="not the folder of a run"):
        export.main([str(tmp_path / "no-run"), str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


# --- the card -----------------------------------------------------------------------------------------------------


def test_the_three_lines_of_the_card_work(exported, monkeypatch):
    monkeypatch.chdir(exported.parent)
    code = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)[1]
    assert len(code.splitlines()) == 3
    scope = {"frames": torch.randint(0, 256, (2, 4, 40, 50, 3), dtype=torch.uint8)}
    exec(code, scope)
    assert scope["tokens"].shape == (2, 8, 32)


def test_the_card_names_data_teacher_settings_and_numbers(dataset, tmp_path):
    plan_hash = read_dataset(dataset).plan_hash
    make_run(tmp_path / "run", dataset, plan_hash=plan_hash, teacher__weights=VIDEOMAE, mask__kind="tube")
    probes = tmp_path / "run" / "probes"
    probes.mkdir()
    (probes / "motion.json").write_text(json.dumps(PROBE))
    (probes / "older.json").write_text("{}")
    write_export(tmp_path / "run", tmp_path / "out")
    path = tmp_path / "out" / "README.md"
    head, card = metadata_load(path), path.read_text()
    assert head["license"] == "cc-by-nc-4.0"
    assert {"video", "self-supervised"} <= set(head["tags"])
    splits = ", ".join(f"{name} {split.samples}" for name, split in read_dataset(dataset).splits.items())
    for words in (
        "CC-BY-NC-4.0", "no commercial use", "| teacher | OpenGVLab/VideoMAEv2-Base |", "| objective | latents |",
        f"{splits} videos, 4 classes", plan_hash, "| mask | tube, 75% of the tokens |",
        "| steps | 20 of 40, batches of 16 |",
        "| masked loss in training | 0.75 | 20 |", "| R2 of the masked tokens (0: predicting the mean) | 0.1875 | 20 |",
        "| held-out loss | 0.95 | 10 |",
        "Probe `motion`: 4 classes, trained on 90 clips, measured on 1,000, 2 x 3 views, in percent.",
        "| student | 20 | 71.2 | 1.5 | - | 75.0 | 50.0 | - |", "| random | - | 25.0 | 1.2 | - | - | - | - |",
        "- not as published: data.size: 224 (published: 256)",
        "Probe `older`: its file cannot be read.", "crops of 0.5 to 1.0 of the picture", "Made by salt_wds ",
    ):  # fmt: skip
        assert words in card, words
    assert "another plan" not in card
    assert str(tmp_path) not in card  # nor any folder of this machine


def test_the_card_names_what_is_missing(exported, dataset, tmp_path):
    card = (exported / "README.md").read_text()
    assert "shards: the data set was not found" in card
    assert "No probes were run" in card
    make_run(tmp_path / "run", dataset, plan_hash="f" * 32)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    write_export(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "another plan than the one trained on" in card
    assert "The run has no metrics up to this step." in card


def test_the_licence_of_the_teacher_is_carried_on(tmp_path):
    folders = {name: tmp_path / name for name in ("VideoMAEv2-Base", "renamed", "stated", "silent")}
    for folder in folders.values():
        folder.mkdir()
    (folders["renamed"] / "config.json").write_text('{"model_type": "VideoMAEv2_Base"}')
    (folders["stated"] / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# x\n")
    make_run(tmp_path / "first", teacher__weights=folders["renamed"])
    expected = {
        VIDEOMAE: "cc-by-nc-4.0",
        folders["VideoMAEv2-Base"]: "cc-by-nc-4.0",
        folders["renamed"]: "cc-by-nc-4.0",
        folders["stated"]: "apache-2.0",
        folders["silent"]: "unknown",
        "someone/else": "unknown",
        "random": "unknown",
        tmp_path / "first": "cc-by-nc-4.0",  # of a run its own teacher's
        tmp_path / "first" / "checkpoints" / "step-00000020": "cc-by-nc-4.0",
    }
    found = {w: licence_of(make_run(tmp_path / "run", teacher__weights=w)) for w in expected}
    assert {weights: licence.identifier for weights, licence in found.items()} == expected
    assert "not known here: find it" in found["someone/else"].text
    write_export(tmp_path / "first", tmp_path / "exported")  # an export as the teacher
    assert licence_of(make_run(tmp_path / "run", teacher__weights=tmp_path / "exported")).identifier == "cc-by-nc-4.0"


# --- other tools --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_base_patch16_clip_224"])
def test_timm_gives_the_tokens_of_a_static_clip(arch, tmp_path):
    make_run(tmp_path / "run", student__arch=arch)
    encoder = write_export(tmp_path / "run", tmp_path / "encoder")
    assert export.main([str(tmp_path / "run"), str(tmp_path / "out"), "--timm"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    numbers = [tuple(data[name]) for name in ("input_size", "mean", "std")]
    assert numbers == [(3, 32, 32), encoder.config.mean, encoder.config.std]
    image = torch.randn(2, 3, 32, 32)
    clip = image[:, :, None].expand(-1, -1, 4, -1, -1)
    with torch.inference_mode():
        lost = encoder(clip).unflatten(1, (2, 4)) - model.forward_features(image)[:, None]
        encoder.network.temporal_positions.copy_(encoder.network.temporal_positions.mean(dim=0, keepdim=True))
        rest = encoder(clip).unflatten(1, (2, 4)) - model.forward_features(image)[:, None]
        torch.testing.assert_close(model(image), encoder.pooled(clip), atol=1e-4, rtol=1e-4)
    assert rest.abs().max() < 1e-4
    assert lost.abs().max() > 1e-2  # what the card says is lost: the temporal positions
    found = re.search(r"largest difference ([\d.e-]+)\)", card)
    assert float(found[1]) < 1e-4
    assert "library_name: timm" in card
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, num_classes=5)(image).shape == (2, 5)
    with pytest.raises(CommandError, match=r"an encoder for timm; load it with timm\.create_model\(.local-dir:"):
        salt_wds.load_encoder(tmp_path / "out")
    write_export(tmp_path / "run", tmp_path / "out", "--overwrite")


def test_a_torch_export_program_gives_the_same_tokens(run, tmp_path):
    encoder = write_export(run, tmp_path / "out", "--torch-export")
    program = torch.export.load(tmp_path / "out" / "encoder.pt2").module()
    for clips in (1, 3):
        video = torch.randn(clips, 3, 4, 32, 32)
        torch.testing.assert_close(program(video), encoder(video))


def test_a_format_with_other_tokens_is_refused(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formats, "random_clip", lambda config: torch.full((1, 3, 4, 32, 32), float("nan")))
    assert export.main([str(run), str(tmp_path / "out"), "--torch-export"]) == 1
    assert "encoder.pt2: its tokens of a random clip differ by nan" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_card_says_which_probes_are_on_videos_that_the_teacher_has_seen(tmp_path):
    def card(**settings):
        make_run(tmp_path / "run", **settings)
        (tmp_path / "run/probes").mkdir(exist_ok=True)
        for name in ("probe_ssv2", "k400", "ucf101-split1", "lavawebcam"):
            (tmp_path / "run/probes" / f"{name}.json").write_text(json.dumps(PROBE))
        write_export(tmp_path / "run", tmp_path / "out", "--overwrite")
        return (tmp_path / "out/README.md").read_text()

    known = card(teacher__weights=VIDEOMAE)
    assert "UnlabeledHybrid (arXiv 2303.16727)" in known
    assert "not of unseen videos: probes k400, probe_ssv2.\n" in known
    assert "What the teacher was trained on is not known here" in card(teacher__weights="someone/else")
    assert "teacher was trained on" not in card(objective="pixels")
