"""A remote copy of a run in an object store, for machines whose disk is lost with them.

A run directory needs a file system with renames and locks. A bucket has neither, but it outlives the machine. It holds
copies of the files, under the same names:

    config.json, metrics.jsonl …     the small files that the caller names
    checkpoints/120/state/…, run/…   the files that the manifest of a checkpoint lists
    checkpoints/120/manifest.json    written last and deleted first: it commits the copy

An interrupted upload leaves committed copies intact. Its incomplete files never count, and the next upload removes
them. The store must be consistent (a read returns the last write), as S3 and Google Cloud Storage are, and have one
writer at a time.

This file needs only `checkpointer.py` and `integrity.py`.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import tensorstore as ts

from mnist_jax.checkpoint.checkpoint import list_checkpoints
from mnist_jax.checkpoint.integrity import MAX_MANIFEST_BYTES, STEP, fsync_path, fsync_tree, remove

MAX_SMALL_FILE_BYTES = 2**30
MAX_FILE_BYTES = 2**32  # A file is transferred in one request.
CONCURRENCY = 4  # requests in flight

# TensorStore retries for 15 minutes by default. Here each retry waits twice as long as the one before, all together at
# most half of the timeout, so that the user sees the reason and not only that time ran out.
TRIES = 4  # after the first one
MAX_FIRST_DELAY_S = 1.0

Table = dict[str, tuple[int, str]]  # size and SHA-256 of the files of a checkpoint, by name


class RemoteError(Exception):
    """The object store did not do what it was asked for, or the files to copy are not valid."""


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
            url: `s3://bucket/path`, `gs://bucket/path` or `file:///path`.
            timeout_s: how long to wait for each answer of the store.

        Raises:
            ValueError: the URL is none of these.
        """
        self.url, self.timeout_s = url, timeout_s
        self._spec = _spec(url, timeout_s)
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._uploads: list[tuple[int, Future[Uploaded]]] = []  # step and result of those that `results` did not return

    def newest_step(self) -> int | None:
        """Return the step of the newest committed copy, None if there is none."""
        with self._remote_errors("cannot be listed"):
            return max(_committed(self._open().copies()), default=None)

    def read(self, name: str, max_bytes: int = MAX_SMALL_FILE_BYTES) -> bytes | None:
        """Return the content of a small file, None if it has no copy."""
        with self._remote_errors("cannot be read"):
            return self._open().read(name, max_bytes)

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
            bucket = self._open()
            copies = bucket.copies()
            if (newest := max(_committed(copies), default=step)) > step:
                raise _InvalidError(f"the remote copy of step {newest} is newer")
            small_files = ((name, _read(run / name, MAX_SMALL_FILE_BYTES)) for name in files)
            bucket.write((name, content) for name, content in small_files if content is not None)
            _upload_checkpoint(bucket, run / "checkpoints" / str(step), copies.pop(step, set()))
            kept = _committed(copies).intersection(keep)
            bucket.delete(
                [f"checkpoints/{old}/{name}" for old, names in copies.items() if old not in kept for name in names]
            )
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
        return RemoteError(f"{self.url}: {type(error).__name__}: {_one_line(error)}")

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
                raise _InvalidError(f"{checkpoints} is a symbolic link")
            bucket = self._open()
            copies = bucket.copies()
            newest_here = max((found.step for found in list_checkpoints(checkpoints)), default=-1)
            newer = sorted((step for step in _committed(copies) if step > newest_here), reverse=True)
            refused: dict[int, str] = {}
            for step in newer:
                try:
                    _download_checkpoint(bucket, step, checkpoints)
                except (_InvalidError, OSError) as error:
                    refused[step] = _one_line(error)
            downloaded = sorted(set(newer) - set(refused))
            if refused and not downloaded and newest_here < 0:
                raise _InvalidError("; ".join(f"step {step}: {refused[step]}" for step in sorted(refused)))
            if downloaded:
                _download_small_files(bucket, run, files)
            for step in downloaded:
                (checkpoints / f"{step}.unfinished").rename(checkpoints / str(step))
                fsync_path(checkpoints)
        return Downloaded(downloaded, refused)

    def _open(self) -> "_Bucket":
        """Open the store for one operation.

        Requests that a silent server never answers stay in TensorStore's queue. In a store that stays open,
        `CONCURRENCY` of them would block all later ones.
        """
        return _Bucket(self.url, self._spec, self.timeout_s)

    @contextlib.contextmanager
    def _remote_errors(self, what: str) -> Iterator[None]:
        """Raise RemoteError for invalid files and errors of the disk."""
        try:
            yield
        except (_InvalidError, OSError) as error:
            raise RemoteError(f"{self.url}: {what}: {_one_line(error)}") from None


class _InvalidError(Exception):
    """A file, a checkpoint or a copy is missing or not valid."""


# ---- The object store -----------------------------------------------------------------------------------------------


_COPIED_FILE = re.compile(rf"checkpoints/({STEP.pattern})/(manifest\.json|(state|run)/.+)")
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")


