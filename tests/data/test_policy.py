"""Failures: counted over the last samples, a warning as they repeat or rise, a stop at the configured share."""

import pytest

from salt_wds.config import load_config
from salt_wds.data.failure_policy import FailurePolicy, LoaderStopped
from shard_tools.format.ledger import Failure


@pytest.fixture
def make_policy(repository):
    def make(**data):
        overrides = [f"data.{key}={value}" for key, value in data.items()]
        config = load_config(repository / "configs" / "tiny.toml", ["data.shards=/data", *overrides])
        return FailurePolicy(config.data, "/data")

    return make


def batch(number, failed, size=32, action="substituted"):
    positions = list(range(number * size, (number + 1) * size))
    failures = [
        Failure("decode", "E", "m", action, position=positions[2 * i], shard="s", key="k") for i in range(failed)
    ]
    return {"failures": failures, "keys": ["k"] * size, "positions": positions}


def test_a_share_above_the_configured_one_stops(make_policy):
    policy = make_policy(max_failure_rate=0.1)
    for number in range(6):  # 14%, of too few samples to judge
        policy.observe(batch(number, 5))
    with pytest.raises(
        LoaderStopped, match=r"35 of the last 259 samples failed, more than data\.max_failure_rate = 0\.1"
    ):
        policy.observe(batch(6, 5))
    assert policy.total == 35


def test_a_long_good_past_does_not_hide_a_bad_present(make_policy):
    policy = make_policy(max_failure_rate=0.1)
    for number in range(3000):
        policy.observe(batch(number, 0))
    bad = (policy.observe(batch(number, 8)) for number in range(3000, 3100))
    with pytest.raises(LoaderStopped):
        list(bad)


def test_a_sample_that_was_not_lost_does_not_count_as_failed(make_policy):
    policy = make_policy(max_failure_rate=0.01)
    for number in range(50):
        policy.observe(batch(number, 5, action=None))
    assert policy.total == 250


def test_repeated_failures_are_logged_with_their_counter(make_policy, caplog):
    policy = make_policy(max_failure_rate=0.5)
    for number in range(20):
        policy.observe(batch(number, 1))
    logged = [record.getMessage().split(":")[0] for record in caplog.records]
    assert logged == [f"failure {count}" for count in (1, 2, 4, 8, 16)]


def test_rising_failures_are_logged_with_their_counts(make_policy, caplog):
    policy = make_policy(max_failure_rate=0.5)
    for number in range(80):  # two stretches of some 1,024 samples, with 4 and with 62 failures
        policy.observe(batch(number, 2 if number >= 32 else number < 4))
    rising = [record.getMessage() for record in caplog.records if "rising" in record.getMessage()]
    assert rising[0].startswith("failures are rising: 62 of the last 1054 samples, 4 of as many before; in all 66")


def test_a_run_of_failures_stops(make_policy):
    policy = make_policy(max_consecutive_failures=3, max_failure_rate=1.0)
    failures = [Failure("read", "E", "m", "substituted", position=n, shard="s", key=str(n)) for n in range(4)]
    with pytest.raises(
        LoaderStopped, match=r"4 samples in a row failed; s 0, s 1, s 2, s 3; in all 4 read; check: python"
    ):
        policy.observe({"failures": failures, "keys": ["k"] * 8, "positions": list(range(8))})
