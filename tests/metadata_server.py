"""A loopback server that behaves like the metadata servers of the three clouds, and worse."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GCP = "/computeMetadata/v1/instance/preempted"
AWS = "/latest/meta-data/spot/instance-action"
AZURE = "/metadata/scheduledevents?api-version=2020-07-01"
NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"


class MetadataServer(ThreadingHTTPServer):
    """A server in which a test changes what is answered.

    Attributes:
        preempted: whether Compute Engine preempts the machine.
        action: the interruption of the spot instance on EC2.
        events: the scheduled events of Azure.
        fault: "" or a way not to answer, one of `FAULTS`.
        tokens: valid tokens of EC2.
        requested: method and path of all requests.
        sent: number of bytes of the largest giant.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.preempted, self.action, self.events = False, "", list[dict[str, Any]]()
        self.fault, self.tokens, self.requested, self.sent = "", set[str](), list[str](), 0
        self.may_go_on = threading.Event()  # of requests that hang

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"

    def start(self) -> None:
        """Answer in a thread."""
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def announce(self, cloud: str) -> None:
        """Announce the end of this machine."""
        if cloud == "gcp":
            self.preempted = True
        elif cloud == "aws":
            self.action = "terminate"
        else:
            self.events = [event("Preempt", "other"), event("Preempt", "other", "machine_7")]

    def handle_error(self, *_: object) -> None:
        """Print nothing when a client is gone."""


def event(kind: str, *machines: str) -> dict[str, Any]:
    """Return an event of Azure, with the fields that it sends."""
    fields = {"EventId": "602d9444", "EventStatus": "Scheduled", "ResourceType": "VirtualMachine"}
    return {**fields, "EventType": kind, "Resources": list(machines), "NotBefore": "Mon, 11 Apr 2022 22:26:58 GMT"}


@contextmanager
def serve() -> Iterator[MetadataServer]:
    with MetadataServer() as server:
        server.start()
        try:
            yield server
        finally:
            server.may_go_on.set()
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: MetadataServer

    def do_GET(self) -> None:
        self.server.requested.append(f"{self.command} {self.path}")
        if self.server.fault:
            FAULTS[self.server.fault](self)
        elif self.path == "/elsewhere":
            self.answer(200, b"TRUE", {"Metadata-Flavor": "Google"})
        else:
            self.answer(*self.as_a_cloud())

    do_PUT = do_GET  # noqa: N815 - the name is that of the standard library

    def as_a_cloud(self) -> tuple[Any, ...]:
        server, headers = self.server, self.headers
        match self.command, self.path:
            case "GET", path if path == GCP and headers["Metadata-Flavor"] == "Google":
                return 200, b"TRUE" if server.preempted else b"FALSE", {"Metadata-Flavor": "Google"}
            case "PUT", "/latest/api/token" if 1 <= int(headers["X-aws-ec2-metadata-token-ttl-seconds"]) <= 21600:
                token = f"token-{len(server.requested)}=="
                server.tokens.add(token)
                return 200, token.encode()
            case "GET", path if path == AWS:
                if headers["X-aws-ec2-metadata-token"] not in server.tokens:
                    return 401, b""
                content = json.dumps({"action": server.action, "time": "2027-01-01T08:22:00Z"})
                return (200, content.encode()) if server.action else (404, b"<html>")
            case "GET", path if path == AZURE and headers["Metadata"] == "true":
                return 200, json.dumps({"DocumentIncarnation": 1, "Events": server.events}).encode()
            case "GET", path if path == NAME and headers["Metadata"] == "true":
                return 200, b"machine_7"
        return 403, b""

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def hang(self) -> None:
        self.server.may_go_on.wait(60)
        self.answer(*self.as_a_cloud())

    def fail(self) -> None:
        _, *answer = self.as_a_cloud()
        self.answer(503, *answer)

    def send_giant(self) -> None:
        self.send_response(200)
        self.send_header("Metadata-Flavor", "Google")
        self.end_headers()
        sent = 0
        while sent < 1 << 27:
            sent += self.connection.send(bytes(1 << 16))
            self.server.sent = max(self.server.sent, sent)

    def die(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


FAULTS = {
    "hangs": _Handler.hang,
    "fails": _Handler.fail,
    "dies": _Handler.die,
    "speaks no HTTP": lambda handler: handler.wfile.write(b"x" * 60_000 + b"\n"),
    "sends HTML": lambda handler: handler.answer(200, b"<html>TRUE</html>"),
    "sends the truth without its header": lambda handler: handler.answer(200, b"TRUE"),
    "sends a giant": _Handler.send_giant,
    "sends other JSON": lambda handler: handler.answer(200, b'{"Events": [1], "action": "rebalance"}'),
    "sends deep JSON": lambda handler: handler.answer(200, b"[" * 500_000),
    "redirects": lambda handler: handler.answer(302, b"", {"Location": f"http://{handler.server.address}/elsewhere"}),
}
