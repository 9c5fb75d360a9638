from functools import cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from mnist_jax.config import Config
from mnist_jax.runtime import devices
from mnist_jax.training import augment, data, train_state, train_step
from mnist_jax.training.model import MODELS
from mnist_jax.training.train_step import TrainData

ONE_DEVICE = Mesh(np.asarray(jax.devices()[:1]), (devices.BATCH_AXIS,))
BATCH_SHARDING = devices.split_over_batch(ONE_DEVICE)
EVERYWHERE = devices.replicated(ONE_DEVICE)
DIGITS = data.load("digits", notify=print)
DROPPING_CNN = MODELS["cnn"].clone(dropout=0.5)
NORMALIZING_CNN = MODELS["cnn"].clone(dropout=0.5, batch_norm=True)


class Trainer:
    """`train_steps` jitted for some images, with a count of how often it was compiled."""

    def __init__(
        self,
        *,
        size: int = 100,
        batch_size: int = 16,
        model: Any = DROPPING_CNN,
        optimizer: optax.GradientTransformation | None = None,
        images: np.ndarray = DIGITS.train_images,
        donate: bool = False,
        **options: Any,
    ) -> None:
        self.model, self.size, self.batch_size = model, size, batch_size
        self.steps_per_epoch = size // batch_size
        self.images, self.labels = jax.device_put((images[:size], DIGITS.train_labels[:size]), EVERYWHERE)
        schedule = train_state.make_schedule(Config(), 50)
        self.optimizer = train_state.make_optimizer(Config(), schedule) if optimizer is None else optimizer
        self.options = options
        self.compilations = 0
        self._created: dict[int, train_state.TrainState] = {}
        self._order = jax.jit(partial(train_step.epoch_order, size=size), out_shardings=EVERYWHERE)
        self.train_steps = jax.jit(self._train_steps, donate_argnums=(0,) if donate else ())

    def _train_steps(self, state, epoch_data, n):
        self.compilations += 1
        return train_step.train_steps(
            state,
            epoch_data,
            n,
            model=self.model,
            optimizer=self.optimizer,
            batch_size=self.batch_size,
            batch_sharding=BATCH_SHARDING,
            **self.options,
        )

    def create(self, seed: int = 0) -> train_state.TrainState:
        if seed not in self._created:
            config = Config(seed=seed, average_decay=self.options.get("average_decay", 0.0))
            create = partial(train_state.create, config, self.model, self.optimizer)
            self._created[seed] = jax.jit(create, out_shardings=EVERYWHERE)()
        return self._created[seed]

    def epoch(self, epoch: int, seed: int = 0) -> TrainData:
        return TrainData(self.images, self.labels, self._order(np.uint32(seed), np.int32(epoch)))

    def run(self, state, *calls: int, seed: int = 0):
        """Make the updates of some calls; an epoch's end cuts a call in two."""
        step = int(state.step)
        for n in calls:
            end = step + n
            while True:
                epoch = step // self.steps_per_epoch
                part = min(end, (epoch + 1) * self.steps_per_epoch) - step
                state, *_ = self.train_steps(state, self.epoch(epoch, seed), np.int32(part))
                step += part
                if step == end:
                    break
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


STEPS = 15  # 2.5 epochs of the trainer below


@cache
def dropping_trainer() -> Trainer:
    """A trainer that leaves nothing out: dropout, running statistics, distortions, smoothed labels, an average."""
    distort = partial(augment.augment, shift_px=2.0, rotation_deg=10.0, zoom=0.1)
    return Trainer(model=NORMALIZING_CNN, augment=distort, label_smoothing=0.1, average_decay=0.9)


@cache
def in_single_steps() -> dict[str, bytes]:
    trainer = dropping_trainer()
    return bits(trainer.run(trainer.create(), *[1] * STEPS))


@pytest.fixture
def trainer() -> Trainer:
    return dropping_trainer()


@settings(max_examples=20, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(0, STEPS), max_size=STEPS))
def test_however_the_steps_are_split_into_calls_it_is_one_program_and_the_same_bits(cuts):
    edges = [0, *sorted(cuts), STEPS]
    calls = [end - start for start, end in pairwise(edges)]
    trainer = dropping_trainer()
    found = bits(trainer.run(trainer.create(), *calls))
    assert [name for name, value in in_single_steps().items() if found[name] != value] == []
    assert trainer.compilations == 1


def test_a_call_of_no_steps_changes_nothing(trainer):
    state = trainer.run(trainer.create(), 3)
    assert bits(trainer.run(state, 0)) == bits(state)


