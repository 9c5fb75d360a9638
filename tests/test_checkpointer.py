import dataclasses
import enum
import errno
import functools
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
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
from tampering import change_manifest, flip_bit, largest_file, write_file

from mnist_jax.checkpoint import integrity
from mnist_jax.checkpoint.checkpoint import Checkpoint, list_checkpoints
from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.checkpoint.directory import StorageWarning
from mnist_jax.checkpoint.integrity import (
    IncompatibleCheckpointError,
    InvalidStateError,
    NoGoodCheckpointError,
    ReadError,
    SaveError,
)

UNFINISHED = ".orbax-checkpoint-tmp"


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


def tiny(seed: int = 0) -> dict:
    return {"w": jnp.asarray(np.arange(100.0) + seed, jnp.float32), "mask": np.asarray([True, False, seed % 2 == 0])}


def bits(state) -> list[bytes]:
    return [np.asarray(integrity.raw(leaf)).tobytes() for leaf in jax.tree.leaves(state)]


def kind(leaf) -> tuple:
    """What has to be the same in a restored leaf, besides its bits."""
    array = np.asarray(integrity.raw(leaf))
    return type(leaf), getattr(leaf, "dtype", None), array.dtype, array.shape, getattr(leaf, "sharding", None)


def assert_same(restored, state) -> None:
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for (path, leaf), wanted in zip(jax.tree_util.tree_leaves_with_path(restored), jax.tree.leaves(state), strict=True):
        assert kind(leaf) == kind(wanted), integrity.leaf_name(path)
        assert bits(leaf) == bits(wanted), integrity.leaf_name(path)


@pytest.fixture
def checkpointer(tmp_path):
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints")
    yield checkpointer
    checkpointer.close()


@pytest.fixture
def reopen(checkpointer):
    """Open the directory again, as the next process does."""
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


def save_all(checkpointer: Checkpointer, *steps: int) -> None:
    for step in steps:
        checkpointer.save(step, tiny(step), wait=True)


def fail_with(error: BaseException):
    def fail(*args, **kwargs):
        raise error

    return fail


