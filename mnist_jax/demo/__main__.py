"""The command `python -m mnist_jax.demo`: a page on which one draws a digit and sees it read while one draws.

It writes nothing in the run directory, also while the run is at work; then each newer checkpoint answers as soon as it
is there.
"""

import base64
import contextlib
import errno
import hashlib
import ipaddress
import logging
import re
import socket
import sys
import threading
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
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
    from flask import Flask, Response

    from mnist_jax.checkpoint.checkpoint import Checkpoint
    from mnist_jax.inference.classifier import Classifier

MAX_BYTES = 1_000_000  # The page sends 5,000.
MAX_PIXELS = 4_000_000
LOOK_EVERY_S = 1.0
PROBLEMS: dict[int | None, str] = {
    errno.EADDRINUSE: "the port is in use; name another one with --port N, or 0 for any that is free",
    errno.EACCES: "you may not use this port; name one above 1023 with --port N, or 0 for any that is free",
}


@dataclass(frozen=True)
class Options:
    """Serve a page on which one draws a digit and sees it read while one draws."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Directory of the run. Nothing is written there."""
    port: Annotated[int, tyro.conf.arg(metavar="N")] = 8000
    """Where the page is; 0 takes a port that is free."""
    host: Annotated[str, tyro.conf.arg(metavar="ADDRESS")] = "127.0.0.1"
    """Address of this machine to listen at. Whoever reaches it can use the page."""
    step: configs.WhichStep = "latest"


def main(args: Sequence[str]) -> int:
    """Serve the page until a signal comes, and return the exit code 0; for others see `cli.run`."""
    options = configs.cli(Options, "demo", args)
    return cli.run(lambda stop, terminal: serve(options, stop, terminal))


