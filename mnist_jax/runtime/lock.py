"""An exclusive lock on a directory. The kernel releases it when its holder exits, however it exits.

This file needs nothing else of the package; copy it into your own project.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

PROBE_S = 0.2  # Even `wait_s=0` waits this long, because `holder` takes the lock for an instant.


class Holder(NamedTuple):
    """The process that holds a lock: host name, process id, and since when, in seconds since 1970."""

    host: str
    pid: int
    since: float

    def __str__(self) -> str:
        """Return a description for messages."""
        if not self.pid:
            return "an unknown process"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on host {self.host}, since {since}"


class LockHeldError(Exception):
    """Another process holds the lock."""


@contextlib.contextmanager
def exclusive_lock(
    directory: Path,
    *,
    wait_s: float,
    notify: Callable[[str], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Hold the lock of a directory while the `with` block runs.

    The lock is a `flock` on the file `lock` in the directory. The file stays there and names its last holder.

    Args:
        directory: created if missing.
        wait_s: how long to wait for another holder.
        notify: receives a message if there is a wait.
        should_stop: polled during the wait; True ends it.

    Raises:
        LockHeldError: another process still holds the lock.
        OSError: the directory cannot be written to, or its file system has no `flock`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "lock"
    lock = FileLock(
        path, thread_local=False, fallback_to_soft=False, preserve_lock_file=True, on_acquired=_write_holder
    )
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=PROBE_S)
    if not lock.is_locked:
        if wait_s > PROBE_S:
            notify(f"{directory} is in use by {_read_holder(path)}; waiting up to {wait_s:g} s for it to exit")
        try:
            lock.acquire(timeout=max(0.0, wait_s - PROBE_S), cancel_check=should_stop)
        except Timeout:
            raise LockHeldError(
                f"{directory} is in use by {_read_holder(path)}. Stop that process, wait until it exits, or use "
                "another directory"
            ) from None
    try:
        yield
    finally:
        lock.release()


def holder(directory: Path) -> Holder | None:
    """Return the holder of a directory's lock, None if it is free. Read-only.

    Raises:
        OSError: the lock cannot be read.
    """
    path = directory / "lock"
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_holder(path)
    finally:
        os.close(file)
    return None


def _write_holder(file: int) -> None:
    """Write this process into the lock file."""
    line = json.dumps(Holder(socket.gethostname(), os.getpid(), time.time())._asdict()).encode() + b"\n"
    os.pwrite(file, line, 0)
    os.ftruncate(file, len(line))


def _read_holder(path: Path) -> Holder:
    """Return the holder that a lock file names. Its pid is 0 if the file has other content."""
    try:
        values = json.loads(path.read_bytes()[:10_000])
        holder = Holder(str(values["host"]), int(values["pid"]), float(values["since"]))
        str(holder)  # raises for a time that no calendar has
        return holder
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return Holder("", 0, 0.0)
