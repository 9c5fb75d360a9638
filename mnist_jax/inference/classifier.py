"""A trained classifier: the variables of a checkpoint, and functions that predict with them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mnist_jax import config as configs
from mnist_jax.checkpoint.checkpoint import Checkpoint
from mnist_jax.config import Config, WhichStep
from mnist_jax.runtime import devices
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import compatibility, data, selection
from mnist_jax.training.data import Dataset
from mnist_jax.training.dispatch import add_sums, means
from mnist_jax.training.trainer import Trainer

# Of 1,683 pictures of docs/pictures.md, 90 % had an answer of at least this probability, and one of these was wrong
# (preset fast); 95 %, and three wrong, with preset accurate after 1,500 steps.
MIN_SURE = 0.7


class Evaluation(NamedTuple):
    """The result on all test images; `loss` is the mean in nats."""

    loss: float
    accuracy: float
    logits: np.ndarray  # [N, classes] float32
    confusion: np.ndarray  # [classes, classes] int64, a row for each label, a column for each prediction


class Classifier:
    """The classifier of a checkpoint, on the available devices."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read a checkpoint. It raises what `load` raises."""
        self.checkpoint, self.step = checkpoint, checkpoint.step
        self.metadata = compatibility.check_metadata(checkpoint.metadata(), self.step)
        self.data = compatibility.data_of(self.metadata, self.step)
        self.test_accuracy = selection.accuracy_of(checkpoint, self.metadata)  # as the run measured it, if it did
        self.config = configs.from_json(self.metadata["config"], checkpoint.path)
        # `setup.make_trainer` would require that the training batches divide over the available devices.
        self._trainer = _make_trainer(self.config, self.data)
        state, _ = checkpoint.read(self._trainer.abstract_state)
        compatibility.check_step(checkpoint.step, state)
        self.sha256 = str(checkpoint.manifest()["state_sha256"])  # of the whole train state
        self.variables: dict[str, Any] = state.eval_variables

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes."""
        return data.class_names(self.data.name, self.data.classes)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.data.height, self.data.width

    def predict(self, image: np.ndarray) -> np.ndarray:
        """Return the probabilities of the classes. image: [28, 28, 1] uint8, foreground 255 -> [10] float32.

        With the dataset "idx" it has the shape of the training images, and there are as many classes.

        The first call compiles.
        """
        return np.asarray(self._trainer.predict(self.variables, image[np.newaxis]))[0]

    def load_dataset(self, data_dir: Path | None, *, notify: Callable[[str], None]) -> Dataset:
        """Return the dataset of the run, from `data_dir` or from where the run has it; see `data.load`."""
        return data.load(self.data.name, data_dir or self.config.data_dir, notify=notify)

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
        sums, parts = [], []
        for first in range(0, len(dataset.test_labels), self._trainer.eval_call_images):
            call_sums, call_logits = evaluate(self.variables, images, labels, np.int32(first))
            sums.append(call_sums)
            parts.append(np.asarray(call_logits))
            stop.check()
        logits = np.concatenate(parts)[: len(dataset.test_labels)]
        confusion = confusion_matrix(dataset.test_labels, logits.argmax(axis=1), self.data.classes)
        return Evaluation(*means(add_sums(sums)), logits, confusion)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, classes: int = 10) -> np.ndarray:
    """Count the pairs of label and prediction. labels, predictions: [N] in [0, K) -> [K, K] int64, K = classes."""
    pairs = classes * labels.astype(np.int64) + predictions
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


@cache
def _make_trainer(config: Config, described: compatibility.Data) -> Trainer:
    """Return one trainer for all checkpoints of a run, because it compiles once."""
    return Trainer(
        config,
        devices.make_mesh(),
        train_size=described.train_images,
        test_size=described.test_images,
        image_shape=(described.height, described.width),
        classes=described.classes,
    )


def load(workdir: Path | str, which: WhichStep = "latest", *, on_cpu: bool = False) -> Classifier:
    """Return the classifier of a run.

    Args:
        workdir: directory of the run.
        which: the latest checkpoint, the one with the best test accuracy so far, or that of a step.
        on_cpu: compute on the CPU, which is enough for single images, and leave an accelerator to others. It holds for
            the whole process: a later `fit` would train on the CPU too. If it is False, an evaluation gives the numbers
            of the run on equal devices.

    Raises:
        CheckpointError, OSError: the checkpoint cannot be read, or is corrupt.
        ConfigError: there is no run, or no such checkpoint.
    """

    def read(checkpoint: Checkpoint) -> Classifier:
        compatibility.prepare_jax(compatibility.cpu_threads_of([checkpoint]))
        if on_cpu:
            devices.use_cpu()
        return Classifier(checkpoint)

    return selection.read(Path(workdir), which, read)
