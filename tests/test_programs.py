import hashlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from runs import in_new_process

from mnist_jax import data, distributed, steps, train_state
from mnist_jax import programs as programs_module
from mnist_jax.config import Config
from mnist_jax.model import MODELS
from mnist_jax.programs import Blueprint, Programs
from mnist_jax.steps import TrainData

STEPS = 20


def source_on(devices: int, *, model: str = "cnn", batch_size: int = 32) -> Blueprint:
    dataset = data.load("digits", say=print)
    mesh = Mesh(np.asarray(jax.devices()[:devices]), (distributed.BATCH_AXIS,))
    config = Config(model=model, dataset="digits", batch_size=batch_size)
    return Blueprint(config, 100, len(dataset.train_labels), len(dataset.test_labels), mesh)


def place(source: Blueprint, *arrays: np.ndarray) -> Any:
    return jax.device_put(arrays, distributed.replicated(source.mesh))


def silence(source: Blueprint) -> np.ndarray:
    """Return what a process that is alone tells the others."""
    return np.zeros((source.mesh.size, 0), np.int32)


def epoch_data(source: Blueprint, programs: Programs) -> TrainData:
    dataset = data.load("digits", say=print)
    images, labels = place(source, dataset.train_images, dataset.train_labels)
    return TrainData(images, labels, programs.epoch_order(np.int32(0)))


def evaluate(source: Blueprint, programs: Programs, variables: Any) -> list[float]:
    """Return loss, right answers and images over the whole test set."""
    dataset = data.load("digits", say=print)
    images, labels = place(source, dataset.test_images, dataset.test_labels)
    firsts = range(0, len(dataset.test_labels), programs.eval_call_images)
    parts = [programs.evaluate(variables, images, labels, np.int32(first), silence(source))[0] for first in firsts]
    return [sum(float(value) for value in values) for values in zip(*map(jax.tree.leaves, parts), strict=True)]


def numbers(tree: Any) -> list[np.ndarray]:
    """Return the leaves, of keys their numbers."""
    leaves = jax.tree.leaves(tree)
    is_key = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    return [np.asarray(jax.random.key_data(leaf) if key else leaf) for leaf, key in zip(leaves, is_key, strict=True)]


@pytest.fixture(scope="module")
def source() -> Blueprint:
    return source_on(1)


@pytest.fixture(scope="module")
def programs(source) -> Programs:
    return source.compile()


def test_the_state_is_created_as_the_abstract_state_says(source, programs):
    abstract, state = source.abstract_state, source.create()
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    for wanted, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.sharding == wanted.sharding == distributed.replicated(source.mesh)


def test_the_programs_compute_what_the_functions_do_that_they_are_made_of(source, programs):
    config, model = source.config, MODELS["cnn"].clone(for_cpu=True)
    schedule = train_state.make_schedule(config, source.total_steps)
    optimizer = train_state.make_optimizer(config, schedule)
    sharding = distributed.split_over_batch(source.mesh)
    on_batch = {"model": model, "batch_sharding": sharding}
    compiled = partial(jax.jit, compiler_options=programs_module.CPU_OPTIONS)
    train = compiled(partial(steps.train_steps, optimizer=optimizer, batch_size=config.batch_size, **on_batch))

    state = compiled(lambda: train_state.create(config, model, optimizer))()
    assert_equal(source.create(), state)
    for epoch in (0, 3):
        np.testing.assert_array_equal(
            programs.epoch_order(np.int32(epoch)), steps.epoch_order(config.seed, epoch, source.train_size)
        )
    training = epoch_data(source, programs)
    trained = train(state, training, np.int32(3), silence(source))
    assert_equal(programs.train_steps(source.create(), training, np.int32(3), silence(source)), trained)

    variables = trained[0].variables
    dataset = data.load("digits", say=print)
    images, labels = place(source, dataset.test_images, dataset.test_labels)
    plainly = compiled(partial(steps.evaluate, size=programs.eval_call_images, **on_batch))
    on_devices = jax.device_put(variables, distributed.replicated(source.mesh))
    assert_equal(
        programs.evaluate(on_devices, images, labels, np.int32(0), silence(source)),
        plainly(variables, images, labels, np.int32(0), silence(source)),
    )
    for step in (0, 30, 99):
        assert float(programs.learning_rate(np.int32(step))) == float(jax.jit(schedule)(np.int32(step)))
    good = distributed.one_copy(source.create())
    assert programs.is_finite(good)
    bad = good.metrics.replace(loss=jnp.float32(np.nan))
    assert not programs.is_finite(good.replace(metrics=bad))


