"""A remote copy of a run in an object store, for machines whose disk is lost with them.

A run directory needs a file system with renames and locks. A bucket has neither, but it outlives the machine. It holds
copies of the files, under the same names:

    config.json, metrics.jsonl …     the small files that the caller names
    checkpoints/120/state/…, run/…   the files that the manifest of a checkpoint lists
    checkpoints/120/manifest.json    written last and deleted first: it commits the copy

An interrupted upload leaves committed copies intact. Its incomplete files never count, and the next upload removes
them. The store must be consistent (a read returns the last write), as S3, Google Cloud Storage and Azure are, and have
one writer at a time.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from mnist_jax.checkpoint.checkpoint import list_checkpoints
from mnist_jax.checkpoint.integrity import MAX_MANIFEST_BYTES, STEP, fsync_path, fsync_tree, remove
from mnist_jax.checkpoint.object_store import InvalidFileError, ObjectStore, RemoteError, is_plain, one_line
from mnist_jax.checkpoint.orbax_io import UNFINISHED

MAX_SMALL_FILE_BYTES = 2**30
MAX_FILE_BYTES = 2**32  # Files are read into memory, `object_store.CONCURRENCY` at a time.

Table = dict[str, tuple[int, str]]  # size and SHA-256 of the files of a checkpoint, by name


class Uploaded(NamedTuple):
    """A committed copy."""

    step: int
    seconds: float


class Downloaded(NamedTuple):
    """The downloaded steps, oldest first, and why others were refused."""

    steps: list[int]
    refused: dict[int, str]


class RemoteStore:
    """The remote copy of one run, under one URL. Its methods raise RemoteError if the store does not answer.

        remote = RemoteStore("s3://bucket/runs/mnist")
        remote.download(run, files=["metrics.jsonl"])
        ...
        remote.begin_upload(run, step, keep=checkpointer.steps, files=["metrics.jsonl"])  # returns at once
        ...
        remote.wait(20.0)

    Credentials are found where the tools of each service find them: `AWS_ACCESS_KEY_ID` and so on, `~/.aws`,
    `GOOGLE_APPLICATION_CREDENTIALS`, the role of the machine. `AWS_ENDPOINT_URL` names another server with S3's API.
    """

    def __init__(self, url: str, *, timeout_s: float = 20.0) -> None:
        """Check the URL; nothing is opened yet.

        Args:
            url: `s3://bucket/path`, `gs://bucket/path`, `az://container/path` or `file:///path`.
            timeout_s: how long the store may be silent.

        Raises:
            ValueError: the URL is none of these.
        """
        self.url = url
        self._store = ObjectStore(url, timeout_s)
        self.folder = self._store.folder  # of a file URL, None for others
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._uploads: list[tuple[int, Future[Uploaded]]] = []  # step and result of those that `results` did not return

    def newest_step(self) -> int | None:
        """Return the step of the newest committed copy, None if there is none."""
        with self._remote_errors("cannot be listed"):
            return max(_committed(_list_copies(self._store)), default=None)

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, None if it has no copy."""
        with self._remote_errors("cannot be read"):
            return self._store.read(name, MAX_SMALL_FILE_BYTES)

    def upload(self, run: Path, step: int, *, keep: Collection[int], files: Sequence[str]) -> Uploaded:
        """Upload the small files and then a checkpoint of a run, and return when the copy is committed.

        The small files must already contain what leads to this checkpoint. An identical copy is not written again.
        Incomplete copies of any step are removed.

        Args:
            run: the run directory.
            step: the step of the checkpoint.
            keep: steps whose copies stay. Other copies are deleted once this one is committed.
            files: names of small files in the run directory; missing ones are skipped.

        Raises:
            RemoteError: also if a newer copy exists, or the checkpoint is missing or corrupt.
        """
        started = time.monotonic()
        with self._remote_errors(f"the checkpoint of step {step} was not uploaded"):
            copies = _list_copies(self._store)
            if (newest := max(_committed(copies), default=step)) > step:
                raise InvalidFileError(f"the remote copy of step {newest} is newer")
            for name in files:
                if (content := _read(run / name, MAX_SMALL_FILE_BYTES)) is not None:
                    self._store.write(name, content)
            _upload_checkpoint(self._store, run / "checkpoints" / str(step), copies.pop(step, set()))
            kept = _committed(copies).intersection(keep)
            _delete(self._store, {step: names for step, names in copies.items() if step not in kept})
        return Uploaded(step, time.monotonic() - started)

    def begin_upload(self, run: Path, step: int, *, keep: Collection[int], files: Sequence[str]) -> None:
        """Start `upload` in the background. It replaces an upload that has not started.

        After one that runs it uploads the same step again: only small files that have changed since then take time.
        Call this and the next three from one thread.
        """
        for _, upload in self._uploads:
            upload.cancel()  # no effect on one that has started
        upload = self._background.submit(self.upload, run, step, keep=frozenset(keep), files=tuple(files))
        self._uploads.append((step, upload))

    def results(self) -> list[Uploaded | RemoteError]:
        """Return the results of the background uploads that ended since the last call."""
        ended = [upload for _, upload in self._uploads if upload.done()]
        self._uploads = [(step, upload) for step, upload in self._uploads if upload not in ended]
        return [self._result(upload) for upload in ended if not upload.cancelled()]

    def _result(self, upload: "Future[Uploaded]") -> Uploaded | RemoteError:
        error = upload.exception()
        if error is None or isinstance(error, RemoteError):
            return error or upload.result()
        return RemoteError(f"{self.url}: {type(error).__name__}: {one_line(error)}")

    @property
    def uploading_steps(self) -> set[int]:
        """The steps that background uploads read or will read; their checkpoints must stay."""
        return {step for step, upload in self._uploads if not upload.done()}

    def wait(self, timeout_s: float) -> bool:
        """Wait for the background uploads, and return whether all have ended. Signal handlers run meanwhile."""
        return not wait([upload for _, upload in self._uploads], timeout=timeout_s).not_done

    def download(self, run: Path, *, files: Sequence[str]) -> Downloaded:
        """Download the copies that are newer than all checkpoints of a run directory, and the small files.

        The newest is downloaded first. The small files are in place before any checkpoint is. The copies are untrusted:
        no name leads outside the run directory, sizes and SHA-256 are verified, no symbolic link is followed.

        Args:
            run: the run directory, created if missing.
            files: names of small files in it; those without a copy are skipped.

        Raises:
            RemoteError: also if no copy is valid and there is no checkpoint here, because the caller would start over.
        """
        checkpoints = run / "checkpoints"
        with self._remote_errors(f"the run cannot be downloaded into {run}"):
            if checkpoints.is_symlink():
                raise InvalidFileError(f"{checkpoints} is a symbolic link")
            copies = _list_copies(self._store)
            newest_here = max((found.step for found in list_checkpoints(checkpoints)), default=-1)
            newer = sorted((step for step in _committed(copies) if step > newest_here), reverse=True)
            refused: dict[int, str] = {}
            for step in newer:
                try:
                    _download_checkpoint(self._store, step, checkpoints)
                except (InvalidFileError, OSError) as error:
                    refused[step] = one_line(error)
            downloaded = sorted(set(newer) - set(refused))
            if refused and not downloaded and newest_here < 0:
                raise InvalidFileError("; ".join(f"step {step}: {refused[step]}" for step in sorted(refused)))
            if downloaded:
                _download_small_files(self._store, run, files)
            for step in downloaded:
                (checkpoints / f"{step}{UNFINISHED}").rename(checkpoints / str(step))
                fsync_path(checkpoints)
        return Downloaded(downloaded, refused)

    @contextlib.contextmanager
    def _remote_errors(self, what: str) -> Iterator[None]:
        """Raise RemoteError for invalid files and errors of the disk."""
        try:
            yield
        except (InvalidFileError, OSError) as error:
            raise RemoteError(f"{self.url}: {what}: {one_line(error)}") from None


