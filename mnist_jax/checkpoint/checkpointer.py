"""Checkpoints that are whole or not there, written by Orbax in the background and verified before they are used.

`checkpoints/<step>/` is what Orbax's `CheckpointManager` writes, and Orbax alone can read it:

    state/           the state, one entry per leaf, under its own name; the files `hashes.<process>.json` are ours
    run/             what the caller wants to remember, as JSON
    manifest.json    ours: the SHA-256 of each leaf, of the state and of each file, for Orbax keeps no such digests

A checkpoint is committed when its files and directories are fsynced, it is renamed to its name, and the rename is
fsynced. Only then are older ones removed. A kill or a power cut leaves a checkpoint that is whole, or a directory with
another name that never counts.
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
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mnist_jax.checkpoint import integrity, orbax_io
from mnist_jax.checkpoint.integrity import (
    STEP,
    CheckpointError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    InvalidStateError,
    Json,
    NoGoodCheckpointError,
    ReadError,
    SaveError,
)
from mnist_jax.checkpoint.orbax_io import REMOVED, UNFINISHED, brief

METADATA = "run/metadata"  # the file of Orbax's item `run`
_LAYOUT = "state/_METADATA"  # Orbax's own
QUARANTINE = "quarantine"
SPARE_CHECKPOINTS = 10  # A warning says when fewer than these fit on the disk.
BACKGROUND_NICE = 10
_LEFTOVER = re.compile(rf"[0-9]+\.(unfinished|ready)|[0-9]+{re.escape(UNFINISHED)}.*")

# What an OSError says about the bytes on the disk. Any other may not come at the next try.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)


# ---- One checkpoint, read-only --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. Read-only; safe while its run is at work, and no device is touched until `read`."""

    path: Path

    @property
    def step(self) -> int:
        """The step that it was saved at."""
        return int(self.path.name)

    @property
    def bytes(self) -> int:
        """The size of its files together."""
        return sum(path.lstat().st_size for path in integrity.regular_files(self.path).values())

    def manifest(self) -> Json:
        """Return the manifest: format, step, state_sha256, leaves, files.

        Raises:
            CorruptCheckpointError: it is not there, or not what was saved.
            IncompatibleCheckpointError: it has another format.
            ReadError: it cannot be read here and now.
        """
        if self.path.is_symlink():
            raise CorruptCheckpointError(self.step, "symbolic-link", f"{self.path} is a symbolic link")
        with self._damage("bad-manifest", integrity.MANIFEST):
            manifest = integrity.read_manifest(self.path / integrity.MANIFEST)
        if manifest["format"] != integrity.FORMAT:
            raise IncompatibleCheckpointError(
                f"the checkpoint of step {self.step} has format {manifest['format']}, and this version reads format "
                f"{integrity.FORMAT}"
            )
        if manifest["step"] != self.step:
            raise CorruptCheckpointError(self.step, "other-step", f"manifest.json is that of step {manifest['step']}")
        return manifest

    def metadata(self) -> Json:
        """Return what the caller of `save` wanted to remember, as JSON values.

        Raises:
            CorruptCheckpointError, IncompatibleCheckpointError, ReadError: as `manifest`.
        """
        return self._json(METADATA, self.manifest())

    def verify(self) -> Json:
        """Return the manifest, after reading every byte that was saved.

        Raises:
            CorruptCheckpointError: a file is missing or changed.
            IncompatibleCheckpointError, ReadError: as `manifest`.
        """
        manifest = self.manifest()
        with self._damage("unreadable-file", "a file"):
            there = integrity.regular_files(self.path)
            for name, wanted in manifest["files"].items():
                if name not in there:
                    raise CorruptCheckpointError(self.step, "missing-file", f"file {name} is missing")
                size = there[name].stat().st_size  # One that grew is not read: it may be larger than all disks.
                found = {"bytes": size} if size != wanted["bytes"] else integrity.describe_file(there[name])
                if found != wanted:
                    detail = f"file {name} is {found}, and was {wanted}"
                    raise CorruptCheckpointError(self.step, "changed-file", detail)
        return manifest

    def read(self, like: Any, *, partial: bool = False) -> tuple[Any, Json]:
        """Return the state and what was remembered with it, every file and every leaf verified.

        Where several processes compute, each reads for itself and waits for no other.

        Args:
            like: a tree of arrays, numbers and `jax.ShapeDtypeStruct`; the result has its structure, types and
                shardings. An abstract leaf without a sharding is put on the first device.
            partial: whether `like` may lack leaves, as `{"params": ...}` does.

        Raises:
            CorruptCheckpointError: a file or a leaf is not what was saved.
            IncompatibleCheckpointError: it holds leaves with other names, shapes or types, or has another format.
            ReadError: it cannot be read here and now.
        """
        manifest = self.verify()
        chunks = self._chunks(manifest)
        wanted = integrity.named_leaves(like)
        _check_same_tree(self.step, manifest["leaves"], wanted, partial=partial)
        layouts = {name: integrity.layout(leaf) for name, leaf in wanted.items()}
        state = self.path.absolute() / "state"  # Orbax finds no metadata under a relative path.
        try:
            self._check_layouts(manifest, chunks, layouts, orbax_io.stored_arrays(state))
            restored = orbax_io.restore_state(state, like, partial=partial)
            found = {name: integrity.known_digests([row]) for name, row in integrity.hash_shards(restored).items()}
        except CheckpointError:
            raise
        except Exception as error:  # The bytes are those that were saved, so it is not for them that this failed.
            raise ReadError(self.step, brief(error)) from error
        for name, digests in found.items():
            for number, digest in digests.items():
                if digest != chunks[name]["chunks"][number]:
                    detail = f"leaf {name} is read with other values than were saved"
                    raise CorruptCheckpointError(self.step, "changed-leaf", detail)
        return restored, self._json(METADATA, manifest)

    def _chunks(self, manifest: Json) -> dict[str, Json]:
        """Return the digests of the chunks of each leaf, as the processes that saved it found them."""
        parts = [self._json(name, manifest) for name in manifest["files"] if orbax_io.HASHES.fullmatch(name)]
        with self._damage("bad-hashes", "the hashes of the leaves"):
            chunks = integrity.combine(part["leaves"] for part in parts)
            if integrity.leaf_table(chunks) != manifest["leaves"]:
                raise ValueError("they are those of other leaves")
        return chunks

    def _check_layouts(
        self, manifest: Json, chunks: Mapping[str, Json], layouts: Mapping[str, Json], stored: orbax_io.StoredArrays
    ) -> None:
        """Check that each leaf is stored and hashed in the size that it has to have.

        TensorStore believes what is stored, and ends the process where no memory holds it.

        Args:
            manifest: that of this checkpoint.
            chunks: the digests of the chunks of each leaf, and what they are chunks of.
            layouts: what `integrity.layout` says of the leaves to be read.
            stored: what TensorStore keeps about each array, as JSON.
        """
        folder = f"state/{orbax_io.ARRAY_METADATA}"  # Orbax reads all that is there, whoever wrote it.
        with self._damage("other-size", folder):
            names = os.listdir(self.path / folder) if (self.path / folder).is_dir() else []
        if unknown := sorted({f"{folder}/{name}" for name in names} - manifest["files"].keys()):
            raise CorruptCheckpointError(self.step, "unknown-file", f"file {unknown[0]} was not saved")
        flags = self._json(_LAYOUT, manifest)
        with self._damage("other-size", "state"):
            # Orbax would look for other arrays than those that are checked here.
            is_other = flags.get("use_ocdbt") not in (None, orbax_io.is_ocdbt(self.path / "state"))
            if flags.get("use_zarr3") or (is_other and stored):
                raise ValueError("it is of another layout than Orbax was told to write")
            for name, layout in layouts.items():
                if any(chunks[name][field] != value for field, value in layout.items()):
                    raise ValueError(f"leaf {name} was hashed in another size")
                if 0 not in layout["raw_shape"]:
                    orbax_io.check_stored_array(name, stored, layout)

    def _json(self, name: str, manifest: Json) -> Any:
        """Return the JSON values in a file, if they are those that were saved."""
        with self._damage("changed-file", name):
            path = integrity.regular_files(self.path).get(name)  # A link leads elsewhere; a pipe is waited for.
            if path is None or name not in manifest["files"]:
                raise CorruptCheckpointError(self.step, "missing-file", f"file {name} is missing")
            if path.stat().st_size > integrity.MAX_MANIFEST_BYTES:
                raise ValueError(f"it has more than {integrity.MAX_MANIFEST_BYTES} bytes")
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != manifest["files"][name]["sha256"]:
                raise ValueError("it has other bytes than were saved")
            return json.loads(content)

    @contextlib.contextmanager
    def _damage(self, kind: str, what: str) -> Iterator[None]:
        """Say of an error in reading `what` that it is damage, if it is.

        Too few files, threads or bytes of memory say nothing about the checkpoint, nor does a missing permission.
        """
        try:
            yield
        except MemoryError as error:
            raise ReadError(self.step, brief(error)) from error
        except OSError as error:
            if error.errno not in _DAMAGE:
                raise ReadError(self.step, brief(error)) from error
            name = os.path.relpath(error.filename, self.path) if error.filename else what
            raise CorruptCheckpointError(self.step, kind, f"{name} cannot be read ({error.strerror})") from error
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            detail = f"{what} cannot be understood: {error}"
            raise CorruptCheckpointError(self.step, kind, detail) from error


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """Return the committed checkpoints in a directory, oldest first."""
    if not directory.is_dir():
        return []
    found = [Checkpoint(path) for path in directory.iterdir() if STEP.fullmatch(path.name)]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