def fail_where(function, matches, error: Exception):
    """Return `function`, which raises if its first argument matches."""

    def call(first, *args, **kwargs):
        if matches(first):
            raise error
        return function(first, *args, **kwargs)

    return call


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def path_of(file: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{file}"))


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def outcomes(checkpointer: Checkpointer) -> list[str]:
    return [getattr(result, "event", type(result).__name__) for result in checkpointer.results()]


# ---- Save and restore -----------------------------------------------------------------------------------------------


def test_restore_is_exact(checkpointer, reopen, monkeypatch):
    assert checkpointer.restore(like=make_state()) is None
    assert (checkpointer.steps, checkpointer.newest_step) == ([], 0)
    state, metadata = make_state(), {"note": [1, None, "ü"]}
    checkpointer.save(5, state, metadata=metadata, wait=True)
    again = reopen()
    restored = again.restore(like=jax.eval_shape(make_state))
    assert_same(restored.state, state)
    assert (restored.step, restored.metadata, restored.quarantined) == (5, metadata, ())
    assert restored.state_sha256 == again.state_sha256(5) == checkpointer.state_sha256(5)
    assert restored.state_sha256 == integrity.json_sha256(integrity.digest_leaves(state))
    monkeypatch.chdir(checkpointer.directory.parent)
    [found] = list_checkpoints(Path("checkpoints"))  # a relative path
    assert_same(found.read(state)[0], state)
    assert found.metadata() == metadata
    assert found.verify() == found.manifest()
    assert found.bytes == sum(path.stat().st_size for path in found.path.rglob("*") if path.is_file())


def test_save_returns_before_anything_is_written(checkpointer):
    held = Held()
    checkpointer.save(1, tiny(), valid=held)
    assert checkpointer.is_saving
    assert (checkpointer.results(), checkpointer.steps, names_in(checkpointer.directory)) == ([], [], [])
    held.release()
    checkpointer.wait()
    assert not checkpointer.is_saving
    [saved] = checkpointer.results()
    assert (saved.step, saved.state_sha256) == (1, checkpointer.state_sha256(1))
    assert (checkpointer.results(), checkpointer.steps, checkpointer.newest_step) == ([], [1], 1)


def test_arguments_may_change_after_save(checkpointer):
    held, metadata = Held(), {"a": [1]}
    state = {"w": jnp.arange(100_000, dtype=jnp.float32), "host": np.arange(1000), "key": jax.random.key(3)}
    expected = bits(state)
    overwrite = jax.jit(lambda w: w * 0 - 1, donate_argnums=0)
    checkpointer.save(1, state, metadata=metadata, valid=held)
    state["w"] = jax.block_until_ready(overwrite(overwrite(state["w"])))
    state["host"][:] = -1
    metadata["a"].append(2)
    held.release()
    checkpointer.wait()
    restored = checkpointer.restore(like=state)
    assert bits(restored.state) == expected
    assert restored.metadata == {"a": [1]}


def test_each_step_is_saved_once(checkpointer):
    held = Held()
    checkpointer.save(1, tiny(1), valid=held)
    checkpointer.save(1, tiny(2))
    held.release()
    checkpointer.save(1, tiny(3), wait=True)
    assert_same(checkpointer.restore(like=tiny()).state, tiny(1))
    assert outcomes(checkpointer) == ["Saved"]


def test_newest_and_pinned_checkpoints_are_kept(checkpointer):
    for step in (9, 10, 20, 30, 40, 100):
        if step == 10:
            checkpointer.pinned = {10}
        save_all(checkpointer, step)
    assert names_in(checkpointer.directory) == ["10", "100", "30", "40"]
    assert [found.step for found in list_checkpoints(checkpointer.directory)] == checkpointer.steps == [10, 30, 40, 100]
    checkpointer.pinned = {40}
    save_all(checkpointer, 110, 120)
    assert checkpointer.steps == [40, 100, 110, 120]
    assert list_checkpoints(checkpointer.directory / "nowhere") == []


def test_invalid_or_refused_state_is_not_saved(checkpointer):
    checkpointer.save(1, tiny(), valid=jnp.bool_(False))
    checkpointer.wait()
    assert outcomes(checkpointer) == ["InvalidStateError"]
    with pytest.raises(InvalidStateError):
        checkpointer.save(1, tiny(), valid=False, wait=True)
    with pytest.raises(SaveError, match="the reason"):
        checkpointer.save(2, tiny(), refuse="the reason", wait=True)
    assert names_in(checkpointer.directory) == []


def test_save_after_prepare_compiles_nothing(checkpointer):
    keys = jax.random.split(jax.random.key(0), 5)
    state = {"w": jnp.ones((17, 3)), "keys": keys, "empty": jnp.zeros((0, 17)), "host": np.ones(17), "number": 3}
    compiled = []

    def listen(event: str, seconds: float, **metadata) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(metadata)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        checkpointer.prepare(state)
        assert len(compiled) == 1
        checkpointer.save(1, state, wait=True)
        assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": np.zeros((3, 4), np.float32)}, r"leaf w should be \[3, 4\] float32 and is \[2, 4\] float32"),
        ({"w": np.zeros((2, 4))}, r"leaf w should be \[2, 4\] float64 and is \[2, 4\] float32"),
        ({"w": np.zeros((2, 4), np.float32), "b": 1.0}, r"leaf b should be \[\] float64 and is absent"),
        ({}, r"leaf w should be absent and is \[2, 4\] float32"),
    ],
)
def test_other_tree_is_refused(checkpointer, like, message):
    checkpointer.save(7, {"w": np.zeros((2, 4), np.float32)}, wait=True)
    with pytest.raises(IncompatibleCheckpointError, match=r"step 7 .*" + message):
        checkpointer.restore(like=like)
    assert checkpointer.steps == [7]


def test_params_alone_can_be_read(checkpointer):
    checkpointer.save(1, make_state(), metadata={"reason": "test"}, wait=True)
    found = Checkpoint(checkpointer.directory / "1")
    like = {"params": make_state(1)["params"]}
    state, metadata = found.read(like, partial=True)
    assert_same(state, {"params": make_state()["params"]})
    assert metadata == {"reason": "test"}
    with pytest.raises(IncompatibleCheckpointError, match=r"leaf \w+ should be absent"):
        found.read(like)
    with pytest.raises(IncompatibleCheckpointError, match=r"leaf ema should be \[\] float64 and is absent"):
        found.read({**like, "ema": 0.0}, partial=True)


# ---- All kinds of leaves --------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Linear:
    """A module as in Equinox."""

    weight: jax.Array
    bias: jax.Array | None
    size: int = dataclasses.field(metadata={"static": True})