# ---- Copies ---------------------------------------------------------------------------------------------------------

_COPIED_FILE = re.compile(rf"checkpoints/({STEP.pattern})/(manifest\.json|(state|run)/.+)")


def _list_copies(store: ObjectStore) -> dict[int, set[str]]:
    """Return the files of each copy, complete or not. Other names belong to others and are ignored."""
    copies: dict[int, set[str]] = {}
    for match in filter(None, map(_COPIED_FILE.fullmatch, store.list("checkpoints"))):
        if is_plain(match[2]):
            copies.setdefault(int(match[1]), set()).add(match[2])
    return copies


def _committed(copies: Mapping[int, Collection[str]]) -> set[int]:
    """Return the steps of the committed copies."""
    return {step for step, names in copies.items() if "manifest.json" in names}


def _upload_checkpoint(store: ObjectStore, checkpoint: Path, remote_files: set[str]) -> None:
    """Upload a checkpoint, its manifest last, unless an identical copy exists."""
    step, directory = int(checkpoint.name), f"checkpoints/{checkpoint.name}"
    manifest = _read(checkpoint / "manifest.json", MAX_MANIFEST_BYTES) or b""
    table = _parse_manifest(manifest)

    def read(name: str) -> bytes:
        return _verify(name, _read(checkpoint / name, table[name][0]), table[name])

    for name in table:  # A corrupt checkpoint must not replace a copy.
        read(name)
    is_complete = remote_files >= {*table, "manifest.json"}
    if not (is_complete and store.read(f"{directory}/manifest.json", MAX_MANIFEST_BYTES) == manifest):
        _delete(store, {step: remote_files & {"manifest.json"}})
        store.each(lambda name: store.write(f"{directory}/{name}", read(name)), table)
        store.write(f"{directory}/manifest.json", manifest)
    _delete(store, {step: remote_files - {*table, "manifest.json"}})


