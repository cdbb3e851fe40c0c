"""data.clips_per_video: several clips from one decoding of a video, in the same order however batches are made."""

import os
import signal
from functools import partial
from itertools import chain, islice

import numpy as np
import pytest

from salt_wds.data import pipeline
from salt_wds.data.crop_resize import Clip, write_clips
from salt_wds.data.failure_policy import FailurePolicy, LoaderStopped
from salt_wds.data.loader import Loader
from salt_wds.data.order import Order, Repeated, sample_rng
from salt_wds.data.reader import Reader
from salt_wds.data.views import training_view
from shard_tools.format import ledger
from shard_tools.format.ledger import Failure
from shard_tools.video.decode import get_decoder

pytest_plugins = ["loader_maker"]  # make_config, take, damaged


@pytest.fixture
def in_threes(make_config):
    """Batches of eight clips, three of each video: some groups lie in two batches."""
    return partial(make_config, clips_per_video=3, num_workers=0)


def test_each_place_of_the_order_is_repeated():
    order = Order([3, 1, 4], window=2, seed=5)
    repeated = Repeated(order, 3)
    for position in range(60):
        assert repeated.locate(position) == order.locate(position // 3)
        assert repeated.epoch(position) == position // 24
        assert repeated.locate(position, 2) == order.locate(position // 3, 2)


def test_clips_are_those_that_each_position_draws_by_itself(in_threes, tmp_path):
    config = in_threes()
    loader = Loader(config, tmp_path / "l.jsonl")
    catalog, reader = loader.catalog, Reader(loader.catalog, 0)
    order = Repeated(Order(catalog.part_samples[0], 2, config.train.seed), 3)
    seen = []
    for batch in islice(loader, 4):
        for position, key, clip in zip(batch["positions"], batch["keys"], batch["clips"].numpy(), strict=True):
            place = order.locate(position)
            row = catalog.row(*place)
            rng = sample_rng(config.train.seed, position)
            frames, crop = training_view(row.num_frames, row.width, row.height, config.data, rng)
            numbers = sorted(set(frames.tolist()))
            record, payload = reader.read(place.shard, row, numbers)
            out = np.empty_like(clip)
            decoded = get_decoder(row.ext)(payload, pipeline.video_info(row, record, foreign=False), numbers)
            write_clips(decoded.pictures, [Clip(frames, crop, out)])
            assert (key, position) == (row.key, len(seen))
            assert (clip == out).all()
            seen.append((key, clip.tobytes()))
    assert len(set(seen)) > len({key for key, _ in seen})  # clips of one video differ


def test_a_video_is_decoded_once_for_its_clips(make_config, tmp_path):
    counts = {}
    for clips in (1, 4):
        batches = islice(Loader(make_config(clips_per_video=clips, num_workers=0), tmp_path / "l.jsonl"), 4)
        taken = [batch["counts"] for batch in batches]
        counts[clips] = {name: sum(count[name] for count in taken) for name in ("used", "decoded", "payload_read")}
    assert counts[4]["used"] == counts[1]["used"]
    assert counts[4]["decoded"] < counts[1]["decoded"] / 2
    assert counts[4]["payload_read"] < counts[1]["payload_read"] / 2


@pytest.mark.parametrize("clips", [2, 3, 20])
def test_batches_do_not_depend_on_workers_start_and_ranks(make_config, take, tmp_path, clips):
    plain = take(make_config(num_workers=0, clips_per_video=clips), tmp_path / "l.jsonl", 8)
    config = make_config(num_workers=3, prefetch_factor=1, clips_per_video=clips)
    assert take(config, tmp_path / "l.jsonl", 5, start=3) == plain[3:]
    parts = [take(config, tmp_path / "l.jsonl", 8, rank=rank, world_size=2) for rank in range(2)]
    for number, batch in enumerate(plain):
        for field in (1, 3):  # keys and masks
            assert list(batch[field]) == list(chain.from_iterable(part[number][field] for part in parts))


def test_fixed_views_go_on_with_every_clip(make_config, tmp_path):
    """With as many fixed views as clips, every epoch shows each of them once; with one more, they shift."""
    clips = {}
    for views in (2, 3):
        config = make_config(num_workers=0, clips_per_video=2, views=views, batch_size=2)
        loader = Loader(config, tmp_path / "l.jsonl")
        for batch in islice(loader, 2 * loader.catalog.num_samples):
            both = [clip.numpy().tobytes() for clip in batch["clips"]]
            assert len(set(batch["keys"])) == 1
            clips.setdefault((views, batch["keys"][0]), []).append(both)
    for (views, _), (first, second) in clips.items():
        if views == 2:
            assert first == second
        else:
            assert second[1] == first[0]
            assert second[0] not in first


# --- failures -----------------------------------------------------------------------------------------------------


def test_all_clips_of_a_damaged_video_get_one_substitute_and_one_record(in_threes, damaged, take, tmp_path):
    folder, damage = damaged
    _, key, _ = damage(1, 0)
    config = in_threes(folder, max_failure_rate=1.0)
    loader = Loader(config, tmp_path / "l.jsonl")
    videos: dict[int, set[str]] = {}
    for batch in islice(loader, 12):
        for position, name in zip(batch["positions"], batch["keys"], strict=True):
            videos.setdefault(position // 3, set()).add(name)
    assert all(len(names) == 1 for names in videos.values())
    failures, _ = ledger.read(tmp_path / "l.jsonl")
    assert {failure.key for failure in failures} == {key}
    starts = [failure.position for failure in failures]
    assert len({start // 3 for start in starts}) >= len(starts) / 2  # once for each batch that a group lies in
    whole = take(config, tmp_path / "m.jsonl", 12)
    parts = [take(config, tmp_path / f"{rank}.jsonl", 12, rank=rank, world_size=4) for rank in range(4)]
    for number in range(12):
        assert list(whole[number][1]) == list(chain.from_iterable(part[number][1] for part in parts))
    assert take(config, tmp_path / "m.jsonl", 6, start=6) == whole[6:]


def fail_at(sample, position):
    if (sample["position"], sample["attempt"]) == (position, 0):
        raise ValueError("injected")
    return sample


def test_a_clip_that_a_stage_refuses_is_replaced_alone(in_threes, take, tmp_path):
    plain = take(in_threes(), tmp_path / "l.jsonl", 1)[0]
    batch = next(iter(Loader(in_threes(), tmp_path / "m.jsonl", stages=[partial(fail_at, position=4)])))
    assert batch["substituted"].tolist() == [position == 4 for position in range(8)]
    changed = [position for position in range(8) if plain[1][position] != batch["keys"][position]]
    assert changed == [4]


def test_a_killed_worker_costs_nothing(make_config, take, tmp_path):
    config = make_config(num_workers=2, clips_per_video=3)
    plain = take(make_config(num_workers=0, clips_per_video=3), tmp_path / "l.jsonl", 10)
    loader = Loader(config, tmp_path / "k.jsonl")
    keys = []
    for number, batch in enumerate(islice(loader, 10)):
        keys.append(tuple(batch["keys"]))
        if number in (1, 4):
            os.kill(int(loader.spec.in_flight.array["pid"][number % 2]), signal.SIGKILL)
    assert keys == [content[1] for content in plain]
    assert all(failure.action is None for failure in ledger.read(tmp_path / "k.jsonl")[0])


def test_failures_in_a_row_are_counted_by_video(make_config):
    policy = FailurePolicy(make_config(max_consecutive_failures=5).data, "/data", clips_per_sample=4)
    positions = list(range(32))
    lost = [Failure("decode", "E", "m", "substituted", position=at, shard="s", key="k") for at in range(0, 32, 4)]
    with pytest.raises(LoaderStopped, match="6 samples in a row failed"):
        policy.observe({"failures": lost, "keys": ["k"] * 32, "positions": positions})
