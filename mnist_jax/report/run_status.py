"""What is in a run directory, and what the next start would do there. Read-only; safe while a run is at work."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mnist_jax import config as configs
from mnist_jax.checkpoint.checkpoint import Checkpoint, list_checkpoints
from mnist_jax.checkpoint.integrity import CheckpointError, CorruptCheckpointError
from mnist_jax.config import ConfigError
from mnist_jax.records.metrics import accuracy_at, has_saves, read_events, read_metrics
from mnist_jax.report.history import as_number
from mnist_jax.runtime import lock
from mnist_jax.training import compatibility

HISTORY = (
    *("start", "lost", "resume", "quarantine", "metrics_changed", "unfinished_removed"),
    *("signal", "save_failed", "low_space", "checkpoints_vanished", "removal_failed", "copy_failed", "exit"),
)


@dataclass(frozen=True)
class CheckpointStatus:
    """A checkpoint: `good` is None where that was not asked; `problem` says what is wrong with it, as far as known."""

    step: int
    time: float | None
    bytes: int
    reason: str | None
    test_accuracy: float | None
    good: bool | None
    problem: str | None


@dataclass(frozen=True)
class NextStart:
    """What the next start would do: "begin", "resume", "nothing" (it is finished) or "refuse", with an exit code."""

    action: str
    step: int | None
    exit_code: int
    text: str


@dataclass(frozen=True)
class Status:
    """What is in a run directory."""

    workdir: str
    in_use_by: dict[str, Any] | None
    checkpoints: list[CheckpointStatus]
    quarantine: list[str]
    history: list[dict[str, Any]]
    next_start: NextStart


def examine(workdir: Path, *, verify: bool) -> Status:
    """Return what is in a run directory.

    Args:
        workdir: the directory.
        verify: whether to read every byte of the checkpoints.

    Raises:
        ConfigError: there is no run in it.
        OSError: it cannot be read.
    """
    configs.check_holds_a_run(workdir)
    holder = lock.holder(workdir)
    looks = [look(checkpoint, verify=verify) for checkpoint in list_checkpoints(workdir / "checkpoints")]
    looks = [look for look in looks if os.path.lexists(look.checkpoint.path)]  # A run at work removes old ones.
    events = read_events(workdir / "events.jsonl")
    quarantine = workdir / "checkpoints" / "quarantine"
    return Status(
        str(workdir),
        holder and holder._asdict(),
        [examine_checkpoint(look, verify=verify) for look in looks],
        sorted(path.name for path in quarantine.iterdir()) if quarantine.is_dir() else [],
        summarize(events, is_running=holder is not None),
        plan_next_start(workdir, looks, events, verify=verify),
    )


class Look(NamedTuple):
    """A checkpoint that was looked at: its size, and what it says of its run or why there is nothing to rely on."""

    checkpoint: Checkpoint
    bytes: int
    about: dict[str, Any] | None
    error: CheckpointError | OSError | None


def look(checkpoint: Checkpoint, *, verify: bool) -> Look:
    """Read the manifest of a checkpoint, or every byte of it."""
    size = 0
    try:
        size = checkpoint.bytes
        if verify:
            checkpoint.verify()
        return Look(checkpoint, size, checkpoint.metadata(), None)
    except (CheckpointError, OSError) as error:
        return Look(checkpoint, size, None, error)


def examine_checkpoint(look: Look, *, verify: bool) -> CheckpointStatus:
    """Return what can be said of a checkpoint."""
    about = look.about if isinstance(look.about, dict) else {}
    return CheckpointStatus(
        look.checkpoint.step,
        as_number(about.get("time")),
        look.bytes,
        about["reason"] if isinstance(about.get("reason"), str) else None,
        as_number(about.get("test_accuracy")),
        look.error is None if verify else None,
        str(look.error) if look.error else None,
    )


def summarize(events: Sequence[dict[str, Any]], *, is_running: bool) -> list[dict[str, Any]]:
    """Return the starts, resumes, signals, faults and ends of a history, and the kills, which left no event."""
    history: list[dict[str, Any]] = []
    at_work, last_step = False, 0
    for event in events:
        if event["event"] == "start":
            if at_work:
                history.append({"event": "killed", "step": last_step})
            at_work, last_step = True, event["step"]
        last_step = max(last_step, event["step"])
        if event["event"] == "exit":
            at_work = False
        if event["event"] in HISTORY:
            history.append(event)
    if at_work and not is_running:
        history.append({"event": "killed", "step": last_step})
    return history


def plan_next_start(
    workdir: Path, looks: Sequence[Look], events: Sequence[dict[str, Any]], *, verify: bool
) -> NextStart:
    """Return what the next start would do, which tries the checkpoints from the newest to the oldest."""
    config = None
    if (workdir / "config.json").exists():
        try:
            config = configs.load(workdir / "config.json")
        except ConfigError as wrong:
            return NextStart("refuse", None, 2, f"refuses: {wrong}")
    damaged = []
    for checkpoint, _, said, error in reversed(looks):
        if isinstance(error, CorruptCheckpointError):
            damaged.append(str(error))
            continue
        if error is not None:
            return NextStart("refuse", None, 2, f"refuses: {error}")
        try:
            about = compatibility.check_metadata(said, checkpoint.step)
            began_as = configs.from_json(about["config"], checkpoint.path)
            config = config or began_as
            configs.check_same_mathematics(began_as, config, where=workdir)
            total = config.total_steps(int(about["data"]["train_images"]))
        except (CheckpointError, ConfigError, KeyError, TypeError, ValueError, OverflowError) as wrong:
            text = f"refuses: the checkpoint of step {checkpoint.step} is not of this run: {wrong}"
            return NextStart("refuse", None, 2, text)
        aside = "".join(f"; sets aside: {text}" for text in damaged)
        if checkpoint.step >= total and _is_evaluated(workdir / "metrics.jsonl", checkpoint.step):
            text = f"does nothing, for the run is finished at step {total}{aside}"
            return NextStart("nothing", checkpoint.step, 0, text)
        caution = "" if verify else ", if that proves good"
        caution += "" if (workdir / "config.json").exists() else "; config.json is gone: give the run's flags again"
        text = f"resumes from step {checkpoint.step} of {total}{caution}{aside}"
        return NextStart("resume", checkpoint.step, 0, text)
    if damaged:
        return NextStart("refuse", None, 65, f"refuses, for no checkpoint is good: {'; '.join(damaged)}")
    if has_saves(events):
        return NextStart("refuse", None, 65, "refuses, for the checkpoints that the history tells of are gone")
    return NextStart("begin", 0, 0, "begins at step 0, for nothing has been saved yet")


def _is_evaluated(metrics: Path, step: int) -> bool:
    records = (record for record, _ in read_metrics(metrics))
    return accuracy_at(step, records) is not None
