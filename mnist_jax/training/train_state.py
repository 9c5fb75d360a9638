"""The train state: all that the next update needs besides config and dataset, and so all that a checkpoint holds."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from mnist_jax.config import Config
from mnist_jax.training.model import Network


class MetricSums(struct.PyTreeNode):
    """Running sums over the images since the last line of metrics. Part of the state, so a stop does not reset them."""

    loss: jax.Array  # [] float32, sum of the images' cross-entropies, in nats
    correct: jax.Array  # [] int32, correct predictions
    images: jax.Array  # [] int32

    @classmethod
    def zeros(cls) -> "MetricSums":
        """Return the sums over no images, on the host: a device would compute them after the calls in flight."""
        # Any: the fields are typed as arrays of JAX.
        none: dict[str, Any] = {"loss": np.float32(0), "correct": np.int32(0), "images": np.int32(0)}
        return cls(**none)


class TrainState(struct.PyTreeNode):
    """The state of a training: equal states continue equally, with the same config, dataset and environment."""

    step: jax.Array  # [] int32, number of updates made
    params: Any
    batch_stats: Any  # running means and variances of batch normalization, {} where the model has none
    average: Any  # EMA of the variables, None if config.average_decay is 0
    opt_state: optax.OptState
    rng: jax.Array  # [] typed key; step s draws from fold_in(rng, s), so it never changes
    metrics: MetricSums

    @property
    def variables(self) -> dict[str, Any]:
        """The first argument of `Network.apply`."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def eval_variables(self) -> dict[str, Any]:
        """The variables for evaluation and prediction: the average if there is one."""
        return self.variables if self.average is None else self.average


def create(
    config: Config, model: Network, optimizer: optax.GradientTransformation, image_shape: tuple[int, int] = (28, 28)
) -> TrainState:
    """Return the state before the first update, a pure function of the config and the shape of the images."""
    params_key, steps_key = split_keys(config.seed)
    variables = {"batch_stats": {}, **model.init(params_key, jnp.zeros((1, *image_shape, 1), jnp.uint8), train=False)}
    return TrainState(
        step=jnp.int32(0),
        **variables,
        average=variables if config.average_decay else None,
        opt_state=optimizer.init(variables["params"]),
        rng=steps_key,
        metrics=MetricSums.zeros(),
    )


def split_keys(seed: int | jax.Array) -> jax.Array:
    """Return two independent random keys, [2]: for the initial weights and for the steps."""
    return jax.random.split(jax.random.key(seed), 2)


def make_schedule(config: Config, total_steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the number of updates made.

    "linear" and "cosine" are one cycle (L. N. Smith and N. Topin, 2017): from 1/25 of the peak to the peak in 20 or
    30 % of the updates, then to almost 0.
    """
    peak = config.learning_rate
    match config.schedule:
        case "constant":
            return optax.constant_schedule(peak)
        case "cosine":
            return optax.cosine_onecycle_schedule(total_steps, peak)
        case "linear":
            scales = {total_steps // 5: 25.0, total_steps: 1e-4}
            return optax.piecewise_interpolate_schedule("linear", peak / 25, scales)


def make_optimizer(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return Adam (D. P. Kingma and J. Ba, 2015) at a scheduled learning rate."""
    return optax.adam(schedule, b1=config.adam_b1, b2=config.adam_b2)
