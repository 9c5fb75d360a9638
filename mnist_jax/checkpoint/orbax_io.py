"""What Orbax and TensorStore are asked to do for a checkpoint, and what is added to a save of theirs.

A save is collective: `Writer.write` runs on every process, each writes and hashes its shards, and process 0 seals what
all have written, in `_seal`. A read is of one process alone: `restore_state`.
"""

import contextlib
import errno
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint._src.metadata import array_metadata_store  # Orbax exports it nowhere else.
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from mnist_jax.checkpoint import integrity
from mnist_jax.checkpoint.integrity import STEP, Json, SaveError

REMOVED = "removed"  # Orbax renames old checkpoints into this directory; it is emptied after each save.
StoredArrays = Mapping[str, bytes]  # name of an array -> what TensorStore keeps about it, as JSON

UNFINISHED = ".orbax-checkpoint-tmp"
HASHES = re.compile(r"state/hashes\.(0|[1-9][0-9]*)\.json")
# An OSError with one of these says that something is short, which may pass.
SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT)
# Orbax writes these when it renames the directory, after the manifest: times, and a constant.
ARRAY_METADATA = "array_metadatas"  # where each process writes a file of Orbax
_WRITTEN_LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")
# Orbax has so many barriers in the background part of a save; a test counts them.
_BARRIERS = 6


class Writer:
    """Orbax's `CheckpointManager`, and what is added to a save of it: hashes, manifest, fsync.

    It is made when the first save needs it, for it asks JAX about the processes.
    """

    def __init__(self, directory: Path, policy: PreservationPolicy, timeout_s: int) -> None:
        """Write in a directory, keep what a policy says, and wait so long for the other processes."""
        self._directory, self._policy, self._timeout_s = directory, policy, timeout_s
        self._saves = self._arrivals = 0
        self._committed: Path | None = None
        self._missed: Exception | None = None
        self._failures: list[Exception] = []  # of process 0, raised when the others do not wait for it

    @cached_property
    def _handler(self) -> "_StateHandler":
        # OCDBT, Orbax's layout for many leaves, loses all of them under a path with a '[' (etils' glob).
        return _StateHandler(
            use_ocdbt="[" not in str(self._directory),
            multiprocessing_options=self._processes,
            type_handler_registry=_type_handlers(),
        )

    @cached_property
    def _processes(self) -> ocp.options.MultiprocessingOptions:
        # With the processes named Orbax waits for them by key-value barriers alone. Its default are collectives on the
        # devices, which a thread may not start beside those of the training steps: their order has to be the same in
        # all processes.
        return ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))

    @cached_property
    def _barrier(self) -> ocp.multihost.BarrierSyncFn:
        return ocp.multihost.get_barrier_sync_fn(processes=self._processes.active_processes)

    @cached_property
    def _manager(self) -> ocp.CheckpointManager:
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add("state", ocp.args.PyTreeSave, self._handler)
        registry.add(
            "run", ocp.args.JsonSave, ocp.handlers.JsonCheckpointHandler(multiprocessing_options=self._processes)
        )
        options = ocp.CheckpointManagerOptions(
            create=False,
            save_root_metadata=False,
            lightweight_initialize=True,
            todelete_subdir=REMOVED,  # Otherwise a kill leaves a half removed checkpoint under its name.
            preservation_policy=self._policy,
            multiprocessing_options=self._processes,
            # A directory that is made in the background, and cannot be, is waited for by all processes, for 300 s.
            async_options=ocp.AsyncOptions(
                timeout_secs=self._timeout_s, barrier_sync_fn=self._arrive, create_directories_asynchronously=False
            ),
            temporary_path_class=_durable_path(self._note_commit, self._failures),
        )
        return ocp.CheckpointManager(self._directory, options=options, handler_registry=registry)

    def is_ready(self, step: int, prepare: Callable[[], bool] | None) -> bool:
        """Tell whether all processes are to write a checkpoint, as process 0 finds with `prepare`, None in the others.

        They must not begin without it: Orbax would wait for process 0.
        """
        self._saves, self._arrivals, self._committed, self._missed = self._saves + 1, 0, None, None
        if jax.process_count() == 1:
            return prepare is None or prepare()
        ready = self._directory / f"{step}.ready"
        try:
            if prepare is not None and prepare():
                ready.touch()
        finally:
            self._barrier(key=f"checkpoint-{self._saves}-ready", timeout_ms=1000 * self._timeout_s)
        return ready.exists()

    def write(self, step: int, state: Any, metadata: Json) -> str | None:
        """Write a checkpoint together with the other processes, and return when it is committed.

        Args:
            step: names the checkpoint.
            state: a tree of arrays that do not change meanwhile.
            metadata: JSON values.

        Returns why old checkpoints could not be removed, if they could not.
        """
        self._handler.state, self._failures[:] = state, ()
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(jax.tree.map(_as_stored, state)), run=ocp.args.JsonSave(metadata)
        )
        with contextlib.suppress(Exception):  # Orbax raises again what made the last save fail, and `results` told.
            self._manager.wait_until_finished()
        try:
            self._manager.reload()
            self._manager.save(step, args=items, force=True)
            self._manager.wait_until_finished()
        except Exception as error:
            if self._committed is None:
                raise (self._failures[0] if self._failures else error) from None
            return brief(error)
        finally:
            self._handler.state = None  # Otherwise the copy would stay on the devices until the next save.
            # A process whose part failed still arrives where the others wait for it. Without its hashes process 0
            # does not commit.
            while self._arrivals < _BARRIERS:
                self._arrive(timeout_ms=1000 * self._timeout_s)
        return None

    def _arrive(self, *, key: str = "", timeout_ms: int) -> None:  # noqa: ARG002 - Orbax's, which differs by process
        """Wait for the other processes at the next barrier of this save. All pass the same number of them."""
        self._arrivals += 1
        if self._missed is not None:  # Who is missing at one barrier is missing at the next, which would take as long.
            raise self._missed
        try:
            self._barrier(key=f"checkpoint-{self._saves}-{self._arrivals}", timeout_ms=timeout_ms)
        except Exception as error:
            self._missed = error
            raise

    def _note_commit(self, path: Path) -> None:
        self._committed = path

    def close(self) -> None:
        """Let go of Orbax's threads."""
        if "_manager" in self.__dict__:
            with contextlib.suppress(Exception):  # Orbax raises again what made the last save fail, and `results` told.
                self._manager.close()


