"""Datasets: the right images from a folder, the cache or a server, and clear errors for wrong ones."""

import dataclasses
import functools
import gzip
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


@pytest.fixture(scope="module")
def mnist(mnist_dir: Path) -> Dataset:
    return data.load("mnist", mnist_dir, notify=pytest.fail)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits", notify=pytest.fail)


# The images


def test_mnist_has_its_known_images_and_labels(mnist: Dataset) -> None:
    assert (mnist.train_images.shape, mnist.train_images.dtype) == ((60_000, 28, 28, 1), np.uint8)
    assert (mnist.test_images.shape, mnist.test_images.dtype) == ((10_000, 28, 28, 1), np.uint8)
    assert (mnist.train_labels.dtype, mnist.train_labels[:5].tolist()) == (np.int32, [5, 0, 4, 1, 9])
    assert (mnist.test_labels.dtype, mnist.test_labels[:5].tolist()) == (np.int32, [7, 2, 1, 0, 4])
    train, test = np.bincount(mnist.train_labels), np.bincount(mnist.test_labels)
    assert train.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert test.tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert (mnist.train_images.mean(), mnist.train_images[:, 0, 0].mean()) == (
        pytest.approx(255 * 0.1307, abs=0.015),
        0,
    )


def test_the_fingerprint_depends_on_every_pixel_and_label(digits: Dataset, mnist: Dataset) -> None:
    assert mnist.fingerprint == "961972c2a69a1659699fabe215a163ada603993204bb6d1870c7ae9df4a4dad2"  # in old checkpoints
    assert digits.fingerprint == "b8831777e2a2ab667ceb20fdbac6f7c9bf4545342064824c873d29e41904a8a5"
    for part in FILES:
        array = getattr(digits, part).copy()
        array[-1] ^= 1
        assert dataclasses.replace(digits, **{part: array}).fingerprint != digits.fingerprint
    same = dataclasses.replace(digits, test_images=np.asfortranarray(digits.test_images))
    assert same.fingerprint == digits.fingerprint


def test_digits_are_those_of_scikit_learn_in_the_form_of_mnist(digits: Dataset) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    is_test = np.arange(1797) % 5 == 4
    for images, labels, chosen in (
        (digits.train_images, digits.train_labels, ~is_test),
        (digits.test_images, digits.test_labels, is_test),
    ):
        assert (images.shape[1:], images.dtype, labels.dtype) == ((28, 28, 1), np.uint8, np.int32)
        assert labels.tolist() == bunch.target[chosen].tolist()
        pixels = np.round(bunch.images[chosen] * 255 / 16)
        np.testing.assert_array_equal(images[:, 2:26, 2:26, 0], pixels.repeat(3, axis=1).repeat(3, axis=2))
        assert images.astype(int).sum() == 9 * pixels.sum()  # The margin is 0.
    assert digits.class_names == tuple("0123456789")


def test_digits_that_are_not_installed_are_an_error(monkeypatch, tmp_path) -> None:
    class Empty:
        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    monkeypatch.setattr(data, "distribution", lambda _: Empty())
    with pytest.raises(DataError, match=r"scikit-learn's digits cannot be read .*--dataset"):
        data.load("digits", notify=print)


@pytest.mark.parametrize("name", data.REGISTRY)
def test_the_registry_is_that_of_tensorflow_datasets(name, tmp_path, monkeypatch) -> None:
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # The constructor leaves an empty folder there.
    builder, entry = tfds.builder(name), data.REGISTRY[name]
    registered = {url: (info.size, info.checksum) for url, info in builder.url_infos.items()}
    assert {f"{entry.url}/{FILES[part]}": file for part, file in entry.files.items()} == registered
    assert entry.class_names == tuple(builder.info.features["label"].names)


# A folder of files


@pytest.fixture
def folder(tmp_path: Path, mnist_dir: Path) -> Path:
    """A folder with links to the four files of MNIST."""
    folder = tmp_path / "files"
    folder.mkdir()
    for file in FILES.values():
        (folder / file).symlink_to(mnist_dir / file)
    return folder


def flip(content: bytes) -> bytes:
    return content[:1000] + bytes([content[1000] ^ 1]) + content[1001:]


