import dataclasses
import enum
import errno
import functools
import gc
import hashlib
import inspect
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import jax
import jax.monitoring
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore
from flax import nnx
from flax.training.train_state import TrainState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnist_jax.checkpoint import integrity
from mnist_jax.checkpoint.checkpointer import (
    Checkpoint,
    Checkpointer,
    InvalidStateError,
    NoGoodCheckpointError,
    Notice,
    ReadError,
    Saved,
    SaveError,
    list_checkpoints,
)
from mnist_jax.checkpoint.integrity import CheckpointError, CorruptCheckpointError, IncompatibleCheckpointError

UNFINISHED = ".orbax-checkpoint-tmp"  # Orbax's
WRITTEN_LAST = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # by Orbax, after the manifest


def make_state(seed: int = 0) -> dict:
    """A train state in small: parameters, a counter, a typed random key, nesting, several types, an odd size, none."""
    rng = np.random.default_rng(seed)
    return {
        "params": {"dense": {"kernel": jnp.asarray(rng.standard_normal((30, 20)), jnp.float32)}},
        "opt_state": (jnp.asarray(rng.standard_normal(7), jnp.bfloat16), {"count": jnp.int32(seed)}),
        "rng": jax.random.key(seed),
        "mask": jnp.asarray([True, False, bool(seed % 2)]),
        "empty": jnp.zeros((0, 3)),
        "none": None,
    }


def bits(state) -> list[bytes]:
    return [np.asarray(integrity.raw(leaf)).tobytes() for leaf in jax.tree.leaves(state)]


def kind(leaf) -> tuple:
    """What has to be the same in a restored leaf, but for its bits."""
    array = np.asarray(integrity.raw(leaf))
    return type(leaf), getattr(leaf, "dtype", None), array.dtype, array.shape, getattr(leaf, "sharding", None)


def assert_same(restored, state) -> None:
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for (path, leaf), wanted in zip(jax.tree_util.tree_leaves_with_path(restored), jax.tree.leaves(state), strict=True):
        assert kind(leaf) == kind(wanted), integrity.leaf_name(path)
        assert bits(leaf) == bits(wanted), integrity.leaf_name(path)


@pytest.fixture
def checkpointer(tmp_path):
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", keep=3)
    yield checkpointer
    checkpointer.close()


@pytest.fixture
def reopen(checkpointer):
    """Open the directory again, as a next process does."""
    opened = []

    def reopen() -> Checkpointer:
        opened.append(Checkpointer(checkpointer.directory))
        return opened[-1]

    yield reopen
    for again in opened:
        again.close()


class Held:
    """A `valid` that is known when `release` is called: until then nothing is written."""

    def __init__(self):
        self._known = threading.Event()
        self.release = self._known.set

    def __bool__(self):
        assert self._known.wait(60)
        return True


def fail_with(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


def fail_where(function, matches, error: Exception):
    """Return `function`, but for calls whose first argument matches: they raise."""

    def call(first, *args, **kwargs):
        if matches(first):
            raise error
        return function(first, *args, **kwargs)

    return call


def path_of(file: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{file}"))


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "removed" or list(path.iterdir()))


# ---- Save and restore -----------------------------------------------------------------------------------------------


def test_restored_state_is_the_saved_one_bit_for_bit(checkpointer, reopen):
    state = make_state()
    digest = checkpointer.save_and_wait(5, state, metadata={"reason": "test"})
    again = reopen()
    restored = again.restore(like=jax.eval_shape(make_state))
    assert restored.step == 5
    assert_same(restored.state, state)
    assert restored.metadata == {"reason": "test"}
    assert again.state_sha256(5) == digest == restored.state_sha256
    assert digest == integrity.json_sha256(integrity.digest_leaves(state))
    assert restored.quarantined == ()


def test_checkpoint_is_readable_by_a_relative_path(checkpointer, monkeypatch):
    checkpointer.save_and_wait(5, make_state(), metadata={"note": [1, None, "ü"]})
    monkeypatch.chdir(checkpointer.directory.parent)
    [found] = list_checkpoints(Path("checkpoints"))
    state, metadata = found.read(make_state())
    assert_same(state, make_state())
    assert metadata == found.metadata() == {"note": [1, None, "ü"]}
    assert found.verify() == found.manifest()
    assert found.bytes == sum(path.stat().st_size for path in found.path.rglob("*") if path.is_file())


def test_restore_without_checkpoints_is_none(checkpointer):
    assert checkpointer.restore(like=make_state()) is None
    assert checkpointer.steps == []
    assert checkpointer.newest_step == 0


def test_save_returns_before_anything_is_written(checkpointer):
    held = Held()
    checkpointer.save(1, make_state(), valid=held)
    assert checkpointer.is_saving
    assert checkpointer.results() == []
    assert checkpointer.steps == []
    assert names_in(checkpointer.directory) == []
    held.release()
    checkpointer.wait()
    assert not checkpointer.is_saving
    [saved] = checkpointer.results()
    assert isinstance(saved, Saved)
    assert (saved.step, saved.state_sha256) == (1, checkpointer.state_sha256(1))
    assert checkpointer.results() == []
    assert checkpointer.steps == [1]
    assert checkpointer.newest_step == 1


def test_donated_and_overwritten_buffers_do_not_change_what_is_saved(checkpointer):
    held = Held()
    state = {"w": jnp.arange(100_000, dtype=jnp.float32), "host": np.arange(1000), "key": jax.random.key(3)}
    expected = bits(state)
    overwrite = jax.jit(lambda w: w * 0 - 1, donate_argnums=0)
    checkpointer.save(1, state, valid=held)
    for _ in range(3):
        state["w"] = jax.block_until_ready(overwrite(state["w"]))
    state["host"][:] = -1
    held.release()
    checkpointer.wait()
    assert [type(result) for result in checkpointer.results()] == [Saved]
    assert bits(checkpointer.restore(like=state).state) == expected


def test_step_that_is_saved_or_being_saved_is_not_saved_again(checkpointer):
    held = Held()
    checkpointer.save(1, make_state(1), valid=held)
    checkpointer.save(1, make_state(2))
    held.release()
    digest = checkpointer.save_and_wait(1, make_state(3))
    assert_same(checkpointer.restore(like=make_state()).state, make_state(1))
    assert digest == checkpointer.state_sha256(1)
    assert len(checkpointer.results()) == 1


def test_newest_and_pinned_checkpoints_are_kept(checkpointer):
    for step in (10, 20, 30, 40, 50, 60):
        if step == 20:
            checkpointer.pinned = {20}
        checkpointer.save_and_wait(step, {"step": step})
    assert checkpointer.steps == [20, 40, 50, 60]
    assert names_in(checkpointer.directory) == ["20", "40", "50", "60"]
    checkpointer.pinned = {50}
    checkpointer.save_and_wait(70, {"step": 70})
    assert checkpointer.steps == [50, 60, 70]
    assert names_in(checkpointer.directory) == ["50", "60", "70"]


def test_checkpoints_are_listed_by_number(checkpointer):
    for step in (9, 10, 100):
        checkpointer.save_and_wait(step, {"step": step})
    assert [found.step for found in list_checkpoints(checkpointer.directory)] == [9, 10, 100]
    assert list_checkpoints(checkpointer.directory / "nowhere") == []


def test_invalid_state_is_not_saved(checkpointer):
    checkpointer.save(1, make_state(), valid=jnp.bool_(False))
    checkpointer.wait()
    [failure] = checkpointer.results()
    assert isinstance(failure, InvalidStateError)
    with pytest.raises(InvalidStateError):
        checkpointer.save_and_wait(1, make_state(), valid=False)
    assert checkpointer.steps == []


def test_prepare_compiles_what_save_runs(checkpointer):
    state = {
        "w": jnp.ones((17, 3)),
        "keys": jax.random.split(jax.random.key(0), 5),
        "empty": jnp.zeros((0, 17)),
        "host": np.ones(17),
        "number": 3,
    }
    compiled = []

    def listen(event: str, seconds: float, **metadata) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(metadata)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        checkpointer.prepare(state)
        assert len(compiled) == 1
        checkpointer.save_and_wait(1, state)
        assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.zeros((3, 4))}, r"leaf w should be \[3, 4\] float32 and is \[2, 4\] float32"),
        ({"w": jnp.zeros((2, 4), jnp.int32)}, r"leaf w should be \[2, 4\] int32 and is \[2, 4\] float32"),
        ({"w": np.zeros((2, 4))}, r"leaf w should be \[2, 4\] float64 and is \[2, 4\] float32"),
        ({"w": jnp.zeros((2, 4)), "b": jnp.zeros(1)}, r"leaf b should be \[1\] float32 and is absent"),
        ({}, r"leaf w should be absent and is \[2, 4\] float32"),
    ],
)
def test_checkpoint_of_another_tree_is_refused_with_the_leaf_and_stays(checkpointer, like, message):
    checkpointer.save_and_wait(7, {"w": jnp.zeros((2, 4))})
    with pytest.raises(IncompatibleCheckpointError, match=r"step 7 is of another tree: " + message):
        checkpointer.restore(like=like)
    assert checkpointer.steps == [7]


