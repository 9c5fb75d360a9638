"""The layouts in which other programs keep MNIST: all give the same images, and the same bits after a training."""

import functools
import gzip
import hashlib
import io
import os
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arrays import to_idx
from PIL import Image

from mnist_jax.training import data, layouts
from mnist_jax.training.array_files import DataError, idx_sha256, read_idx, read_npz
from mnist_jax.training.data import FILES, Dataset
from mnist_jax.training.tfds_records import read_split

Arrays = dict[str, np.ndarray]


def make_arrays() -> Arrays:
    """Return 300 training and 60 test images that need each filter of PNG."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 300), ("test", 60)):
        arrays[f"{split}_labels"] = rng.integers(0, 10, count).astype(np.uint8)
        smooth = np.cumsum(np.cumsum(rng.integers(0, 3, (count, 28, 28)), axis=1), axis=2) // 4
        noise = rng.integers(0, 256, (count, 28, 28)) * (rng.random((count, 1, 1)) < 0.3)
        arrays[f"{split}_images"] = ((smooth + noise) % 256).astype(np.uint8)
    return {part: arrays[part] for part in FILES}


ARRAYS = make_arrays()


CONTENT = {part: gzip.compress(to_idx(array), mtime=0) for part, array in ARRAYS.items()}  # the official files


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> str:
    """Make these images the registered MNIST, and return the fingerprint of the dataset."""
    register(monkeypatch, "mnist")
    return fingerprint()


def register(monkeypatch: pytest.MonkeyPatch, name: str, *, unpacked: bool = True) -> None:
    entry = data.REGISTRY[name]._replace(
        files={part: (len(content), hashlib.sha256(content).hexdigest()) for part, content in CONTENT.items()},
        unpacked={part: idx_sha256(array) for part, array in ARRAYS.items()} if unpacked else {},
        counts=(300, 60),
        url="http://127.0.0.1:9",  # Nothing listens there.
    )
    monkeypatch.setitem(data.REGISTRY, name, entry)


@functools.cache
def fingerprint() -> str:
    labels = {part: array.astype(np.int32) for part, array in ARRAYS.items() if part.endswith("labels")}
    images = {part: array[..., np.newaxis] for part, array in ARRAYS.items() if part.endswith("images")}
    return Dataset("mnist", class_names=data.DIGITS, **labels, **images).fingerprint


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory beside an empty home directory."""
    for name in ("here", "home"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for name in ("TFDS_DATA_DIR", "KERAS_HOME"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "here"


# Writers of the layouts: each fills a folder.


def write_idx(folder: Path, *, dot: bool = False, packed: bool = True, level: int = 9, arrays: Arrays = ARRAYS) -> None:
    for part, official in FILES.items():
        name = official.replace("-idx", ".idx") if dot else official
        content = to_idx(arrays[part])
        if level == 9 and packed:
            content = gzip.compress(content, mtime=0)
        elif packed:
            content = gzip.compress(content, level)
        write(folder / (name if packed else name.removesuffix(".gz")), content)


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_torchvision(folder: Path, **options: Any) -> None:
    write_idx(folder / "MNIST" / "raw", **options)


def write_both(folder: Path) -> None:
    """As torchvision leaves it: the packed files and the unpacked ones."""
    write_torchvision(folder, packed=True)
    write_torchvision(folder, packed=False)


def write_keras(folder: Path, save: Callable[..., None] = np.savez_compressed) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / "mnist.npz", **dict(zip(("x_train", "y_train", "x_test", "y_test"), ARRAYS.values(), strict=True)))


def write_downloads(folder: Path) -> None:
    """As TensorFlow Datasets downloads."""
    from tensorflow_datasets.core.download.resource import get_dl_fname

    entry = data.REGISTRY["mnist"]
    for part, (_, sha256) in entry.files.items():
        write(folder / "downloads" / "mnist" / get_dl_fname(f"{entry.url}/{FILES[part]}", sha256), CONTENT[part])


def write_prepared(folder: Path, kind: str) -> None:
    """As TensorFlow Datasets prepares: with its hash, in two shards of each split."""
    folder = folder / "mnist" / "3.0.1"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        records = shuffled_records(split)
        for shard, part in enumerate((records[:50], records[50:])):
            write_records(folder / f"mnist-{split}.{kind}-0000{shard}-of-00002", part)


def shuffled_records(split: str) -> list[bytes]:
    from tensorflow_datasets.core.hashing import Hasher

    hasher = Hasher(split)
    keys = sorted(range(len(ARRAYS[f"{split}_labels"])), key=hasher.hash_key)
    return [to_record(ARRAYS[f"{split}_images"][key], int(ARRAYS[f"{split}_labels"][key])) for key in keys]


def to_record(image: np.ndarray, label: int, **options: Any) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", **options)
    features = {
        "image": tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[file.getvalue()])),
        "label": tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[label])),
    }
    return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features)).SerializeToString()


