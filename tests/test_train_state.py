import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from arrays import numbers

from mnist_jax.config import Config
from mnist_jax.training import train_state
from mnist_jax.training.model import Network

pytestmark = pytest.mark.usefixtures("no_optimizations")

CONFIG = Config()
TINY = Network(features=(), kernel_sizes=(), hidden=2, batch_norm=True)


def create(config: Config) -> train_state.TrainState:
    optimizer = train_state.make_optimizer(config, train_state.make_schedule(config, 100))
    return train_state.create(config, TINY, optimizer)


@pytest.fixture(scope="module")
def state() -> train_state.TrainState:
    return create(CONFIG)


def test_the_initial_state_depends_on_the_seed_alone(state):
    jax.random.normal(jax.random.key(1), (3,))  # There is no hidden generator that this would advance.
    again = create(Config(learning_rate=1.0, batch_size=7, epochs=99, log_every_steps=1))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for one, other in zip(numbers(state), numbers(again), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    other = create(Config(seed=1))
    for layer in ("dense1", "logits"):
        assert not np.array_equal(state.params[layer]["kernel"], other.params[layer]["kernel"])
    assert state.rng != other.rng


def test_the_initial_state_is_empty_and_finite(state):
    assert (state.step.dtype, int(state.step)) == (jnp.int32, 0)
    assert jax.tree.map(float, state.metrics) == train_state.MetricSums(loss=0.0, correct=0.0, images=0.0)
    moments = state.opt_state[0]
    assert int(moments.count) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((moments.mu, moments.nu)))
    assert all(np.all(np.isfinite(leaf)) for leaf in numbers(state))


def test_each_seed_has_two_keys_of_its_own(state):
    seeds = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)
    keys = [jax.random.key_data(train_state.split_keys(seed)) for seed in seeds]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 2 * len(seeds)
    assert jax.random.key_data(state.rng).tolist() == keys[CONFIG.seed][1].tolist()
    traced = jax.jit(train_state.split_keys)(np.uint32(2**32 - 1))
    np.testing.assert_array_equal(jax.random.key_data(traced), keys[-1])


def test_the_preset_original_has_a_constant_learning_rate():
    rate = train_state.make_schedule(Config.of_preset(None, "original", "mnist"), 1000)
    assert [float(rate(step)) for step in (0, 1, 500, 5000)] == [1e-4] * 4


@pytest.mark.parametrize("total_steps", [10, 700])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_one_cycle_rises_to_the_learning_rate_and_falls(name, total_steps):
    schedule = train_state.make_schedule(dataclasses.replace(CONFIG, schedule=name), total_steps)
    rates = np.asarray(jax.vmap(schedule)(np.arange(total_steps)))
    peak = rates.argmax()
    assert 0 < peak < total_steps // 2
    np.testing.assert_allclose(rates[peak], CONFIG.learning_rate, rtol=1e-3)
    assert np.all(np.diff(rates[: peak + 1]) > 0)
    assert np.all(np.diff(rates[peak:]) < 0)
    assert rates[0] < rates[peak] / 10
    assert 0 < rates[-1] < rates[peak] / (10 if name == "cosine" else 0.7 * total_steps)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_shortest_trainings_have_a_learning_rate(name):
    for total_steps in (1, 2, 3, 4):
        schedule = train_state.make_schedule(dataclasses.replace(CONFIG, schedule=name), total_steps)
        rates = [float(schedule(step)) for step in range(total_steps)]
        assert all(0 < rate <= CONFIG.learning_rate * (1 + 1e-6) for rate in rates)


def test_an_average_decay_adds_an_average_that_is_evaluated(state):
    assert state.average is None
    assert state.eval_variables["params"] is state.params
    averaged = create(Config(average_decay=0.9))
    for one, other in zip(numbers(averaged.average), numbers(averaged.variables), strict=True):
        np.testing.assert_array_equal(one, other)
    assert averaged.eval_variables is averaged.average
    assert averaged.average.keys() == {"params", "batch_stats"}


def test_adam_has_the_schedule_and_the_decays_of_the_config():
    optimizer = train_state.make_optimizer(Config(adam_b1=0.5, adam_b2=0.25), optax.linear_schedule(0.5, 0.0, 10))
    params = {"w": jnp.float32([1.0, -2.0])}
    gradients = {"w": jnp.float32([4.0, -0.1])}
    updates, opt_state = optimizer.update(gradients, optimizer.init(params), params)
    # The first update of Adam is the learning rate with the sign of the gradient.
    np.testing.assert_allclose(updates["w"], [-0.5, 0.5], rtol=1e-4)
    assert (float(opt_state[0].mu["w"][0]), float(opt_state[0].nu["w"][0])) == (2.0, 12.0)
    updates, _ = optimizer.update(gradients, opt_state, params)
    np.testing.assert_allclose(updates["w"], [-0.45, 0.45], rtol=1e-4)