class Network(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0, dropout=1)
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def make_modules() -> dict:
    params = {"w": jnp.ones((3, 4)), "b": {"c": jnp.ones(3, jnp.bfloat16)}}
    optimizer = optax.chain(optax.clip(1.0), optax.adamw(optax.linear_schedule(1, 0, 10)), optax.ema(0.9))
    masked = optax.masked(optax.adam(1e-3), {"w": True, "b": {"c": False}})
    return {
        "flax": TrainState.create(apply_fn=len, params=params, tx=optimizer),
        "nnx": nnx.split(Network())[1],
        "dataclasses": [Linear(jnp.ones((2, 3)), None, 3), Linear(np.ones(2), np.ones(3), 2)],
        "optax": [optax.MultiSteps(masked, 3).init(params), optax.sgd(0.1).init(params)],
        "containers": [jnp.ones(3), (np.ones(2), {3: jnp.ones(1), 1: 2}), [[], None]],
    }


def make_keys() -> dict:
    made = {kind: jax.random.key(1, impl=kind) for kind in ("rbg", "unsafe_rbg", "threefry2x32")}
    batches = {f"{kind}-batch": jax.random.split(key, 6).reshape(2, 3) for kind, key in made.items()}
    return {**made, **batches, "none": jax.random.split(made["rbg"], 2)[:0], "raw": jax.random.PRNGKey(1)}


def make_numpy_state() -> dict:
    kinds = ["?", "b", "B", "h", "H", "i", "I", "l", "L", "q", "Q", "e", "f", "d", "F", "D"]
    arrays = {f"array {kind}": np.asarray([[0, 1, 2], [1, 0, 1]], kind) for kind in kinds}
    scalars = {f"scalar {kind}": np.asarray(1, kind)[()] for kind in kinds}
    return {**arrays, **scalars, "max": np.uint64(2**64 - 1), "third": np.float64(1 / 3), "no axis": np.asarray(1 / 3)}


def make_small_types() -> dict:
    kinds = [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4, ml_dtypes.int2]
    arrays = {
        f"{module.__name__} {kind.__name__}": module.asarray([[0, 1], [1, 0], [1, 1]], kind)
        for module in (jnp, np)
        for kind in kinds
    }
    return {**arrays, **{f"scalar {kind.__name__}": kind(1) for kind in kinds}}


STATES = {
    "modules": make_modules,
    "keys": make_keys,
    "numpy": make_numpy_state,
    "numbers": lambda: {
        "ints": [0, -5, 2**31, 2**63 - 1, -(2**63), 2**64 - 1],
        "floats": [0.1, -0.0, float("inf"), float("nan"), 5e-324],
        "bools": [True, False],
    },
    "only empty": lambda: {"a": jnp.zeros((0, 3)), "b": np.zeros((2, 0), np.int64), "c": None, "d": {}, "e": ()},
    "small types": make_small_types,
    "orders": lambda: {
        "fortran": np.asfortranarray(np.arange(15.0).reshape(3, 5)),
        "strided": np.arange(20)[::2],
        "broadcast": np.broadcast_to(np.arange(3), (4, 3)),
        "transposed": jnp.arange(6.0).reshape(2, 3).T,
        "complex": jnp.asarray([1 + 2j, -0.0j]),
    },
    "names": lambda: {
        name: np.ones(1) for name in ("a/b", "c d", "é", "'", "[0]", "*", "a%2e", "x\ny", "..", "A" * 300)
    },
    "chunks": lambda: {"a": jnp.arange(300_000.0).reshape(3, 100_000), "b": np.arange(100_000.0).reshape(5, -1)},
}


@pytest.mark.parametrize("make", STATES.values(), ids=STATES)
def test_any_state_is_restored_as_it_was(checkpointer, make):
    state = make()
    checkpointer.save(1, state, wait=True)
    assert_same(checkpointer.restore(like=state).state, state)


def test_abstract_leaf_of_64_bits_is_restored(checkpointer):
    state = {"a": np.arange(3) / 3, "b": np.asarray([2**40, -1])}
    checkpointer.save(1, state, wait=True)
    like = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in state.items()}
    assert_same(checkpointer.restore(like=like).state, state)


def test_weak_types_are_restored(checkpointer):
    """A weak float32 times a bfloat16 is a bfloat16, a strong one times it is not: a resume would not be exact."""
    state = {"scale": jnp.asarray(2.0), "mask": jnp.where(jnp.arange(3) > 1, 1.0, -0.0), "strong": jnp.ones(3)}
    assert state["scale"].weak_type
    checkpointer.save(1, state, wait=True)
    for like in (state, jax.eval_shape(lambda: state)):
        restored = checkpointer.restore(like=like).state
        assert_same(restored, state)
        assert {name: leaf.weak_type for name, leaf in restored.items()} == {
            "scale": True,
            "mask": True,
            "strong": False,
        }


