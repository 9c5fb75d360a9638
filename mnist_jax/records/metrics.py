"""The files of a run that people and tools read: metrics.jsonl, TensorBoard scalars and events.jsonl.

`metrics.jsonl` is part of the result of a run: its bytes are the same however often the run was stopped.
`events.jsonl` is append-only and says what happened and when.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class MetricWriter:
    """Write `metrics.jsonl` and the same numbers as TensorBoard scalars."""

    def __init__(self, workdir: Path, *, enabled: bool = True) -> None:
        """Open the files. A run that resumes calls `truncate` before it writes.

        Args:
            workdir: the run directory, which exists.
            enabled: whether this process writes; otherwise the records are only kept in memory.
        """
        self._path, self._enabled = workdir / "metrics.jsonl", enabled
        self._file = _AppendFile(self._path) if enabled else _NullFile()
        self._scalars = _AppendFile(_next_scalars_path(workdir / "tensorboard")) if enabled else _NullFile()
        self._pending_scalars: list[dict[str, Any]] = [{"file_version": "brain.Event:2"}]
        self._reset()

    def _reset(self) -> None:
        self._records: list[dict[str, Any]] = []
        self._size, self._digest = 0, hashlib.sha256()

    @property
    def write_error(self) -> OSError | None:
        """The error of the last write, None if everything is written. The bytes are written with the next write."""
        return self._file.write_error or self._scalars.write_error

    def truncate(self, step: int) -> int:
        """Remove all lines after a step, and whatever follows the first torn line.

        Returns the highest step that a line had, `step` if there is none after it.
        """
        self._reset()
        furthest, is_kept = step, True
        for record, line in read_metrics(self._path):
            furthest, is_kept = max(furthest, record["step"]), is_kept and record["step"] <= step
            if is_kept:
                self._append(record, line)
        self._file.truncate(self._size)
        # TensorBoard drops the scalars from this step on when it reads this record.
        self._pending_scalars.append({"step": step + 1, "session_log": {"status": "START"}})
        return furthest

    def write(self, step: int, split: str, *, loss: float, accuracy: float, learning_rate: float) -> None:
        """Write one line, and its scalars."""
        values = {"loss": loss, "accuracy": accuracy, "learning_rate": learning_rate}
        record = {"step": step, "split": split, **values}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        self._file.write(line)
        self._append(record, line)
        if self._enabled:
            scalars = [{"tag": f"{name}/{split}", "simple_value": value} for name, value in values.items()]
            self._pending_scalars.append({"step": step, "summary": {"value": scalars}})
            self._write_scalars()

    def _append(self, record: dict[str, Any], line: bytes) -> None:
        self._records.append(record)
        self._size += len(line)
        self._digest.update(line)

    def _write_scalars(self) -> None:
        # These imports take 0.1 s. The first step does not wait for them.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        writer = RecordWriter(self._scalars)
        for event in self._pending_scalars:
            writer.write(Event(wall_time=time.time(), **event).SerializeToString())
        self._pending_scalars.clear()

    def accuracy_at(self, step: int) -> float | None:
        """Return the test accuracy at a step, None if there was no evaluation."""
        return accuracy_at(step, self._records)

    def best(self) -> dict[str, Any] | None:
        """Return the record with the highest test accuracy, the first of equal ones; None if there is none."""
        return max((r for r in self._records if r["split"] == "test"), key=lambda r: r["accuracy"], default=None)

    def fingerprint(self) -> dict[str, Any]:
        """Return size and SHA-256 of `metrics.jsonl`, which each checkpoint stores."""
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def starts_with(self, fingerprint: dict[str, Any]) -> bool:
        """Return whether `metrics.jsonl` still starts with the bytes of a fingerprint."""
        known = self._path.read_bytes()[: fingerprint["bytes"]]
        return hashlib.sha256(known).hexdigest() == fingerprint["sha256"]

    def sync(self) -> None:
        """Fsync `metrics.jsonl`. A checkpoint is committed only after the lines that lead to it.

        Raises:
            OSError: the lines cannot be written.
        """
        self._file.sync()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._scalars.close()


class EventLog:
    """Append to `events.jsonl`.

    Attributes:
        last_step: the highest step of the previous attempt, 0 for a new run.
        has_saves: whether an earlier attempt committed a checkpoint.
    """

    def __init__(self, workdir: Path, *, enabled: bool = True) -> None:
        """Open the file in a run directory; nothing is read or written if it is not enabled."""
        path = workdir / "events.jsonl"
        events = read_events(path) if enabled else []
        self.last_step, self.has_saves = _last_step(events), has_saves(events)
        is_torn = enabled and not _ends_with_newline(path)
        self._file = _AppendFile(path) if enabled else _NullFile()
        if is_torn:
            self._file.write(b"\n")  # Otherwise the next line would be appended to the torn one, and lost with it.

    @property
    def write_error(self) -> OSError | None:
        """The error of the last write, None if everything is written. The bytes are written with the next write."""
        return self._file.write_error

    def write(self, event: str, *, step: int, **details: Any) -> None:
        """Write one line."""
        record = {"time": time.time(), "event": event, "step": step, **details}
        self._file.write(json.dumps(record).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _AppendFile:
    """An append-only file. Bytes that the disk does not take are kept and written with the next write."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._pending = bytearray()
        self.write_error: OSError | None = None

    def write(self, data: bytes) -> None:
        self._pending += data
        try:
            while self._pending:
                del self._pending[: self._file.write(self._pending)]
            self.write_error = None
        except OSError as error:
            self.write_error = error

    def truncate(self, size: int) -> None:
        self._file.truncate(size)

    def sync(self) -> None:
        self.write(b"")
        if self.write_error:
            raise self.write_error
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.write(b"")
        self._file.close()


