"""The mathematics of the training: pure functions of arrays. No file, no clock, no signal."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Sharding

from mnist_jax.training.augment import unchanged
from mnist_jax.training.model import Network
from mnist_jax.training.train_state import MetricSums, TrainState, split_keys


class TrainData(NamedTuple):
    """The training images on the device, and the order in which this epoch shows them."""

    images: jax.Array  # [N, 28, 28, 1] uint8
    labels: jax.Array  # [N] int32 in [0, 10)
    order: jax.Array  # [N] int32, a permutation


def epoch_order(seed: int | jax.Array, epoch: int | jax.Array, size: int) -> jax.Array:
    """Return the order of the images in an epoch: a permutation of range(size), a function of (seed, epoch) alone."""
    *_, key = split_keys(seed)
    return jax.random.permutation(jax.random.fold_in(key, epoch), jnp.arange(size, dtype=jnp.int32))


def train_steps(
    state: TrainState,
    data: TrainData,
    n: int | jax.Array,
    *,
    model: Network,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    batch_sharding: Sharding,
    augment: Callable[[jax.Array, jax.Array], jax.Array] = unchanged,
    label_smoothing: float = 0.0,
    average_decay: float = 0.0,
) -> tuple[TrainState, MetricSums]:
    """Make `n` updates, all in the epoch whose order `data` holds.

    `n` is a run-time value: whatever the number of steps in a call, it is the same program, and so the same bits.

    Args:
        state: the state to begin from; its buffers may be donated.
        data: training images; each update gathers its batch from them, on the device.
        n: [] int32, number of updates, 1 or more.
        model: the network.
        optimizer: what was given to `train_state.create`.
        batch_size: images an update learns from.
        batch_sharding: how a batch lies on the devices.
        augment: takes the images of a batch and a random key, and returns them distorted.
        label_smoothing: share of a label that is spread evenly over all classes, in [0, 1).
        average_decay: share of the average that an update leaves, in [0, 1), where the state has one.

    Returns:
        The state after `n` updates, and a copy of its metric sums that stays when the state is donated.
    """
    devices = len(batch_sharding.device_set)

    def mean_loss(
        params: Any, batch_stats: Any, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        variables = {"params": params, "batch_stats": batch_stats}
        logits, changed = model.apply(variables, images, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean(), (logits, changed["batch_stats"])

    def update(_: jax.Array, carried: tuple[TrainState, jax.Array]) -> tuple[TrainState, jax.Array]:
        """Make one update: the step alone says which images, which random numbers, and which learning rate."""
        state, correct = carried
        steps_per_epoch = data.order.size // batch_size
        first = state.step % steps_per_epoch * batch_size
        rows = jax.lax.dynamic_slice_in_dim(data.order, first, batch_size)
        rows = jax.lax.with_sharding_constraint(rows, batch_sharding)
        labels = data.labels[rows]
        dropout_key, augment_key = jax.random.split(jax.random.fold_in(state.rng, state.step))
        images = augment(data.images[rows], augment_key)
        gradient = jax.value_and_grad(mean_loss, has_aux=True)
        (loss, (logits, batch_stats)), gradients = gradient(
            state.params, state.batch_stats, images, labels, dropout_key
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = state.metrics.replace(
            loss=state.metrics.loss + loss * batch_size, images=state.metrics.images + batch_size
        )
        state = state.replace(
            step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state, metrics=metrics
        )
        if state.average is not None:
            state = state.replace(average=_average(state, average_decay))
        return state, correct + _count(is_correct(logits, labels), devices)

    # Each device counts its own correct images, which are whole numbers: no order of adding them changes a bit. The
    # counts are added up over the devices once for all updates of the call.
    none = jax.lax.with_sharding_constraint(jnp.zeros(devices, jnp.int32), batch_sharding)
    state, correct = jax.lax.fori_loop(0, n, update, (state, none))
    state = state.replace(metrics=state.metrics.replace(correct=state.metrics.correct + jnp.sum(correct)))
    return state, state.metrics


def _count(correct: jax.Array, devices: int) -> jax.Array:
    """Return the number of correct images of each device. correct: [N] bool, in equal parts -> [devices] int32."""
    return jnp.sum(correct.reshape(devices, -1), axis=1, dtype=jnp.int32)


def _average(state: TrainState, decay: float) -> Any:
    """Return the average of the variables after all updates, to which the latest contribute most.

    At the start it forgets faster, so that the first ones, which are random, are soon out of it: until `decay` is the
    smaller, those after update t have a weight in proportion to about t ** 3.
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
    batch_sharding: Sharding,
    size: int,
) -> tuple[MetricSums, jax.Array]:
    """Evaluate images `first` to `first + size`, or to the last one where there are fewer.

    Returns the metric sums over them, and the logits [size, 10]; those beyond the last image are meaningless.

    Args:
        variables: the network's parameters and running statistics.
        images: [N, 28, 28, 1] uint8.
        labels: [N] int32 in [0, 10).
        first: [] int32, index of the first image.
        model: the network.
        batch_sharding: sharding of the images of a call.
        size: images of a call; a constant, so that the last and smaller part needs no program of its own.
    """
    rows = jax.lax.with_sharding_constraint(first + jnp.arange(size), batch_sharding)
    there = rows < labels.size
    rows = jnp.minimum(rows, labels.size - 1)
    logits: Any = model.apply(variables, images[rows], train=False)
    losses = cross_entropy(logits, labels[rows])
    sums = MetricSums(
        loss=jnp.sum(losses, where=there),
        correct=jnp.sum(is_correct(logits, labels[rows]) & there, dtype=jnp.int32),
        images=jnp.sum(there, dtype=jnp.int32),
    )
    return sums, logits


def predict(variables: Any, images: jax.Array, *, model: Network) -> jax.Array:
    """Return the probabilities of the classes. images: [N, 28, 28, 1] uint8 -> [N, 10] float32."""
    logits: Any = model.apply(variables, images, train=False)
    return jax.nn.softmax(logits)


def is_finite(state: TrainState) -> jax.Array:
    """Tell whether all floating-point numbers of a state are finite. [] bool."""
    leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross-entropy of each image, in nats. logits: [N, 10], labels: [N] -> [N]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Tell of each image whether the right class is its likeliest one. logits: [N, 10], labels: [N] -> [N] bool."""
    return jnp.argmax(logits, axis=-1) == labels
