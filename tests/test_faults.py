"""A few faults of each kind of the campaign in `faults.py`; `scripts/faults` injects hundreds."""

import errno
import signal

import pytest
from faults import (
    CORRUPTIONS,
    Campaign,
    CannotMountError,
    Result,
    corrupt,
    fail_with_74,
    failing,
    fill_disk,
    kill_anywhere,
    kill_in_save,
    lose_run_directory,
    prepare,
    start_at_once,
    stop_in,
)
from runs import ALL_THREADS


@pytest.fixture(scope="module")
def campaign(tmp_path_factory, environment) -> Campaign:
    return prepare(tmp_path_factory.mktemp("campaign"), {**environment, **ALL_THREADS})


def assert_survived(results: list[Result]) -> None:
    assert results
    assert all(result.is_survived for result in results), results


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corrupt_checkpoint_is_quarantined(campaign, kind):
    assert_survived([result for number in range(4) for result in corrupt(campaign, kind, number)])


@pytest.mark.parametrize("kill", [kill_anywhere, kill_in_save])
def test_a_killed_run_resumes_exactly(campaign, kill):
    assert_survived(kill(campaign, 1, seed=0))


@pytest.mark.parametrize(
    ("phase", "number"),
    [("the final save", signal.SIGUSR1), ("the save after a first signal", signal.SIGABRT)],
)
def test_a_signal_in_a_save_loses_nothing(campaign, phase, number):
    assert_survived(stop_in(campaign, phase, number))


def test_a_full_disk_fails_saves_only(campaign):
    try:
        assert_survived(fill_disk(campaign, is_freed=True))
    except CannotMountError as error:
        pytest.skip(f"cannot mount a small disk: {error}")


def test_a_failing_last_save_exits_with_74(campaign):
    assert_survived(fail_with_74(campaign, campaign.new_run((failing, "fsync", errno.EIO, [80, 100, 120]))))


def test_a_removed_run_directory_exits_with_74(campaign):
    assert_survived(lose_run_directory(campaign, is_replaced=True))


def test_one_of_two_starts_at_once_trains(campaign):
    assert_survived(start_at_once(campaign, 2))
