"""The campaign of `faults.py` in small: a few faults of each kind, where `scripts/faults` has hundreds."""

import errno
import signal

import pytest
from faults import (
    DAMAGE,
    Campaign,
    CannotMount,
    Result,
    crowd,
    damage,
    failing,
    fill_disk,
    kill_again_and_again,
    kill_one_of_two,
    lose_run_directory,
    prepare,
    should_stop,
    stop_in,
)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory, environment) -> Campaign:
    return prepare(tmp_path_factory.mktemp("campaign"), environment)


def assert_survived(results: list[Result]) -> None:
    assert results
    assert all(result.is_survived for result in results), results


@pytest.mark.parametrize("harm", DAMAGE)
def test_a_damaged_checkpoint_is_never_used_and_never_deleted(campaign, harm):
    assert_survived([result for number in range(15) for result in damage(campaign, harm, number)])


@pytest.mark.parametrize("in_save", [False, True])
def test_a_run_killed_at_any_moment_loses_two_intervals_at_most_and_no_bit(campaign, in_save):
    results = kill_again_and_again(campaign, 2, seed=0, in_save=in_save)
    assert len(results) == 2
    assert_survived(results)


def test_two_processes_of_which_one_is_killed_in_a_save_lose_two_intervals_at_most_and_no_bit(campaign):
    results = kill_one_of_two(campaign, 1, seed=0)
    assert len(results) == 1
    assert_survived(results)


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        ("the final save", signal.SIGUSR1),
        ("the save after a first signal", signal.SIGABRT),
    ],
)
def test_a_signal_in_a_save_stops_the_run_and_the_rerun_ends_alike(campaign, phase, number):
    assert_survived(stop_in(campaign, phase, number))


def test_a_full_disk_that_is_freed_in_time_is_told_of_and_changes_no_bit(campaign):
    try:
        assert_survived(fill_disk(campaign, is_freed=True))
    except CannotMount as error:
        pytest.skip(f"no small disk can be mounted here: {error}")


def test_a_disk_that_fails_to_the_end_is_told_of_with_74_and_the_rerun_ends_alike(campaign):
    assert_survived(should_stop(campaign, campaign.new_run((failing, "fsync", errno.EIO, [80, 100, 120]))))


def test_a_run_whose_directory_is_removed_ends_with_74_and_leaves_alone_what_is_put_there(campaign):
    assert_survived(lose_run_directory(campaign, is_replaced=True))


def test_of_processes_that_start_at_once_one_works_and_the_others_wait_or_leave_with_73(campaign):
    assert_survived(crowd(campaign, 2))
