"""Datasets: where their files are, how they are downloaded, and that they are the right ones.

MNIST, Fashion-MNIST and KMNIST come from a folder, from the cache of TensorFlow Datasets, or from their servers. The
digits come with scikit-learn.
"""

import base64
import gzip
import hashlib
import http.client
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mnist_jax.config import DatasetName
from mnist_jax.console import print_stderr
from mnist_jax.runtime.preemption import start_in_thread

FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}
DIGITS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
ANSWER_TIMEOUT_S = 3.0  # Without a network, the user waits this long.
STALL_TIMEOUT_S = 20.0


class DataError(Exception):
    """A file of a dataset is missing, corrupt or another one; the message names the file and what to do."""


class UnreachableError(DataError):
    """A file is not on disk, and cannot be downloaded now."""


@dataclass(frozen=True)
class Dataset:
    """Labelled grayscale images in memory.

    `*_images`: [N, 28, 28, 1] uint8, ink 255 on background 0. `*_labels`: [N] int32 in [0, 10).
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all pixels and labels."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def resolve(name: DatasetName, data_dir: Path | None, *, notify: Callable[[str], None]) -> DatasetName:
    """Return the dataset that "auto" stands for on this machine; return any other name as it is.

    Args:
        name: the name of the dataset, or "auto".
        data_dir: folder with the four files. With it, "auto" is MNIST.
        notify: receives a line for each download, and a notice if the built-in digits replace MNIST.
    """
    if name != "auto":
        return name
    if data_dir is not None:
        return "mnist"
    try:
        _locate("mnist", notify=notify)
    except UnreachableError as error:
        notify(f"notice: training on the built-in digits (1,797 images) instead of MNIST (70,000): {error}")
        return "digits"
    return "mnist"


def load(name: str, data_dir: Path | None = None, *, notify: Callable[[str], None]) -> Dataset:
    """Return a dataset. The SHA-256 of each file is verified.

    Args:
        name: "mnist", "fashion_mnist", "kmnist" or "digits".
        data_dir: folder with the four files. The default is the cache of TensorFlow Datasets; missing files are
            downloaded into it.
        notify: receives a line for each download.

    Raises:
        DataError: a file is missing, corrupt or another one, or cannot be downloaded.
    """
    if name == "digits":
        if data_dir is not None:
            raise DataError(f"--data-dir {data_dir} does not apply to the digits, which are built in; leave it out")
        return _digits()
    if name == "auto":
        raise DataError("dataset=auto names no dataset; name one with --dataset, or start over with --fresh")
    if data_dir is not None:
        way_out = "put the original file there, or name another folder with --data-dir DIR"
        return _unpack(name, {part: data_dir / file for part, file in FILES.items()}, way_out)
    return _unpack(name, _locate(name, notify=notify), "delete it, and the next start downloads it again")


def class_names(name: str) -> tuple[str, ...]:
    """Return the names of the ten classes of a dataset."""
    return REGISTRY[name].class_names if name in REGISTRY else DIGITS


def begin_to_load(name: str, data_dir: Path | None) -> "Future[Dataset]":
    """Start to load a dataset in a thread, while the caller imports JAX."""

    def work() -> Dataset:
        dataset = load(name, data_dir, notify=print_stderr)
        _ = dataset.fingerprint  # cached in the dataset
        return dataset

    return start_in_thread(work)


def _unpack(name: str, paths: Mapping[str, Path], way_out: str) -> Dataset:
    """Return the dataset in four files. `way_out` says what to do if one of them is not usable."""
    arrays = {}
    for part, registered in REGISTRY[name].files.items():
        try:
            content = paths[part].read_bytes()
        except OSError as error:
            raise DataError(f"{paths[part]} cannot be read ({error.strerror}); {way_out}") from error
        _verify(content, registered, origin=str(paths[part]), way_out=way_out)
        arrays[part] = _parse_idx(content)
    return Dataset(
        name=name,
        train_images=arrays["train_images"][..., np.newaxis],
        train_labels=arrays["train_labels"].astype(np.int32),
        test_images=arrays["test_images"][..., np.newaxis],
        test_labels=arrays["test_labels"].astype(np.int32),
        class_names=class_names(name),
    )


class Entry(NamedTuple):
    """A dataset in the registry: URL of the folder of its files, their sizes in bytes and SHA-256, and its classes."""

    url: str
    files: dict[str, tuple[int, str]]
    class_names: tuple[str, ...]


# A copy of the registry of TensorFlow Datasets, which takes 0.4 s to import; a test compares the two.
REGISTRY = {
    "mnist": Entry(
        "https://storage.googleapis.com/cvdf-datasets/mnist",
        {
            "train_images": (9_912_422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
            "train_labels": (28_881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
            "test_images": (1_648_877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
            "test_labels": (4_542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        },
        DIGITS,
    ),
    "fashion_mnist": Entry(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        {
            "train_images": (26_421_880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
            "train_labels": (29_515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
            "test_images": (4_422_102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
            "test_labels": (5_148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
        },
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "kmnist": Entry(
        "http://codh.rois.ac.jp/kmnist/dataset/kmnist",
        {
            "train_images": (18_165_135, "51467d22d8cc72929e2a028a0428f2086b092bb31cfb79c69cc0a90ce135fde4"),
            "train_labels": (29_497, "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17"),
            "test_images": (3_041_136, "edd7a857845ad6bb1d0ba43fe7e794d164fe2dce499a1694695a792adfac43c5"),
            "test_labels": (5_120, "20bb9a0ef54c7db3efc55a92eef5582c109615df22683c380526788f98e42a1c"),
        },
        ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    ),
}


def _locate(name: str, *, notify: Callable[[str], None]) -> dict[str, Path]:
    """Return the paths of the four files in the cache of TensorFlow Datasets. Missing files are downloaded first.

    Raises:
        UnreachableError: a file is missing and its server does not deliver it.
        DataError: a server delivers another file.
    """
    try:
        cache = Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser() / "downloads"
    except RuntimeError as error:
        raise UnreachableError(f"there is no home directory to download to ({error})") from error
    entry, paths = REGISTRY[name], {}
    for part, registered in entry.files.items():
        # In the cache, the name of a file ends with its SHA-256 in base64.
        ending = base64.urlsafe_b64encode(bytes.fromhex(registered[1])).decode().rstrip("=") + ".gz"
        cached = [path for folder in (cache, cache / name) for path in folder.glob(f"*{ending}")]
        paths[part] = cached[0] if cached else cache / name / f"{part}.{ending}"
        if not cached:
            _download(f"{entry.url}/{FILES[part]}", paths[part], registered, notify=notify)
    return paths


def _download(url: str, path: Path, registered: tuple[int, str], *, notify: Callable[[str], None]) -> None:
    """Download a file, verify it, and move it to its path. The move is atomic: several processes may download it."""
    way_out = "start again with a network, or pass the folder of its files as --data-dir DIR"
    # In a thread, because the lookup of a host name has no time limit.
    answer = start_in_thread(lambda: urllib.request.urlopen(url, timeout=STALL_TIMEOUT_S))
    if not wait([answer], timeout=ANSWER_TIMEOUT_S).done:
        raise UnreachableError(f"{url} does not answer within {ANSWER_TIMEOUT_S:.0f} s; {way_out}")
    try:
        with answer.result() as response:
            notify(f"downloading {url} ({registered[0] / 1e6:.1f} MB) into {path.parent}")
            content = response.read()
        _verify(content, registered, origin=url, way_out=way_out)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="partial.", ignore_cleanup_errors=True) as folder:
            partial = Path(folder) / path.name
            partial.write_bytes(content)
            partial.replace(path)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # It holds the connection.
        raise UnreachableError(f"the download of {url} failed ({error}); {way_out}") from error


def _verify(content: bytes, registered: tuple[int, str], *, origin: str, way_out: str) -> None:
    """Raise DataError unless a file has the registered size and SHA-256."""
    size, sha256 = len(content), hashlib.sha256(content).hexdigest()
    if (size, sha256) != registered:
        raise DataError(
            f"{origin} is corrupt or another file: {size:,} bytes with SHA-256 {sha256} instead of "
            f"{registered[0]:,} bytes with {registered[1]}; {way_out}"
        )


def _parse_idx(content: bytes) -> np.ndarray:
    """Return the array in a gzipped IDX file of bytes: two zeros, type 8, rank, big-endian sizes, elements.

    Format: the page of the MNIST database of Y. LeCun, C. Cortes and C. J. C. Burges.
    """
    raw = gzip.decompress(content)
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _digits() -> Dataset:
    """Return the 1,797 handwritten 8×8 digits of scikit-learn (E. Alpaydin, C. Kaynak). Every fifth is a test image.

    Each pixel becomes 3×3 pixels, with a margin of 2: 28×28.

    Raises:
        DataError: the installed scikit-learn has no such file.
    """
    # The file and not `sklearn.datasets.load_digits`, whose import takes 0.7 s.
    try:
        path = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
        table = np.loadtxt(str(path), delimiter=",").reshape(1797, 65)
    except (ImportError, OSError, ValueError) as error:
        raise DataError(
            f"scikit-learn's digits cannot be read ({error}); install another version of it, or name another --dataset"
        ) from error
    pixels = np.round(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = np.pad(np.kron(pixels, np.ones((1, 3, 3), np.uint8)), ((0, 0), (2, 2), (2, 2)))[..., np.newaxis]
    labels = table[:, -1].astype(np.int32)
    is_test = np.arange(len(labels)) % 5 == 4
    return Dataset("digits", images[~is_test], labels[~is_test], images[is_test], labels[is_test], DIGITS)
