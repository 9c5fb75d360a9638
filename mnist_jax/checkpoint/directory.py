"""The directory of the checkpoints: which are committed, leftovers, quarantine, free space."""

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Collection
from itertools import chain, count
from pathlib import Path
from typing import NamedTuple

from mnist_jax.checkpoint import integrity
from mnist_jax.checkpoint.checkpoint import Checkpoint, list_checkpoints
from mnist_jax.checkpoint.integrity import CorruptCheckpointError, SaveError
from mnist_jax.checkpoint.orbax_io import UNFINISHED, brief

QUARANTINE = "quarantine"
REMOVED = "removed"  # Checkpoints and leftovers are renamed into this directory before they are deleted.
SPARE_CHECKPOINTS = 10  # Below this number of checkpoints that fit on the disk, a warning is given.
# Kills leave `UNFINISHED`; those of earlier versions left `.unfinished` and `.ready`.
_LEFTOVER = re.compile(rf"[0-9]+\.(unfinished|ready)|[0-9]+{re.escape(UNFINISHED)}.*")


class StorageWarning(NamedTuple):
    """A problem that fails no save: `event` is low_space, checkpoints_vanished or removal_failed."""

    event: str
    text: str

    def __str__(self) -> str:
        """Return the text."""
        return self.text


class CheckpointDirectory:
    """The directory of the checkpoints of a run. `committed` holds their steps as of the last `refresh`."""

    def __init__(self, path: Path, warn: Callable[[StorageWarning], None]) -> None:
        """Open the directory; create it if needed."""
        self.path = path
        self._warn = warn
        self._warned: set[str] = set()
        path.mkdir(parents=True, exist_ok=True)
        # The descriptor stays open, so that no other directory can get the same inode.
        self._parent = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        self.refresh()

    def close(self) -> None:
        """Close the directory."""
        os.close(self._parent)

    def refresh(self) -> None:
        """Update `committed` from the disk."""
        self.committed = {checkpoint.step for checkpoint in list_checkpoints(self.path)}

    def checkpoint(self, step: int) -> Checkpoint:
        """Return the checkpoint of a step."""
        return Checkpoint(self.path / str(step))

    def clean(self) -> tuple[str, ...]:
        """Remove leftovers, return their names, and fsync the directory and its parents."""
        removed = self.remove_leftovers()
        for path in (self.path, *self.path.parents):
            with contextlib.suppress(PermissionError):
                integrity.fsync_path(path)
        return removed

    def check(self, step: int) -> None:
        """Check that the directory still belongs to this run; create it again if it was removed.

        Raises:
            SaveError: its parent was moved or removed. Nothing is written to what replaced it.
        """
        parent = self.path.parent
        if not parent.exists() or not os.path.samestat(os.fstat(self._parent), parent.stat()):
            self.committed = set()
            raise SaveError(step, f"{parent} was moved or removed" + ", and replaced" * parent.exists())
        if not self.path.exists():
            self.path.mkdir()
            integrity.fsync_path(parent)
        before = self.committed
        # This run did not write whatever else is there.
        self.committed = before & {checkpoint.step for checkpoint in list_checkpoints(self.path)}
        if vanished := sorted(before - self.committed):
            text = f"the checkpoints of these steps are gone from {self.path}: {', '.join(map(str, vanished))}"
            self._warn(StorageWarning("checkpoints_vanished", text))

    def make_room(self, step: int, needed: int) -> None:
        """Move aside what has the name of the step to be written, and warn if the disk is nearly full.

        Args:
            step: the step to be written.
            needed: the size of its checkpoint in bytes.
        """
        if os.path.lexists(self.path / str(step)):
            self.quarantine(CorruptCheckpointError(step, "not-committed", "another process wrote it"))
        self.remove_leftovers()
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(self.path).free
            if free >= SPARE_CHECKPOINTS * needed:
                self._warned.discard("low_space")
                return
            text = (
                f"only {free / 1e6:,.1f} MB are free in {self.path}, and a checkpoint takes {needed / 1e6:,.1f} MB; "
                "free some space, or saves will fail"
            )
            self._warn_once("low_space", text)

    def remove_old(self, keep: Collection[int]) -> None:
        """Remove the committed checkpoints whose steps are not in `keep`."""
        self._remove([self.path / str(old) for old in sorted(self.committed - set(keep))])
        self.refresh()

    def remove_leftovers(self) -> tuple[str, ...]:
        """Remove what unfinished saves and removals left, and return the names."""
        removed = self.path / REMOVED
        found = [path for path in self.path.iterdir() if _LEFTOVER.fullmatch(path.name)]
        found += removed.iterdir() if removed.is_dir() and not removed.is_symlink() else ()
        return tuple(sorted(self._remove(found)))

    def _remove(self, paths: Collection[Path]) -> list[str]:
        """Remove files and directories, and return the names of those that are gone.

        Each is renamed first. A kill then leaves no incomplete checkpoint under its name, and what cannot be removed,
        such as a busy file on NFS, does not block its name.
        """
        removed, gone = self.path / REMOVED, []
        if removed.is_symlink():
            removed.unlink()
        for path in paths:
            try:
                moved = path
                if path.parent != removed:
                    removed.mkdir(exist_ok=True)
                    moved = _unused(removed / path.name)
                    path.rename(moved)
                integrity.remove(moved)
                gone.append(path.relative_to(self.path).as_posix())
            except FileNotFoundError:
                continue
            except OSError as error:
                self._warn_once("removal_failed", f"{path} could not be removed: {brief(error)}")
        with contextlib.suppress(OSError):
            removed.rmdir()
        return gone

    def quarantine(self, corrupt: CorruptCheckpointError) -> Path:
        """Move a checkpoint to `quarantine/<step>-<kind>` and return the path. It is never deleted."""
        directory = self.path / QUARANTINE
        directory.mkdir(exist_ok=True)
        moved = _unused(directory / f"{corrupt.step}-{corrupt.kind}")
        (self.path / str(corrupt.step)).rename(moved)
        self.committed = self.committed - {corrupt.step}
        return moved

    def _warn_once(self, event: str, text: str) -> None:
        if event not in self._warned:
            self._warned.add(event)
            self._warn(StorageWarning(event, text))


def _unused(path: Path) -> Path:
    """Return a path that does not exist: this one, or with `-2`, `-3` and so on."""
    names = chain([path], (path.with_name(f"{path.name}-{number}") for number in count(2)))
    return next(name for name in names if not os.path.lexists(name))
