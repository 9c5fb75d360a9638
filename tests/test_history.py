"""The attempts of a run, as its event log has them: in `status`, and in the report."""

import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from runs import DIGITS_CONFIG, Run, act_at, train_here

from mnist_jax import status
from mnist_jax.config import Config
from mnist_jax.records.metrics import read_events
from mnist_jax.report import __main__ as report
from mnist_jax.report.history import Attempt, goodput, read_attempts, read_curve
from mnist_jax.report.run_status import CheckpointStatus, NextStart, Status, summarize
from mnist_jax.runtime.lock import exclusive_lock
from mnist_jax.runtime.preemption import StopSignal

pytestmark = pytest.mark.usefixtures("in_this_process")


SMALL = Config(
    **DIGITS_CONFIG,
    steps=40,
    average_decay=0.9,
    log_every_steps=2,
    eval_every_steps=20,
    checkpoint_every_steps=10,
    keep=9,
)


def attempts_of(*events: dict) -> list[Attempt]:
    return read_attempts(events, is_running=False, now_s=0.0)


@pytest.fixture(scope="module")
def eventful(tmp_path_factory) -> Run:
    """A run that was stopped after step 15, killed after step 27 and stopped after step 35."""
    folder = tmp_path_factory.mktemp("eventful")

    def kill() -> None:
        """Copy what is on the disk, as a kill leaves it; the attempt in the original directory goes on."""
        while not (folder / "original" / "checkpoints" / "20").exists():
            time.sleep(0.01)
        shutil.copytree(folder / "original", folder / "run")

    for name, step, action in (
        ("original", 15, lambda: os.kill(os.getpid(), signal.SIGTERM)),
        ("original", 27, kill),
        ("run", 35, lambda: os.kill(os.getpid(), signal.SIGINT)),
    ):
        with StopSignal() as stop, pytest.MonkeyPatch.context() as patch:
            act_at(patch, step, action)
            assert train_here(SMALL, folder / name, stop) == 0
    return Run(folder / "run")


def test_attempts_of_an_interrupted_run(eventful):
    first, second = eventful.events("resume")
    attempts = attempts_of(*eventful.events())
    assert [attempt.outcome for attempt in attempts] == ["stopped by SIGTERM", "killed", "stopped by SIGINT"]
    assert [attempt.first_step for attempt in attempts] == [0, first["step"], second["step"]]
    assert [attempt.resume for attempt in attempts] == ["", "exact", "exact"]
    assert second["lost_steps"] >= 2
    assert [attempt.recomputed_steps for attempt in attempts] == [0, 0, second["lost_steps"]]
    assert [attempt.lost_steps for attempt in attempts] == [0, second["lost_steps"], 0]
    assert attempts[1].last_step == second["step"] + second["lost_steps"]


def test_spans_cover_each_attempt_without_gaps(eventful):
    attempts = attempts_of(*eventful.events())
    for attempt in attempts:
        spans = [span for span in attempt.spans if span.lane != "save"]
        assert [span.lane for span in spans][:2] == ["data", "compile"]
        assert [spans[0].begin_s, spans[-1].end_s] == [attempt.began_s, attempt.ended_s]
        assert all(a.end_s == b.begin_s for a, b in pairwise(spans))
    assert [span.lane for span in attempts[1].spans if span.lane != "save"][2:] == ["train", "evaluate", "train"]
    saves = [(span.begin_s, span.end_s) for a in attempts for span in a.spans if span.lane == "save"]
    assert [(event["time"] - event["seconds"], event["time"]) for event in eventful.events("save")] == saves


def test_status_shows_stops_resumes_and_kills(eventful, capsys):
    assert status.main([str(eventful.workdir), "--json"]) == 0
    history = json.loads(capsys.readouterr().out)["history"]
    names = [event["event"] for event in history]
    assert names == [
        *("start", "signal", "exit"),
        *("start", "resume", "killed"),
        *("start", "resume", "signal", "exit"),
    ]
    killed, resume = history[5], history[7]
    assert killed["step"] == resume["step"] + resume["lost_steps"]
    assert (history[1]["signal"], history[2]["outcome"], resume["exact"]) == ("SIGTERM", "stopped", True)
    assert status.main([str(eventful.workdir)]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"killed +step {killed['step']}\b", text)
    assert f"exact, {resume['lost_steps']} steps" in text


def test_report_shows_interruptions(eventful, capsys):
    with exclusive_lock(eventful.workdir, wait_s=0, notify=print):  # as a running training holds it
        assert report.main([str(eventful.workdir)]) == 0
    page = Path(capsys.readouterr().out.splitlines()[-1]).read_text()
    [_, resume] = eventful.events("resume")
    assert "stopped by SIGTERM" in page
    assert "2, of which 2 exact" in page
    assert f"1; {resume['lost_steps']:,} steps were lost" in page
    assert f"in use by process {os.getpid()}" in page
    assert "Confusion matrix: a row" in page


START = {"event": "start", "step": 0, "time": 1.0}
SIGNAL = {"event": "signal", "step": 9, "signal": "SIGTERM"}
STOPPED = {"event": "exit", "step": 9, "outcome": "stopped", "time": 3.5}


def test_running_attempt_lasts_until_now():
    [attempt] = read_attempts([START], is_running=True, now_s=4e9)
    assert (attempt.outcome, attempt.began_s, attempt.ended_s) == ("running", 1.0, 4e9)


