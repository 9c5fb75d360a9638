"""Checkpoints that are whole or not there, saved in the background, and checked when they are read.

A checkpoint is one directory that Orbax writes under another name and renames when it is complete. It holds the
leaves of a tree of arrays, and a JSON manifest: the SHA-256 of each leaf and of the whole, and what the caller wants
to remember. Orbax itself keeps no checksum of the leaves.

This file stands alone; lift it into your own project.

    CheckpointError          all that can go wrong here
    ├── SaveFailed           a checkpoint could not be written; those before it are untouched
    │   └── InvalidState     it was not worth writing: the caller's `valid` came out false
    ├── Mismatch             a checkpoint is of another tree or of another format
    └── NoReadableCheckpoint there are checkpoints, and none of them is good
"""

import glob
import hashlib
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

FORMAT = 1


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


class Mismatch(CheckpointError):
    """A checkpoint is whole, but not what is expected: another tree, or another format."""


class NoReadableCheckpoint(CheckpointError):
    """Checkpoints exist, and none is good."""


class Saved(NamedTuple):
    """A checkpoint that is committed."""

    step: int
    sha256: str
    manifest: Mapping[str, Any]
    seconds: float

    def __str__(self) -> str:
        """Return a line for people."""
        return f"the checkpoint of step {self.step} was saved in {self.seconds:.2f} s"


class Restored(NamedTuple):
    """A checkpoint that was read and found good; `set_aside` says which newer ones were not."""

    step: int
    tree: Any
    manifest: Mapping[str, Any]
    set_aside: tuple[str, ...]


class CheckpointStore:
    """The checkpoints of one run, in one directory, each named by its step.

        store = CheckpointStore("run/checkpoints")
        restored = store.restore(like=state)
        if restored:
            state = restored.tree
        ...
        store.save(step, state)  # returns at once
        ...
        store.save_and_wait(step, state)
        store.close()

    There may be one store of a directory at a time, used by one thread.
    """

    def __init__(self, directory: str | Path, *, keep: int = 3) -> None:
        """Open or make the directory.

        Args:
            directory: where the checkpoints lie.
            keep: how many of the newest to keep; older ones go when a newer one is committed, `pinned` ones never.

        Raises:
            OSError: the directory cannot be made, or has a backslash in its path.
        """
        self.directory = Path(directory).absolute()
        self.directory.mkdir(parents=True, exist_ok=True)
        self.pinned: set[int] = set()
        # Orbax's own asynchronous mode makes the caller wait for the copy to the host and for 10 to 20 ms of set-up.
        # Here all of that, and the digests, are the work of one thread of ours.
        if "\\" in str(self.directory):
            raise OSError(f"TensorStore finds nothing again under a path with a backslash: {self.directory}")
        # Orbax's layout of few files, OCDBT, is the quicker one: a save and the removal of an old one take 10 ms less.
        # But where the path has a `[` it loses all parts, without a word; there each leaf gets a folder.
        is_plain = glob.escape(str(self.directory)) == str(self.directory)
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_ocdbt=is_plain),
                "manifest": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                enable_async_checkpointing=False, preservation_policy=_NewestAndPinned(self, keep)
            ),
        )
        self._digests: dict[int, str | None] = dict.fromkeys(self._manager.all_steps())
        self._executor = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="checkpoint", initializer=_yield_to_others
        )
        self._pending: Future[None] | None = None
        self._pending_step: int | None = None
        self._results: queue.SimpleQueue[Saved | SaveFailed] = queue.SimpleQueue()
        self._last_failure: SaveFailed | None = None

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
        if step in self._digests or (self.is_saving and self._pending_step == step):
            return
        self.wait()
        self._pending_step = step
        self._pending = self._executor.submit(self._write, step, _copy(tree), dict(about or {}), valid)

    def save_and_wait(
        self, step: int, tree: Any, *, about: Mapping[str, Any] | None = None, valid: bool | jax.Array = True
    ) -> str:
        """Save a tree, unless this step is saved already, and return its SHA-256 when it is committed.

        Raises:
            SaveFailed: it could not be written.
        """
        self.wait()
        self.save(step, tree, about=about, valid=valid)
        self.wait()
        if step not in self._digests:
            assert self._last_failure is not None
            raise self._last_failure
        return self.sha256(step)

    def results(self) -> list[Saved | SaveFailed]:
        """Return how the saves went that ended since the last call."""
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
        self._executor.shutdown(wait=True)
        self._manager.close()

    def sha256(self, step: int) -> str:
        """Return the SHA-256 of a committed checkpoint, as its manifest has it."""
        digest = self._digests[step]
        if digest is None:
            digest = self._digests[step] = str(self._read_manifest(step)["sha256"])
        return digest

    def restore(self, like: Any) -> Restored | None:
        """Return the newest checkpoint that is good, or None where there is no checkpoint.

        Newer ones that cannot be read, or whose digests are not those of their manifest, are then moved into
        `quarantine/`. Where none is good, all stay where they are, so that each start says so again.

        Args:
            like: a tree of arrays or of `jax.ShapeDtypeStruct`; the result has its structure and its shardings.

        Raises:
            Mismatch: a checkpoint is whole, but of a tree with other names, shapes or types, or of another format.
            NoReadableCheckpoint: there are checkpoints, and none is good.
        """
        bad: dict[int, str] = {}
        for step in reversed(self.steps):
            try:
                manifest = self._read_manifest(step)
                _check_like(step, manifest["leaves"], like)
                leaves = self._read_leaves(step, manifest)
            except (Mismatch, MemoryError, PermissionError):  # It may be good all the same.
                raise
            except Exception as error:  # Whatever Orbax, TensorStore or JSON make of damaged files.
                bad[step] = f"step {step}: {error}"
                continue
            for damaged in bad:
                self._quarantine(damaged)
            self._digests[step] = manifest["sha256"]
            return Restored(step, _place(leaves, like), manifest, tuple(bad.values()))
        if bad:
            raise NoReadableCheckpoint(
                f"none of the checkpoints in {self.directory} is good, so there is nothing to carry on from:\n  "
                + "\n  ".join(bad.values())
                + "\nBring one back from a copy, or begin anew in another directory. Nothing was moved or deleted."
            )
        return None

    def _write(self, step: int, tree: Any, about: Mapping[str, Any], valid: bool | jax.Array) -> None:
        """Write one checkpoint, in the background thread."""
        started = time.monotonic()
        try:
            if not valid:
                raise InvalidState(step, "its values are not finite")
            leaves = {name: np.asarray(_raw(leaf)) for name, leaf in _named_leaves(tree).items()}
            manifest = _manifest(step, leaves, about)
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(leaves), manifest=ocp.args.JsonSave(manifest)),
                force=True,
            )
            known = {**self._digests, step: manifest["sha256"]}
            self._digests = {kept: known[kept] for kept in self._manager.all_steps()}
        except Exception as error:
            failure = error if isinstance(error, SaveFailed) else SaveFailed(step, f"{type(error).__name__}: {error}")
            self._last_failure = failure
            self._results.put(failure)
        else:
            self._results.put(Saved(step, manifest["sha256"], manifest, time.monotonic() - started))

    def _read_manifest(self, step: int) -> dict[str, Any]:
        manifest = self._manager.restore(step, args=ocp.args.Composite(manifest=ocp.args.JsonRestore())).manifest
        if manifest["format"] != FORMAT:
            raise Mismatch(
                f"the checkpoint of step {step} has format {manifest['format']}; this program reads {FORMAT}"
            )
        return manifest

    def _read_leaves(self, step: int, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in manifest["leaves"]}
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(item=dict.fromkeys(as_numpy, 0), restore_args=as_numpy)
            ),
        )
        leaves = restored.state
        found = _manifest(step, leaves, {})
        for name, wanted in manifest["leaves"].items():
            if found["leaves"][name] != wanted:
                raise CheckpointError(f"leaf {name} is {found['leaves'][name]}, and was saved as {wanted}")
        if found["sha256"] != manifest["sha256"]:
            raise CheckpointError("the manifest contradicts itself")
        return leaves

    def _quarantine(self, step: int) -> None:
        """Move a checkpoint out of the way; nothing that could not be read is deleted."""
        shelter = self.directory / "quarantine"
        shelter.mkdir(exist_ok=True)
        refuge = next(path for number in count() if not (path := shelter / f"{step}-{number}").exists())
        (self.directory / str(step)).rename(refuge)
        del self._digests[step]
        self._manager.reload()