def write_records(path: Path, records: list[bytes]) -> None:
    if ".tfrecord" in path.name:
        path.write_bytes(b"".join(struct.pack("<QI", len(record), 0) + record + bytes(4) for record in records))
        return
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


packed, unpacked = functools.partial(write_idx), functools.partial(write_idx, packed=False)
LAYOUTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "TFDS downloads": (write_downloads, "~/tensorflow_datasets"),
    "TFDS array_record": (functools.partial(write_prepared, kind="array_record"), "~/tensorflow_datasets"),
    "TFDS tfrecord": (functools.partial(write_prepared, kind="tfrecord"), "~/tensorflow_datasets"),
    "torchvision packed": (write_torchvision, "."),
    "torchvision, from its folder": (lambda folder: write_idx(folder / "raw"), "~/data"),
    "torchvision unpacked": (functools.partial(write_torchvision, packed=False), "data"),
    "torchvision both": (write_both, "~/data"),
    "Keras": (write_keras, "~/.keras/datasets"),
    "Keras not compressed": (functools.partial(write_keras, save=np.savez), "~/.keras/datasets"),
    "dashed packed": (packed, "."),
    "dashed unpacked": (unpacked, "data"),
    "dashed packed by another program": (functools.partial(packed, level=1), "~/data"),
    "dotted packed": (functools.partial(packed, dot=True), "data/mnist"),
    "dotted unpacked": (functools.partial(unpacked, dot=True), "mnist"),
}


