"""The files of a run that people and tools read: metrics.jsonl and events.jsonl.

`metrics.jsonl` is part of the result of a run: its bytes are the same however often the run was stopped.
`events.jsonl` is append-only and says what happened and when.
"""

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mnist_jax.config import move_aside, write_whole
from mnist_jax.records.append_file import AppendFile
from mnist_jax.records.tensorboard import Point, ScalarWriter

MAX_TAIL_BYTES = 2**20  # of an event log that a start reads: a long one must not delay a signal


class Restoration(NamedTuple):
    """What `MetricWriter.restore` found."""

    furthest_step: int  # the highest step that the file had, at least that of the checkpoint
    is_rebuilt: bool  # whether lines up to the checkpoint were missing or changed
    moved_to: Path | None  # where the changed file is


class MetricWriter:
    """Write `metrics.jsonl` and the same numbers as TensorBoard scalars.

    The file always equals the lines in memory, or is replaced as a whole: after a write or an fsync that failed, a
    later success says nothing about the bytes that failed (Linux marks their pages clean), and another process may
    have moved the file.
    """

    def __init__(self, workdir: Path, *, enabled: bool = True) -> None:
        """Open the files. A run calls `restore` before it writes.

        Args:
            workdir: the run directory, which exists.
            enabled: whether this process writes; otherwise the lines are only kept in memory.
        """
        self._path, self._enabled = workdir / "metrics.jsonl", enabled
        self._directory = workdir.stat()
        self._scalars = ScalarWriter(workdir)
        self._are_scalars_stale = False
        self._file = self._path.open("ab", buffering=0) if enabled else None
        self._content, self._records = bytearray(), list[dict[str, Any]]()
        self._write_error: OSError | None = None
        self._replaced: list[Path | None] = []

    @property
    def write_error(self) -> OSError | None:
        """The error of the last write, None if everything is written. The next write tries again."""
        return self._write_error or self._scalars.write_error

    def pop_replaced(self) -> list[Path | None]:
        """Return where foreign files were moved that took the place of `metrics.jsonl`; None for a removed file."""
        replaced, self._replaced = self._replaced, []
        return replaced

    def restore(self, lines: bytes, step: int) -> Restoration:
        """Make `metrics.jsonl` hold the lines of a checkpoint and, as `with_test_line` says, its test line.

        Args:
            lines: the lines up to the checkpoint; none if there is no checkpoint.
            step: the step of the checkpoint, 0 if there is none.

        Raises:
            OSError: the file cannot be read or written.
        """
        assert self._file is not None
        found = self._path.read_bytes() if self._path.exists() else b""
        records = list(parse_metrics(found.splitlines(keepends=True)))
        furthest = max([step, *(record["step"] for record, _ in records)])
        lines = with_test_line(lines, found, step)
        self._content = bytearray(lines)
        self._records = [record for record, _ in parse_metrics(lines.splitlines(keepends=True))]
        # They are written with the next line: the first step does not wait for it.
        self._are_scalars_stale = len(self._records) != len(records)
        if found.startswith(lines):
            self._file.truncate(len(lines))
            return Restoration(furthest, is_rebuilt=False, moved_to=None)
        moved_to = move_aside(self._path) if found else None
        self._replace_file()
        return Restoration(furthest, is_rebuilt=True, moved_to=moved_to)

    def write(
        self,
        step: int,
        split: str,
        *,
        loss: float,
        accuracy: float,
        learning_rate: float,
        images_per_s: float | None = None,
    ) -> None:
        """Write one line, and its scalars. The speed is a scalar only: the lines are the same bytes on any machine."""
        values = {"loss": loss, "accuracy": accuracy, "learning_rate": learning_rate}
        record = {"step": step, "split": split, **values}
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        self._records.append(record)
        self._content += line
        if self._enabled:
            self._append(line)
            if self._scalars.is_open:
                self._scalars.append(_point(record, time.time(), images_per_s))
            else:
                self._write_all_scalars()

    def sync(self) -> None:
        """Fsync `metrics.jsonl`. A checkpoint is committed only after the lines that lead to it.

        Raises:
            OSError: the lines cannot be written.
        """
        if self._file is None:
            return
        self._append(b"")
        if self._write_error is None:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                self._write_error = error
        if self._write_error is not None:
            raise self._write_error

    def _append(self, line: bytes) -> None:
        """Append to the file, or replace it by one with all lines if it is not known to hold the others."""
        assert self._file is not None
        try:
            if not os.path.samestat(self._directory, self._path.parent.stat()):
                raise OSError(errno.ESTALE, "the directory was replaced", str(self._path.parent))
            if self._write_error is not None or not self._is_in_place():
                self._replace_file()
            elif self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._write_error = None
        except OSError as error:
            self._write_error = error

    def _is_in_place(self) -> bool:
        assert self._file is not None
        try:
            if os.path.samestat(os.fstat(self._file.fileno()), self._path.lstat()):
                return True
            self._replaced.append(move_aside(self._path))
        except FileNotFoundError:
            self._replaced.append(None)
        return False

    def _replace_file(self) -> None:
        """Replace the file by a new one with all lines."""
        write_whole(self._path, self._content)
        if self._file is not None:
            self._file.close()
        self._file = self._path.open("ab", buffering=0)

    def _write_all_scalars(self) -> None:
        events = read_events(self._path.with_name("events.jsonl"), max_bytes=MAX_TAIL_BYTES)
        self._scalars.replace(_points(self._records, events))

    def accuracy_at(self, step: int) -> float | None:
        """Return the test accuracy at a step, None if there was no evaluation."""
        return accuracy_at(step, self._records)

    def best(self) -> dict[str, Any] | None:
        """Return the record with the highest test accuracy, the first of equal ones; None if there is none."""
        return max((r for r in self._records if r["split"] == "test"), key=lambda r: r["accuracy"], default=None)

    @property
    def lines(self) -> str:
        """All lines. Each checkpoint stores them."""
        return self._content.decode()

    def close(self) -> None:
        """Close the files."""
        if self._file is not None:
            if self._write_error is not None:
                self._append(b"")
            self._file.close()
            if self._are_scalars_stale and not self._scalars.is_open:
                self._write_all_scalars()
        self._scalars.close()


