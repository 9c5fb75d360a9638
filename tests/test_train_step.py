from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_jax.config import Config
from mnist_jax.runtime import devices
from mnist_jax.training import augment, data, train_state, train_step
from mnist_jax.training.model import Network
from mnist_jax.training.train_step import TrainData

ONE_DEVICE = devices.make_mesh(devices=jax.devices()[:1])
EVERYWHERE = devices.replicated(ONE_DEVICE)
DIGITS = data.load("digits", notify=print)
SIZE, BATCH_SIZE = 100, 16
STEPS_PER_EPOCH = 6
IMAGES, LABELS = DIGITS.train_images[:SIZE], DIGITS.train_labels[:SIZE]
# Everything that a config can ask for: dropout, running statistics, augmentation, smoothed labels, an average.
AMOUNTS = {"shift_px": 2.0, "rotation_deg": 10.0, "zoom": 0.1}
CONFIG = Config(batch_size=BATCH_SIZE, label_smoothing=0.1, average_decay=0.5, **AMOUNTS)
MODEL = Network(features=(2,), kernel_sizes=(5,), hidden=8, batch_norm=True, dropout=0.5)
OPTIMIZER = train_state.make_optimizer(CONFIG, train_state.make_schedule(CONFIG, 50))
compilations = 0


@jax.jit
def train_steps(state, epoch_data, n):
    global compilations
    compilations += 1
    options = {"config": CONFIG, "model": MODEL, "optimizer": OPTIMIZER, "mesh": ONE_DEVICE}
    return train_step.train_steps(state, epoch_data, n, **options)


@cache
def create() -> train_state.TrainState:
    return jax.jit(partial(train_state.create, CONFIG, MODEL, OPTIMIZER), out_shardings=EVERYWHERE)()


@cache
def epoch(number: int, seed: int = 0) -> TrainData:
    return TrainData(*jax.device_put((IMAGES, LABELS, train_step.epoch_order(seed, number, SIZE)), EVERYWHERE))


@jax.jit
def forward(variables, images, augment_key, dropout_key):
    images = augment.augment(images, augment_key, **AMOUNTS)
    kept_units = MODEL.draw_dropout(dropout_key, BATCH_SIZE)
    return MODEL.apply(variables, images, train=True, kept_units=kept_units, mutable=["batch_stats"])


def run(state, *calls: int, seed: int = 0):
    """Make the updates of some calls. A call ends at the end of an epoch."""
    for n in calls:
        step = int(state.step)
        assert step // STEPS_PER_EPOCH == max(step, step + n - 1) // STEPS_PER_EPOCH, "a call in two epochs"
        state, _ = train_steps(state, epoch(step // STEPS_PER_EPOCH, seed), jax.device_put(np.int32(n), EVERYWHERE))
    return state


def bits(state) -> dict[str, bytes]:
    """Return the bytes of each leaf."""
    state = state.replace(rng=jax.random.key_data(state.rng))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in jax.tree.leaves_with_path(state)}


def cross_entropies(logits, labels) -> np.ndarray:
    """Return the cross-entropy of each image, computed by numpy in float64."""
    logits = np.asarray(logits, np.float64)
    highest = logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(logits - highest).sum(axis=1)) + highest[:, 0]
    return log_sum - logits[np.arange(len(labels)), labels]


def test_any_split_into_calls_has_the_same_bits():
    single = run(create(), *[1] * 14)
    for calls in ((6, 6, 2), (5, 1, 0, 3, 3, 0, 2), (2, 4, 1, 5, 1, 1)):
        assert bits(run(create(), *calls)) == bits(single)
    assert compilations == 1
    assert int(single.step) == 14
    assert {int(part.count) for part in single.opt_state} == {14}
    assert int(single.metrics.images) == 14 * BATCH_SIZE
    assert single.rng == create().rng