def halve(content: bytes) -> bytes:
    return content[: len(content) // 2]


def repack(content: bytes) -> bytes:
    return gzip.compress(gzip.decompress(content), 1)


@pytest.mark.parametrize("part", FILES)
def test_a_missing_or_corrupt_file_is_named(part: str, folder: Path) -> None:
    path = folder / FILES[part]
    if part.endswith("labels"):
        replace(path, flip(path.read_bytes()))
        refused(folder, path, data.REGISTRY["mnist"].files[part][1], "--data-dir")
    path.unlink()
    refused(folder, path, "No such file or directory")
    path.symlink_to(path)
    refused(folder, path, "Too many levels of symbolic links")


@pytest.mark.parametrize(
    "damage", [halve, lambda _: b"", lambda content: content[::-1], lambda content: gzip.compress(bytes(8))]
)
def test_a_file_of_other_bytes_is_refused(damage: Callable[[bytes], bytes], folder: Path) -> None:
    path = folder / FILES["test_labels"]
    replace(path, damage(path.read_bytes()))
    refused(folder, path, "4,542 bytes", data.REGISTRY["mnist"].files["test_labels"][1])


def refused(folder: Path, path: Path, *named: str) -> None:
    with pytest.raises(DataError) as refusal:
        data.load("mnist", folder, notify=pytest.fail)
    assert str(data.begin_to_load("mnist", folder).exception()) == str(refusal.value)
    assert all(word in str(refusal.value) for word in (str(path), *named))


def test_a_file_with_the_same_pixels_is_taken(folder: Path, mnist: Dataset) -> None:
    for part in ("test_labels", "test_images"):
        replace(folder / FILES[part], repack((folder / FILES[part]).read_bytes()))
    assert data.load("mnist", folder, notify=pytest.fail).fingerprint == mnist.fingerprint


def test_files_of_another_dataset_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=rf"{FILES['train_images']} .*cannot be verified.* 26,421,880"):
        data.load("fashion_mnist", folder, notify=pytest.fail)
    with pytest.raises(DataError, match=r"--data-dir .* leave it out"):
        data.load("digits", folder, notify=pytest.fail)
    with pytest.raises(DataError, match="dataset=auto"):
        data.load("auto", notify=pytest.fail)


def test_loading_uses_no_network_and_no_slow_import(folder: Path) -> None:
    program = (
        "import socket, sys; from pathlib import Path; from mnist_jax.training import data\n"
        "def broken(*args, **kwargs): raise SystemExit('the network was used')\n"
        "socket.socket = socket.create_connection = socket.getaddrinfo = broken\n"
        "for name, folder in (('mnist', Path(sys.argv[1])), ('digits', None)):\n"
        "    print(data.resolve(name, folder, notify=print), data.load(name, folder, notify=print).fingerprint[:6])\n"
        "print({'tensorflow_datasets', 'sklearn', 'jax'} & {*sys.modules})"
    )
    ended = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == ["mnist 961972", "digits b88317", "set()"]


# The cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, not there yet, in which TensorFlow Datasets keeps what it downloads, and no other folder."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tfds" / "downloads"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "socket", broken)
    monkeypatch.setattr(socket, "getaddrinfo", broken)


@pytest.fixture
def filled(cache: Path, mnist_dir: Path, no_network: None) -> dict[str, Path]:
    """The cache, filled as TensorFlow Datasets does, and no network."""
    from tensorflow_datasets.core.download.resource import get_dl_fname

    (cache / "mnist").mkdir(parents=True)
    entry, paths = data.REGISTRY["mnist"], {}
    for part, (_, sha256) in entry.files.items():
        paths[part] = cache / "mnist" / get_dl_fname(f"{entry.url}/{FILES[part]}", sha256)
        paths[part].symlink_to(mnist_dir / FILES[part])
    return paths


def test_a_full_cache_is_only_read(filled, cache, folder, mnist, capfd) -> None:
    before = sorted(cache.rglob("*"))
    assert data.resolve("auto", None, notify=pytest.fail) == "mnist"
    assert data.load("mnist", notify=pytest.fail).fingerprint == mnist.fingerprint
    for data_dir in (folder, None):
        loaded = data.begin_to_load("mnist", data_dir).result()
        assert vars(loaded)["fingerprint"] == mnist.fingerprint
    assert sorted(cache.rglob("*")) == before  # It may be shared and read-only.
    assert capfd.readouterr() == ("", "")


