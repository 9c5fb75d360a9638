"""A classifier that a run has made: the variables in one of its checkpoints, and what it answers with them."""

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


class NoCheckpointYetError(ConfigError):
    """A run has no such checkpoint yet, and may have one later."""


class Evaluation(NamedTuple):
    """What comes of all test images: mean loss in nats, share of right answers, and the logits [N, 10] float32."""

    loss: float
    accuracy: float
    logits: np.ndarray


class Classifier:
    """The classifier in a checkpoint, on the devices at hand, and where it comes from."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read a checkpoint.

        Raises:
            CheckpointError, OSError: it cannot be read, or is not what was saved.
            ConfigError: it says nothing usable of its run.
        """
        self.checkpoint, self.step = checkpoint, checkpoint.step
        about = checkpoint.metadata()
        self.about, self.data = compatibility.check_metadata(about, self.step), compatibility.data_of(about, self.step)
        self.config = configs.from_json(self.about["config"], checkpoint.path)
        # `loop.make_trainer` would want the batches of the training to divide over these devices.
        self._trainer = _make_trainer(self.config, self.data.train_images, self.data.test_images)
        state, _ = checkpoint.read(self._trainer.abstract_state)
        compatibility.check_step(checkpoint.step, state)
        self.sha256 = str(checkpoint.manifest()["state_sha256"])  # of the whole train state
        self.variables: dict[str, Any] = state.eval_variables

    @property
    def class_names(self) -> tuple[str, ...]:
        """What its ten answers mean."""
        return data.class_names(self.data.name)

    @property
    def test_accuracy(self) -> float | None:
        """The share of right answers that the run found at this step, or None where it did not evaluate there."""
        return _test_accuracy(self.about)

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Return the probabilities of the classes. image: [28, 28, 1] uint8, ink 255 on ground 0 -> [10] float32.

        The first answer of a process waits for a compilation.
        """
        return np.asarray(self._trainer.predict(self.variables, image[np.newaxis]))[0]

    def evaluate(self, dataset: Dataset, stop: StopSignal) -> Evaluation:
        """Look at all test images, by the program of the training, so that on such devices the numbers are the same.

        Raises:
            ConfigError: these are not the data of the run.
            StoppedError: a signal came.
        """
        compatibility.check_same_run(self.about, self.config, dataset, where=self.checkpoint.path)
        evaluate, mesh = stop.run(lambda: self._trainer.evaluate), self._trainer.mesh
        images, labels = (
            devices.make_global_array(array, devices.replicated(mesh))
            for array in (dataset.test_images, dataset.test_labels)
        )
        sums, logits = [], []
        for first in range(0, len(dataset.test_labels), self._trainer.eval_call_images):
            call_sums, call_logits = evaluate(self.variables, images, labels, np.int32(first))
            sums.append(call_sums)
            logits.append(np.asarray(call_logits))
            stop.check()
        return Evaluation(*means(add_sums(sums)), np.concatenate(logits)[: len(dataset.test_labels)])


def confusion_matrix(labels: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """Return how often which label was given which answer. labels, answers: [N] in [0, 10) -> [10, 10] int64."""
    return np.bincount(10 * labels.astype(np.int64) + answers, minlength=100).reshape(10, 10)


@cache
def _make_trainer(config: Config, train_size: int, test_size: int) -> Trainer:
    """Return the same trainer, which compiles once, for all checkpoints of a run."""
    return Trainer(config, devices.data_mesh(), train_size=train_size, test_size=test_size)


def load(workdir: Path | str, which: WhichStep = "latest", *, on_cpu: bool = True) -> Classifier:
    """Return the classifier of a run: the latest, the best on the test images so far, or that of a step.

    A run at work may remove an old checkpoint while it is read; then it is looked for again.

    Args:
        workdir: directory of the run.
        which: the checkpoint that is meant.
        on_cpu: leave an accelerator to those who need it, for a single image does not. Otherwise the numbers are those
            that the run itself came to, where it has the same devices.

    Raises:
        CheckpointError, OSError: the checkpoint cannot be read, or is not what was saved.
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
            if find_checkpoints(workdir) == checkpoints:
                raise


def find_checkpoints(workdir: Path) -> list[Checkpoint]:
    """Return the checkpoints of a run, oldest first.

    Raises:
        ConfigError: there is no run.
    """
    configs.check_holds_a_run(workdir)
    return list_checkpoints(workdir / "checkpoints")


def choose(checkpoints: list[Checkpoint], which: WhichStep, workdir: Path) -> Checkpoint:
    """Return the checkpoint that is meant; the best is the first with the highest test accuracy.

    Raises:
        CheckpointError, OSError: which one is the best is not known, for a manifest cannot be read.
        ConfigError: there is none; `NoCheckpointYetError` where there may be one later.
    """
    if not checkpoints:
        raise NoCheckpointYetError(f"nothing has been saved yet in {workdir}; wait for the first checkpoint")
    if which == "latest":
        return checkpoints[-1]
    if which == "best":
        accuracies = {checkpoint: _test_accuracy(checkpoint.metadata()) for checkpoint in checkpoints}
        evaluated = {checkpoint: accuracy for checkpoint, accuracy in accuracies.items() if accuracy is not None}
        if not evaluated:
            raise NoCheckpointYetError(f"no checkpoint in {workdir} was evaluated yet; use --step latest, or wait")
        return max(evaluated, key=lambda checkpoint: evaluated[checkpoint])
    for checkpoint in checkpoints:
        if checkpoint.step == which:
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints)
    raise ConfigError(f"{workdir} has no checkpoint of step {which}; there are: {steps}")


def _test_accuracy(about: Any) -> float | None:
    """Return the test accuracy that a checkpoint tells of, or None."""
    accuracy = about.get("test_accuracy") if isinstance(about, dict) else None
    return accuracy if isinstance(accuracy, float) and 0 <= accuracy <= 1 else None
