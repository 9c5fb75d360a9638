"""The images: where they come from, and that they are the right ones.

MNIST and its two sisters come through TensorFlow Datasets: it registers their addresses, sizes, SHA-256 and class
names, of which there is a copy here, and is the verified downloader; TensorFlow itself is not needed. `digits` comes
with scikit-learn.
"""

import base64
import gzip
import hashlib
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mnist_jax.config import DatasetName
from mnist_jax.runtime.preemption import start_in_thread

FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}
DIGITS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
PROBE_TIMEOUT_S = 3.0
STALL_TIMEOUT_S = 20.0


class DataError(Exception):
    """A file of a data set is missing, damaged or not what it should be; the message names it and the way out."""


class UnreachableError(DataError):
    """A file is not on disk, and cannot be downloaded now."""


@dataclass(frozen=True)
class Dataset:
    """Labelled grey images in memory.

    `*_images`: [N, 28, 28, 1] uint8, ink 255 on ground 0. `*_labels`: [N] int32 in [0, 10).
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of all pixels and labels: two data sets with the same one train alike."""
        digest = hashlib.sha256()
        for array in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(f"{array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def resolve(name: DatasetName, data_dir: Path | None, *, notify: Callable[[str], None]) -> DatasetName:
    """Return the name of the data set that "auto" stands for on this machine; any other name as it is.

    Args:
        name: the data set's name, or "auto".
        data_dir: the folder of the four files, if the user named one; then "auto" is MNIST.
        notify: takes the notice that the built-in digits stand in for MNIST, and why.
    """
    if name != "auto":
        return name
    if data_dir is not None:
        return "mnist"
    try:
        _locate("mnist", notify=notify)
    except UnreachableError as error:
        notify(
            f"notice: training on the built-in digits (1,797 images) instead of MNIST (70,000): {error}. "
            "To train on MNIST, come back with a network, or give --data-dir the folder that holds its four files."
        )
        return "digits"
    return "mnist"


def load(name: str, data_dir: Path | None = None, *, notify: Callable[[str], None]) -> Dataset:
    """Return a data set, each of its files checked against its registered SHA-256.

    Args:
        name: "mnist", "fashion_mnist", "kmnist" or "digits".
        data_dir: a folder that holds the four files; by default they are where TensorFlow Datasets keeps its
            downloads, and are downloaded if they are not there.
        notify: takes a line when a download begins.

    Raises:
        DataError: a file is missing, truncated, damaged, another one, or cannot be downloaded.
    """
    if name == "digits":
        if data_dir is not None:
            raise DataError(f"--data-dir {data_dir} has no use for the digits, which are built in; leave it out")
        return _digits()
    if name == "auto":
        raise DataError("dataset=auto says not which; name one, or start anew with --fresh")
    return _unpack(name, _in_folder(data_dir) if data_dir is not None else _locate(name, notify=notify), data_dir)


def class_names(name: str) -> tuple[str, ...]:
    """Return what the ten labels of a data set mean."""
    return REGISTRY[name].class_names if name in REGISTRY else DIGITS


def begin_to_load(name: str, data_dir: Path | None) -> "Future[Dataset] | None":
    """Begin to load in a thread, as `load` does, where there are files that only need to be unpacked.

    Unpacking and hashing, 0.25 s, hold no lock of the interpreter: they cost nothing while the caller imports JAX. A
    download brings imports of its own, and the built-in digits take no time; they are not begun.
    """
    if name not in REGISTRY:
        return None
    paths = _in_folder(data_dir) if data_dir is not None else _on_disk(name)
    if len(paths) < len(FILES):
        return None

    def work() -> Dataset:
        dataset = _unpack(name, paths, data_dir)
        _ = dataset.fingerprint  # It is taken here, and kept.
        return dataset

    return start_in_thread(work)


def _unpack(name: str, paths: Mapping[str, Path], data_dir: Path | None) -> Dataset:
    """Return the data set in the four files at `paths`, those of the user's folder or of TensorFlow Datasets' own."""
    if data_dir is not None:
        way_out = "put the original file there, or name another folder that holds it: --data-dir DIR"
    else:
        way_out = "delete it, and the next start downloads it again"
    sources = _sources(name)
    arrays = {part: _parse_idx(_read_verified(path, sources[part], way_out)) for part, path in paths.items()}
    return Dataset(
        name=name,
        train_images=arrays["train_images"][..., np.newaxis],
        train_labels=arrays["train_labels"].astype(np.int32),
        test_images=arrays["test_images"][..., np.newaxis],
        test_labels=arrays["test_labels"].astype(np.int32),
        class_names=class_names(name),
    )


class Source(NamedTuple):
    """What the registry knows of a file: its address, its size in bytes, its SHA-256."""

    url: str
    size: int
    sha256: str


class Entry(NamedTuple):
    """What the registry knows of a data set: the folder of its files, their sizes and SHA-256, and its classes."""

    url: str
    files: dict[str, tuple[int, str]]
    class_names: tuple[str, ...]


# A copy of what TensorFlow Datasets has registered; a test compares the two. To ask it takes 0.4 s of imports, a fifth
# of the time in which a run was resumed.
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


def _sources(name: str) -> dict[str, Source]:
    """Return where each part of a data set comes from."""
    entry = REGISTRY[name]
    return {part: Source(f"{entry.url}/{FILES[part]}", *about) for part, about in entry.files.items()}


def _downloads() -> Path:
    """Return the folder in which TensorFlow Datasets keeps what it downloads."""
    return Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser() / "downloads"


def _locate(name: str, *, notify: Callable[[str], None]) -> dict[str, Path]:
    """Return the paths of the four files in TensorFlow Datasets' folder, downloaded first where they are not there.

    Raises:
        UnreachableError: a file is not there, and its server does not answer or breaks off.
        DataError: a server sent a file with another SHA-256.
    """
    paths = _on_disk(name)
    missing = {part: source for part, source in _sources(name).items() if part not in paths}
    if missing:
        # With no network the downloader itself tries again for more than three minutes.
        _probe(next(iter(missing.values())).url)
        megabytes = sum(source.size for source in missing.values()) / 1e6
        notify(f"downloading {name}: {len(missing)} files, {megabytes:.1f} MB, into {_downloads()}")
        paths |= _download(name, missing, _downloads())
    return paths


def _in_folder(data_dir: Path) -> dict[str, Path]:
    """Return the paths of the four files in the user's folder, whether they are there or not."""
    return {part: data_dir / file for part, file in FILES.items()}


def _on_disk(name: str) -> dict[str, Path]:
    """Return the paths of those of the four files that are in TensorFlow Datasets' folder."""
    folders = _downloads(), _downloads() / name
    return {part: path for part, source in _sources(name).items() if (path := _find(source, folders))}


def _find(source: Source, folders: Iterable[Path]) -> Path | None:
    """Return a file that TensorFlow Datasets has downloaded into one of the folders, or None where it is not there.

    It names a file by its address and, in base64, its SHA-256; and it counts a file when its information is there.
    """
    digest = base64.urlsafe_b64encode(bytes.fromhex(source.sha256)).decode().rstrip("=")
    found = (path for folder in folders for path in folder.glob(f"*{digest}.gz"))
    return next((path for path in found if path.with_name(f"{path.name}.INFO").exists()), None)


def _download(name: str, sources: Mapping[str, Source], downloads: Path) -> dict[str, Path]:
    """Have TensorFlow Datasets download files and check their SHA-256, and keep those that are whole where it does.

    When it fails it leaves what it had of a file behind, so it works in a folder of its own; and it would wait for
    ever for a server that falls silent.
    """
    import tensorflow_datasets as tfds  # 0.4 s, for those alone whom it serves
    from tensorflow_datasets.core.download.checksums import UrlInfo
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
    from tensorflow_datasets.core.download.resource import get_info_path

    tfds.disable_progress_bar()
    infos = {source.url: UrlInfo(source.size, source.sha256, FILES[part]) for part, source in sources.items()}
    try:
        (downloads / name).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=downloads, prefix=f"{name}.partial.", ignore_cleanup_errors=True
        ) as partial:
            manager = tfds.download.DownloadManager(download_dir=partial, dataset_name=name, url_infos=infos)
            arrived = start_in_thread(lambda: manager.download(list(infos)))
            before = -1
            while not wait([arrived], timeout=STALL_TIMEOUT_S).done:
                now = sum(file.stat().st_size for file in Path(partial).rglob("*") if file.is_file())
                if now == before:
                    raise UnreachableError(
                        f"the download of {name} stalled: nothing came in for {STALL_TIMEOUT_S:.0f} s"
                    )
                before = now
            paths = [Path(path) for path in arrived.result()]
            for path in paths:
                for file in (Path(get_info_path(path)), path):  # A file counts when its information is there.
                    file.replace(downloads / name / file.name)
            return {part: downloads / name / path.name for part, path in zip(sources, paths, strict=True)}
    except NonMatchingChecksumError as error:
        raise DataError(f"the server of {name} sent a file that is not the registered one: {error}") from error
    except UnreachableError:
        raise
    except Exception as error:  # Of several libraries: they have no common one for a connection that breaks.
        raise UnreachableError(f"the download of {name} broke off ({error})") from error