class _NullFile:
    """The file of a process that writes nothing."""

    write_error: OSError | None = None

    def _ignore(self, *_: Any) -> None:
        pass

    write = truncate = sync = close = _ignore


def _next_scalars_path(directory: Path) -> Path:
    """Return the path of a new file for TensorBoard.

    TensorBoard reads the files in the order of their names. Its own writer names them by the clock, which may go back,
    and writes in a thread, which may lag behind when the process is killed.
    """
    directory.mkdir(exist_ok=True)
    names = (re.fullmatch(r"events\.out\.tfevents\.([0-9]{10,20})", path.name) for path in directory.iterdir())
    return directory / f"events.out.tfevents.{max((int(name[1]) for name in names if name), default=-1) + 1:010d}"


def read_metrics(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield each record of a metrics file with its line, up to the first torn or invalid line."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                is_valid = (
                    line.endswith(b"\n")
                    and _is_step(record["step"])
                    and record["split"] in ("train", "test")
                    and isinstance(record["accuracy"], float)
                )
            except (ValueError, TypeError, KeyError, RecursionError):
                return
            if not is_valid:
                return
            yield record, line


def accuracy_at(step: int, records: Iterable[dict[str, Any]]) -> float | None:
    """Return the test accuracy that the records of a metrics file have at a step, None if there is none."""
    return next((r["accuracy"] for r in records if r["split"] == "test" and r["step"] == step), None)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the valid records of an `events.jsonl`; none if there is no file."""
    if not path.exists():
        return []
    events = []
    with path.open("rb") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("event"), str) and _is_step(record.get("step")):
                    events.append(record)
    return events


def has_saves(events: Iterable[dict[str, Any]]) -> bool:
    """Return whether a checkpoint was ever committed, according to the event log."""
    return any(record["event"] == "save" for record in events)


def _last_step(events: list[dict[str, Any]]) -> int:
    """Return the highest step of the latest attempt."""
    last = 0
    for record in reversed(events):
        last = max(last, record["step"])
        if record["event"] == "start":
            break
    return last


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _ends_with_newline(path: Path) -> bool:
    if not path.exists():
        return True
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")