def assert_equal(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(numbers(found), numbers(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_training_takes_the_buffers_of_the_state_and_its_metric_sums_outlive_the_next_call(source, programs):
    state, training = source.create(), epoch_data(source, programs)
    after, sums, _ = programs.train_steps(state, training, np.int32(2), silence(source))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    held = [float(value) for value in jax.tree.leaves(sums)]
    programs.train_steps(after, training, np.int32(2), silence(source))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(after))
    assert [float(value) for value in jax.tree.leaves(sums)] == held
    assert not any(leaf.is_deleted() for leaf in training)


def train_on(devices: list[int]) -> list[dict[str, Any]]:
    """Return how the first steps of a training go, for each number of devices."""
    programs_module.EVAL_CALL_IMAGES = 90  # so that an evaluation takes several calls, and 4 does not divide it
    results = []
    for number in devices:
        source = source_on(number)
        programs = source.compile()
        training = epoch_data(source, programs)
        state, sums, _ = programs.train_steps(source.create(), training, np.int32(STEPS), silence(source))
        results.append(
            {
                "loss": float(sums.loss),
                "evaluation": evaluate(source, programs, state.variables),
                "eval_call_images": programs.eval_call_images,
                "step": int(state.step),
                "replicas": sorted({len(leaf.addressable_shards) for leaf in jax.tree.leaves(state)}),
                "replicated": all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((state, sums))),
                "equal": all(
                    np.array_equal(shard.data, leaf.addressable_shards[0].data)
                    for leaf in jax.tree.leaves(state.variables)
                    for shard in leaf.addressable_shards
                ),
                "flops": programs.train_steps.cost_analysis()["flops"],
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


def first_losses(model: str, devices: list[int]) -> list[list[float]]:
    """Return the loss of the first update for each number of devices, with the dropout of two seeds."""
    losses = []
    for number in devices:
        source = source_on(number, model=model)
        programs = source.compile()
        training = epoch_data(source, programs)
        losses.append([])
        for seed in (0, 1):
            state = source.create()
            key = jax.device_put(jax.random.key(seed), distributed.replicated(source.mesh))
            _, sums, _ = programs.train_steps(state.replace(rng=key), training, np.int32(1), silence(source))
            losses[-1].append(float(sums.loss))
    return losses


@pytest.mark.parametrize("model", ["original-dropout", "cnn-large"])
def test_dropout_drops_the_same_units_and_a_batch_is_normalized_whole_whatever_the_number_of_devices(model):
    four = "--xla_force_host_platform_device_count=4"
    one, *others = in_new_process(first_losses, model, [1, 4], XLA_FLAGS=four, JAX_PLATFORMS="cpu")
    assert abs(one[0] - one[1]) > 1e-3 * one[0]  # Other masks are seen in the loss.
    for found in others:
        # The same update but for the order of float32 sums.
        np.testing.assert_allclose(found, one, rtol=1e-5)


def sha256_of_a_training() -> list[Any]:
    """Return the bits that a short training ends in, and how many programs came from the cache on disk."""
    distributed.keep_compiled_programs()
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
    source = source_on(1)
    programs = source.compile()
    found = len(hits)
    training = epoch_data(source, programs)
    state, *_ = programs.train_steps(source.create(), training, np.int32(STEPS), silence(source))
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
