import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mnist_jax.config import Config
from mnist_jax.training import train_state
from mnist_jax.training.model import MODELS

CONFIG = Config()


def create(config: Config) -> train_state.TrainState:
    optimizer = train_state.make_optimizer(config, train_state.make_schedule(config, 100))
    return jax.jit(lambda: train_state.create(config, MODELS[config.model], optimizer))()


def numbers(tree) -> list[np.ndarray]:
    """Return the leaves, of keys their numbers."""
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(tree)]
    leaves = zip(jax.tree.leaves(tree), is_key, strict=True)
    return [np.asarray(jax.random.key_data(leaf) if key else leaf) for leaf, key in leaves]


@pytest.fixture(scope="module")
def state() -> train_state.TrainState:
    return create(CONFIG)


def test_equal_configs_begin_with_the_same_state_bit_for_bit(state):
    jax.random.normal(jax.random.key(1), (3,))  # There is no hidden generator that this would move on.
    again = create(Config())
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for one, other in zip(numbers(state), numbers(again), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_the_state_begins_at_step_0_with_nothing_summed_up_and_all_numbers_finite(state):
    assert (state.step.dtype, int(state.step)) == (jnp.int32, 0)
    assert jax.tree.map(float, state.metrics) == train_state.MetricSums(loss=0.0, correct=0.0, images=0.0)
    moments = state.opt_state[0]
    assert int(moments.count) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((moments.mu, moments.nu)))
    assert all(np.all(np.isfinite(leaf)) for leaf in numbers(state))


def test_another_seed_begins_with_other_weights_and_other_random_numbers(state):
    other = create(Config(seed=1))
    for layer in state.params:
        assert not np.array_equal(state.params[layer]["kernel"], other.params[layer]["kernel"])
    assert state.rng != other.rng


def test_what_is_not_the_seed_or_the_model_does_not_change_the_beginning(state):
    other = create(Config(learning_rate=1.0, batch_size=7, epochs=99, log_every_steps=1))
    for one, same in zip(numbers(state), numbers(other), strict=True):
        np.testing.assert_array_equal(one, same)


def test_the_three_streams_of_a_seed_are_three_keys_and_the_state_holds_the_second(state):
    weights, steps, order = map(tuple, np.asarray(jax.random.key_data(train_state.split_keys(CONFIG.seed))).tolist())
    assert len({weights, steps, order}) == 3
    assert tuple(jax.random.key_data(state.rng).tolist()) == steps


def test_each_seed_of_the_range_has_streams_of_its_own():
    seeds = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)
    keys = np.concatenate([jax.random.key_data(train_state.split_keys(seed)) for seed in seeds])
    assert len(np.unique(keys, axis=0)) == 3 * len(seeds)


def test_the_seed_may_be_a_traced_number():
    traced = jax.jit(train_state.split_keys)(np.uint32(7))
    np.testing.assert_array_equal(jax.random.key_data(traced), jax.random.key_data(train_state.split_keys(7)))


@pytest.mark.parametrize("model", [name for name in MODELS if name.startswith("original")])
def test_the_learning_rate_of_the_originals_is_constant(model):
    config = Config.of_preset(None, model, "mnist")
    rate = train_state.make_schedule(config, 1000)
    assert [float(rate(step)) for step in (0, 1, 500, 999, 5000)] == [config.learning_rate] * 5
    assert config.learning_rate == 1e-4


@pytest.mark.parametrize("total_steps", [10, 100, 2814])
def test_the_learning_rate_of_the_cnn_rises_to_the_one_asked_for_and_falls_to_almost_nothing(total_steps):
    schedule = jax.jit(train_state.make_schedule(CONFIG, total_steps))
    rates = np.asarray([schedule(step) for step in range(total_steps)])
    peak = rates.argmax()
    assert 0 < peak < total_steps // 2
    np.testing.assert_allclose(rates[peak], CONFIG.learning_rate, rtol=1e-3)
    assert np.all(np.diff(rates[: peak + 1]) > 0)
    assert np.all(np.diff(rates[peak:]) < 0)
    assert rates[0] < rates[peak] / 10
    assert 0 < rates[-1] < rates[peak] / 10


def test_the_learning_rate_of_the_cnn_depends_on_the_length_of_the_training():
    short, long = (train_state.make_schedule(CONFIG, total_steps) for total_steps in (100, 200))
    assert float(short(50)) != float(long(50))


@pytest.mark.parametrize("total_steps", [1, 2, 3, 4])
def test_the_learning_rate_of_the_shortest_trainings_is_a_number_above_0(total_steps):
    schedule = train_state.make_schedule(CONFIG, total_steps)
    rates = [float(schedule(step)) for step in range(total_steps)]
    assert all(0 < rate <= CONFIG.learning_rate * (1 + 1e-6) for rate in rates)


def test_an_average_is_in_the_state_where_it_is_asked_for_and_begins_as_the_weights_do(state):
    assert state.average is None
    assert state.eval_variables["params"] is state.params
    averaged = create(Config(average_decay=0.9, model="cnn-large"))
    for one, other in zip(numbers(averaged.average), numbers(averaged.variables), strict=True):
        np.testing.assert_array_equal(one, other)
    assert averaged.eval_variables is averaged.average


def test_the_decays_of_adam_are_those_of_the_config():
    config = Config(adam_b1=0.5, adam_b2=0.25)
    optimizer = train_state.make_optimizer(config, optax.constant_schedule(0.1))
    params = {"w": jnp.float32([1.0])}
    _, opt_state = optimizer.update({"w": jnp.float32([4.0])}, optimizer.init(params), params)
    assert (float(opt_state[0].mu["w"][0]), float(opt_state[0].nu["w"][0])) == (2.0, 12.0)


def test_the_first_update_of_adam_is_as_large_as_the_scheduled_learning_rate():
    optimizer = train_state.make_optimizer(CONFIG, optax.linear_schedule(0.5, 0.0, 10))
    params = {"w": jnp.float32([1.0, -2.0])}
    updates, opt_state = optimizer.update({"w": jnp.float32([3.0, -0.1])}, optimizer.init(params), params)
    # Adam divides the mean gradient by the root of the mean square: 1 but for its epsilon of 1e-8 and for the float32
    # that 1 - 0.999 is, which has lost three of its seven digits.
    np.testing.assert_allclose(updates["w"], [-0.5, 0.5], rtol=1e-4)
    updates, _ = optimizer.update({"w": jnp.float32([3.0, -0.1])}, opt_state, params)
    np.testing.assert_allclose(updates["w"], [-0.45, 0.45], rtol=1e-4)
