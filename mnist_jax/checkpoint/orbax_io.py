"""Write a state with Orbax, and read it with TensorStore.

A save is collective. `Writer.write` runs on all processes in three phases with a barrier after each:

    create    process 0 creates the directory `<step>.orbax-checkpoint-tmp`
    write     each process writes and fsyncs its shards and their hashes
    commit    process 0 merges and checks what all have written, writes the manifest, fsyncs all of it, renames the
              directory to `<step>` and fsyncs the rename

A process that fails in one phase still arrives at the barriers, so that the others do not wait for it.

Only Orbax's tree handler is used. Its `CheckpointManager` fsyncs nothing, waits forever for a process whose
part failed, and has no place for a manifest between the last write and the rename.
"""

import contextlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath  # type: ignore[import-untyped]  # Orbax's handlers take no other paths.
from orbax.checkpoint._src.metadata import array_metadata_store  # Orbax exports it nowhere else.

from mnist_jax.checkpoint import integrity
from mnist_jax.checkpoint.integrity import Json, SaveError

UNFINISHED = ".orbax-checkpoint-tmp"
METADATA = "run/metadata"
HASHES = re.compile(r"state/hashes\.(0|[1-9][0-9]*)\.json")
_NOT_IN_MANIFEST = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # as in all checkpoints of format 4


class Writer:
    """Writes checkpoints into a directory. Creating one starts JAX's backends."""

    def __init__(self, directory: Path, *, timeout_s: int) -> None:
        """Open the directory; `timeout_s` is how long a barrier waits for the other processes."""
        self._directory, self._timeout_s, self._saves = directory, timeout_s, 0
        self._processes = jax.process_count()
        logging.getLogger("absl").addFilter(_has_no_orbax_traceback)
        # Barriers of the key-value service. Orbax's default are collectives on the devices, whose order among those of
        # the training steps would differ between processes.
        processes = set(range(self._processes))
        self._barrier_fn = ocp.multihost.get_barrier_sync_fn(processes=processes)
        self._handler = ocp.PyTreeCheckpointHandler(
            # OCDBT, Orbax's layout for many leaves, loses all of them under a path with a '[' (etils' glob).
            use_ocdbt="[" not in str(directory),
            multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=processes),
            type_handler_registry=_type_handlers(),
        )

    def write(self, step: int, state: Any, *, metadata: Json, prepare: Callable[[], bool] | None) -> bool:
        """Write a checkpoint together with the other processes, and return whether this process committed it.

        Args:
            step: names the checkpoint.
            state: a tree of arrays that do not change meanwhile.
            metadata: JSON values.
            prepare: returns whether to write at all; on process 0 only, None on the others.

        Raises:
            Exception: the part of this process failed, or a process did not arrive at a barrier.
        """
        self._saves += 1
        unfinished = self._directory / f"{step}{UNFINISHED}"
        is_prepared = is_created = is_committed = False
        failure: Exception | None = None
        try:
            is_prepared = prepare is not None and prepare()
            if is_prepared:
                _create(unfinished)
                is_created = True
        except Exception as error:
            failure = error
        self._barrier("created")
        try:
            if is_created or (prepare is None and _arrays_metadata(unfinished).is_dir()):
                self._write_shards(unfinished / "state", state)
        except Exception as error:
            failure = error
        self._barrier("written")
        try:
            if is_created and failure is None:
                self._commit(unfinished, step, metadata=metadata, leaves=integrity.named_leaves(state))
                is_committed = True
        except Exception as error:
            failure = error
        if is_prepared and failure is not None:  # Otherwise the directory may be that of another run.
            _discard(unfinished)
        try:
            self._barrier("committed")
        except Exception:  # A process that ended after the commit does not undo it.
            if not is_committed:
                raise
        if failure is not None:
            raise failure
        return is_committed

    def _barrier(self, name: str) -> None:
        if self._processes > 1:
            self._barrier_fn(key=f"checkpoint-{self._saves}-{name}", timeout_ms=1000 * self._timeout_s)

    def _write_shards(self, directory: Path, state: Any) -> None:
        """Write the shards of this process and their hashes, and fsync these files."""
        leaves = integrity.hash_shards(state, shared=True)
        self._handler.save(epath.Path(directory), args=ocp.args.PyTreeSave(jax.tree.map(_as_stored, state)))
        process = jax.process_index()
        names = {f"process_{process}", f"ocdbt.process_{process}"}  # Orbax's, for what a single process writes
        paths = integrity.regular_files(directory)
        own = {name: path for name, path in sorted(paths.items()) if names & set(name.split("/"))}
        files = {name: integrity.describe_file(path) for name, path in own.items()}
        for path in own.values():
            integrity.fsync_path(path)
        # This file comes last: where it exists, process 0 knows that the others are on the disk.
        hashes = directory / f"hashes.{process}.json"
        try:
            hashes.write_text(json.dumps({"leaves": leaves, "files": files}))
            integrity.fsync_path(hashes)
        except OSError:
            hashes.unlink(missing_ok=True)
            raise

    def _commit(self, directory: Path, step: int, *, metadata: Json, leaves: Mapping[str, Any]) -> None:
        """Complete and commit a checkpoint whose shards all processes have written."""
        parts = []
        for process in range(self._processes):
            hashes = directory / "state" / f"hashes.{process}.json"
            if not hashes.exists():
                raise OSError(f"process {process} could not write its part of the state")
            parts.append(json.loads(hashes.read_text()))
        self._handler.finalize(epath.Path(directory / "state"))
        _open_arrays(directory / "state", leaves)  # Orbax has lost leaves without an error; see `use_ocdbt`.
        (directory / METADATA).write_text(json.dumps(metadata))
        _write_orbax_metadata(directory)
        paths = integrity.regular_files(directory)
        files = {f"state/{name}": row for part in parts for name, row in part["files"].items()}
        new = sorted(paths.keys() - files.keys() - _NOT_IN_MANIFEST)
        files |= {name: integrity.describe_file(paths[name]) for name in new}
        if missing := sorted(files.keys() - paths.keys()):
            raise OSError(f"{missing[0]} is gone from {directory}")
        table = integrity.leaf_table(integrity.combine(part["leaves"] for part in parts))
        integrity.write_manifest(directory, step, table, files)
        integrity.fsync_tree(directory)
        final = self._directory / str(step)
        os.rename(directory, final)
        try:
            integrity.fsync_path(self._directory)
        except OSError:
            os.rename(final, directory)
            raise


