"""Processes that save and restore a sharded state together; `Group` calls the functions of this module in them."""

import contextlib
import errno
import faulthandler
import json
import logging
import math
import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from forked import server
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from several import free_port

from mnist_jax.checkpoint import integrity
from mnist_jax.checkpoint.checkpoint import Checkpoint
from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.checkpoint.integrity import CorruptCheckpointError, SaveError


class HungError(Exception):
    """A process did not answer in time."""


class EndedError(Exception):
    """A process ended."""


class Group:
    """Processes with some devices each, forked from a server that has imported JAX and Orbax."""

    def __init__(self, processes: int, devices: int) -> None:
        """Start them."""
        context = server()
        self.name, self.size, self.is_broken = f"{processes}x{devices}", processes, False
        coordinator = f"127.0.0.1:{free_port()}"
        self._connections, self._processes = [], []
        for index in range(processes):
            ours, theirs = context.Pipe()
            arguments = (coordinator, processes, index, devices, theirs)
            self._processes.append(context.Process(target=work, args=arguments, daemon=True))
            self._processes[-1].start()
            theirs.close()
            self._connections.append(ours)

    def send(self, name: str, **arguments: Any) -> None:
        """Make all processes call a function."""
        for connection in self._connections:
            connection.send((name, arguments))

    def answer(self, index: int, timeout_s: float = 90) -> Any:
        """Return the next answer of a process.

        Raises:
            HungError: it did not come in time.
            EndedError: the process ended.
        """
        try:
            if not self._connections[index].poll(timeout_s):
                self.is_broken = True
                os.kill(self._processes[index].pid or 0, signal.SIGUSR1)  # It prints where its threads are.
                raise HungError(f"process {index} of {self.name} does not answer")
            result, error = self._connections[index].recv()
        except (EOFError, ConnectionResetError) as ended:
            self.is_broken = True
            raise EndedError(f"process {index} of {self.name} ended") from ended
        assert not error, f"process {index} of {self.name}: {error}"
        return result

    def call(self, name: str, *, timeout_s: float = 90, **arguments: Any) -> list[Any]:
        """Make all processes call a function, and return the results."""
        self.send(name, **arguments)
        return [self.answer(index, timeout_s) for index in range(self.size)]

    def call_one(self, index: int, name: str, *, timeout_s: float = 90, **arguments: Any) -> Any:
        """Make one process call a function."""
        self._connections[index].send((name, arguments))
        return self.answer(index, timeout_s)

    def kill(self, index: int) -> None:
        """Kill one of them."""
        self._processes[index].kill()

    def close(self) -> None:
        """Kill them all."""
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()


def work(coordinator: str, count: int, index: int, devices: int, connection: Connection) -> None:
    """Answer the requests of a `Group`, in one of its processes."""
    global _connection
    _connection = connection
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.environ.update(JAX_PLATFORMS="cpu", XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, count, index, initialization_timeout=60)
    while True:
        name, arguments = connection.recv()
        try:
            result, error = globals()[name](**arguments), None
        except Exception:
            result, error = None, traceback.format_exc()
        connection.send((result, error))


# ---- A state with all kinds of leaves -------------------------------------------------------------------------------


@cache
def host_state() -> dict[str, Any]:
    """Return the state as numpy arrays, complete in each process; key data for keys."""
    rng = np.random.default_rng(7)
    return {
        "large": rng.standard_normal((768, 96), np.float32),
        "wide": rng.standard_normal((96, 768), np.float32).astype(jnp.bfloat16),
        "both": rng.integers(0, 1000, (240, 192), np.int32),
        "small": rng.standard_normal((24, 3), np.float32),
        "biases": {"one": rng.standard_normal(48, np.float32), "scalar": np.float32(0.1)},
        "replicated": rng.standard_normal((300, 100), np.float32),
        "keys": rng.integers(0, 2**32, (24, 2), np.uint32),
        "columns": np.zeros((0, 24), np.float32),
        "rows": np.zeros((0, 24), np.float32),
        "joined": rng.integers(0, 2, (48, 3)).astype(bool),
        "step": 7,
        "rate": 0.5,
        "wide_host": rng.integers(0, 2**60, 10),
        "host_scalar": np.float64(1 / 3),
        "nothing": None,
    }


