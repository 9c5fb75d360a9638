"""A trained classifier: the variables of a checkpoint, and functions that predict with them."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mnist_jax import config as configs
from mnist_jax.checkpoint.checkpoint import Checkpoint, list_checkpoints
from mnist_jax.checkpoint.integrity import CheckpointError
from mnist_jax.config import Config, ConfigError, WhichStep
from mnist_jax.runtime import devices
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import compatibility, data
from mnist_jax.training.data import Dataset
from mnist_jax.training.dispatch import add_sums, means
from mnist_jax.training.trainer import Trainer

# Of 1,683 pictures of docs/pictures.md, 90 % had an answer of at least this probability, and one of these was wrong
# (preset fast); 95 %, and three wrong, with preset accurate after 1,500 steps.
MIN_SURE = 0.7


class NoCheckpointYetError(ConfigError):
    """A run has no such checkpoint yet, but may have one later."""


class Evaluation(NamedTuple):
    """The result on all test images: mean loss in nats, accuracy, and logits [N, 10] float32."""

    loss: float
    accuracy: float
    logits: np.ndarray


class Classifier:
    """The classifier of a checkpoint, on the available devices."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read a checkpoint. It raises what `load` raises."""
        self.checkpoint, self.step = checkpoint, checkpoint.step
        self.metadata = compatibility.check_metadata(checkpoint.metadata(), self.step)
        self.data = compatibility.data_of(self.metadata, self.step)
        self.config = configs.from_json(self.metadata["config"], checkpoint.path)
        # `setup.make_trainer` would require that the training batches divide over the available devices.
        self._trainer = _make_trainer(self.config, self.data.train_images, self.data.test_images)
        state, _ = checkpoint.read(self._trainer.abstract_state)
        compatibility.check_step(checkpoint.step, state)
        self.sha256 = str(checkpoint.manifest()["state_sha256"])  # of the whole train state
        self.variables: dict[str, Any] = state.eval_variables

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the ten classes."""
        return data.class_names(self.data.name)

    @property
    def test_accuracy(self) -> float | None:
        """The test accuracy that the run measured at this step, None if it did not evaluate there."""
        return _test_accuracy(self.metadata)

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Return the probabilities of the classes. image: [28, 28, 1] uint8, foreground 255 -> [10] float32.

        The first call compiles.
        """
        return np.asarray(self._trainer.predict(self.variables, image[np.newaxis]))[0]

    def evaluate(self, dataset: Dataset, stop: StopSignal) -> Evaluation:
        """Evaluate all test images with the program of the training; on equal devices the numbers are the same.

        Raises:
            ConfigError: the dataset is not that of the run.
            StoppedError: a signal arrived.
        """
        compatibility.check_same_run(self.metadata, self.config, dataset, where=self.checkpoint.path)
        evaluate, replicated = stop.run(lambda: self._trainer.evaluate), devices.replicated(self._trainer.mesh)
        images = devices.make_global_array(dataset.test_images, replicated)
        labels = devices.make_global_array(dataset.test_labels, replicated)
        sums, logits = [], []
        for first in range(0, len(dataset.test_labels), self._trainer.eval_call_images):
            call_sums, call_logits = evaluate(self.variables, images, labels, np.int32(first))
            sums.append(call_sums)
            logits.append(np.asarray(call_logits))
            stop.check()
        return Evaluation(*means(add_sums(sums)), np.concatenate(logits)[: len(dataset.test_labels)])


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Count the pairs of label and prediction. labels, predictions: [N] in [0, 10) -> [10, 10] int64."""
    return np.bincount(10 * labels.astype(np.int64) + predictions, minlength=100).reshape(10, 10)


@cache
def _make_trainer(config: Config, train_size: int, test_size: int) -> Trainer:
    """Return one trainer for all checkpoints of a run, because it compiles once."""
    return Trainer(config, devices.data_mesh(), train_size=train_size, test_size=test_size)


def load(workdir: Path | str, which: WhichStep = "latest", *, on_cpu: bool = True) -> Classifier:
    """Return the classifier of a run.

    Args:
        workdir: directory of the run.
        which: the latest checkpoint, the one with the best test accuracy so far, or that of a step.
        on_cpu: compute on the CPU, which is enough for single images. Otherwise an evaluation gives the numbers of the
            run, if the devices are the same.

    Raises:
        CheckpointError, OSError: the checkpoint cannot be read, or is corrupt.
        ConfigError: there is no run, or no such checkpoint.
    """
    workdir = Path(workdir)
    while True:
        checkpoints = find_checkpoints(workdir)
        try:
            checkpoint = choose(checkpoints, which, workdir)
            compatibility.prepare_jax(compatibility.cpu_threads_of([checkpoint]))
            devices.share_accelerator(on_cpu=on_cpu)
            return Classifier(checkpoint)
        except (CheckpointError, OSError):
            if find_checkpoints(workdir) == checkpoints:  # otherwise a running training may have removed it
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
        evaluated = [(checkpoint, _test_accuracy(checkpoint.metadata())) for checkpoint in checkpoints]
        accuracies = {checkpoint: accuracy for checkpoint, accuracy in evaluated if accuracy is not None}
        if not accuracies:
            raise NoCheckpointYetError(f"{workdir} has no evaluated checkpoint yet; --step latest needs no evaluation")
        return max(accuracies, key=lambda checkpoint: accuracies[checkpoint])
    for checkpoint in checkpoints:
        if checkpoint.step == which:
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints)
    raise ConfigError(f"{workdir} has no checkpoint of step {which}; there are: {steps}")


def _test_accuracy(metadata: Any) -> float | None:
    accuracy = metadata.get("test_accuracy") if isinstance(metadata, dict) else None
    return accuracy if isinstance(accuracy, float) and 0 <= accuracy <= 1 else None
