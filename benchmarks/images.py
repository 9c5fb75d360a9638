"""The dataset: flags for our own runs, a folder with the four files for the others."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mnist_jax.training import data
from mnist_jax.training.layouts import FILES

Array = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
# With --quick the numbers mean nothing: the model compiles fast, and its programs are those of the tests.
DIGITS = ("--dataset", "digits", "--model", "cnn-tiny", "--schedule", "constant", "--batch-size", "64")


class Images(NamedTuple):
    """Where each contestant finds the same images."""

    flags: tuple[str, ...]  # for ours
    folder: Path  # for the others


def prepare(data_dir: Path | None, folder: Path, *, notify: Callable[[str], None], allow_digits: bool) -> Images:
    """Find MNIST, and write its files to `folder` for the others unless `data_dir` has them.

    Args:
        data_dir: folder with the four official files, None to download them.
        folder: an empty folder.
        notify: prints a line about the download.
        allow_digits: whether to use the built-in digits if MNIST cannot be downloaded.

    Raises:
        DataError: MNIST cannot be loaded.
    """
    if data_dir is not None:
        data.load("mnist", data_dir, notify=notify)  # checks the files
        return Images(("--dataset", "mnist", "--data-dir", str(data_dir.absolute())), data_dir.absolute())
    flags: tuple[str, ...] = ("--dataset", "mnist")
    try:
        dataset = data.load("mnist", notify=notify)
    except data.UnreachableError:
        if not allow_digits:
            raise
        flags = DIGITS
        dataset = data.load("digits", notify=notify)
    for part, file in FILES.items():
        write(folder / file, getattr(dataset, part).astype(np.uint8).squeeze())
    return Images(flags, folder)


def write(path: Path, array: Array) -> None:
    """Write an array of uint8 as a gzipped IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=1))


def read(folder: Path, limit: int | None = None) -> dict[str, Array]:
    """Return `*_images`, [N, 28, 28] uint8, and `*_labels`, [N] uint8, of the four files in a folder.

    `limit`: the number of images of each part, None for all.
    """
    return {part: _read(folder / file)[:limit] for part, file in FILES.items()}


def _read(path: Path) -> Array:
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
