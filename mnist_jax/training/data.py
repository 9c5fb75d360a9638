"""Datasets: where their files are, how they are downloaded, and that they are the right ones.

MNIST, Fashion-MNIST and KMNIST come from a folder, from the cache of TensorFlow Datasets, from another program's files,
or from their servers. The digits come with scikit-learn. "idx" are images of the user.
"""

import base64
import gzip
import hashlib
import http.client
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
from mnist_jax.training import layouts
from mnist_jax.training.array_files import DataError, idx_sha256, read_idx
from mnist_jax.training.layouts import FILES, Layout

DIGITS = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
ANSWER_TIMEOUT_S = 3.0  # Without a network, the user waits this long.
STALL_TIMEOUT_S = 20.0
MAX_SIDE_PX, MAX_CLASSES = 1024, 256  # of images of the user


class UnreachableError(DataError):
    """A file is not on disk, and cannot be downloaded now."""


@dataclass(frozen=True)
class Dataset:
    """Labelled grayscale images in memory.

    `*_images`: [N, 28, 28, 1] uint8, foreground 255 on background 0. `*_labels`: [N] int32 in [0, 10). The dataset
    "idx" has images [N, H, W, 1] and labels in [0, len(class_names)).
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.train_images.shape[1:3]

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
        data_dir: folder with the dataset. With it, "auto" is MNIST.
        notify: receives a line for each download, and a notice if the built-in digits replace MNIST.

    Raises:
        DataError: `data_dir` is not a folder, or "idx" has none; or a server or TFDS_DATA_DIR is wrong.
    """
    if name == "idx" and data_dir is None:
        raise DataError("dataset=idx needs the folder of its four IDX files; add --data-dir DIR")
    if data_dir is not None and not data_dir.is_dir():
        raise DataError(f"data_dir={data_dir} is not a folder; name the one that holds the dataset with --data-dir DIR")
    if name != "auto":
        return name
    if data_dir is not None or is_cached("mnist"):
        return "mnist"
    refused: list[str] = []
    if _search("mnist", notify=refused.append) is None:
        try:
            _locate("mnist", notify=notify)
        except UnreachableError as error:
            for line in refused:
                notify(line)
            notify(f"notice: training on the built-in digits (1,797 images) instead of MNIST (70,000): {error}")
            return "digits"
    return "mnist"


def load(name: str, data_dir: Path | None = None, *, notify: Callable[[str], None]) -> Dataset:
    """Return a dataset. Its files, or its pixels and labels, are those in the registry, by their SHA-256.

    Args:
        name: "mnist", "fashion_mnist", "kmnist", "digits" or "idx".
        data_dir: folder with the dataset in one of the layouts of docs/data.md; for "idx", with its four IDX files. The
            default is the cache of TensorFlow Datasets. What it lacks is looked for in the usual folders of other
            programs, and then downloaded into the cache.
        notify: receives a line for each download, and one that names the files of another program.

    Raises:
        DataError: a file is missing, corrupt or another one, or cannot be downloaded.
    """
    if name == "digits":
        if data_dir is not None:
            raise DataError(f"--data-dir {data_dir} does not apply to the digits, which are built in; leave it out")
        return _digits()
    if name == "auto":
        raise DataError("dataset=auto names no dataset; name one with --dataset, or start over with --fresh")
    if name == "idx":
        resolve("idx", data_dir, notify=notify)
        assert data_dir is not None
        return _load_own(data_dir)
    if data_dir is not None:
        way_out = "put the original file there, name another --data-dir, or add --dataset idx for images of your own"
        official = Layout(data_dir, "IDX files", layouts.idx_files(data_dir))
        layout = next(layouts.layouts_in(data_dir, name), official)
        dataset = _read(name, layout, way_out)
        if layout.path != data_dir:
            notify(_taken(name, layout))
        return dataset
    if not is_cached(name) and (found := _search(name, notify=notify)) is not None:
        return found
    cached = Layout(layouts.tfds_folder(), "TensorFlow Datasets", _locate(name, notify=notify))
    return _read(name, cached, "delete it, and the next start downloads it again")


def class_names(name: str, classes: int = 10) -> tuple[str, ...]:
    """Return the names of the classes of a dataset. The classes of "idx" are numbers."""
    if name == "idx":
        return tuple(map(str, range(classes)))
    return REGISTRY[name].class_names if name in REGISTRY else DIGITS


