import hashlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from runs import in_new_process

from mnist_jax.config import Config
from mnist_jax.runtime import devices
from mnist_jax.training import data, train_state, train_step
from mnist_jax.training import trainer as trainer_module
from mnist_jax.training.model import MODELS
from mnist_jax.training.train_step import TrainData
from mnist_jax.training.trainer import Trainer

STEPS = 20


def trainer_on(count: int, *, model: str = "cnn", batch_size: int = 32) -> Trainer:
    dataset = data.load("digits", notify=print)
    mesh = Mesh(np.asarray(jax.devices()[:count]), (devices.BATCH_AXIS,))
    config = Config(model=model, dataset="digits", batch_size=batch_size, steps=100)
    return Trainer(config, mesh, train_size=len(dataset.train_labels), test_size=len(dataset.test_labels))


def place(trainer: Trainer, *arrays: np.ndarray) -> Any:
    return jax.device_put(arrays, devices.replicated(trainer.mesh))


def epoch_data(trainer: Trainer) -> TrainData:
    dataset = data.load("digits", notify=print)
    images, labels = place(trainer, dataset.train_images, dataset.train_labels)
    return TrainData(images, labels, trainer.epoch_order(np.int32(0)))


def evaluate(trainer: Trainer, variables: Any) -> list[float]:
    """Return loss, right answers and images over the whole test set."""
    dataset = data.load("digits", notify=print)
    images, labels = place(trainer, dataset.test_images, dataset.test_labels)
    firsts = range(0, len(dataset.test_labels), trainer.eval_call_images)
    parts = [trainer.evaluate(variables, images, labels, np.int32(first))[0] for first in firsts]
    return [sum(float(value) for value in values) for values in zip(*map(jax.tree.leaves, parts), strict=True)]


def numbers(tree: Any) -> list[np.ndarray]:
    """Return the leaves, of keys their numbers."""
    leaves = jax.tree.leaves(tree)
    is_key = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    return [np.asarray(jax.random.key_data(leaf) if key else leaf) for leaf, key in zip(leaves, is_key, strict=True)]


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return trainer_on(1)


def test_the_state_is_created_as_the_abstract_state_says(trainer):
    abstract, state = trainer.abstract_state, trainer.init_state()
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for wanted, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.sharding == wanted.sharding == devices.replicated(trainer.mesh)


def test_the_jitted_functions_compute_what_the_pure_functions_do(trainer):
    config, model = trainer.config, MODELS["cnn"].clone(for_cpu=True)
    schedule = train_state.make_schedule(config, trainer.total_steps)
    optimizer = train_state.make_optimizer(config, schedule)
    sharding = devices.split_over_batch(trainer.mesh)
    on_batch = {"model": model, "batch_sharding": sharding}
    compiled = partial(jax.jit, compiler_options=trainer_module.CPU_OPTIONS)
    train = compiled(partial(train_step.train_steps, optimizer=optimizer, batch_size=config.batch_size, **on_batch))

    state = compiled(lambda: train_state.create(config, model, optimizer))()
    assert_equal(trainer.init_state(), state)
    for epoch in (0, 3):
        np.testing.assert_array_equal(
            trainer.epoch_order(np.int32(epoch)), train_step.epoch_order(config.seed, epoch, trainer.train_size)
        )
    training = epoch_data(trainer)
    trained = train(state, training, np.int32(3))
    assert_equal(trainer.train_steps(trainer.init_state(), training, np.int32(3)), trained)

    variables = trained[0].variables
    dataset = data.load("digits", notify=print)
    images, labels = place(trainer, dataset.test_images, dataset.test_labels)
    plainly = compiled(partial(train_step.evaluate, size=trainer.eval_call_images, **on_batch))
    on_devices = jax.device_put(variables, devices.replicated(trainer.mesh))
    assert_equal(
        trainer.evaluate(on_devices, images, labels, np.int32(0)),
        plainly(variables, images, labels, np.int32(0)),
    )
    for step in (0, 30, 99):
        assert float(trainer.learning_rate(np.int32(step))) == float(jax.jit(schedule)(np.int32(step)))
    good = devices.local_replica(trainer.init_state())
    assert trainer.is_finite(good)
    bad = good.metrics.replace(loss=jnp.float32(np.nan))
    assert not trainer.is_finite(good.replace(metrics=bad))


