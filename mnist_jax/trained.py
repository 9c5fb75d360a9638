"""A classifier that a run has made: the variables in one of its checkpoints, and what it answers with them."""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mnist_jax import config as configs
from mnist_jax import data, distributed, provenance
from mnist_jax.checkpoint.checkpointer import Checkpoint, list_checkpoints
from mnist_jax.checkpoint.integrity import CheckpointError
from mnist_jax.config import ConfigError, WhichStep
from mnist_jax.council import Council
from mnist_jax.data import Dataset
from mnist_jax.preemption import StopSignal
from mnist_jax.programs import Blueprint
from mnist_jax.training import averages, total


class NothingYet(ConfigError):
    """A run has no such checkpoint yet, and may have one later."""


class Evaluation(NamedTuple):
    """What comes of all test images: mean loss in nats, share of right answers, and the logits [N, 10] float32."""

    loss: float
    accuracy: float
    logits: np.ndarray


class TrainedModel:
    """The classifier in a checkpoint, on the devices at hand, and where it comes from."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Read a checkpoint.

        Raises:
            CheckpointError, OSError: it cannot be read, or is not what was saved.
            ConfigError: it says nothing usable of its run.
        """
        self.checkpoint, self.step = checkpoint, checkpoint.step
        about = checkpoint.metadata()
        self.about, self.data = provenance.check_about(about, self.step), provenance.data_of(about, self.step)
        self.config = configs.from_json(self.about["config"], checkpoint.path)
        total_steps = self.config.total_steps(self.data.train_images)
        # `loop.make_blueprint` would want the batches of the training to divide over these devices.
        self._blueprint = Blueprint(self.config, total_steps, *self.data[1:], distributed.data_mesh())
        state, _ = checkpoint.read(self._blueprint.abstract_state)
        provenance.check_step(checkpoint.step, state)
        self.sha256 = str(checkpoint.manifest()["state_sha256"])  # of the whole train state
        self.variables: dict[str, Any] = state.variables_to_use

    @property
    def class_names(self) -> tuple[str, ...]:
        """What its ten answers mean."""
        return data.class_names(self.data.name)

    @property
    def test_accuracy(self) -> float | None:
        """The share of right answers that the run found at this step, or None where it did not evaluate there."""
        return _test_accuracy(self.about)

    def answer(self, image: np.ndarray) -> np.ndarray:
        """Return the probabilities of the classes. image: [28, 28, 1] uint8, ink 255 on ground 0 -> [10] float32.

        The first answer of a process waits for a compilation.
        """
        return np.asarray(_compile_answer(self._blueprint)(self.variables, image[np.newaxis]))[0]

    def evaluate(self, dataset: Dataset, stop: StopSignal) -> Evaluation:
        """Look at all test images, by the program of the training, so that on such devices the numbers are the same.

        Raises:
            ConfigError: these are not the data of the run.
            Stopped: a signal came.
        """
        provenance.check_same_run(self.about, self.config, dataset, where=self.checkpoint.path)
        program, mesh = stop.run(self._blueprint.compile_evaluate), self._blueprint.mesh
        images, labels = (
            distributed.put(array, distributed.replicated(mesh)) for array in (dataset.test_images, dataset.test_labels)
        )
        nothing = Council(mesh, stop).wishes(steps=0)
        sums, logits = [], []
        for first in range(0, len(dataset.test_labels), self._blueprint.eval_call_images):
            call_sums, call_logits, _ = program(self.variables, images, labels, np.int32(first), nothing)
            sums.append(call_sums)
            logits.append(np.asarray(call_logits))
            stop.check()
        return Evaluation(*averages(total(sums)), np.concatenate(logits)[: len(dataset.test_labels)])


@cache
def _compile_answer(blueprint: Blueprint) -> Any:
    """Compile once for all checkpoints of a run."""
    return blueprint.compile_answer()


def load(workdir: Path, which: WhichStep, *, on_cpu: bool = True) -> TrainedModel:
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
    while True:
        checkpoints = find_checkpoints(workdir)
        try:
            checkpoint = choose(checkpoints, which, workdir)
            provenance.prepare_jax(provenance.cpu_threads_of([checkpoint]))
            distributed.be_a_guest(on_cpu=on_cpu)
            return TrainedModel(checkpoint)
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
        ConfigError: there is none; `NothingYet` where there may be one later.
    """
    if not checkpoints:
        raise NothingYet(f"nothing has been saved yet in {workdir}; wait for the first checkpoint")
    if which == "latest":
        return checkpoints[-1]
    if which == "best":
        accuracies = {checkpoint: _test_accuracy(checkpoint.metadata()) for checkpoint in checkpoints}
        evaluated = {checkpoint: accuracy for checkpoint, accuracy in accuracies.items() if accuracy is not None}
        if not evaluated:
            raise NothingYet(f"no checkpoint in {workdir} was evaluated yet; use --step latest, or wait")
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
