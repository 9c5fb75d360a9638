"""What happened to a run, as its records tell it: its starts, what each was at work on, how it ended, what it learned.

A run directory is data from somewhere: in its history any value may stand anywhere.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mnist_jax.records.metrics import read_metrics

LANES = {"data": "load data", "compile": "compile", "train": "train", "evaluate": "evaluate"}  # by the phases
MAX_LETTERS = 300  # of a text from a file
LATEST_S = 2.0**33  # the year 2242: what a file says of later times is not taken for one

End = Literal["stopped", "killed", "failed", "finished", "running"]


class Span(NamedTuple):
    """A stretch of time that went into one kind of work, in seconds since 1970; `lane` is a lane's name, or "save"."""

    lane: str
    begin_s: float
    end_s: float


class Curve(NamedTuple):
    """What was measured, a value for each step: losses in nats, accuracies in [0, 1]."""

    steps: Sequence[int]
    losses: Sequence[float]
    accuracies: Sequence[float]


@dataclass
class Turn:
    """What came of one start of a run. Times are in seconds since 1970, or None where the history has none."""

    first_step: int
    last_step: int
    began_s: float | None = None
    ended_s: float | None = None  # the last that is known, where the end was not written down
    manner: Literal["", "exact", "numerically equivalent"] = ""  # of a resume
    changed: list[str] = field(default_factory=list)
    repeated_steps: int = 0  # made before, lost, and recomputed by this start
    lost_steps: int = 0  # of those that it made, as a later start found
    end: End = "killed"
    reason: str = ""  # the signal, or the error
    saved_in_s: float | None = None  # from the arrival of the signal
    has_trained: bool = False
    spans: list[Span] = field(default_factory=list)

    @property
    def length_s(self) -> float | None:
        """How long it ran, as far as is known."""
        return None if self.began_s is None or self.ended_s is None else self.ended_s - self.began_s


def read_turns(events: Sequence[dict[str, Any]], *, is_running: bool, now_s: float) -> Iterator[Turn]:
    """Yield what came of each start in a history, as `read_events` returns it, oldest first."""
    groups: list[list[dict[str, Any]]] = []
    for event in events:
        if event["event"] == "start":
            groups.append([])
        if groups:
            groups[-1].append(event)
    turns = [_read_turn(group) for group in groups]
    if is_running and turns and turns[-1].end == "killed":
        turns[-1].end = "running"
    _note_lost_steps(turns)
    clock = 0.0
    for turn, group in zip(turns, groups, strict=True):
        clock = _time(turn, group, clock, now_s)
        yield turn


def _read_turn(events: Sequence[dict[str, Any]]) -> Turn:
    turn = Turn(events[0]["step"], max(event["step"] for event in events))
    for event in events:
        name = event["event"]
        if name in ("resume", "lost"):
            turn.first_step, turn.repeated_steps = event["step"], int(as_number(event.get("lost_steps")) or 0)
        if name == "resume":
            turn.manner = "exact" if event.get("exact") is True else "numerically equivalent"
            turn.changed = as_texts(event.get("changed"))
        elif name == "phase" and event.get("phase") == "train":
            turn.has_trained = True
        elif name == "signal":
            turn.reason, turn.saved_in_s = _signal(event.get("signal")), as_number(event.get("seconds"))
        elif name == "exit":
            turn.end = event["outcome"] if event.get("outcome") in ("stopped", "finished") else "failed"
            if turn.end == "failed":
                turn.reason = as_text(event.get("error"))
    return turn


def _note_lost_steps(turns: Sequence[Turn]) -> None:
    """Tell the turn that was the last to train before a loss what it lost, and that it had come so far."""
    trained = None
    for turn in turns:
        if turn.repeated_steps and trained:
            trained.lost_steps = turn.repeated_steps
            trained.last_step = max(trained.last_step, turn.first_step + turn.repeated_steps)
        if turn.has_trained:
            trained = turn


def _time(turn: Turn, events: Sequence[dict[str, Any]], clock: float, now_s: float) -> float:
    """Note when a turn was at work on what, and return the time of its end. The clock never goes back here."""
    lane, since = LANES["data"], clock
    for event in events:
        told = as_number(event.get("time"))
        clock = max(clock, told or 0.0)
        if turn.began_s is None:
            if told is None:
                continue
            turn.began_s = since = clock
        turn.ended_s = clock
        if event["event"] == "save":
            turn.spans.append(Span("save", max(turn.began_s, clock - (as_number(event.get("seconds")) or 0.0)), clock))
        phase = "train" if event["event"] == "evaluation" else event.get("phase")
        if event["event"] in ("phase", "evaluation") and isinstance(phase, str) and LANES.get(phase, lane) != lane:
            turn.spans.append(Span(lane, since, clock))
            lane, since = LANES[phase], clock
    if turn.began_s is None:
        return clock
    if turn.end == "running":
        turn.ended_s = clock = max(clock, now_s)
    turn.spans.append(Span(lane, since, clock))
    return clock


def read_curve(path: Path, split: str) -> Curve:
    """Return what a metrics file has of a split; what is no loss and accuracy is left out."""
    records = [record for record, _ in read_metrics(path)]
    points = [
        (record["step"], record["loss"], record["accuracy"])
        for record in records
        if record["split"] == split and as_number(record.get("loss")) is not None and 0 <= record["accuracy"] <= 1
    ]
    return Curve(*([point[index] for point in points] for index in range(3)))


def describe_end(turn: Turn) -> str:
    """Return how a turn ended, in words for the page."""
    if turn.end == "stopped":
        return f"stopped by {turn.reason or 'a signal'}"
    if turn.end == "failed":
        return f"failed: {turn.reason}" if turn.reason else "failed"
    return turn.end


def count(number: int, noun: str) -> str:
    """Return a number of things in words: "1 step", "1,200 steps"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def as_number(value: object) -> float | None:
    """Return a number that a length or a point of time can be, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < LATEST_S else None


def as_text(value: object) -> str:
    """Return a text of bearable length, or "" where there is none."""
    return value[:MAX_LETTERS] if isinstance(value, str) else ""


def as_texts(value: object) -> list[str]:
    """Return the texts in a list, or none where it is no list."""
    return [text for text in map(as_text, value[:20]) if text] if isinstance(value, list) else []


def _signal(value: object) -> str:
    """Return the name of a signal, or "" where it is none."""
    return value if isinstance(value, str) and re.fullmatch("SIG[A-Z0-9]{1,8}", value) else ""