def _probe(url: str) -> None:
    """Raise UnreachableError unless the server of `url` answers within PROBE_TIMEOUT_S."""

    def ask() -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=PROBE_TIMEOUT_S).close()
        except urllib.error.HTTPError as error:
            error.close()  # It holds the connection.
            raise

    # In a thread, because looking up a name has no time limit of its own.
    answer = start_in_thread(ask)
    if not wait([answer], timeout=PROBE_TIMEOUT_S).done:
        raise UnreachableError(f"{url} does not answer within {PROBE_TIMEOUT_S:.0f} s")
    error = answer.exception()
    if error is not None:
        raise UnreachableError(f"{url} cannot be reached ({error})") from error


def _read_verified(path: Path, source: Source, way_out: str) -> bytes:
    """Return the bytes of a file whose size and SHA-256 are the registered ones."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): {way_out}") from error
    if len(content) != source.size:
        raise DataError(f"{path} has {len(content):,} bytes instead of {source.size:,}: {way_out}")
    found = hashlib.sha256(content).hexdigest()
    if found != source.sha256:
        raise DataError(
            f"{path} is damaged or another file: its SHA-256 is {found} instead of {source.sha256}: {way_out}"
        )
    return content


def _parse_idx(content: bytes) -> np.ndarray:
    """Return the array in a gzipped IDX file of bytes: two zeros, type 8, rank, big-endian sizes, elements.

    The format is described on the page of the MNIST database of Y. LeCun, C. Cortes and C. J. C. Burges.
    """
    raw = gzip.decompress(content)
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", count=rank, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _digits() -> Dataset:
    """Return the 1,797 handwritten 8×8 digits of scikit-learn (E. Alpaydin, C. Kaynak), every fifth one for the test.

    Each pixel becomes 3×3 of them, with a margin of 2: 28×28.

    Raises:
        DataError: they are not where scikit-learn has them.
    """
    # The file and not `sklearn.datasets.load_digits`, for whose import, with SciPy's statistics, each start paid 0.7 s.
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
    return Dataset(
        name="digits",
        train_images=images[~is_test],
        train_labels=labels[~is_test],
        test_images=images[is_test],
        test_labels=labels[is_test],
        class_names=DIGITS,
    )
