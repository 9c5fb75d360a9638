"""Digests of states and files, the manifest that holds them, and the errors of this package.

The digest of a state depends only on the names, shapes, types and bits of its leaves. The same state has the same
digest on 1 device and on 8, in 1 process and in 4, replicated or sharded:

    chunk     a box of a leaf; the shape and type of the leaf determine the boxes (`chunk_counts`)
    leaf      SHA-256 over name, type, shape and number of chunks, and the SHA-256 of each chunk in C order
    state     SHA-256 over the digests of the leaves

Each process hashes chunks of the shards that it holds (`hash_shards`); `combine` merges what all processes found.

    CheckpointError
    ├── SaveError                       a checkpoint could not be written; older ones are untouched
    │   └── InvalidStateError           the state was not worth saving: the caller's `valid` was false
    ├── ReadError                       a checkpoint cannot be read now; it is not known to be corrupt
    ├── CorruptCheckpointError          a checkpoint is not what was saved
    ├── IncompatibleCheckpointError     a checkpoint holds another tree, or has another format
    └── NoGoodCheckpointError           checkpoints exist, and none can be used
"""

import base64
import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FORMAT = 4
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**26
MIN_CHUNK_BYTES = 2**16
MAX_CHUNKS = 2**12
STEP = re.compile(r"0|[1-9][0-9]{0,17}")  # the names of checkpoints

Json = dict[str, Any]
Box = tuple[slice, ...]


class CheckpointError(Exception):
    """A checkpoint could not be written or read."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint is not what was saved: a digest differs, or a file is missing or cannot be parsed."""

    def __init__(self, step: int, kind: str, detail: str) -> None:
        """Set the step, a kind of one or two words for the name in quarantine, and what is wrong with which file."""
        super().__init__(f"the checkpoint of step {step} is corrupt: {detail}")
        self.step, self.kind = step, kind


class IncompatibleCheckpointError(CheckpointError):
    """A checkpoint is intact, but holds another tree than expected, or has another format."""


class SaveError(CheckpointError):
    """A checkpoint could not be written."""

    def __init__(self, step: int, reason: str) -> None:
        """Set the step that is not saved, and the reason."""
        super().__init__(f"the checkpoint of step {step} could not be saved: {reason}")
        self.step = step


class InvalidStateError(SaveError):
    """The caller declared the state not worth saving."""


class ReadError(CheckpointError):
    """A checkpoint cannot be read now: files, threads or memory are short. It is not known to be corrupt."""

    def __init__(self, step: int, reason: str) -> None:
        """Set the step and the reason."""
        super().__init__(
            f"the checkpoint of step {step} cannot be read now: {reason}. It is not known to be corrupt and was not "
            "moved; check the limits of this process (ulimit -a) and start again"
        )


class NoGoodCheckpointError(CheckpointError):
    """Checkpoints exist, and none can be used."""


# ---- Leaves ---------------------------------------------------------------------------------------------------------