SPLIT = {
    "large": P("fsdp"),
    "wide": P(None, "fsdp"),
    "both": P("fsdp", "data"),
    "small": P("fsdp"),
    "biases": {"one": P("fsdp"), "scalar": P()},
    "replicated": P(),
    "keys": P("fsdp"),
    "columns": P(None, "fsdp"),
    "rows": P("fsdp"),
    "joined": P(("data", "fsdp")),
}


def make_mesh(name: str, devices: int | None = None) -> Mesh:
    """Return a mesh with the axes `data` and `fsdp` over the first devices: 1 by n, or 2 by n / 2."""
    chosen = np.asarray(jax.devices()[:devices])
    return Mesh(chosen.reshape(1, -1) if name == "line" else chosen.reshape(-1, 2).T, ("data", "fsdp"))


def make_state(mesh: Mesh, spec: str) -> dict[str, Any]:
    """Return the state on a mesh, "split" or "replicated". No process sends anything to another."""

    def place(leaf: np.ndarray, partition: P) -> jax.Array:
        return put(leaf, NamedSharding(mesh, partition if spec == "split" else P()))

    state = dict(host_state())
    for name, specs in SPLIT.items():
        state[name] = jax.tree.map(place, state[name], specs)
    state["keys"] = jax.jit(jax.random.wrap_key_data, out_shardings=state["keys"].sharding)(state["keys"])
    return state


