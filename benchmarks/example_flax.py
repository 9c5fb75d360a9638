"""The model and the hyperparameters of Flax's MNIST example, as its users write it: a jitted step in a Python loop."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn
from flax.training.train_state import TrainState

from benchmarks.examples import Options, train_to_goal

BATCH_SIZE = 128


class Network(nn.Module):
    """Two convolutions with average pooling, and two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return logits [N, 10] of images [N, 28, 28, 1] in [0, 1]."""
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, kernel_size=(3, 3))(x))
            x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(256)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


@jax.jit
def train_step(state: TrainState, batch: jax.Array, labels: jax.Array) -> TrainState:
    """Make one update."""

    def loss(params: Any) -> jax.Array:
        logits = state.apply_fn({"params": params}, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


@jax.jit
def count_correct(state: TrainState, batch: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the number of correct predictions."""
    return jnp.sum(state.apply_fn({"params": state.params}, batch).argmax(-1) == labels)


def main(options: Options) -> None:
    """Train until the goal accuracy is reached."""
    arrays = options.read()
    x, x_test = (arrays[f"{part}_images"][..., None].astype(np.float32) / 255 for part in ("train", "test"))
    y, y_test = (arrays[f"{part}_labels"].astype(np.int32) for part in ("train", "test"))
    network, shuffle = Network(), np.random.default_rng(0)
    params = network.init(jax.random.key(0), x[:1])["params"]
    state = TrainState.create(apply_fn=network.apply, params=params, tx=optax.sgd(0.1, momentum=0.9))

    def train_epoch() -> None:
        nonlocal state
        orders = shuffle.permutation(len(x))[: len(x) // BATCH_SIZE * BATCH_SIZE].reshape(-1, BATCH_SIZE)
        for rows in orders[: options.steps]:
            state = train_step(state, x[rows], y[rows])

    def test_accuracy() -> float:
        calls = range(0, len(x_test), 1000)
        correct = [count_correct(state, x_test[first : first + 1000], y_test[first : first + 1000]) for first in calls]
        return int(sum(correct)) / len(x_test)

    train_to_goal(options, train_epoch, test_accuracy)


if __name__ == "__main__":
    main(tyro.cli(Options))
