"""The train state on its way: from any step to any later one, in calls of any length, with the same bits."""

import jax
import numpy as np

from mnist_jax import distributed
from mnist_jax.data import Dataset
from mnist_jax.programs import Blueprint, Programs
from mnist_jax.steps import TrainData
from mnist_jax.train_state import MetricSums, TrainState


class Updates:
    """A state on the device, and the step that the calls in flight lead to."""

    def __init__(self, blueprint: Blueprint, programs: Programs, dataset: Dataset, state: TrainState) -> None:
        """Put the data on the device; from then on an update needs nothing of the host but the word to begin."""
        config = blueprint.config
        self.state, self.step, self.total_steps = state, int(state.step), blueprint.total_steps
        self.steps_per_epoch = config.steps_per_epoch(blueprint.train_size)
        self.log_every_steps = config.log_every_steps
        self._programs, self._everywhere = programs, distributed.replicated(blueprint.mesh)
        self._images, self._labels = (
            distributed.put(array, self._everywhere) for array in (dataset.train_images, dataset.train_labels)
        )
        self._epoch, self._order = -1, self._labels

    @property
    def next_boundary(self) -> int:
        """The step at which a call has to end at the latest, for the order, the metric sums, or the run end there."""
        periods = (self.steps_per_epoch, self.log_every_steps)
        return min(self.total_steps, *(self.step - self.step % period + period for period in periods))

    def advance(self, n: int, wishes: jax.Array) -> tuple[MetricSums, jax.Array]:
        """Dispatch a call of `n` updates, `n` in [1, next_boundary - step].

        Returns the metric sums after them, and the wishes that all processes gave to this call.
        """
        epoch = self.step // self.steps_per_epoch
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._programs.epoch_order(np.int32(epoch))
        data = TrainData(self._images, self._labels, self._order)
        self.state, sums, heard = self._programs.train_steps(self.state, data, np.int32(n), wishes)
        self.step += n
        if self.step % self.log_every_steps == 0:
            zeros = jax.tree.map(lambda zero: distributed.put(np.asarray(zero), self._everywhere), MetricSums.zeros())
            self.state = self.state.replace(metrics=zeros)
        return sums, heard