def _spec(url: str, timeout_s: float) -> dict[str, Any]:
    """Return the specification of a store for TensorStore. Raises ValueError if the URL is not supported."""
    try:
        parts = urlsplit(url)
        if "@" in parts.netloc or "?" in url or "#" in url or not url.isprintable():
            raise ValueError("only a bucket and a path are allowed")
        if parts.scheme not in ("s3", "gs", "file"):
            raise ValueError("unknown scheme")
        spec = ts.KvStore.Spec(url).to_json()
    except ValueError as error:
        shown = re.sub(r"//[^/]*@", "//", re.split(r"[?#]", url)[0])  # The rest may be a password.
        reason = str(error).rsplit('": ')[-1]
        raise ValueError(
            f"{shown!r} cannot hold a remote copy: {reason}; use s3://bucket/path, gs://bucket/path or file:///path"
        ) from None
    if spec.get("path"):
        spec["path"] = spec["path"].rstrip("/") + "/"
    driver = spec["driver"]
    if driver == "file":
        return spec
    first_delay_ms = int(1000 * min(MAX_FIRST_DELAY_S, timeout_s / 2 ** (TRIES + 1)))
    spec[f"{driver}_request_concurrency"] = {"limit": CONCURRENCY}
    spec[f"{driver}_request_retries"] = {
        "max_retries": TRIES,
        "initial_delay": f"{first_delay_ms}ms",
        "max_delay": f"{first_delay_ms * 2**TRIES}ms",
    }
    if driver == "s3":
        variable = os.environ.get
        if endpoint := variable("AWS_ENDPOINT_URL_S3") or variable("AWS_ENDPOINT_URL"):
            spec["endpoint"] = endpoint.rstrip("/")
            # Amazon's own servers know the region of a bucket.
            if region := variable("AWS_REGION") or variable("AWS_DEFAULT_REGION"):
                spec["aws_region"] = region
        if variable("AWS_ACCESS_KEY_ID") and variable("AWS_SECRET_ACCESS_KEY"):
            # The default chain finds the same, and first prints on standard error which files do not exist.
            spec["aws_credentials"] = {"type": "environment"}
    return spec


class _Bucket:
    """The open store. Every method may raise RemoteError, and _InvalidError for a file that is not as it should be."""

    def __init__(self, url: str, spec: Mapping[str, Any], timeout_s: float) -> None:
        self._url, self._timeout_s = url, timeout_s
        self._store = self._result("cannot be opened", ts.KvStore.open(dict(spec)))

    def copies(self) -> dict[int, set[str]]:
        """Return the files of each copy, complete or not. Other names belong to others and are ignored."""
        checkpoints = ts.KvStore.KeyRange("checkpoints/", "checkpoints0")
        copies: dict[int, set[str]] = {}
        for key in self._result("cannot be listed", self._store.list(checkpoints)):
            match = _COPIED_FILE.fullmatch(key.decode(errors="replace"))
            if match and _is_plain(match[2]):
                copies.setdefault(int(match[1]), set()).add(match[2])
        return copies

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Return the content of a file, None if it does not exist."""
        what = f"{name} cannot be read"
        is_larger = False
        with contextlib.suppress(RemoteError, _InvalidError):  # A read beyond the end of a file is an error.
            beyond = self._store.read(name, byte_range=slice(max_bytes, max_bytes + 1))
            is_larger = bool(self._result(what, beyond).value)
        if is_larger:
            raise _InvalidError(f"{name} has more than {max_bytes:,} bytes")
        result = self._result(what, self._store.read(name))
        return None if result.state == "missing" else result.value

    def read_all(self, directory: str, table: Table) -> Iterator[tuple[str, bytes]]:
        """Return names and contents of files, no more of each than its size."""
        reads = (
            (name, self._store.read(f"{directory}/{name}", byte_range=slice(0, size)))
            for name, (size, _) in table.items()
        )
        for name, result in self._in_order("cannot be read", reads):
            yield name, result.value

    def write(self, contents: Iterable[tuple[str, bytes | None]]) -> None:
        """Write files, or delete those whose content is None. A few at a time are in memory."""
        writes = ((name, self._store.write(name, content)) for name, content in contents)
        for _ in self._in_order("cannot be written", writes):
            pass

    def delete(self, names: Collection[str]) -> None:
        """Delete files that exist, manifests first."""
        for are_manifests in (True, False):
            self.write((name, None) for name in names if name.endswith("/manifest.json") == are_manifests)

    def _in_order(self, what: str, requests: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Return names and results of requests, with `CONCURRENCY` of them in flight."""
        in_flight: deque[tuple[str, Any]] = deque()
        try:
            for request in requests:
                in_flight.append(request)
                if len(in_flight) == CONCURRENCY:
                    name, future = in_flight.popleft()
                    yield name, self._result(f"{name} {what}", future)
            while in_flight:
                name, future = in_flight.popleft()
                yield name, self._result(f"{name} {what}", future)
        finally:
            for _, future in in_flight:
                future.cancel()

    def _result(self, what: str, future: Any) -> Any:
        """Return the result of a request if it comes in time."""
        try:
            return future.result(timeout=self._timeout_s)
        except TimeoutError:
            future.cancel()
            reason = f"no answer in {self._timeout_s:g} s"
        except Exception as error:  # TensorStore documents no set of exceptions.
            reason = _one_line(error)
        if reason.startswith("OUT_OF_RANGE"):  # The file is shorter than the manifest says.
            raise _InvalidError(f"{what}: {reason}")
        if reason.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")):
            reason += "; check the credentials and their permissions"
        raise RemoteError(f"{self._url}: {what}: {reason}")