def leaf_name(path: tuple[Any, ...]) -> str:
    """Return the name that Orbax gives to the leaf at a key path, such as `params.conv1.kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by name, in the order of the tree.

    Raises:
        ValueError: two leaves have the same name.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = leaf_name(path)
        if name in leaves:
            raise ValueError(f"two leaves of the state have the same name, {name}; rename the key that has a '.' in it")
        leaves[name] = leaf
    return leaves


def is_key(leaf: Any) -> bool:
    """Return whether a leaf is an array of typed random keys."""
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def raw(leaf: Any) -> Any:
    """Return a leaf as an array of numbers: the key data of typed random keys, a numpy array of a Python number."""
    if is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)  # `jnp.asarray` would cut 64 bits to 32.


def describe(leaf: Any) -> Json:
    """Return shape and type of a leaf, as in a manifest."""
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def difference_of(table: Mapping[str, Json], like: Mapping[str, Any]) -> str:
    """Return how the leaves in a manifest differ from others in name, shape or type; "" if they do not."""
    expected = {name: "{shape} {dtype}".format(**describe(leaf)) for name, leaf in like.items()}
    found = {name: f"{row['shape']} {row['dtype']}" for name, row in table.items()}
    different = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    if not different:
        return ""
    # A leaf that both have says more than one that is absent in one of them.
    name = min(different, key=lambda name: (name not in expected or name not in found, name))
    return f"leaf {name} should be {expected.get(name, 'absent')} and is {found.get(name, 'absent')}"


def layout(leaf: Any) -> Json:
    """Return shape and item size of the numbers of a leaf, and the number of chunks on each axis."""
    values = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    values = values if hasattr(values, "dtype") else np.asarray(values)
    shape, itemsize = list(values.shape), np.dtype(values.dtype).itemsize
    return {"raw_shape": shape, "itemsize": itemsize, "counts": chunk_counts(shape, itemsize)}


def host_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Return the leaves of a tree by name, copied to the host; key data for typed random keys."""
    return {name: np.asarray(raw(leaf)) for name, leaf in named_leaves(tree).items()}


def digest_leaves(tree: Any) -> dict[str, Json]:
    """Return shape, type and SHA-256 of each leaf of a state that this process holds completely."""
    return leaf_table(combine([hash_shards(tree)]))


# ---- Chunks ---------------------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """A part of a leaf that a process holds, on any number of its devices; `data` is None for other processes."""

    box: Box
    data: Any


def chunk_counts(shape: Sequence[int], itemsize: int) -> list[int]:
    """Return the number of chunks on each axis of a leaf, all powers of two.

    The axes are halved in turn until a chunk has at most MIN_CHUNK_BYTES, or there are MAX_CHUNKS chunks. If a large
    leaf is divided into a power of two of shards, each shard consists of complete chunks.
    """
    counts, size = [1] * len(shape), math.prod(shape) * itemsize
    limit, turn = max(MIN_CHUNK_BYTES, size / MAX_CHUNKS), 0
    while size / math.prod(counts) > limit:
        order = [(turn + offset) % len(shape) for offset in range(len(shape))]
        axis = next((axis for axis in order if shape[axis] >= 2 * counts[axis]), None)
        if axis is None:
            break
        counts[axis] *= 2
        turn = axis + 1
    return counts


def chunk_boxes(shape: Sequence[int], counts: Sequence[int]) -> list[Box]:
    """Return the chunks of a leaf in C order."""
    edges = [[number * size // count for number in range(count + 1)] for size, count in zip(shape, counts, strict=True)]
    return list(itertools.product(*(itertools.starmap(slice, itertools.pairwise(axis)) for axis in edges)))


def hash_shards(tree: Any, *, shared: bool = False) -> dict[str, Json]:
    """Return the digests of the chunks that this process holds, as JSON values for `combine`.

    If no shard contains a chunk completely (a small leaf that is split, or shards that are no power of two), the bytes
    of its pieces are returned instead.

    Args:
        tree: a pytree of arrays and numbers. Leaves that are no `jax.Array` are the same in all processes.
        shared: whether all processes call this. Then exactly one of the processes that hold a chunk hashes it.
    """
    return {name: _hash_leaf(leaf, shared=shared) for name, leaf in named_leaves(tree).items()}


def _hash_leaf(leaf: Any, *, shared: bool) -> Json:
    values = raw(leaf)
    shards, stored = _shards(values), layout(leaf)
    chunks, pieces = {}, []
    for number, chunk in enumerate(chunk_boxes(values.shape, stored["counts"])):
        holders = [shard for shard in shards if _overlap(chunk, shard.box) == chunk]
        if not values.size:  # A sharded leaf without elements has no shard with the box of its chunk.
            chunks[str(number)] = hashlib.sha256(b"").hexdigest()
        elif holders:
            here = [shard for shard in holders if shard.data is not None]
            owner = holders[number % len(holders)] if shared else here[0] if here else holders[0]
            if owner.data is not None:
                chunks[str(number)] = hashlib.sha256(_cut(owner, chunk)).hexdigest()
        else:
            for shard in {str(shard.box): shard for shard in reversed(shards)}.values():  # each box once
                overlap = _overlap(chunk, shard.box)
                if overlap is not None and shard.data is not None:
                    corners = [[part.start, part.stop] for part in _relative(overlap, chunk)]
                    content = base64.b64encode(_cut(shard, overlap)).decode()
                    pieces.append({"chunk": number, "box": corners, "bytes": content})
    return {**describe(leaf), **stored, "chunks": chunks, "pieces": pieces}


def _shards(values: Any) -> list[Shard]:
    """Return the shards of all processes, in the same order on all processes."""
    if not isinstance(values, jax.Array):
        whole = tuple(slice(0, size) for size in values.shape)
        return [Shard(whole, values if jax.process_index() == 0 else None)]
    local = {shard.device: shard.data for shard in values.addressable_shards}
    found: dict[tuple[int, str], Shard] = {}
    indices: Mapping[Any, Any] = values.sharding.devices_indices_map(values.shape)
    for device, index in indices.items():
        box = tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, values.shape, strict=True))
        found.setdefault((device.process_index, str(box)), Shard(box, local.get(device)))
    return list(found.values())


