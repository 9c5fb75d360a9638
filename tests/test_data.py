"""The images: that they are the right ones, wherever they come from, and what is said when they are not."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mnist_jax.training import data
from mnist_jax.training.data import FILES, DataError, Dataset, UnreachableError

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
SHA256 = r"[0-9a-f]{64}"


@pytest.fixture(scope="module")
def mnist(mnist_dir: Path) -> Dataset:
    return data.load("mnist", mnist_dir, notify=pytest.fail)


# MNIST


def test_mnist_has_its_known_shapes_and_labels(mnist: Dataset) -> None:
    assert (mnist.train_images.shape, mnist.train_images.dtype) == ((60_000, 28, 28, 1), np.uint8)
    assert (mnist.test_images.shape, mnist.test_images.dtype) == ((10_000, 28, 28, 1), np.uint8)
    assert (mnist.train_labels.shape, mnist.train_labels.dtype) == ((60_000,), np.int32)
    assert (mnist.test_labels.shape, mnist.test_labels.dtype) == ((10_000,), np.int32)
    assert mnist.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    train, test = np.bincount(mnist.train_labels), np.bincount(mnist.test_labels)
    assert train.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_mnist_is_ink_255_on_ground_0_with_the_known_statistics(mnist: Dataset) -> None:
    assert (mnist.train_images.min(), mnist.train_images.max()) == (0, 255)
    assert mnist.train_images[:, 0, 0].mean() == 0  # a corner is ground
    inks = np.arange(256) / 255
    mean, mean_square = (np.average(x, weights=np.bincount(mnist.train_images.ravel())) for x in (inks, inks**2))
    assert mean == pytest.approx(0.1307, abs=5e-5)
    assert (mean_square - mean**2) ** 0.5 == pytest.approx(0.3081, abs=5e-5)


def test_the_fingerprint_is_the_one_that_checkpoints_remember(mnist: Dataset) -> None:
    assert mnist.fingerprint == "961972c2a69a1659699fabe215a163ada603993204bb6d1870c7ae9df4a4dad2"


@pytest.mark.parametrize("part", ARRAYS)
def test_one_pixel_or_label_changes_the_fingerprint(part: str, mnist: Dataset) -> None:
    array = getattr(mnist, part).copy()
    array[-1] ^= 1
    assert dataclasses.replace(mnist, **{part: array}).fingerprint != mnist.fingerprint


def test_the_fingerprint_does_not_hang_on_how_an_array_lies_in_memory(mnist: Dataset) -> None:
    images = np.asfortranarray(mnist.test_images)
    assert dataclasses.replace(mnist, test_images=images).fingerprint == mnist.fingerprint


@pytest.mark.parametrize("name", data.REGISTRY)
def test_the_registry_is_that_of_tensorflow_datasets(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # Its constructor leaves an empty folder behind there.
    builder = tfds.builder(name)
    registered = {info.filename: (url, info.size, info.checksum) for url, info in builder.url_infos.items()}
    sources = data._sources(name)
    assert sources.keys() == set(ARRAYS)
    assert {FILES[part]: tuple(source) for part, source in sources.items()} == registered
    assert data.REGISTRY[name].class_names == tuple(builder.info.features["label"].names)


def test_no_data_set_has_a_file_of_another() -> None:
    digests = [
        source.sha256 for name in ("mnist", "fashion_mnist", "kmnist") for source in data._sources(name).values()
    ]
    assert len(set(digests)) == 12


# A folder of files


@pytest.fixture
def folder(tmp_path: Path, mnist_dir: Path) -> Path:
    """A folder with links to the four files of MNIST."""
    folder = tmp_path / "files"
    folder.mkdir()
    for file in FILES.values():
        (folder / file).symlink_to(mnist_dir / file)
    return folder


def test_a_folder_is_used_without_the_network(folder: Path, no_network: None, mnist: Dataset) -> None:
    assert data.load("mnist", folder, notify=pytest.fail).fingerprint == mnist.fingerprint


def test_loading_leaves_nothing_among_the_temporary_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    data.load("mnist", folder, notify=print)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert tempfile.tempdir == str(tmp_path / "temporary")


def test_files_that_are_there_are_loaded_without_the_half_second_of_tensorflow_datasets(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from mnist_jax.training import data;"
        "data.load('mnist', Path(sys.argv[1]), notify=print); print('tensorflow_datasets' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert ended.stdout == "False\n"


def test_what_was_begun_to_load_is_the_same_with_its_fingerprint_taken(
    folder: Path, cache: Path, mnist_dir: Path, no_network: None, mnist: Dataset
) -> None:
    fill(cache, mnist_dir)
    for data_dir in (folder, None):
        begun = data.begin_to_load("mnist", data_dir)
        assert begun
        assert vars(begun.result())["fingerprint"] == mnist.fingerprint


def test_a_download_and_the_digits_are_not_begun(cache: Path, no_network: None) -> None:
    assert data.begin_to_load("mnist", None) is None
    assert data.begin_to_load("digits", None) is None


@pytest.mark.parametrize("part", ARRAYS)
def test_a_missing_file_is_named(part: str, folder: Path) -> None:
    (folder / FILES[part]).unlink()
    refused(folder, part, "No such file or directory")


@pytest.mark.parametrize("part", ARRAYS)
def test_a_file_with_one_flipped_bit_is_named(part: str, folder: Path) -> None:
    content = bytearray((folder / FILES[part]).read_bytes())
    content[len(content) // 2] ^= 1
    replace(folder / FILES[part], bytes(content))
    refused(folder, part, hashlib.sha256(content).hexdigest(), data._sources("mnist")[part].sha256)


@pytest.mark.parametrize("part", ["train_images", "test_labels"])
@pytest.mark.parametrize("kept", [0, 1, 4541])
def test_a_truncated_file_is_named(part: str, kept: int, folder: Path) -> None:
    replace(folder / FILES[part], (folder / FILES[part]).read_bytes()[:kept])
    refused(folder, part, f"{kept:,} bytes", f"{data._sources('mnist')[part].size:,}")


def test_a_file_of_the_right_size_and_other_content_is_named(folder: Path) -> None:
    content = (folder / FILES["test_labels"]).read_bytes()[::-1]
    replace(folder / FILES["test_labels"], content)
    refused(folder, "test_labels", hashlib.sha256(content).hexdigest(), data._sources("mnist")["test_labels"].sha256)


def test_the_same_images_packed_otherwise_are_not_the_registered_file(folder: Path) -> None:
    content = gzip.compress(gzip.decompress((folder / FILES["test_labels"]).read_bytes()), 1)
    replace(folder / FILES["test_labels"], content)
    refused(folder, "test_labels", f"{len(content):,} bytes", "4,542")


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_training_and_test_files_that_are_swapped_are_named(kind: str, folder: Path) -> None:
    train, test = folder / FILES[f"train_{kind}"], folder / FILES[f"test_{kind}"]
    aside = folder / "aside"
    train.rename(aside)
    test.rename(train)
    aside.rename(test)
    sources = data._sources("mnist")
    refused(folder, f"train_{kind}", f"{sources[f'test_{kind}'].size:,}", f"{sources[f'train_{kind}'].size:,}")


def test_a_directory_in_the_place_of_a_file_is_named(folder: Path) -> None:
    (folder / FILES["test_images"]).unlink()
    (folder / FILES["test_images"]).mkdir()
    refused(folder, "test_images", "Is a directory")


def test_a_file_that_cannot_be_opened_is_named(folder: Path) -> None:
    # Not by its permissions, for root may read all; a link to itself nobody can open.
    (folder / FILES["test_images"]).unlink()
    (folder / FILES["test_images"]).symlink_to(folder / FILES["test_images"])
    refused(folder, "test_images", "Too many levels of symbolic links")


def test_the_files_of_another_data_set_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=rf"{FILES['train_images']} has 9,912,422 bytes instead of 26,421,880"):
        data.load("fashion_mnist", folder, notify=pytest.fail)


# The built-in digits


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits", notify=pytest.fail)


def test_digits_come_without_the_network_and_are_the_same_in_every_process(digits: Dataset) -> None:
    program = (
        "import socket\n"
        "class Broken:\n"
        "    def __init__(self, *args, **kwargs): raise SystemExit('the network was asked')\n"
        "socket.socket = socket.create_connection = socket.getaddrinfo = Broken\n"
        "from mnist_jax.training import data\n"
        "print(data.load('digits', notify=print).fingerprint)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == digits.fingerprint
    assert digits.fingerprint == "b8831777e2a2ab667ceb20fdbac6f7c9bf4545342064824c873d29e41904a8a5"


def test_digits_look_like_mnist(digits: Dataset) -> None:
    images, labels = np.concatenate([digits.train_images, digits.test_images]), digits.train_labels
    assert (images.shape, images.dtype) == ((1797, 28, 28, 1), np.uint8)
    assert (images.min(), images.max()) == (0, 255)
    assert images[:, :2].max() == images[:, -2:].max() == images[:, :, :2].max() == images[:, :, -2:].max() == 0
    assert (labels.shape, labels.dtype) == ((1438,), np.int32)
    assert set(labels.tolist()) == set(digits.test_labels.tolist()) == set(range(10))
    assert digits.class_names == tuple("0123456789")


def test_digits_for_the_test_are_every_fifth_one_and_no_other_is_left_out(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    is_test = np.arange(1797) % 5 == 4
    for images, labels, chosen in (
        (digits.train_images, digits.train_labels, ~is_test),
        (digits.test_images, digits.test_labels, is_test),
    ):
        assert labels.tolist() == bunch.target[chosen].tolist()
        for row in range(3):
            for column in range(3):  # each of the 3x3 pixels that one has become
                pixels = images[:, 2 + row : 26 : 3, 2 + column : 26 : 3, 0]
                np.testing.assert_array_equal(pixels, np.round(bunch.images[chosen] * 255 / 16))
    train, test = ({image.tobytes() for image in part} for part in (digits.train_images, digits.test_images))
    assert (len(train), len(test), len(train & test)) == (1438, 359, 0)


def test_digits_that_are_not_where_they_should_be_are_an_error(monkeypatch, tmp_path) -> None:
    class Empty:
        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    monkeypatch.setattr(data, "distribution", lambda _: Empty())
    with pytest.raises(DataError, match=r"scikit-learn's digits cannot be read .*name another --dataset"):
        data.load("digits", notify=print)


# What "auto" is


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "digits"])
def test_a_data_set_asked_for_by_name_is_that_one(name: str, no_network: None) -> None:
    assert data.resolve(name, None, notify=pytest.fail) == name


def test_auto_is_mnist_where_a_folder_is_named(folder: Path, no_network: None) -> None:
    assert data.resolve("auto", folder, notify=pytest.fail) == "mnist"


def test_auto_is_mnist_where_it_is_on_disk(cache: Path, mnist_dir: Path, no_network: None, mnist: Dataset) -> None:
    fill(cache, mnist_dir)
    assert data.resolve("auto", None, notify=pytest.fail) == "mnist"
    assert data.load("mnist", notify=pytest.fail).fingerprint == mnist.fingerprint


def test_auto_is_mnist_where_it_can_be_downloaded(cache: Path, server: "Server", mnist: Dataset) -> None:
    said: list[str] = []
    assert data.resolve("auto", None, notify=said.append) == "mnist"
    assert len(said) == 1
    assert re.fullmatch(rf"downloading mnist: 4 files, 11\.6 MB, into {cache}", said[0])
    server.stop()
    assert data.load("mnist", notify=pytest.fail).fingerprint == mnist.fingerprint


NO_NETWORKS = ("refused", "silent", "nameless")


@pytest.mark.parametrize("kind", NO_NETWORKS)
def test_auto_is_the_digits_and_says_so_once_where_mnist_is_not_to_be_had(
    kind: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with without_network(kind, monkeypatch) as url:
        started = time.monotonic()
        assert data.resolve("auto", None, notify=said.append) == "digits"
        assert time.monotonic() - started < 5
    assert len(said) == 1
    for word in ("notice: training on the built-in digits", "instead of MNIST", url, "--data-dir"):
        assert word in said[0]
    assert "\n" not in said[0]


def test_mnist_asked_for_by_name_is_an_error_at_once_where_it_is_not_to_be_had(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "PROBE_TIMEOUT_S", 0.5)
    with without_network("silent", monkeypatch) as url:
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=re.escape(url)):
            data.load("mnist", notify=pytest.fail)
        assert time.monotonic() - started < 2


@pytest.mark.parametrize("status", [404, 500, 503])
def test_a_server_that_answers_with_an_error_is_asked_once(status: int, cache: Path, server: "Server") -> None:
    server.status = status
    with pytest.raises(UnreachableError, match=f"{server.url}.*{status}"):
        data.load("mnist", notify=pytest.fail)
    assert len(server.requests) == 1


# Downloads


def test_a_download_is_kept_and_the_network_not_asked_again(cache: Path, server: "Server", mnist: Dataset) -> None:
    said: list[str] = []
    assert data.load("mnist", notify=said.append).fingerprint == mnist.fingerprint
    assert len(said) == 1
    assert sorted(file for method, file in server.requests if method == "GET") == sorted(FILES.values())
    server.stop()
    assert data.load("mnist", notify=pytest.fail).fingerprint == mnist.fingerprint


def test_only_what_is_missing_is_downloaded(cache: Path, server: "Server", mnist: Dataset) -> None:
    data.load("mnist", notify=[].append)
    server.requests.clear()
    next(cache.rglob("*t10k-labels*.gz")).unlink()
    said: list[str] = []
    assert data.load("mnist", notify=said.append).fingerprint == mnist.fingerprint
    assert said == [f"downloading mnist: 1 files, 0.0 MB, into {cache}"]
    assert [file for method, file in server.requests if method == "GET"] == [FILES["test_labels"]]


def corrupt(content: bytes) -> bytes:
    return content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]


def halve(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [corrupt, halve, lambda content: b"", lambda content: b"<html>log in</html>"])
def test_a_server_that_sends_other_bytes_is_not_believed(
    damage: Callable[[bytes], bytes], cache: Path, server: "Server", mnist: Dataset
) -> None:
    server.damage = damage
    for _ in range(2):  # The second start does not find the bad file and take it for whole.
        with pytest.raises(DataError, match=f"(?s)mnist.*{server.url}"):
            data.load("mnist", notify=[].append)
    server.damage = None
    assert data.load("mnist", notify=[].append).fingerprint == mnist.fingerprint


def test_a_download_that_breaks_off_is_an_error_at_once_and_is_made_good_by_the_next(
    cache: Path, server: "Server", mnist: Dataset
) -> None:
    server.breaks_off = True
    started = time.monotonic()
    with pytest.raises(UnreachableError, match="mnist broke off"):
        data.load("mnist", notify=[].append)
    assert time.monotonic() - started < 5
    server.breaks_off = False
    assert data.load("mnist", notify=[].append).fingerprint == mnist.fingerprint


def test_a_download_that_stalls_is_an_error_after_a_while(
    cache: Path, server: "Server", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "STALL_TIMEOUT_S", 1.0, raising=False)
    server.stalls = True
    errors: list[Exception] = []

    def load() -> None:
        try:
            data.load("mnist", notify=[].append)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(timeout=5)
    assert [type(error) for error in errors] == [UnreachableError]


def test_a_download_that_fails_leaves_nothing_behind(cache: Path, server: "Server") -> None:
    server.damage = corrupt
    with pytest.raises(DataError):
        data.load("mnist", notify=[].append)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("damage", [corrupt, halve])
@pytest.mark.parametrize("part", ["train_images", "test_labels"])
def test_a_file_that_went_bad_on_disk_is_named_and_to_be_deleted(
    damage: Callable[[bytes], bytes], part: str, cache: Path, mnist_dir: Path, no_network: None
) -> None:
    path = fill(cache, mnist_dir)[part]
    replace(path, damage(path.read_bytes()))
    with pytest.raises(DataError) as refusal:
        data.load("mnist", notify=pytest.fail)
    assert str(path) in str(refusal.value)
    assert "delete it, and the next start downloads it again" in str(refusal.value)


def test_a_file_that_went_bad_on_disk_is_whole_again_after_it_was_deleted(
    cache: Path, server: "Server", mnist: Dataset
) -> None:
    data.load("mnist", notify=[].append)
    path = next(cache.rglob("*t10k-labels*.gz"))
    replace(path, corrupt(path.read_bytes()))
    with pytest.raises(DataError, match=re.escape(str(path))):
        data.load("mnist", notify=pytest.fail)
    path.unlink()
    assert data.load("mnist", notify=[].append).fingerprint == mnist.fingerprint


def test_data_that_is_on_disk_is_only_read_and_in_silence(
    cache: Path, mnist_dir: Path, no_network: None, capfd: pytest.CaptureFixture[str]
) -> None:
    fill(cache, mnist_dir)
    before = sorted(cache.rglob("*"))
    data.load("mnist", notify=pytest.fail)
    assert sorted(cache.rglob("*")) == before  # It may be a folder that many share and nobody may write to.
    assert capfd.readouterr() == ("", "")


def test_a_download_draws_no_bars_where_nobody_watches(
    cache: Path, server: "Server", capfd: pytest.CaptureFixture[str]
) -> None:
    data.load("mnist", notify=[].append)
    assert capfd.readouterr() == ("", "")


# The tools of these tests


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, not there yet, in which TensorFlow Datasets keeps what it downloads."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds" / "downloads"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", broken)
    monkeypatch.setattr(socket, "getaddrinfo", broken)
    monkeypatch.setattr(data, "_probe", broken)


class Server:
    """A real server of the real files on this machine, which can be told to do it badly."""

    def __init__(self, files: Path) -> None:
        self.requests: list[tuple[str, str]] = []
        self.status = 200
        self.damage: Callable[[bytes], bytes] | None = None
        self.breaks_off = False
        self.stalls = False
        self._released = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer()

            def do_GET(self) -> None:
                self.answer()

            def answer(self) -> None:
                file = self.path.lstrip("/")
                server.requests.append((self.command, file))
                content = (files / file).read_bytes()
                content = server.damage(content) if server.damage else content
                self.send_response(server.status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "HEAD" or server.status != 200:
                    return
                if server.stalls:
                    self.wfile.write(halve(content))
                    server._released.wait()
                else:
                    self.wfile.write(halve(content) if server.breaks_off else content)

            def log_message(self, *args: object) -> None:
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            def handle_error(self, *args: object) -> None:
                pass  # A client that leaves early is no error of ours.

        self._server = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=functools.partial(self._server.serve_forever, poll_interval=0.01))
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._released.set()
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


@pytest.fixture
def server(mnist_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of MNIST, which the registry names in place of the one on the Internet."""
    server = Server(mnist_dir)
    register(server.url, monkeypatch)
    yield server
    server.stop()