def test_params_alone_can_be_read(checkpointer):
    checkpointer.save_and_wait(1, make_state(), metadata={"reason": "test"})
    found = Checkpoint(checkpointer.directory / "1")
    like = {"params": make_state(1)["params"]}
    state, metadata = found.read(like, partial=True)
    assert_same(state, {"params": make_state()["params"]})
    assert metadata == {"reason": "test"}
    with pytest.raises(IncompatibleCheckpointError, match=r"leaf \w+ should be absent"):
        found.read(like)
    with pytest.raises(IncompatibleCheckpointError, match=r"leaf ema should be \[\] float32 and is absent"):
        found.read({**like, "ema": jnp.float32(0)}, partial=True)


def test_restored_leaves_have_the_shardings_of_like(checkpointer):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = {"w": jnp.arange(4.0), "rng": jax.random.key(0), "empty": jnp.zeros((0, 3))}
    checkpointer.save_and_wait(1, state)
    for like in (
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state),
        jax.tree.map(lambda leaf: jax.device_put(leaf, sharding), state),
    ):
        restored = checkpointer.restore(like=like).state
        assert {name: leaf.sharding for name, leaf in restored.items()} == dict.fromkeys(state, sharding)
        assert bits(restored) == bits(state)


DEVICES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding
from mnist_jax.checkpoint.checkpointer import Checkpoint, Checkpointer

def make_state():
    return {
        "first": jnp.arange(5.0),
        "other": jnp.arange(6, dtype=jnp.bfloat16),
        "rows": jnp.arange(80_000.0).reshape(8, 10_000),
        "blocks": jnp.arange(64, dtype=jnp.int32).reshape(8, 8),
        "replicated": jnp.arange(7.0),
        "three": jnp.arange(24_000.0).reshape(24, 1000),
        "keys": jax.random.split(jax.random.key(1), 8),
        "empty": jnp.zeros((0, 8)),
        "numpy": np.arange(30.0),
        "number": 3,
    }
"""

SHARDED = """
devices = np.array(jax.devices())
line, grid, three = Mesh(devices, "x"), Mesh(devices.reshape(2, 4), ("x", "y")), Mesh(devices[5:8], "x")
layouts = [
    {
        "first": SingleDeviceSharding(devices[0]), "other": SingleDeviceSharding(devices[5]),
        "rows": NamedSharding(line, P("x")), "blocks": NamedSharding(grid, P("y", "x")),
        "replicated": NamedSharding(line, P()), "three": NamedSharding(three, P("x")),
        "keys": NamedSharding(line, P("x")), "empty": NamedSharding(grid, P(None, "y")),
    },
    {name: SingleDeviceSharding(devices[3]) for name in make_state()},
    {
        "first": SingleDeviceSharding(devices[7]), "other": NamedSharding(three, P("x")),
        "rows": NamedSharding(grid, P("x", "y")), "blocks": NamedSharding(line, P(None, "x")),
        "replicated": SingleDeviceSharding(devices[1]), "three": NamedSharding(line, P("x")),
        "keys": NamedSharding(three, P()), "empty": NamedSharding(line, P()),
    },
]

def place(layout):
    state = make_state()
    return {name: jax.device_put(leaf, layout[name]) if isinstance(leaf, jax.Array) else leaf
            for name, leaf in state.items()}

def raw(leaf):
    is_key = hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()

states = [place(layout) for layout in layouts]
checkpointer = Checkpointer(sys.argv[1], keep=9)
for step, state in enumerate(states):
    print(checkpointer.save_and_wait(step, state))
for step in range(len(states)):
    for like in (states[step], states[step - 1]):
        restored, _ = Checkpoint(checkpointer.directory / str(step)).read(like)
        for name, leaf in restored.items():
            assert raw(leaf) == raw(states[0][name]), name
            assert getattr(leaf, "sharding", None) == getattr(like[name], "sharding", None), name
abstract = {"rows": jax.ShapeDtypeStruct((8, 10_000), jnp.float32)}
restored, _ = Checkpoint(checkpointer.directory / "0").read(abstract, partial=True)
assert restored["rows"].sharding.device_set == {devices[0]}
checkpointer.close()
"""


def test_state_on_several_devices_is_restored_in_any_layout(tmp_path):
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", DEVICES + SHARDED, str(tmp_path / "checkpoints")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    scope: dict = {}
    exec(DEVICES, scope)
    state = scope["make_state"]()
    assert set(ended.stdout.split()) == {integrity.json_sha256(integrity.digest_leaves(state))}
    # What 8 devices saved is restored on the one that is here.
    restored, _ = Checkpoint(tmp_path / "checkpoints" / "0").read(state)
    assert_same(restored, state)


# ---- All kinds of leaves --------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A module as Equinox has them."""

    weight: jax.Array
    bias: jax.Array | None
    size: int = dataclasses.field(metadata={"static": True})


class Network(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0, dropout=1)
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def make_optax_states() -> dict:
    params = {"w": jnp.ones((3, 4)), "b": {"c": jnp.ones(3, jnp.bfloat16)}}
    transforms = {
        "empty": optax.sgd(0.1),
        "chain": optax.chain(optax.clip(1.0), optax.adamw(optax.linear_schedule(1, 0, 10)), optax.ema(0.9)),
        "masked": optax.masked(optax.adam(1e-3), {"w": True, "b": {"c": False}}),
        "partition": optax.partition({"x": optax.adam(1e-3), "y": optax.set_to_zero()}, {"w": "x", "b": {"c": "y"}}),
        "every": optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 3),
        "inject": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
        "finite": optax.apply_if_finite(optax.adam(1e-3), 3),
    }
    return {name: transform.init(params) for name, transform in transforms.items()}


def make_keys() -> dict:
    kinds = ("fry", "rbg", "unsafe_rbg", "threefry2x32")
    made = {kind: jax.random.key(1, impl=kind) for kind in ("rbg", "unsafe_rbg", "threefry2x32") if kind in kinds}
    batches = {f"{kind}-batch": jax.random.split(key, 6).reshape(2, 3) for kind, key in made.items()}
    return {**made, **batches, "none": jax.random.split(made["rbg"], 2)[:0], "raw": jax.random.PRNGKey(1)}


def make_numpy_state() -> dict:
    kinds = ["?", "b", "B", "h", "H", "i", "I", "l", "L", "q", "Q", "e", "f", "d", "F", "D"]
    arrays = {f"array {kind}": np.asarray([[0, 1, 2], [1, 0, 1]], kind) for kind in kinds}
    scalars = {f"scalar {kind}": np.asarray(1, kind)[()] for kind in kinds}
    return {**arrays, **scalars, "max": np.uint64(2**64 - 1), "third": np.float64(1 / 3), "no axis": np.asarray(1 / 3)}


