"""What a checkpoint says of the run that wrote it, and that a run is carried on as it was begun."""

import contextlib
import copy
import os
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import end, stop

from mnist_jax.checkpoint.integrity import CorruptCheckpointError, IncompatibleCheckpointError
from mnist_jax.training import compatibility

PARTS = ("software", "settings", "devices")
ABOUT = {
    "config": {"model": "cnn"},
    "data": {"name": "digits"},
    "software": {"jax": "0.10.2"},
    "settings": {"jax_threefry_partitionable": "True"},
    "devices": {"platform": "cpu", "count": 1},
    "metrics": {"bytes": 7, "sha256": "abc"},
    "reason": "steps",
}
DIGITS = ("--dataset", "digits", "--steps", "40", "--log-every-steps", "10", "--eval-every-steps", "40")

scalars = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3)
json_values = st.recursive(
    scalars | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
environments = st.fixed_dictionaries(
    {part: st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), st.sampled_from(["x", "y", 1, 2])) for part in PARTS}
)


@given(about=environments, environment=environments)
def test_each_field_that_changed_is_told_with_before_and_now_and_no_other_is(about, environment):
    fields = [(part, name) for part in environment for name in "abcd"]
    pairs = [(part, name, about[part].get(name), environment[part].get(name)) for part, name in fields]
    expected = [f"{part} {name} {before} -> {now}" for part, name, before, now in pairs if before != now]
    assert compatibility.diff_environment({**ABOUT, **about}, environment) == expected


@given(environment=environments)
def test_where_nothing_changed_nothing_is_told(environment):
    assert compatibility.diff_environment({**ABOUT, **environment}, copy.deepcopy(environment)) == []


def test_the_environment_as_a_run_describes_it_is_whole_and_without_changes_against_itself():
    environment = compatibility.describe_environment()
    assert set(environment) == set(PARTS)
    assert {"mnist_jax", "jax", "jaxlib", "flax", "optax", "numpy"} == set(environment["software"])
    about = {**ABOUT, **environment}
    assert compatibility.check_metadata(about, 3) == about
    assert compatibility.diff_environment(about, environment) == []


def test_of_several_processes_each_is_described_where_it_differs_from_the_first_and_a_change_of_any_is_told():
    first = {"software": {"jax": "0.10.2"}, "settings": {}, "devices": {"cpu_threads": 2, "count": 3}}
    slower = {**first, "devices": {"cpu_threads": 1, "count": 3}}
    newer = {**first, "software": {"jax": "0.12.0"}}
    assert compatibility.merge_environments([first]) == compatibility.merge_environments([first, first, first]) == first
    joined = compatibility.merge_environments([first, slower, newer])
    assert joined["devices"] == {**first["devices"], "cpu_threads of process 1": 1}
    assert joined["software"] == {"jax": "0.10.2", "jax of process 2": "0.12.0"}
    assert compatibility.diff_environment(
        {**ABOUT, **joined}, compatibility.merge_environments([first, first, newer])
    ) == ["devices cpu_threads of process 1 1 -> None"]


def test_what_a_run_says_of_itself_is_taken_as_it_is():
    assert compatibility.check_metadata(ABOUT, 3) == ABOUT


@pytest.mark.parametrize("name", ABOUT)
@given(value=json_values)
@settings(max_examples=25)
def test_a_part_of_a_wrong_type_is_named(name, value):
    about = {**ABOUT, name: value}
    fits = isinstance(value, str if name == "reason" else dict) and name != "metrics"
    if fits:
        assert compatibility.check_metadata(about, 3) == about
    else:
        with pytest.raises(
            IncompatibleCheckpointError, match=rf"the checkpoint of step 3 says nothing usable of the run's {name}\b"
        ):
            compatibility.check_metadata(about, 3)


@pytest.mark.parametrize("name", ABOUT)
def test_a_part_that_is_missing_is_named(name):
    about = {part: value for part, value in ABOUT.items() if part != name}
    with pytest.raises(
        IncompatibleCheckpointError, match=rf"the checkpoint of step 3 says nothing usable of the run's {name}$"
    ):
        compatibility.check_metadata(about, 3)


