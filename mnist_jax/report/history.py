"""The attempts of a run, read from its event log: an attempt is one start of the command `train`.

A run directory is untrusted data: any field of an event may hold any JSON value.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mnist_jax.records.metrics import read_metrics

LANES = {"data": "load data", "compile": "compile", "train": "train", "evaluate": "evaluate", "save": "save"}
MAX_TEXT = 300
MAX_SECONDS = 2.0**33  # the year 2242; `time.localtime` raises for much larger times


class Span(NamedTuple):
    """A period of one kind of work, a key of `LANES`. Times are in seconds since 1970."""

    lane: str
    begin_s: float
    end_s: float


@dataclass
class Attempt:
    """One start of a run, and how it ended. Times are in seconds since 1970, None if the event log has none."""

    events: list[dict[str, Any]]
    first_step: int
    last_step: int
    began_s: float | None = None
    ended_s: float | None = None  # the last known time
    resume: Literal["", "exact", "not bit for bit"] = ""
    changed: list[str] = field(default_factory=list)
    recomputed_steps: int = 0  # steps of an earlier attempt that this attempt makes again
    lost_steps: int = 0  # steps of this attempt that a later attempt recomputes
    end: Literal["stopped", "killed", "failed", "finished", "running"] = "killed"
    reason: str = ""  # the signal, the notice or the error
    saved_in_s: float | None = None  # from the arrival of the signal
    spans: list[Span] = field(default_factory=list)

    @property
    def has_exit(self) -> bool:
        """Whether the event log has its end. A remote copy is uploaded before that is written."""
        return any(event["event"] == "exit" for event in self.events)

    @property
    def wall_s(self) -> float:
        """How long it took."""
        return 0.0 if self.began_s is None or self.ended_s is None else self.ended_s - self.began_s

    @property
    def useful_s(self) -> float:
        """How long it made updates that were not lost."""
        train_s = sum(span.end_s - span.begin_s for span in self.spans if span.lane == "train")
        steps = self.last_step - self.first_step
        return train_s * (1 - min(1.0, self.lost_steps / steps)) if steps > 0 else 0.0

    @property
    def speeds(self) -> list[tuple[float, float]]:
        """Time and images/s at the end of each log interval."""
        found = ((as_number(event.get("time")), as_number(event.get("images_per_s"))) for event in self.events)
        return [(time_s, speed) for time_s, speed in found if time_s is not None and speed is not None]

    @property
    def outcome(self) -> str:
        """How the attempt ended, in words."""
        if self.end == "stopped":
            return f"stopped by {self.reason or 'a signal'}"
        return f"failed: {self.reason}" if self.end == "failed" and self.reason else self.end


def read_attempts(
    events: Sequence[dict[str, Any]], *, is_running: bool, now_s: float, metrics_step: int = 0
) -> list[Attempt]:
    """Return the attempts in an event log, oldest first.

    Args:
        events: the event log.
        is_running: whether the run is in use; its last attempt then lasts until `now_s`.
        now_s: the present time.
        metrics_step: the last step in `metrics.jsonl`. A kill happened there or later.
    """
    groups: list[list[dict[str, Any]]] = []
    for event in events:
        if event["event"] == "start" or not groups:
            groups.append([])
        groups[-1].append(event)
    attempts = [_read_attempt(group) for group in groups]
    if is_running and attempts and not attempts[-1].has_exit:
        attempts[-1].end = "running"
        attempts[-1].ended_s = now_s
    trained = None
    for attempt in attempts:
        _read_spans(attempt)
        if attempt.recomputed_steps and trained:
            trained.lost_steps = attempt.recomputed_steps
            trained.last_step = max(trained.last_step, attempt.first_step + attempt.recomputed_steps)
        if any(event.get("phase") == "train" for event in attempt.events):
            trained = attempt
    if trained and not trained.has_exit:
        trained.last_step = max(trained.last_step, metrics_step)
    return attempts


def _read_attempt(events: list[dict[str, Any]]) -> Attempt:
    attempt = Attempt(events, events[0]["step"], max(event["step"] for event in events))
    for event in events:
        name = event["event"]
        if name in ("resume", "lost"):
            attempt.first_step = event["step"]
            attempt.recomputed_steps = int(as_number(event.get("lost_steps")) or 0)
        if name == "resume":
            attempt.resume = "exact" if event.get("exact") is True else "not bit for bit"
            changed = event.get("changed")
            attempt.changed = [as_text(text) for text in changed[:20]] if isinstance(changed, list) else []
        elif name == "signal":
            attempt.reason, attempt.saved_in_s = as_text(event.get("signal")), as_number(event.get("seconds"))
        elif name in ("exit", "outcome"):
            outcome = event.get("outcome")
            attempt.end = outcome if outcome in ("stopped", "finished") else "failed"
            attempt.reason = as_text(event.get("error")) if attempt.end == "failed" else attempt.reason
    return attempt


def goodput(attempts: Sequence[Attempt]) -> tuple[float, float, float]:
    """Return seconds: of useful training, of all attempts, and from the first start to the last end."""
    ends = [(attempt.began_s, attempt.ended_s) for attempt in attempts if attempt.began_s is not None]
    elapsed_s = max((end or 0.0 for _, end in ends), default=0.0) - min((begin for begin, _ in ends), default=0.0)
    return sum(a.useful_s for a in attempts), sum(a.wall_s for a in attempts), elapsed_s


def _read_spans(attempt: Attempt) -> None:
    """Add the times of an attempt. A time that is before an earlier event's is replaced by that."""
    lane, since_s, now_s = "data", 0.0, 0.0
    for event in attempt.events:
        time_s = as_number(event.get("time"))
        if time_s is None:
            continue
        if attempt.began_s is None:
            attempt.began_s = since_s = time_s
        now_s = max(now_s, time_s)
        if event["event"] == "save":
            seconds = as_number(event.get("seconds")) or 0.0
            attempt.spans.append(Span("save", max(attempt.began_s, now_s - seconds), now_s))
        next_lane = "train" if event["event"] == "evaluation" else as_text(event.get("phase"))
        if next_lane in LANES and next_lane != lane:
            attempt.spans.append(Span(lane, since_s, now_s))
            lane, since_s = next_lane, now_s
    if attempt.began_s is not None:
        attempt.ended_s = max(now_s, attempt.ended_s or 0.0)
        attempt.spans.append(Span(lane, since_s, attempt.ended_s))