STATES = {
    "flax TrainState": lambda: TrainState.create(
        apply_fn=len, params={"w": jnp.ones((3, 4))}, tx=optax.chain(optax.clip(1.0), optax.adam(1e-3))
    ),
    "nnx": lambda: nnx.split(Network())[1],
    "nnx optimizer": lambda: nnx.state(nnx.Optimizer(Network(), optax.adamw(1e-3), wrt=nnx.Param)),
    "dataclass": lambda: Linear(jnp.ones((2, 3)), None, 3),
    "nested dataclass": lambda: {"layers": [Linear(jnp.ones((2, 3)), jnp.ones(2), 3), Linear(np.ones(2), None, 2)]},
    "optax": make_optax_states,
    "keys": make_keys,
    "numpy": make_numpy_state,
    "numbers": lambda: {
        "ints": [0, -5, 2**31, 2**63 - 1, -(2**63), 2**64 - 1],
        "floats": [0.1, -0.0, float("inf"), float("nan"), 5e-324],
        "bools": [True, False],
    },
    "only empty": lambda: {"a": jnp.zeros((0, 3)), "b": np.zeros((2, 0), np.int64), "c": None, "d": {}, "e": ()},
    "small types": lambda: {
        f"{module.__name__} {dtype}": module.asarray([[0, 1], [1, 0], [1, 1]], dtype)
        for module in (jnp, np)
        for dtype in (jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int4, jnp.int2)
    },
    "complex": lambda: {"a": jnp.asarray([1 + 2j, -0.0j]), "b": np.asarray([1 / 3 + 2j])},
    "orders": lambda: {
        "fortran": np.asfortranarray(np.arange(15.0).reshape(3, 5)),
        "strided": np.arange(20)[::2],
        "reversed": np.arange(20)[::-1],
        "broadcast": np.broadcast_to(np.arange(3), (4, 3)),
        "transposed": jnp.arange(6.0).reshape(2, 3).T,
    },
    "containers": lambda: [jnp.ones(3), (np.ones(2), {3: jnp.ones(1), 1: 2}), [[], None]],
    "names": lambda: {
        name: jnp.ones(1) for name in ("a/b", "c d", "é", "'", "[0]", "*", "a%2e", "x\ny", "..", "A" * 300)
    },
    "chunks": lambda: {"a": jnp.arange(300_000.0).reshape(3, 100_000), "b": np.arange(100_000.0).reshape(5, -1)},
}


@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_state_is_restored_as_it_was(checkpointer, make):
    state = make()
    checkpointer.save_and_wait(1, state)
    restored = checkpointer.restore(like=state)
    assert_same(restored.state, state)
    assert restored.quarantined == ()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4, ml_dtypes.int2])
def test_numpy_scalar_of_a_small_type_is_restored_as_it_was(checkpointer, dtype):
    checkpointer.save_and_wait(1, {"a": dtype(1)})
    assert_same(checkpointer.restore(like={"a": dtype(0)}).state, {"a": dtype(1)})


def test_abstract_leaf_of_64_bits_is_restored_as_it_was(checkpointer):
    state = {"a": np.arange(3) / 3, "b": np.asarray([2**40, -1])}
    checkpointer.save_and_wait(1, state)
    like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in state.items()}
    assert_same(checkpointer.restore(like=like).state, state)


def test_weak_types_are_restored_as_they_were(checkpointer):
    """A weak float32 times a bfloat16 is a bfloat16, a strong one times it is not: a resume would not be exact."""
    state = {"scale": jnp.asarray(2.0), "mask": jnp.where(jnp.arange(3) > 1, 1.0, -0.0), "strong": jnp.ones(3)}
    assert state["scale"].weak_type
    checkpointer.save_and_wait(1, state)
    for like in (state, jax.eval_shape(lambda: state)):
        restored = checkpointer.restore(like=like).state
        assert_same(restored, state)
        assert [leaf.weak_type for leaf in jax.tree.leaves(restored)] == [True, True, False]


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.builds(
        lambda module, shape, dtype, seed: module.asarray(
            np.random.default_rng(seed).integers(0, 2, shape).astype(dtype)
        ),
        st.sampled_from([jnp, np]),
        st.lists(st.integers(0, 4), max_size=3),
        st.sampled_from(["float32", "bfloat16", "float8_e4m3fn", "int4", "int32", "uint8", "bool", "complex64"]),
        st.integers(0, 9),
    ),
    st.sampled_from(["float64", "int64", "uint64", "complex128", "float16", "int8"]).map(
        lambda dtype: np.ones((2, 3), dtype)
    ),
    st.sampled_from([np.float32(0.1), np.float64(0.1), np.int64(-3), np.uint64(2**64 - 1), np.bool_(True)]),
    st.sampled_from(["rbg", "threefry2x32"]).map(lambda kind: jax.random.key(5, impl=kind)),
    st.integers(1, 3).map(lambda size: jax.random.split(jax.random.key(5), size)),
)
TREES = st.recursive(
    LEAVES,
    lambda children: st.one_of(
        st.dictionaries(st.sampled_from(["a", "b", "c d", "é/ü", "0"]), children, max_size=4),
        st.lists(children, max_size=3),
        st.tuples(children, children),
    ),
    max_leaves=12,
)


@given(tree=st.dictionaries(st.sampled_from(["x", "y"]), TREES, min_size=1))
@settings(max_examples=12, suppress_health_check=list(HealthCheck))
def test_any_tree_is_restored_as_it_was_or_refused(checkpointer, tree):
    step = checkpointer.newest_step + 1
    if not jax.tree.leaves(tree):
        with pytest.raises(SaveError, match="at least one"):
            checkpointer.save_and_wait(step, tree)
        return
    checkpointer.save_and_wait(step, tree)
    restored = checkpointer.restore(like=tree)
    assert restored.step == step
    assert_same(restored.state, tree)


class Color(enum.IntEnum):
    RED = 1


REFUSED = {
    "str": "text",
    "bytes": b"text",
    "object array": np.asarray([1, "a"], object),
    "structured array": np.zeros(3, [("x", "f4"), ("y", "i4")]),
    "record": np.zeros(3, [("x", "f4")])[0],
    "big-endian array": np.zeros(3, ">f4"),
    "uint4": jnp.zeros(3, jnp.uint4),
    "float128": np.zeros(3, np.longdouble),
    "datetime64": np.zeros(3, "datetime64[s]"),
    "timedelta64 scalar": np.timedelta64(3, "s"),
    "str array": np.asarray(["text"]),
    "void array": np.zeros(3, "V4"),
    "complex number": 1j,
    "int beyond 64 bits": 2**64,
    "negative int beyond 64 bits": -(2**63) - 1,
    "function": jnp.sin,
    "lambda": lambda x: x,
    "IntEnum": Color.RED,
    "masked array": np.ma.masked_array([1, 2], [0, 1]),
    "array of a subclass": np.zeros(3).view(np.recarray),
    "abstract array": jax.ShapeDtypeStruct((3,), jnp.float32),
    "object": object(),
}


@pytest.mark.parametrize("leaf", REFUSED.values(), ids=REFUSED)
def test_leaf_that_cannot_be_restored_is_refused_by_name(checkpointer, leaf):
    checkpointer.save_and_wait(1, make_state())
    for save in (checkpointer.save, checkpointer.save_and_wait):
        with pytest.raises(SaveError, match=r"step 2 .*leaf model\.0\.activation is an? "):
            save(2, {"model": [{"activation": leaf}], "w": jnp.ones(3)})
    assert checkpointer.steps == [1]
    assert names_in(checkpointer.directory) == ["1"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": jnp.zeros(1)}, "a.b": jnp.ones(1)}, r"the same name, a\.b"),
        (jnp.ones(3), "at least one named leaf"),
        (3, "at least one named leaf"),
        (None, "at least one named leaf"),
        ({}, "at least one named leaf"),
        ({"a": None, "b": []}, "at least one named leaf"),
        ({"": jnp.ones(3)}, "at least one named leaf"),
    ],
)
def test_tree_that_cannot_be_restored_is_refused(checkpointer, state, message):
    with pytest.raises(SaveError, match=message):
        checkpointer.save(1, state)
    assert checkpointer.steps == []


