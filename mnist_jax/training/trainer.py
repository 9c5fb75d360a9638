"""Trainer: the pure functions of a training, jitted for the devices at hand, with their shardings and initial state."""

from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct
from jax.sharding import Mesh

from mnist_jax.config import Config
from mnist_jax.runtime import devices
from mnist_jax.training import augment, train_state, train_step
from mnist_jax.training.data import Dataset
from mnist_jax.training.model import MODELS
from mnist_jax.training.train_state import MetricSums, TrainState
from mnist_jax.training.train_step import TrainData

# Images of one call of the evaluation. A call takes about as long as one of the training, so a signal is seen as soon.
EVAL_CALL_IMAGES = 500

# What XLA for CPUs is told besides its defaults. In one run, side by side, on 2 cores with AVX-512, batch 128:
CPU_OPTIONS: dict[str, str | bool] = {
    # jaxlib 0.10 computes convolutions in a library that uses one thread only; without it the cnn takes 0.83 of the
    # time. Matrix products gain by that library.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT",
    # Otherwise all params are copied in each step of a loop, a fifth of the originals' time: 0.92.
    "xla_cpu_copy_insertion_use_region_analysis": True,
    "xla_cpu_prefer_vector_width": "512",  # where the processor has such vectors: 0.95
    # Less work for the compiler: all programs in 2.4 s, not 3.9 s, as fast and with the same bits.
    "xla_backend_optimization_level": "1",
}


class DeviceData(NamedTuple):
    """A data set on the devices, whole on each of them."""

    train_images: jax.Array  # [N, 28, 28, 1] uint8
    train_labels: jax.Array  # [N] int32 in [0, 10)
    test_images: jax.Array
    test_labels: jax.Array