class Color(enum.IntEnum):
    RED = 1


REFUSED = {
    "str": "text",
    "object array": np.asarray([1, "a"], object),
    "structured array": np.zeros(3, [("x", "f4"), ("y", "i4")]),
    "record": np.zeros(3, [("x", "f4")])[0],
    "big-endian array": np.zeros(3, ">f4"),
    "uint4": jnp.zeros(3, jnp.uint4),
    "float128": np.zeros(3, np.longdouble),
    "datetime64": np.zeros(3, "datetime64[s]"),
    "str array": np.asarray(["text"]),
    "complex number": 1j,
    "int beyond 64 bits": 2**64,
    "function": jnp.sin,
    "IntEnum": Color.RED,
    "masked array": np.ma.masked_array([1, 2], [0, 1]),
    "abstract array": jax.ShapeDtypeStruct((3,), jnp.float32),
}


def test_leaf_that_cannot_be_restored_is_refused(checkpointer):
    for leaf in REFUSED.values():
        with pytest.raises(SaveError, match=r"step 2 .*leaf model\.0\.activation "):
            checkpointer.save(2, {"model": [{"activation": leaf}], "w": np.ones(3)})
    for state in (jnp.ones(3), 3, None, {}, {"a": None, "b": []}, {"": np.ones(3)}, {"/a": np.ones(3)}):
        with pytest.raises(SaveError, match="tree of named leaves"):
            checkpointer.save(2, state)
    with pytest.raises(SaveError, match=r"the same name, a\.b"):
        checkpointer.save(2, {"a": {"b": np.zeros(1)}, "a.b": np.ones(1)})
    with pytest.raises(SaveError, match="JSON"):
        checkpointer.save(2, tiny(), metadata={"a": object()})
    assert names_in(checkpointer.directory) == []


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
    ways["StandardCheckpointer, abstract target"] = checkpointer.restore(directory / str(step) / "state", abstract)
with ocp.CheckpointManager(directory) as manager:
    assert manager.latest_step() == step
    args = ocp.args.Composite(state=ocp.args.StandardRestore(target), run=ocp.args.JsonRestore())
    for name, restored in {"": manager.restore(step), ", target": manager.restore(step, args=args)}.items():
        assert restored.run == {"reason": "test"}
        ways["CheckpointManager" + name] = restored.state
ways["v1.load"] = v1.load(directory / str(step))
ways["v1.load, target"] = v1.load(directory / str(step), target)
assert v1.load_checkpointables(directory / str(step))["run"] == {"reason": "test"}
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
    save_all(checkpointer, 3)
    checkpointer.save(5, state, metadata={"reason": "test"}, wait=True)
    program = ORBAX_ALONE.replace("\ndef digests", f"\n{inspect.getsource(make_state)}\ndef digests", 1)
    command = [sys.executable, "-W", "ignore", "-c", program, str(checkpointer.directory), "5", str(tmp_path / "read")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    wanted = {}
    for name, leaf in integrity.named_leaves({**state, "empty": None}).items():
        array = np.asarray(integrity.raw(leaf))
        wanted[name] = [str(leaf.dtype), hashlib.sha256(array.tobytes()).hexdigest()]
    ways, partly = json.loads((tmp_path / "read").read_text())
    assert len(ways) == 6
    assert {way: found for way, found in ways.items() if found != wanted} == {}
    kernel = {"params.dense.kernel": wanted["params.dense.kernel"]}
    assert partly == {"PyTreeCheckpointer": kernel, "v1.load": kernel}
    assert Checkpoint(checkpointer.directory / "5").verify()["step"] == 5  # Reading changed nothing.


def test_files_of_a_checkpoint(checkpointer):
    """Where Orbax puts which files; `Writer` relies on it, and the copies in an object store."""
    checkpointer.save(1, make_state(), wait=True)
    directory = checkpointer.directory / "1"
    names = {re.sub(r"[0-9a-f]{32}", "*", name) for name in integrity.regular_files(directory)}
    listed = {re.sub(r"[0-9a-f]{32}", "*", name) for name in Checkpoint(directory).manifest()["files"]}
    assert names - listed == {"manifest.json", "_CHECKPOINT_METADATA", "commit_success.txt"}
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


# ---- Corruption -----------------------------------------------------------------------------------------------------


def replace_file_by_link(path: Path) -> None:
    file = largest_file(path)
    file.rename(path / "elsewhere")
    file.symlink_to(path / "elsewhere")


def replace_by_older(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("1"), path)


def replace_by_link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path.with_name("1"))