# ---- Read by Orbax alone --------------------------------------------------------------------------------------------


ORBAX_ALONE = """
import hashlib, json, sys, warnings
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as v1

def digests(tree):
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        is_key = hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        found[name] = [str(getattr(leaf, "dtype", type(leaf))), hashlib.sha256(array.tobytes()).hexdigest()]
    return found

directory, step = Path(sys.argv[1]), int(sys.argv[2])
target = {**make_state(1), "empty": None}  # Orbax stores no empty arrays.
abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, target)
params = {"params": target["params"]}
ways = {}
with ocp.StandardCheckpointer() as checkpointer:
    ways["StandardCheckpointer"] = checkpointer.restore(directory / str(step) / "state")
    ways["StandardCheckpointer, target"] = checkpointer.restore(directory / str(step) / "state", target)
    ways["StandardCheckpointer, abstract target"] = checkpointer.restore(directory / str(step) / "state", abstract)
with ocp.CheckpointManager(directory) as manager:
    assert manager.latest_step() == step
    for name, args in {"": (), ", target": (target,), ", abstract target": (abstract,)}.items():
        restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(*args)))
        ways["CheckpointManager" + name] = restored.state
    assert manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run == {"reason": "test"}
    restored = manager.restore(step)
    assert restored.run == {"reason": "test"}
    ways["CheckpointManager, no arguments"] = restored.state
ways["v1.load"] = v1.load(directory / str(step))
ways["v1.load, name"] = v1.load(directory / str(step), checkpointable_name="state")
ways["v1.load, target"] = v1.load(directory / str(step), target)
loaded = v1.load_checkpointables(directory / str(step))
assert loaded["run"] == {"reason": "test"}
ways["v1.load_checkpointables"] = loaded["state"]
with v1.training.Checkpointer(directory) as checkpointer:
    ways["v1.training.Checkpointer"] = checkpointer.load(step)
partly = {}
with ocp.PyTreeCheckpointer() as checkpointer:
    args = ocp.args.PyTreeRestore(
        params, restore_args=ocp.checkpoint_utils.construct_restore_args(params), partial_restore=True
    )
    partly["PyTreeCheckpointer"] = checkpointer.restore(directory / str(step) / "state", args=args)
loading = v1.options.PyTreeOptions(loading=v1.options.PyTreeOptions.Loading(partial_load=True))
with v1.Context(pytree_options=loading):
    partly["v1.load"] = v1.load(directory / str(step), params)
assert "mnist_jax" not in sys.modules
result = [{way: digests(tree) for way, tree in trees.items()} for trees in (ways, partly)]
Path(sys.argv[3]).write_text(json.dumps(result))
"""


def test_orbax_alone_reads_a_checkpoint(checkpointer, tmp_path):
    state = make_state()
    checkpointer.save_and_wait(3, {"step": 3})
    checkpointer.save_and_wait(5, state, metadata={"reason": "test"})
    program = ORBAX_ALONE.replace("\ndef digests", f"\n{inspect.getsource(make_state)}\ndef digests", 1)
    command = [sys.executable, "-W", "ignore", "-c", program, str(checkpointer.directory), "5", str(tmp_path / "read")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    wanted = {}
    for name, leaf in integrity.named_leaves({**state, "empty": None}).items():
        array = np.asarray(integrity.raw(leaf))
        wanted[name] = [str(leaf.dtype), hashlib.sha256(array.tobytes()).hexdigest()]
    ways, partly = json.loads((tmp_path / "read").read_text())
    assert len(ways) == 12
    assert {way: found for way, found in ways.items() if found != wanted} == {}
    kernel = {"params.dense.kernel": wanted["params.dense.kernel"]}
    assert partly == {"PyTreeCheckpointer": kernel, "v1.load": kernel}
    # To be read it was not changed.
    assert Checkpoint(checkpointer.directory / "5").verify()["step"] == 5


# ---- Damage ---------------------------------------------------------------------------------------------------------


def largest_file(path: Path) -> Path:
    """Return the largest file of the leaves: how Orbax divides them differs, and the manifest may be larger still."""
    files = [file for file in (path / "state").rglob("*") if file.is_file() and not file.name.startswith("hashes.")]
    return max(files, key=lambda file: file.stat().st_size)


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def flip_bit_in_leaves(path: Path) -> None:
    flip_bit(largest_file(path), largest_file(path).stat().st_size // 2)


def flip_bit_in_manifest(path: Path) -> None:
    flip_bit(path / "manifest.json", (path / "manifest.json").read_bytes().index(b"sha256") + 20)


def flip_bit_in_metadata(path: Path) -> None:
    flip_bit(path / "run" / "metadata", (path / "run" / "metadata").read_bytes().index(b"remembered"))


def flip_bit_in_hashes(path: Path) -> None:
    flip_bit(path / "state" / "hashes.0.json", 30)


def truncate(path: Path) -> None:
    os.truncate(largest_file(path), 100)


def delete(path: Path) -> None:
    largest_file(path).unlink()


def delete_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def delete_state(path: Path) -> None:
    shutil.rmtree(path / "state")


def replace_file_by_link(path: Path) -> None:
    file = largest_file(path)
    file.rename(path / "elsewhere")
    file.symlink_to(path / "elsewhere")


def replace_by_older(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("1"), path)


def replace_by_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


def replace_by_link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path.with_name("1"))


def rewrite_manifest(path: Path, **changes) -> None:
    """Change fields of a manifest, and seal it again: anybody can make a seal."""
    manifest = {**json.loads((path / "manifest.json").read_text()), **changes}
    manifest.pop("seal")
    (path / "manifest.json").write_text(json.dumps({**manifest, "seal": integrity.json_sha256(manifest)}))


def rewrite_hashes(path: Path, content: str) -> None:
    """Change what the processes hashed, and the manifest with it."""
    hashes = path / "state" / "hashes.0.json"
    hashes.write_text(content)
    files = Checkpoint(path).manifest()["files"]
    rewrite_manifest(path, files={**files, "state/hashes.0.json": integrity.describe_file(hashes)})


def forge_digest_of_a_leaf(path: Path) -> None:
    leaves = Checkpoint(path).manifest()["leaves"]
    rewrite_manifest(path, leaves={**leaves, "mask": {**leaves["mask"], "sha256": "0" * 64}})


def forge_list_of_files(path: Path) -> None:
    rewrite_manifest(path, files={})


def forge_hashes(path: Path) -> None:
    rewrite_hashes(path, "[]")


def forge_nested_hashes(path: Path) -> None:
    rewrite_hashes(path, "[" * 200_000)


def forge_size_of_a_leaf(path: Path) -> None:
    """TensorStore would end the process where no memory holds what it believes."""
    hashes = json.loads((path / "state" / "hashes.0.json").read_text())
    hashes["leaves"]["mask"]["raw_shape"] = [4]
    rewrite_hashes(path, json.dumps(hashes))


@pytest.mark.parametrize(
    ("damage", "kind", "named"),
    [
        (flip_bit_in_leaves, "changed-file", "file state/"),
        (flip_bit_in_manifest, "bad-manifest", "manifest.json cannot be understood"),
        (flip_bit_in_metadata, "changed-file", "file run/metadata"),
        (flip_bit_in_hashes, "changed-file", "file state/hashes.0.json"),
        (truncate, "changed-file", "'bytes': 100"),
        (delete, "missing-file", "file state/"),
        (delete_manifest, "bad-manifest", "manifest.json cannot be read (No such file"),
        (delete_state, "missing-file", "file state/"),
        (replace_file_by_link, "missing-file", "file state/"),
        (replace_by_older, "other-step", "is that of step 1"),
        (replace_by_file, "bad-manifest", "Not a directory"),
        (replace_by_link, "symbolic-link", "symbolic link"),
        (forge_digest_of_a_leaf, "bad-manifest", "does not describe"),
        (forge_list_of_files, "bad-hashes", "other leaves"),
        (forge_hashes, "bad-hashes", ""),
        (forge_nested_hashes, "changed-file", "recursion"),
        (forge_size_of_a_leaf, "other-size", "leaf mask"),
    ],
)
def test_corrupt_checkpoint_is_quarantined_and_the_next_older_used(checkpointer, reopen, damage, kind, named):
    checkpointer.save_and_wait(1, make_state(1))
    checkpointer.save_and_wait(2, make_state(2), metadata={"note": "remembered"})
    damage(checkpointer.directory / "2")
    again = reopen()
    restored = again.restore(like=make_state())
    assert restored.step == 1
    assert_same(restored.state, make_state(1))
    [(corrupt, place)] = restored.quarantined
    assert isinstance(corrupt, CorruptCheckpointError)
    assert (corrupt.step, corrupt.kind) == (2, kind)
    assert str(corrupt).startswith("step 2: ")
    assert named in str(corrupt)
    assert place == checkpointer.directory / "quarantine" / f"2-{kind}"
    assert os.path.lexists(place)
    assert again.steps == [1]
    # The step can be saved again, and be damaged in the same way again.
    again.save_and_wait(2, make_state(22), metadata={"note": "remembered"})
    assert_same(again.restore(like=make_state()).state, make_state(22))
    damage(checkpointer.directory / "2")
    [(_, second)] = again.restore(like=make_state()).quarantined
    assert second.name == f"2-{kind}-2"


def test_leaf_that_is_read_otherwise_than_saved_is_named(checkpointer, monkeypatch):
    """Its files are whole: what is wrong is the memory, or what reads them."""
    checkpointer.save_and_wait(1, make_state(1))
    checkpointer.save_and_wait(2, make_state(2))
    restore = ocp.PyTreeCheckpointHandler.restore

    def restore_wrongly(self, path, **kwargs):
        state = restore(self, path, **kwargs)
        if "2" in path.parts:
            state["params"]["dense"]["kernel"] = state["params"]["dense"]["kernel"].at[3, 4].add(1)
        return state

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restore_wrongly)
    restored = checkpointer.restore(like=make_state())
    assert restored.step == 1
    [(corrupt, place)] = restored.quarantined
    assert "leaf params.dense.kernel is" in str(corrupt)
    assert place.name == "2-changed-leaf"