def test_the_state_counts_its_updates_and_so_does_its_optimizer(trainer):
    state = trainer.run(trainer.create(), 7)
    assert int(state.step) == 7
    assert {int(part.count) for part in state.opt_state} == {7}
    assert int(state.metrics.images) == 7 * trainer.batch_size


def test_the_key_of_the_state_never_changes(trainer):
    state = trainer.create()
    assert trainer.run(state, 5).rng == state.rng


@pytest.mark.parametrize("size", [1, 10, 1438])
def test_the_order_of_an_epoch_is_a_permutation(size):
    order = train_step.epoch_order(3, 4, size)
    assert order.dtype == jnp.int32
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_the_order_is_a_function_of_seed_and_epoch_and_of_nothing_else():
    traced = jax.jit(train_step.epoch_order, static_argnames="size")
    seeds_and_epochs = [(seed, epoch) for seed in (0, 1, 2**32 - 1) for epoch in (0, 1, 2, 1000)]
    orders = {pair: train_step.epoch_order(*pair, 100) for pair in seeds_and_epochs}
    for seed, epoch in reversed(seeds_and_epochs):
        again = traced(np.uint32(seed), np.int32(epoch), size=100)
        np.testing.assert_array_equal(again, orders[seed, epoch])
    assert len({order.tobytes() for order in map(np.asarray, orders.values())}) == len(orders)


class Sightings:
    """A network whose parameters have an element for each image, which only that image gives a gradient.

    Image i holds the byte i in every pixel.
    """

    SIZE = 103
    IMAGES = np.broadcast_to(np.arange(SIZE, dtype=np.uint8)[:, None, None, None], (SIZE, 28, 28, 1))

    def init(self, key, images, *, train):
        return {"params": jnp.zeros(self.SIZE)}

    def apply(self, variables, images, *, train, rngs, mutable):
        return variables["params"][images[:, 0, 0, 0], None] * jnp.eye(10)[0], {"batch_stats": {}}


def test_an_epoch_shows_each_image_once_but_for_those_that_fill_no_batch():
    count = optax.stateless(lambda gradients, _: jnp.where(gradients != 0, 1.0, 0.0))
    trainer = Trainer(size=103, batch_size=10, model=Sightings(), images=Sightings.IMAGES, optimizer=count)
    state = trainer.create()
    total = np.zeros(103)
    for epoch in range(3):
        order = np.asarray(trainer.epoch(epoch).order)
        for batch in range(10):
            before, state = state, trainer.run(state, 1)
            seen = np.flatnonzero(state.params != before.params)
            np.testing.assert_array_equal(seen, np.sort(order[10 * batch : 10 * batch + 10]))
            total[seen] += 1
        assert np.sum(total == epoch + 1) >= 100 - 3 * epoch
        np.testing.assert_array_equal(state.params, total)
    assert total.sum() == 300


def losses_of_two_updates_that_change_nothing(model) -> list[float]:
    """Return the losses of two updates of the same images with the same parameters."""
    trainer = Trainer(size=64, batch_size=64, model=model, optimizer=optax.set_to_zero())
    state = trainer.create()
    epoch_data = trainer.epoch(0)._replace(order=jax.device_put(np.arange(64, dtype=np.int32), EVERYWHERE))
    losses = []
    for _ in range(2):
        state = state.replace(metrics=train_state.MetricSums.zeros())
        state, sums = trainer.train_steps(state, epoch_data, np.int32(1))
        losses.append(float(sums.loss))
    return losses


def test_dropout_differs_from_step_to_step_and_is_the_same_in_every_run():
    first, second = losses_of_two_updates_that_change_nothing(DROPPING_CNN)
    assert first != second
    assert losses_of_two_updates_that_change_nothing(DROPPING_CNN) == [first, second]
    without = losses_of_two_updates_that_change_nothing(MODELS["cnn"])
    assert without[0] == without[1]


def test_another_seed_changes_an_update_by_its_dropout_and_by_its_order(trainer):
    state = trainer.create(seed=0)
    others_dropout = state.replace(rng=trainer.create(seed=1).rng)
    ends = [bits(trainer.run(start, 1, seed=seed)) for start, seed in ((state, 0), (others_dropout, 0), (state, 1))]
    kernels = {end[".params['logits']['kernel']"] for end in ends}
    assert len(kernels) == 3


