"""The content of a run directory, and what the next start does there. Read-only; safe while training runs."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mnist_jax import config as configs
from mnist_jax.checkpoint.checkpoint import Checkpoint, list_checkpoints
from mnist_jax.checkpoint.integrity import CheckpointError, CorruptCheckpointError, ReadError
from mnist_jax.config import ConfigError
from mnist_jax.records.metrics import has_saves, read_events, read_metrics
from mnist_jax.report.history import Attempt, as_number, read_attempts
from mnist_jax.runtime import lock
from mnist_jax.training import compatibility, selection

HISTORY = (
    *("start", "lost", "resume", "quarantine", "metrics_changed", "unfinished_removed"),
    *("signal", "notices_unavailable", "save_failed", "low_space", "checkpoints_vanished", "removal_failed"),
    *("copy_failed", "exit"),
)


@dataclass(frozen=True)
class CheckpointStatus:
    """A checkpoint. `good` is None unless it was verified; `problem` is the error, if one was found."""

    step: int
    time: float | None
    bytes: int
    reason: str | None
    test_accuracy: float | None
    good: bool | None
    problem: str | None


@dataclass(frozen=True)
class NextStart:
    """What the next start does: "begin", "resume", "nothing" (the run is finished) or "refuse", and its exit code."""

    action: str
    step: int | None
    exit_code: int
    text: str


@dataclass(frozen=True)
class Status:
    """The content of a run directory."""

    workdir: str
    in_use_by: dict[str, Any] | None
    checkpoints: list[CheckpointStatus]
    quarantine: list[str]
    history: list[dict[str, Any]]
    next_start: NextStart


class Inspection(NamedTuple):
    """The status of a checkpoint, with its metadata or the error."""

    status: CheckpointStatus
    metadata: Any
    error: CheckpointError | OSError | None


def examine(workdir: Path, *, verify: bool) -> Status:
    """Return the status of a run. `verify` reads every byte of the checkpoints.

    Raises:
        ConfigError, OSError: there is no run, or it cannot be read.
    """
    configs.check_holds_a_run(workdir)
    holder = lock.holder(workdir)
    folder = workdir / "checkpoints"
    inspections = [inspect(checkpoint, verify=verify) for checkpoint in list_checkpoints(folder)]
    # A running training removes old checkpoints.
    inspections = [found for found in inspections if os.path.lexists(folder / str(found.status.step))]
    events = read_events(workdir / "events.jsonl")
    attempts = attempts_in(workdir, events, is_running=holder is not None)
    quarantine = folder / "quarantine"
    return Status(
        str(workdir),
        holder and holder._asdict(),
        [found.status for found in inspections],
        sorted(path.name for path in quarantine.iterdir()) if quarantine.is_dir() else [],
        list(summarize(attempts)),
        plan_next_start(workdir, inspections, has_saves=has_saves(events), verify=verify),
    )


def attempts_in(workdir: Path, events: Sequence[dict[str, Any]], *, is_running: bool) -> list[Attempt]:
    """Return the attempts of a run, oldest first, as its event log and its metrics show them."""
    metrics_step = max((record["step"] for record, _ in read_metrics(workdir / "metrics.jsonl")), default=0)
    return read_attempts(events, is_running=is_running, now_s=time.time(), metrics_step=metrics_step)


def inspect(checkpoint: Checkpoint, *, verify: bool) -> Inspection:
    """Read the metadata of a checkpoint, or every byte of it."""
    size, metadata, problem = 0, None, None
    try:
        size = checkpoint.bytes
        if verify:
            checkpoint.verify()
        metadata = checkpoint.metadata()
    except (CheckpointError, OSError) as error:
        problem = error
    fields = metadata if isinstance(metadata, dict) else {}
    status = CheckpointStatus(
        checkpoint.step,
        as_number(fields.get("time")),
        size,
        fields["reason"] if isinstance(fields.get("reason"), str) else None,
        selection.accuracy_of(checkpoint, metadata),
        problem is None if verify else None,
        str(problem) if problem else None,
    )
    return Inspection(status, metadata, problem)


def summarize(attempts: Sequence[Attempt]) -> Iterator[dict[str, Any]]:
    """Yield the main events, and for each attempt without an exit how it ended: "killed", "stopped" or "finished"."""
    for attempt in attempts:
        yield from (event for event in attempt.events if event["event"] in HISTORY)
        if not attempt.has_exit and attempt.end != "running":
            signal = {"signal": attempt.reason} if attempt.end == "stopped" else {}
            yield {"event": attempt.end, "step": attempt.last_step, **signal}


def plan_next_start(workdir: Path, inspections: Sequence[Inspection], *, has_saves: bool, verify: bool) -> NextStart:
    """Return what the next start does. It tries the checkpoints from the newest to the oldest."""
    config = None
    if (workdir / "config.json").exists():
        try:
            config = configs.load(workdir / "config.json")
        except ConfigError as error:
            return NextStart("refuse", None, 2, f"refuses: {error}")
    corrupt = []
    for checkpoint, metadata, problem in reversed(inspections):
        if isinstance(problem, CorruptCheckpointError):
            corrupt.append(str(problem))
            continue
        if problem is not None:
            code = 74 if isinstance(problem, ReadError | OSError) else 2
            return NextStart("refuse", None, code, f"refuses: {problem}")
        try:
            metadata = compatibility.check_metadata(metadata, checkpoint.step)
            saved_config = configs.from_json(metadata["config"], workdir)
            configs.check_same_mathematics(saved_config, config or saved_config, where=workdir)
            train_size = int(metadata["data"]["train_images"])
            total = (config or saved_config).total_steps(train_size)
            compatibility.check_length(checkpoint.step, config or saved_config, train_size)
        except (CheckpointError, ConfigError, KeyError, TypeError, ValueError, OverflowError) as error:
            text = f"refuses: the checkpoint of step {checkpoint.step} does not belong to this run: {error}"
            return NextStart("refuse", None, 2, text)
        aside = "".join(f"; sets aside: {text}" for text in corrupt)
        if checkpoint.step >= total and checkpoint.test_accuracy is not None:
            text = f"does nothing: the run is finished at step {total}{aside}"
            return NextStart("nothing", checkpoint.step, 0, text)
        condition = "" if verify else ", if it is not corrupt"
        condition += "" if config else "; config.json is missing: give the flags of the run again"
        text = f"resumes from step {checkpoint.step} of {total}{condition}{aside}"
        return NextStart("resume", checkpoint.step, 0, text)
    if corrupt:
        return NextStart("refuse", None, 65, f"refuses: no checkpoint can be used: {'; '.join(corrupt)}")
    if has_saves:
        return NextStart("refuse", None, 65, "refuses: the event log has saves, but the checkpoints are missing")
    return NextStart("begin", 0, 0, "begins at step 0: nothing has been saved yet")
