"""Read a dataset that TensorFlow Datasets has prepared, without TensorFlow: ArrayRecord or TFRecord files.

Each record is a `tf.train.Example` with a PNG image and a label. TensorFlow Datasets sorts the records by the MD5 of
split and index; this module restores the original order, so that all layouts of a dataset give the same arrays.
"""

import hashlib
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mnist_jax.training.array_files import DataError

MAX_BYTES = 2**28  # of a file; those of MNIST have 23 MB
SIDE_PX = 28
# The records are small and have two fields, so their places are searched for instead of parsed: 60,000 records take
# 1 s instead of 6 s with Pillow. The caller verifies the result.
IMAGE_HEADER = b"IHDR" + struct.pack(">IIBBBBB", SIDE_PX, SIDE_PX, 8, 0, 0, 0, 0)  # 8 bits of grey, not interlaced
IMAGE_DATA = b"IDAT"
LABEL = re.compile(rb"\n\x05label\x12\x05\x1a\x03\n\x01([\x00-\x7f])", re.DOTALL)  # an Int64List of one value


def files_of(folder: Path, name: str, split: str) -> list[Path]:
    """Return the files of a split of a prepared dataset in their order; ArrayRecord files if there are both kinds."""
    for kind in ("array_record", "tfrecord"):
        if found := sorted(folder.glob(f"{name}-{split}.{kind}*")):
            return found
    return []


def read_split(files: Sequence[Path], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the images and labels of a split in the original order: [N, 28, 28] uint8, [N] uint8.

    Raises:
        DataError: a file cannot be read, or holds other records.
    """
    try:
        examples = [_parse(record) for path in files for record in _read_records(path)]
        if not examples:
            raise ValueError("it holds no records")
        rows = np.frombuffer(b"".join(pixels for pixels, _ in examples), np.uint8)
        images = _unfilter(rows.reshape(len(examples), SIDE_PX, 1 + SIDE_PX))
    except (OSError, RuntimeError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"{files[0]} cannot be used ({error})") from error
    order = _order(split, len(examples))
    labels = np.array([label for _, label in examples], np.uint8)
    original_images, original_labels = np.empty_like(images), np.empty_like(labels)
    original_images[order], original_labels[order] = images, labels
    return original_images, original_labels


def _read_records(path: Path) -> Iterator[bytes]:
    """Yield the records of a file."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES:,} bytes")
    if ".array_record" in path.name:
        yield from _read_array_record(path)
        return
    # A TFRecord file: length, checksum of the length, record, checksum of the record. The caller verifies the pixels.
    content = path.read_bytes()
    place = 0
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        if length > len(content) - place - 16:
            raise ValueError("it ends in a record")
        yield content[place + 12 : place + 12 + length]
        place += 16 + length


def _read_array_record(path: Path) -> Sequence[bytes]:
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise ValueError("this format needs the package array_record, which is not installed") from error
    reader = ArrayRecordReader(str(path))
    try:
        return reader.read_all()
    finally:
        reader.close()


def _parse(record: bytes) -> tuple[bytes, int]:
    """Return the filtered rows of the image, 28 times 29 bytes, and the label."""
    header, label = record.find(IMAGE_HEADER), LABEL.search(record)
    start = record.find(IMAGE_DATA, header)
    if header < 0 or start < 0 or label is None:
        raise ValueError(f"a record holds no grey PNG image of {SIDE_PX}×{SIDE_PX} pixels with a label")
    size = SIDE_PX * (1 + SIDE_PX)
    rows = zlib.decompressobj().decompress(record[start + len(IMAGE_DATA) :], size)
    if len(rows) != size:
        raise ValueError("a record holds a corrupt image")
    return rows, label[1][0]


def _unfilter(rows: np.ndarray) -> np.ndarray:
    """Undo the filters of PNG (RFC 2083, 6) in images of one byte per pixel: [N, H, 1 + W] uint8 -> [N, H, W] uint8.

    The first byte of a row is its filter: the difference to the pixel on the left (1), above (2), their mean (3), or
    to the nearest of left, above and above left to left + above - above left (4).
    """
    filters, pixels = rows[..., 0], rows[..., 1:].copy()
    if filters.max(initial=0) > 4:
        raise ValueError("a record holds a corrupt image")
    count, height, width = pixels.shape
    above = np.zeros((count, width), np.uint8)
    for y in range(height):
        row, kind = pixels[:, y], filters[:, y]
        row[kind == 1] = np.cumsum(row[kind == 1], axis=1, dtype=np.uint8)
        row[kind == 2] += above[kind == 2]
        for chosen, predict in ((kind == 3, _mean), (kind == 4, _paeth)):
            part, upper = row[chosen], above[chosen].astype(np.int16)
            left = corner = np.zeros(len(part), np.int16)
            for x in range(width if len(part) else 0):
                part[:, x] += predict(left, upper[:, x], corner).astype(np.uint8)
                left, corner = part[:, x].astype(np.int16), upper[:, x]
            row[chosen] = part
        above = row
    return pixels


def _mean(left: np.ndarray, above: np.ndarray, _: np.ndarray) -> np.ndarray:
    return (left + above) // 2


def _paeth(left: np.ndarray, above: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """Return the nearest of three neighbours to left + above - corner; the first of equals."""
    from_left, from_above, from_corner = abs(above - corner), abs(left - corner), abs(left + above - 2 * corner)
    is_left = (from_left <= from_above) & (from_left <= from_corner)
    return np.where(is_left, left, np.where(from_above <= from_corner, above, corner))


def _order(split: str, count: int) -> np.ndarray:
    """Return the original index of each record: TensorFlow Datasets sorts by the MD5 of split and index."""
    salt = hashlib.md5(split.encode(), usedforsecurity=False)

    def digest(index: int) -> bytes:
        md5 = salt.copy()
        md5.update(b"%d" % index)
        return md5.digest()

    return np.array(sorted(range(count), key=digest), np.int64)
