"""The forecast of a node: arithmetic on measured times, the slower part decides."""

import pytest

from salt_wds.bench.forecast import Measured, forecast


def test_workers_add_up_until_the_training_process_cannot_take_more():
    tier = Measured("webm", worker_ms=20.0, taking_ms=1.0, bytes_a_clip=1e5, batch_bytes=10**8)
    few, many = forecast([tier], [8, 32], prefetch=4)
    assert (few.clips_per_sec, few.limited_by) == (pytest.approx(400), "workers")
    assert (many.clips_per_sec, many.limited_by) == (
        pytest.approx(1000), "the training process taking batches over"
    )  # fmt: skip
    assert few.drive_gb_per_s == pytest.approx(0.04)
    assert few.memory_gb == pytest.approx(4.0)