@given(size=json_values, sha256=json_values)
def test_a_fingerprint_of_the_metrics_that_is_none_is_refused(size, sha256):
    about = {**ABOUT, "metrics": {"bytes": size, "sha256": sha256}}
    if type(size) is int and size >= 0 and isinstance(sha256, str):
        assert compatibility.check_metadata(about, 3) == about
    else:
        with pytest.raises(IncompatibleCheckpointError, match=r"nothing usable of the run's metrics\.jsonl"):
            compatibility.check_metadata(about, 3)


# The size of the thread pool


class Told:
    """A checkpoint that has metadata, or an error for them."""

    def __init__(self, devices: object) -> None:
        self.devices = devices

    def metadata(self) -> object:
        if isinstance(self.devices, Exception):
            raise self.devices
        return {"devices": self.devices}


def prepared(*devices: object, **variables: str) -> str | None:
    """Return the size of the thread pool that is asked for where the checkpoints tell of these devices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")
        for name in ("PJRT_NPROC", "NPROC"):
            patch.setenv(name, variables.get(name, ""))
        compatibility.prepare_jax(compatibility.cpu_threads_of([Told(told) for told in devices]))
        return os.environ["PJRT_NPROC"] or None


def test_the_recorded_size_of_the_newest_checkpoint_that_can_be_read_is_taken_over():
    damaged = CorruptCheckpointError(30, "bad-manifest", "manifest.json is torn")
    assert prepared() is None
    assert prepared({"cpu_threads": 3}) == "3"
    assert prepared({"cpu_threads": 3}, {"cpu_threads": 5}) == "5"
    assert prepared({"cpu_threads": 3}, {"cpu_threads": 5}, damaged) == "5"
    assert prepared({"cpu_threads": 3}, PermissionError(13, "Permission denied")) == "3"
    assert prepared({"cpu_threads": 3}, {"cpu_threads": None}) is None  # It was on an accelerator last.
    assert prepared(damaged) is None


@pytest.mark.parametrize("name", ["PJRT_NPROC", "NPROC"])
def test_a_size_that_the_environment_asks_for_stays(name):
    assert prepared({"cpu_threads": 3}, **{name: "7"}) == ("7" if name == "PJRT_NPROC" else None)


@pytest.mark.parametrize("threads", [0, -1, 10**9, 2.0, "2", True, None, [2], {"2": 2}])
def test_a_recorded_size_that_is_absurd_is_not_taken_over(threads):
    assert prepared({"cpu_threads": threads}) is None


@given(devices=json_values | st.fixed_dictionaries({"cpu_threads": json_values}))
def test_whatever_the_metadata_say_of_devices_is_a_size_in_range_or_nothing(devices):
    found = prepared({"cpu_threads": 3}, devices)
    wanted = devices.get("cpu_threads") if isinstance(devices, dict) else None
    is_size = type(wanted) is int and 0 < wanted <= compatibility.MAX_CPU_THREADS
    assert found == (str(wanted) if is_size else None)


@contextlib.contextmanager
def bound_to(cores: list[int]):
    """Have what is started inside run on these cores alone; who starts it passes on its own."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs 2 cores, and to choose"
)
def test_a_run_carried_on_with_one_core_has_the_pool_of_before_and_ends_in_the_very_same_bits(new_run):
    whole, run = new_run("whole"), new_run()
    cores = sorted(os.sched_getaffinity(0))[:2]
    with bound_to(cores):
        process = run.start(*DIGITS, "--checkpoint-every-steps", "4")  # The saves make the run last.
    assert run.wait_for(lambda: len(run.events("save")) > 0, process)
    stopped = stop(process, signal.SIGTERM)
    assert stopped.last_line.startswith("stopped ")
    with bound_to(cores[:1]):
        process = run.start()
    ended = end(process)
    with bound_to(cores):
        process = whole.start(*DIGITS)
    expected = end(process)
    assert ended.out.startswith(f"resumed cnn on digits from step {stopped.fields['step']} of 40")
    assert ended.out.splitlines()[0].endswith(": exact")
    assert run.events("resume")[-1]["exact"]
    assert [event["devices"]["cpu_threads"] for event in run.events("start")] == [2, 2]
    assert ended.last_line == expected.last_line
    assert run.metrics() == whole.metrics()