def _type_handlers() -> Any:
    """Return Orbax's handlers of leaves, with replicated arrays written by one device.

    By default each replica writes a slice. Orbax compiles a program per leaf and device for that: at the first save of
    7 replicated leaves on 8 devices 56 programs and 4 s, in the seconds after a signal.
    """
    scalar = ocp.type_handlers.ScalarHandler()
    store = array_metadata_store.Store()
    array = ocp.type_handlers.ArrayHandler(use_replica_parallel=False, array_metadata_store=store)
    return ocp.type_handlers.create_type_handler_registry(
        (int, scalar),
        (float, scalar),
        (np.number, scalar),
        (np.ndarray, ocp.type_handlers.NumpyHandler()),
        (jax.Array, array),
    )


class _StateHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler of a state, which also writes down what this process hashed."""

    state: Any  # set before each save
    leaves: dict[str, Json]  # what `integrity.hash_shards` found

    @classmethod
    def typestr(cls) -> str:
        """Return the name of Orbax's own handler, for it can restore what this one saves."""
        return ocp.StandardCheckpointHandler.typestr()

    async def async_save(self, directory: Any, *args: Any, **kwargs: Any) -> list[ocp.future.Future]:
        """Begin to write the shards of this process; with the last future its hashes are written too."""
        # Raised here, an error would leave the other processes waiting for this one at Orbax's barriers, for 300 s. Of
        # one that a future raises `Writer.write` takes care.
        try:
            if not Path(directory, ARRAY_METADATA).is_dir():
                raise OSError(f"process 0 could not make {directory}")
            self.leaves = integrity.hash_shards(self.state, shared=True)
            futures = await super().async_save(directory, *args, **kwargs) or []
        except Exception as error:
            return [ocp.future.ChainedFuture([], partial(_raise, error))]
        return [ocp.future.ChainedFuture(futures, partial(self._write_hashes, Path(directory)))]

    def _write_hashes(self, directory: Path) -> None:
        """Write the hashes of the chunks and of the files that this process wrote, and fsync those files."""
        process = jax.process_index()
        found = integrity.regular_files(directory)
        own = {name: path for name, path in found.items() if _is_of_process(name, process)}
        files = {name: integrity.describe_file(path) for name, path in sorted(own.items())}
        for path in own.values():
            integrity.fsync_path(path)
        # Where this file is, process 0 takes the others to be on the disk, so it comes last.
        hashes = directory / f"hashes.{process}.json"
        try:
            hashes.write_text(json.dumps({"leaves": self.leaves, "files": files}))
            integrity.fsync_path(hashes)
        except OSError:
            hashes.unlink(missing_ok=True)
            raise

    def finalize(self, directory: Any) -> None:
        """Merge what the processes wrote, on process 0, and check that all leaves are there."""
        for process in range(jax.process_count()):
            if not Path(directory, f"hashes.{process}.json").exists():
                raise OSError(f"process {process} could not write its part of the state")
        super().finalize(directory)
        wanted = {name for name, row in self.leaves.items() if math.prod(row["shape"])}
        if missing := sorted(wanted - stored_arrays(Path(directory)).keys()):
            raise OSError(f"Orbax did not write leaf {missing[0]} in {directory}")


