import hashlib
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import numbers
from runs import in_new_process

from mnist_jax.config import Config
from mnist_jax.runtime import compilation_cache, devices
from mnist_jax.training import data, train_state, train_step
from mnist_jax.training import trainer as trainer_module
from mnist_jax.training.model import MODELS, Network
from mnist_jax.training.train_step import TrainData
from mnist_jax.training.trainer import Trainer

DIGITS = data.load("digits", notify=print)
# Each kind of convolution, dropout and normalization.
MODELS["tiny-large"] = Network(
    features=(2, 3), kernel_sizes=(5, 3), unpooled=(2,), hidden=8, batch_norm=True, batch_statistics=True, dropout=0.5
)


def trainer_on(count: int, *, model: str) -> Trainer:
    config = Config(model=model, dataset="digits", batch_size=32, steps=100)
    mesh = devices.make_mesh(devices=jax.devices()[:count])
    return Trainer(config, mesh, train_size=len(DIGITS.train_labels), test_size=len(DIGITS.test_labels))


def epoch_data(trainer: Trainer) -> TrainData:
    return TrainData(*trainer.put(DIGITS)[:2], trainer.epoch_order(0))


def assert_equal(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(numbers(found), numbers(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return trainer_on(1, model="cnn-tiny")


@pytest.fixture
def state(trainer: Trainer, initial: Any) -> Any:
    """The initial state; its buffers may be donated."""
    return jax.tree.map(jnp.copy, initial)


@pytest.fixture(scope="module")
def initial(trainer: Trainer) -> Any:
    return trainer.init_state()


def test_the_initial_state_is_as_the_abstract_state_says(trainer, initial):
    assert jax.tree.structure(trainer.abstract_state) == jax.tree.structure(initial)
    for wanted, leaf in zip(jax.tree.leaves(trainer.abstract_state), jax.tree.leaves(initial), strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.sharding == wanted.sharding == devices.replicated(trainer.mesh)


def test_compiled_functions_have_the_bits_of_the_pure_functions(trainer, state):
    config, model = trainer.config, MODELS["cnn-tiny"].clone(for_cpu=True)
    schedule = train_state.make_schedule(config, trainer.total_steps)
    optimizer = train_state.make_optimizer(config, schedule)
    fixed = {"model": model, "mesh": trainer.mesh}
    compiled = partial(jax.jit, compiler_options=trainer_module.CPU_OPTIONS)
    training = epoch_data(trainer)
    np.testing.assert_array_equal(training.order, train_step.epoch_order(config.seed, 0, trainer.train_size))

    train = compiled(partial(train_step.train_steps, config=config, optimizer=optimizer, **fixed))
    wanted = train(state, training, np.int32(3))
    trained = trainer.train_steps(state, training, np.int32(3))
    assert_equal(trained, wanted)

    evaluate = compiled(partial(train_step.evaluate, size=trainer.eval_call_images, **fixed))
    arguments = trained[0].variables, *trainer.put(DIGITS)[2:], np.int32(0)
    assert_equal(trainer.evaluate(*arguments), evaluate(*arguments))
    assert float(trainer.learning_rate(np.int32(30))) == float(jax.jit(schedule)(np.int32(30)))
    good = trained[0]
    assert trainer.is_finite(good)
    nan = jax.device_put(jnp.float32(np.nan), devices.replicated(trainer.mesh))
    assert not trainer.is_finite(good.replace(metrics=good.metrics.replace(loss=nan)))


@pytest.mark.parametrize(
    ("runtime", "count", "version", "flags", "is_graph"),
    [
        ("cuda 13000", 1, (0, 11, 2), "--xla_gpu_deterministic_ops=true", True),
        ("PJRT C API\ncuda 13000", 1, (0, 11, 0), "", True),
        ("PJRT C API\ncuda 13000", 1, (0, 10, 2), "", False),
        ("cuda 13000", 2, (0, 11, 2), "", False),
        ("cuda 13000", 1, (0, 11, 2), "--xla_gpu_enable_command_buffer=", False),
        ("rocm 70000", 1, (0, 11, 2), "", False),
        ("cpu", 1, (0, 11, 2), "", False),
    ],
)
def test_a_call_is_one_graph_on_one_nvidia_gpu(monkeypatch, runtime, count, version, flags, is_graph):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setattr(jax, "__version_info__", version)
    device = SimpleNamespace(client=SimpleNamespace(platform_version=runtime))
    mesh: Any = SimpleNamespace(devices=np.array([device] * count), size=count)
    options = trainer_module.choose_graph_options(mesh)
    assert (options is not None) == is_graph
    # Unknown options of a GPU are refused on a CPU too, and so are unknown values.
    assert jax.jit(lambda x: x + 1, compiler_options=options).lower(1).compile()(1) == 2


def test_cudnn_is_initialized_where_a_call_is_a_graph(monkeypatch):
    """Without it each start that found its programs in the cache failed on a GPU; compiling them initializes it."""
    convolve, results = jax.lax.conv_general_dilated, []

    def convolve_and_record(*args: Any, **options: Any) -> Any:
        results.append(convolve(*args, **options))
        return results[-1]

    monkeypatch.setattr(jax.lax, "conv_general_dilated", convolve_and_record)
    monkeypatch.setattr(trainer_module, "choose_graph_options", lambda mesh: {trainer_module.GRAPH_FLAG: "UNKNOWN"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNKNOWN"):  # The options reach the compiler.
        _ = trainer_on(1, model="cnn-tiny").train_steps
    assert len([result for result in results if not isinstance(result, jax.core.Tracer)]) == 1


def test_training_donates_the_state_and_keeps_its_metric_sums(trainer, state):
    training = epoch_data(trainer)
    after, sums = trainer.train_steps(state, training, np.int32(2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    held = numbers(sums)
    last, _ = trainer.train_steps(after, training, np.int32(2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(after))
    assert numbers(sums) == held
    assert (int(sums.images), int(last.metrics.images)) == (64, 128)
    assert not any(leaf.is_deleted() for leaf in training)


def test_a_short_training_learns_the_digits(trainer, state):
    dataset = trainer.put(DIGITS)

    def accuracy() -> float:
        sums, _ = trainer.evaluate(state.variables, dataset.test_images, dataset.test_labels, np.int32(0))
        return int(sums.correct) / int(sums.images)

    assert accuracy() < 0.3
    for step in range(0, 2 * trainer.steps_per_epoch, 22):
        state, _ = trainer.advance(state, dataset, step=step, n=22)
    assert accuracy() > 0.8


def train_on(counts: list[int]) -> list[dict[str, Any]]:
    """Return the results of a short training on each number of devices, with the dropout of two seeds."""
    trainer_module.EVAL_CALL_IMAGES = 90  # so that an evaluation takes several calls, and 4 does not divide it
    results = []
    initial = jax.tree.map(jax.device_get, trainer_on(1, model="tiny-large").init_state().replace(rng=None))
    for count in counts:
        trainer = trainer_on(count, model="tiny-large")
        training, (*_, images, labels) = epoch_data(trainer), trainer.put(DIGITS)
        losses = []
        for seed in (0, 1):
            state = jax.device_put(initial.replace(rng=jax.random.key(seed)), devices.replicated(trainer.mesh))
            state, sums = trainer.train_steps(state, training, np.int32(1))
            losses.append(float(sums.loss))
        state, sums = trainer.train_steps(state, training, np.int32(19))
        firsts = range(0, len(labels), trainer.eval_call_images)
        parts = [trainer.evaluate(state.variables, images, labels, np.int32(first))[0] for first in firsts]
        results.append(
            {
                "first losses": losses,
                "loss": float(sums.loss),
                "evaluation": [sum(map(float, values)) for values in zip(*map(jax.tree.leaves, parts), strict=True)],
                "eval_call_images": trainer.eval_call_images,
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


def test_four_devices_share_each_batch_and_train_like_one():
    four = "--xla_force_host_platform_device_count=4"
    one, found = in_new_process(train_on, [1, 4], XLA_FLAGS=four, JAX_PLATFORMS="cpu")
    assert [one["eval_call_images"], found["eval_call_images"]] == [90, 92]
    assert found["replicated"]
    assert found["equal"]
    # Each device computes its share of the batch. All devices compute the update of the parameters, a few percent.
    assert found["flops"] < 1.15 * one["flops"] / 4
    # The same dropout masks, and normalization by the whole batch: only the order of float32 sums differs.
    assert abs(one["first losses"][0] - one["first losses"][1]) > 1e-3 * one["first losses"][0]
    np.testing.assert_allclose(found["first losses"], one["first losses"], rtol=1e-5)
    # Adam divides by the size of the gradients, and 20 updates make the roundings some thousand times larger.
    np.testing.assert_allclose(found["loss"], one["loss"], rtol=1e-4)
    np.testing.assert_allclose(found["evaluation"][0], one["evaluation"][0], rtol=1e-3)
    assert found["evaluation"][2] == one["evaluation"][2] == 359


def sha256_of_a_training() -> list[Any]:
    """Return a digest of the bits of a short training, and whether its program came from the cache on disk."""
    compilation_cache.enable(devices.cpu_threads)
    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
    trainer = trainer_on(1, model="cnn")  # Its operations are large enough to be divided among threads.
    assert trainer.train_steps
    found = len(hits)
    rng = np.random.default_rng(0)

    def draw(leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        return rng.uniform(0, 0.1, leaf.shape).astype(leaf.dtype)

    order = jnp.arange(trainer.train_size, dtype=jnp.int32)
    training = TrainData(*trainer.put(DIGITS)[:2], order)
    arguments = jax.device_put((jax.tree.map(draw, trainer.abstract_state), training), devices.replicated(trainer.mesh))
    state, _ = trainer.train_steps(*arguments, np.int32(20))
    return [hashlib.sha256(b"".join(leaf.tobytes() for leaf in numbers(state))).hexdigest(), found]


def test_programs_are_found_in_a_moved_cache_for_the_same_number_of_threads(tmp_path):
    """XLA splits loops for the threads, so a program for another number would be slower."""

    def run(threads: int, name: str) -> list[Any]:
        variables = {"PJRT_NPROC": str(threads), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / name)}
        return in_new_process(sha256_of_a_training, JAX_PLATFORMS="cpu", **variables)

    compiled, found_in_none = run(2, "cache")
    (tmp_path / "cache").rename(tmp_path / "moved")
    from_cache, found = run(2, "moved")
    assert (found_in_none, found) == (0, 1)
    assert from_cache == compiled
    assert run(1, "moved")[1] == 0