def _overlap(first: Box, second: Box) -> Box | None:
    both = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(first, second, strict=True))
    return both if all(part.start < part.stop for part in both) or both == first else None


def _relative(box: Box, within: Box) -> Box:
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(box, within, strict=True))


def _cut(shard: Shard, box: Box) -> bytes:
    # The whole shard is copied to the host once: JAX caches the copy with the array.
    return np.asarray(shard.data)[_relative(box, shard.box)].tobytes()


def combine(parts: Iterable[Mapping[str, Json]]) -> dict[str, Json]:
    """Return shape, type and the SHA-256 of every chunk of each leaf, from what each process found.

    Raises:
        ValueError: the parts belong to different states, or some are missing.
    """
    rows: dict[str, list[Json]] = {}
    for part in parts:
        for name, row in part.items():
            rows.setdefault(name, []).append(row)
    return {name: _combine_leaf(name, found) for name, found in sorted(rows.items())}


def _combine_leaf(name: str, rows: list[Json]) -> Json:
    first = rows[0]
    fixed = ("shape", "dtype", "raw_shape", "itemsize", "counts")
    if any(row[field] != first[field] for row in rows for field in fixed):
        raise ValueError(f"processes disagree about leaf {name}")
    # This also limits the memory that the hashes of an untrusted checkpoint can claim below.
    if first["counts"] != chunk_counts(first["raw_shape"], first["itemsize"]):
        raise ValueError(f"the number of chunks of leaf {name} does not follow from its shape and type")
    digests = known_digests(rows)
    count = math.prod(first["counts"])
    if missing := [number for number in range(count) if number not in digests]:
        raise ValueError(f"no process hashed chunk {missing[0]} of leaf {name}")
    return {**{field: first[field] for field in fixed}, "chunks": [digests[number] for number in range(count)]}


def known_digests(rows: Sequence[Json]) -> dict[int, str]:
    """Return the SHA-256 of the chunks of a leaf that were hashed, or whose pieces are complete."""
    digests = {int(number): digest for row in rows for number, digest in row["chunks"].items()}
    boxes = chunk_boxes(rows[0]["raw_shape"], rows[0]["counts"])
    buffers: dict[int, np.ndarray] = {}
    filled: dict[int, int] = {}
    for piece in (piece for row in rows for piece in row["pieces"]):
        number, content = piece["chunk"], np.frombuffer(base64.b64decode(piece["bytes"]), np.uint8)
        shape = [part.stop - part.start for part in boxes[number]]
        buffer = buffers.setdefault(number, np.zeros((*shape, rows[0]["itemsize"]), np.uint8))
        box = tuple(slice(*corners) for corners in piece["box"])
        buffer[box] = content.reshape(buffer[box].shape)
        filled[number] = filled.get(number, 0) + content.size
    complete = (number for number, buffer in buffers.items() if filled[number] == buffer.size)
    return {**digests, **{number: hashlib.sha256(buffers[number].tobytes()).hexdigest() for number in complete}}