def test_the_metric_sums_of_an_update_are_those_of_its_images_before_the_update():
    trainer = Trainer(model=MODELS["cnn"])
    before = trainer.run(trainer.create(), 8)
    after = trainer.run(before, 1)
    first = 8 % trainer.steps_per_epoch * trainer.batch_size
    rows = np.asarray(trainer.epoch(8 // trainer.steps_per_epoch).order)[first : first + trainer.batch_size]
    images, labels = DIGITS.train_images[rows], DIGITS.train_labels[rows]
    logits = np.asarray(trainer.model.apply({"params": before.params}, images, train=True))
    added = float(after.metrics.loss) - float(before.metrics.loss)
    # The running sum, about 300, is a float32: its last digit is worth 3e-5.
    np.testing.assert_allclose(added, cross_entropies(logits, labels).sum(), rtol=0, atol=2e-4)
    assert int(after.metrics.correct) - int(before.metrics.correct) == np.sum(logits.argmax(axis=1) == labels)
    assert int(after.metrics.images) - int(before.metrics.images) == trainer.batch_size


def test_the_loss_of_smoothed_labels_is_a_mean_of_those_of_all_classes():
    trainer, smoothing = Trainer(model=MODELS["cnn"], label_smoothing=0.2), 0.2
    start = trainer.create()
    sums = trainer.run(start, 1).metrics
    rows = np.asarray(trainer.epoch(0).order)[: trainer.batch_size]
    logits = np.asarray(trainer.model.apply({"params": start.params}, DIGITS.train_images[rows], train=True))
    by_class = [cross_entropies(logits, np.full(len(rows), label)) for label in range(10)]
    right = cross_entropies(logits, DIGITS.train_labels[rows])
    wanted = np.sum((1 - smoothing) * right + smoothing * np.mean(by_class, axis=0))
    np.testing.assert_allclose(float(sums.loss), wanted, rtol=1e-5)


def test_each_update_distorts_its_images_anew_by_its_step_and_the_key_of_the_state():
    seen = []

    def distort(images, key):
        jax.debug.callback(
            lambda key, images: seen.append((key.tobytes(), images.tobytes())), jax.random.key_data(key), images
        )
        return images

    trainer = Trainer(augment=distort)
    for _ in range(2):
        trainer.run(trainer.create(), 3)
    jax.effects_barrier()
    assert seen[:3] == seen[3:]
    assert len({key for key, _ in seen}) == 3
    rows = np.asarray(trainer.epoch(0).order)[: trainer.batch_size]
    assert seen[0][1] == DIGITS.train_images[rows].tobytes()


def test_the_average_of_the_weights_follows_them_and_forgets_the_first_ones_soon():
    trainer = Trainer(model=MODELS["cnn"], average_decay=0.5)
    state = trainer.create()
    wanted = np.asarray(state.params["conv1"]["kernel"], np.float64)
    for step in range(12):
        state = trainer.run(state, 1)
        kept = min(0.5, (1 + step) / (5 + step))
        wanted = kept * wanted + (1 - kept) * np.asarray(state.params["conv1"]["kernel"])
    np.testing.assert_allclose(state.average["params"]["conv1"]["kernel"], wanted, rtol=0, atol=1e-6)
    assert state.eval_variables is state.average


def test_running_statistics_are_those_that_the_updates_leave_and_are_averaged_like_the_weights():
    trainer = Trainer(model=NORMALIZING_CNN, average_decay=0.5, optimizer=optax.set_to_zero())
    start = trainer.create()
    end = trainer.run(start, 3)
    variables, stats = start.variables, []
    for rows in np.split(np.asarray(trainer.epoch(0).order)[: 3 * trainer.batch_size], 3):
        _, changed = trainer.model.apply(
            variables,
            DIGITS.train_images[rows],
            train=True,
            rngs={"dropout": jax.random.key(0)},  # It changes no mean of the first layer.
            mutable=["batch_stats"],
        )
        variables = {**variables, **changed}
        stats.append(jax.tree.map(np.asarray, variables["batch_stats"]["conv1_norm"]))
    for name, average in (("mean", 0.0), ("var", 1.0)):
        np.testing.assert_allclose(end.batch_stats["conv1_norm"][name], stats[-1][name], rtol=1e-4, atol=1e-6)
        for step, after in enumerate(stats):
            kept = min(0.5, (1 + step) / (5 + step))
            average = kept * average + (1 - kept) * after[name]
        np.testing.assert_allclose(end.average["batch_stats"]["conv1_norm"][name], average, rtol=1e-4, atol=1e-6)


def test_without_a_decay_there_is_no_average():
    trainer = Trainer(model=MODELS["cnn"])
    state = trainer.run(trainer.create(), 1)
    assert state.average is None
    assert state.eval_variables["params"] is state.params


def test_a_call_may_take_its_state_for_itself_and_its_metric_sums_outlive_the_next_call():
    trainer = Trainer(donate=True)
    state, epoch_data = trainer.create(), trainer.epoch(0)
    after, sums = trainer.train_steps(state, epoch_data, np.int32(2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    held = jax.tree.map(float, sums)
    last, _ = trainer.train_steps(after, epoch_data, np.int32(2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(after))
    assert jax.tree.map(float, sums) == held
    assert held.images == 32
    assert int(last.metrics.images) == 64
    assert not epoch_data.images.is_deleted()


@pytest.fixture(scope="module")
def trained() -> tuple[Trainer, Any, Any]:
    """A trainer, and its state before and after 50 updates."""
    trainer = Trainer(size=1438, batch_size=32, model=MODELS["cnn"])
    start = trainer.create()
    return trainer, start, trainer.run(start, 50)


def test_a_short_training_makes_most_of_the_test_images_right(trained):
    trainer, start, end = trained

    def mean_loss_and_accuracy(params):
        logits = np.asarray(trainer.model.apply({"params": params}, DIGITS.test_images, train=False))
        right = logits.argmax(axis=1) == DIGITS.test_labels
        return cross_entropies(logits, DIGITS.test_labels).mean(), right.mean()

    loss_before, accuracy_before = mean_loss_and_accuracy(start.params)
    loss, accuracy = mean_loss_and_accuracy(end.params)
    assert loss_before > 2
    assert accuracy_before < 0.3
    assert loss < 0.5
    assert accuracy > 0.85


@pytest.mark.parametrize("size", [7, 100, 359, 360, 500])
def test_an_evaluation_counts_each_image_once_whatever_the_size_of_its_calls(trained, size):
    trainer, _, state = trained
    compilations = []

    @jax.jit
    def evaluate(variables, images, labels, first):
        compilations.append(first)
        on_batch = {"model": trainer.model, "batch_sharding": BATCH_SHARDING}
        return train_step.evaluate(variables, images, labels, first, size=size, **on_batch)[0]

    images, labels = DIGITS.test_images, DIGITS.test_labels
    assert len(labels) == 359
    calls = [evaluate(state.variables, images, labels, np.int32(first)) for first in range(0, len(labels), size)]
    assert len(compilations) == 1
    assert [int(sums.images) for sums in calls[:-1]] == [size] * (len(calls) - 1)
    logits = np.asarray(trainer.model.apply({"params": state.params}, images, train=False))
    assert sum(int(sums.images) for sums in calls) == len(labels)
    assert sum(int(sums.correct) for sums in calls) == np.sum(logits.argmax(axis=1) == labels)
    # Sums of float32 losses: some dozens of roundings of 6e-8 each.
    wanted = cross_entropies(logits, labels).sum()
    np.testing.assert_allclose(sum(float(sums.loss) for sums in calls), wanted, rtol=1e-5)


def test_cross_entropy_and_right_answers_are_those_of_numpy():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(scale=5, size=(50, 10)).astype(np.float32), rng.integers(0, 10, 50)
    np.testing.assert_allclose(
        train_step.cross_entropy(logits, labels), cross_entropies(logits, labels), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(train_step.is_correct(logits, labels), logits.argmax(axis=1) == labels)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_found_in_any_leaf(trainer, bad):
    is_finite = jax.jit(train_step.is_finite)
    state = trainer.create()
    assert is_finite(state)
    leaves, structure = jax.tree.flatten(state)
    floating = [index for index, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    params, running = 11, 6  # 4 kernels, 4 biases and 3 scales; 3 means and 3 variances
    assert len(floating) == 4 * params + 2 * running + 1  # each also averaged, two moments, the sum of the losses
    for index in floating:
        damaged = np.array(leaves[index])
        damaged.reshape(-1)[-1] = bad
        # Where it lay before, or the program would be compiled anew.
        changed = [*leaves[:index], jax.device_put(damaged, leaves[index].sharding), *leaves[index + 1 :]]
        assert not is_finite(jax.tree.unflatten(structure, changed))


def test_a_training_step_asks_for_nothing_from_the_host(trainer):
    state = trainer.run(trainer.create(), 1)
    epoch_data, n = trainer.epoch(0), jax.device_put(np.int32(3), EVERYWHERE)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(trainer.train_steps(state, epoch_data, n))
