"""A copy of a run in an object store, for machines whose disk goes when they go.

A run directory needs a file system that renames and locks. A bucket does neither, but it outlives the machine. So it
holds copies, under the names of the originals:

    config.json, metrics.jsonl …     the small files that the caller names
    checkpoints/120/state/…, run/…   the files of a checkpoint, those that its manifest lists
    checkpoints/120/manifest.json    written last and deleted first: a copy counts while this is there

What breaks off leaves copies that are whole, and remains that never count and that a later push removes. The store
must show what was written to whoever asks next, as S3 and Google Cloud Storage do, and have one writer at a time.

This file stands alone but for `checkpoint.py`.
"""

import contextlib
import hashlib
import json
import os
import queue
import re
import shutil
import stat
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import tensorstore as ts

from mnist_jax.checkpoint.checkpoint import list_checkpoints
from mnist_jax.checkpoint.integrity import MAX_MANIFEST_BYTES, STEP, fsync_path, fsync_tree, regular_files, remove

MAX_SMALL_FILE_BYTES = 2**30
PIECE_BYTES = 2**25  # A file is read in pieces of this size, and so many requests are on their way at once:
CONCURRENCY = 4

# Each further try waits twice as long as the one before, so these take half of `timeout_s`, or 16 s where that is less:
# what then is told is the reason, and not only that time ran out. TensorStore by itself would try for a quarter of an
# hour.
TRIES = 4
FIRST_DELAY = 1 / 32  # of `timeout_s`, and at most a second


class RemoteError(Exception):
    """The object store did not take or give what it was asked for."""


class Uploaded(NamedTuple):
    """A copy that is committed."""

    step: int
    seconds: float

    def __str__(self) -> str:
        """Return a line for people."""
        return f"the checkpoint of step {self.step} was copied in {self.seconds:.2f} s"


class Downloaded(NamedTuple):
    """The steps that were brought back, oldest first, and why others were not."""

    steps: list[int]
    refused: dict[int, str]


