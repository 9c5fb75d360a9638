"""The copies of a run's checkpoints in an object store, made in the background."""

import time
from pathlib import Path

from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.checkpoint.object_store import RemoteError
from mnist_jax.checkpoint.remote import RemoteStore
from mnist_jax.config import RECORDS
from mnist_jax.records.metrics import EventLog
from mnist_jax.runtime.preemption import StopSignal

# A signal leaves 30 s before the kill of most schedulers, and the last upload comes after the final save.
LAST_UPLOAD_TIMEOUT_S = 20.0


class RemoteCopies:
    """Upload committed checkpoints, and log how it went. Without a URL it does nothing."""

    def __init__(self, url: str | None, workdir: Path, checkpointer: Checkpointer, events: EventLog) -> None:
        """Name the store and the run directory."""
        self._store = RemoteStore(url) if url else None
        self._workdir, self._checkpointer, self._events = workdir, checkpointer, events
        self._last_failure: RemoteError | None = None

    @property
    def uploading_steps(self) -> set[int]:
        """The steps whose checkpoints are being uploaded, so they must not be removed."""
        return self._store.uploading_steps if self._store is not None else set()

    def begin(self, step: int) -> None:
        """Begin to upload a checkpoint. It replaces an upload that has not started."""
        if self._store is not None:
            self._store.begin_upload(self._workdir, step, keep=self._checkpointer.steps, files=RECORDS)

    def pop_failures(self) -> list[RemoteError]:
        """Log all uploads that ended since the last call, and return those that failed."""
        failures = []
        for result in self._store.results() if self._store is not None else ():
            if isinstance(result, RemoteError):
                self._events.write("copy_failed", step=self._checkpointer.newest_step, error=str(result))
                failures.append(result)
                self._last_failure = result
            else:
                self._events.write("copy", step=result.step, seconds=result.seconds)
                self._last_failure = None
        return failures

    def finish(self, stop: StopSignal) -> None:
        """Wait for the uploads in progress; after a stop signal for `LAST_UPLOAD_TIMEOUT_S` at most.

        Raises:
            RemoteError: the last upload failed, or is not done in time.
        """
        if self._store is None:
            return
        deadline_s = None
        while not self._store.wait(0.05):
            if stop.received is None:
                continue
            deadline_s = deadline_s or time.monotonic() + LAST_UPLOAD_TIMEOUT_S
            if time.monotonic() > deadline_s:
                raise RemoteError(f"{self._store.url}: the last upload took over {LAST_UPLOAD_TIMEOUT_S:g} s")
        self.pop_failures()
        if self._last_failure is not None:
            raise self._last_failure