def serve(options: Options, stop: StopSignal, terminal: Terminal) -> int:
    """Serve the page until a signal comes, and return 0.

    Raises:
        CheckpointError, ConfigError, OSError: there is no classifier to ask, or no such place to listen at.
        StoppedError: a signal came before the page was there.
    """
    with listen(options.host, options.port) as listener:
        reader = find_reader(options, stop, terminal)
        import waitress

        address, port = listener.getsockname()[:2]
        place = f"[{address}]" if ":" in address else address
        own_names = None
        if ipaddress.ip_address(address).is_loopback:
            own_names = {"localhost", "127.0.0.1", "::1", address, options.host.lower()}
        else:
            terminal.warn(f"warning: anybody who reaches {place} can use this page")
        logging.getLogger("waitress").setLevel(logging.ERROR)  # Of a moment's queue nobody needs to hear.
        server = waitress.create_server(
            make_app(reader, own_names),
            sockets=[listener],
            channel_timeout=10,  # Who says nothing for so long makes room for others.
            max_request_header_size=2**14,
            max_request_body_size=2 * MAX_BYTES,  # Flask says more kindly what is too much, of what is not far more.
        )
        if options.step in ("latest", "best"):
            threading.Thread(target=reader.follow, daemon=True, name="look for checkpoints").start()
        terminal.info(
            f"draw at http://{place}:{port} and step {reader.model.step} of {options.workdir} reads it; Ctrl-C ends it"
        )
        try:
            stop.run(server.run)
        except StoppedError:
            assert stop.received is not None
            terminal.info(f"{stop.received.name}: the page is closed")
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that takes connections.

    Raises:
        ConfigError: the port or the address cannot be had.
    """
    if not 0 <= port < 2**16:
        raise ConfigError(f"--port {port}: ports go from 0 to {2**16 - 1}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        reason = str(error.args[-1]).partition(" (")[0]
        problem = PROBLEMS.get(getattr(error, "errno", None)) or f"{reason}; --host takes an address of this machine"
        raise ConfigError(f"cannot listen at {host}, port {port}: {problem}") from error


def find_reader(options: Options, stop: StopSignal, terminal: Terminal) -> "Reader":
    """Return the one who reads the drawings; where a run has saved nothing yet, wait for that.

    Raises:
        CheckpointError, ConfigError, OSError: there is no run, no such checkpoint, or it cannot be read.
        StoppedError: a signal came.
    """
    from mnist_jax.inference import classifier, preprocessing

    waits_for = ""
    while True:
        try:
            reader = stop.run(lambda: Reader(options.workdir, options.step, terminal))
            break
        except classifier.NoCheckpointYetError as error:
            if str(error) != waits_for:
                waits_for = str(error)
                terminal.info(f"{waits_for}; the page comes then")
            time.sleep(0.2)  # A training saves seldom; of a signal meanwhile `stop.run` tells.
    if caution := preprocessing.caution(reader.model.data.name):
        terminal.warn(f"warning: {caution}")
    return reader


class Reader:
    """The classifier that reads the drawings: of a run at work the newest that can be had."""

    def __init__(self, workdir: Path, which: configs.WhichStep, terminal: Terminal) -> None:
        """Load the classifier; what is wrong with later ones, `terminal` is told.

        Raises:
            CheckpointError, ConfigError, OSError: see `classifier.load`.
        """
        self._workdir, self._which, self._terminal = workdir, which, terminal
        self._seen, self._told = self._checkpoints(), ""
        self.model = self._load()

    def follow(self) -> NoReturn:
        """Look for a newer checkpoint again and again."""
        while True:
            time.sleep(LOOK_EVERY_S)
            self.look()

    def look(self) -> None:
        """Take a newer checkpoint, if there is one that can be read; nobody who is drawing waits for that."""
        from mnist_jax.checkpoint.integrity import CheckpointError

        try:
            found = self._checkpoints()
            if found == self._seen:
                return
            self.model = self._load()
        except (CheckpointError, ConfigError, OSError) as error:
            if self._told != (told := str(error)):
                self._told = told
                self._terminal.warn(f"warning: {error}. Step {self.model.step} goes on reading.")
            if isinstance(error, OSError):  # It may pass: the next look tries again.
                return
        self._seen = found

    def _checkpoints(self) -> "list[Checkpoint]":
        """Return which checkpoints are there; none where there is no run any more."""
        from mnist_jax.checkpoint.checkpoint import list_checkpoints

        return list_checkpoints(self._workdir / "checkpoints")

    def _load(self) -> "Classifier":
        from mnist_jax.inference import classifier

        model = classifier.load(self._workdir, self._which)
        model.predict(np.zeros((28, 28, 1), np.uint8))  # The first answer of all compiles.
        return model


def make_app(reader: Reader, own_names: Container[str] | None = None) -> "Flask":
    """Return the page and what it asks for, as a WSGI application.

    Args:
        reader: who reads the drawings.
        own_names: what this server is called, or None where that is not known. A page from elsewhere whose name was
            made to lead here (DNS rebinding) asks by that name. The port may be that of a tunnel.
    """
    from flask import Flask, abort, json, request
    from werkzeug.exceptions import HTTPException

    from mnist_jax.inference import preprocessing

    app = Flask(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BYTES
    page = resources.files("mnist_jax.demo").joinpath("demo.html").read_text(encoding="utf-8")
    headers = security_headers(page)

    @app.before_request
    def refuse_pages_of_others() -> None:
        if own_names is not None and host_name(request.host) not in own_names:
            abort(403, "this server does not go by that name")
        if request.method == "POST" and request.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none"):
            abort(403, "the page of another site may not ask")

    @app.get("/")
    def show_page() -> str:
        return page

    @app.get("/model")
    def show_model() -> dict[str, Any]:
        return describe(reader.model)

    @app.post("/predict")
    def predict() -> dict[str, Any]:
        model = reader.model  # In the next line it may be another.
        try:
            image = preprocessing.prepare(request.get_data(), model.data.name, max_pixels=MAX_PIXELS)
        except preprocessing.UnreadableImageError as error:
            abort(400, str(error))
        probabilities = model.predict(image)
        return {
            "answer": model.class_names[probabilities.argmax()],
            "probabilities": probabilities.tolist(),
            "image": image.ravel().tolist(),
            "model": describe(model),
        }

    @app.errorhandler(HTTPException)
    def explain(error: HTTPException) -> Any:
        response = error.get_response()
        response.data, response.content_type = json.dumps({"error": error.description}), "application/json"
        return response

    @app.after_request
    def protect(response: "Response") -> "Response":
        response.headers.update(headers)
        return response

    return app


def host_name(host: str) -> str | None:
    """Return the name in a Host header, in small letters and without the port, or None where there is none."""
    with contextlib.suppress(ValueError):
        return urlsplit(f"//{host}").hostname
    return None


def security_headers(page: str) -> dict[str, str]:
    """Return headers by which a browser runs nothing but the script and the style in `page`, and loads nothing."""
    sources = {}
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        sources[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{sources['script']}'; style-src 'sha256-{sources['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


def describe(model: "Classifier") -> dict[str, Any]:
    """Return what the page tells of a classifier, as JSON values."""
    return {
        "run": model.checkpoint.path.absolute().parents[1].name,
        "dataset": model.data.name,
        "class_names": list(model.class_names),
        "step": model.step,
        "test_accuracy": model.test_accuracy,
    }


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
