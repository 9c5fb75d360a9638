"""The command `python -m mnist_jax.demo`: serve a page that predicts a digit while the user draws it.

Read-only; safe while the run trains. The page then uses each newer checkpoint as soon as it is committed.
"""

import ipaddress
import logging
import random
import socket
import sys
import threading
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn
from urllib.parse import urlsplit

import numpy as np
import tyro

from mnist_jax import cli
from mnist_jax import config as configs
from mnist_jax.config import ConfigError
from mnist_jax.console import Terminal, exit_process
from mnist_jax.runtime.preemption import StoppedError, StopSignal

if TYPE_CHECKING:
    from flask import Flask

    from mnist_jax.inference.classifier import Classifier

MAX_BYTES = 1_000_000  # The page sends about 5,000.
MAX_PIXELS = 4_000_000
RELOAD_EVERY_S = 1.0
# Requests that do not end must neither keep the others waiting nor keep their connections. They take no thread: the
# server reads all connections in one, and passes on what is complete. Most processes may have 1,024 files open.
MAX_CONNECTIONS = 800
REQUEST_TIMEOUT_S = 10
FORBIDDEN = """This server answers only requests to localhost, so that a page of another site cannot use it.
Behind a proxy, let the proxy send the header "Host: localhost", or start the demo with --host 0.0.0.0, which answers
every name and everyone who can reach it.
"""


@dataclass(frozen=True)
class Options:
    """Serve a page that predicts a digit while the user draws it."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Directory of the run. Read-only."""
    port: Annotated[int, tyro.conf.arg(metavar="N")] = 8000
    """Port of the page; 0 chooses a free port."""
    host: Annotated[str, tyro.conf.arg(metavar="ADDRESS")] = "127.0.0.1"
    """Address to listen on. Everyone who can reach it can use the page. At a local address only the host names
    localhost and this one are answered; behind a proxy, let it send the header "Host: localhost"."""
    step: configs.WhichStep = "latest"
    data_dir: configs.DataDir = None


def main(args: Sequence[str]) -> int:
    """Serve the page until a signal arrives, and return 0; for errors see `cli.run`."""
    return cli.run(partial(serve, cli.parse(Options, "demo", args)))


def serve(options: Options, stop: StopSignal, terminal: Terminal) -> int:
    """Serve the page until a signal arrives, and return 0."""
    with listen(options.host, options.port) as listener:
        reloader = wait_for_classifier(options, stop, terminal)
        address, port = listener.getsockname()[:2]
        url_host = f"[{address}]" if ":" in address else address
        is_local = ipaddress.ip_address(address).is_loopback
        if not is_local:
            terminal.warn(f"warning: everyone who can reach {url_host} can use this page")
        logging.getLogger("waitress").setLevel(logging.ERROR)  # It warns whenever a request waits.
        own_names = {"localhost", address, options.host} if is_local else None
        app = make_app(reloader, own_names)
        server = make_server(app, listener)
        if options.step in ("latest", "best"):
            threading.Thread(target=reloader.watch, daemon=True, name="reload checkpoints").start()
        step = reloader.model.step
        terminal.info(f"draw at http://{url_host}:{port} (step {step} of {options.workdir}); Ctrl-C stops the server")
        try:
            stop.run(server.run)
        except StoppedError:
            terminal.info("the server stopped")
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket."""
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port {port} is out of range; use 0 to {2**16 - 1}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {host}, port {port} ({error}); use another --port or --host") from error


def make_server(app: "Flask", listener: socket.socket, *, timeout_s: int = REQUEST_TIMEOUT_S) -> Any:
    """Return a server of the page; a connection without traffic is closed after 1 to 1.5 times `timeout_s`."""
    import waitress

    return waitress.create_server(
        app,
        sockets=[listener],
        max_request_body_size=MAX_BYTES,
        connection_limit=MAX_CONNECTIONS,
        asyncore_use_poll=True,  # `select` fails for the file descriptors from 1,024 on.
        channel_timeout=timeout_s,
        cleanup_interval=max(1, timeout_s // 2),
    )


def wait_for_classifier(options: Options, stop: StopSignal, terminal: Terminal) -> "ModelReloader":
    """Return the classifier of a run. If the run has no checkpoint yet, wait for it."""
    from mnist_jax.training import selection

    is_waiting = False
    while True:
        try:
            return stop.run(lambda: ModelReloader(options.workdir, options.step, terminal, options.data_dir))
        except selection.NoCheckpointYetError as error:
            if not is_waiting:
                terminal.info(f"waiting: {error}")
            is_waiting = True
            time.sleep(0.2)


class ModelReloader:
    """The classifier of a run, replaced when the run commits a newer checkpoint or is started over."""

    def __init__(
        self, workdir: Path, which: configs.WhichStep, terminal: Terminal, data_dir: Path | None = None
    ) -> None:
        """Load the classifier; see `classifier.load`. `data_dir` holds the test images, by default as the run says."""
        self._workdir, self._which, self._terminal, self._data_dir = workdir, which, terminal, data_dir
        self._last_error = self._last_warning = ""
        self._test_set: tuple[Any, tuple[np.ndarray, np.ndarray]] | None = None  # the data in the metadata, and arrays
        self.model = self._load()

    def watch(self) -> NoReturn:
        """Look for a newer checkpoint repeatedly."""
        while True:
            time.sleep(RELOAD_EVERY_S)
            self.reload()

    def reload(self) -> None:
        """Load another checkpoint, if there is one. After an error the present classifier stays."""
        from mnist_jax.checkpoint.integrity import CheckpointError
        from mnist_jax.training import selection

        try:
            # A run that was started over has the same steps again.
            found = selection.read(self._workdir, self._which, lambda one: (one.step, one.manifest()["state_sha256"]))
            if found != (self.model.step, self.model.sha256):
                self.model = self._load()
        except (CheckpointError, ConfigError, OSError) as error:
            if str(error) != self._last_error:
                self._terminal.warn(f"warning: {error}. The page still uses step {self.model.step}.")
            self._last_error = str(error)

    def test_set(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the test images of the run, [N, 28, 28, 1] uint8, and labels, [N]; loaded once for the same data.

        Raises:
            DataError: they cannot be loaded.
        """
        model, loaded = self.model, self._test_set  # Other threads may replace them.
        if loaded is None or loaded[0] != model.metadata["data"]:
            dataset = model.load_dataset(self._data_dir, notify=self._terminal.warn)
            self._test_set = loaded = model.metadata["data"], (dataset.test_images, dataset.test_labels)
        return loaded[1]

    def _load(self) -> "Classifier":
        from mnist_jax.inference import classifier, preprocessing

        model = classifier.load(self._workdir, self._which, on_cpu=True)
        preprocessing.check_shape(model.image_shape)
        model.predict(np.zeros((*model.image_shape, 1), np.uint8))  # The first call compiles.
        warning = preprocessing.dataset_warning(model.data.name)
        if warning and warning != self._last_warning:
            self._terminal.warn(f"warning: {warning}")
        self._last_warning = warning or ""
        return model