def test_interruptions_are_counted():
    good = CheckpointStatus(5, 1.0, 10, "time", None, good=True, problem=None)
    bad = CheckpointStatus(6, 1.0, 10, "time", None, good=False, problem="step 6: bad")
    found = Status("", None, [good, bad], ["7-bad"], [], NextStart("begin", 0, 0, ""))
    resume = {"event": "resume", "step": 5, "exact": True, "lost_steps": 3}
    train = {"event": "phase", "phase": "train", "step": 8}
    attempts = attempts_of(
        *(START, {**SIGNAL, "seconds": 0.25}, STOPPED),
        *(START, {**SIGNAL, "seconds": 1.5}, STOPPED, START, {**SIGNAL, "seconds": "soon"}, STOPPED),
        *(START, train, START, resume, START, {**resume, "exact": False, "changed": ["jax 1 -> 2"]}, train),
    )
    counts = report.count_interruptions(found, attempts)
    assert counts["Resumes"] == "2, of which 1 exact"
    assert counts["Stops by a signal or a notice"].startswith("3")
    assert "1.50 s" in counts["Stops by a signal or a notice"]
    assert counts["Kills"].startswith("3; 6 steps")
    assert counts["Checkpoints"].startswith("1 of 2")
    assert attempts[-1].changed == ["jax 1 -> 2"]


def test_events_without_a_start_are_an_attempt(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event": "sta\n' + json.dumps(STOPPED) + "\n")
    [attempt] = attempts_of(*read_events(tmp_path / "events.jsonl"))
    assert (attempt.outcome, attempt.last_step) == ("stopped by a signal", 9)


def test_unusable_metrics_are_skipped(tmp_path):
    good = {"step": 1, "split": "train", "loss": 0.5, "accuracy": 0.5}
    odd = [{"loss": "0"}, {"loss": float("nan")}, {"loss": 1e300}, {"accuracy": float("nan")}, {"accuracy": 7.0}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({**good, **change}) + "\n" for change in ({}, *odd, {"step": 9})))
    assert read_curve(path, "train") == ([1, 9], [0.5, 0.5], [0.5, 0.5], [None, None])
    assert read_curve(tmp_path / "none", "test") == ([], [], [], [])


def test_goodput_is_training_that_was_not_lost():
    def at(time_s: float, step: int, event: str = "phase", **details: object) -> dict:
        return {"event": event, "step": step, "time": time_s, **details}

    first = (at(0, 0, "start"), at(4, 0, phase="train"), at(14, 100, "throughput", images_per_s=1000.0))
    resumed = at(20.5, 60, "resume", exact=True, lost_steps=40)
    second = (at(20, 60, "start"), resumed, at(21, 60, phase="train"), at(25, 100, phase="evaluate"))
    attempts = attempts_of(*first, *second, at(26, 100, "exit", outcome="finished"))
    assert goodput(attempts) == (10 * 0.6 + 4, 14 + 6, 26)
    assert [attempt.speeds for attempt in attempts] == [[(14.0, 1000.0)], []]
    assert goodput([]) == (0, 0, 0)


def test_a_kill_happened_where_the_metrics_end():
    events = [START, {"event": "phase", "phase": "train", "step": 8}]
    assert read_attempts(events, is_running=False, now_s=0.0, metrics_step=27)[0].last_step == 27
    [attempt, _] = read_attempts([*events, START], is_running=False, now_s=0.0, metrics_step=27)  # killed again
    assert attempt.last_step == 27
    [attempt] = read_attempts([*events, STOPPED], is_running=False, now_s=0.0, metrics_step=27)
    assert attempt.last_step == 9


def test_remote_copy_shows_how_a_run_ended(tmp_path):
    """The copy is uploaded after the last save, before the end is logged."""
    mirror = tmp_path / "mirror"
    config = replace(SMALL, mirror=mirror.as_uri(), workdir=None)

    def ends() -> list[str]:
        return [attempt.outcome for attempt in attempts_of(*read_events(mirror / "events.jsonl"))]

    def fail() -> None:
        raise RuntimeError("broken")

    for step, action, code in ((15, lambda: os.kill(os.getpid(), signal.SIGTERM), 0), (25, fail, 70), (99, int, 0)):
        with StopSignal() as stop, pytest.MonkeyPatch.context() as patch:
            act_at(patch, step, action)
            assert train_here(config, tmp_path / "run", stop) == code
        shutil.copy(mirror / "events.jsonl", tmp_path / f"{step}.jsonl")
    assert ends() == ["stopped by SIGTERM", "failed: broken", "finished"]
    copied = read_events(tmp_path / "15.jsonl")
    assert "exit" not in [event["event"] for event in copied]
    assert [event["event"] for event in summarize(attempts_of(*copied))][-1] == "stopped"
    assert [attempt.outcome for attempt in attempts_of(*read_events(tmp_path / "25.jsonl"))][-1] == "failed: broken"


def test_a_run_that_uploads_its_last_checkpoint_is_running():
    events = [START, SIGNAL, {"event": "outcome", "step": 9, "outcome": "stopped"}]
    outcomes = [read_attempts(events, is_running=running, now_s=0.0)[0].outcome for running in (True, False)]
    assert outcomes == ["running", "stopped by SIGTERM"]