class RemoteStore:
    """The copy of one run under one URL.

        mirror = RemoteStore("s3://bucket/runs/mnist")
        mirror.download(run, files=["metrics.jsonl"])
        ...
        mirror.begin_upload(run, step, keep=store.steps, files=["metrics.jsonl"])  # returns at once
        ...
        mirror.wait(20.0)

    Credentials are looked for where each service's own tools look: `AWS_ACCESS_KEY_ID` and its like, `~/.aws`,
    `GOOGLE_APPLICATION_CREDENTIALS`, the machine's role. `AWS_ENDPOINT_URL` names another server that talks like S3.
    """

    def __init__(self, url: str, *, timeout_s: float = 20.0) -> None:
        """Note where the copy lies; nothing is opened yet.

        Args:
            url: `s3://bucket/path`, `gs://bucket/path` or `file:///path`.
            timeout_s: how long a push, fetch or look goes on without an answer of the store.

        Raises:
            ValueError: the URL is none of these.
        """
        self.url = url
        self.timeout_s = timeout_s
        self._spec = _spec(url, timeout_s)
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mirror")
        self._lock = threading.Lock()
        self._waiting: tuple[Path, int, frozenset[int], tuple[str, ...]] | None = None
        self._uploading_step: int | None = None
        self._is_uploading = False
        self._upload: Future[None] | None = None
        self._results: queue.SimpleQueue[Uploaded | RemoteError] = queue.SimpleQueue()

    def newest_step(self) -> int | None:
        """Return the step of the newest committed copy, or None where there is none.

        Raises:
            RemoteError: the store did not tell.
        """
        with self._told_in_a_line("it cannot be looked at"):
            return max(_committed(self._open().copies()), default=None)

    def read(self, name: str, max_bytes: int = MAX_SMALL_FILE_BYTES) -> bytes | None:
        """Return what a small file holds, or None where it has no copy.

        Raises:
            RemoteError: the store did not give it, or it is larger.
        """
        with self._told_in_a_line(f"{name} was not read"):
            return self._open().read(name, max_bytes)

    def upload(self, run: Path, step: int, *, keep: Collection[int], files: Sequence[str]) -> Uploaded:
        """Copy the small files and then a checkpoint of a run, and return when the copy is committed.

        The small files must hold already what leads to this checkpoint. A copy that is there and is the same is not
        written again; one that differs ceases to count before its first byte changes. What broke off earlier is
        removed, of whatever step.

        Args:
            run: the run directory.
            step: names the checkpoint.
            keep: the steps whose copies stay; other older ones go once this one is committed.
            files: names in the run directory; those that are not there are left out.

        Raises:
            RemoteError: the store did not take it; or a newer copy is there, and is not given up for an older one; or
                the checkpoint is not there, or not what its manifest says.
        """
        started = time.monotonic()
        directory = run / "checkpoints" / str(step)
        with self._told_in_a_line(f"the checkpoint of step {step} was not copied"):
            bucket = self._open()
            copies = bucket.copies()
            if (newest := max(_committed(copies), default=step)) > step:
                raise _Refused(f"the copy of step {newest} is newer")
            manifest = _read(directory / "manifest.json", MAX_MANIFEST_BYTES)
            if manifest is None:
                raise _Refused("it is not there any more")
            table = _table(manifest)
            for _ in _contents(directory, table):  # Nothing good is given up for what is not good itself.
                pass
            bucket.write(_small_files(run, files))
            _upload_checkpoint(bucket, directory, manifest, table, copies.pop(step, set()))
            kept = _committed(copies).intersection(keep)
            bucket.remove({old: names for old, names in copies.items() if old not in kept})
        return Uploaded(step, time.monotonic() - started)

    def begin_upload(self, run: Path, step: int, *, keep: Collection[int], files: Sequence[str]) -> None:
        """Push in the background, unless that is being done; one that has not begun yet gives way to this one.

        How it went, `results` tells.
        """
        with self._lock:
            if step == self._uploading_step:
                self._waiting = None
                return
            self._waiting = run, step, frozenset(keep), tuple(files)
            if not self._is_uploading:
                self._upload = self._background.submit(self._upload_pending)
                self._is_uploading = True

    def _upload_pending(self) -> None:
        """Push, in the background thread, until nothing waits."""
        while True:
            with self._lock:
                waiting, self._waiting = self._waiting, None
                self._uploading_step = waiting[1] if waiting else None
                if waiting is None:
                    self._is_uploading = False
                    return
            run, step, keep, files = waiting
            try:
                self._results.put(self.upload(run, step, keep=keep, files=files))
            except RemoteError as failure:
                self._results.put(failure)
            except Exception as error:  # Whatever it is, it must not end the pushes that come after.
                self._results.put(RemoteError(f"{self.url}: {type(error).__name__}: {_in_a_line(error)}"))

    def results(self) -> list[Uploaded | RemoteError]:
        """Return how the background pushes went that ended since the last call; it raises nothing."""
        ended = []
        while not self._results.empty():
            ended.append(self._results.get())
        return ended

    @property
    def uploading_steps(self) -> set[int]:
        """The steps that a background push still reads, or is about to; their checkpoints must stay."""
        with self._lock:
            waiting = self._waiting[1] if self._waiting else None
            return {step for step in (self._uploading_step, waiting) if step is not None}

    def wait(self, timeout_s: float) -> bool:
        """Wait for the background pushes, and tell whether all have ended. Signal handlers run meanwhile."""
        return self._upload is None or not wait([self._upload], timeout=timeout_s).not_done

    def download(self, run: Path, *, files: Sequence[str]) -> Downloaded:
        """Bring copies that are newer than all that a run directory has back into it, and with them the small files.

        The newest comes first, and the small files are in place before any checkpoint is. Nothing of a copy is
        believed: no name leads elsewhere, nothing is larger than it says or has other bytes, no link is followed.

        Args:
            run: the run directory, which is made if it is not there.
            files: names in the run directory; those that have no copy are left out.

        Raises:
            RemoteError: the store did not give it; or there are copies, all were refused, and no checkpoint is here.
                To begin anew would then be wrong.
        """
        with self._told_in_a_line(f"{run} did not get all of it back"):
            checkpoints = run / "checkpoints"
            if checkpoints.is_symlink():
                raise _Refused(f"{checkpoints} is a symbolic link, and nothing is brought to where it leads")
            bucket = self._open()
            copies = bucket.copies()
            newest_here = max((found.step for found in list_checkpoints(checkpoints)), default=-1)
            taken: set[int] = set()
            refused: dict[int, str] = {}
            for step in sorted(_committed(copies), reverse=True):
                if step <= newest_here:
                    break
                try:
                    _download_checkpoint(bucket, step, copies[step], checkpoints)
                except (_Refused, OSError) as error:
                    refused[step] = _in_a_line(error)
                else:
                    taken.add(step)
            if refused and not taken and newest_here < 0:
                raise _Refused("; ".join(f"step {step}: {refused[step]}" for step in sorted(refused)))
            if taken:
                _download_small_files(bucket, run, files)
            for step in sorted(taken):
                (checkpoints / f"{step}.unfinished").rename(checkpoints / str(step))
                fsync_path(checkpoints)
        return Downloaded(sorted(taken), refused)

    def _open(self) -> "_Bucket":
        return _Bucket(self.url, self._spec, self.timeout_s)

    @contextlib.contextmanager
    def _told_in_a_line(self, what: str) -> Iterator[None]:
        """Raise RemoteError for what is wrong on either side."""
        try:
            yield
        except (_Refused, OSError) as error:
            raise RemoteError(f"{self.url}: {what}: {_in_a_line(error)}") from None


