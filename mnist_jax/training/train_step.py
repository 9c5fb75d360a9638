"""The mathematics of the training: pure functions of arrays, without files, clocks or signals."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding

from mnist_jax.config import Config
from mnist_jax.runtime import devices
from mnist_jax.training.augment import augment
from mnist_jax.training.model import Network
from mnist_jax.training.train_state import MetricSums, TrainState


class TrainData(NamedTuple):
    """The training images on the devices, and their order in the current epoch."""

    images: jax.Array  # [N, H, W, 1] uint8
    labels: jax.Array  # [N] int32 in [0, classes)
    order: jax.Array  # [N] int32, a permutation


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray[Any, Any]:
    """Return the order of the images in an epoch, a function of (seed, epoch) alone: a permutation, [size] int32.

    It is computed on the host, in 8 ms for 60,000 images. On the devices it was one more program, 0.1 s of each start.
    NumPy guarantees the numbers of a bit generator for all its versions (NEP 19), but not `Generator.permutation`.
    """
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(size), kind="stable").astype(np.int32)


def train_steps(
    state: TrainState,
    data: TrainData,
    n: int | jax.Array,
    *,
    config: Config,
    model: Network,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> tuple[TrainState, MetricSums]:
    """Make `n` updates, all in the epoch whose order `data` holds.

    `n` is a run-time value: any number of updates per call runs the same program, with the same bits.

    Args:
        state: the state before the updates; its buffers may be donated.
        data: training images; each update gathers its batch from them, on the devices.
        n: [] int32, number of updates, 1 or more.
        config: batch size, augmentation, label smoothing, decay of the average.
        model: the network.
        optimizer: the optimizer that `train_state.create` received.
        mesh: the devices, from `devices.make_mesh`; all share each batch.

    Returns:
        The state after `n` updates, and a copy of its metric sums that stays valid when the state is donated.
    """
    on_batch, on_all = devices.split_over_batch(mesh), devices.replicated(mesh)
    gradient = _gradient_over_devices(model, config.label_smoothing, mesh)

    def update(_: jax.Array, carried: tuple[TrainState, jax.Array]) -> tuple[TrainState, jax.Array]:
        state, correct = carried
        batch = _draw_batch(state, data, config, model, on_batch)
        variables = jax.lax.with_sharding_constraint(state.variables, on_all)  # Each device computes with all of them.
        loss, gradients, batch_stats, correct_here = gradient(variables, *batch)
        gradients = jax.lax.with_sharding_constraint(gradients, devices.split_over_fsdp(gradients, mesh))
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = state.metrics.replace(
            loss=state.metrics.loss + loss * config.batch_size, images=state.metrics.images + config.batch_size
        )
        state = state.replace(
            step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, metrics=metrics
        )
        if state.average is not None:
            state = state.replace(average=_average(state, config.average_decay))
        state = jax.lax.with_sharding_constraint(state, devices.split_over_fsdp(state, mesh))
        return state, correct + correct_here

    # Each device counts its own correct predictions; the counts are added once per call. They are integers, so the
    # order of the additions does not change a bit.
    none = jax.lax.with_sharding_constraint(jnp.zeros(mesh.size, jnp.int32), on_batch)
    state, correct = jax.lax.fori_loop(0, n, update, (state, none))
    state = state.replace(metrics=state.metrics.replace(correct=state.metrics.correct + jnp.sum(correct)))
    return state, state.metrics


def _draw_batch(
    state: TrainState, data: TrainData, config: Config, model: Network, sharding: NamedSharding
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Return images, labels and kept hidden units of the next update, sharded: a function of data, rng and step.

    The random numbers are drawn for the whole batch, so that they do not depend on the number of devices.
    """
    first = state.step % (data.order.size // config.batch_size) * config.batch_size
    rows = jax.lax.dynamic_slice_in_dim(data.order, first, config.batch_size)
    rows = jax.lax.with_sharding_constraint(rows, sharding)
    dropout_key, augment_key = jax.random.split(jax.random.fold_in(state.rng, state.step))
    amounts = {"shift_px": config.shift_px, "rotation_deg": config.rotation_deg, "zoom": config.zoom}
    images = augment(data.images[rows], augment_key, **amounts)
    kept_units = model.draw_dropout(dropout_key, config.batch_size)
    return jax.lax.with_sharding_constraint((images, data.labels[rows], kept_units), sharding)


def _gradient_over_devices(
    model: Network, label_smoothing: float, mesh: Mesh
) -> Callable[..., tuple[jax.Array, Any, Any, jax.Array]]:
    """Return a function of variables and a batch: loss, gradients, batch statistics, correct predictions by device.

    Each device computes with its part of the batch; the means over all devices follow. One device needs no means: XLA
    would copy all gradients for them.
    """
    axes = mesh.axis_names if mesh.size > 1 else ()
    model = model.clone(batch_axes=axes)

    def compute(
        variables: Any, images: jax.Array, labels: jax.Array, kept_units: jax.Array | None
    ) -> tuple[jax.Array, Any, Any, jax.Array]:
        # Parameters that vary over the devices, as far as JAX knows, have gradients that vary. The gradients of
        # replicated ones would be summed one by one.
        params = jax.lax.pcast(variables["params"], axes, to="varying")
        loss_and_gradient = jax.value_and_grad(partial(_mean_loss, model, label_smoothing), has_aux=True)
        (loss, (logits, batch_stats)), gradients = loss_and_gradient(
            params, variables["batch_stats"], images, labels, kept_units
        )
        if axes:
            loss, gradients = _mean_over_devices((loss, gradients), axes)
        correct = jnp.sum(is_correct(logits, labels), dtype=jnp.int32)
        return loss, gradients, batch_stats, correct[None]

    if not axes:
        return compute
    on_all, on_batch = devices.replicated(mesh).spec, devices.split_over_batch(mesh).spec
    return jax.shard_map(
        compute,
        mesh=mesh,
        in_specs=(on_all, on_batch, on_batch, on_batch),
        out_specs=(on_all, on_all, on_all, on_batch),
    )


def _mean_over_devices(tree: Any, axes: tuple[str, ...]) -> Any:
    """Return the means of the float32 leaves over all devices, in the body of a `jax.shard_map`.

    They are sent as one array. XLA sends each leaf by itself on CPUs: 9 messages of 3 to 4 ms each for `cnn`.
    """
    flat, unravel = ravel_pytree(tree)
    # Without the barrier XLA merges this with the update of the parameters, for a split state in another way than for a
    # replicated one, and on CPUs the bits differ.
    return jax.lax.optimization_barrier(unravel(jax.lax.pmean(flat, axes)))


def _mean_loss(
    model: Network,
    label_smoothing: float,
    params: Any,
    batch_stats: Any,
    images: jax.Array,
    labels: jax.Array,
    kept_units: jax.Array | None,
) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    """Return the mean cross-entropy of the images, [] float32, and with it the logits and the new batch statistics."""
    variables = {"params": params, "batch_stats": batch_stats}
    logits, changed = model.apply(variables, images, train=True, kept_units=kept_units, mutable=["batch_stats"])
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    return optax.softmax_cross_entropy(logits, targets).mean(), (logits, changed["batch_stats"])


def _average(state: TrainState, decay: float) -> Any:
    """Return the exponential moving average (EMA) of the variables.

    The decay after update t is at most t / (t + 4), so that the average forgets the random initial weights quickly.
    """
    kept = jnp.minimum(decay, state.step / (state.step + 4))
    return optax.incremental_update(state.variables, state.average, 1 - kept)


def evaluate(
    variables: Any,
    images: jax.Array,
    labels: jax.Array,
    first: int | jax.Array,
    *,
    model: Network,
    mesh: Mesh,
    size: int,
) -> tuple[MetricSums, jax.Array]:
    """Evaluate the images from `first` to `first + size`, or to the last image.

    Args:
        variables: the parameters and running statistics of the network.
        images: [N, H, W, 1] uint8.
        labels: [N] int32 in [0, classes).
        first: [] int32, index of the first image.
        model: the network.
        mesh: the devices, which share the images of a call.
        size: images per call; a constant, so that all calls run the same program.

    Returns:
        The metric sums, and the logits [size, classes]. Logits beyond the last image are meaningless.
    """
    variables = jax.lax.with_sharding_constraint(variables, devices.replicated(mesh))
    rows = jax.lax.with_sharding_constraint(first + jnp.arange(size), devices.split_over_batch(mesh))
    exists = rows < labels.size
    rows = jnp.minimum(rows, labels.size - 1)
    logits: Any = model.apply(variables, images[rows], train=False)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
    sums = MetricSums(
        loss=jnp.sum(losses, where=exists),
        correct=jnp.sum(is_correct(logits, labels[rows]) & exists, dtype=jnp.int32),
        images=jnp.sum(exists, dtype=jnp.int32),
    )
    return sums, logits


def predict(variables: Any, images: jax.Array, *, model: Network) -> jax.Array:
    """Return the probabilities of the classes. images: [N, H, W, 1] uint8 -> [N, classes] float32."""
    logits: Any = model.apply(variables, images, train=False)
    return jax.nn.softmax(logits)


def is_finite(state: TrainState) -> jax.Array:
    """Return whether all floating-point numbers of a state are finite, [] bool."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return whether each prediction is correct. logits: [N, classes], labels: [N] -> [N] bool."""
    return jnp.argmax(logits, axis=-1) == labels