@pytest.mark.parametrize("step", [0, 5, 8])  # the first and the last of an epoch, and one of the next
def test_an_update_is_a_function_of_the_step(step):
    """Compute loss, metric sums, running statistics and average from the step, in other ways."""
    before = run(create(), *[1] * step)
    after = run(before, 1)

    first = step % STEPS_PER_EPOCH * BATCH_SIZE
    rows = np.asarray(train_step.epoch_order(CONFIG.seed, step // STEPS_PER_EPOCH, SIZE))[first : first + BATCH_SIZE]
    dropout_key, augment_key = jax.random.split(jax.random.fold_in(before.rng, step))
    logits, changed = forward(before.variables, IMAGES[rows], augment_key, dropout_key)

    by_class = [cross_entropies(logits, np.full(BATCH_SIZE, label)) for label in range(10)]
    loss = 0.9 * cross_entropies(logits, LABELS[rows]) + 0.1 * np.mean(by_class, axis=0)
    sums = jax.tree.map(lambda new, old: float(new) - float(old), after.metrics, before.metrics)
    np.testing.assert_allclose(sums.loss, loss.sum(), rtol=1e-4)
    assert (sums.correct, sums.images) == (np.sum(logits.argmax(axis=1) == LABELS[rows]), BATCH_SIZE)

    kept = min(0.5, (1 + step) / (5 + step))
    average = jax.tree.map(lambda old, new: kept * old + (1 - kept) * new, before.average, after.variables)
    for found, wanted in ((after.batch_stats, changed["batch_stats"]), (after.average, average)):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found, wanted)
    assert after.eval_variables is after.average


def test_the_seed_changes_dropout_and_order():
    other_dropout = create().replace(rng=jax.device_put(train_state.split_keys(1)[1], EVERYWHERE))
    ends = [bits(run(start, 1, seed=seed)) for start, seed in ((create(), 0), (other_dropout, 0), (create(), 1))]
    assert len({end[".params['logits']['kernel']"] for end in ends}) == 3


def test_the_order_is_a_permutation_and_a_function_of_seed_and_epoch():
    orders = {}
    for seed, number in ((0, 0), (0, 1), (0, 1000), (1, 0), (2**32 - 1, 0)):
        order = train_step.epoch_order(seed, number, SIZE)
        assert order.dtype == jnp.int32
        np.testing.assert_array_equal(np.sort(order), np.arange(SIZE))
        orders[seed, number] = order.tobytes()
    assert len(set(orders.values())) == len(orders)
    # The same with each version of NumPy: a run that resumes with another one goes on in its order.
    assert train_step.epoch_order(7, 3, 8).tolist() == [2, 5, 7, 3, 0, 6, 4, 1]


def test_a_call_needs_nothing_from_the_host():
    state, epoch_data, n = run(create(), 1), epoch(0), jax.device_put(np.int32(3), EVERYWHERE)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(train_steps(state, epoch_data, n))


@pytest.mark.parametrize("size", [7, 40])  # several calls, the last one smaller; one call, larger than the set
def test_evaluation_counts_each_image_once(size):
    images, variables = DIGITS.test_images[:30], create().variables
    wanted = MODEL.apply(variables, images, train=False)
    labels = wanted.argmax(axis=1).at[:10].set(0)  # The last prediction is correct: counting it twice would be seen.
    evaluate = jax.jit(partial(train_step.evaluate, model=MODEL, mesh=ONE_DEVICE, size=size))
    calls = [evaluate(variables, images, labels, np.int32(first)) for first in range(0, 30, size)]
    np.testing.assert_allclose(np.concatenate([logits for _, logits in calls])[:30], wanted, rtol=1e-4, atol=1e-5)
    sums = jax.tree.map(lambda *parts: sum(map(float, parts)), *(sums for sums, _ in calls))
    assert (sums.images, sums.correct) == (30, np.sum(wanted.argmax(axis=1) == labels))
    np.testing.assert_allclose(sums.loss, cross_entropies(wanted, labels).sum(), rtol=1e-5)


def test_correctness_is_that_of_numpy():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(scale=5, size=(50, 10)).astype(np.float32), rng.integers(0, 10, 50)
    np.testing.assert_array_equal(train_step.is_correct(logits, labels), logits.argmax(axis=1) == labels)


def test_one_value_that_is_not_finite_is_found_in_any_leaf():
    is_finite = jax.jit(train_step.is_finite)
    leaves, structure = jax.tree.flatten(create())
    assert is_finite(create())
    floating = [index for index, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    params, running = 3 + 1 + 2 * 2, 2 * 2  # kernels, bias, scales and biases of two norms; two means, two variances
    assert len(floating) == 4 * params + 2 * running + 1  # each also averaged; two moments; the sum of the losses
    for bad, index in zip((np.nan, np.inf, -np.inf) * len(floating), floating, strict=False):
        corrupt = np.array(leaves[index])
        corrupt.reshape(-1)[-1] = bad
        changed = [*leaves[:index], jax.device_put(corrupt, EVERYWHERE), *leaves[index + 1 :]]
        assert not is_finite(jax.tree.unflatten(structure, changed))
