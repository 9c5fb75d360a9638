"""The files of a run that TensorBoard reads.

`tensorboard/train` and `tensorboard/test` have the lines of `metrics.jsonl` under the same tags, so that one chart
shows both curves. `tensorboard/report` has the images of a report.

TensorBoard is imported when the first event is written: it takes 0.1 s, and the first step must not wait for it.
"""

import re
import struct
import textwrap
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mnist_jax.records.append_file import AppendFile

SPLITS = ("train", "test")
_FILE = re.compile(r"events\.out\.tfevents\.([0-9]{10,20})")  # Our names: only these files are removed.
_DT_STRING, _DATA_CLASS_TENSOR = 7, 2  # of TensorFlow's TensorProto and of TensorBoard's SummaryMetadata


class Point(NamedTuple):
    """The scalars of a split at a step; `time_s` is the time of measurement in seconds since 1970."""

    step: int
    split: str
    scalars: Mapping[str, float]
    time_s: float


class ScalarWriter:
    """Write scalars into `tensorboard/train` and `tensorboard/test`.

    Each start of a run writes all points again, into new files that replace the old ones. TensorBoard's default reader
    ignores the record of a restart (SessionLog), and drops an old point only if a new one has the same or an earlier
    step. So the points of lost steps would stay if the run continues with other intervals.
    """

    def __init__(self, workdir: Path) -> None:
        """Open nothing yet."""
        self._folder, self._config_path = workdir / "tensorboard", workdir / "config.json"
        self._files: dict[str, AppendFile] = {}
        self._error: OSError | None = None

    @property
    def is_open(self) -> bool:
        """Whether the files of this start exist."""
        return bool(self._files)

    @property
    def write_error(self) -> OSError | None:
        """The error of the last write, None if everything is written."""
        return next((file.write_error for file in self._files.values() if file.write_error), self._error)

    def replace(self, points: Iterable[Point]) -> None:
        """Replace the files by new ones with all points of the run. If that fails, `is_open` stays false."""
        points = list(points)
        try:
            text = self._config_path.read_text() if self._config_path.exists() else ""
            self._files = {split: self._replace(split, text, points) for split in SPLITS}
            self._error = None
        except OSError as error:
            self._error = error

    def _replace(self, split: str, config: str, points: Iterable[Point]) -> AppendFile:
        """Replace the files of a split by one with its points; that of the training has the config as a text."""
        events: list[dict[str, Any]] = [{"session_log": {"status": "START"}}]
        if split == "train" and config:
            events.append({"summary": {"value": [_text("config", config)]}})
        return _replace_files(
            self._folder / split, [*events, *(_event(point) for point in points if point.split == split)]
        )

    def append(self, point: Point) -> None:
        """Write a point; an error is in `write_error` afterwards."""
        self._files[point.split].write(_encode(_event(point)))

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def replace_images(workdir: Path, step: int, images: Mapping[str, bytes]) -> None:
    """Replace the images in `tensorboard/report`, PNG files by their tags.

    Raises:
        OSError: they cannot be written.
    """
    values = []
    for tag, png in images.items():
        width, height = struct.unpack(">II", png[16:24])  # PNG specification, 11.2.2: the header is the first chunk.
        image = {"width": width, "height": height, "colorspace": 3, "encoded_image_string": png}
        values.append({"tag": tag, "image": image})
    _replace_files(workdir / "tensorboard" / "report", [{"step": step, "summary": {"value": values}}]).close()


def _replace_files(folder: Path, events: Iterable[dict[str, Any]]) -> AppendFile:
    """Replace our files in a folder by one with these events, which is returned.

    Raises:
        OSError: it cannot be written; the old files are unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    old = _files_in(folder)
    # A new name, because TensorBoard continues to read where it was in a file that it knows.
    number = max((int(path.name.rpartition(".")[2]) for path in old), default=-1) + 1
    partial = folder / "partial"  # TensorBoard reads files whose names contain "tfevents".
    partial.unlink(missing_ok=True)
    file = AppendFile(partial)
    try:
        file.write(_encode({"file_version": "brain.Event:2"}, *events))
        if file.write_error:
            raise file.write_error
        partial.rename(folder / f"events.out.tfevents.{number:010d}")
    except OSError:
        file.close()
        raise
    for path in old:
        path.unlink()
    return file


def _files_in(folder: Path) -> list[Path]:
    return [
        path for path in folder.iterdir() if _FILE.fullmatch(path.name) and (path.is_symlink() or not path.is_dir())
    ]


def _text(tag: str, text: str) -> dict[str, Any]:
    """Return a value for TensorBoard's text plugin, which reads Markdown: indented lines are shown as they are."""
    tensor = {"dtype": _DT_STRING, "string_val": [textwrap.indent(text, "    ").encode()]}
    plugin = {"plugin_data": {"plugin_name": "text"}, "data_class": _DATA_CLASS_TENSOR}
    return {"tag": tag, "metadata": plugin, "tensor": tensor}


def _event(point: Point) -> dict[str, Any]:
    values = [{"tag": tag, "simple_value": value} for tag, value in point.scalars.items()]
    return {"wall_time": point.time_s, "step": point.step, "summary": {"value": values}}


def _encode(*events: dict[str, Any]) -> bytes:
    """Return events as TensorBoard reads them, of the present time unless they have another one."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = bytearray()

    class Buffer:
        write = content.extend

    writer = RecordWriter(Buffer)
    for event in events:
        writer.write(Event(**{"wall_time": time.time(), **event}).SerializeToString())
    return bytes(content)