def _arrays_metadata(checkpoint: Path) -> Path:
    """Return the directory where each process writes a file of Orbax about its arrays."""
    return checkpoint / "state" / "array_metadatas"


def _create(directory: Path) -> None:
    """Create the directories of a checkpoint."""
    _arrays_metadata(directory).mkdir(parents=True)  # Orbax would create it too, and the others poll for it.
    (directory / METADATA).parent.mkdir()


def _write_orbax_metadata(directory: Path) -> None:
    """Write the files by which Orbax recognizes a checkpoint and chooses the handlers that read it."""
    handlers = {"run": ocp.JsonCheckpointHandler.typestr(), "state": ocp.StandardCheckpointHandler.typestr()}
    times = dict.fromkeys(("init_timestamp_nsecs", "commit_timestamp_nsecs"), time.time_ns())
    content = {"item_handlers": handlers, "metrics": {}, "performance_metrics": {}, **times, "custom_metadata": {}}
    (directory / "_CHECKPOINT_METADATA").write_text(json.dumps(content))
    for item in ("state", "run", "."):
        (directory / item / "commit_success.txt").write_text("The checkpoint is complete.\n")


def _discard(directory: Path) -> None:
    """Remove a checkpoint that failed; the next one needs the space.

    If one leaf fails, TensorStore continues to write the others, and creates their directories again.
    """
    for _ in range(20):
        with contextlib.suppress(OSError):
            integrity.remove(directory)
        time.sleep(0.05)
        if not os.path.lexists(directory):
            break


