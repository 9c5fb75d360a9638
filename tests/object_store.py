"""Servers with the APIs of S3 and Google Cloud Storage, and servers that fail."""

import contextlib
import importlib.util
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

S3 = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
GCS = """
import socket, sys
from gcp_storage_emulator.server import create_server
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket").start()
print(port, flush=True)
sys.stdin.read()
"""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG"}
NEARBY = {"no_proxy": "127.0.0.1", "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}


def s3_environment(port: int) -> dict[str, str]:
    """Return variables that direct clients of S3 to a local port."""
    return {**CREDENTIALS, **NEARBY, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}


def gcs_environment(port: int) -> dict[str, str]:
    """Return variables that direct TensorStore's client of Google Cloud Storage to a local port."""
    here = f"127.0.0.1:{port}"
    return {**NEARBY, "TENSORSTORE_GCS_HTTP_URL": f"http://{here}", "GCE_METADATA_ROOT": here}


@contextlib.contextmanager
def s3_server() -> Iterator[tuple[str, dict[str, str]]]:
    """Run Moto, and yield the URL of a bucket and its environment."""
    with _running("moto", S3) as port:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60).close()
        yield "s3://bucket", s3_environment(port)


@contextlib.contextmanager
def gcs_server() -> Iterator[tuple[str, dict[str, str]]]:
    """Run an emulator of Google Cloud Storage, and yield the URL of a bucket and its environment."""
    with _running("gcp_storage_emulator", GCS) as port:
        yield "gs://bucket", gcs_environment(port)


@contextlib.contextmanager
def _running(package: str, script: str) -> Iterator[int]:
    """Run a server that prints its port and exits when its input is closed."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def closed_port() -> Iterator[int]:
    """Yield a port on which no process listens or can listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


class Answer:
    """The answer of a server to every request: `status` and `body`, or none while `silent` is set."""

    def __init__(self) -> None:
        self.status, self.body, self.silent = 200, b"", False
        self.end = threading.Event()


@contextlib.contextmanager
def answering_server() -> Iterator[tuple[int, Answer]]:
    """Run a server that gives the same answer to every request; yield its port and the answer, which can be changed."""
    answer = Answer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if answer.silent:
                answer.end.wait(60)
                return
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 - names of http.server

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server.server_port, answer
    finally:
        answer.end.set()
        server.shutdown()
        server.server_close()
        thread.join()