def test_a_corrupt_file_in_the_cache_is_named(filled: dict[str, Path]) -> None:
    path = filled["test_labels"]
    replace(path, flip(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{re.escape(str(path))} is corrupt .* delete it"):
        data.load("mnist", notify=pytest.fail)


# Downloads


class Server:
    """A real server of the real files on this machine. It can be made to fail."""

    def __init__(self, files: Path) -> None:
        self.requests: list[str] = []
        self.methods: set[str] = set()
        self.status = 200
        self.damage: Callable[[bytes], bytes] = lambda content: content
        self.sent: Callable[[bytes], bytes] = lambda content: content
        self.stalls = False
        self._released = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                server.methods.add("HEAD")
                self.send_error(405)

            def do_GET(self) -> None:
                server.methods.add("GET")
                file = self.path.lstrip("/")
                server.requests.append(file)
                content = server.damage((files / file).read_bytes())
                self.send_response(server.status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(server.sent(content))
                if server.stalls:
                    server._released.wait()

            def log_message(self, *args: object) -> None:
                pass

        class Quiet(http.server.ThreadingHTTPServer):
            def handle_error(self, *args: object) -> None:
                pass  # A client may close the connection early.

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
def server(mnist_dir: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of MNIST, which replaces the one in the registry, and an empty cache."""
    server = Server(mnist_dir)
    register(server.url, monkeypatch)
    yield server
    server.stop()


def register(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(data.REGISTRY, "mnist", data.REGISTRY["mnist"]._replace(url=url))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_missing_files_are_downloaded_once(cache: Path, server: Server, mnist: Dataset, capfd) -> None:
    lines: list[str] = []
    assert data.resolve("auto", None, notify=lines.append) == "mnist"
    assert server.requests == list(FILES.values())
    assert server.methods == {"GET"}  # Some servers answer HEAD with 405.
    assert len(lines) == 4
    assert f"{server.url}/{FILES['train_images']} (9.9 MB) into {cache}" in lines[0]
    assert data.load("mnist", notify=pytest.fail).fingerprint == mnist.fingerprint

    path = next(cache.rglob("*test_labels*"))
    replace(path, flip(path.read_bytes()))
    with pytest.raises(DataError, match=re.escape(str(path))):
        data.load("mnist", notify=pytest.fail)
    path.unlink()
    assert data.load("mnist", notify=lines.append).fingerprint == mnist.fingerprint
    assert server.requests == [*FILES.values(), FILES["test_labels"]]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", [flip, lambda content: b"<html>log in</html>"])
def test_other_bytes_from_a_server_are_refused(damage, cache: Path, server: Server) -> None:
    server.damage = damage
    for _ in range(2):  # The second start does not find the bad file.
        with pytest.raises(DataError, match=f"{server.url}.* is corrupt"):
            data.load("mnist", notify=[].append)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_a_download_that_fails_is_an_error_and_can_be_repeated(cache, server: Server, monkeypatch, mnist) -> None:
    monkeypatch.setattr(data, "STALL_TIMEOUT_S", 0.5)
    server.sent = halve
    for server.stalls in (False, True):
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=f"{server.url}/{FILES['train_images']} failed"):
            data.load("mnist", notify=[].append)
        assert time.monotonic() - started < 5
        assert [path for path in cache.rglob("*") if path.is_file()] == []
    server.stalls, server.status = False, 503
    with pytest.raises(UnreachableError, match=f"{server.url}.*503"):
        data.load("mnist", notify=[].append)
    assert server.requests == 3 * [FILES["train_images"]]
    server.status, server.sent = 200, lambda content: content
    assert data.load("mnist", notify=[].append).fingerprint == mnist.fingerprint


@pytest.mark.parametrize("kind", ["refused", "silent", "nameless"])
def test_without_a_network_auto_is_the_digits(kind: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "ANSWER_TIMEOUT_S", 0.5)
    lines: list[str] = []
    with without_network(kind, monkeypatch) as url:
        started = time.monotonic()
        assert data.resolve("auto", None, notify=lines.append) == "digits"
        with pytest.raises(UnreachableError, match=rf"{re.escape(url)}.*--data-dir"):
            data.load("mnist", notify=pytest.fail)
        assert time.monotonic() - started < 3
    assert len(lines) == 1
    assert all(word in lines[0] for word in ("built-in digits", "instead of MNIST", url, "--data-dir"))


class without_network:  # noqa: N801
    """No network while the `with` block runs; its value is the URL that cannot be reached.

    refused: nothing listens at the port. silent: a server accepts and does not answer. nameless: the lookup of the
    host name does not end, as behind some firewalls.
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


def replace(path: Path, content: bytes) -> None:
    """Put a file in the place of a link or a file."""
    path.unlink()
    path.write_bytes(content)
