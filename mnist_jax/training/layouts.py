"""Where programs keep MNIST and its relatives on disk: names of folders and files. Looking costs some calls of stat.

docs/data.md lists the layouts in this order.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mnist_jax.config import is_address
from mnist_jax.training.array_files import DataError, read_npz
from mnist_jax.training.tfds_records import files_of, read_split

FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}
TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
TFDS_VERSION = "3.0.1"


class Layout(NamedTuple):
    """A dataset on disk: either four IDX files, or a path and a function that returns its arrays by part."""

    path: Path
    program: str  # that writes this layout
    idx_files: Mapping[str, Path]
    read: Callable[[], dict[str, np.ndarray]] | None = None


def folders() -> Iterator[Path]:
    """Yield the folders to look in, without a download: of TensorFlow Datasets, of the user, and of Keras."""
    yield tfds_folder()
    yield from (Path(), Path("data"))
    for folder in ("~/data", os.environ.get("KERAS_HOME", "~/.keras") + "/datasets"):
        path = Path(os.path.expanduser(folder))  # It stays as it is if there is no home directory.
        if path.is_absolute():
            yield path


def tfds_folder() -> Path:
    """Return the folder of TensorFlow Datasets.

    Raises:
        DataError: TFDS_DATA_DIR is not the path of a folder, or there is no home directory.
    """
    name = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    if not name or is_address(name):
        raise DataError(f"TFDS_DATA_DIR={name} is {'an address' if name else 'empty'}; set it to a folder, or unset it")
    return Path(os.path.expanduser(name))


def layouts_in(folder: Path, name: str) -> Iterator[Layout]:
    """Yield what a folder seems to hold of a dataset, by the names of files."""
    below_folder = {
        ".": "IDX files",
        f"{TORCHVISION[name]}/raw": "torchvision",
        "raw": "torchvision",
        _dashed(name): "IDX files",
    }
    for below, program in below_folder.items():
        if (files := idx_files(folder / below))["train_images"].is_file():
            yield Layout(folder / below, program, files)
    path = folder / f"{_dashed(name)}.npz"
    if path.is_file():
        yield Layout(path, "Keras", {}, lambda: _read_keras(path))
    prepared = folder / name / TFDS_VERSION
    if files_of(prepared, name, "train"):
        yield Layout(prepared, "TensorFlow Datasets", {}, lambda: _read_tfds(prepared, name))


def idx_files(folder: Path) -> dict[str, Path]:
    """Return the paths of the four IDX files in a folder, under the first of their names that exists.

    A name has a dash or a dot before "idx", and ends with .gz or not. Without any, it is the official name.
    """
    found = {}
    for part, official in FILES.items():
        stem = official.removesuffix(".gz")
        names = [f"{name}{end}" for end in (".gz", "") for name in (stem, stem.replace("-idx", ".idx"))]
        found[part] = next((folder / name for name in names if (folder / name).is_file()), folder / official)
    return found


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _read_keras(path: Path) -> dict[str, np.ndarray]:
    return dict(zip(FILES, read_npz(path, ("x_train", "y_train", "x_test", "y_test")), strict=True))


def _read_tfds(folder: Path, name: str) -> dict[str, np.ndarray]:
    arrays: list[np.ndarray] = []
    for split in ("train", "test"):
        files = files_of(folder, name, split)
        if not files:
            raise DataError(f"{folder} holds no files of the split {split}")
        arrays += read_split(files, split)
    return dict(zip(FILES, arrays, strict=True))
