"""Trainer: the pure functions of the training, compiled for the devices at hand, with their shardings."""

import os
from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import ShapeDtypeStruct
from jax.sharding import Mesh

from mnist_jax.config import Config, ConfigError
from mnist_jax.runtime import compilation_cache, devices
from mnist_jax.training import train_state, train_step
from mnist_jax.training.data import Dataset
from mnist_jax.training.model import MODELS
from mnist_jax.training.train_state import MetricSums, TrainState
from mnist_jax.training.train_step import TrainData

# Images per evaluation call. A call takes about as long as a training call, so signals are acted on just as soon.
EVAL_CALL_IMAGES = 500

# Compiler options on CPUs. The factors are times per step, measured side by side on 2 cores with AVX-512, batch 128.
CPU_OPTIONS: dict[str, str | bool] = {
    # By default jaxlib 0.10 computes convolutions in a library that uses one thread only; cnn: 0.83. Matrix products
    # are faster in that library.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT",
    # By default XLA copies all params in each step of a loop; original models: 0.92.
    "xla_cpu_copy_insertion_use_region_analysis": True,
    "xla_cpu_prefer_vector_width": "512",  # on processors with such vectors: 0.95
    # Shorter compilation: all programs in 2.4 s instead of 3.9 s, with the same speed and the same bits.
    "xla_backend_optimization_level": "1",
}
GRAPH_FLAG = "xla_gpu_enable_command_buffer"
GRAPH_COMMANDS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONVOLUTION,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"


class DeviceData(NamedTuple):
    """A dataset on the devices, replicated."""

    train_images: jax.Array  # [N, H, W, 1] uint8
    train_labels: jax.Array  # [N] int32 in [0, classes)
    test_images: jax.Array
    test_labels: jax.Array