def _raise(error: Exception) -> None:
    raise error


def _is_of_process(name: str, process: int) -> bool:
    """Tell whether Orbax writes a file by one process: `ocdbt.process_3/...`, `array_metadatas/process_3`."""
    return any(part in (f"process_{process}", f"ocdbt.process_{process}") for part in name.split("/"))


def _durable_path(on_commit: Callable[[Path], None], failures: list[Exception]) -> type[Any]:
    """Return the class of the directory that Orbax writes in and renames, with a rename that is durable.

    `finalize` is called on process 0 when all processes have written, and what Orbax removes it removes later. Of
    Orbax's hooks it is the only one that comes both before the rename, for the manifest and the fsync of all files, and
    after it, for the fsync of the parent.
    """

    class DurablePath(ocp.path.atomicity.AtomicRenameTemporaryPath):
        async def create(self) -> Any:
            try:
                path = await super().create()
                if Path(self.get_final()).name == "state":  # The others would look for it every 250 ms, for 600 s.
                    Path(path, ARRAY_METADATA).mkdir()
                return path
            except OSError as error:  # The other processes wait for this one, so it is raised in `finalize`.
                failures.append(error)
                return self.get()

        async def finalize(self) -> None:
            for error in failures:
                raise error
            directory, final = Path(self.get()), Path(self.get_final())
            is_item = not STEP.fullmatch(final.name)
            if not is_item:
                _seal(directory, int(final.name))
            await super().finalize()
            if is_item:
                return
            for name in (*_WRITTEN_LAST, "."):
                integrity.fsync_path(final / name)
            integrity.fsync_path(final.parent)
            on_commit(final)

    return DurablePath


def _seal(directory: Path, step: int) -> None:
    """Write the manifest of a checkpoint that all processes have written, and fsync all of it."""
    paths = (directory / "state" / f"hashes.{process}.json" for process in range(jax.process_count()))
    parts = [json.loads(path.read_text()) for path in paths]
    leaves = integrity.leaf_table(integrity.combine(part["leaves"] for part in parts))
    files = {f"state/{name}": row for part in parts for name, row in part["files"].items()}
    there = integrity.regular_files(directory)
    if missing := sorted(files.keys() - there.keys()):
        raise OSError(f"{missing[0]} is gone from {directory}")
    files |= {name: integrity.describe_file(there[name]) for name in there.keys() - files.keys() - {*_WRITTEN_LAST}}
    integrity.write_manifest(directory, step, leaves, files)
    integrity.fsync_tree(directory)