def leaf_table(rows: Mapping[str, Json]) -> dict[str, Json]:
    """Return shape, type and SHA-256 of each leaf, from the digests of its chunks."""
    return {
        name: {
            "shape": row["shape"],
            "dtype": row["dtype"],
            "sha256": json_sha256([name, row["dtype"], row["shape"], row["counts"], row["chunks"]]),
        }
        for name, row in sorted(rows.items())
    }


def json_sha256(values: Any) -> str:
    """Return the SHA-256 of JSON values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ---- Files ----------------------------------------------------------------------------------------------------------


def regular_files(directory: Path) -> dict[str, Path]:
    """Return the regular files under a directory by relative name. Symbolic links are not followed."""
    found = {}
    for path in (Path(parent, name) for parent, _, files in os.walk(directory) for name in files):
        with contextlib.suppress(FileNotFoundError):  # Another process may remove TensorStore's lock files meanwhile.
            if stat.S_ISREG(path.lstat().st_mode):
                found[path.relative_to(directory).as_posix()] = path
    return found


def describe_file(path: Path) -> Json:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def fsync_path(path: Path) -> None:
    """Fsync a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems do not support it for directories.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """Fsync everything in a directory: files first, then the directories that contain them."""
    for parent, _, files in os.walk(directory, topdown=False):
        for name in (*files, "."):
            fsync_path(Path(parent, name))


def remove(path: Path) -> None:
    """Remove a file or directory if it exists; of a symbolic link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- The manifest ---------------------------------------------------------------------------------------------------


def write_manifest(directory: Path, step: int, leaves: Mapping[str, Json], files: Mapping[str, Json]) -> None:
    """Write the manifest of a checkpoint; the names of its files are relative to its directory."""
    manifest = {"format": FORMAT, "step": step, "state_sha256": json_sha256(leaves), "leaves": leaves, "files": files}
    (directory / MANIFEST).write_text(json.dumps({**manifest, "seal": json_sha256(manifest)}, indent=1) + "\n")


def read_manifest(path: Path) -> Json:
    """Return a manifest after checking its fields and its seal, the digest of the other fields.

    Raises:
        OSError: it cannot be read.
        ValueError, RecursionError: it is no manifest, or was changed.
    """
    if not stat.S_ISREG(path.lstat().st_mode):  # Opening a pipe would block.
        raise ValueError("it is not a file")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ValueError(f"it has more than {MAX_MANIFEST_BYTES} bytes")
    manifest = json.loads(path.read_bytes())
    if not isinstance(manifest, dict) or not manifest.keys() >= {"format", "seal"}:
        raise ValueError("it has no format or no seal")
    if manifest.pop("seal") != json_sha256(manifest):
        raise ValueError("its seal is not the digest of its content")
    if manifest["format"] == FORMAT and not _is_complete(manifest):
        raise ValueError("it does not describe a checkpoint")
    return manifest


def _is_complete(manifest: Json) -> bool:
    """Return whether a manifest has all fields of its format. The seal is no proof: anyone can compute it."""

    def is_table(value: Any, **columns: type) -> bool:
        return isinstance(value, dict) and all(
            isinstance(row, dict) and all(type(row.get(name)) is kind for name, kind in columns.items())
            for row in value.values()
        )

    return (
        is_table(manifest.get("leaves"), shape=list, dtype=str, sha256=str)
        and manifest.get("state_sha256") == json_sha256(manifest["leaves"])
        and is_table(manifest.get("files"), bytes=int, sha256=str)
        and type(manifest.get("step")) is int
    )
