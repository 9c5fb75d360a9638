"""Processes that save and restore a sharded state together.

`Group` starts them and calls the functions of this module in them. Requests and answers are JSON, one object a line.
"""

import contextlib
import errno
import faulthandler
import json
import logging
import math
import os
import queue
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from several import free_port

from mnist_jax.checkpoint import integrity
from mnist_jax.checkpoint.checkpoint import Checkpoint
from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.checkpoint.integrity import CorruptCheckpointError, SaveError

START_S = 60


class HungError(Exception):
    """A process did not answer in time."""


class EndedError(Exception):
    """A process ended."""


# ---- From outside ---------------------------------------------------------------------------------------------------


class Group:
    """Processes that meet, with some devices each, and do what they are told.

    One interpreter imports JAX and Orbax and forks them before either has a thread, which saves a second for each.
    """

    def __init__(self, processes: int, devices: int) -> None:
        """Start them."""
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "OPENBLAS_NUM_THREADS": "1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        self.name = f"{processes}x{devices}"
        self.is_broken = False
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the processes
        requests, answers = ([os.pipe() for _ in range(processes)] for _ in range(2))
        theirs = [descriptor for pair in zip(requests, answers, strict=True) for descriptor in (pair[0][0], pair[1][1])]
        self._parent = subprocess.Popen(
            [sys.executable, __file__, f"127.0.0.1:{free_port()}", *map(str, theirs)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            pass_fds=theirs,
            start_new_session=True,
        )
        for descriptor in theirs:
            os.close(descriptor)
        self._requests = [os.fdopen(pair[1], "w") for pair in requests]
        self._answers: list[queue.SimpleQueue[str]] = [queue.SimpleQueue() for _ in answers]
        self._readers = [
            threading.Thread(target=self._read, args=(os.fdopen(pair[0]), found))
            for pair, found in zip(answers, self._answers, strict=True)
        ]
        for reader in self._readers:
            reader.start()

    @cached_property
    def pids(self) -> list[int]:
        """Their numbers, which they tell first."""
        return [self._next(index, START_S) for index in range(len(self._answers))]

    @staticmethod
    def _read(file: TextIO, found: queue.SimpleQueue[str]) -> None:
        with file:
            for line in file:
                found.put(line)
        found.put("{}")  # It ended.

    def send(self, name: str, *, to: int | None = None, **arguments: Any) -> None:
        """Have all processes, or one, call a function."""
        for file in self._requests if to is None else [self._requests[to]]:
            with contextlib.suppress(BrokenPipeError):
                file.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
                file.flush()

    def answer(self, index: int, timeout_s: float = 60) -> Any:
        """Return what a process answers next.

        Raises:
            HungError: nothing came in time.
            EndedError: it ended, and answers no more.
        """
        assert self.pids
        return self._next(index, timeout_s)

    def _next(self, index: int, timeout_s: float) -> Any:
        try:
            found = json.loads(self._answers[index].get(timeout=timeout_s))
        except queue.Empty:
            self.is_broken = True
            stacks = self._stacks() if "pids" in self.__dict__ else ""
            raise HungError(f"process {index} of {self.name} does not answer:\n{stacks}") from None
        if not found:
            self.is_broken = True
            raise EndedError(f"process {index} of {self.name} ended:\n{self.stderr()}")
        assert "error" not in found, f"process {index} of {self.name}: {found['error']}"
        return found["result"]

    def _stacks(self) -> str:
        """Return where all their threads are."""
        seen = len(self.stderr())
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(0.5)
        return self.stderr()[seen:]

    def call(self, name: str, *, timeout_s: float = 60, **arguments: Any) -> list[Any]:
        """Have all processes call a function, and return what each of them returns."""
        self.send(name, **arguments)
        return [self.answer(index, timeout_s) for index in range(len(self.pids))]

    def call_one(self, index: int, name: str, *, timeout_s: float = 60, **arguments: Any) -> Any:
        """Have one process call a function."""
        self.send(name, to=index, **arguments)
        return self.answer(index, timeout_s)

    def stderr(self) -> str:
        """Return what they wrote to stderr."""
        self.log.seek(0)
        return self.log.read()

    def kill(self, index: int) -> None:
        """End one of them as the kernel does."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[index], signal.SIGKILL)

    def close(self) -> None:
        """End them all at once."""
        os.killpg(self._parent.pid, signal.SIGKILL)  # Not by their numbers: those of the dead may be others' by now.
        self._parent.wait()
        for reader, file in zip(self._readers, self._requests, strict=True):
            reader.join()
            with contextlib.suppress(BrokenPipeError):
                file.close()
        self.log.close()


# ---- A state of all kinds of leaves ---------------------------------------------------------------------------------


@cache
def host_state(seed: int) -> dict[str, Any]:
    """Return a state as numpy arrays, whole in each process; of keys their data."""
    rng = np.random.default_rng(seed)
    key_data = jax.random.key_data(jax.random.split(jax.random.key(seed), 24))
    return {
        "large": rng.standard_normal((768, 192), np.float32),
        "wide": rng.standard_normal((96, 1536), np.float32).astype(jnp.bfloat16),
        "both": rng.integers(0, 1000, (480, 384), np.int32),
        "thirds": rng.standard_normal((24 * 7, 24), np.float32),
        "small": rng.standard_normal((24, 3), np.float32),
        "biases": {"one": rng.standard_normal(48, np.float32), "scalar": np.float32(rng.standard_normal())},
        "replicated": rng.standard_normal((300, 100), np.float32),
        "keys": np.asarray(key_data),
        "key": np.asarray(key_data[0]),
        "step": seed,
        "rate": 0.5,
        "wide_host": rng.integers(0, 2**60, 10),
        "host_scalar": np.float64(rng.standard_normal()),
        "host_empty": np.zeros((3, 0), np.int64),
        "nothing": None,
    }


HOST = ("step", "rate", "wide_host", "host_scalar", "host_empty", "nothing")
SPLIT = {
    "large": P("fsdp"),
    "wide": P(None, "fsdp"),
    "both": P("fsdp", "data"),
    "thirds": P("fsdp"),
    "small": P("fsdp"),
    "biases": {"one": P("fsdp"), "scalar": P()},
    "replicated": P(),
    "keys": P("fsdp"),
    "key": P(),
}


def mesh_of(name: str, devices: int | None = None) -> Mesh:
    """Return a mesh with the axes `data` and `fsdp` over the first devices: 1 by n, or 2 by n / 2."""
    chosen = np.asarray(jax.devices()[:devices])
    return Mesh(chosen.reshape(1, -1) if name == "line" else chosen.reshape(-1, 2).T, ("data", "fsdp"))


def sharded(seed: int, mesh: Mesh, spec: str) -> dict[str, Any]:
    """Return the state of a seed on a mesh; no process sends anything to another."""
    host = host_state(seed)
    state = {name: leaf for name, leaf in host.items() if name in HOST}
    for name, specs in SPLIT.items():
        shardings = jax.tree.map(
            lambda each: NamedSharding(mesh, each if spec == "split" else P()),
            specs,
            is_leaf=lambda leaf: isinstance(leaf, P),
        )
        state[name] = jax.tree.map(_put, host[name], shardings)
        if name in ("key", "keys"):
            state[name] = jax.jit(jax.random.wrap_key_data, out_shardings=shardings)(state[name])
    return state


def _put(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def abstract(state: Any) -> Any:
    """Return the state without its values."""
    return jax.tree.map(
        lambda leaf: (
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            if isinstance(leaf, jax.Array)
            else leaf
        ),
        state,
    )


def differences(found: Any, wanted: Any) -> list[str]:
    """Return the names of the leaves whose type, sharding or bits on this process's devices differ."""
    if jax.tree.structure(found) != jax.tree.structure(wanted):
        return ["structure"]
    names = [integrity.leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(wanted)]
    pairs = zip(names, jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return [name for name, one, other in pairs if not _is_same(one, other)]


def _is_same(found: Any, wanted: Any) -> bool:
    if type(found) is not type(wanted):
        return False
    if not isinstance(wanted, jax.Array):
        return np.asarray(found).dtype == np.asarray(wanted).dtype and _bits(found) == _bits(wanted)
    if found.dtype != wanted.dtype or found.sharding != wanted.sharding:
        return False
    one, other = (integrity.raw(leaf).addressable_shards for leaf in (found, wanted))
    return len(one) == len(other) and all(_bits(a.data) == _bits(b.data) for a, b in zip(one, other, strict=True))


def _bits(leaf: Any) -> tuple[tuple[int, ...], bytes]:
    return np.shape(leaf), np.asarray(leaf).tobytes()


# ---- In a process: what it can be told ------------------------------------------------------------------------------


def write(directory: str) -> dict[str, str]:
    """Save the state once for each mesh and spec, and return the digests."""
    checkpointer = Checkpointer(directory, keep=100, timeout_s=60)
    digests = {}
    for step, (mesh, spec) in enumerate(_layouts(), 1):
        checkpointer.save(step, sharded(7, mesh, spec), metadata={"step": step}, wait=True)
        digests[str(step)] = checkpointer.state_sha256(step)
    checkpointer.close()
    return digests


def _layouts() -> Iterator[tuple[Mesh, str]]:
    """Yield the meshes and specs of this layout."""
    yield mesh_of("line"), "split"
    yield mesh_of("line"), "replicated"
    if jax.device_count() > 1:
        yield mesh_of("grid"), "split"
    if jax.process_count() == 1 and jax.device_count() == 8:
        yield mesh_of("line", 6), "split"  # no power of two: a chunk lies in two shards


def read(paths: list[str]) -> list[Any]:
    """Tell of each checkpoint, read into the meshes and specs of this layout in turn, which leaves are other."""
    layouts = list(_layouts())
    found = []
    for number, path in enumerate(paths):
        wanted = sharded(7, *layouts[number % len(layouts)])
        state, metadata = Checkpoint(Path(path)).read(abstract(wanted))
        found.append([differences(state, wanted), metadata])
    return found


def expected_digest() -> str:
    """Return the digest of the state, computed on the host of one process."""
    host = host_state(7)
    keys = {name: jax.random.wrap_key_data(host[name]) for name in ("key", "keys")}
    return integrity.json_sha256(integrity.digest_leaves({**host, **keys}))


def mixed(directory: str) -> dict[str, Any]:
    """Save leaves on different devices of this process, read them in other layouts, and return what differs."""
    line, grid, three = mesh_of("line"), mesh_of("grid"), Mesh(np.asarray(jax.devices()[5:8]), "x")
    first, last = (jax.sharding.SingleDeviceSharding(jax.devices()[number]) for number in (0, -1))
    host = {"rows": (24, 1000), "blocks": (8, 8), "keys": (24, 2), "empty": (0, 8)}
    layouts: list[dict[str, jax.sharding.Sharding]] = [
        {"rows": NamedSharding(three, P("x")), "blocks": NamedSharding(grid, P("fsdp", "data")), "keys": last},
        {"rows": first, "blocks": last, "keys": NamedSharding(line, P("fsdp"))},
    ]
    layouts[0]["empty"], layouts[1]["empty"] = first, NamedSharding(grid, P(None, "fsdp"))
    checkpointer, states = Checkpointer(directory), []
    for step, layout in enumerate(layouts):
        values = {name: np.arange(math.prod(shape), dtype=np.uint32).reshape(shape) for name, shape in host.items()}
        state: dict[str, Any] = {name: jax.device_put(leaf, layout[name]) for name, leaf in values.items()}
        state["keys"] = jax.jit(jax.random.wrap_key_data, out_shardings=layout["keys"])(state["keys"])
        states.append(state)
        checkpointer.save(step, state, wait=True)
    found = [
        differences(Checkpoint(Path(directory, str(step))).read(like)[0], state)
        for step in (0, 1)
        for state in states
        for like in (state, abstract(state))
    ]
    checkpointer.close()
    return {"differences": found, "digests": [checkpointer.state_sha256(step) for step in (0, 1)]}


def try_read(path: str) -> str:
    """Tell how reading goes."""
    like = abstract(sharded(7, mesh_of("line"), "split"))
    try:
        Checkpoint(Path(path)).read(like)
    except CorruptCheckpointError as error:
        return error.kind
    return "intact"


# A checkpointer that stays from one call to the next
_checkpointer: Checkpointer


def open_checkpointer(directory: str, options: dict[str, Any]) -> bool:
    """Open the directory; the calls below use it."""
    global _checkpointer
    _checkpointer = Checkpointer(directory, **options)
    return _checkpointer.is_primary


def close_checkpointer() -> None:
    """Let go of it."""
    _checkpointer.close()


def save(step: int, wait: bool, fault: str | None = None, processes: Sequence[int] = ()) -> list[str]:
    """Save, with a fault in some processes, and return the types of the results."""
    state = sharded(7, mesh_of("line"), "split")
    with _broken(fault, processes), contextlib.suppress(SaveError):
        _checkpointer.save(step, state, metadata={"step": step}, wait=wait)
        _checkpointer.wait()
    return [type(result).__name__ for result in _checkpointer.results()]


def digest(step: int) -> str:
    """Return the digest of the state in a checkpoint."""
    return _checkpointer.state_sha256(step)


def _broken(fault: str | None, processes: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    return FAULTS[fault]() if fault and jax.process_index() in processes else contextlib.nullcontext()


def programs_of_a_save(directory: str) -> list[str]:
    """Tell what is compiled in the first save of replicated leaves after `prepare`."""
    sharding = NamedSharding(mesh_of("line"), P())
    state = {f"leaf{number}": _put(np.zeros((40 + 8 * number, 16), np.float32), sharding) for number in range(4)}
    checkpointer = Checkpointer(directory)
    checkpointer.prepare(state)
    names = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("Compiling"):
                names.append(record.getMessage()[:80])

    logger, handler = logging.getLogger("jax._src.interpreters.pxla"), Handler()
    logger.addHandler(handler)
    jax.config.update("jax_log_compiles", True)  # `jax.log_compiles()` is of one thread.
    checkpointer.save(1, state, wait=True)
    jax.config.update("jax_log_compiles", False)
    logger.removeHandler(handler)
    checkpointer.close()
    return names


def restore() -> Any:
    """Tell what process 0 restores alone."""
    wanted = sharded(7, mesh_of("line"), "split")
    restored = _checkpointer.restore(abstract(wanted))
    if restored is None:
        return None
    quarantined = [f"{error.step} {error.kind}" for error, _ in restored.quarantined]
    return {"step": restored.step, "differences": differences(restored.state, wanted), "quarantined": quarantined}


# ---- Faults ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _patched(place: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    original = getattr(place, name)
    setattr(place, name, replacement(original))
    try:
        yield
    finally:
        setattr(place, name, original)


def _failing(number: int, when: Callable[..., bool] = lambda *_, **__: True) -> Callable[..., Any]:
    """Return what makes a function fail as a disk does."""

    def replace(original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            if when(*args, **kwargs):
                raise OSError(number, os.strerror(number), str(args[0]) if args else None)
            return original(*args, **kwargs)

        return function

    return replace


@contextlib.contextmanager
def _limited(kind: int, limit: int) -> Iterator[None]:
    """Lower a limit of this process."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(kind, (soft, hard))


def _is_unfinished(path: Any, *_: Any, **__: Any) -> bool:
    return os.fspath(path).endswith(".orbax-checkpoint-tmp") if isinstance(path, str | os.PathLike) else False


FAULTS: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    # The directory cannot be looked at before the save.
    "prepare": lambda: _patched(Path, "mkdir", lambda _: _failing(errno.EIO)(None)),
    # The directory of the step cannot be made.
    "create": lambda: _patched(os, "mkdir", _failing(errno.ENOSPC, _is_unfinished)),
    # The shards cannot be fetched.
    "hash": lambda: _patched(integrity, "hash_shards", lambda _: _out_of_memory),
    # TensorStore cannot write its files: the limit comes as EFBIG.
    "data": lambda: _limited(resource.RLIMIT_FSIZE, 20_000),
    # The files cannot be fsynced.
    "fsync": lambda: _patched(os, "fsync", _failing(errno.EIO)),
    # TensorStore in the other process removes its lock; no fault, but it looks like one.
    "lock": lambda: _patched(os, "walk", _with_a_file_that_is_gone),
    # The manifest cannot be written.
    "seal": lambda: _patched(integrity, "write_manifest", _failing(errno.ENOSPC)),
    "rename": lambda: _patched(os, "rename", _failing(errno.EIO, _is_unfinished)),
}


def _with_a_file_that_is_gone(walk: Callable[..., Any]) -> Callable[..., Any]:
    """Return `os.walk`, which is told of a file that the other process removes before it is looked at."""

    def function(top: Any, *args: Any, **kwargs: Any) -> Any:
        for parent, directories, files in walk(top, *args, **kwargs):
            is_other = parent.endswith(f"ocdbt.process_{1 - jax.process_index()}")
            yield parent, directories, [*files, *["manifest.ocdbt.__lock"] * is_other]

    return function


def _out_of_memory(*_: Any, **__: Any) -> Any:
    raise MemoryError("not enough memory to fetch a shard")


def stop_in_save(directory: str, where: str, who: int) -> None:
    """Save once, and begin another save, in which one process comes to a place, says so and stays there."""
    state = sharded(7, mesh_of("line"), "split")
    open_checkpointer(directory, {"timeout_s": 60})
    _checkpointer.save(1, state, wait=True)
    _checkpointer.close()
    open_checkpointer(directory, {"timeout_s": 5})

    def stay(*_: Any, **__: Any) -> None:
        answer(where)
        time.sleep(600)

    if jax.process_index() == who:
        place, name = PLACES[where]
        setattr(place, name, stay)
    _checkpointer.save(2, state)


PLACES = {
    "hashing": (integrity, "hash_shards"),
    "hashed": (integrity, "describe_file"),
    "sealing": (integrity, "write_manifest"),
    "sealed": (integrity, "fsync_tree"),
}


def wait_for_save() -> list[str]:
    """Wait, and tell what came of the save."""
    _checkpointer.wait()
    return [type(result).__name__ for result in _checkpointer.results()]


def empties(directory: str) -> list[str]:
    """Save and read leaves without elements, and tell which are other afterwards."""
    mesh = mesh_of("line")
    specs = {"split": P(None, "fsdp"), "replicated": P(), "rows": P("fsdp")}
    state: dict[str, Any] = {
        name: _put(np.zeros((0, 24), np.float32), NamedSharding(mesh, spec)) for name, spec in specs.items()
    }
    state["one"] = _put(np.arange(24.0, dtype=np.float32), NamedSharding(mesh, P("fsdp")))
    checkpointer = Checkpointer(directory, timeout_s=60)
    checkpointer.save(1, state, wait=True)
    checkpointer.close()
    found, _ = Checkpoint(Path(directory, "1")).read(abstract(state))
    return differences(found, state)


# ---- Training beside it ---------------------------------------------------------------------------------------------


def train(directory: str, saves: int, steps_per_save: int) -> Any:
    """Train with a collective in each update and donated buffers, save in the background, and tell what went on."""
    mesh = mesh_of("line")
    split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    values = np.arange(64 * 32, dtype=np.float32).reshape(64, 32) / 1000
    state = {"w": _put(values, split), "total": _put(np.zeros((), np.float32), whole)}

    def update(state: Any) -> Any:
        total = jnp.sum(state["w"])  # all-reduce
        return {"w": state["w"] * 0.999 + jnp.roll(state["w"], 1, axis=0) * 0.001 + 0.001, "total": total}

    step_program = jax.jit(update, donate_argnums=0, out_shardings={"w": split, "total": whole})
    checkpointer = Checkpointer(directory, keep=saves, timeout_s=60)
    checkpointer.prepare(state)
    expected, updates_during_saves = {}, 0
    for step in range(1, saves + 1):
        # What is on this process's devices now, before the buffers are given away
        local = {name: _bits(leaf.addressable_shards[0].data) for name, leaf in state.items()}
        expected[step] = local
        checkpointer.save(step, state)
        for _ in range(steps_per_save):  # as long as the save takes, or the collectives of both would not meet
            state = step_program(state)
            time.sleep(0.0005)
            updates_during_saves += checkpointer.is_saving
    checkpointer.wait()
    like = {"w": jax.ShapeDtypeStruct((64, 32), np.float32, sharding=split)}
    like["total"] = jax.ShapeDtypeStruct((), np.float32, sharding=whole)
    wrong = []
    for step in checkpointer.steps:
        found, _ = Checkpoint(Path(directory, str(step))).read(like)
        if expected[step] != {name: _bits(leaf.addressable_shards[0].data) for name, leaf in found.items()}:
            wrong.append(step)
    saved = len(checkpointer.steps)
    checkpointer.close()
    return {"saved": saved, "wrong": wrong, "updates_during_saves": updates_during_saves}


def work(coordinator: str, count: int, index: int, requests: int, answers: int) -> None:
    """Meet the others, and do what is asked for."""
    global _answers
    _answers = os.fdopen(answers, "w")
    answer(os.getpid())
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, count, index, initialization_timeout=60)
    jax.devices()
    with os.fdopen(requests) as lines:
        for line in lines:
            request = json.loads(line)
            try:
                result = globals()[request["call"]](**request["arguments"])
            except Exception:
                answer(error=traceback.format_exc())
            else:
                answer(result)


def answer(result: Any = None, **fields: Any) -> None:
    """Answer what was asked, or say how far it is."""
    print(json.dumps({"result": result, **fields}), file=_answers, flush=True)


def main(coordinator: str, *descriptors: str) -> None:
    """Fork the processes, and wait for them."""
    numbers = list(map(int, descriptors))
    pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
    for index, (requests, answers) in enumerate(pairs):
        if os.fork() == 0:
            for descriptor in set(numbers) - {requests, answers}:
                os.close(descriptor)
            work(coordinator, len(pairs), index, requests, answers)
            os._exit(0)  # The others may be gone.
    for descriptor in numbers:
        os.close(descriptor)
    for _ in pairs:
        os.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