def test_write_that_went_wrong_is_noticed(checkpointer, monkeypatch):
    """The arrays are hashed, not what came to the disk."""
    checkpointer.save_and_wait(1, make_state(1))
    save = ocp.PyTreeCheckpointHandler.async_save

    async def save_wrongly(self, directory, *args, **kwargs):
        item = kwargs["args"].item
        item = {**item, "mask": ~item["mask"]}
        return await save(self, directory, args=ocp.args.PyTreeSave(item))

    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "async_save", save_wrongly)
        checkpointer.save_and_wait(2, make_state(2))
    restored = checkpointer.restore(like=make_state())
    assert restored.step == 1
    assert "leaf mask" in str(restored.quarantined[0][0])


def test_checkpoint_on_a_failing_disk_is_quarantined(checkpointer, monkeypatch):
    checkpointer.save_and_wait(1, make_state(1))
    checkpointer.save_and_wait(2, make_state(2))
    bad = checkpointer.directory / "2" / "state"
    error = OSError(errno.EIO, os.strerror(errno.EIO), str(bad / "file"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail_where(Path.open, lambda path: bad in path.parents, error))
        restored = checkpointer.restore(like=make_state())
    assert restored.step == 1
    [(corrupt, place)] = restored.quarantined
    assert "state/file cannot be read (Input/output error)" in str(corrupt)
    assert place.name == "2-unreadable-file"


def test_if_none_is_good_each_start_says_so_and_none_is_moved(checkpointer, reopen):
    for step in (1, 2):
        checkpointer.save_and_wait(step, make_state(step))
        (checkpointer.directory / str(step) / "manifest.json").write_text("{")
    for _ in range(2):
        with pytest.raises(NoGoodCheckpointError, match=r"(?s)step 2: .*step 1: "):
            reopen().restore(like=make_state())
    assert names_in(checkpointer.directory) == ["1", "2"]


def test_newest_good_checkpoint_is_restored_and_only_newer_bad_ones_are_moved(checkpointer, tmp_path):
    checkpointer.keep = 3
    for step in (1, 2, 3):
        checkpointer.save_and_wait(step, make_state(step))
    for number, damaged in enumerate(itertools.chain(*(itertools.combinations((1, 2, 3), n) for n in range(4)))):
        directory = tmp_path / f"copy{number}" / "checkpoints"
        shutil.copytree(checkpointer.directory, directory)
        for step in damaged:
            truncate(directory / str(step))
        copy = Checkpointer(directory)
        good = {1, 2, 3} - set(damaged)
        if good:
            restored = copy.restore(like=make_state())
            assert restored.step == max(good)
            assert_same(restored.state, make_state(max(good)))
            moved = {error.step for error, _ in restored.quarantined}
            assert moved == {step for step in damaged if step > max(good)}
            assert copy.steps == sorted({1, 2, 3} - moved)
        else:
            with pytest.raises(NoGoodCheckpointError):
                copy.restore(like=make_state())
            assert copy.steps == [1, 2, 3]
        copy.close()


@pytest.mark.parametrize("version", [2, 3, 5])
def test_checkpoint_of_another_format_is_refused_and_stays(checkpointer, version):
    checkpointer.save_and_wait(1, make_state(1))
    checkpointer.save_and_wait(2, make_state(2))
    rewrite_manifest(checkpointer.directory / "2", format=version)
    with pytest.raises(IncompatibleCheckpointError, match=f"step 2 has format {version}, and .* format 4"):
        checkpointer.restore(like=make_state())
    assert checkpointer.steps == [1, 2]


# ---- Trouble that is no damage --------------------------------------------------------------------------------------


@pytest.fixture
def two_checkpoints(checkpointer):
    """Two good ones; trouble is to leave both where they are."""
    checkpointer.save_and_wait(1, make_state(1))
    checkpointer.save_and_wait(2, make_state(2))
    yield checkpointer
    assert checkpointer.steps == [1, 2]
    assert names_in(checkpointer.directory) == ["1", "2"]
    restored = checkpointer.restore(like=make_state())
    assert (restored.step, restored.quarantined) == (2, ())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE])
def test_file_that_cannot_be_opened_is_no_damage(two_checkpoints, monkeypatch, number):
    error = OSError(number, os.strerror(number), "a file")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail_where(Path.open, lambda path: "state" in path.parts, error))
        with pytest.raises(ReadError, match=os.strerror(number)):
            two_checkpoints.restore(like=make_state())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("can't start new thread"),
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.EIO, "Input/output error"),
        MemoryError(),
        ValueError("RESOURCE_EXHAUSTED: Error reading local file: Too many open files"),
        KeyError("a"),
    ],
    ids=repr,
)
def test_error_of_orbax_is_no_damage(two_checkpoints, monkeypatch, error):
    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail_with(error))
        with pytest.raises(ReadError, match=r"step 2 .*nothing was moved"):
            two_checkpoints.restore(like=make_state())


def test_error_of_tensorstore_is_no_damage(two_checkpoints, monkeypatch):
    error = ValueError(
        'RESOURCE_EXHAUSTED: Error reading local file: Failed to open: "manifest.ocdbt" [Too many open files]'
    )
    with monkeypatch.context() as patch:
        patch.setattr(tensorstore, "KvStore", types.SimpleNamespace(open=fail_with(error)))
        with pytest.raises(ReadError, match="Too many open files"):
            two_checkpoints.restore(like=make_state())


