"""Select a checkpoint of a run: the latest, the best, or that of a step. Safe while the run trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mnist_jax import config as configs
from mnist_jax.checkpoint.checkpoint import Checkpoint, list_checkpoints
from mnist_jax.checkpoint.integrity import CheckpointError
from mnist_jax.config import ConfigError, WhichStep
from mnist_jax.records.metrics import accuracy_at, parse_metrics, with_test_line

T = TypeVar("T")


class NoCheckpointYetError(ConfigError):
    """A run has no such checkpoint yet, but may have one later."""


def read(workdir: Path, which: WhichStep, read_checkpoint: Callable[[Checkpoint], T]) -> T:
    """Return what `read_checkpoint` returns for the requested checkpoint of a run.

    If a running training has removed that checkpoint meanwhile, another one is requested and read.

    Raises:
        CheckpointError, OSError: the checkpoint cannot be read, or is corrupt.
        ConfigError: there is no run, or no such checkpoint.
    """
    while True:
        checkpoints = find_checkpoints(workdir)
        try:
            return read_checkpoint(choose(checkpoints, which, workdir))
        except (CheckpointError, OSError):
            if find_checkpoints(workdir) == checkpoints:
                raise


def find_checkpoints(workdir: Path) -> list[Checkpoint]:
    """Return the checkpoints of a run, oldest first; raise `ConfigError` if there is no run."""
    configs.check_holds_a_run(workdir)
    return list_checkpoints(workdir / "checkpoints")


def choose(checkpoints: list[Checkpoint], which: WhichStep, workdir: Path) -> Checkpoint:
    """Return the requested checkpoint; "best" is the first with the highest test accuracy."""
    if not checkpoints:
        raise NoCheckpointYetError(f"{workdir} has no checkpoint yet")
    if which == "latest":
        return checkpoints[-1]
    if which == "best":
        evaluated = [(checkpoint, accuracy_of(checkpoint, checkpoint.metadata())) for checkpoint in checkpoints]
        accuracies = {checkpoint: accuracy for checkpoint, accuracy in evaluated if accuracy is not None}
        if not accuracies:
            raise NoCheckpointYetError(f"{workdir} has no evaluated checkpoint yet; the latest one needs no evaluation")
        return max(accuracies, key=lambda checkpoint: accuracies[checkpoint])
    for checkpoint in checkpoints:
        if checkpoint.step == which:
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints)
    raise ConfigError(f"{workdir} has no checkpoint of step {which}; there are: {steps}")


def accuracy_of(checkpoint: Checkpoint, metadata: Any) -> float | None:
    """Return the test accuracy that the run measured at a checkpoint, None if it did not evaluate there.

    It is in the metadata, or only in `metrics.jsonl`, if the evaluation was made after the checkpoint was committed: a
    resume would find it by the same rule.
    """
    match metadata:
        case {"test_accuracy": float(accuracy)} if 0 <= accuracy <= 1:
            return accuracy
        case {"test_accuracy": None, "metrics": {"lines": str(text)}}:
            lines, path = text.encode(errors="replace"), checkpoint.path.parents[1] / "metrics.jsonl"
            lines = with_test_line(lines, path.read_bytes() if path.exists() else b"", checkpoint.step)
            records = [record for record, _ in parse_metrics(lines.splitlines(keepends=True))]
            return accuracy_at(checkpoint.step, records)
    return None
