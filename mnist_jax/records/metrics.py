"""What a run leaves for people: metrics.jsonl, events.jsonl and TensorBoard scalars.

`metrics.jsonl` is part of the run's result: its bytes depend on the config alone, however often the run was cut.
`events.jsonl` is the history: what happened when. It only grows.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal


class Journal:
    """The files of one run that people and their tools read."""

    def __init__(self, workdir: Path, *, enabled: bool = True) -> None:
        """Open the files in `workdir`, which exists. Nothing of `metrics.jsonl` is used before `rewind`.

        Args:
            workdir: the run directory.
            enabled: whether this process writes; otherwise no file is opened, and records are kept in memory.
        """
        self._metrics_path, self._events_path = workdir / "metrics.jsonl", workdir / "events.jsonl"
        self._last_step = _last_step(read_events(self._events_path)) if enabled else 0
        is_torn = enabled and not _ends_with_a_whole_line(self._events_path)
        self._metrics: _PatientFile = (_PatientFile if enabled else _NullFile)(self._metrics_path)
        self._events: _PatientFile = (_PatientFile if enabled else _NullFile)(self._events_path)
        if is_torn:
            self._events.write(b"\n")  # What a kill tore stays by itself, and does not spoil the next line.
        self._scalars: _PatientFile = _open_scalars(workdir / "tensorboard") if enabled else _NullFile(workdir)
        self._unshown: list[dict[str, Any]] = [{"file_version": "brain.Event:2"}]
        self._records: list[dict[str, Any]] = []
        self._size, self._digest = 0, hashlib.sha256()
        self._enabled = enabled

    @property
    def trouble(self) -> OSError | None:
        """Why lines are kept that could not be written yet, or None where all are written."""
        return self._metrics.trouble or self._events.trouble or self._scalars.trouble

    def event(self, event: str, *, step: int, **details: Any) -> None:
        """Add a line to the history."""
        record = {"time": time.time(), "event": event, "step": step, **details}
        self._events.write(json.dumps(record).encode() + b"\n")

    def rewind(self, step: int) -> int:
        """Cut `metrics.jsonl` back to what was known at `step`, so that no line is there twice.

        Returns:
            How far the run is known to have come before: at least that many steps were made, `step` or more.
        """
        self._records, self._size, self._digest = [], 0, hashlib.sha256()
        furthest, is_known = max(step, self._last_step), True
        for record, line in read_metrics(self._metrics_path):
            furthest, is_known = max(furthest, record["step"]), is_known and record["step"] <= step
            if is_known:
                self._keep(record, line)
        self._metrics.truncate(self._size)
        # TensorBoard forgets the scalars from this step on when it meets this mark.
        self._unshown.append({"step": step + 1, "session_log": {"status": "START"}})
        return furthest

    def record(self, step: int, split: str, *, loss: float, accuracy: float, learning_rate: float) -> None:
        """Add a line to `metrics.jsonl`, and its scalars to TensorBoard."""
        values = {"loss": loss, "accuracy": accuracy, "learning_rate": learning_rate}
        record = {"step": step, "split": split, **values}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        self._metrics.write(line)
        self._keep(record, line)
        scalars = [{"tag": f"{name}/{split}", "simple_value": value} for name, value in values.items()]
        self._unshown.append({"step": step, "summary": {"value": scalars}})
        if self._enabled:
            self._show()

    def _keep(self, record: dict[str, Any], line: bytes) -> None:
        self._records.append(record)
        self._size += len(line)
        self._digest.update(line)

    def _show(self) -> None:
        """Write for TensorBoard, which may be watching, what it was not shown yet."""
        # 0.1 s of imports, and the first step does not wait for them.
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        writer = RecordWriter(self._scalars)
        for event in self._unshown:
            writer.write(Event(wall_time=time.time(), **event).SerializeToString())
        self._unshown.clear()

    def accuracy_at(self, step: int) -> float | None:
        """Return the test accuracy recorded at a step, or None."""
        return accuracy_at(step, self._records)

    def best(self) -> dict[str, Any] | None:
        """Return the record of the best test accuracy, the first of equals, or None."""
        return max((r for r in self._records if r["split"] == "test"), key=lambda r: r["accuracy"], default=None)

    def metrics_fingerprint(self) -> dict[str, Any]:
        """Return size and SHA-256 of `metrics.jsonl`, for a checkpoint to remember."""
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def still_begins_with(self, fingerprint: dict[str, Any]) -> bool:
        """Tell whether `metrics.jsonl` still holds what it held when a checkpoint remembered it."""
        known = self._metrics_path.read_bytes()[: fingerprint["bytes"]]
        return hashlib.sha256(known).hexdigest() == fingerprint["sha256"]

    def tells_of_saves(self) -> bool:
        """Tell whether the history knows of a checkpoint."""
        return tells_of_saves(read_events(self._events_path))

    def sync(self) -> None:
        """Bring all lines to the disk. A checkpoint must not be there before the lines that lead to it.

        Raises:
            OSError: the disk does not take them.
        """
        self._metrics.sync()

    def close(self) -> None:
        """Close the files."""
        for file in (self._metrics, self._events, self._scalars):
            file.close()


class _PatientFile:
    """A file that grows. What the disk does not take is kept, and tried again with the next write."""

    def __init__(self, path: Path, *, mode: Literal["ab", "xb"] = "ab") -> None:
        self._file = path.open(mode, buffering=0)
        self._pending = bytearray()
        self.trouble: OSError | None = None

    def write(self, data: bytes) -> None:
        self._pending += data
        try:
            while self._pending:
                del self._pending[: self._file.write(self._pending)]
            self.trouble = None
        except OSError as error:
            self.trouble = error

    def truncate(self, size: int) -> None:
        self._file.truncate(size)

    def sync(self) -> None:
        self.write(b"")
        if self.trouble:
            raise self.trouble
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.write(b"")
        self._file.close()


class _NullFile(_PatientFile):
    """The file of a process that does not write."""

    def __init__(self, _path: Path) -> None:
        self.trouble = None

    def write(self, data: bytes) -> None:
        pass

    def truncate(self, size: int) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


def _open_scalars(directory: Path) -> _PatientFile:
    """Open a new file for TensorBoard.

    TensorBoard reads the files in the order of their names. Its own writer names them by the clock, which may go back,
    and writes in a thread, which a kill may find behind.
    """
    directory.mkdir(exist_ok=True)
    names = (re.fullmatch(r"events\.out\.tfevents\.([0-9]{10,20})", path.name) for path in directory.iterdir())
    taken = [int(name[1]) for name in names if name]
    return _PatientFile(directory / f"events.out.tfevents.{max(taken, default=-1) + 1:010d}", mode="xb")


def read_metrics(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield the records of a metrics file, each with its line, up to the first line that is torn or none of ours."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                whole = (
                    line.endswith(b"\n")
                    and _is_step(record["step"])
                    and record["split"] in ("train", "test")
                    and isinstance(record["accuracy"], float)
                )
            except (ValueError, TypeError, KeyError, RecursionError):
                return
            if not whole:
                return
            yield record, line


def accuracy_at(step: int, records: Iterable[dict[str, Any]]) -> float | None:
    """Return the test accuracy that the records of a metrics file have at a step, or None."""
    return next((r["accuracy"] for r in records if r["split"] == "test" and r["step"] == step), None)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the history in an `events.jsonl`, without what a kill tore; empty where there is none."""
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


def tells_of_saves(events: Iterable[dict[str, Any]]) -> bool:
    """Tell whether a history knows of a checkpoint."""
    return any(record["event"] == "save" for record in events)


def _last_step(events: list[dict[str, Any]]) -> int:
    """Return the highest step that the history tells of since the latest start."""
    last = 0
    for record in reversed(events):
        last = max(last, record["step"])
        if record["event"] == "start":
            break
    return last


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _ends_with_a_whole_line(path: Path) -> bool:
    if not path.exists():
        return True
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")