def test_want_of_threads_is_no_damage(two_checkpoints, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail_with(RuntimeError("can't start new thread")))
        with pytest.raises(ReadError, match="can't start new thread"):
            two_checkpoints.restore(like=make_state())


@pytest.mark.filterwarnings("ignore:.*never awaited")
def test_want_of_file_descriptors_is_no_damage(two_checkpoints, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)  # asyncio's, for half open event loops
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used, outcomes = {int(name) for name in os.listdir("/proc/self/fd")}, []
    for limit in [number for number in range(soft) if number not in used][:48]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            outcomes.append(two_checkpoints.restore(like=make_state()).step)
        except (OSError, ReadError):
            pass
        except CheckpointError as error:
            outcomes.append(f"with descriptors up to {limit}: {error}")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert set(outcomes) <= {2}
    gc.collect()


# ---- Commit ---------------------------------------------------------------------------------------------------------


def test_older_checkpoints_go_when_the_new_one_is_on_the_disk(tmp_path, monkeypatch):
    """Follow what is fsynced, and with which bytes; nothing may change after that and before the rename."""
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", keep=1)
    checkpointer.save_and_wait(1, make_state(1))
    directory = checkpointer.directory
    happened, on_disk = [], {}
    fsync, remove = os.fsync, shutil.rmtree

    def record_fsync(file):
        path = path_of(file)
        on_disk[path] = sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()
        fsync(file)
        if path == directory:
            happened.append(f"names on disk: {' '.join(names_in(path))}")
        if path.parent == directory / "2" and path.name in WRITTEN_LAST:
            happened.append(f"{path.name} on disk")

    def record_rename(source, target, rename=os.rename):
        source, target = Path(source), Path(target)
        if source == directory / f"2{UNFINISHED}":
            for path in (source, *source.rglob("*")):
                now = sorted(set(os.listdir(path)) - WRITTEN_LAST) if path.is_dir() else path.read_bytes()
                known = on_disk.get(path)
                if path.is_dir() and known:
                    known = sorted(set(known) - WRITTEN_LAST)
                assert known == now or path.name in WRITTEN_LAST, f"{path} is not on the disk"
        if source.parent == directory:
            happened.append(f"{source.name} -> {target.relative_to(directory)}, committed: {checkpointer.steps}")
        return rename(source, target)

    def record_remove(path, *args, **kwargs):
        happened.append(f"remove {Path(path).relative_to(directory)}, committed: {checkpointer.steps}")
        return remove(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(os, "replace", functools.partial(record_rename, rename=os.replace))
    monkeypatch.setattr(shutil, "rmtree", record_remove)
    checkpointer.save_and_wait(2, make_state(2))
    assert happened == [
        f"2{UNFINISHED} -> 2, committed: [1]",
        "_CHECKPOINT_METADATA on disk",
        "commit_success.txt on disk",
        "names on disk: 1 2",
        "1 -> removed/1, committed: [1]",
        "remove removed/1, committed: [2]",
    ]
    assert any(path.name == "manifest.json" for path in on_disk)
    checkpointer.close()


def test_parents_of_the_directory_are_fsynced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(path_of(file)))
    Checkpointer(tmp_path / "runs" / "one" / "checkpoints").close()
    assert synced[:4] == [tmp_path / "runs/one/checkpoints", tmp_path / "runs/one", tmp_path / "runs", tmp_path]


def test_save_whose_name_is_not_on_the_disk_is_not_committed_and_can_be_retried(checkpointer, monkeypatch):
    checkpointer.save_and_wait(1, make_state(1))
    directory = checkpointer.directory
    error = OSError(errno.EIO, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_where(os.fsync, lambda file: path_of(file) == directory, error))
        with pytest.raises(SaveError, match="Input/output error"):
            checkpointer.save_and_wait(2, make_state(1))
    assert checkpointer.steps == [1]
    assert names_in(directory) == ["1"]
    checkpointer.save_and_wait(2, make_state(2))
    assert checkpointer.steps == [1, 2]
    assert_same(checkpointer.restore(like=make_state()).state, make_state(2))


def test_checkpoint_that_another_process_wrote_is_quarantined(checkpointer):
    checkpointer.save_and_wait(1, make_state(1))
    shutil.copytree(checkpointer.directory / "1", checkpointer.directory / "2")
    checkpointer.save_and_wait(2, make_state(2))
    assert checkpointer.steps == [1, 2]
    assert_same(checkpointer.restore(like=make_state()).state, make_state(2))
    assert names_in(checkpointer.directory / "quarantine") == ["2-not-committed"]