def is_ocdbt(directory: Path) -> bool:
    """Tell whether the item `state` has Orbax's layout for many leaves."""
    return (directory / "manifest.ocdbt").exists()


def stored_arrays(directory: Path) -> StoredArrays:
    """Return what TensorStore keeps about each array in the item `state`, as JSON: shape, chunks and type."""
    base: Json = {"driver": "file", "path": f"{directory}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base} if is_ocdbt(directory) else base).result()
    keys = [key for key in store.list().result() if key.endswith(b"/.zarray")]
    reads = {key: store.read(key) for key in keys}
    return {os.fsdecode(key)[: -len("/.zarray")]: read.result().value for key, read in reads.items()}


def check_stored_array(name: str, stored: StoredArrays, layout: Json) -> None:
    """Check that an array is stored as `integrity.layout` says.

    Raises:
        ValueError, KeyError, TypeError: it is not.
    """
    if name not in stored:
        raise ValueError(f"leaf {name} is not there")
    array, size = json.loads(stored[name]), math.prod(layout["raw_shape"])
    if (
        array["shape"] != layout["raw_shape"]
        or not 0 < math.prod(array["chunks"]) <= size
        or not isinstance(array["dtype"], str)
        or np.dtype(array["dtype"]).itemsize != layout["itemsize"]
    ):
        raise ValueError(f"leaf {name} is stored as {stored[name][:500]!r}")


def check_is_reachable(directory: Path) -> None:
    """Check that TensorStore writes where Python looks.

    Raises:
        OSError: it does not: the path has a backslash, or letters that the locale spells in another way. With one of
            the SHORTAGES it is not known.
    """
    probe = directory / f"0{UNFINISHED}-probe"
    probe.touch()  # What TensorStore wrote elsewhere would stay there, so it only reads.
    try:
        store = ts.KvStore.open({"driver": "file", "path": f"{directory}/"}).result()
        is_there = store.read(probe.name).result().state == "value"
    except (ValueError, RuntimeError) as error:  # the second where the path is not UTF-8
        for number in SHORTAGES:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(directory)) from error
        is_there = False
    finally:
        probe.unlink()
    if not is_there:
        raise OSError(
            f"TensorStore does not find {str(directory)!a}: use a path without backslashes and, unless it is of ASCII "
            "letters, a UTF-8 locale (or PYTHONUTF8=1)"
        )


def check_leaves(step: int, state: Any) -> None:
    """Check that each leaf can be restored as it is.

    Raises:
        SaveError: one cannot, or there are none.
    """
    try:
        leaves = integrity.named_leaves(state)
    except ValueError as error:
        raise SaveError(step, str(error)) from error
    if rooted := [name for name in leaves if name.startswith("/")]:
        raise SaveError(
            step, f"leaf {rooted[0]} has a name that begins with '/', where a file of that name would be made"
        )
    if not leaves or "" in leaves:
        raise SaveError(step, "the state has to be a tree with at least one named leaf, such as a dict of arrays")
    for name, leaf in leaves.items():
        dtype = np.asarray(leaf).dtype if type(leaf) in (bool, int, float) else getattr(leaf, "dtype", None)
        is_array = (
            isinstance(leaf, jax.Array | np.generic) or type(leaf) is np.ndarray or type(leaf) in (bool, int, float)
        )
        if not is_array or not (integrity.is_key(leaf) or _is_storable(dtype)):
            kind = f"{type(leaf).__name__}" + (f" of {dtype!r}" if dtype is not None else "")
            raise SaveError(step, f"leaf {name} is a {kind}, which cannot be restored as it is; make it an array")


@cache
def _is_storable(dtype: Any) -> bool:
    """Tell whether TensorStore keeps arrays of a type as they are."""
    try:
        return bool(ts.dtype(np.dtype(dtype).name).numpy_dtype == dtype)
    except ValueError:
        return False


