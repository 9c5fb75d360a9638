"""Checkpoints that are whole or not there, saved in the background, and checked before they are used.

A checkpoint is a directory named by its step:

    120/manifest.json   the SHA-256 of each leaf and of each file, and what the caller wants to remember
    120/state/          the bytes of the leaves of a tree, end to end, written by Orbax, which keeps no checksum of them

It is written under another name. When the disk has all of it, it is renamed; when the disk has that too, it counts,
and older ones may go. So a kill or a power cut leaves a checkpoint that is whole, or leftovers that never count.

This file stands alone; lift it into your own project.

    CheckpointError          all that can go wrong here
    ├── SaveFailed           a checkpoint could not be written; those before it are untouched
    │   └── InvalidState     it was not worth writing: the caller's `valid` came out false
    ├── Damaged              a checkpoint is not what was saved
    ├── Mismatch             a checkpoint is of another tree or of another format
    └── NoReadableCheckpoint there are checkpoints, and none of them is good
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import queue
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

# What goes wrong in a thread of Orbax it logs there as a traceback, and raises later. `SaveFailed` tells it in a line.
logging.getLogger("absl").addFilter(
    lambda record: not (record.exc_info and record.pathname.endswith("orbax/checkpoint/_src/futures/future.py"))
)

FORMAT = 3
MOST_MANIFEST_BYTES = 2**26
SPARE_ROOM = 10  # Checkpoints that should still fit on the disk; where fewer do, it is told of.


class CheckpointError(Exception):
    """Something is wrong with a checkpoint or with its writing."""


class SaveFailed(CheckpointError):
    """A checkpoint could not be written."""

    def __init__(self, step: int, reason: str) -> None:
        """Name the step that is not saved, and why."""
        super().__init__(f"the checkpoint of step {step} could not be saved: {reason}")
        self.step = step


class InvalidState(SaveFailed):
    """The tree is not worth keeping."""


class Damaged(CheckpointError):
    """A checkpoint is not what was saved."""

    def __init__(self, step: int, kind: str, detail: str) -> None:
        """Name the step, the kind of the damage in a word or two for a directory's name, and the file or leaf."""
        super().__init__(f"step {step}: {detail}")
        self.step, self.kind = step, kind


class Mismatch(CheckpointError):
    """A checkpoint is whole, but not what is expected: another tree, or another format."""


