"""The images: for our own runs the flags that name them, for the others a folder of the four files."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mnist_jax.training import data
from mnist_jax.training.data import FILES

Array = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


class Images(NamedTuple):
    """Where the contestants find the same images."""

    flags: tuple[str, ...]  # for ours
    folder: Path  # for the others


def prepare(data_dir: Path | None, folder: Path, *, notify: Callable[[str], None], digits_may_do: bool) -> Images:
    """Find MNIST, and lay it out in `folder` for the others unless `data_dir` is such a folder.

    Args:
        data_dir: the folder of the four official files, if the user named one.
        folder: an empty one.
        notify: takes the notice of a download.
        digits_may_do: whether the built-in digits may stand in for MNIST where that cannot be had.

    Raises:
        DataError: MNIST cannot be had.
    """
    if data_dir is not None:
        data.load("mnist", data_dir, notify=notify)  # It checks the files.
        return Images(("--dataset", "mnist", "--data-dir", str(data_dir.absolute())), data_dir.absolute())
    name = "mnist"
    try:
        dataset = data.load(name, notify=notify)
    except data.UnreachableError:
        if not digits_may_do:
            raise
        name = "digits"
        dataset = data.load(name, notify=notify)
    for part, file in FILES.items():
        write(folder / file, getattr(dataset, part).astype(np.uint8).squeeze())
    return Images(("--dataset", name), folder)


def write(path: Path, array: Array) -> None:
    """Write an array of uint8 as a gzipped IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=1))


def read(folder: Path, most: int | None = None) -> dict[str, Array]:
    """Return `*_images`, [N, 28, 28] uint8, and `*_labels`, [N] uint8, of the four files in a folder.

    `most`: leave out the images after so many, as a trial does.
    """
    return {part: _read(folder / file)[:most] for part, file in FILES.items()}


def _read(path: Path) -> Array:
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