def test_system_calls_of_a_save_fsync_all_before_the_rename(tmp_path):
    """The same, seen from outside: what TensorStore writes in C++ is in it."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trace, run = tmp_path / "trace", str(tmp_path / "run")
    script = (
        "import sys, numpy as np; from mnist_jax.checkpoint.checkpointer import Checkpointer\n"
        "checkpointer = Checkpointer(sys.argv[1], keep=1)\n"
        "for step in (1, 2): checkpointer.save_and_wait(step, {'w': np.arange(100_000) * step})\n"
        "checkpointer.close()"
    )
    calls = "trace=write,pwrite64,writev,pwritev,fsync,fdatasync,rename,renameat,renameat2"
    command = ["strace", "-f", "-y", "-s", "0", "-e", calls, "-o", str(trace), sys.executable, "-c", script, run]
    traced = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if "ptrace" in traced.stderr and traced.returncode:
        pytest.skip("this system lets nobody trace")
    assert traced.returncode == 0, traced.stderr
    synced, dirty, committed, order = set(), set(), [], []
    for line in trace.read_text().splitlines():
        call = re.match(r"\d+ +(\w+)\(", line)
        if not call or " = -1 " in line:
            continue
        if call[1] in ("fsync", "fdatasync"):
            [path] = re.findall(r"<([^>]*)>", line)[:1]
            synced.add(path)
            dirty.discard(path)
            order.append(("fsync", path))
        elif call[1].startswith("rename"):
            source, target = re.findall(r'"([^"]*)"', line)[:2]
            order.append(("rename", source, target))
            is_moved = {path: path == source or path.startswith(source + "/") for path in dirty}
            dirty = {target + path[len(source) :] if moved else path for path, moved in is_moved.items()}
            if Path(source).parent == Path(run) and source.endswith(UNFINISHED):
                committed.append(target)
                unsynced = {path for path in dirty if path.startswith(target + "/")}
                assert unsynced <= {f"{target}/{name}" for name in WRITTEN_LAST}
                assert any(path.startswith(f"{source}/state/d/") for path in synced)
                assert {source, f"{source}/state", f"{source}/run/metadata", f"{source}/manifest.json"} <= synced
            if Path(target).parent == Path(run) / "removed":
                assert not {path for path in dirty if path.startswith(committed[-1] + "/")}
        else:
            dirty.update(path for path in re.findall(r"<(/[^>]*)>", line)[:1] if path.startswith(run))
    assert committed == [f"{run}/1", f"{run}/2"]
    renamed = order.index(("rename", f"{run}/2{UNFINISHED}", f"{run}/2"))
    removed = order.index(("rename", f"{run}/1", f"{run}/removed/1"))
    assert ("fsync", run) in order[renamed:removed]


@pytest.mark.parametrize("lost", ["leaf", "merge"])
def test_leaf_that_was_not_written_is_noticed_before_the_commit(checkpointer, monkeypatch, lost):
    for step in (1, 2, 3):
        checkpointer.save_and_wait(step, make_state(step))
    save = ocp.PyTreeCheckpointHandler.async_save

    async def save_others(self, directory, *args, **kwargs):
        item = {**kwargs["args"].item, "mask": None}
        return await save(self, directory, args=ocp.args.PyTreeSave(item))

    with monkeypatch.context() as patch:
        if lost == "leaf":
            patch.setattr(ocp.PyTreeCheckpointHandler, "async_save", save_others)
        else:
            patch.setattr(ocp.PyTreeCheckpointHandler, "finalize", lambda self, directory: None)
        with pytest.raises(SaveError, match="did not write leaf mask"):
            checkpointer.save_and_wait(4, make_state(4))
    assert checkpointer.steps == [1, 2, 3]
    assert names_in(checkpointer.directory) == ["1", "2", "3"]
    checkpointer.save_and_wait(4, make_state(4))
    assert_same(checkpointer.restore(like=make_state()).state, make_state(4))


# ---- Failed saves ---------------------------------------------------------------------------------------------------


def test_failed_save_is_reported_changes_nothing_and_can_be_retried(checkpointer, monkeypatch):
    checkpointer.save_and_wait(1, make_state(1))
    checkpointer.results()
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, "No space left on device")
        patch.setattr(ocp.PyTreeCheckpointHandler, "async_save", fail_with(full))
        checkpointer.save(2, make_state(2))
        checkpointer.wait()
        [failure] = checkpointer.results()
        assert isinstance(failure, SaveError)
        assert failure.step == 2
        assert "step 2" in str(failure)
        assert "No space left on device" in str(failure)
        assert checkpointer.steps == [1]
        with pytest.raises(SaveError, match="No space left"):
            checkpointer.save_and_wait(2, make_state(2))
    assert names_in(checkpointer.directory) == ["1"]
    checkpointer.save_and_wait(2, make_state(2))
    assert checkpointer.steps == [1, 2]


BROKEN_OFF = ["state/d", "state/hashes.0.json", "run/metadata", "manifest.json", "."]


@pytest.mark.parametrize("name", BROKEN_OFF)
def test_save_that_broke_off_leaves_nothing_and_can_be_retried(checkpointer, monkeypatch, name):
    error = OSError(errno.EIO, "Input/output error")

    def matches(file: int) -> bool:
        path = path_of(file).as_posix().replace(UNFINISHED, "")
        return path.endswith(f"/checkpoints/2/{name}" if name != "." else "/checkpoints/2")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_where(os.fsync, matches, error))
        with pytest.raises(SaveError, match="Input/output error"):
            checkpointer.save_and_wait(2, make_state(2))
    assert names_in(checkpointer.directory) == []
    assert checkpointer.steps == []
    assert checkpointer.restore(like=make_state()) is None
    checkpointer.save_and_wait(2, make_state(2))
    assert_same(checkpointer.restore(like=make_state()).state, make_state(2))


@pytest.mark.parametrize("name", ["save", "save_and_wait"])
def test_metadata_that_is_no_json_is_refused(checkpointer, name):
    with pytest.raises(SaveError, match="JSON"):
        getattr(checkpointer, name)(1, make_state(), metadata={"a": object()})
    assert names_in(checkpointer.directory) == []
    checkpointer.save_and_wait(1, make_state())
    assert checkpointer.steps == [1]


def test_metadata_may_be_changed_after_save(checkpointer):
    held, metadata = Held(), {"a": [1]}
    checkpointer.save(1, make_state(), metadata=metadata, valid=held)
    metadata["a"].append(2)
    held.release()
    checkpointer.wait()
    assert checkpointer.restore(make_state()).metadata == {"a": [1]}


def test_vanished_checkpoints_are_reported_and_the_next_save_is_made(checkpointer):
    for step in (1, 2):
        checkpointer.save_and_wait(step, make_state(step))
    checkpointer.results()
    shutil.rmtree(checkpointer.directory)
    checkpointer.save_and_wait(3, make_state(3))
    notice, saved = checkpointer.results()
    assert (notice.event, saved.step) == ("checkpoints_vanished", 3)
    assert "1, 2" in str(notice)
    assert checkpointer.steps == [3]
    assert_same(checkpointer.restore(like=make_state()).state, make_state(3))


@pytest.mark.parametrize("in_its_place", ["nothing", "another run"])
def test_nothing_is_written_where_the_run_was_moved_away(tmp_path, in_its_place):
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints")
    checkpointer.save_and_wait(1, make_state(1))
    (tmp_path / "run").rename(tmp_path / "moved")
    if in_its_place == "another run":
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SaveError, match="run was moved"):
        checkpointer.save_and_wait(2, make_state(2))
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name != "checkpoints"]
    assert names_in(tmp_path / "moved" / "checkpoints") == ["1"]
    checkpointer.close()


# ---- Conveniences that the system may refuse ------------------------------------------------------------------------


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(checkpointer, reopen, tmp_path):
    checkpointer.save_and_wait(1, make_state(1))
    directory = checkpointer.directory
    leftovers = (f"2{UNFINISHED}", "3.unfinished", "removed/4", f"5{UNFINISHED}", "6.ready")
    for name in (f"2{UNFINISHED}", "3.unfinished", "removed/4", "4.backup", "quarantine", "x"):
        shutil.copytree(directory / "1", directory / name)
    (directory / "6.ready").touch()
    outside = tmp_path / "outside"
    shutil.copytree(directory / "1", outside)
    (directory / f"5{UNFINISHED}").symlink_to(outside)
    assert [found.step for found in list_checkpoints(directory)] == [1]
    again = reopen()
    assert sorted(again.removed) == sorted(leftovers)
    assert again.steps == [1]
    assert again.restore(like=make_state()).step == 1
    assert names_in(directory) == ["1", "4.backup", "quarantine", "x"]
    assert (outside / "manifest.json").exists()


@pytest.mark.parametrize("step", [2, 3])
def test_leftover_that_cannot_be_removed_does_no_harm(checkpointer, reopen, monkeypatch, step):
    """A busy file of NFS or a mount in it; the step that it is of is saved again."""
    checkpointer.save_and_wait(1, make_state(1))
    leftover = checkpointer.directory / f"2{UNFINISHED}"
    (leftover / "state").mkdir(parents=True)
    (leftover / "state" / ".nfs0001").touch()
    inode = leftover.stat().st_ino
    busy = OSError(errno.EBUSY, "Device or resource busy")
    is_leftover = lambda path: os.stat(path).st_ino == inode  # noqa: E731
    monkeypatch.setattr(shutil, "rmtree", fail_where(shutil.rmtree, is_leftover, busy))
    again = reopen()
    assert again.removed == ()
    assert again.restore(like=make_state()).step == 1
    again.save_and_wait(step, make_state(step))
    assert [getattr(result, "event", "saved") for result in again.results()] == ["removal_failed", "saved"]
    assert_same(again.restore(like=make_state()).state, make_state(step))
    assert again.steps == [1, step]


def test_old_checkpoint_that_cannot_be_removed_is_reported_and_the_new_one_saved(checkpointer, reopen, monkeypatch):
    checkpointer.keep = 1
    checkpointer.save_and_wait(1, make_state(1))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail_with(OSError(errno.EACCES, "Permission denied")))
        checkpointer.save_and_wait(2, make_state(2))
    results = [getattr(result, "event", "saved") for result in checkpointer.results()]
    assert results == ["saved", "saved", "removal_failed"]
    assert checkpointer.steps == [2]
    again = reopen()
    assert (again.removed, again.steps) == (("removed/1",), [2])


def test_old_checkpoint_that_cannot_be_renamed_is_reported_and_the_new_one_saved(checkpointer, monkeypatch):
    checkpointer.keep = 1
    checkpointer.save_and_wait(1, make_state(1))
    with monkeypatch.context() as patch:
        is_old = lambda path: Path(path) == checkpointer.directory / "1"  # noqa: E731
        for name in ("rename", "replace"):
            busy = OSError(errno.EBUSY, "Device or resource busy")
            patch.setattr(os, name, fail_where(getattr(os, name), is_old, busy))
        checkpointer.save_and_wait(2, make_state(2))
    results = [getattr(result, "event", "saved") for result in checkpointer.results()]
    assert sorted(results) == ["removal_failed", "saved", "saved"]
    assert checkpointer.steps == [1, 2]
    checkpointer.save_and_wait(3, make_state(3))
    assert checkpointer.steps == [3]
    assert names_in(checkpointer.directory) == ["3"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere priorities are of processes")
def test_save_in_the_background_has_a_low_priority_and_one_that_is_waited_for_has_not(checkpointer):
    priorities = []

    class Look:
        def __bool__(self):
            priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            return True

    mine = os.getpriority(os.PRIO_PROCESS, 0)
    checkpointer.save(1, make_state(), valid=Look())
    checkpointer.save_and_wait(2, make_state(), valid=Look())
    assert priorities == [max(10, mine), mine]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere priorities are of processes")
@pytest.mark.parametrize("name", ["getpriority", "setpriority"])
def test_save_without_the_right_to_a_low_priority_says_so_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, name, fail_with(PermissionError(errno.EPERM, "Operation not permitted")))
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpointer.save(step, make_state(step))
        checkpointer.wait()
    results = [getattr(result, "event", "saved") for result in checkpointer.results()]
    assert results == ["no_priority", "saved", "saved"]
    assert checkpointer.steps == [1, 2]
    checkpointer.close()


def test_full_disk_is_announced_once_until_there_is_room_again(checkpointer, monkeypatch):
    statvfs, notices = os.statvfs, []
    for step, free in enumerate((10**9, 10**4, 10**4, 10**9, 10**4)):
        with monkeypatch.context() as patch:
            fields = list(statvfs(checkpointer.directory))
            fields[1], fields[4] = 1, free  # f_frsize, f_bavail
            patch.setattr(os, "statvfs", lambda path, fields=fields: os.statvfs_result(fields))
            checkpointer.save_and_wait(step, make_state(step))
        notices += [(found.step, found.event) for found in checkpointer.results() if isinstance(found, Notice)]
    assert notices == [(1, "low_space"), (4, "low_space")]


def test_unknown_free_space_does_not_matter(checkpointer, monkeypatch):
    monkeypatch.setattr(os, "statvfs", fail_with(OSError(errno.ENOSYS, "Function not implemented")))
    checkpointer.save_and_wait(1, make_state())
    assert [type(result) for result in checkpointer.results()] == [Saved]


# ---- Paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a[b]", "*", "lr=0.1,seed=[0]", "ü b"])
def test_any_path_can_hold_checkpoints(tmp_path, name):
    checkpointer = Checkpointer(tmp_path / name / "checkpoints")
    checkpointer.save_and_wait(1, make_state(1))
    checkpointer.close()
    for place in (name, "moved", name):  # A run may be moved to a path of the other kind, and back.
        again = Checkpointer(tmp_path / place / "checkpoints")
        assert_same(again.restore(like=make_state()).state, make_state(1))
        again.save_and_wait(2, make_state(2))
        assert_same(again.restore(like=make_state()).state, make_state(2))
        again.close()
        shutil.rmtree(tmp_path / place / "checkpoints" / "2")
        (tmp_path / place).rename(tmp_path / ("moved" if place == name else name))


@pytest.mark.parametrize("name", [b"a\\b", b"a\xff", b"\xfc b/c"], ids=repr)
def test_path_that_tensorstore_does_not_find_is_refused(tmp_path, name):
    directory = tmp_path / os.fsdecode(name)
    open_before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="TensorStore does not find"):
        Checkpointer(directory)
    assert len(os.listdir("/proc/self/fd")) == open_before
    assert [path for path in tmp_path.rglob("*") if path not in (directory, *directory.parents)] == []


LATIN_1 = """
import os, sys
from pathlib import Path
from mnist_jax.checkpoint.checkpointer import Checkpointer
assert sys.getfilesystemencoding() == "iso8859-1", sys.getfilesystemencoding()
Checkpointer(sys.argv[1]).close()  # ASCII letters are the same in both.
try:
    Checkpointer(Path(sys.argv[1]) / "\\xfc" / "checkpoints")