class EventLog:
    """Append to `events.jsonl`.

    Attributes:
        last_step: the highest step of the previous attempt, 0 for a new run.
    """

    def __init__(self, workdir: Path, *, enabled: bool = True) -> None:
        """Open the file in a run directory; nothing is read or written if it is not enabled."""
        self._path = workdir / "events.jsonl"
        self.last_step = _last_step(read_events(self._path, max_bytes=MAX_TAIL_BYTES)) if enabled else 0
        is_torn = enabled and not _ends_with_newline(self._path)
        self._file = AppendFile(self._path if enabled else Path(os.devnull))
        if is_torn:
            self._file.write(b"\n")  # Otherwise the next line would be appended to the torn one, and lost with it.

    def has_saves(self) -> bool:
        """Return whether an earlier attempt committed a checkpoint."""
        return has_saves(read_events(self._path))

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


def _points(records: Iterable[dict[str, Any]], events: Iterable[dict[str, Any]]) -> Iterator[Point]:
    """Yield the scalars of all lines, with the times and speeds in the event log.

    A line without an event, as in logs of older versions, has the time of the line before it.
    """
    times: dict[tuple[str, int], float] = {}
    speeds: dict[int, float] = {}
    for event in events:
        is_train = event["event"] == "throughput"
        if (is_train or event["event"] == "evaluation") and _is_finite(event.get("time")):
            times["train" if is_train else "test", event["step"]] = event["time"]
            if is_train and _is_finite(event.get("images_per_s")):
                speeds[event["step"]] = event["images_per_s"]
    time_s = min(times.values(), default=time.time())
    for record in records:
        step, split = record["step"], record["split"]
        time_s = times.get((split, step), time_s)
        yield _point(record, time_s, speeds.get(step) if split == "train" else None)


def _point(record: dict[str, Any], time_s: float, images_per_s: float | None) -> Point:
    names = ("loss", "accuracy", "learning_rate")
    scalars = {name: record[name] for name in names if _is_finite(record.get(name))}
    if images_per_s is not None:
        scalars["images_per_second"] = images_per_s
    return Point(record["step"], record["split"], scalars, time_s)


def read_metrics(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield each record of a metrics file with its line, up to the first torn or invalid line."""
    if path.exists():
        with path.open("rb") as lines:
            yield from parse_metrics(lines)


def parse_metrics(lines: Iterable[bytes]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield the record of each line with the line, up to the first torn or invalid one."""
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


def with_test_line(lines: bytes, found: bytes, step: int) -> bytes:
    """Return the lines of a checkpoint, and the test line of its step if it follows them in a metrics file.

    A signal may interrupt an evaluation. The next start makes it from the same state, when the checkpoint is committed.

    Args:
        lines: the lines of the checkpoint.
        found: the content of the file.
        step: the step of the checkpoint.
    """
    following = found[len(lines) :].splitlines(keepends=True)[:1] if found.startswith(lines) else []
    for record, line in parse_metrics(following):
        if (record["step"], record["split"]) == (step, "test") and 0 <= record["accuracy"] <= 1:
            return lines + line
    return lines


def accuracy_at(step: int, records: Iterable[dict[str, Any]]) -> float | None:
    """Return the test accuracy that the records of a metrics file have at a step, None if there is none."""
    return next((r["accuracy"] for r in records if r["split"] == "test" and r["step"] == step), None)


def read_events(path: Path, *, max_bytes: int | None = None) -> list[dict[str, Any]]:
    """Return the valid records of an `events.jsonl`, or of its last `max_bytes`; none if there is no file."""
    if not path.exists():
        return []
    events = []
    with path.open("rb") as lines:
        if max_bytes is not None:
            lines.seek(max(0, path.stat().st_size - max_bytes))
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


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def _is_step(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _ends_with_newline(path: Path) -> bool:
    if not path.exists():
        return True
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")