def _yield_to_others() -> None:
    """Have this thread, and those that it starts, run where training leaves a core idle.

    On Linux priorities are of threads. On 2 cores a save every second cost 4 % of the training time without this, and
    under 1 % with it.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


class _NewestAndPinned:
    """Orbax's question which checkpoints to keep, answered: the newest `keep`, and the pinned ones."""

    def __init__(self, store: CheckpointStore, keep: int) -> None:
        self._store = store
        self._newest = ocp.checkpoint_managers.LatestN(keep)

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        newest = self._newest.should_preserve(checkpoints, context=context)
        return [new or info.step in self._store.pinned for new, info in zip(newest, checkpoints, strict=True)]


@jax.jit
def _copy(tree: Any) -> Any:
    """Return new buffers with the same values: the old ones may then be donated while a save reads these."""
    return jax.tree.map(jnp.copy, tree)


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by the names of their paths, such as `params.conv1.kernel`."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _raw(leaf: Any) -> Any:
    """Return a leaf, and of a typed random key its numbers."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _manifest(step: int, leaves: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a checkpoint: shape, type and SHA-256 of each leaf, and the SHA-256 of that whole table."""
    table = {
        name: {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "sha256": hashlib.sha256(leaf.tobytes()).hexdigest(),
        }
        for name, leaf in sorted(leaves.items())
    }
    whole = hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()
    return {"format": FORMAT, "step": step, "sha256": whole, "leaves": table, "about": dict(about)}


def _check_like(step: int, table: Mapping[str, Mapping[str, Any]], like: Any) -> None:
    """Raise Mismatch unless a manifest's leaves have the names, shapes and types of the tree that is expected."""
    raw = jax.eval_shape(lambda tree: jax.tree.map(_raw, tree), like)
    expected = {name: f"{list(leaf.shape)} {leaf.dtype}" for name, leaf in _named_leaves(raw).items()}
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
            kind = jax.random.key_impl(jnp.empty((), wanted.dtype))
            leaf = jax.random.wrap_key_data(leaf, impl=kind)
        return jax.device_put(leaf, wanted.sharding)

    return jax.tree_util.tree_map_with_path(place, like)