def begin_to_load(name: str, data_dir: Path | None) -> "Future[Dataset]":
    """Start to load a dataset in a thread, while the caller imports JAX."""

    def work() -> Dataset:
        dataset = load(name, data_dir, notify=print_stderr)
        _ = dataset.fingerprint  # cached in the dataset
        return dataset

    return start_in_thread(work)


def _search(name: str, *, notify: Callable[[str], None]) -> Dataset | None:
    """Return a dataset from the first of the usual folders that holds it, None if there is none.

    `notify` receives a line that names the folder, and one for each folder before it whose files are not usable.
    """
    for folder in layouts.folders():
        for layout in layouts.layouts_in(folder, name):
            try:
                dataset = _read(name, layout, "it is not used")
            except DataError as error:
                notify(f"notice: {error}")
            else:
                notify(_taken(name, layout))
                return dataset
    return None


def _taken(name: str, layout: Layout) -> str:
    return f"reading {name} from {layout.path} ({layout.program})"


def _read(name: str, layout: Layout, way_out: str) -> Dataset:
    """Return a registered dataset. `way_out` says what to do if a file is not usable."""
    if layout.read is None:
        arrays = {part: _read_registered(name, part, path, way_out) for part, path in layout.idx_files.items()}
    else:
        try:
            arrays = layout.read()
        except DataError as error:
            raise DataError(f"{error}; {way_out}") from error
        for part, array in arrays.items():
            _verify_array(name, part, array, origin=str(layout.path), way_out=way_out)
    return _make_dataset(name, arrays, class_names(name))


def _make_dataset(name: str, arrays: Mapping[str, np.ndarray], names: tuple[str, ...]) -> Dataset:
    return Dataset(
        name=name,
        train_images=arrays["train_images"][..., np.newaxis],
        train_labels=arrays["train_labels"].astype(np.int32),
        test_images=arrays["test_images"][..., np.newaxis],
        test_labels=arrays["test_labels"].astype(np.int32),
        class_names=names,
    )