class _Refused(Exception):
    """A file, a checkpoint or a copy is not what it should be."""


_IN_A_COPY = re.compile(rf"checkpoints/({STEP.pattern})/(manifest\.json|(state|run)/.+)")
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")


def _spec(url: str, timeout_s: float) -> dict[str, Any]:
    """Return what TensorStore is to open.

    Raises:
        ValueError: it is no place for a copy.
    """
    try:
        parts = urlsplit(url)
        if "@" in parts.netloc or "?" in url or "#" in url or not url.isprintable():
            raise ValueError("it may hold a bucket and a path, and nothing else")
        if parts.scheme not in ("s3", "gs", "file"):
            raise ValueError("nothing is known of such a place")
        spec = ts.KvStore.Spec(url).to_json()
    except ValueError as error:
        shown = re.sub(r"//[^/]*@", "//", re.split(r"[?#]", url)[0])  # Not what may be a password.
        reason = str(error).rsplit('": ')[-1]
        raise ValueError(
            f"{shown!r} is no place for a mirror: {reason}; use s3://bucket/path, gs://bucket/path or file:///path"
        ) from None
    if spec.get("path"):
        spec["path"] = spec["path"].rstrip("/") + "/"
    driver = spec["driver"]
    if driver == "file":
        return spec
    spec[f"{driver}_request_concurrency"] = {"limit": CONCURRENCY}
    delay_ms = int(1000 * min(1.0, FIRST_DELAY * timeout_s))
    spec[f"{driver}_request_retries"] = {
        "max_retries": TRIES,
        "initial_delay": f"{delay_ms}ms",
        "max_delay": f"{delay_ms * 2**TRIES}ms",
    }
    if driver == "s3":
        variable = os.environ.get
        if endpoint := variable("AWS_ENDPOINT_URL_S3") or variable("AWS_ENDPOINT_URL"):
            spec["endpoint"] = endpoint.rstrip("/")
            # Amazon tells where a bucket lies, which need not be where this machine does.
            if region := variable("AWS_REGION") or variable("AWS_DEFAULT_REGION"):
                spec["aws_region"] = region
        if variable("AWS_ACCESS_KEY_ID") and variable("AWS_SECRET_ACCESS_KEY"):
            # The whole chain would find the same, and first complain on standard error of files that are not there.
            spec["aws_credentials"] = {"type": "environment"}
    return spec