CORRUPTIONS = {
    "bit in a leaf": (lambda path: flip_bit(largest_file(path)), "changed-file", "file state/"),
    "bit in the manifest": (lambda path: flip_bit(path / "manifest.json"), "bad-manifest", "manifest.json"),
    "bit in the metadata": (lambda path: flip_bit(path / "run/metadata"), "changed-file", "file run/metadata"),
    "truncated": (lambda path: os.truncate(largest_file(path), 10), "changed-file", "'bytes': 10"),
    "file deleted": (lambda path: largest_file(path).unlink(), "missing-file", "file state/"),
    "manifest deleted": (lambda path: (path / "manifest.json").unlink(), "bad-manifest", "No such file"),
    "link to a file": (replace_file_by_link, "missing-file", "file state/"),
    "another step": (replace_by_older, "other-step", "step 1"),
    "link to a checkpoint": (replace_by_link, "symbolic-link", "symbolic link"),
    "forged files": (lambda path: change_manifest(path, files={}), "bad-hashes", "hashes"),
    "forged hashes": (lambda path: write_file(path, "state/hashes.0.json", 200_000 * "["), "changed-file", "hashes.0"),
}


@pytest.mark.parametrize(("corrupt", "kind", "named"), CORRUPTIONS.values(), ids=CORRUPTIONS)
def test_corrupt_checkpoint_is_quarantined(checkpointer, corrupt, kind, named):
    save_all(checkpointer, 1, 2)
    corrupt(checkpointer.directory / "2")
    restored = checkpointer.restore(like=tiny())
    assert restored.step == 1
    assert_same(restored.state, tiny(1))
    [(error, place)] = restored.quarantined
    assert (error.step, error.kind) == (2, kind)
    assert str(error).startswith("the checkpoint of step 2 is corrupt: ")
    assert named in str(error)
    assert place == checkpointer.directory / "quarantine" / f"2-{kind}"
    assert os.path.lexists(place)
    assert checkpointer.steps == [1]


def test_step_is_saved_and_quarantined_again(checkpointer):
    save_all(checkpointer, 1, 2)
    for name in ("2-missing-file", "2-missing-file-2"):
        largest_file(checkpointer.directory / "2").unlink()
        [(_, place)] = checkpointer.restore(like=tiny()).quarantined
        assert place.name == name
        save_all(checkpointer, 2)
        assert_same(checkpointer.restore(like=tiny()).state, tiny(2))


def test_values_that_were_written_wrongly_are_found(checkpointer, monkeypatch):
    """The arrays are hashed, not what came to the disk."""
    save_all(checkpointer, 1)
    save = ocp.PyTreeCheckpointHandler.save

    def save_wrongly(self, directory, args):
        save(self, directory, args=ocp.args.PyTreeSave({**args.item, "mask": ~args.item["mask"]}))

    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "save", save_wrongly)
        save_all(checkpointer, 2)
    restored = checkpointer.restore(like=tiny())
    assert restored.step == 1
    assert "leaf mask" in str(restored.quarantined[0][0])


