"""The pure functions of `steps.py`, compiled for the devices at hand."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ShapeDtypeStruct
from jax.sharding import Mesh

from mnist_jax import augment, council, distributed, steps, train_state
from mnist_jax.config import Config
from mnist_jax.model import MODELS
from mnist_jax.steps import TrainData
from mnist_jax.train_state import MetricSums, TrainState

# The images of one call of the evaluation, about as many as train in one call: so long it takes to see a signal.
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


# variables, images, labels, index of the first, wishes
Evaluate = Callable[[Any, jax.Array, jax.Array, Any, Any], tuple[MetricSums, jax.Array, jax.Array]]


class Programs(NamedTuple):
    """What a run computes, each function with its config built in.

    The first three are of all devices, on each of which state and data lie whole, and all processes have to call them
    alike. The last two are of one device, for whoever asks.
    """

    # state (donated), data, number of updates, wishes
    train_steps: Callable[[TrainState, TrainData, Any, Any], tuple[TrainState, MetricSums, jax.Array]]
    epoch_order: Callable[[Any], jax.Array]  # epoch -> [N] int32
    evaluate: Evaluate
    eval_call_images: int
    learning_rate: Callable[[Any], jax.Array]  # number of updates made -> [] float32
    is_finite: Callable[[TrainState], jax.Array]


@dataclass(frozen=True)
class Blueprint:
    """What the programs are made from."""

    config: Config
    total_steps: int
    train_size: int
    test_size: int
    mesh: Mesh

    @cached_property
    def abstract_state(self) -> TrainState:
        """The shapes, types and shardings of the train state."""
        everywhere = distributed.replicated(self.mesh)
        state = jax.eval_shape(self._create)
        return jax.tree.map(lambda leaf: ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), state)

    def create(self) -> TrainState:
        """Return the state before the first update. It is compiled here, for a run that is carried on never asks."""
        return self._compile(self._create)()

    def compile(self) -> Programs:
        """Compile all programs: seconds where they are new, and much less where JAX's cache on disk has them."""
        config, mesh = self.config, self.mesh
        state = self.abstract_state
        number = _integers()
        wishes = council.abstract_wishes(mesh)
        return Programs(
            train_steps=self._compile(
                partial(
                    steps.train_steps,
                    optimizer=self._optimizer,
                    batch_size=config.batch_size,
                    label_smoothing=config.label_smoothing,
                    average_decay=config.average_decay,
                    distort=self._distort,
                    **self._on_batch,
                ),
                state,
                TrainData(_images(self.train_size), _integers(self.train_size), _integers(self.train_size)),
                number,
                wishes,
                donate_argnums=0,
            ),
            epoch_order=self._compile(partial(steps.epoch_order, config.seed, size=self.train_size), number),
            evaluate=self.compile_evaluate(),
            eval_call_images=self.eval_call_images,
            learning_rate=self._compile_for_one_device(self._schedule, number),
            is_finite=self._compile_for_one_device(steps.is_finite, jax.eval_shape(self._create)),
        )

    @property
    def eval_call_images(self) -> int:
        """How many images a call of the evaluation looks at: as many on each device."""
        return -(-EVAL_CALL_IMAGES // self.mesh.size) * self.mesh.size

    def compile_evaluate(self) -> Evaluate:
        """Compile the evaluation alone. Of the logits each device keeps those of its own images."""
        everywhere = distributed.replicated(self.mesh)
        return self._compile(
            partial(steps.evaluate, size=self.eval_call_images, **self._on_batch),
            self.abstract_state.variables,
            _images(self.test_size),
            _integers(self.test_size),
            _integers(),
            council.abstract_wishes(self.mesh),
            out_shardings=(everywhere, distributed.split_over_batch(self.mesh), everywhere),
        )

    def compile_answer(self) -> Callable[[Any, Any], jax.Array]:
        """Compile what a trained model is used with: variables, one image [1, 28, 28, 1] -> probabilities [1, 10]."""
        return self._compile(partial(steps.answer, model=self._model), self.abstract_state.variables, _images(1))

    @property
    def _on_batch(self) -> dict[str, Any]:
        return {"model": self._model, "batch_sharding": distributed.split_over_batch(self.mesh)}

    @property
    def _is_for_cpu(self) -> bool:
        return self.mesh.devices.flat[0].platform == "cpu"

    @property
    def _model(self) -> Any:
        return MODELS[self.config.model].clone(for_cpu=self._is_for_cpu)

    @property
    def _distort(self) -> Callable[[jax.Array, jax.Array], jax.Array]:
        amounts = {name: getattr(self.config, name) for name in ("shift_px", "rotation_deg", "zoom")}
        return partial(augment.distort, **amounts) if any(amounts.values()) else augment.unchanged

    @property
    def _schedule(self) -> Any:
        return train_state.make_schedule(self.config, self.total_steps)

    @property
    def _optimizer(self) -> Any:
        return train_state.make_optimizer(self.config, self._schedule)

    def _create(self) -> TrainState:
        return train_state.create(self.config, self._model, self._optimizer)

    def _compile(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Compile a function for all devices; arguments that do not say how they lie there lie whole on each."""
        everywhere = distributed.replicated(self.mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding or everywhere, arguments)
        options = {"out_shardings": everywhere, **options}
        return self._finish(jax.jit(function, in_shardings=shardings, **options), *arguments)

    def _compile_for_one_device(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._finish(jax.jit(function), *arguments)

    def _finish(self, jitted: Any, *arguments: Any) -> Any:
        return jitted.lower(*arguments).compile(compiler_options=CPU_OPTIONS if self._is_for_cpu else None)


def _images(size: int) -> Any:
    return ShapeDtypeStruct((size, 28, 28, 1), jnp.uint8)


def _integers(*shape: int) -> Any:
    return ShapeDtypeStruct(shape, jnp.int32)