class NoReadableCheckpoint(CheckpointError):
    """Checkpoints exist, and none is good."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is there; to look at it changes nothing, and takes no device until `read`."""

    path: Path

    @property
    def step(self) -> int:
        """The step that it was saved at."""
        return int(self.path.name)

    @property
    def bytes(self) -> int:
        """The size of its files together."""
        return sum(path.lstat().st_size for path in regular_files(self.path).values())

    def manifest(self) -> dict[str, Any]:
        """Return the manifest: format, step, sha256 (of the whole state), leaves, files, about.

        Raises:
            Damaged: it is not there, or not what was saved.
            Mismatch: it has another format.
        """
        if self.path.is_symlink():
            raise Damaged(self.step, "symbolic-link", f"{self.path} is a symbolic link")
        try:
            manifest = _read_manifest(self.path / "manifest.json")
        except (ValueError, RecursionError) as error:
            raise Damaged(self.step, "bad-manifest", f"manifest.json cannot be understood: {error}") from error
        except OSError as error:
            raise self._unread(error, "bad-manifest") from error
        if manifest["format"] != FORMAT:
            raise Mismatch(f"the checkpoint of step {self.step} has format {manifest['format']}, and not {FORMAT}")
        if manifest["step"] != self.step:
            raise Damaged(self.step, "other-step", f"manifest.json is that of step {manifest['step']}")
        return manifest

    def verify(self) -> dict[str, Any]:
        """Return the manifest, after a look at every byte that was saved.

        Raises:
            Damaged: a file is missing or changed.
            Mismatch: it has another format.
        """
        manifest = self.manifest()
        try:
            found = regular_files(self.path)
            for name, wanted in manifest["files"].items():
                if name not in found:
                    raise Damaged(self.step, "missing-file", f"file {name} is missing")
                size = found[name].stat().st_size
                if size != wanted["bytes"]:
                    raise Damaged(self.step, "changed-file", f"file {name} has {size} bytes, not {wanted['bytes']}")
                if _sha256(found[name]) != wanted["sha256"]:
                    raise Damaged(self.step, "changed-file", f"file {name} has other bytes than were saved")
        except OSError as error:
            raise self._unread(error, "unreadable-file") from error
        return manifest

    def read(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """Return the tree and the manifest, every file and every leaf of it checked.

        Args:
            like: a tree of arrays or of `jax.ShapeDtypeStruct`; the result has its structure and its shardings.

        Raises:
            Damaged: a file or a leaf is not what was saved.
            Mismatch: it is of a tree with other names, shapes or types, or of another format.
        """
        manifest = self.verify()
        shapes = _raw_shapes(like)
        _check_same_tree(self.step, manifest["leaves"], shapes)
        try:
            leaves = self._read_leaves(shapes)
        except (MemoryError, Damaged):
            raise
        except Exception as error:  # Whatever Orbax and TensorStore say of files that they cannot make sense of.
            raise Damaged(self.step, "unreadable", f"the state cannot be read: {error}") from error
        table = describe_leaves(leaves)
        for name, row in manifest["leaves"].items():
            if table[name] != row:
                raise Damaged(self.step, "changed-leaf", f"leaf {name} is {table[name]}, and was {row}")
        return _place(leaves, like), manifest

    def _read_leaves(self, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
        """Return the leaves with these shapes and types, if what is stored has their size."""
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes.values())
        as_numpy = {"leaves": ocp.RestoreArgs(restore_type=np.ndarray)}
        request = ocp.args.PyTreeRestore(item={"leaves": 0}, restore_args=as_numpy)
        state = self.path.absolute() / "state"  # Orbax finds no metadata under a relative path.
        with contextlib.closing(_orbax()) as orbax:
            # TensorStore believes what is stored, and a size that no memory holds ends the process.
            stored = orbax.metadata(state).tree["leaves"]
            if stored.shape != (size,) or stored.dtype != np.uint8 or stored.storage.chunk_shape[0] > max(size, 1):
                raise Damaged(self.step, "changed-size", f"{stored} is stored, and not {size} bytes")
            return _unpack(orbax.restore(state, args=request)["leaves"], shapes)

    def _unread(self, error: OSError, kind: str) -> Exception:
        """Return what it means that a file could not be read: damage, unless it may be good all the same."""
        if error.errno in (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            return error
        name = os.path.relpath(error.filename, self.path) if error.filename else "a file"
        return Damaged(self.step, kind, f"{name} cannot be read ({error.strerror})")


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """Return the checkpoints in a directory, oldest first; what an unfinished save left is none."""
    if not directory.is_dir():
        return []
    found = [Checkpoint(path) for path in directory.iterdir() if STEP.fullmatch(path.name)]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


class Saved(NamedTuple):
    """A checkpoint that is committed."""

    step: int
    sha256: str
    manifest: Mapping[str, Any]
    seconds: float

    def __str__(self) -> str:
        """Return a line for people."""
        return f"the checkpoint of step {self.step} was saved in {self.seconds:.2f} s"


class Notice(NamedTuple):
    """Something that a person should know: `event` is low_space, checkpoints_vanished or removal_failed."""

    step: int
    event: str
    text: str

    def __str__(self) -> str:
        """Return a line for people."""
        return self.text


class Restored(NamedTuple):
    """A checkpoint that was read and found good; `set_aside` says which newer ones were not, and where they are."""

    step: int
    tree: Any
    manifest: Mapping[str, Any]
    set_aside: tuple[tuple[Damaged, Path], ...]


class CheckpointStore:
    """The checkpoints of one run, in one directory, for the one process that writes there.

        store = CheckpointStore("run/checkpoints")
        restored = store.restore(like=state)
        if restored:
            state = restored.tree
        ...
        store.save(step, state)  # returns at once
        ...
        store.save_and_wait(step, state)
        store.close()

    A store is used by one thread. A second store of a directory, in whatever process, would take the unfinished saves
    of the first for leftovers: have a lock.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3) -> None:
        """Open or make the directory, and remove what a killed process left there: `removed` names it.

        Args:
            directory: where the checkpoints lie.
            keep: how many of the newest to keep; older ones go when a newer one is committed, `pinned` ones never.

        Raises:
            OSError: the directory cannot be made, or has a backslash in its path.
        """
        self.directory = Path(directory).absolute()
        if "\\" in str(self.directory):
            raise OSError(f"TensorStore finds nothing again under a path with a backslash: {self.directory}")
        self.directory.mkdir(parents=True, exist_ok=True)
        # It is held open, so that no other directory can take its identity.
        self._parent = os.open(self.directory.parent, os.O_RDONLY | os.O_DIRECTORY)
        self.removed = tuple(sorted(path.name for path in self.directory.iterdir() if _LEFTOVER.fullmatch(path.name)))
        for name in self.removed:
            remove(self.directory / name)
        for path in (self.directory, *self.directory.parents):  # A checkpoint is lost with any name that leads to it.
            with contextlib.suppress(PermissionError):
                bring_to_disk(path)
        self.keep = keep
        self.pinned: set[int] = set()
        self._digests: dict[int, str | None] = dict.fromkeys(found.step for found in list_checkpoints(self.directory))
        # Orbax's own asynchronous mode makes the caller wait for the copy to the host and for 10 to 20 ms of set-up.
        # Here all of that, and the digests, are the work of a thread of ours.
        self._background = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="checkpoint", initializer=_yield_to_others
        )
        self._foreground = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._pending_step: int | None = None
        self._results: queue.SimpleQueue[Saved | SaveFailed | Notice] = queue.SimpleQueue()
        self._last_failure: SaveFailed | None = None
        self._is_space_low = False

    @property
    def steps(self) -> list[int]:
        """The steps of the committed checkpoints, oldest first."""
        return sorted(self._digests)

    @property
    def newest_step(self) -> int:
        """The step of the newest committed checkpoint, 0 where there is none."""
        return max(self._digests, default=0)

    @property
    def is_saving(self) -> bool:
        """Whether a save is still being written."""
        return self._pending is not None and not self._pending.done()

    def save(
        self, step: int, tree: Any, *, about: Mapping[str, Any] | None = None, valid: bool | jax.Array = True
    ) -> None:
        """Save a tree in the background, unless this step is saved or being saved already.

        The tree is copied on its devices first, so its buffers may be donated as soon as this returns; the arrays
        may still be in the making. A save that is still running is waited for.

        Args:
            step: names the checkpoint.
            tree: a pytree of arrays that this process holds whole.
            about: JSON values to keep in the manifest.
            valid: whether the tree is worth keeping; looked at when it is known.

        How it went, `results` tells.
        """
        if not (self.is_saving and self._pending_step == step):
            self._save(self._background, step, tree, about, valid)

    def save_and_wait(
        self, step: int, tree: Any, *, about: Mapping[str, Any] | None = None, valid: bool | jax.Array = True
    ) -> str:
        """Save a tree, unless this step is saved already, and return its SHA-256 when it is committed.

        Raises:
            SaveFailed: it could not be written.
        """
        # Whoever waits has nothing else to do: this thread yields to nobody. On 2 cores with six other processes at
        # work a save took 119 ms in it, and 190 ms in the other.
        self._save(self._foreground, step, tree, about, valid)
        self.wait()
        if step not in self._digests:
            assert self._last_failure is not None
            raise self._last_failure
        return self.sha256(step)

    def _save(
        self,
        executor: ThreadPoolExecutor,
        step: int,
        tree: Any,
        about: Mapping[str, Any] | None,
        valid: bool | jax.Array,
    ) -> None:
        self.wait()
        if step not in self._digests:
            self._pending_step = step
            self._pending = executor.submit(self._write, step, _pack(tree), _raw_shapes(tree), dict(about or {}), valid)

    def results(self) -> list[Saved | SaveFailed | Notice]:
        """Return how the saves went that ended since the last call, and what else came to light in them."""
        ended = []
        while not self._results.empty():
            ended.append(self._results.get())
        return ended

    def wait(self) -> None:
        """Wait for the save that is being written, if there is one. Signal handlers run meanwhile."""
        if self._pending is not None:
            wait([self._pending])

    def close(self) -> None:
        """Wait for the save that is being written, and let go of the directory."""
        for executor in (self._background, self._foreground):
            executor.shutdown(wait=True)
        os.close(self._parent)

    def sha256(self, step: int) -> str:
        """Return the SHA-256 of the state in a committed checkpoint, as its manifest has it."""
        digest = self._digests[step]
        if digest is None:
            digest = self._digests[step] = str(self._checkpoint(step).manifest()["sha256"])
        return digest

    def restore(self, like: Any) -> Restored | None:
        """Return the newest checkpoint that is good, or None where there is no checkpoint.

        Newer ones that are damaged are then moved to `quarantine/<step>-<what is wrong>/`. Where none is good, all
        stay where they are, so that each start says so again.

        Args:
            like: a tree of arrays or of `jax.ShapeDtypeStruct`; the result has its structure and its shardings.

        Raises:
            Mismatch: a checkpoint is whole, but of a tree with other names, shapes or types, or of another format.
            NoReadableCheckpoint: there are checkpoints, and none is good.
        """
        damaged: list[Damaged] = []
        for step in reversed(self.steps):
            try:
                tree, manifest = self._checkpoint(step).read(like)
            except Damaged as error:
                damaged.append(error)
                continue
            self._digests[step] = manifest["sha256"]
            return Restored(step, tree, manifest, tuple((error, self._quarantine(error)) for error in damaged))
        if damaged:
            raise NoReadableCheckpoint(
                f"none of the checkpoints in {self.directory} is good, so there is nothing to carry on from:\n  "
                + "\n  ".join(map(str, damaged))
                + "\nBring one back from a copy, or begin anew in another directory. Nothing was moved or deleted."
            )
        return None

    def _checkpoint(self, step: int) -> Checkpoint:
        return Checkpoint(self.directory / str(step))

    def _write(
        self,
        step: int,
        packed: Mapping[str, jax.Array],
        shapes: Mapping[str, jax.ShapeDtypeStruct],
        about: Mapping[str, Any],
        valid: bool | jax.Array,
    ) -> None:
        """Write one checkpoint, in the background thread."""
        started = time.monotonic()
        try:
            if not valid:
                raise InvalidState(step, "its values are not finite")
            self._check_place(step)
            content = _bytes(packed)
            self._look_at_free_space(step, content.nbytes)
            manifest = self._commit(step, content, describe_leaves(_unpack(content, shapes)), about)
        except Exception as error:
            failure = error if isinstance(error, SaveFailed) else SaveFailed(step, f"{type(error).__name__}: {error}")
            self._last_failure = failure
            self._results.put(failure)
        else:
            self._results.put(Saved(step, manifest["sha256"], manifest, time.monotonic() - started))
            self._remove_old(step)

    def _commit(
        self, step: int, content: np.ndarray, table: Mapping[str, Any], about: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write a checkpoint and return its manifest when the disk has all of it."""
        unfinished = self.directory / f"{step}.unfinished"
        remove(unfinished)  # An earlier try may have broken off.
        (unfinished / "state").mkdir(parents=True)
        with contextlib.closing(_orbax()) as orbax:
            orbax.save(unfinished / "state", args=ocp.args.PyTreeSave({"leaves": content}))
        manifest = {
            "format": FORMAT,
            "step": step,
            "sha256": _json_sha256(table),
            "leaves": table,
            "files": {
                name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
                for name, path in sorted(regular_files(unfinished).items())
            },
            "about": dict(about),
        }
        _write_manifest(unfinished / "manifest.json", manifest)
        for directory, _, files in os.walk(unfinished):
            for name in (*files, "."):
                bring_to_disk(Path(directory, name))
        if os.path.lexists(self._checkpoint(step).path):  # An earlier try got as far as this, and the disk no further.
            self._quarantine(Damaged(step, "not-committed", "it did not come to the disk"))
        unfinished.rename(self._checkpoint(step).path)
        bring_to_disk(self.directory)
        self._digests = {**self._digests, step: str(manifest["sha256"])}
        return manifest

    def _check_place(self, step: int) -> None:
        """Make the directory anew if it was removed, and write to no other in its place, for that may be another's."""
        parent = self.directory.parent
        if not parent.exists() or not os.path.samestat(os.fstat(self._parent), parent.stat()):
            self._digests = {}
            raise SaveFailed(step, f"{parent} was moved or removed" + ", and another is in its place" * parent.exists())
        self.directory.mkdir(exist_ok=True)
        there = {found.step for found in list_checkpoints(self.directory)}
        if vanished := sorted(self._digests.keys() - there):
            self._digests = {known: digest for known, digest in self._digests.items() if known in there}
            names = ", ".join(map(str, vanished))
            self._results.put(
                Notice(step, "checkpoints_vanished", f"the checkpoints of these steps have vanished: {names}")
            )

    def _look_at_free_space(self, step: int, needed: int) -> None:
        """Tell, once, that the disk will soon be full."""
        free = shutil.disk_usage(self.directory).free
        was_low, self._is_space_low = self._is_space_low, free < SPARE_ROOM * needed
        if self._is_space_low and not was_low:
            text = (
                f"only {free / 1e6:,.1f} MB are free in {self.directory}, and a checkpoint takes "
                f"{needed / 1e6:,.1f} MB; make room, or checkpoints will fail"
            )
            self._results.put(Notice(step, "low_space", text))

    def _remove_old(self, step: int) -> None:
        """Remove the checkpoints that are neither among the newest nor pinned. What is half removed never counts."""
        for old in self.steps[: -self.keep]:
            if old in self.pinned:
                continue
            try:
                leftover = self.directory / f"{old}.removed"
                self._checkpoint(old).path.rename(leftover)
                self._digests = {kept: digest for kept, digest in self._digests.items() if kept != old}
                remove(leftover)
            except OSError as error:
                text = f"the old checkpoint of step {old} could not be removed: {error}"
                self._results.put(Notice(step, "removal_failed", text))

    def _quarantine(self, damaged: Damaged) -> Path:
        """Move a checkpoint out of the way and return where it is; nothing that could not be read is deleted."""
        shelter = self.directory / "quarantine"
        shelter.mkdir(exist_ok=True)
        name = f"{damaged.step}-{damaged.kind}"
        names = (name if number == 1 else f"{name}-{number}" for number in count(1))
        refuge = next(path for name in names if not os.path.lexists(path := shelter / name))
        self._checkpoint(damaged.step).path.rename(refuge)
        self._digests.pop(damaged.step, None)
        return refuge


STEP = re.compile(r"0|[1-9][0-9]{0,17}")
_LEFTOVER = re.compile(r"[0-9]+\.(unfinished|removed)")


def _orbax() -> ocp.PyTreeCheckpointHandler:
    """Return what writes and reads arrays.

    It is the part of Orbax below its `Checkpointer`, whose own way to commit, under another name again, is not needed
    here. Neither is OCDBT, its layout for many arrays, which loses all where the path has a `[`; nor a compression,
    for the bits of trained weights look like noise.
    """
    # Where several processes compute, this one alone writes, or reads for itself: no other is waited for.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=str(me))
    return ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, multiprocessing_options=alone)


def regular_files(directory: Path) -> dict[str, Path]:
    """Return the regular files under a directory by their names relative to it. No symbolic link is followed."""
    found = (Path(parent, name) for parent, _, files in os.walk(directory) for name in files)
    return {path.relative_to(directory).as_posix(): path for path in found if stat.S_ISREG(path.lstat().st_mode)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_sha256(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON values, in whatever order a file has them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({**manifest, "seal": _json_sha256(manifest)}, indent=1) + "\n")


def _read_manifest(path: Path) -> dict[str, Any]:
    """Return a manifest whose seal is whole.

    Raises:
        OSError: it cannot be read.
        ValueError, RecursionError: it is no manifest, or not what was written.
    """
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("it is not a file")
    if path.stat().st_size > MOST_MANIFEST_BYTES:
        raise ValueError(f"it has more than {MOST_MANIFEST_BYTES} bytes")
    manifest = json.loads(path.read_bytes())
    if not isinstance(manifest, dict) or not manifest.keys() >= {"format", "step", "seal"}:
        raise ValueError("it lacks format, step or seal")
    if manifest.pop("seal") != _json_sha256(manifest):
        raise ValueError("its seal does not fit what it says")
    if manifest["format"] == FORMAT and not _is_complete(manifest):
        raise ValueError("it does not describe a checkpoint")
    return manifest


def _is_complete(manifest: Mapping[str, Any]) -> bool:
    """Tell whether a manifest has all that one of this format has. A seal can be made by anybody."""

    def is_table(value: Any, **columns: type) -> bool:
        return isinstance(value, dict) and all(
            isinstance(row, dict) and all(type(row.get(name)) is kind for name, kind in columns.items())
            for row in value.values()
        )

    return (
        is_table(manifest.get("leaves"), shape=list, dtype=str, sha256=str)
        and is_table(manifest.get("files"), bytes=int, sha256=str)
        and isinstance(manifest.get("sha256"), str)
        and isinstance(manifest.get("about"), dict)
    )


def bring_to_disk(path: Path) -> None:
    """Return when the disk has a file's bytes, or the names in a directory."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError as error:
        # Some file systems have no way to do it for directories.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(file)


def remove(path: Path) -> None:
    """Remove what is there, if anything is; a symbolic link goes, and what it leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _yield_to_others() -> None:
    """Have this thread, and those that it starts, run where training leaves a core idle.

    On Linux priorities are of threads. On 2 cores a save every second cost 4 % of the training time without this, and
    under 1 % with it.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


@jax.jit
def _pack(tree: Any) -> dict[str, jax.Array]:
    """Return the leaves of a tree laid end to end, in the order of their names, in one array for each type.

    They are copies: the buffers of the tree may be donated while a save reads these.
    """
    parts: dict[str, list[jax.Array]] = {}
    for _, leaf in sorted(_named_leaves(jax.tree.map(_raw, tree)).items()):
        parts.setdefault(str(leaf.dtype), []).append(leaf.ravel())
    # JAX would hand a single leaf through as it is, and not copy it.
    return {dtype: jnp.copy(jnp.concatenate(leaves)) for dtype, leaves in parts.items()}


def _bytes(packed: Mapping[str, jax.Array]) -> np.ndarray:
    """Return the bytes of what `_pack` returned, fetched, in the order of the types' names.

    Each array costs Orbax over a millisecond of a processor's time, which the training misses; a small model with
    Adam has 30 leaves, of three types.
    """
    return np.concatenate([np.asarray(packed[dtype]).view(np.uint8) for dtype in sorted(packed)])


def _unpack(content: np.ndarray, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Return views of the leaves in what `_bytes` returned."""
    leaves, end = {}, 0
    for name, leaf in sorted(shapes.items(), key=lambda item: (str(item[1].dtype), item[0])):
        first, end = end, end + leaf.size * leaf.dtype.itemsize
        leaves[name] = content[first:end].view(leaf.dtype).reshape(leaf.shape)
    return leaves


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by the names of their paths, such as `params.conv1.kernel`.

    Raises:
        ValueError: two leaves have the same name.
    """
    paths = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}
    if len(leaves) < len(paths):
        raise ValueError("two leaves of the tree have the same name, for a key of it has a full stop")
    return leaves


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _kind_of_key(leaf: Any) -> Any:
    """Return the implementation of a typed random key, of which only shape and type need to be there."""
    kinds: list[Any] = []
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), leaf)  # To make a key and ask it takes 30 ms.
    return kinds[0]


def _raw(leaf: Any) -> Any:
    """Return a leaf, and of a typed random key its numbers."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def host_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Return the leaves of a tree by the names of their paths, fetched; of a typed random key its numbers."""
    return {name: np.asarray(_raw(leaf)) for name, leaf in _named_leaves(tree).items()}


def describe_leaves(leaves: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return shape, type and SHA-256 of each leaf."""
    return {
        name: {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "sha256": hashlib.sha256(leaf.tobytes()).hexdigest(),
        }
        for name, leaf in sorted(leaves.items())
    }


def _raw_shapes(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and type of each leaf as it is stored."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        if _is_key(leaf):
            return jax.eval_shape(_raw, leaf)
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(leaf.dtype))

    return {name: shape(leaf) for name, leaf in _named_leaves(tree).items()}


def _check_same_tree(
    step: int, table: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    """Raise Mismatch unless a manifest's leaves have the names, shapes and types that are expected."""
    expected = {name: f"{list(leaf.shape)} {leaf.dtype}" for name, leaf in shapes.items()}
    found = {name: f"{row['shape']} {row['dtype']}" for name, row in table.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise Mismatch(
                f"the checkpoint of step {step} is of another tree: leaf {name} should be "
                f"{expected.get(name, 'absent')} and is {found.get(name, 'absent')}"
            )


def _place(leaves: Mapping[str, np.ndarray], like: Any) -> Any:
    """Return the leaves as a tree like `like`, on its devices."""

    def place(path: Any, wanted: Any) -> jax.Array:
        leaf: Any = leaves[jax.tree_util.keystr(path, simple=True, separator=".")]
        if _is_key(wanted):
            return jax.random.wrap_key_data(_put(leaf, wanted.sharding), impl=_kind_of_key(wanted))
        return _put(leaf, wanted.sharding)

    return jax.tree_util.tree_map_with_path(place, like)


def _put(leaf: np.ndarray, sharding: Any) -> jax.Array:
    """Return an array that lies as `sharding` says; with several processes each of them calls this alike."""
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])