def test_checkpoint_on_a_failing_disk_is_quarantined(checkpointer, monkeypatch):
    save_all(checkpointer, 1, 2)
    bad = checkpointer.directory / "2" / "state"
    error = OSError(errno.EIO, os.strerror(errno.EIO), str(bad / "file"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail_where(Path.open, lambda path: bad in path.parents, error))
        restored = checkpointer.restore(like=tiny())
    assert restored.step == 1
    [(corrupt, place)] = restored.quarantined
    assert "state/file cannot be read (Input/output error)" in str(corrupt)
    assert place.name == "2-unreadable-file"


def test_newest_intact_checkpoint_is_restored(checkpointer, tmp_path):
    """Newer ones are moved, older ones stay; if all are corrupt each start fails, and none is moved."""
    save_all(checkpointer, 1, 2, 3)
    for corrupted in ((), (1, 2), (3,), (2, 3), (1, 2, 3), (1, 2, 3)):
        directory = tmp_path / "-".join(map(str, corrupted)) / "checkpoints"
        if not directory.exists():
            shutil.copytree(checkpointer.directory, directory)
        for step in corrupted:
            os.truncate(largest_file(directory / str(step)), 10)
        copy = Checkpointer(directory)
        intact = {1, 2, 3} - set(corrupted)
        if intact:
            restored = copy.restore(like=tiny())
            assert restored.step == max(intact)
            assert_same(restored.state, tiny(max(intact)))
            moved = {error.step for error, _ in restored.quarantined}
            assert moved == {step for step in corrupted if step > max(intact)}
            assert copy.steps == sorted({1, 2, 3} - moved)
        else:
            with pytest.raises(NoGoodCheckpointError, match=r"(?s)step 3 .*step 2 .*step 1 "):
                copy.restore(like=tiny())
            assert names_in(directory) == ["1", "2", "3"]
        copy.close()


@pytest.mark.parametrize("version", [3, 5])
def test_other_format_is_refused_and_stays(checkpointer, version):
    save_all(checkpointer, 1, 2)
    change_manifest(checkpointer.directory / "2", format=version)
    with pytest.raises(IncompatibleCheckpointError, match=f"step 2 has format {version}, and .* format 4"):
        checkpointer.restore(like=tiny())
    assert checkpointer.steps == [1, 2]


# ---- Errors that are no corruption ----------------------------------------------------------------------------------


@pytest.fixture
def two_checkpoints(checkpointer):
    """Two intact ones, which stay where they are."""
    save_all(checkpointer, 1, 2)
    yield checkpointer
    assert checkpointer.steps == [1, 2]
    assert names_in(checkpointer.directory) == ["1", "2"]
    restored = checkpointer.restore(like=tiny())
    assert (restored.step, restored.quarantined) == (2, ())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_unopened_file_is_not_corrupt(two_checkpoints, monkeypatch, number):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail_where(Path.open, lambda path: "state" in path.parts, os_error(number)))
        with pytest.raises(ReadError, match=os.strerror(number)):
            two_checkpoints.restore(like=tiny())


@pytest.mark.parametrize(
    "error",
    [RuntimeError("can't start new thread"), MemoryError(), ValueError("RESOURCE_EXHAUSTED: Too many open files")],
    ids=repr,
)
def test_error_of_tensorstore_is_no_corruption(two_checkpoints, monkeypatch, error):
    with monkeypatch.context() as patch:
        patch.setattr(tensorstore, "open", fail_with(error))
        with pytest.raises(ReadError, match=r"step 2 .* not known to be corrupt"):
            two_checkpoints.restore(like=tiny())


# ---- Commit ---------------------------------------------------------------------------------------------------------


def test_commit_order(tmp_path, monkeypatch):
    """All files and directories are fsynced, then the rename; then the rename is fsynced; then the old one goes."""
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints", keep=1)
    save_all(checkpointer, 1)
    directory = checkpointer.directory
    happened, on_disk = [], {}
    fsync, remove = os.fsync, shutil.rmtree

    def content(path):
        return sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()

    def record_fsync(file):
        path = path_of(file)
        on_disk[path] = content(path)
        fsync(file)
        if path == directory:
            happened.append(f"fsync {' '.join(names_in(path))}")

    def record_rename(source, target, rename=os.rename):
        source, target = Path(source), Path(target)
        if source == directory / f"2{UNFINISHED}":
            for path in (source, *source.rglob("*")):
                assert on_disk.get(path) == content(path), f"{path} is not on the disk"
        happened.append(f"{source.name} -> {target.relative_to(directory)}, committed: {checkpointer.steps}")
        return rename(source, target)

    def record_remove(path, *args, **kwargs):
        happened.append(f"remove {Path(path).relative_to(directory)}")
        return remove(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename)
    monkeypatch.setattr(os, "replace", functools.partial(record_rename, rename=os.replace))
    monkeypatch.setattr(shutil, "rmtree", record_remove)
    save_all(checkpointer, 2)
    assert happened == [
        f"2{UNFINISHED} -> 2, committed: [1]",
        "fsync 1 2",
        "1 -> removed/1, committed: [1, 2]",
        "remove removed/1",
    ]
    assert {"manifest.json", "hashes.0.json", "metadata"} <= {path.name for path in on_disk}
    checkpointer.close()