class Curve(NamedTuple):
    """Metrics of one split, a value for each step: losses in nats, accuracies in [0, 1], learning rates."""

    steps: list[int]
    losses: list[float]
    accuracies: list[float]
    rates: list[float | None]  # None in lines of older versions


def read_curve(path: Path, split: str) -> Curve:
    """Return the records of a split in a metrics file, without those that are out of range."""
    curve = Curve([], [], [], [])
    for record, _ in read_metrics(path):
        loss, accuracy = as_number(record.get("loss")), record["accuracy"]
        if record["split"] == split and loss is not None and 0 <= accuracy <= 1:
            curve.steps.append(record["step"])
            curve.losses.append(loss)
            curve.accuracies.append(accuracy)
            curve.rates.append(as_number(record.get("learning_rate")))
    return curve


def as_number(value: object) -> float | None:
    """Return a value that is a usable duration or time, otherwise None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value < MAX_SECONDS else None  # type: ignore[arg-type, operator]


def format_time(seconds: object) -> str:
    """Return a time in the local time zone, with its offset from UTC; "" if it is not usable."""
    usable = as_number(seconds)
    return "" if usable is None else time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(usable))


def as_text(value: object) -> str:
    """Return the first characters of a text, "" if the value is not a text."""
    return value[:MAX_TEXT] if isinstance(value, str) else ""