def _type_handlers() -> Any:
    """Return Orbax's handlers of leaves; of replicated arrays one device writes.

    By default each replica writes a slice, for which Orbax compiles a program per leaf and device: 56 programs and 4 s
    at the first save of 7 replicated leaves on 8 devices, in the seconds after a signal.
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


def _as_stored(leaf: Any) -> Any:
    """Return a leaf as Orbax accepts it: it rejects numpy scalars and empty arrays."""
    if getattr(leaf, "size", 1) == 0:
        return None
    return np.asarray(leaf) if isinstance(leaf, np.generic) else leaf


def check_leaves(step: int, state: Any) -> None:
    """Check that each leaf can be restored as it is.

    Raises:
        SaveError: one cannot, or there are none.
    """
    try:
        leaves = integrity.named_leaves(state)
    except ValueError as error:
        raise SaveError(step, str(error)) from error
    if not leaves or any(not name or name.startswith("/") for name in leaves):  # Names become paths.
        raise SaveError(
            step, "the state must be a tree of named leaves, such as a dict of arrays, without a '/' in front"
        )
    for name, leaf in leaves.items():
        if not _is_storable(leaf):
            kind = f"{type(leaf).__name__} {getattr(leaf, 'dtype', '')}".strip()
            raise SaveError(step, f"leaf {name} is a {kind}, which cannot be restored as it is; make it an array")


def _is_storable(leaf: Any) -> bool:
    if type(leaf) in (bool, int, float):
        return np.asarray(leaf).dtype != object  # an int of more than 64 bits
    is_array = type(leaf) is np.ndarray or isinstance(leaf, jax.Array | np.generic)
    return is_array and (integrity.is_key(leaf) or _is_storable_dtype(leaf.dtype))


@cache
def _is_storable_dtype(dtype: Any) -> bool:
    try:
        return bool(ts.dtype(np.dtype(dtype).name).numpy_dtype == dtype)
    except ValueError:
        return False


def copy_state(state: Any) -> Any:
    """Return a copy of a state that is dispatched now, so its buffers may be donated or overwritten afterwards."""
    leaves, tree = jax.tree.flatten(state)
    groups: dict[Any, list[int]] = {}  # One program cannot take arrays on different devices.
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
    # Without `copy` JAX may return the arguments themselves.
    return jax.jit(lambda arrays: [jnp.copy(array) for array in arrays], out_shardings=list(shardings))


# ---- Reading --------------------------------------------------------------------------------------------------------


def restore_state(directory: Path, like: Any) -> Any:
    """Return the leaves of `like` from the item `state`; each process reads what its devices need.

    Raises:
        Exception: an array is not stored in the shape and type of its leaf, or cannot be read.
    """
    leaves = integrity.named_leaves(like)
    arrays = _open_arrays(directory, leaves)
    started = [_start_read(arrays.get(name), leaf) for name, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(like), [finish() for finish in started])


def _open_arrays(directory: Path, leaves: Mapping[str, Any]) -> dict[str, ts.TensorStore]:
    """Open the arrays of all leaves but the empty ones, which Orbax does not store.

    Raises:
        ValueError: one is missing, or has another shape or type.
    """
    base: Json = {"driver": "file", "path": f"{directory.absolute()}/"}
    is_ocdbt = (directory / "manifest.ocdbt").exists()
    context = ts.Context()
    store = ts.KvStore.open({"driver": "ocdbt", "base": base} if is_ocdbt else base, context=context).result()
    shapes = {name: integrity.layout(leaf)["raw_shape"] for name, leaf in leaves.items()}
    metadata = {name: store.read(f"{name}/.zarray") for name, shape in shapes.items() if 0 not in shape}
    for name, read in metadata.items():
        # TensorStore aborts the process if a type or a chunk does not fit into memory, so look before it does.
        stored = json.loads(read.result().value or "{}")
        is_small = isinstance(stored.get("dtype"), str) and math.prod(stored["chunks"]) <= math.prod(shapes[name])
        if not is_small or stored["shape"] != shapes[name]:
            raise ValueError(f"leaf {name} is stored as another array: {str(stored)[:200]}")
    specs = {name: {"driver": "zarr", "kvstore": (store / f"{name}/").spec().to_json()} for name in metadata}
    opened = {name: ts.open(spec, open=True, read=True, context=context) for name, spec in specs.items()}
    arrays = {name: future.result() for name, future in opened.items()}
    for name, array in arrays.items():
        dtype = "uint32" if integrity.is_key(leaves[name]) else integrity.describe(leaves[name])["dtype"]
        if array.dtype.name != dtype:
            raise ValueError(f"leaf {name} is stored as {array.dtype.name}")
    return arrays


def _start_read(array: ts.TensorStore | None, like: Any) -> Callable[[], Any]:
    """Start to read a leaf, and return a function that returns it with the type and sharding of `like`."""
    is_on_device = isinstance(like, jax.ShapeDtypeStruct | jax.Array)
    if is_on_device and not integrity.is_key(like) and jax.dtypes.canonicalize_dtype(like.dtype) != like.dtype:
        is_on_device = False  # JAX would cut it to 32 bits.
    if not is_on_device:
        content = array.read() if array is not None else None
        return lambda: _as_host_leaf(like, content.result() if content else np.empty(like.shape, like.dtype))
    data = jax.eval_shape(integrity.raw, like)
    sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    indices = sharding.addressable_devices_indices_map(data.shape).values()
    reads = {str(index): array[index].read() for index in indices} if array is not None else {}

    def read(index: Any) -> Any:
        return reads[str(index)].result() if reads else np.empty(data.shape, data.dtype)[index]

    # Not `device_put`, which cannot place arrays on devices of other processes, or waits for them.
    return lambda: _as_device_leaf(like, jax.make_array_from_callback(data.shape, sharding, read))


def _as_host_leaf(like: Any, content: Any) -> Any:
    if type(like) in (bool, int, float):
        return type(like)(content.item())
    return content.astype(like.dtype)[()] if isinstance(like, np.generic) else content


def _as_device_leaf(like: Any, restored: jax.Array) -> jax.Array:
    if integrity.is_key(like):
        kinds: list[Any] = []
        jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), like)  # `like` may be abstract.
        return jax.random.wrap_key_data(restored, impl=kinds[0])
    if getattr(like, "weak_type", False):
        # An update in place keeps the weak type; JAX has no other public way to create one.
        zero = like.dtype.type(0).item()
        weak = jnp.where(jnp.ones(restored.shape, bool), zero, zero)
        return jax.device_put(weak.at[...].set(restored), restored.sharding)
    return restored


def check_path(directory: Path) -> None:
    """Check that TensorStore and Python spell a path alike.

    Raises:
        OSError: they do not: the path has a backslash, or letters that the locale does not encode as UTF-8.
    """
    try:
        is_utf8 = os.fsencode(directory) == str(directory).encode()
    except UnicodeEncodeError:
        is_utf8 = False
    if not is_utf8 or "\\" in str(directory):
        raise OSError(
            f"TensorStore does not find {str(directory)!a}: use a path without backslashes and, unless it is ASCII, "
            "a UTF-8 locale (or PYTHONUTF8=1)"
        )


def _has_no_orbax_traceback(record: logging.LogRecord) -> bool:
    """Filter out the tracebacks that Orbax logs in its threads: `Writer.write` raises these errors as well."""
    return not (record.exc_info and "/orbax/checkpoint/" in record.pathname)


def brief(error: BaseException) -> str:
    """Return the message of an error in one line, without the details that TensorStore appends in brackets."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.split(r" \[[\w-]+='", text)[0]
    return text if len(text) <= 500 else f"{text[:245]} ... {text[-250:]}"  # The cause is at the end.
