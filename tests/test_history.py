"""The attempts of a run, as its event log has them: in `status`, and in the report."""

import json
import re
import signal
from itertools import pairwise
from pathlib import Path

import pytest
from runs import Run, end, stop

from mnist_jax import status
from mnist_jax.records.metrics import read_events
from mnist_jax.report import __main__ as report
from mnist_jax.report.history import Attempt, read_attempts, read_curve
from mnist_jax.report.run_status import CheckpointStatus, NextStart, Status

pytestmark = pytest.mark.usefixtures("in_this_process")


def attempts_of(*events: dict) -> list[Attempt]:
    return read_attempts(events, is_running=False, now_s=0.0)


@pytest.fixture(scope="module")
def eventful(tmp_path_factory, environment) -> tuple[Run, str]:
    """A run that was stopped, killed and stopped again, and the report that was written while it trained."""
    run = Run(tmp_path_factory.mktemp("eventful") / "run", environment)
    digits = ("--dataset", "digits", "--steps", "100000", "--log-every-steps", "10", "--eval-every-steps", "100")
    process = run.start(*digits, "--checkpoint-every-s", "3600")
    assert run.wait_for(lambda: len(run.events("save")) > 0, process)
    out = tmp_path_factory.mktemp("meanwhile")
    assert report.main([str(run.workdir), "--out", str(out)]) == 0
    assert process.poll() is None
    stop(process, signal.SIGTERM)
    process = run.start()

    def has_unsaved_steps() -> bool:
        process.send_signal(signal.SIGSTOP)
        if json.loads(run.metrics().splitlines()[-1])["step"] >= max(run.steps()) + 10:
            return True
        process.send_signal(signal.SIGCONT)
        return False

    assert run.wait_for(has_unsaved_steps, process)
    process.kill()
    end(process)
    process = run.start()
    assert run.wait_for(lambda: len(run.events("resume")) > 1, process)
    stop(process, signal.SIGINT)
    return run, (out / "report.html").read_text()


def test_attempts_of_an_interrupted_run(eventful):
    run, _ = eventful
    first, second = run.events("resume")
    attempts = attempts_of(*run.events())
    assert [attempt.outcome for attempt in attempts] == ["stopped by SIGTERM", "killed", "stopped by SIGINT"]
    assert [attempt.first_step for attempt in attempts] == [0, first["step"], second["step"]]
    assert [attempt.resume for attempt in attempts] == ["", "exact", "exact"]
    assert second["lost_steps"] >= 10
    assert [attempt.recomputed_steps for attempt in attempts] == [0, 0, second["lost_steps"]]
    assert [attempt.lost_steps for attempt in attempts] == [0, second["lost_steps"], 0]
    assert attempts[1].last_step == second["step"] + second["lost_steps"]


def test_spans_cover_each_attempt_without_gaps(eventful):
    attempts = attempts_of(*eventful[0].events())
    for attempt in attempts:
        spans = [span for span in attempt.spans if span.lane != "save"]
        assert [span.lane for span in spans][:2] == ["data", "compile"]
        assert [spans[0].begin_s, spans[-1].end_s] == [attempt.began_s, attempt.ended_s]
        assert all(a.end_s == b.begin_s for a, b in pairwise(spans))
    assert [span.lane for span in attempts[0].spans if span.lane != "save"][2:5] == ["train", "evaluate", "train"]
    saves = [
        (span.end_s, pytest.approx(span.end_s - span.begin_s))
        for a in attempts
        for span in a.spans
        if span.lane == "save"
    ]
    assert [(event["time"], event["seconds"]) for event in eventful[0].events("save")] == saves


def test_status_shows_stops_resumes_and_kills(eventful, capsys):
    run, _ = eventful
    assert status.main([str(run.workdir), "--json"]) == 0
    history = json.loads(capsys.readouterr().out)["history"]
    history = [event for event in history if event["event"] != "unfinished_removed"]  # if the kill hit a save
    names = [event["event"] for event in history]
    assert names == [
        *("start", "signal", "exit"),
        *("start", "resume", "killed"),
        *("start", "resume", "signal", "exit"),
    ]
    killed, resume = history[5], history[7]
    assert killed["step"] == resume["step"] + resume["lost_steps"]
    assert (history[1]["signal"], history[2]["outcome"], resume["exact"]) == ("SIGTERM", "stopped", True)
    assert status.main([str(run.workdir)]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"killed +step {killed['step']}\b", text)
    assert f"exact, {resume['lost_steps']} steps" in text


def test_report_shows_interruptions(eventful, capsys):
    run, while_running = eventful
    assert report.main([str(run.workdir)]) == 0
    page = Path(capsys.readouterr().out.splitlines()[-1]).read_text()
    [_, resume] = run.events("resume")
    assert "stopped by SIGTERM" in page
    assert "2, of which 2 exact" in page
    assert f"1; {resume['lost_steps']:,} steps were lost" in page
    assert "in use by process" in while_running
    assert "Confusion matrix: a row" in while_running


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
    assert counts["Stops by a signal"].startswith("3")
    assert "1.50 s" in counts["Stops by a signal"]
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
    assert read_curve(path, "train") == ([1, 9], [0.5, 0.5], [0.5, 0.5])
    assert read_curve(tmp_path / "none", "test") == ([], [], [])
