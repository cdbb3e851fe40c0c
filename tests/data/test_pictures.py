"""Pictures show what the networks see: the right clip, the right patches faded, colours that agree."""

import json

import cv2
import numpy as np
import pytest
import torch

from salt_wds.config import load_config
from salt_wds.data import pictures
from salt_wds.data.loader import Loader
from salt_wds.data.masks import num_masked
from salt_wds.data.pixels import yuv_to_rgb
from salt_wds.runs.history import record_end
from salt_wds.train import loop
from salt_wds.train import trainer as training

GRID = (4, 4, 4)


@pytest.fixture
def config_of(dataset, repository, tmp_path):
    """The configuration of a run in `tmp_path`; settings as `train__steps=3`."""

    def config_of(run="run", **settings):
        overrides = {
            "data.shards": dataset,
            "data.num_workers": 0,
            "data.batch_size": 4,
            "train.run_dir": tmp_path / run,
            "train.log_every": 1,
            "train.steps": 2,
            "train.checkpoint_every": 2,
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        return load_config(repository / "configs" / "tiny.toml", [f"{k}={v}" for k, v in overrides.items()])

    return config_of


def test_hidden_cells_are_the_masked_tokens():
    """Token n of a 4 x 4 x 4 grid stands at time n // 16, row n // 4 % 4, column n % 4."""
    order = torch.arange(64).flip(0)[None].to(torch.int16)  # visible 63..3, masked 2, 1, 0
    hidden = pictures.hidden_cells(order, GRID, 3)
    assert hidden.shape == (1, *GRID)
    assert [tuple(place) for place in np.argwhere(hidden[0])] == [(0, 0, 0), (0, 0, 1), (0, 0, 2)]


def test_times_are_all_or_eight_from_first_to_last():
    assert pictures.shown_times((4, 14, 14)) == [0, 1, 2, 3]
    times = pictures.shown_times((32, 14, 14))
    assert (len(times), times[0], times[-1]) == (8, 0, 31)


# --- tokens -------------------------------------------------------------------------------------------------------


def test_components_are_those_the_tokens_were_made_of():
    """Three orthogonal directions with variances 9, 4 and 1, and noise: found in this order, with their share."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(8, 64, 3, generator=generator)
    directions, _ = torch.linalg.qr(torch.randn(32, 3, generator=generator))
    noise = 0.01 * torch.randn(8, 64, 32, generator=generator)
    scores, share = pictures.principal_components(truth * torch.tensor([3.0, 2.0, 1.0]) @ directions.T + 5 + noise)
    correlation = torch.corrcoef(torch.cat([scores.flatten(0, 1).T, truth.flatten(0, 1).T.double()]))[:3, 3:]
    assert (correlation.abs().diagonal() > 0.98).all()
    assert share > 0.999


def test_constant_tokens_are_grey():
    """Also with differences of the size of bf16's rounding, which percentiles would stretch to full colours."""
    noise = torch.rand(2, 64, 32, generator=torch.Generator().manual_seed(0))
    for tokens in (torch.full((2, 64, 32), 3.0), 3 + 1e-4 * noise):
        scores, _ = pictures.principal_components(tokens)
        assert (pictures.as_colours(scores, GRID) == 128).all()


def test_matching_undoes_order_and_signs():
    scores = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0)).double()
    turned = scores[..., [2, 0, 1]] * torch.tensor([-1.0, 1.0, -1.0])
    assert torch.equal(pictures.matched(turned, scores), scores)


# --- the first batch ----------------------------------------------------------------------------------------------


def sheet_tiles(path, rows, columns):
    """The tiles of a sheet, (rows, columns, TILE, TILE, 3) RGB, found by the layout: 36 pixels, then 24 + tile + 6."""
    sheet = cv2.imread(str(path))[..., ::-1]
    size = pictures.TILE
    tops, lefts = [36 + row * (size + 30) + 24 for row in range(rows)], [12 + c * (size + 3) for c in range(columns)]
    return np.array([[sheet[top : top + size, left : left + size] for left in lefts] for top in tops])


def test_the_first_batch_is_shown_with_its_masks(config_of, tmp_path):
    """Visible patches have the pixels of the batch, masked ones fade; enlarged twice, compared within."""
    config = config_of()
    loader = Loader(config, tmp_path / "l.jsonl")
    batch = next(iter(loader))
    pictures.write_first_batch(tmp_path, config, batch, loader.catalog.classes)
    rgb = 255 * yuv_to_rgb(batch["clips"][:, ::2], batch["colour"], 64).permute(0, 2, 3, 4, 1).numpy()
    hidden = np.zeros((4, 64), bool)
    for row, order in enumerate(batch["mask"].numpy()):
        hidden[row, order[-num_masked(GRID, config.mask) :]] = True
    shown = sheet_tiles(tmp_path / "first_batch.png", 4, 4).astype(float)
    differences = {True: [], False: []}
    for row, time, y, x in np.ndindex(4, *GRID):
        inner = shown[row, time, 32 * y + 8 : 32 * y + 24, 32 * x + 8 : 32 * x + 24].mean(axis=(0, 1))
        source = rgb[row, time, 16 * y + 4 : 16 * y + 12, 16 * x + 4 : 16 * x + 12].mean(axis=(0, 1))
        differences[bool(hidden.reshape(4, *GRID)[row, time, y, x])].append((inner, source))
    seen, faded = (np.array(differences[key]) for key in (False, True))
    assert np.abs(seen[:, 0] - seen[:, 1]).max() < 6
    assert np.abs(faded[:, 0] - (0.22 * faded[:, 1] + 0.78 * np.array([112, 120, 132]))).max() < 6


@pytest.mark.slow
def test_the_picture_changes_nothing_in_the_run(config_of, tmp_path, monkeypatch):
    """Parameters, AdamW and random numbers are those of a run without it, to the byte; a resume leaves it alone."""
    assert training.train(config_of("with")) == 0
    picture = tmp_path / "with/first_batch.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.write_bytes(b"untouched")
    assert training.train(config_of("with", train__steps=4), resume=True) == 0
    assert picture.read_bytes() == b"untouched"
    events = [json.loads(line) for line in (tmp_path / "with/history.jsonl").read_text().splitlines()]
    assert [(e["event"], e.get("step"), e.get("code")) for e in events] == [
        ("start", 0, None), ("end", None, 0), ("start", 2, None), ("end", None, 0)
    ]  # fmt: skip
    monkeypatch.setattr(loop, "write_first_batch", lambda *_: None)
    assert training.train(config_of("without", train__steps=4)) == 0
    for step, name in ((2, "model"), (2, "trainer"), (4, "model"), (4, "trainer")):
        a, b = (tmp_path / run / f"checkpoints/step-{step:08d}/{name}.safetensors" for run in ("with", "without"))
        assert a.read_bytes() == b.read_bytes()


def test_a_full_disk_costs_the_picture_and_not_the_run(config_of, tmp_path, monkeypatch, caplog):
    def refuse(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(pictures, "write_atomic", refuse)
    config = config_of()
    batch = next(iter(Loader(config, tmp_path / "l.jsonl")))
    pictures.write_first_batch(tmp_path, config, batch, ["a"] * 4)
    assert "no picture of the first batch" in caplog.text
    assert "No space left" in caplog.text
    (tmp_path / "history.jsonl").mkdir()  # cannot be written
    record_end(tmp_path, 0)
    assert "history.jsonl: Is a directory" in caplog.text