@pytest.mark.parametrize("where", ["found", "--data-dir"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images(layout: str, where: str, registered: str, here: Path) -> None:
    write_layout, folder = LAYOUTS[layout]
    data_dir = None
    if where == "--data-dir":
        data_dir = here.parent / "elsewhere"
        write_layout(data_dir)
    else:
        write_layout(Path(folder).expanduser())
    lines: list[str] = []
    assert data.resolve("auto", data_dir, notify=pytest.fail) == "mnist"
    if layout == "TFDS downloads" and data_dir:
        return  # Its folder is named by TFDS_DATA_DIR.
    assert data.load("mnist", data_dir, notify=lines.append).fingerprint == registered
    is_default = layout == "TFDS downloads" or (data_dir and layout.startswith(("dashed", "dotted")))
    assert len(lines) == (not is_default)
    assert all(line.startswith("reading mnist from ") for line in lines)


def test_the_order_of_the_folders_is_fixed(registered: str, here: Path) -> None:
    user = [folder + below for folder in (".", "data", "~/data") for below in ("", "/MNIST/raw", "/raw", "/mnist")]
    order = ["~/tensorflow_datasets/mnist/3.0.1", *user, "~/.keras/datasets/mnist.npz"]
    write_prepared(Path("~/tensorflow_datasets").expanduser(), "tfrecord")
    write_keras(Path("~/.keras/datasets").expanduser())
    for folder in user:
        write_idx(Path(folder).expanduser(), packed=False)
    for name in order:
        lines: list[str] = []
        data.load("mnist", notify=lines.append)
        path = Path(name).expanduser()
        assert lines[0].startswith(f"reading mnist from {path} (")
        for file in [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]:
            file.unlink()


def test_a_complete_cache_ends_the_search(registered: str, here: Path, monkeypatch) -> None:
    write_downloads(Path("~/tensorflow_datasets").expanduser())
    monkeypatch.setattr(layouts, "layouts_in", pytest.fail)  # The cache is complete: no other folder is looked at.
    assert data.resolve("auto", None, notify=pytest.fail) == "mnist"
    assert data.load("mnist", notify=pytest.fail).fingerprint == registered


def test_other_files_under_the_same_names_are_not_used(registered: str, here: Path, monkeypatch) -> None:
    other = {**ARRAYS, "test_labels": ARRAYS["test_labels"][::-1].copy()}
    write_idx(here / "data", arrays=other)
    lines: list[str] = []
    assert data.resolve("auto", None, notify=lines.append) == "digits"
    assert "t10k-labels" in lines[0]
    assert "not used" in lines[0]
    assert "built-in digits" in lines[1]
    write_torchvision(here / "data")
    lines.clear()
    assert data.load("mnist", notify=lines.append).fingerprint == registered
    assert [line.split()[0] for line in lines] == ["notice:", "reading"]
    with pytest.raises(DataError, match=r"(?s)t10k-labels.* \[60\] uint8 .* instead of \[60\] uint8 .*--data-dir"):
        data.load("mnist", here / "data", notify=pytest.fail)


def test_a_folder_of_other_shapes_is_named_with_both_shapes(registered: str, here: Path) -> None:
    write_idx(here, arrays={**ARRAYS, "train_images": ARRAYS["train_images"][:, :20]})
    with pytest.raises(DataError, match=r"train-images.*\[300, 20, 28\] uint8 .* instead of \[300, 28, 28\] uint8"):
        data.load("mnist", here, notify=pytest.fail)


@pytest.mark.parametrize(("name", "folder"), [("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_relatives_are_found_in_the_layout_of_torchvision(name: str, folder: str, here: Path, monkeypatch) -> None:
    register(monkeypatch, name, unpacked=False)
    write_idx(here / "data" / folder / "raw", packed=False)
    with pytest.raises(DataError, match=r"packed file"):  # Its SHA-256 is not in the registry.
        data.load(name, here / "data", notify=pytest.fail)
    write_idx(here / "data" / folder / "raw")
    for data_dir in (None, here / "data"):
        lines: list[str] = []
        assert data.load(name, data_dir, notify=lines.append).fingerprint == fingerprint()
        assert f"{folder}/raw (torchvision)" in lines[0]


@pytest.mark.parametrize("value", ["gs://bucket/data", "", "s3:/bucket"])
def test_tfds_data_dir_must_be_a_folder(value: str, registered: str, here: Path, monkeypatch) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", value)
    for call in (lambda: data.resolve("auto", None, notify=print), lambda: data.load("mnist", notify=print)):
        with pytest.raises(DataError, match=rf"^TFDS_DATA_DIR={value} .*unset it$"):
            call()
    assert os.listdir(here) == []


# Files that are corrupt, or made to harm


def npz(**members: bytes) -> bytes:
    import zipfile

    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy(array: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    """Return an array as a npy file, whose header says another shape if one is given."""
    file = io.BytesIO()
    if shape is None:
        np.lib.format.write_array(file, array)
    else:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        file.write(array.tobytes())
    return file.getvalue()


HEADER = bytes([0, 0, 8, 3])
IDX = to_idx(ARRAYS["test_images"])
HUGE = HEADER + struct.pack(">III", 2**31, 2**10, 2**10)
BAD_IDX = {
    "empty": b"",
    "no magic": b"\x01" + IDX[1:],
    "floats": bytes([0, 0, 13, 3]) + IDX[4:],
    "rank 9": bytes([0, 0, 8, 9]) + IDX[4:],
    "half a header": IDX[:10],
    "half": IDX[: len(IDX) // 2],
    "too long": IDX + b"\0",
    "a huge header": HUGE + bytes(1000),
    "a huge header, packed": gzip.compress(HUGE + bytes(1000)),
    "a bomb": gzip.compress(IDX + bytes(2**26)),
    "half, packed": gzip.compress(IDX)[:-20],
    "a wrong checksum": gzip.compress(IDX)[:-8] + bytes(8),
    "not gzip": b"\x1f\x8b" + IDX,
}
PIXELS = np.zeros(1000, np.uint8)
BAD_NPZ = {
    "empty": b"",
    "no zip": IDX,
    "no member": npz(y=npy(PIXELS)),
    "a pickle": npz(x=npy(np.array([print], dtype=object), None)),
    "floats": npz(x=npy(PIXELS.astype(float))),
    "a huge header": npz(x=npy(PIXELS, shape=(2**40,))),
    "too long": npz(x=npy(PIXELS) + bytes(2**26)),
    "too short": npz(x=npy(PIXELS)[:-1]),
    "no npy": npz(x=b"\x93NUMPY\x09\0"),
}


@pytest.mark.parametrize(("read", "content"), [(read_idx, c) for c in BAD_IDX.values()], ids=BAD_IDX)
def test_a_bad_idx_file_is_refused(read: Any, content: bytes, tmp_path: Path) -> None:
    refused_cheaply(lambda path: read(path), tmp_path / "bad", content)


@pytest.mark.parametrize("content", BAD_NPZ.values(), ids=BAD_NPZ)
def test_a_bad_npz_file_is_refused(content: bytes, tmp_path: Path) -> None:
    refused_cheaply(lambda path: read_npz(path, ["x"]), tmp_path / "bad", content)


@pytest.mark.parametrize(
    "content",
    [BAD_IDX["a huge header"], BAD_IDX["a huge header, packed"], BAD_NPZ["a huge header"]],
    ids=["idx", "packed", "npz"],
)
def test_the_size_in_a_header_is_checked_first(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(DataError, match="more than"):
        read_npz(tmp_path / "bad", ["x"]) if content.startswith(b"PK") else read_idx(tmp_path / "bad")


def refused_cheaply(read: Callable[[Path], object], path: Path, content: bytes) -> None:
    """Check that a file is refused by its path, without memory for more than it can hold."""
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match=str(path)):
        read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_named_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        read_idx(tmp_path / "pipe")


def test_an_idx_file_of_many_kinds_is_read(tmp_path: Path) -> None:
    for array in (ARRAYS["test_images"], ARRAYS["test_labels"], np.arange(-6, 6).reshape(3, 4).astype(">i4")):
        content = to_idx(array)
        for packed_content in (
            content,
            gzip.compress(content),
            gzip.compress(content[:9]) + gzip.compress(content[9:]),
        ):
            (tmp_path / "file").write_bytes(packed_content)
            np.testing.assert_array_equal(read_idx(tmp_path / "file"), array)


@functools.cache
def record() -> bytes:
    """Return an image and its label as TensorFlow Datasets writes them."""
    return to_record(ARRAYS["test_images"][0], 3)


def framed(content: bytes) -> bytes:
    """Return a record with its length, and zeros for its checksums."""
    return struct.pack("<QI", len(content), 0) + content + bytes(4)


BAD_RECORDS = {
    "empty": lambda: b"",
    "no image": lambda: struct.pack("<QI", 100, 0) + bytes(104),
    "a record beyond the end": lambda: struct.pack("<QI", 2**60, 0) + record(),
    "half a length": lambda: bytes(5),
    "another size": lambda: framed(record().replace(b"\0\0\0\x1c", b"\0\0\xff\x1c")),
    "no label": lambda: framed(record().replace(b"label", b"lebal")),
    "a corrupt image": lambda: framed(record().replace(b"IDAT", b"IDAT\x01")[:-1]),
}


@pytest.mark.parametrize("kind", BAD_RECORDS)
def test_bad_records_are_refused(kind: str, tmp_path: Path) -> None:
    path, content = tmp_path / "mnist-train.tfrecord-00000-of-00001", BAD_RECORDS[kind]()
    refused_cheaply(lambda path: read_split([path], "train"), path, content)


def test_without_array_record_the_next_folder_is_taken(registered: str, here: Path, monkeypatch) -> None:
    import sys

    write_prepared(Path("~/tensorflow_datasets").expanduser(), "array_record")
    write_torchvision(here)
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_module", None)
    lines: list[str] = []
    assert data.load("mnist", notify=lines.append).fingerprint == registered
    assert "array_record, which is not installed" in lines[0]
    assert "torchvision" in lines[1]


@pytest.mark.parametrize("kind", range(5))
def test_every_filter_of_png_is_undone(kind: int, tmp_path: Path) -> None:
    """Write each row with one filter, which Pillow decodes as the standard says."""
    rows = np.random.default_rng(kind).integers(0, 256, (28, 28)).astype(np.uint8)
    data_ = zlib.compress(b"".join(bytes([kind if y else min(kind, 4)]) + row.tobytes() for y, row in enumerate(rows)))

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 28, 28, 8, 0, 0, 0, 0))
    png += chunk(b"IDAT", data_) + chunk(b"IEND", b"")
    start, end = record().index(b"\x89PNG"), record().index(b"IEND") + 8
    path = tmp_path / "mnist-test.tfrecord-00000-of-00001"
    write_records(path, [record().replace(record()[start:end], png)])
    images, labels = read_split([path], "test")
    np.testing.assert_array_equal(images[0], np.asarray(Image.open(io.BytesIO(png))))
    assert labels.tolist() == [3]