class _Bucket:
    """The open store, for one push, fetch or look. Whatever it is asked for, it may raise RemoteError.

    It is opened anew for each. Requests that a silent server never answers keep their places in TensorStore's queue,
    and after some pushes none would be left: of 4 places, 4 lost ones blocked all that came later.
    """

    def __init__(self, url: str, spec: Mapping[str, Any], timeout_s: float) -> None:
        self._url, self._timeout_s = url, timeout_s
        self._store = self._result("it cannot be opened", ts.KvStore.open(dict(spec)))

    def copies(self) -> dict[int, set[str]]:
        """Return the files of each copy, be it whole or not. Other names are nobody's, neither read nor removed."""
        within = ts.KvStore.KeyRange("checkpoints/", "checkpoints0")
        copies: dict[int, set[str]] = {}
        for key in self._result("it cannot be listed", self._store.list(within)):
            match = _IN_A_COPY.fullmatch(key.decode(errors="replace"))
            if match and _is_plain(match[2]):
                copies.setdefault(int(match[1]), set()).add(match[2])
        return copies

    def read(self, name: str, max_bytes: int) -> bytes | None:
        """Return what a file holds, or None where it is not there.

        Raises:
            _Refused: it has more bytes.
        """
        what = f"{name} cannot be read"
        try:
            beyond = self._store.read(name, byte_range=slice(max_bytes, max_bytes + 1))
            is_larger = bool(self._result(what, beyond).value)
        except (RemoteError, _Refused):  # To ask for what is beyond the end is an error, and that is well.
            is_larger = False
        result = None if is_larger else self._result(what, self._store.read(name))
        if result is None or len(result.value) > max_bytes:
            raise _Refused(f"{name} has more than {max_bytes:,} bytes")
        return None if result.state == "missing" else result.value

    def read_pieces(self, place: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, bytes]]:
        """Return what files in a place hold, in pieces, no more than their sizes, and nothing of empty ones.

        Raises:
            _Refused: one of them is not there, or shorter.
        """
        pieces = (
            (name, slice(start, min(start + PIECE_BYTES, size)))
            for name, size in sizes.items()
            for start in range(0, size, PIECE_BYTES)
        )
        reads = ((name, self._store.read(f"{place}/{name}", byte_range=piece)) for name, piece in pieces)
        for name, result in self._in_order("cannot be read", reads):
            if result.state == "missing":
                raise _Refused(f"{name} is missing")
            yield name, result.value

    def write(self, contents: Iterable[tuple[str, bytes]]) -> None:
        """Write files; a few at a time are asked for and held in memory."""
        writes = ((name, self._store.write(name, content)) for name, content in contents)
        for _ in self._in_order("cannot be written", writes):
            pass

    def delete(self, names: Iterable[str]) -> None:
        """Delete files, if they are there."""
        deletes = ((name, self._store.write(name, None)) for name in names)
        for _ in self._in_order("cannot be deleted", deletes):
            pass

    def remove(self, copies: Mapping[int, Collection[str]]) -> None:
        """Delete copies: first what makes them count."""
        paths = [f"checkpoints/{step}/{name}" for step, names in copies.items() for name in names]
        self.delete(path for path in paths if path.endswith("/manifest.json"))
        self.delete(path for path in paths if not path.endswith("/manifest.json"))

    def _in_order(self, what: str, requests: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Return the names and results of requests, of which a few are on their way at once."""
        on_their_way: deque[tuple[str, Any]] = deque()
        try:
            for request in requests:
                on_their_way.append(request)
                if len(on_their_way) == CONCURRENCY:
                    name, future = on_their_way.popleft()
                    yield name, self._result(f"{name} {what}", future)
            while on_their_way:
                name, future = on_their_way.popleft()
                yield name, self._result(f"{name} {what}", future)
        finally:
            for _, future in on_their_way:
                future.cancel()

    def _result(self, what: str, future: Any) -> Any:
        """Return the result of a request, if it comes in time.

        Raises:
            RemoteError: it does not come, or is an error.
        """
        try:
            result = future.result(timeout=self._timeout_s)
        except TimeoutError:
            future.cancel()
            reason = f"there was no answer in {self._timeout_s:g} s"
        except Exception as error:  # Whatever a store answers, and more may come with other versions of TensorStore.
            reason = _in_a_line(error)
        else:
            return result
        if reason.startswith("OUT_OF_RANGE"):
            raise _Refused(f"{what}: {reason}")
        if reason.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")):
            reason += "; is there a credential, and does it allow this?"
        raise RemoteError(f"{self._url}: {what}: {reason}")


def _committed(copies: Mapping[int, Collection[str]]) -> set[int]:
    """Return the steps of the copies that count."""
    return {step for step, names in copies.items() if "manifest.json" in names}


def _small_files(run: Path, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    for name in names:
        content = _read(run / name, MAX_SMALL_FILE_BYTES)
        if content is not None:
            yield name, content


def _upload_checkpoint(
    bucket: _Bucket, directory: Path, manifest: bytes, table: Mapping[str, tuple[int, str]], there: set[str]
) -> None:
    """Write a checkpoint, its manifest last, unless the copy that is there is the same and whole.

    Raises:
        _Refused: it is not what its manifest says.
        RemoteError: the store did not take it.
    """
    place = f"checkpoints/{directory.name}"
    if not _is_same(bucket, place, manifest, table, there):
        bucket.delete([f"{place}/manifest.json"] if "manifest.json" in there else [])
        bucket.write((f"{place}/{name}", content) for name, content in _contents(directory, table))
        bucket.write([(f"{place}/manifest.json", manifest)])
    bucket.delete(f"{place}/{name}" for name in there - table.keys() - {"manifest.json"})


def _is_same(bucket: _Bucket, place: str, manifest: bytes, names: Collection[str], there: set[str]) -> bool:
    """Tell whether a copy with these names and this manifest is there."""
    if not there.issuperset({*names, "manifest.json"}):
        return False
    try:
        return bucket.read(f"{place}/manifest.json", len(manifest)) == manifest
    except _Refused:
        return False


def _contents(directory: Path, table: Mapping[str, tuple[int, str]]) -> Iterator[tuple[str, bytes]]:
    """Return the files of a checkpoint, each when it is asked for and found good.

    Raises:
        _Refused: one is missing or damaged.
    """
    found = {} if directory.is_symlink() else regular_files(directory)
    for name, (size, sha256) in table.items():
        content = _read(directory / name, size) if name in found else None
        if content is None:
            raise _Refused(f"{name} is missing, or no file")
        if len(content) != size or hashlib.sha256(content).hexdigest() != sha256:
            raise _Refused(f"{name} has other bytes than were saved")
        yield name, content


def _download_checkpoint(bucket: _Bucket, step: int, there: set[str], checkpoints: Path) -> None:
    """Bring a copy to the disk, under the name of a save that is not finished.

    Raises:
        _Refused: it is not what it should be.
        OSError: the disk did not take it.
        RemoteError: the store did not give it.
    """
    place = f"checkpoints/{step}"
    manifest = bucket.read(f"{place}/manifest.json", MAX_MANIFEST_BYTES)
    if manifest is None:
        raise _Refused("manifest.json is missing")
    table = _table(manifest)
    sizes = {name: size for name, (size, _) in table.items()}
    if missing := sorted(sizes.keys() - there):
        raise _Refused(f"{missing[0]} is missing")
    checkpoints.mkdir(parents=True, exist_ok=True)
    size, free = sum(sizes.values()), shutil.disk_usage(checkpoints).free
    if size > free:
        raise _Refused(f"it has {size:,} bytes, and {free:,} are free in {checkpoints}")
    unfinished = checkpoints / f"{step}.unfinished"
    remove(unfinished)
    try:
        unfinished.mkdir()
        for name in sizes:
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            (unfinished / name).open("xb").close()
        for name, piece in bucket.read_pieces(place, sizes):
            with (unfinished / name).open("ab") as file:
                file.write(piece)
        for name, (_, sha256) in table.items():
            with (unfinished / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise _Refused(f"{name} has other bytes than were saved")
        (unfinished / "manifest.json").write_bytes(manifest)
        fsync_tree(unfinished)
    except BaseException:
        remove(unfinished)
        raise


def _download_small_files(bucket: _Bucket, run: Path, names: Sequence[str]) -> None:
    """Bring the small files to the disk, each under its name when it is whole.

    Raises:
        _Refused, OSError: one is too large, or the disk did not take it.
        RemoteError: the store did not give it.
    """
    for name in names:
        content = bucket.read(name, MAX_SMALL_FILE_BYTES)
        if content is None:
            continue
        partial = run / f"{name}.partial"
        remove(partial)
        with partial.open("xb") as file:
            file.write(content)
        fsync_path(partial)
        partial.replace(run / name)
    fsync_path(run)


def _table(manifest: bytes) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of each file that a manifest lists.

    Raises:
        _Refused: it lists none, or some that no checkpoint has.
    """
    try:
        rows = json.loads(manifest)["files"]
        table = {name: (row["bytes"], row["sha256"]) for name, row in rows.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _Refused("manifest.json cannot be understood") from None
    for name, (size, sha256) in table.items():
        if not (name.startswith(("state/", "run/")) and _is_plain(name)):
            raise _Refused(f"a checkpoint has no file {name[:200]!r}")
        if not (type(size) is int and 0 <= size < 2**60 and isinstance(sha256, str)):
            raise _Refused(f"no file is as manifest.json describes {name}")
    return table


def _is_plain(name: str) -> bool:
    """Tell whether a name with slashes leads down from a directory, and nowhere else."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _read(path: Path, max_bytes: int) -> bytes | None:
    """Return what a file holds, or None where it is not there.

    Raises:
        _Refused: it has more bytes, or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise _Refused(f"{path} is no file")
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise _Refused(f"{path} has more than {max_bytes:,} bytes")
    return content


def _in_a_line(error: object) -> str:
    """Return what an error says, without secrets and without what TensorStore appends in brackets, pages of it."""
    text = " ".join(str(error).split())
    text = re.split(r" \[[\w-]+='", text)[0]
    for secret in filter(None, map(os.environ.get, _SECRETS)):
        text = text.replace(secret, "(secret)")
    text = re.sub(r"//[^/@\s]*@", "//", text)
    return "".join(letter if letter.isprintable() else "?" for letter in text)[:1000]