except OSError as error:
    assert "UTF-8" in str(error), error
    sys.exit(7)
"""


def test_path_that_the_locale_spells_otherwise_is_refused(tmp_path):
    if shutil.which("localedef") is None:
        pytest.skip("localedef is not installed")
    name = "en_US.ISO-8859-1"
    make = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(tmp_path / name)]
    if subprocess.run(make, capture_output=True).returncode > 1:
        pytest.skip("the sources of the locale are not installed")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    environment |= {"LOCPATH": str(tmp_path), "LC_ALL": name, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    command = [sys.executable, "-c", LATIN_1, str(tmp_path / "run")]
    ended = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    assert ended.returncode == 7, ended.stderr
    assert sorted(os.listdir(os.fsencode(tmp_path / "run"))) == [b"\xfc"]  # and nothing where TensorStore looks


def test_file_in_the_place_of_the_directory_is_an_error(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(FileExistsError):
        Checkpointer(tmp_path / "checkpoints")


# ---- What the code relies on in Orbax; look at each at an upgrade ---------------------------------------------------


def test_orbax_still_takes_a_class_for_its_temporary_paths(tmp_path):
    finalized = []

    class Recorded(ocp.path.atomicity.AtomicRenameTemporaryPath):
        async def finalize(self):
            before = {path.name for path in Path(self.get()).iterdir()}
            await super().finalize()
            after = {path.name for path in Path(self.get_final()).iterdir()}
            finalized.append((Path(self.get()).name, Path(self.get_final()).name, after - before))

    options = ocp.CheckpointManagerOptions(temporary_path_class=Recorded, todelete_subdir="removed", max_to_keep=1)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for step in (1, 2):
            items = ocp.args.Composite(state=ocp.args.StandardSave({"a": np.ones(3)}), run=ocp.args.JsonSave({}))
            manager.save(step, args=items)
        manager.wait_until_finished()
        assert manager.all_steps() == [2]
    names = [(unfinished, final) for unfinished, final, _ in finalized]
    items = [(f"state{UNFINISHED}", "state"), (f"run{UNFINISHED}", "run")]
    assert names[2::3] == [(f"{step}{UNFINISHED}", f"{step}") for step in (1, 2)]
    assert sorted(names[:2]) == sorted(names[3:5]) == sorted(items)
    assert [written for _, name, written in finalized if name == "2"] == [{"commit_success.txt"}]
    assert names_in(tmp_path / "removed") == ["1"]


def test_orbax_still_names_its_files_so(checkpointer):
    checkpointer.save_and_wait(1, make_state())
    directory = checkpointer.directory / "1"
    names = {re.sub(r"[0-9a-f]{32}", "*", name) for name in integrity.regular_files(directory)}
    listed = {re.sub(r"[0-9a-f]{32}", "*", name) for name in Checkpoint(directory).manifest()["files"]}
    assert names - listed == {"manifest.json", *WRITTEN_LAST}
    assert listed == {
        "run/commit_success.txt",
        "run/metadata",
        "state/_METADATA",
        "state/_sharding",
        "state/array_metadatas/process_0",
        "state/commit_success.txt",
        "state/d/*",
        "state/hashes.0.json",
        "state/manifest.ocdbt",
        "state/ocdbt.process_0/d/*",
        "state/ocdbt.process_0/manifest.ocdbt",
    }


def test_orbax_still_stores_no_empty_arrays(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer, pytest.raises(ValueError, match="size"):
        checkpointer.save(tmp_path / "empty", {"a": np.zeros((0, 3))})


def test_orbax_still_loses_leaves_under_a_path_with_a_bracket(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "[a]" / "state", {"a": np.ones(3)})
        checkpointer.wait_until_finished()
        with pytest.raises(Exception, match="a"):
            checkpointer.restore(tmp_path / "[a]" / "state")
