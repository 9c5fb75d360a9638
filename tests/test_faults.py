"""Some faults of the campaign in `faults.py` that no other test injects; `scripts/faults` injects hundreds."""

import signal

import pytest
from faults import (
    CORRUPTIONS,
    PHASES,
    Campaign,
    Result,
    corrupt,
    kill_in_save,
    lose_run_directory,
    prepare,
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
    assert_survived([result for number in range(2) for result in corrupt(campaign, kind, number)])


def test_a_run_killed_in_a_save_resumes_exactly(campaign):
    assert_survived(kill_in_save(campaign, 1, seed=0))


def test_a_second_signal_in_a_save_loses_no_earlier_checkpoint(campaign):
    assert_survived(stop_in(campaign, PHASES[-1], signal.SIGABRT))


def test_a_removed_run_directory_exits_with_74(campaign):
    assert_survived(lose_run_directory(campaign, is_replaced=True))