def assert_equal(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(numbers(found), numbers(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_training_takes_the_buffers_of_the_state_and_its_metric_sums_outlive_the_next_call(trainer):
    state, training = trainer.init_state(), epoch_data(trainer)
    after, sums = trainer.train_steps(state, training, np.int32(2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    held = [float(value) for value in jax.tree.leaves(sums)]
    trainer.train_steps(after, training, np.int32(2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(after))
    assert [float(value) for value in jax.tree.leaves(sums)] == held
    assert not any(leaf.is_deleted() for leaf in training)


def train_on(counts: list[int]) -> list[dict[str, Any]]:
    """Return how the first steps of a training go, for each number of devices."""
    trainer_module.EVAL_CALL_IMAGES = 90  # so that an evaluation takes several calls, and 4 does not divide it
    results = []
    for number in counts:
        trainer = trainer_on(number)
        training = epoch_data(trainer)
        state, sums = trainer.train_steps(trainer.init_state(), training, np.int32(STEPS))
        results.append(
            {
                "loss": float(sums.loss),
                "evaluation": evaluate(trainer, state.variables),
                "eval_call_images": trainer.eval_call_images,
                "step": int(state.step),
                "replicas": sorted({len(leaf.addressable_shards) for leaf in jax.tree.leaves(state)}),
                "replicated": all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((state, sums))),
                "equal": all(
                    np.array_equal(shard.data, leaf.addressable_shards[0].data)
                    for leaf in jax.tree.leaves(state.variables)
                    for shard in leaf.addressable_shards
                ),
                "flops": trainer.train_steps.cost_analysis()["flops"],
            }
        )
    return results


def test_two_and_four_devices_share_each_batch_and_train_as_one_device_does():
    four = "--xla_force_host_platform_device_count=4"
    one, *others = in_new_process(train_on, [1, 2, 4], XLA_FLAGS=four, JAX_PLATFORMS="cpu")
    assert [found["eval_call_images"] for found in (one, *others)] == [90, 90, 92]
    assert one["step"] == STEPS
    assert one["loss"] / (STEPS * 32) < 2.0  # It learns: at chance it would be 2.3.
    for number, found in zip((2, 4), others, strict=True):
        assert found["step"] == STEPS
        assert found["replicas"] == [number]
        assert found["replicated"]
        assert found["equal"]
        # Each device computes its share of the batch; the update of the parameters, a few percent, all of them do.
        assert found["flops"] < 1.15 * one["flops"] / number
        # The devices' sums are added up in another order: a rounding of 6e-8 in the gradients, which Adam, dividing
        # by their size, and 20 updates of 7e-3 make some thousand times larger.
        np.testing.assert_allclose(found["loss"], one["loss"], rtol=1e-4)
        np.testing.assert_allclose(found["evaluation"][0], one["evaluation"][0], rtol=1e-3)
        assert found["evaluation"][2] == one["evaluation"][2] == 359


def first_losses(model: str, counts: list[int]) -> list[list[float]]:
    """Return the loss of the first update for each number of devices, with the dropout of two seeds."""
    losses = []
    for number in counts:
        trainer = trainer_on(number, model=model)
        training = epoch_data(trainer)
        losses.append([])
        for seed in (0, 1):
            state = trainer.init_state()
            key = jax.device_put(jax.random.key(seed), devices.replicated(trainer.mesh))
            _, sums = trainer.train_steps(state.replace(rng=key), training, np.int32(1))
            losses[-1].append(float(sums.loss))
    return losses


@pytest.mark.parametrize("model", ["cnn-large"])  # It has both.
def test_dropout_drops_the_same_units_and_a_batch_is_normalized_whole_whatever_the_number_of_devices(model):
    four = "--xla_force_host_platform_device_count=4"
    one, *others = in_new_process(first_losses, model, [1, 4], XLA_FLAGS=four, JAX_PLATFORMS="cpu")
    assert abs(one[0] - one[1]) > 1e-3 * one[0]  # Other masks are seen in the loss.
    for found in others:
        # The same update but for the order of float32 sums.
        np.testing.assert_allclose(found, one, rtol=1e-5)


def sha256_of_a_training() -> list[Any]:
    """Return the bits that a short training ends in, and how many programs came from the cache on disk."""
    devices.enable_compilation_cache()
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
    trainer = trainer_on(1)
    trainer.compile()
    found = len(hits)
    training = epoch_data(trainer)
    state, *_ = trainer.train_steps(trainer.init_state(), training, np.int32(STEPS))
    digest = hashlib.sha256(b"".join(leaf.tobytes() for leaf in numbers(state))).hexdigest()
    return [digest, found]


def test_a_program_compiled_under_a_thread_pool_of_another_size_ends_in_the_same_bits(tmp_path):
    shared, fresh = ({"JAX_COMPILATION_CACHE_DIR": str(tmp_path / name)} for name in ("shared", "fresh"))
    one = {"PJRT_NPROC": "1", "JAX_PLATFORMS": "cpu"}
    two = {"PJRT_NPROC": "2", "JAX_PLATFORMS": "cpu"}
    in_new_process(sha256_of_a_training, **one, **shared)
    from_cache, programs_found = in_new_process(sha256_of_a_training, **two, **shared)
    compiled, programs_before = in_new_process(sha256_of_a_training, **two, **fresh)
    assert (programs_found, programs_before) == (5, 0)
    assert from_cache == compiled