class Trainer:
    """The jitted functions of a training. It holds no state of it.

    Each function is compiled when it is first used; `compile` does so for all that a training needs. State and data
    are replicated, and all processes must call `train_steps`, `epoch_order` and `evaluate` alike. `learning_rate` and
    `is_finite` run on one device of the process that calls them.
    """

    def __init__(self, config: Config, mesh: Mesh, *, train_size: int, test_size: int) -> None:
        """Describe the training of a config on a mesh, with so many training and test images.

        Raises:
            ConfigError: a batch would hold more images than there are, or the epochs make no step, or too many.
        """
        self.config, self.mesh = config, mesh
        self.train_size, self.test_size = train_size, test_size
        self.total_steps = config.total_steps(train_size)
        self.steps_per_epoch = config.steps_per_epoch(train_size)
        self.eval_every_steps = config.eval_every_steps or self.steps_per_epoch
        self._replicated = devices.replicated(mesh)
        self._order_of_epoch = lru_cache(1)(lambda epoch: self.epoch_order(np.int32(epoch)))

    def compile(self) -> None:
        """Compile all functions: seconds where they are new, much less where JAX's cache on disk has them."""
        assert all((self.train_steps, self.epoch_order, self.evaluate, self.learning_rate, self.is_finite))

    def put(self, dataset: Dataset) -> DeviceData:
        """Return a data set on the devices. After that an update needs nothing from the host but its dispatch."""
        arrays = dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels
        return DeviceData(*(devices.make_global_array(array, self._replicated) for array in arrays))

    def advance(self, state: TrainState, data: DeviceData, *, step: int, n: int) -> tuple[TrainState, MetricSums]:
        """Dispatch one call of `n` updates, from `step` to `next_boundary(step)` at most.

        Args:
            state: the state at `step`; its buffers are donated.
            data: the data set.
            step: the number of updates made, which the host knows without waiting for the state.
            n: number of updates, 1 or more.

        Returns the state after them and the metric sums; in the state these are 0 again where a log interval ends.
        """
        order = self._order_of_epoch(step // self.steps_per_epoch)
        state, sums = self.train_steps(state, TrainData(data.train_images, data.train_labels, order), np.int32(n))
        if (step + n) % self.config.log_every_steps == 0:
            zeros = jax.tree.map(
                lambda zero: devices.make_global_array(np.asarray(zero), self._replicated), MetricSums.zeros()
            )
            state = state.replace(metrics=zeros)
        return state, sums

    def next_boundary(self, step: int) -> int:
        """Return the step at which a call must end at the latest: there an epoch, a log interval or the run ends."""
        periods = (self.steps_per_epoch, self.config.log_every_steps)
        return min(self.total_steps, *(step - step % period + period for period in periods))

    @cached_property
    def abstract_state(self) -> TrainState:
        """The shapes, types and shardings of the train state."""
        state = jax.eval_shape(self._create)
        return jax.tree.map(lambda leaf: ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._replicated), state)

    def init_state(self) -> TrainState:
        """Return the state before the first update. Compiled here, because a run that resumes does not need it."""
        return self._compile(self._create)()

    @cached_property
    def train_steps(self) -> Callable[[TrainState, TrainData, Any], tuple[TrainState, MetricSums]]:
        """State (donated), data, number of updates -> state, metric sums. See `train_step.train_steps`."""
        config = self.config
        return self._compile(
            partial(
                train_step.train_steps,
                optimizer=self._optimizer,
                batch_size=config.batch_size,
                label_smoothing=config.label_smoothing,
                average_decay=config.average_decay,
                augment=self._augment,
                **self._on_batch,
            ),
            self.abstract_state,
            TrainData(_images(self.train_size), _integers(self.train_size), _integers(self.train_size)),
            _integers(),
            donate_argnums=0,
        )

    @cached_property
    def epoch_order(self) -> Callable[[Any], jax.Array]:
        """Epoch -> order of the training images, [N] int32."""
        return self._compile(partial(train_step.epoch_order, self.config.seed, size=self.train_size), _integers())

    @cached_property
    def evaluate(self) -> Callable[[Any, jax.Array, jax.Array, Any], tuple[MetricSums, jax.Array]]:
        """Variables, images, labels, index of the first image -> metric sums, logits. See `train_step.evaluate`.

        Each device keeps the logits of its own images.
        """
        return self._compile(
            partial(train_step.evaluate, size=self.eval_call_images, **self._on_batch),
            self.abstract_state.variables,
            _images(self.test_size),
            _integers(self.test_size),
            _integers(),
            out_shardings=(self._replicated, devices.split_over_batch(self.mesh)),
        )

    @cached_property
    def learning_rate(self) -> Callable[[Any], jax.Array]:
        """Number of updates made -> learning rate of the next update, [] float32."""
        return self._finish(jax.jit(self._schedule), _integers())

    @cached_property
    def is_finite(self) -> Callable[[TrainState], jax.Array]:
        """State on one device -> whether all its floating-point numbers are finite, [] bool."""
        return self._finish(jax.jit(train_step.is_finite), jax.eval_shape(self._create))

    @cached_property
    def predict(self) -> Callable[[Any, Any], jax.Array]:
        """Variables, one image [1, 28, 28, 1] uint8 -> probabilities of the classes, [1, 10] float32."""
        return self._compile(partial(train_step.predict, model=self._model), self.abstract_state.variables, _images(1))

    @property
    def eval_call_images(self) -> int:
        """Images of one call of the evaluation, as many on each device."""
        return -(-EVAL_CALL_IMAGES // self.mesh.size) * self.mesh.size

    @property
    def _on_batch(self) -> dict[str, Any]:
        return {"model": self._model, "batch_sharding": devices.split_over_batch(self.mesh)}

    @property
    def _is_for_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"

    @property
    def _model(self) -> Any:
        return MODELS[self.config.model].clone(for_cpu=self._is_for_cpu)

    @property
    def _augment(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        amounts = {name: getattr(self.config, name) for name in ("shift_px", "rotation_deg", "zoom")}
        return partial(augment.augment, **amounts) if any(amounts.values()) else augment.unchanged

    @property
    def _schedule(self) -> Any:
        return train_state.make_schedule(self.config, self.total_steps)

    @property
    def _optimizer(self) -> Any:
        return train_state.make_optimizer(self.config, self._schedule)

    def _create(self) -> TrainState:
        return train_state.create(self.config, self._model, self._optimizer)

    def _compile(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Compile a function for all devices; arguments without a sharding are replicated."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding or self._replicated, arguments)
        options = {"out_shardings": self._replicated, **options}
        return self._finish(jax.jit(function, in_shardings=shardings, **options), *arguments)

    def _finish(self, jitted: Any, *arguments: Any) -> Any:
        return jitted.lower(*arguments).compile(compiler_options=CPU_OPTIONS if self._is_for_cpu else None)


def _images(size: int) -> Any:
    return ShapeDtypeStruct((size, 28, 28, 1), jnp.uint8)


def _integers(*shape: int) -> Any:
    return ShapeDtypeStruct(shape, jnp.int32)