def test_parents_of_the_directory_are_fsynced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(path_of(file)))
    Checkpointer(tmp_path / "runs" / "one" / "checkpoints").close()
    assert synced[:4] == [tmp_path / "runs/one/checkpoints", tmp_path / "runs/one", tmp_path / "runs", tmp_path]


@pytest.mark.parametrize("name", ["2/state/d", "2/run/metadata", "2/manifest.json", "2", ""])
def test_failed_save_changes_nothing_and_is_retried(checkpointer, monkeypatch, name):
    save_all(checkpointer, 1)
    checkpointer.results()
    failing = (checkpointer.directory / name).as_posix()

    def matches(file: int) -> bool:
        return path_of(file).as_posix().replace(UNFINISHED, "") == failing

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_where(os.fsync, matches, os_error(errno.ENOSPC)))
        checkpointer.save(2, tiny(2))
        checkpointer.wait()
        [failure] = checkpointer.results()
        assert (type(failure), failure.step) == (SaveError, 2)
        assert "step 2 could not be saved: OSError: [Errno 28] No space left on device" in str(failure)
        with pytest.raises(SaveError, match="No space left on device"):
            checkpointer.save(2, tiny(2), wait=True)
    assert (checkpointer.steps, names_in(checkpointer.directory)) == ([1], ["1"])
    save_all(checkpointer, 2)
    assert_same(checkpointer.restore(like=tiny()).state, tiny(2))


def test_leaf_that_was_not_written_fails_the_save(checkpointer, monkeypatch):
    save_all(checkpointer, 1, 2, 3)
    save = ocp.PyTreeCheckpointHandler.save

    def save_others(self, directory, args):
        save(self, directory, args=ocp.args.PyTreeSave({**args.item, "mask": None}))

    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "save", save_others)
        with pytest.raises(SaveError, match="mask"):
            save_all(checkpointer, 4)
    assert names_in(checkpointer.directory) == ["1", "2", "3"]


def test_checkpoint_of_another_process_is_quarantined(checkpointer):
    save_all(checkpointer, 1)
    shutil.copytree(checkpointer.directory / "1", checkpointer.directory / "2")
    save_all(checkpointer, 2)
    assert_same(checkpointer.restore(like=tiny()).state, tiny(2))
    assert names_in(checkpointer.directory / "quarantine") == ["2-not-committed"]


def test_vanished_checkpoints_are_reported(checkpointer):
    save_all(checkpointer, 1, 2)
    checkpointer.results()
    shutil.rmtree(checkpointer.directory)
    save_all(checkpointer, 3)
    warning, saved = checkpointer.results()
    assert (warning.event, saved.step, checkpointer.steps) == ("checkpoints_vanished", 3, [3])
    assert "1, 2" in str(warning)


@pytest.mark.parametrize("is_replaced", [False, True])
def test_nothing_is_written_where_the_run_was_moved_away(tmp_path, is_replaced):
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints")
    save_all(checkpointer, 1)
    (tmp_path / "run").rename(tmp_path / "moved")
    if is_replaced:  # by a run that saves the same step
        (tmp_path / "run" / "checkpoints" / f"2{UNFINISHED}").mkdir(parents=True)
    before = sorted(tmp_path.glob("run/**/*"))
    with pytest.raises(SaveError, match="run was moved"):
        save_all(checkpointer, 2)
    assert sorted(tmp_path.glob("run/**/*")) == before
    assert names_in(tmp_path / "moved" / "checkpoints") == ["1"]
    checkpointer.close()


# ---- Leftovers, priority, free space --------------------------------------------------------------------------------


def test_only_leftovers_are_removed(checkpointer, reopen, tmp_path):
    save_all(checkpointer, 1)
    directory = checkpointer.directory
    leftovers = [f"2{UNFINISHED}", "3.unfinished", f"5{UNFINISHED}", "6.ready", "removed/4"]
    for name in (f"2{UNFINISHED}", "3.unfinished", "removed/4", "4.backup", "quarantine", "x"):
        shutil.copytree(directory / "1", directory / name)
    (directory / "6.ready").touch()
    outside = tmp_path / "outside"
    shutil.copytree(directory / "1", outside)
    (directory / f"5{UNFINISHED}").symlink_to(outside)
    again = reopen()
    assert sorted(again.removed) == leftovers
    assert again.steps == [1]
    assert again.restore(like=tiny()).step == 1
    assert names_in(directory) == ["1", "4.backup", "quarantine", "x"]
    assert (outside / "manifest.json").exists()


