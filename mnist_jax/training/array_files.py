"""Read arrays from files that anybody may have written: IDX files, packed or not, and npz files.

The size in a header is compared with the size of the file before memory is allocated, and nothing is unpickled.
"""

import gzip
import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

MAX_BYTES = 2**32  # of the content of a file
MAX_DEFLATE_RATIO = 1032  # No input of zlib's format grows more (M. Adler, zlib's technical details).
MAX_RANK = 4
GZIP_MAGIC = b"\x1f\x8b"
IDX_TYPES: dict[int, np.dtype[Any]] = {8: np.dtype(np.uint8), 12: np.dtype(">i4")}


class DataError(Exception):
    """A file of a dataset is missing, corrupt or another one; the message names the file and what to do."""


def read_idx(path: Path) -> np.ndarray:
    """Return the array in an IDX file of uint8 or int32, gzipped or not, whatever its name is.

    Format: two zeros, type, rank, big-endian sizes, elements. Source: the page of the MNIST database of Y. LeCun,
    C. Cortes and C. J. C. Burges.

    Raises:
        DataError: the file cannot be read, or is no such file.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a regular file")  # Opening a named pipe would wait for a writer.
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            is_packed = file.read(2) == GZIP_MAGIC
            file.seek(0)
            stream: IO[bytes] = gzip.GzipFile(fileobj=file) if is_packed else file  # type: ignore[assignment]
            return _read_idx(stream, length * (MAX_DEFLATE_RATIO if is_packed else 1))
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> DataError:
    if reason := getattr(error, "strerror", None):
        return DataError(f"{path} cannot be read ({reason})")
    return DataError(f"{path} is corrupt or another file ({error})")


def _read_idx(stream: IO[bytes], most_bytes: int) -> np.ndarray:
    """Return the array in an unpacked stream that can hold `most_bytes`; raise ValueError if it is no IDX file."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in IDX_TYPES or not 1 <= magic[3] <= MAX_RANK:
        raise ValueError(f"it is not an IDX file of uint8 or int32: it begins with {magic.hex() or 'nothing'}")
    dtype, rank = IDX_TYPES[magic[2]], magic[3]
    sizes = stream.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise ValueError("it ends in its header")
    shape = tuple(map(int, np.frombuffer(sizes, ">u4")))
    size = math.prod(shape) * dtype.itemsize
    if size > min(most_bytes, MAX_BYTES):
        raise ValueError(f"its header says {list(shape)} {dtype.name}, which is more than the file can hold")
    content = stream.read(size + 1)
    if len(content) != size:
        more = "more" if len(content) > size else f"{len(content):,}"
        raise ValueError(f"its header says {list(shape)} {dtype.name}, {size:,} bytes, but there are {more}")
    return np.frombuffer(content, dtype).reshape(shape)


def read_npz(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """Return arrays of uint8 in an npz file, by their names.

    Raises:
        DataError: the file cannot be read, or lacks such an array.
    """
    corrupt = (EOFError, OSError, ValueError, zlib.error)
    unsupported = (zipfile.BadZipFile, NotImplementedError, RuntimeError, KeyError)
    try:
        with zipfile.ZipFile(path) as archive:
            return [_read_npy(archive, archive.getinfo(f"{name}.npy")) for name in names]
    except (*corrupt, *unsupported) as error:
        raise _unusable(path, error) from error


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """Return the array of uint8 in a member of an npz file; raise ValueError if it is none.

    `np.load` would allocate what the header says.
    """
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, is_fortran, dtype = read_header(file)
        size = math.prod(shape)
        if dtype != np.uint8 or is_fortran:
            raise ValueError(f"{info.filename} holds {dtype.name}, not uint8 in C order")
        if size > min(info.file_size, info.compress_size * MAX_DEFLATE_RATIO, MAX_BYTES):
            raise ValueError(f"{info.filename} says {list(shape)}, which is more than it can hold")
        content = file.read(size + 1)
    if len(content) != size:
        raise ValueError(f"{info.filename} says {list(shape)}, {size:,} bytes, but there are others")
    return np.frombuffer(content, np.uint8).reshape(shape)


def idx_sha256(array: np.ndarray) -> str:
    """Return the SHA-256 that an unpacked IDX file of an array of uint8 has, in C order."""
    digest = hashlib.sha256(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes())
    digest.update(np.ascontiguousarray(array, np.uint8).data)
    return digest.hexdigest()
