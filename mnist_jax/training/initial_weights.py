"""Begin a run with the weights of another run, its parent: `--init-from`.

The parent is read once, before the first update. The state of step 0 is then saved as a checkpoint, and the parent may
be deleted. Each checkpoint records run, step and digest of the parent in its metadata.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mnist_jax import config as configs
from mnist_jax.checkpoint import integrity
from mnist_jax.checkpoint.checkpoint import Checkpoint
from mnist_jax.checkpoint.integrity import CorruptCheckpointError, IncompatibleCheckpointError, Json
from mnist_jax.config import ConfigError
from mnist_jax.training import compatibility, selection
from mnist_jax.training.train_state import TrainState
from mnist_jax.training.trainer import Trainer

T = TypeVar("T")
REASON = "initial weights"  # of the checkpoint of step 0


def find_parent(trainer: Trainer) -> Json | None:
    """Return the checkpoint whose weights a new run begins with, as JSON values; None if they are random.

    Raises:
        ConfigError: there is no such checkpoint, it is corrupt, or it holds the weights of another model.
        ReadError, OSError: it cannot be read now.
    """
    if trainer.config.init_from is None:
        return None

    def describe(checkpoint: Checkpoint) -> Json:
        manifest = checkpoint.manifest()
        _check_same_model(checkpoint, manifest, trainer)
        run = str(checkpoint.path.parents[1])
        return {"run": run, "step": checkpoint.step, "state_sha256": manifest["state_sha256"]}

    return select(trainer.config.init_from, describe)


def select(init_from: Path, read: Callable[[Checkpoint], T]) -> T:
    """Return what `read` returns for the checkpoint that `init_from` names.

    Raises:
        ConfigError: there is no such checkpoint, or it is corrupt.
        ReadError, OSError: it cannot be read now.
    """
    try:
        return selection.read(*configs.split_init_from(init_from), read)
    except ConfigError as error:
        raise ConfigError(f"init_from={init_from}: {error}") from error
    except (CorruptCheckpointError, IncompatibleCheckpointError) as error:
        raise _unusable(init_from, str(error)) from error


def _check_same_model(checkpoint: Checkpoint, manifest: Json, trainer: Trainer) -> None:
    """Raise ConfigError unless a checkpoint holds the weights of the model that is trained."""
    leaves = manifest["leaves"]
    weights = {name: row for name, row in leaves.items() if name.startswith(("params.", "batch_stats."))}
    if difference := integrity.difference_of(weights, integrity.named_leaves(trainer.abstract_state.variables)):
        metadata = compatibility.check_metadata(checkpoint.metadata(), checkpoint.step)
        other = configs.from_json(metadata["config"], checkpoint.path).model
        raise ConfigError(
            f"it holds the model {other}, and this run trains {trainer.config.model}: "
            f"{difference}; use --model {other}, or another run"
        )


def make_state(trainer: Trainer, parent: Json | None) -> TrainState:
    """Return the state before the first update, with the params and batch statistics of the parent if there is one.

    All processes read the parent. Its moving average of the weights is not used; that of this run begins with the
    params.

    Raises:
        ConfigError: the parent is not what process 0 found: it was removed, changed or corrupted.
        ReadError: it cannot be read now.
    """
    state = trainer.init_state()
    if parent is None:
        return state
    checkpoint = Checkpoint(Path(parent["run"]) / "checkpoints" / str(parent["step"]))

    def read() -> Any:
        return checkpoint.read(trainer.abstract_state.variables, partial=True)[0]

    try:
        # The average is read again because its buffers must not be those of the params, which are donated.
        state = state.replace(**read(), average=read() if trainer.config.average_decay else None)
        if checkpoint.manifest()["state_sha256"] == parent["state_sha256"]:
            return state
        reason = f"the checkpoint of step {checkpoint.step} was replaced"
    except (CorruptCheckpointError, IncompatibleCheckpointError) as error:
        reason = str(error) if checkpoint.path.exists() else f"the checkpoint of step {checkpoint.step} is not there"
    assert trainer.config.init_from is not None
    raise _unusable(trainer.config.init_from, reason)


def _unusable(init_from: Path, reason: str) -> ConfigError:
    return ConfigError(f"init_from={init_from} cannot be used: {reason}; use another checkpoint, RUN@STEP")