def make_app(reloader: ModelReloader, own_names: Container[str] | None = None) -> "Flask":
    """Return the WSGI application of the page.

    Args:
        reloader: the classifier.
        own_names: the host names that requests may use, None for all. Other names mean that a page of another site
            reaches this server by DNS rebinding.
    """
    from flask import Flask, request

    from mnist_jax.inference import classifier, preprocessing
    from mnist_jax.inference.images import UnreadableImageError
    from mnist_jax.training.array_files import DataError

    app = Flask(__name__, static_folder=None)
    page = resources.files("mnist_jax.demo").joinpath("demo.html").read_text(encoding="utf-8")

    @app.before_request
    def check_host() -> Any:
        if own_names is not None and urlsplit(f"//{request.host}").hostname not in own_names:
            return FORBIDDEN, 403, {"Content-Type": "text/plain"}
        return None

    @app.get("/")
    def show_page() -> str:
        return page

    @app.get("/model")
    def show_model() -> dict[str, Any]:
        return describe(reloader.model)

    @app.get("/test-image")
    def choose_test_image() -> Any:
        try:
            images, labels = reloader.test_set()
        except DataError as error:
            return {"error": f"There are no test images: {error}"}, 404
        index = random.randrange(len(images))
        label = reloader.model.class_names[labels[index]]
        return {"index": index, "label": label, "image": images[index].ravel().tolist()}

    @app.post("/predict")
    def predict() -> Any:
        model = reloader.model  # Another thread may replace it.
        index = request.args.get("test", type=int)
        try:
            if index is None:
                image = preprocessing.prepare(request.get_data(), model.data.name, max_pixels=MAX_PIXELS)
            else:
                image = reloader.test_set()[0][index]
        except UnreadableImageError as error:
            return {"error": str(error)}, 400 if error.problem == "unreadable" else 200
        except (DataError, IndexError) as error:
            return {"error": str(error)}, 400
        probabilities = model.predict(image)
        return {
            "answer": model.class_names[probabilities.argmax()],
            "is_sure": bool(probabilities.max() >= classifier.MIN_SURE),
            "probabilities": probabilities.tolist(),
            "image": image.ravel().tolist(),
            "model": describe(model),
        }

    return app


def describe(model: "Classifier") -> dict[str, Any]:
    """Return what the page shows about a classifier, as JSON values."""
    return {
        "run": model.checkpoint.path.absolute().parents[1].name,
        "class_names": list(model.class_names),
        "step": model.step,
        "test_accuracy": model.test_accuracy,
    }


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
