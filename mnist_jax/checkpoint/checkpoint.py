"""Read one checkpoint: its manifest, its metadata, its state. Every byte is verified before it is used.

A checkpoint may come from anywhere. Nothing in it is executed, and no link in it is followed.
"""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_jax.checkpoint import integrity, orbax_io
from mnist_jax.checkpoint.integrity import (
    STEP,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    Json,
    ReadError,
)

# These errors are about the bytes on the disk. Any other OSError may not occur at the next attempt.
_CORRUPTION = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. Read-only; safe while its run trains. Only `read` uses devices."""

    path: Path

    @property
    def step(self) -> int:
        """The step of its state."""
        return int(self.path.name)

    @property
    def bytes(self) -> int:
        """The total size of its files."""
        return sum(path.lstat().st_size for path in integrity.regular_files(self.path).values())

    def manifest(self) -> Json:
        """Return the manifest: format, step, state_sha256, leaves, files.

        Raises:
            CorruptCheckpointError: it is missing or was changed.
            IncompatibleCheckpointError: it has another format.
            ReadError: it cannot be read now.
        """
        if self.path.is_symlink():
            raise CorruptCheckpointError(self.step, "symbolic-link", f"{self.path} is a symbolic link")
        with self._reading("bad-manifest", integrity.MANIFEST):
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
        """Return the metadata that the caller of `save` passed, as JSON values.

        Raises:
            CorruptCheckpointError, IncompatibleCheckpointError, ReadError: as `manifest`.
        """
        return self._json(orbax_io.METADATA, self.manifest())

    def verify(self) -> Json:
        """Return the manifest, after comparing all files with their digests.

        Raises:
            CorruptCheckpointError: a file is missing or changed.
            IncompatibleCheckpointError, ReadError: as `manifest`.
        """
        manifest = self.manifest()
        with self._reading("unreadable-file", "a file"):
            paths = integrity.regular_files(self.path)
            for name, expected in manifest["files"].items():
                if name not in paths:
                    raise CorruptCheckpointError(self.step, "missing-file", f"file {name} is missing")
                size = paths[name].stat().st_size  # A file that grew may be huge, so compare the size first.
                found = {"bytes": size} if size != expected["bytes"] else integrity.describe_file(paths[name])
                if found != expected:
                    detail = f"file {name} is {found}, and was {expected}"
                    raise CorruptCheckpointError(self.step, "changed-file", detail)
        return manifest

    def read(self, like: Any, *, partial: bool = False) -> tuple[Any, Json]:
        """Return the state and its metadata, after verifying all files and the restored leaves.

        With several processes each reads on its own and waits for no other.

        Args:
            like: a tree of arrays, numbers and `jax.ShapeDtypeStruct`; the result has its structure, types and
                shardings. An abstract leaf without a sharding is put on the first device.
            partial: whether `like` may lack leaves, such as `{"params": ...}`.

        Raises:
            CorruptCheckpointError: a file or a leaf is not what was saved.
            IncompatibleCheckpointError: the leaves have other names, shapes or types, or the format is another.
            ReadError: it cannot be read now.
        """
        manifest = self.verify()
        saved = self._chunk_digests(manifest)
        expected = integrity.named_leaves(like)
        leaves = {name: row for name, row in manifest["leaves"].items() if not partial or name in expected}
        if difference := integrity.difference_of(leaves, expected):
            raise IncompatibleCheckpointError(f"the checkpoint of step {self.step} holds another tree: {difference}")
        try:
            restored = orbax_io.restore_state(self.path / "state", like)
        except Exception as error:  # The files are those that were saved, so the checkpoint is not known to be corrupt.
            raise ReadError(self.step, orbax_io.brief(error)) from error
        with self._reading("changed-leaf", "the state"):
            for name, row in integrity.hash_shards(restored).items():
                found = integrity.known_digests([row])
                is_same_layout = all(row[field] == saved[name][field] for field in ("raw_shape", "itemsize", "counts"))
                if not is_same_layout or any(saved[name]["chunks"][number] != found[number] for number in found):
                    detail = f"leaf {name} has other values than were saved"
                    raise CorruptCheckpointError(self.step, "changed-leaf", detail)
        return restored, self._json(orbax_io.METADATA, manifest)

    def _chunk_digests(self, manifest: Json) -> dict[str, Json]:
        """Return the digests of the chunks of each leaf, as computed by the processes that saved them."""
        parts = [self._json(name, manifest) for name in manifest["files"] if orbax_io.HASHES.fullmatch(name)]
        with self._reading("bad-hashes", "the hashes of the leaves"):
            chunks = integrity.combine(part["leaves"] for part in parts)
            if integrity.leaf_table(chunks) != manifest["leaves"]:
                raise ValueError("they belong to other leaves")
        return chunks

    def _json(self, name: str, manifest: Json) -> Any:
        """Return the JSON values in a file, after comparing it with its digest."""
        with self._reading("changed-file", name):
            path = integrity.regular_files(self.path).get(name)  # A link leads elsewhere; opening a pipe would block.
            if path is None or name not in manifest["files"]:
                raise CorruptCheckpointError(self.step, "missing-file", f"file {name} is missing")
            if path.stat().st_size > integrity.MAX_MANIFEST_BYTES:
                raise ValueError(f"it has more than {integrity.MAX_MANIFEST_BYTES} bytes")
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != manifest["files"][name]["sha256"]:
                raise ValueError("its SHA-256 differs from the manifest")
            return json.loads(content)

    @contextlib.contextmanager
    def _reading(self, kind: str, what: str) -> Iterator[None]:
        """Turn errors in reading `what` into CorruptCheckpointError or, if a resource is short, into ReadError."""
        try:
            yield
        except MemoryError as error:
            raise ReadError(self.step, orbax_io.brief(error)) from error
        except OSError as error:
            if error.errno not in _CORRUPTION:
                raise ReadError(self.step, orbax_io.brief(error)) from error
            name = os.path.relpath(error.filename, self.path) if error.filename else what
            raise CorruptCheckpointError(self.step, kind, f"{name} cannot be read ({error.strerror})") from error
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise CorruptCheckpointError(self.step, kind, f"{what} is invalid: {error}") from error


def list_checkpoints(directory: Path) -> list[Checkpoint]:
    """Return the committed checkpoints in a directory, oldest first."""
    if not directory.is_dir():
        return []
    found = [Checkpoint(path) for path in directory.iterdir() if STEP.fullmatch(path.name)]
    return sorted(found, key=lambda checkpoint: checkpoint.step)