def put(leaf: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Return an array with a sharding over the devices of all processes."""
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def abstract(state: Any) -> Any:
    """Return the state without the values of its arrays."""

    def describe(leaf: Any) -> Any:
        is_array = isinstance(leaf, jax.Array)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if is_array else leaf

    return jax.tree.map(describe, state)


def differences(found: Any, wanted: Any) -> list[str]:
    """Return the names of the leaves whose type, sharding or bits on the devices of this process differ."""
    leaves, others = integrity.named_leaves(found), integrity.named_leaves(wanted)
    return [name for name in leaves.keys() | others.keys() if _bits(leaves[name]) != _bits(others[name])]


def _bits(leaf: Any) -> list[Any]:
    if not isinstance(leaf, jax.Array):
        return [type(leaf), np.asarray(leaf).dtype, np.asarray(leaf).tobytes()]
    shards = [np.asarray(shard.data).tobytes() for shard in integrity.raw(leaf).addressable_shards]
    return [leaf.shape, leaf.dtype, leaf.sharding, *shards]


# ---- Functions to call in a process ---------------------------------------------------------------------------------


def write(directory: str) -> dict[str, str]:
    """Save the state once for each mesh and spec, and return the digests."""
    checkpointer = Checkpointer(directory, keep=100, timeout_s=60)
    for step, (mesh, spec) in enumerate(_layouts(), 1):
        checkpointer.save(step, make_state(mesh, spec), metadata={"step": step}, wait=True)
    checkpointer.close()
    return {str(step): checkpointer.state_sha256(step) for step in checkpointer.steps}


def _layouts() -> Iterator[tuple[Mesh, str]]:
    yield make_mesh("line"), "split"
    yield make_mesh("line"), "replicated"
    if jax.device_count() > 1:
        yield make_mesh("grid"), "split"
    if jax.process_count() == 1 and jax.device_count() == 8:
        yield make_mesh("line", 6), "split"  # no power of two: a chunk lies in two shards


def read(paths: list[str]) -> list[Any]:
    """Read checkpoints into the meshes and specs of this process in turn; return what differs, and the metadata."""
    layouts = list(_layouts())
    found = []
    for number, path in enumerate(paths):
        wanted = make_state(*layouts[number % len(layouts)])
        state, metadata = Checkpoint(Path(path)).read(abstract(wanted))
        found.append([differences(state, wanted), metadata])
    return found


def expected_digest() -> str:
    """Return the digest of the state, computed on the host of one process."""
    keys = jax.random.wrap_key_data(host_state()["keys"])
    return integrity.json_sha256(integrity.digest_leaves({**host_state(), "keys": keys}))


def mixed(directory: str) -> list[list[str]]:
    """Save leaves on different devices of this process, read them in other layouts, and return what differs."""
    line, grid, three = make_mesh("line"), make_mesh("grid"), Mesh(np.asarray(jax.devices()[5:8]), "x")
    first, last = (jax.sharding.SingleDeviceSharding(jax.devices()[number]) for number in (0, -1))
    shapes = {"rows": (24, 1000), "blocks": (8, 8), "keys": (24, 2)}
    layouts = (
        {"rows": NamedSharding(three, P("x")), "blocks": NamedSharding(grid, P("fsdp", "data")), "keys": last},
        {"rows": first, "blocks": last, "keys": NamedSharding(line, P("fsdp"))},
    )
    checkpointer, states = Checkpointer(directory), []
    for step, layout in enumerate(layouts):
        values = {name: np.arange(np.prod(shape), dtype=np.uint32).reshape(shape) for name, shape in shapes.items()}
        states.append({name: put(leaf, layout[name]) for name, leaf in values.items()})
        states[-1]["keys"] = jax.random.wrap_key_data(states[-1]["keys"])
        checkpointer.save(step, states[-1], wait=True)
    checkpointer.close()
    return [
        differences(Checkpoint(Path(directory, str(step))).read(like)[0], state)
        for step in (0, 1)
        for state in states
        for like in (state, abstract(state))
    ]


def try_read(path: str) -> str:
    """Return "intact", or the kind of corruption."""
    try:
        Checkpoint(Path(path)).read(abstract(make_state(make_mesh("line"), "split")))
    except CorruptCheckpointError as error:
        return error.kind
    return "intact"


def open_checkpointer(directory: str, timeout_s: int = 60) -> None:
    """Open a directory for the functions below."""
    global _checkpointer, _state
    _checkpointer = Checkpointer(directory, timeout_s=timeout_s)
    _state = make_state(make_mesh("line"), "split")


def close_checkpointer() -> None:
    """Close it."""
    _checkpointer.close()


def save(step: int, wait: bool, fault: str | None = None, processes: Sequence[int] = ()) -> list[str]:
    """Save, with a fault in some processes, and return the types of the results."""
    is_faulty = fault is not None and jax.process_index() in processes
    with FAULTS[fault]() if is_faulty else contextlib.nullcontext(), contextlib.suppress(SaveError):
        _checkpointer.save(step, _state, metadata={"step": step}, wait=wait)
        _checkpointer.wait()
    return [type(result).__name__ for result in _checkpointer.results()]


def digest(step: int) -> str:
    """Return the digest of the state in a checkpoint."""
    return _checkpointer.state_sha256(step)


def restore() -> list[Any]:
    """Restore on this process alone; return the step, what differs, and what was quarantined."""
    restored = _checkpointer.restore(abstract(_state))
    assert restored is not None
    quarantined = [f"{error.step} {error.kind}" for error, _ in restored.quarantined]
    return [restored.step, differences(restored.state, _state), quarantined]


def stop_in_save(directory: str, where: str, who: int) -> None:
    """Save once, and start another save, in which one process stops for ever in a function and says so."""
    open_checkpointer(directory)
    _checkpointer.save(1, _state, wait=True)
    _checkpointer.close()
    open_checkpointer(directory, timeout_s=5)

    start_endless_save(where, who)


def start_endless_save(where: str, who: int) -> None:
    """Start to save step 2. One process stops for ever in a function and says so."""

    def stay(*_: Any, **__: Any) -> None:
        _connection.send((where, None))
        time.sleep(600)

    if jax.process_index() == who:
        setattr(integrity, where, stay)
    _checkpointer.save(2, _state)


def wait_for_save() -> list[str]:
    """Wait for the save, and return the types of the results."""
    _checkpointer.wait()
    return [type(result).__name__ for result in _checkpointer.results()]


# ---- A large state --------------------------------------------------------------------------------------------------

LARGE_LEAVES = 16


def large_spec(megabytes: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the leaves of a state of this size, split over all devices."""
    sharding = NamedSharding(make_mesh("line"), P("fsdp"))
    rows = megabytes * 10**6 // (4096 * LARGE_LEAVES) // 8 * 8
    leaf = jax.ShapeDtypeStruct((rows, 1024), np.float32, sharding=sharding)
    return {f"leaf{number}": leaf for number in range(LARGE_LEAVES)}


def _large_part(name: str, leaf: Any, index: Any) -> np.ndarray:
    """Return a shard of a leaf, which depends on its name and place only."""
    rows = index[0].indices(leaf.shape[0])
    generator = np.random.default_rng([*name.encode(), rows[0]])
    return generator.random((rows[1] - rows[0], leaf.shape[1]), np.float32)


def save_large(directory: str, megabytes: int) -> dict[str, float]:
    """Make a large state and save it; return what that cost this process."""
    global _checkpointer, _state
    _checkpointer = Checkpointer(directory, timeout_s=60)
    _state = {
        name: jax.make_array_from_callback(leaf.shape, leaf.sharding, partial(_large_part, name, leaf))
        for name, leaf in large_spec(megabytes).items()
    }
    _checkpointer.prepare(_state)
    before_mb, started_s = _peak_mb(), time.monotonic()
    _checkpointer.save(1, _state)
    waited_s = time.monotonic() - started_s
    assert "SaveError" not in wait_for_save()
    seconds = time.monotonic() - started_s
    hashed = json.loads(Path(directory, "1", "state", f"hashes.{jax.process_index()}.json").read_text())
    return {
        "wait of the main thread, s": waited_s,
        "time to commit, s": seconds,
        "hashed leaves, MB": hashed_bytes(hashed["leaves"]) / 1e6,
        "hashed files, MB": sum(row["bytes"] for row in hashed["files"].values()) / 1e6,
        "peak memory before, MB": before_mb,
        "peak memory, MB": _peak_mb(),
    }


def hashed_bytes(leaves: dict[str, Any]) -> float:
    """Return how many bytes of the leaves a process hashed or sent, from what it wrote."""
    return sum(
        row["itemsize"] * math.prod(row["raw_shape"]) / math.prod(row["counts"]) * len(row["chunks"])
        + sum(len(piece["bytes"]) * 3 / 4 for piece in row["pieces"])
        for row in leaves.values()
    )


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6  # Linux counts in kibibytes.


def restore_large(directory: str, megabytes: int) -> dict[str, float]:
    """Restore the large state; return what that cost, and the number of leaves with wrong values."""
    like, started_s = large_spec(megabytes), time.monotonic()
    if jax.process_index() == 0:
        checkpointer = Checkpointer(directory)
        restored = checkpointer.restore(like)
        assert restored is not None
        state, step = restored.state, restored.step
        checkpointer.close()
    else:
        state, step = Checkpoint(Path(directory, "1")).read(like)[0], 1
    seconds, peak_mb = time.monotonic() - started_s, _peak_mb()
    wrong = [
        name
        for name, leaf in state.items()
        for shard in leaf.addressable_shards
        if not np.array_equal(shard.data, _large_part(name, leaf, shard.index))
    ]
    return {"step": step, "time to restore, s": seconds, "peak memory, MB": peak_mb, "wrong leaves": len(wrong)}


# ---- Training and saves ---------------------------------------------------------------------------------------------


def compiled_by_a_save(directory: str) -> list[str]:
    """Return what the first save of replicated leaves compiles after `prepare`."""
    sharding = NamedSharding(make_mesh("line"), P())
    state = {f"leaf{number}": put(np.zeros((40 + 8 * number, 16), np.float32), sharding) for number in range(4)}
    checkpointer = Checkpointer(directory)
    checkpointer.prepare(state)
    names = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Compiling"):
                names.append(record.getMessage()[:80])

    logging.getLogger("jax._src.interpreters.pxla").addHandler(Handler())
    jax.config.update("jax_log_compiles", True)  # `jax.log_compiles()` affects one thread.
    checkpointer.save(1, state, wait=True)
    jax.config.update("jax_log_compiles", False)
    checkpointer.close()
    return names


def train(directory: str, saves: int, steps_per_save: int) -> list[Any]:
    """Train with a collective in each update and donated buffers, and save in the background.

    Returns the saved steps, those with wrong values, and the number of updates during saves.
    """
    mesh = make_mesh("line")
    shardings = {"w": NamedSharding(mesh, P("fsdp")), "total": NamedSharding(mesh, P())}
    values = {"w": np.arange(64 * 32, dtype=np.float32).reshape(64, 32) / 1000, "total": np.float32(0)}
    state = {name: put(np.asarray(leaf), shardings[name]) for name, leaf in values.items()}

    def update(state: Any) -> Any:
        total = jnp.sum(state["w"])  # all-reduce
        return {"w": state["w"] * 0.999 + jnp.roll(state["w"], 1, axis=0) * 0.001 + 0.001, "total": total}

    update_program = jax.jit(update, donate_argnums=0, out_shardings=shardings)
    checkpointer = Checkpointer(directory, keep=saves, timeout_s=60)
    checkpointer.prepare(state)
    like, expected, updates_during_saves = abstract(state), {}, 0
    for step in range(1, saves + 1):
        expected[step] = [_bits(state[name]) for name in like]
        checkpointer.save(step, state)
        for _ in range(steps_per_save):  # the same number on all processes, and longer than a save takes
            state = update_program(state)
            time.sleep(0.0005)
            updates_during_saves += checkpointer.is_saving
    checkpointer.wait()
    restored = {step: Checkpoint(Path(directory, str(step))).read(like)[0] for step in checkpointer.steps}
    wrong = [step for step, found in restored.items() if [_bits(found[name]) for name in like] != expected[step]]
    checkpointer.close()
    return [checkpointer.steps, wrong, updates_during_saves]


# ---- Faults ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _patched(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _failing(owner: Any, name: str, number: int, *, only_unfinished: bool = False) -> AbstractContextManager[None]:
    """Make a function fail as a disk does."""
    original = getattr(owner, name)

    def function(*args: Any, **kwargs: Any) -> Any:
        if not only_unfinished or str(args[0]).endswith(".orbax-checkpoint-tmp"):
            raise OSError(number, os.strerror(number))
        return original(*args, **kwargs)

    return _patched(owner, name, function)


@contextlib.contextmanager
def _limited_file_size(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _vanishing_lock_file() -> AbstractContextManager[None]:
    """Let `os.walk` return a file that the other process removes before it is opened."""
    original = os.walk

    def walk(top: Any, *args: Any, **kwargs: Any) -> Any:
        for parent, directories, files in original(top, *args, **kwargs):
            is_other = parent.endswith(f"ocdbt.process_{1 - jax.process_index()}")
            yield parent, directories, [*files, *["manifest.ocdbt.__lock"] * is_other]

    return _patched(os, "walk", walk)


def _out_of_memory(*_: Any, **__: Any) -> Any:
    raise MemoryError("not enough memory to fetch a shard")


FAULTS: dict[str | None, Callable[[], AbstractContextManager[None]]] = {
    "prepare": lambda: _failing(Path, "mkdir", errno.EIO),
    "create": lambda: _failing(os, "mkdir", errno.ENOSPC, only_unfinished=True),
    "hash": lambda: _patched(integrity, "hash_shards", _out_of_memory),
    "write": lambda: _limited_file_size(20_000),  # TensorStore fails with EFBIG.
    "fsync": lambda: _failing(os, "fsync", errno.EIO),
    "rename": lambda: _failing(os, "rename", errno.EIO, only_unfinished=True),
    "vanishing lock file": _vanishing_lock_file,
}
