"""One writer for a directory: a lock that the kernel lets go of when its holder ends, however it ends.

This file stands alone; lift it into your own project.
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

INSTANT_S = 0.2  # Waited for even by those who do not want to wait: `holder` has the lock for an instant.


class Holder(NamedTuple):
    """The process that has a lock: its host's name, its process id, and since when, in seconds since 1970."""

    host: str
    pid: int
    since: float

    def __str__(self) -> str:
        """Return it for people."""
        if not self.pid:
            return "a process that has not said yet who it is"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on host {self.host}, since {since}"


class LockHeldError(Exception):
    """Another process has the lock."""


@contextlib.contextmanager
def exclusive_lock(
    directory: Path,
    *,
    wait_s: float,
    notify: Callable[[str], None],
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[None]:
    """Be the only writer in a directory while the `with` block runs, among all who ask here.

    The lock is on the file `lock` in the directory, which stays there and names its last holder. It is the kernel's
    (`flock`): no process can leave it behind, and none that holds it needs to do anything to keep it.

    Args:
        directory: is made if it is not there.
        wait_s: how long to wait for another holder to end.
        notify: is told whom we wait for.
        should_stop: is asked now and then whether to wait no longer.

    Raises:
        LockHeldError: another process still has the lock.
        OSError: the lock cannot be had at all: the directory cannot be written to, or its file system has no `flock`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "lock"
    lock = FileLock(
        path, thread_local=False, fallback_to_soft=False, preserve_lock_file=True, on_acquired=_write_holder
    )
    with contextlib.suppress(Timeout):
        lock.acquire(timeout=INSTANT_S)
    if not lock.is_locked:
        if wait_s > INSTANT_S:
            notify(f"{directory} is in use by {_read_holder(path)}; waiting up to {wait_s:g} s for its end")
        try:
            lock.acquire(timeout=max(0.0, wait_s - INSTANT_S), cancel_check=should_stop)
        except Timeout:
            raise LockHeldError(
                f"{directory} is in use by {_read_holder(path)}. Stop that process, wait for its end, or use another "
                "directory"
            ) from None
    try:
        yield
    finally:
        lock.release()


def holder(directory: Path) -> Holder | None:
    """Return who has the lock of a directory, or None where nobody does. Nothing is written.

    Raises:
        OSError: the lock cannot be looked at.
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
    """Write into the lock's file who we are. What an earlier, longer name leaves behind is cut off."""
    line = json.dumps(Holder(socket.gethostname(), os.getpid(), time.time())._asdict()).encode() + b"\n"
    os.pwrite(file, line, 0)
    os.ftruncate(file, len(line))


def _read_holder(path: Path) -> Holder:
    """Return who wrote into a lock's file that the lock is theirs; its pid is 0 where that cannot be read."""
    try:
        values = json.loads(path.read_bytes()[:10_000])
        holder = Holder(str(values["host"]), int(values["pid"]), float(values["since"]))
        time.localtime(holder.since)  # It has to be a time.
        return holder
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return Holder("", 0, 0.0)