class Trainer:
    """The compiled functions of a training. The train state and the data are arguments, not attributes.

    Each function is a cached property that compiles at its first use; `compile` compiles all that a training needs.
    The data are replicated on all devices, and the state is sharded as `devices.split_over_fsdp` says. All processes
    make the same calls of the functions, except for `learning_rate`, which runs on a CPU of the calling process.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        *,
        train_size: int,
        test_size: int,
        image_shape: tuple[int, int] = (28, 28),
        classes: int = 10,
    ) -> None:
        """Prepare the training of a config on a mesh, without compiling anything.

        Args:
            config: what to train.
            mesh: the devices, from `devices.make_mesh`.
            train_size: number of training images.
            test_size: number of test images.
            image_shape: height and width of the images.
            classes: number of classes.

        Raises:
            ConfigError: a batch is larger than the training set, the epochs make no step or too many, or the images
                are too small for the model.
        """
        self.config, self.mesh = config, mesh
        self.train_size, self.test_size = train_size, test_size
        self.image_shape, self.classes = image_shape, classes
        self.total_steps = config.total_steps(train_size)
        self.steps_per_epoch = config.steps_per_epoch(train_size)
        self.eval_every_steps = config.eval_every_steps or self.steps_per_epoch
        self.eval_call_images = -(-EVAL_CALL_IMAGES // mesh.size) * mesh.size  # the same number on each device
        self._on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._model = MODELS[config.model].clone(for_cpu=self._on_cpu, classes=classes)
        if min(image_shape) < self._model.min_side_px:
            height, width = image_shape
            raise ConfigError(
                f"model={config.model} needs images of {self._model.min_side_px} pixels a side or more, but these have "
                f"{height}×{width}; use another --model"
            )
        self._schedule = train_state.make_schedule(config, self.total_steps)
        self._optimizer = train_state.make_optimizer(config, self._schedule)
        self._replicated, self._split_over_batch = devices.replicated(mesh), devices.split_over_batch(mesh)
        self._order_of_epoch = lru_cache(1)(lambda epoch: self.epoch_order(epoch))

    def compile(self) -> None:
        """Compile the functions that the loop calls. This takes seconds, or less if JAX's cache has them."""
        _ = self.train_steps, self.evaluate, self.learning_rate, self.is_finite

    def put(self, dataset: Dataset) -> DeviceData:
        """Return a dataset on the devices."""
        arrays = dataset.train_images, dataset.train_labels, dataset.test_images, dataset.test_labels
        return DeviceData(*self._replicate(arrays))

    def epoch_order(self, epoch: int) -> jax.Array:
        """Return the order of the training images in an epoch, on the devices. See `train_step.epoch_order`."""
        order: jax.Array = self._replicate(train_step.epoch_order(self.config.seed, epoch, self.train_size))
        return order

    def advance(self, state: TrainState, data: DeviceData, *, step: int, n: int) -> tuple[TrainState, MetricSums]:
        """Dispatch one call of `n` updates, which must end at `next_boundary(step)` or before.

        Args:
            state: the state at `step`; its buffers are donated.
            data: the dataset.
            step: number of updates made. The host knows it without waiting for the state.
            n: number of updates, 1 or more.

        Returns:
            The state after the updates, and its metric sums. Where a log interval ends, the sums in the state are 0.
        """
        order = self._order_of_epoch(step // self.steps_per_epoch)
        state, sums = self.train_steps(state, TrainData(data.train_images, data.train_labels, order), np.int32(n))
        if (step + n) % self.config.log_every_steps == 0:
            state = state.replace(metrics=self._replicate(MetricSums.zeros()))
        return state, sums

    def next_boundary(self, step: int) -> int:
        """Return the first step after `step` where an epoch, a log interval or the run ends."""
        periods = (self.steps_per_epoch, self.config.log_every_steps)
        return min(self.total_steps, *(step - step % period + period for period in periods))

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the train state."""
        state = jax.eval_shape(self._create)
        return jax.tree.map(
            lambda leaf, sharding: ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            state,
            devices.split_over_fsdp(state, self.mesh),
        )

    @property
    def _state_shardings(self) -> Any:
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    @cached_property
    def init_state(self) -> Callable[[], TrainState]:
        """Nothing -> state before the first update. `compile` leaves it out: a run that resumes does not need it."""
        return self._compile(self._create, out_shardings=self._state_shardings)

    @cached_property
    def train_steps(self) -> Callable[[TrainState, TrainData, Any], tuple[TrainState, MetricSums]]:
        """State (donated), data, number of updates -> state, metric sums. See `train_step.train_steps`."""
        train_steps = partial(
            train_step.train_steps,
            config=self.config,
            model=self._model,
            optimizer=self._optimizer,
            mesh=self.mesh,
        )
        data = TrainData(self._images(self.train_size), _integers(self.train_size), _integers(self.train_size))
        options = choose_graph_options(self.mesh)
        if options:
            devices.initialize_cudnn(self.mesh.devices.flat[0])
        out_shardings = self._state_shardings, self._replicated
        arguments = self.abstract_state, data, _integers()
        return self._compile(
            train_steps, *arguments, out_shardings=out_shardings, donate_argnums=0, compiler_options=options
        )

    @cached_property
    def evaluate(self) -> Callable[[Any, jax.Array, jax.Array, Any], tuple[MetricSums, jax.Array]]:
        """Variables, images, labels, index of the first image -> metric sums, logits. See `train_step.evaluate`.

        The sums are replicated; each device holds the logits of its own images.
        """
        evaluate = partial(
            train_step.evaluate,
            model=self._model,
            mesh=self.mesh,
            size=self.eval_call_images,
        )
        arguments = self.abstract_state.variables, self._images(self.test_size), _integers(self.test_size), _integers()
        return self._compile(evaluate, *arguments, out_shardings=(self._replicated, self._split_over_batch))

    @cached_property
    def predict(self) -> Callable[[Any, Any], jax.Array]:
        """Variables, one image [1, H, W, 1] uint8 -> probabilities of the classes, [1, classes] float32."""
        return self._compile(
            partial(train_step.predict, model=self._model), self.abstract_state.variables, self._images(1)
        )

    @cached_property
    def learning_rate(self) -> Callable[[Any], jax.Array]:
        """Number of updates made -> learning rate of the next update, [] float32. It waits for no other call."""
        return self._compile_jitted(jax.jit(self._schedule, in_shardings=devices.on_local_cpu()), _integers())

    @cached_property
    def is_finite(self) -> Callable[[TrainState], jax.Array]:
        """State -> whether all its floating-point numbers are finite, [] bool, on all devices."""
        return self._compile(train_step.is_finite, self.abstract_state)

    def _create(self) -> TrainState:
        return train_state.create(self.config, self._model, self._optimizer, self.image_shape)

    def _images(self, size: int) -> Any:
        return ShapeDtypeStruct((size, *self.image_shape, 1), jnp.uint8)

    def _replicate(self, arrays: Any) -> Any:
        return jax.tree.map(lambda array: devices.make_global_array(np.asarray(array), self._replicated), arrays)

    def _compile(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Compile a function for all devices. Arguments without a sharding are replicated, and so are results."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding or self._replicated, arguments)
        options = {"out_shardings": self._replicated, **options}
        return self._compile_jitted(jax.jit(function, in_shardings=shardings, **options), *arguments)

    def _compile_jitted(self, jitted: Any, *arguments: Any) -> Any:
        compiled = jitted.lower(*arguments).compile(compiler_options=CPU_OPTIONS if self._on_cpu else None)
        # In all commands: the next start removes a program without a digest, and would compile it again.
        compilation_cache.write_digests()
        return compiled


def choose_graph_options(mesh: Mesh) -> dict[str, str | bool] | None:
    """Return compiler options with which a call of `train_steps` is one CUDA graph; None where that was not tried.

    By default XLA launches each convolution by itself, and copies the condition of the loop to the host before each
    update. With these options `cnn`, batch 256, made 4,318 instead of 3,220 updates/s on an H200, with the same bits.
    They are for one NVIDIA GPU: graphs with messages between several were not tried, nor was jax 0.10. A user who names
    the flag in XLA_FLAGS decides.
    """
    is_cuda = "cuda" in mesh.devices.flat[0].client.platform_version.split()
    was_tried = is_cuda and mesh.size == 1 and jax.__version_info__ >= (0, 11)
    if not was_tried or GRAPH_FLAG in os.environ.get("XLA_FLAGS", ""):
        return None
    return {GRAPH_FLAG: GRAPH_COMMANDS}


def _integers(*shape: int) -> Any:
    return ShapeDtypeStruct(shape, jnp.int32)