def _read_registered(name: str, part: str, path: Path, way_out: str) -> np.ndarray:
    """Return the array in an IDX file: the registered one, or another one with the same content."""
    size, sha256 = REGISTRY[name].files[part]
    try:
        if path.stat().st_size == size:
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() == sha256:
                return _parse_idx(content)
        array = read_idx(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {way_out}") from error
    except DataError as error:
        expected = f"{size:,} bytes with SHA-256 {sha256}, or the same unpacked"
        raise DataError(f"{error}; it should be {expected}; {way_out}") from error
    _verify_array(name, part, array, origin=str(path), way_out=way_out)
    return array


def _verify_array(name: str, part: str, array: np.ndarray, *, origin: str, way_out: str) -> None:
    """Raise DataError unless an array is that of the dataset."""
    entry, found = REGISTRY[name], f"{list(array.shape)} {array.dtype.name}"
    registered = entry.unpacked.get(part)
    if registered is None:
        size, sha256 = entry.files[part]
        raise DataError(
            f"{origin} holds {found} that cannot be verified: of the {part} of {name} only the packed file is "
            f"registered, {FILES[part]} of {size:,} bytes with SHA-256 {sha256}; {way_out}"
        )
    sha256 = idx_sha256(array) if array.dtype == np.uint8 else "of other numbers"
    if sha256 != registered:
        raise DataError(
            f"{origin} is corrupt or holds other {part} than {name}: {found} with SHA-256 {sha256} instead of "
            f"{list(entry.shape_of(part))} uint8 with {registered}; {way_out}"
        )


def _load_own(folder: Path) -> Dataset:
    """Return the images of the user in four IDX files.

    Raises:
        DataError: a file is missing or corrupt, or its shape or its values do not fit the others.
    """
    paths = layouts.idx_files(folder)
    way_out = "write the four files again, see docs/data.md"
    try:
        arrays = {part: read_idx(path) for part, path in paths.items()}
    except DataError as error:
        raise DataError(f"{error}; {way_out}") from error
    for part in ("train_labels", "test_labels"):
        if arrays[part].ndim == 2 and arrays[part].shape[1] > 0:
            arrays[part] = arrays[part][:, 0]  # The other columns of QMNIST's labels describe the writer.

    def check(part: str, expected: str, *, holds: bool) -> None:
        if not holds:
            found = f"{list(arrays[part].shape)} {arrays[part].dtype.name}"
            raise DataError(f"{paths[part]} holds {found}, expected {expected}; {way_out}")

    shape = arrays["train_images"].shape[1:]
    side = f"H and W from 1 to {MAX_SIDE_PX}"
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        is_image = images.ndim == 3 and images.dtype == np.uint8 and len(images) > 0
        fits = is_image and all(1 <= side_px <= MAX_SIDE_PX for side_px in shape)
        check(f"{split}_images", f"[N, H, W] uint8 with N from 1, {side}", holds=fits)
        check(f"{split}_images", f"[N, {shape[0]}, {shape[1]}] as in training", holds=images.shape[1:] == shape)
        expected = f"[{len(images)}] labels from 0 to {MAX_CLASSES - 1}, one for each image"
        fits = labels.shape == (len(images),) and 0 <= labels.min() <= labels.max() < MAX_CLASSES
        check(f"{split}_labels", expected, holds=fits)
    classes = int(arrays["train_labels"].max()) + 1
    check("train_labels", "labels of 2 classes or more", holds=classes > 1)
    check("test_labels", f"labels below {classes}, as in training", holds=arrays["test_labels"].max() < classes)
    return _make_dataset("idx", arrays, class_names("idx", classes))


class Entry(NamedTuple):
    """A dataset in the registry: URL of the folder of its files, their sizes in bytes and SHA-256, and its classes."""

    url: str
    files: dict[str, tuple[int, str]]
    class_names: tuple[str, ...]
    unpacked: dict[str, str]  # SHA-256 of the unpacked files, as far as they are known to us
    counts: tuple[int, int] = (60_000, 10_000)  # of training and test images

    def shape_of(self, part: str) -> tuple[int, ...]:
        """Return the shape of the array in one of the files."""
        count = self.counts[part.startswith("test")]
        return (count, 28, 28) if part.endswith("images") else (count,)


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
        {
            "train_images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train_labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "test_images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "test_labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
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
        {
            "train_labels": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "test_labels": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
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
        {
            "train_labels": "2a16eeae62da984b8bd24fa32e31d47291f01dac3fe84d5594f304f71e7d374b",
            "test_images": "76fbd229ce87db80dd281af5e6670de4ad0e42fb30a7bd643972994c47c1f42e",
            "test_labels": "a11dc742be8e781a40a92f53d6a4957e7b7d36df2faa097659131ebfd8fd60c6",
        },
    ),
}


def is_cached(name: str) -> bool:
    """Return whether the cache of TensorFlow Datasets has the four files of a dataset."""
    return all(is_there for _, is_there in _cache_paths(name).values())


def _cache_paths(name: str) -> dict[str, tuple[Path, bool]]:
    """Return the path of each file in the cache of TensorFlow Datasets, and whether it is there."""
    cache, paths = layouts.tfds_folder() / "downloads", {}
    for part, (_, sha256) in REGISTRY[name].files.items():
        # In the cache, the name of a file ends with its SHA-256 in base64.
        ending = base64.urlsafe_b64encode(bytes.fromhex(sha256)).decode().rstrip("=") + ".gz"
        cached = [path for folder in (cache, cache / name) for path in folder.glob(f"*{ending}")]
        paths[part] = (cached[0], True) if cached else (cache / name / f"{part}.{ending}", False)
    return paths


def _locate(name: str, *, notify: Callable[[str], None]) -> dict[str, Path]:
    """Return the paths of the four files in the cache of TensorFlow Datasets. Missing files are downloaded first.

    Raises:
        UnreachableError: a file is missing and its server does not deliver it.
        DataError: a server delivers another file.
    """
    entry, paths = REGISTRY[name], _cache_paths(name)
    for part, (path, is_there) in paths.items():
        if not is_there:
            if path.parts[0].startswith("~"):
                raise UnreachableError(f"there is no home directory to download to ({path.parts[0]})")
            _download(f"{entry.url}/{FILES[part]}", path, entry.files[part], notify=notify)
    return {part: path for part, (path, _) in paths.items()}


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
    """Return the array in a gzipped IDX file whose SHA-256 is the registered one; see `read_idx` for others."""
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