def _delete(store: ObjectStore, copies: Mapping[int, Collection[str]]) -> None:
    """Delete files of copies, manifests first."""
    names = [f"checkpoints/{step}/{name}" for step, names in copies.items() for name in names]
    for are_manifests in (True, False):
        store.each(store.delete, [name for name in names if name.endswith("/manifest.json") == are_manifests])


def _download_checkpoint(store: ObjectStore, step: int, checkpoints: Path) -> None:
    """Download a copy to a directory that does not count yet."""
    directory, unfinished = f"checkpoints/{step}", checkpoints / f"{step}{UNFINISHED}"
    manifest = store.read(f"{directory}/manifest.json", MAX_MANIFEST_BYTES) or b""
    table = _parse_manifest(manifest)

    def download(name: str) -> None:
        _write(unfinished / name, _verify(name, store.read(f"{directory}/{name}", table[name][0]), table[name]))

    remove(unfinished)
    try:
        unfinished.mkdir(parents=True)
        store.each(download, table)
        _write(unfinished / "manifest.json", manifest)
        fsync_tree(unfinished)
    except BaseException:
        remove(unfinished)
        raise


def _download_small_files(store: ObjectStore, run: Path, names: Sequence[str]) -> None:
    """Download the small files, each under its name when it is complete."""
    for name in names:
        content = store.read(name, MAX_SMALL_FILE_BYTES)
        if content is not None:
            partial = run / f"{name}.partial"
            remove(partial)
            _write(partial, content)
            fsync_path(partial)
            partial.replace(run / name)
    fsync_path(run)


def _parse_manifest(manifest: bytes) -> Table:
    """Return the table of files of a manifest."""
    try:
        rows = json.loads(manifest)["files"]
        table = {name: (row["bytes"], row["sha256"]) for name, row in rows.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InvalidFileError("manifest.json is missing or cannot be parsed") from None
    for name, (size, sha256) in table.items():
        if not (name.startswith(("state/", "run/")) and is_plain(name)):
            raise InvalidFileError(f"manifest.json lists {name[:200]!r}, which no checkpoint has")
        if not (type(size) is int and 0 <= size <= MAX_FILE_BYTES and isinstance(sha256, str)):
            raise InvalidFileError(f"manifest.json has an invalid size or SHA-256 of {name}")
    return table


def _verify(name: str, content: bytes | None, entry: tuple[int, str]) -> bytes:
    """Return the content of a file if it has the size and the SHA-256 of its manifest."""
    if content is None or (len(content), hashlib.sha256(content).hexdigest()) != entry:
        raise InvalidFileError(f"{name} is missing or corrupt")
    return content


def _read(path: Path, max_bytes: int) -> bytes | None:
    """Return the content of a local file, None if it does not exist. A symbolic link is not followed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidFileError(f"{path} is not a regular file")
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise InvalidFileError(f"{path} has more than {max_bytes:,} bytes")
    return content


def _write(path: Path, content: bytes) -> None:
    """Write a local file that does not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(content)