def _as_stored(leaf: Any) -> Any:
    """Return a leaf as Orbax takes it: it knows no numpy scalars, and stores no empty arrays."""
    if getattr(leaf, "size", 1) == 0:
        return None
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def copy_state(state: Any) -> Any:
    """Return a copy of a state that is dispatched now, so its buffers may be donated or written to afterwards."""
    leaves, tree = jax.tree.flatten(state)
    groups: dict[Any, list[int]] = {}  # One program cannot take arrays of different devices.
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, jax.Array):
            groups.setdefault(frozenset(leaf.sharding.device_set), []).append(number)
        elif isinstance(leaf, np.ndarray):
            leaves[number] = leaf.copy()
    for numbers in groups.values():
        arrays = [leaves[number] for number in numbers]
        copies = _copy_program(tuple(array.sharding for array in arrays))(arrays)
        for number, copied in zip(numbers, copies, strict=True):
            leaves[number] = copied
    return jax.tree.unflatten(tree, leaves)


@cache
def _copy_program(shardings: tuple[jax.sharding.Sharding, ...]) -> Any:
    # Without the `copy` JAX would hand an argument through as it is.
    return jax.jit(lambda arrays: [jnp.copy(array) for array in arrays], out_shardings=list(shardings))


def restore_state(state: Path, like: Any, *, partial: bool) -> Any:
    """Return a state as Orbax reads it, for this process alone."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    target = jax.tree.map(_as_target, like)
    args = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=partial
    )
    # Orbax reads a file of an older layout first, if one is there, which is in no manifest. Below a file there is none.
    orbax = ocp.PyTreeCheckpointHandler(aggregate_filename="_METADATA/none", multiprocessing_options=alone)
    with contextlib.closing(orbax) as handler:
        restored = handler.restore(state, args=args)
    return jax.tree.map(_as_like, like, restored, is_leaf=lambda leaf: leaf is None)


def _as_target(like: Any) -> Any:
    """Return what Orbax takes for a leaf like this one: it knows no numpy scalars, and stored no empty arrays."""
    if getattr(like, "size", 1) == 0:
        return None
    if isinstance(like, np.generic):
        return np.asarray(like)
    if isinstance(like, jax.ShapeDtypeStruct | jax.Array):
        if not integrity.is_key(like) and jax.dtypes.canonicalize_dtype(like.dtype) != like.dtype:
            return np.empty(like.shape, like.dtype)  # JAX would cut it to 32 bits.
        sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=sharding)
    return like


def _as_like(like: Any, restored: Any) -> Any:
    """Return a restored leaf with the type of the leaf that was asked for."""
    if isinstance(like, np.generic):
        return np.asarray(restored).astype(like.dtype)[()]
    if getattr(like, "weak_type", False) and isinstance(restored, jax.Array):
        # An update in place keeps the weak type; JAX has no other public way to make one.
        zero = like.dtype.type(0).item()
        weak = jnp.where(jnp.ones(restored.shape, bool), zero, zero)
        return jax.device_put(weak.at[...].set(restored), restored.sharding)
    if like is None or restored is not None:
        return restored
    if isinstance(like, np.ndarray):
        return np.empty(like.shape, like.dtype)
    # Not `device_put`, which cannot place it on devices of other processes, or waits for them.
    sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    data = jax.eval_shape(integrity.raw, like)
    empty = jax.make_array_from_callback(data.shape, sharding, lambda index: np.empty(data.shape, data.dtype)[index])
    if not integrity.is_key(like):
        return empty
    kinds: list[Any] = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), like)  # `like` may be abstract.
    return jax.random.wrap_key_data(empty, impl=kinds[0])


def brief(error: BaseException) -> str:
    """Return what an error says in one line, without the pages that TensorStore appends in brackets."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.split(r" \[[\w-]+='", text)[0]
    return text if len(text) <= 500 else f"{text[:245]} ... {text[-250:]}"  # The cause comes last.


def is_told_otherwise(record: logging.LogRecord) -> bool:
    """Let pass what Orbax logs, but for tracebacks: what fails in its threads is raised later, and told in a line."""
    return not (record.exc_info and "/orbax/checkpoint/" in record.pathname)