def _committed(copies: Mapping[int, Collection[str]]) -> set[int]:
    """Return the steps of the committed copies."""
    return {step for step, names in copies.items() if "manifest.json" in names}


# ---- Copies ---------------------------------------------------------------------------------------------------------


def _upload_checkpoint(bucket: _Bucket, checkpoint: Path, remote_files: set[str]) -> None:
    """Upload a checkpoint, its manifest last, unless an identical copy exists."""
    directory = f"checkpoints/{checkpoint.name}"
    manifest = _read(checkpoint / "manifest.json", MAX_MANIFEST_BYTES)
    table = _parse_manifest(manifest)
    for name, entry in table.items():  # A corrupt checkpoint must not replace a copy.
        _verify(name, _read(checkpoint / name, entry[0]), entry)
    is_complete = remote_files >= {*table, "manifest.json"}
    if not (is_complete and bucket.read(f"{directory}/manifest.json", MAX_MANIFEST_BYTES) == manifest):
        bucket.delete([f"{directory}/{name}" for name in remote_files & {"manifest.json"}])
        bucket.write(
            (f"{directory}/{name}", _verify(name, _read(checkpoint / name, entry[0]), entry))
            for name, entry in table.items()
        )
        bucket.write([(f"{directory}/manifest.json", manifest)])
    bucket.delete([f"{directory}/{name}" for name in remote_files - {*table, "manifest.json"}])


def _download_checkpoint(bucket: _Bucket, step: int, checkpoints: Path) -> None:
    """Download a copy to the directory `<step>.unfinished`."""
    directory, unfinished = f"checkpoints/{step}", checkpoints / f"{step}.unfinished"
    manifest = bucket.read(f"{directory}/manifest.json", MAX_MANIFEST_BYTES)
    table = _parse_manifest(manifest)
    remove(unfinished)
    try:
        unfinished.mkdir(parents=True)
        for name, content in bucket.read_all(directory, table):
            _write(unfinished / name, _verify(name, content, table[name]))
        _write(unfinished / "manifest.json", manifest or b"")
        fsync_tree(unfinished)
    except BaseException:
        remove(unfinished)
        raise


def _download_small_files(bucket: _Bucket, run: Path, names: Sequence[str]) -> None:
    """Download the small files, each under its name when it is complete."""
    for name in names:
        content = bucket.read(name, MAX_SMALL_FILE_BYTES)
        if content is not None:
            partial = run / f"{name}.partial"
            remove(partial)
            _write(partial, content)
            fsync_path(partial)
            partial.replace(run / name)
    fsync_path(run)


def _parse_manifest(manifest: bytes | None) -> Table:
    """Return the table of files of a manifest."""
    try:
        rows = json.loads(manifest or b"")["files"]
        table = {name: (row["bytes"], row["sha256"]) for name, row in rows.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _InvalidError("manifest.json is missing or cannot be parsed") from None
    for name, (size, sha256) in table.items():
        if not (name.startswith(("state/", "run/")) and _is_plain(name)):
            raise _InvalidError(f"manifest.json lists {name[:200]!r}, which no checkpoint has")
        if not (type(size) is int and 0 <= size <= MAX_FILE_BYTES and isinstance(sha256, str)):
            raise _InvalidError(f"manifest.json has an invalid size or SHA-256 of {name}")
    return table


def _verify(name: str, content: bytes | None, entry: tuple[int, str]) -> bytes:
    """Return the content of a file if it has the size and the SHA-256 of its manifest."""
    if content is None or (len(content), hashlib.sha256(content).hexdigest()) != entry:
        raise _InvalidError(f"{name} is missing or corrupt")
    return content


def _is_plain(name: str) -> bool:
    """Return whether a name with slashes stays inside the directory that it is relative to."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _read(path: Path, max_bytes: int) -> bytes | None:
    """Return the content of a local file, None if it does not exist. A symbolic link is not followed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _InvalidError(f"{path} is not a regular file")
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise _InvalidError(f"{path} has more than {max_bytes:,} bytes")
    return content


def _write(path: Path, content: bytes) -> None:
    """Write a local file that does not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(content)


def _one_line(error: object) -> str:
    """Return an error message in one line, without secrets and without the details that TensorStore appends."""
    text = re.split(r" \[[\w-]+='", " ".join(str(error).split()))[0]
    for secret in filter(None, map(os.environ.get, _SECRETS)):
        text = text.replace(secret, "(secret)")
    text = re.sub(r"//[^/@\s]*@", "//", text)
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:1000]