def register(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the registry name another server."""
    registered = data._sources("mnist")
    sources = {part: source._replace(url=f"{url}/{FILES[part]}") for part, source in registered.items()}
    monkeypatch.setattr(data, "_sources", {"mnist": sources}.__getitem__)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class without_network:  # noqa: N801
    """A way not to have the network, while the `with` block runs: gives the address that is not to be had.

    refused: nothing listens at the port. silent: a server takes the connection and says no word. nameless: looking
    up the name of the server takes forever, as it does behind many a firewall.
    """

    def __init__(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self._kind, self._monkeypatch = kind, monkeypatch
        self._released = threading.Event()

    def __enter__(self) -> str:
        self._listener = socket.create_server(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        if self._kind == "nameless":
            url = "http://mnist.invalid"
            self._monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: self._released.wait() and [])
        elif self._kind == "refused":
            self._listener.close()
        register(url, self._monkeypatch)
        return url

    def __exit__(self, *error: object) -> None:
        self._released.set()
        self._listener.close()


def fill(cache: Path, mnist_dir: Path) -> dict[str, Path]:
    """Put links to the files where TensorFlow Datasets keeps them, and return their paths."""
    from tensorflow_datasets.core.download.resource import get_dl_fname

    (cache / "mnist").mkdir(parents=True)
    paths = {}
    for part, source in data._sources("mnist").items():
        paths[part] = cache / "mnist" / get_dl_fname(source.url, source.sha256)
        paths[part].symlink_to(mnist_dir / FILES[part])
        paths[part].with_name(paths[part].name + ".INFO").write_text("{}")
    return paths


def replace(path: Path, content: bytes) -> None:
    """Put a file of its own in the place of a link or a file."""
    path.unlink()
    path.write_bytes(content)


def refused(folder: Path, part: str, *named: str) -> None:
    """Check that the folder is refused with a message that names a file, the other words and the way out."""
    with pytest.raises(DataError) as refusal:
        data.load("mnist", folder, notify=pytest.fail)
    begun = data.begin_to_load("mnist", folder)
    assert begun
    assert str(begun.exception()) == str(refusal.value)
    for word in (str(folder / FILES[part]), *named, "put the original file there", "--data-dir"):
        assert word in str(refusal.value)