def test_leftover_that_cannot_be_removed_is_moved_aside(checkpointer, reopen, monkeypatch):
    """Such as a busy file on NFS. The step that it belongs to can be saved."""
    save_all(checkpointer, 1)
    leftover = checkpointer.directory / f"2{UNFINISHED}"
    (leftover / "state" / "array_metadatas").mkdir(parents=True)
    inode = leftover.stat().st_ino
    matches = lambda path: os.stat(path).st_ino == inode  # noqa: E731
    monkeypatch.setattr(shutil, "rmtree", fail_where(shutil.rmtree, matches, os_error(errno.EBUSY)))
    again = reopen()
    assert again.removed == ()
    save_all(again, 2)
    assert outcomes(again) == ["removal_failed", "Saved"]
    assert (again.restore(like=tiny()).step, again.steps) == (2, [1, 2])


@pytest.mark.parametrize("name", ["rename", "rmtree"])
def test_old_checkpoint_that_cannot_be_removed_is_reported(checkpointer, reopen, monkeypatch, name):
    checkpointer.keep = 1
    save_all(checkpointer, 1)
    with monkeypatch.context() as patch:
        if name == "rmtree":
            patch.setattr(shutil, "rmtree", fail_with(os_error(errno.EACCES)))
        else:
            is_old = lambda path: path == checkpointer.directory / "1"  # noqa: E731
            patch.setattr(Path, "rename", fail_where(Path.rename, is_old, os_error(errno.EBUSY)))
        save_all(checkpointer, 2)
    assert outcomes(checkpointer) == ["Saved", "Saved", "removal_failed"]
    assert checkpointer.steps == ([2] if name == "rmtree" else [1, 2])
    save_all(checkpointer, 3)
    assert names_in(checkpointer.directory) == ["3"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere priorities belong to processes")
def test_only_background_saves_have_a_low_priority(checkpointer):
    priorities = []

    class Look:
        def __bool__(self):
            priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
            return True

    mine = os.getpriority(os.PRIO_PROCESS, 0)
    checkpointer.save(1, tiny(), valid=Look())
    checkpointer.save(2, tiny(), valid=Look(), wait=True)
    assert priorities == [max(10, mine), mine]


def test_save_does_not_need_a_priority_or_the_free_space(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "setpriority", fail_with(os_error(errno.EACCES)))
    monkeypatch.setattr(os, "statvfs", fail_with(os_error(errno.ENOSYS)))
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(1, tiny())
    checkpointer.close()
    assert outcomes(checkpointer) == ["Saved"]


def test_low_space_is_reported_once_until_there_is_space(checkpointer, monkeypatch):
    statvfs, warnings = os.statvfs, []
    for step, free in enumerate((10**9, 10**3, 10**3, 10**9, 10**3)):
        with monkeypatch.context() as patch:
            fields = list(statvfs(checkpointer.directory))
            fields[1], fields[4] = 1, free  # f_frsize, f_bavail
            patch.setattr(os, "statvfs", lambda path, fields=fields: os.statvfs_result(fields))
            save_all(checkpointer, step)
        warnings += [(step, found.event) for found in checkpointer.results() if isinstance(found, StorageWarning)]
    assert warnings == [(1, "low_space"), (4, "low_space")]


# ---- Paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lr=0.1,seed=[0]", "*", "ü b"])
def test_any_path_can_hold_checkpoints(tmp_path, name):
    for place, step in (
        (name, 1),
        ("moved", 2),
        (name, 3),
    ):  # A run may be moved to a path of the other kind, and back.
        checkpointer = Checkpointer(tmp_path / place / "checkpoints")
        save_all(checkpointer, step)
        for found in list_checkpoints(checkpointer.directory):
            assert_same(found.read(tiny())[0], tiny(found.step))
        assert len(checkpointer.steps) == step
        checkpointer.close()
        (tmp_path / place).rename(tmp_path / ("moved" if place == name else name))


@pytest.mark.parametrize("name", [b"a\\b", b"a\xff"], ids=repr)
def test_path_that_tensorstore_does_not_find_is_refused(tmp_path, name):
    with pytest.raises(OSError, match="TensorStore does not find"):
        Checkpointer(tmp_path / os.fsdecode(name))
    assert names_in(tmp_path) == []


def test_path_that_the_locale_does_not_encode_as_utf8_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda path: str(path).encode("latin-1"))
    with pytest.raises(OSError, match="UTF-8"):
        Checkpointer(tmp_path / "ü")
    assert names_in(tmp_path) == []
