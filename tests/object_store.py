"""Servers with the APIs of S3, of Google Cloud Storage and of Azure, and servers that fail.

obstore uses Google's XML API, which has S3's requests and answers, so one server serves as both.
"""

import contextlib
import importlib.util
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import pytest

MOTO = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG"}
NEARBY = {"no_proxy": "127.0.0.1", "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}


def s3_environment(port: int) -> dict[str, str]:
    """Return variables that direct clients of S3 to a local port."""
    return {**CREDENTIALS, **NEARBY, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


def gcs_environment(port: int) -> dict[str, str]:
    """Return variables that direct obstore's client of Google Cloud Storage to a local port."""
    return {**NEARBY, "GOOGLE_BASE_URL": f"http://127.0.0.1:{port}", "GOOGLE_BEARER_TOKEN": "token"}


def azure_environment(port: int) -> dict[str, str]:
    """Return variables that direct obstore's client of Azure to a local port."""
    account = {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_STORAGE_SAS_TOKEN": "?sv=1&sig=hunter2"}
    return {**NEARBY, **account, "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{port}"}


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[str, dict[str, str]]]:
    """Run Moto, and yield the URL of a bucket and its environment."""
    with moto_server() as port:
        yield "s3://bucket", s3_environment(port)


@contextlib.contextmanager
def moto_server() -> Iterator[int]:
    """Run Moto with an empty bucket, and yield its port. It exits when its input is closed."""
    if importlib.util.find_spec("moto") is None:
        pytest.skip("moto is not installed")
    process = subprocess.Popen(
        [sys.executable, "-c", MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        port = int(process.stdout.readline())
        request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60).close()
        yield port
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def azure_server() -> Iterator[int]:
    """Run a server with Azure's answers to the requests that this program makes, and yield its port."""
    blobs: dict[str, bytes] = {}
    head = {"ETag": '"1"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}

    class Handler(QuietHandler):
        def do_PUT(self) -> None:
            blobs[self._path().path] = self.rfile.read(int(self.headers["Content-Length"]))
            self.answer(201, b"", head)

        def do_GET(self) -> None:
            url = self._path()
            if "comp" in (query := parse_qs(url.query)):
                prefix = f"{url.path}/{query['prefix'][0]}"
                return self.answer(200, self._list(url.path, sorted(name for name in blobs if name.startswith(prefix))))
            found = url.path in blobs
            return self.answer(200 if found else 404, blobs.get(url.path, b""), head | {"x-ms-blob-type": "BlockBlob"})

        def do_POST(self) -> None:  # a batch of deletions
            requests = re.findall(r"DELETE (\S+)", self.rfile.read(int(self.headers["Content-Length"])).decode())
            part = "--b\r\nContent-Type: application/http\r\nContent-ID: {}\r\n\r\nHTTP/1.1 {} x\r\n\r\n"
            statuses = [404 if blobs.pop(unquote(path.split("?")[0]), None) is None else 202 for path in requests]
            body = "".join(part.format(number, status) for number, status in enumerate(statuses)) + "--b--\r\n"
            self.answer(202, body.encode(), {"Content-Type": "multipart/mixed; boundary=b"})

        def _path(self) -> SplitResult:
            url = urlsplit(self.path)
            return url._replace(path=unquote(url.path))

        @staticmethod
        def _list(container: str, names: list[str]) -> bytes:
            fields = {**head, "Content-Type": "x"}
            facts = "".join(f"<{name}>{value}</{name}>" for name, value in fields.items())
            rows = (
                f"<Blob><Name>{name.removeprefix(f'{container}/')}</Name>"
                f"<Properties>{facts}<Content-Length>{len(blobs[name])}</Content-Length></Properties></Blob>"
                for name in names
            )
            return f"<EnumerationResults><Blobs>{''.join(rows)}</Blobs><NextMarker/></EnumerationResults>".encode()

    with serving(Handler) as port:
        yield port


class QuietHandler(BaseHTTPRequestHandler):
    """Answers requests, and logs nothing."""

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """Run a server in threads, and yield its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """Yield a port on which no process listens or can listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


class Answer:
    """The answer of a server to every request: `status` and `body`.

    While `silent` is set there is none; while `stops` is set the server says nothing more after the first half of it.
    """

    def __init__(self) -> None:
        self.status, self.body, self.silent, self.stops = 200, b"", False, False
        self.headers = {"ETag": '"1"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
        self.requests: list[tuple[str, dict[str, str]]] = []  # methods and headers
        self.end = threading.Event()


@contextlib.contextmanager
def answering_server() -> Iterator[tuple[int, Answer]]:
    """Run a server that gives the same answer to every request; yield its port and the answer, which can be changed."""
    answer = Answer()

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            answer.requests.append((self.command, dict(self.headers)))
            if answer.silent:
                answer.end.wait(60)
            elif answer.stops:
                self.send_response(answer.status)
                for name, value in {**answer.headers, "Content-Length": str(2 * len(answer.body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer.body)
                self.wfile.flush()
                answer.end.wait(60)
            else:
                self.answer(answer.status, answer.body, answer.headers)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 - names of http.server

    with serving(Handler) as port:
        try:
            yield port, answer
        finally:
            answer.end.set()