# ---- The checkpoints of a run ---------------------------------------------------------------------------------------


class Saved(NamedTuple):
    """A checkpoint that is committed."""

    step: int
    state_sha256: str
    metadata: Json
    seconds: float

    def __str__(self) -> str:
        """Return a line for people."""
        return f"the checkpoint of step {self.step} was saved in {self.seconds:.2f} s"


class Notice(NamedTuple):
    """Something to warn of: `event` is low_space, checkpoints_vanished, removal_failed or no_priority."""

    step: int
    event: str
    text: str

    def __str__(self) -> str:
        """Return a line for people."""
        return self.text


class Restored(NamedTuple):
    """A checkpoint that was read and found good; `quarantined` says which newer ones were not, and where they are."""

    step: int
    state: Any
    metadata: Json
    state_sha256: str
    quarantined: tuple[tuple[CorruptCheckpointError, Path], ...]


class _Request(NamedTuple):
    """What `save` was called with, besides step and state."""

    metadata: Json
    valid: bool | jax.Array
    refuse: str | None


class Checkpointer:
    """The checkpoints of one run in one directory, for the one run that writes there.

        checkpointer = Checkpointer("run/checkpoints")
        restored = checkpointer.restore(like=state)
        if restored:
            state = restored.state
        ...
        checkpointer.save(step, state)  # returns at once
        ...
        checkpointer.save_and_wait(step, state)
        checkpointer.close()

    Where several processes compute, each has one, and all of them make the same calls of `save` and `save_and_wait` in
    the same order: each writes and hashes its own shards, and process 0 commits. Only its `results` tell of commits.
    `restore` is for process 0 alone; the others read the step that it found with `Checkpoint.read`.

    It is used by one thread. A second one for the same directory would take unfinished saves for leftovers: have a
    lock.
    """

    def __init__(
        self, directory: str | Path, *, keep: int = 3, is_primary: bool | None = None, timeout_s: int = 600
    ) -> None:
        """Open or make the directory, and remove what a killed process left there: `removed` names it.

        Args:
            directory: where the checkpoints are.
            keep: how many of the newest to keep; older ones go when a newer one is committed, `pinned` ones never.
            is_primary: whether this is process 0, the only one that commits and removes. None to ask JAX, which starts
                its backends.
            timeout_s: how long a save waits for the other processes.

        Raises:
            OSError: the directory cannot be made, or TensorStore cannot reach it.
        """
        self.is_primary = jax.process_index() == 0 if is_primary is None else is_primary
        self.keep, self.pinned = keep, set[int]()
        self._results: queue.SimpleQueue[Saved | SaveError | Notice] = queue.SimpleQueue()
        self._place = _Directory(Path(directory).absolute(), self._results)
        self.removed = self._place.clean() if self.is_primary else ()
        self._writer = orbax_io.Writer(self.directory, self, timeout_s)
        # Orbax's own `save` waits for the state that is being computed and for its copy to the host, and takes 10 ms
        # more. Here a thread of ours does that; the caller pays for a copy on the devices, in the order of its calls.
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=self._lower_priority)
        self._foreground = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        try:
            for executor in (self._background, self._foreground):
                executor.submit(int)  # Their threads are started now, for later there may be too many.
        except RuntimeError as error:
            raise OSError(errno.EAGAIN, f"no thread can be started: {error}") from error
        self._pending: Future[None] | None = None
        self._last_step: int | None = None
        self._last_error: SaveError | None = None
        logging.getLogger("absl").addFilter(orbax_io.is_told_otherwise)

    @property
    def directory(self) -> Path:
        """Where the checkpoints are."""
        return self._place.path

    @property
    def steps(self) -> list[int]:
        """The steps of the committed checkpoints, oldest first."""
        return sorted(self._place.committed)

    @property
    def newest_step(self) -> int:
        """The step of the newest committed checkpoint, 0 where there is none."""
        return max(self._place.committed, default=0)

    @property
    def is_saving(self) -> bool:
        """Whether a save is still being written."""
        return self._pending is not None and not self._pending.done()

    def prepare(self, state: Any) -> None:
        """Compile what `save` runs on the devices, so that the first save, perhaps after a signal, need not."""
        orbax_io.copy_state(state)

    def save(
        self,
        step: int,
        state: Any,
        *,
        metadata: Mapping[str, Any] | None = None,
        valid: bool | jax.Array = True,
        refuse: str | None = None,
    ) -> None:
        """Save a state in the background, unless this step was the last to be saved. `results` tells how it went.

        The state is copied on its devices first, so its buffers may be donated as soon as this returns, and its arrays
        need not be computed yet. A save that is still being written is waited for. A step whose save failed is tried
        again by `save_and_wait`; `save` does not, for the processes may not know yet in the same call that it failed.

        Args:
            step: names the checkpoint.
            state: a pytree of arrays, numpy arrays and numbers, with any shardings.
            metadata: JSON values to remember with it.
            valid: whether the state is worth keeping; looked at when it is known. The same in all processes.
            refuse: why this save has to fail, for a reason that process 0 has; the others need not know it.

        Raises:
            SaveError: a leaf is of a kind that could not be restored as it is, or the metadata is no JSON.
        """
        if step != self._last_step:
            self._save(self._background, step, state, _Request(_as_json(step, metadata), valid, refuse))

    def save_and_wait(
        self,
        step: int,
        state: Any,
        *,
        metadata: Mapping[str, Any] | None = None,
        valid: bool | jax.Array = True,
        refuse: str | None = None,
    ) -> str:
        """Save a state, unless this step is saved already, and return its SHA-256 when it is committed.

        Raises:
            SaveError: it could not be written, or a leaf is of a kind that could not be restored as it is.
        """
        # The caller has nothing else to do, so this thread has the usual priority. On 2 cores with six other processes
        # at work a save took 119 ms in it, and 190 ms in the other.
        self._save(self._foreground, step, state, _Request(_as_json(step, metadata), valid, refuse))
        self.wait()
        if step not in self._place.committed:
            assert self._last_error is not None
            raise self._last_error
        return self.state_sha256(step)

    def results(self) -> list[Saved | SaveError | Notice]:
        """Return how the saves went that ended since the last call, and what else came to light."""
        ended = []
        while not self._results.empty():
            ended.append(self._results.get())
        return ended

    def wait(self) -> None:
        """Wait for the save that is being written, if there is one. Signal handlers run meanwhile."""
        if self._pending is not None:
            wait([self._pending])

    def close(self, *, wait: bool = True) -> None:
        """Wait for the save that is being written, unless told not to, and let go of the directory."""
        for executor in (self._background, self._foreground):
            executor.shutdown(wait=wait)
        if wait:
            self._writer.close()
        self._place.close()

    def state_sha256(self, step: int) -> str:
        """Return the SHA-256 of the state in a committed checkpoint, as its manifest has it."""
        return self._place.state_sha256(step)

    def restore(self, like: Any) -> Restored | None:
        """Return the newest checkpoint that is good, or None where there is no checkpoint.

        Newer ones that are corrupt are then moved to `quarantine/<step>-<kind>/`. Where none is good, all stay where
        they are, so that each start says so again.

        Args:
            like: as `Checkpoint.read` takes it.

        Raises:
            IncompatibleCheckpointError: the newest good one holds another tree, or has another format.
            NoGoodCheckpointError: there are checkpoints, and none is good.
            ReadError: one cannot be read here and now. Nothing was moved.
        """
        corrupt: list[CorruptCheckpointError] = []
        for step in reversed(self.steps):
            try:
                state, metadata = self._place.checkpoint(step).read(like)
                digest = self.state_sha256(step)
            except CorruptCheckpointError as error:
                corrupt.append(error)
                continue
            quarantined = tuple((error, self._place.quarantine(error)) for error in corrupt)
            return Restored(step, state, metadata, digest, quarantined)
        if corrupt:
            raise NoGoodCheckpointError(
                f"none of the checkpoints in {self.directory} is good, so there is nothing to resume from:\n  "
                + "\n  ".join(map(str, corrupt))
                + "\nBring one back from a copy, or start in another directory. Nothing was moved or deleted."
            )
        return None

    def _save(self, executor: ThreadPoolExecutor, step: int, state: Any, request: _Request) -> None:
        self.wait()
        orbax_io.check_leaves(step, state)
        self._last_step = step
        self._pending = executor.submit(self._write, step, orbax_io.copy_state(state), request)

    def _write(self, step: int, state: Any, request: _Request) -> None:
        """Write one checkpoint, in a thread of ours; the same on every process."""
        started, is_ready = time.monotonic(), False
        try:
            if not request.valid:
                raise InvalidStateError(step, "its values are not finite")
            prepare = partial(self._prepare, step, state, request) if self.is_primary else None
            is_ready = self._writer.is_ready(step, prepare)
            trouble = self._writer.write(step, state, request.metadata) if is_ready else None
            self._place.look()
            if step not in self._place.committed:
                raise SaveError(step, "process 0 did not commit it")
            if self.is_primary and is_ready:
                if trouble:
                    self._place.tell(step, "removal_failed", f"an old checkpoint could not be removed: {trouble}")
                digest = self.state_sha256(step)
                self._results.put(Saved(step, digest, request.metadata, time.monotonic() - started))
                self._place.remove_leftovers(step)
        except Exception as error:
            self._last_error = error if isinstance(error, SaveError) else SaveError(step, brief(error))
            self._results.put(self._last_error)
            if self.is_primary and is_ready:
                self._place.discard(step)

    def _prepare(self, step: int, state: Any, request: _Request) -> bool:
        """Tell whether this step is to be written, as far as process 0 knows."""
        self._place.check(step)
        if step in self._place.committed:
            return False
        if request.refuse:
            raise SaveError(step, request.refuse)
        self._place.make_room(step, sum(getattr(leaf, "nbytes", 8) for leaf in jax.tree.leaves(state)))
        return True

    def _lower_priority(self) -> None:
        """Have the saving thread, and those that it starts, run where training leaves a core idle.

        On Linux priorities are of threads. On 2 cores a save every second cost 4 % of the training time without this,
        and under 1 % with it.
        """
        if sys.platform != "linux":
            return
        try:
            thread = threading.get_native_id()
            if os.getpriority(os.PRIO_PROCESS, thread) < BACKGROUND_NICE:
                os.setpriority(os.PRIO_PROCESS, thread, BACKGROUND_NICE)
        except OSError as error:
            text = f"saves run at the priority of training, which they may slow down: {error}"
            self._place.tell(0, "no_priority", text)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:  # noqa: ARG002 - Orbax's
        """Tell Orbax which checkpoints to keep, the one that is being written included; oldest first."""
        newest = {checkpoint.step for checkpoint in checkpoints[-self.keep :]}
        return [checkpoint.step in newest | self.pinned for checkpoint in checkpoints]


def _as_json(step: int, metadata: Mapping[str, Any] | None) -> Json:
    """Return a copy of metadata, which may change meanwhile. Orbax would find out too late that it is no JSON."""
    try:
        return dict(json.loads(json.dumps(dict(metadata or {}))))
    except (TypeError, ValueError, RecursionError) as error:
        raise SaveError(step, f"the metadata is no JSON: {brief(error)}") from error


class _Directory:
    """The directory of the checkpoints: which are committed, and what else there is and should not be."""

    def __init__(self, path: Path, results: "queue.SimpleQueue[Saved | SaveError | Notice]") -> None:
        self.path = path
        self._results = results
        self._told: set[str] = set()
        path.mkdir(parents=True, exist_ok=True)
        # It is held open, so that no other directory can take its identity.
        self._parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        self.committed: dict[int, str | None] = {}  # step -> SHA-256 of the state, None before anybody asked
        self.look()

    def clean(self) -> tuple[str, ...]:
        """Remove leftovers, and return their names. Check that TensorStore reaches the directory, and fsync its path.

        Raises:
            OSError: TensorStore does not reach it.
        """
        try:
            orbax_io.check_is_reachable(self.path)
        except OSError:
            self.close()
            raise
        removed = self.remove_leftovers(step=0)
        for path in (self.path, *self.path.parents):  # A checkpoint is lost with any name above it.
            with contextlib.suppress(PermissionError):
                integrity.fsync_path(path)
        return removed

    def close(self) -> None:
        os.close(self._parent)

    def look(self) -> None:
        """Look again which checkpoints are there."""
        there = [checkpoint.step for checkpoint in list_checkpoints(self.path)]
        self.committed = {step: self.committed.get(step) for step in there}

    def checkpoint(self, step: int) -> Checkpoint:
        return Checkpoint(self.path / str(step))

    def state_sha256(self, step: int) -> str:
        digest = self.committed[step]
        if digest is None:
            digest = self.committed[step] = str(self.checkpoint(step).manifest()["state_sha256"])
        return digest

    def check(self, step: int) -> None:
        """Check that the directory is still that of this run; one that was removed is created again.

        Raises:
            SaveError: its parent was moved or removed. Nothing is written to what is there now.
        """
        parent = self.path.parent
        if not parent.exists() or not os.path.samestat(os.fstat(self._parent), parent.stat()):
            self.committed = {}
            raise SaveError(step, f"{parent} was moved or removed" + ", and another is in its place" * parent.exists())
        self.path.mkdir(exist_ok=True)
        there = {found.step for found in list_checkpoints(self.path)}
        if vanished := sorted(self.committed.keys() - there):
            self.committed = {known: digest for known, digest in self.committed.items() if known in there}
            names = ", ".join(map(str, vanished))
            text = f"the checkpoints of these steps are gone from {self.path}: {names}"
            self._results.put(Notice(step, "checkpoints_vanished", text))

    def make_room(self, step: int, needed: int) -> None:
        """Take out of the way what has the name of a step that is to be written, and warn if the disk is nearly full.

        Args:
            step: names the checkpoint.
            needed: its size in bytes.
        """
        if os.path.lexists(self.path / str(step)):
            self.quarantine(CorruptCheckpointError(step, "not-committed", "another process wrote it"))
        self.remove_leftovers(step)
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.path).free
            if free >= SPARE_CHECKPOINTS * needed:
                self._told.discard("low_space")
                return
            text = (
                f"only {free / 1e6:,.1f} MB are free in {self.path}, and a checkpoint takes {needed / 1e6:,.1f} MB; "
                "make room, or checkpoints will fail"
            )
            self.tell(step, "low_space", text)

    def discard(self, step: int) -> None:
        """Remove what a failed save wrote, for its room is needed by the next one.

        Where one leaf failed TensorStore still writes the others, and makes their directories again.
        """
        paths = [self.path / name for name in (f"{step}", f"{step}{UNFINISHED}", f"{step}.ready")]
        for _ in range(20):
            for path in paths:
                with contextlib.suppress(OSError):
                    integrity.remove(path)
            time.sleep(0.05)
            if not any(map(os.path.lexists, paths)):
                break
        self.look()

    def remove_leftovers(self, step: int) -> tuple[str, ...]:
        """Remove what unfinished saves left, and the checkpoints that Orbax took out, and return their names.

        What cannot be removed, a busy file of NFS or a mount, does no harm where it is.
        """
        removed, gone = self.path / REMOVED, []
        with contextlib.suppress(FileNotFoundError):
            found = [path for path in self.path.iterdir() if _LEFTOVER.fullmatch(path.name)]
            found += removed.iterdir() if removed.is_dir() and not removed.is_symlink() else ()
            for path in found:
                try:
                    integrity.remove(path)
                    gone.append(path.relative_to(self.path).as_posix())
                except OSError as error:
                    self.tell(step, "removal_failed", f"{path} could not be removed and is left: {brief(error)}")
                    self._free_name(path)
            with contextlib.suppress(OSError):
                removed.rmdir()
        return tuple(sorted(gone))

    def _free_name(self, leftover: Path) -> None:
        """Rename what cannot be removed, for the same step may be saved again."""
        removed = self.path / REMOVED
        if leftover.parent == self.path:
            with contextlib.suppress(OSError):
                removed.mkdir(exist_ok=True)
                names = (removed / f"{leftover.name}-{number}" for number in count())
                leftover.rename(next(path for path in names if not os.path.lexists(path)))

    def quarantine(self, corrupt: CorruptCheckpointError) -> Path:
        """Move a checkpoint out of the way and return where it is; nothing that could not be read is deleted."""
        shelter = self.path / QUARANTINE
        shelter.mkdir(exist_ok=True)
        name = f"{corrupt.step}-{corrupt.kind}"
        names = (name if number == 1 else f"{name}-{number}" for number in count(1))
        place = next(path for name in names if not os.path.lexists(path := shelter / name))
        (self.path / str(corrupt.step)).rename(place)
        self.committed.pop(corrupt.step, None)
        return place

    def tell(self, step: int, event: str, text: str) -> None:
        """Give a notice, the first time only."""
        if event not in self._told:
            self._told.add(event)
            self._results.put(Notice(step, event, text))


def _check_same_tree(step: int, table: Mapping[str, Json], like: Mapping[str, Any], *, partial: bool) -> None:
    """Raise IncompatibleCheckpointError unless a manifest's leaves have the names, shapes and types of `like`."""
    expected = {name: "{shape} {dtype}".format(**integrity.describe(leaf)) for name, leaf in like.items()}
    found = {name: f"{row['shape']} {row['dtype']}" for name, row in table.items() if not partial or name in expected}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise IncompatibleCheckpointError(
                f"the checkpoint of step {step} is of another tree: leaf {name} should be "
                f"{expected.get(name, 'absent')} and is {found.get(name, 'absent')}"
            )
