"""How long somebody who draws on the page of `mnist_jax.demo` waits for an answer."""

import contextlib
import http.client
import io
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageDraw

from benchmarks.bench import DEADLINE_S, ENDLESS, Bench, wait_for_phase
from benchmarks.interruptions import stop_once
from benchmarks.processes import Process
from benchmarks.report import Row

SENT_PX = 140  # as mnist_jax/demo/demo.html has it
THREE = [(40, 35), (60, 22), (87, 30), (90, 50), (65, 65), (92, 77), (95, 102), (70, 115), (40, 105)]


def drawing(bench: Bench) -> Iterator[Row]:
    """Ask what a digit is, again and again: on an idle machine, and beside a training in the same directory."""
    with TemporaryDirectory(dir=bench.folder) as folder:
        workdir = Path(folder)
        stop_once(bench, workdir, 0.5)
        yield from rows("a drawing's answer", waits_ms(bench, workdir))
        with bench.start(workdir, *ENDLESS) as training:
            wait_for_phase("train", workdir, training)
            yield from rows("a drawing's answer beside a training", waits_ms(bench, workdir))
            if training.has_ended:
                raise training.failed("ended while the answers were measured")


def rows(what: str, ours: list[float]) -> Iterator[Row]:
    """Yield what is usual and what is rare."""
    yield Row(what=what, unit="ms", ours=ours)
    yield Row(what=what, unit="ms", ours=ours, of="p99", goals=("ours ≤ 30",))


def waits_ms(bench: Bench, workdir: Path) -> list[float]:
    """Return how long each answer took, from the request to the last byte."""
    content = three()
    with Process("mnist_jax.demo", str(workdir), "--port", "0", stdout=subprocess.PIPE) as demo:
        connection = http.client.HTTPConnection("127.0.0.1", port_of(demo), timeout=DEADLINE_S)
        with contextlib.closing(connection):
            return [wait_ms(connection, content) for _ in range(bench.plan.drawings)]


def port_of(demo: Process) -> int:
    """Wait until the page is there, and return its port.

    Raises:
        Failed: it does not come.
    """
    assert demo.popen.stdout is not None
    said = demo.popen.stdout.readline()
    if not (found := re.match(r"draw at http://127\.0\.0\.1:([0-9]+) ", said)):
        raise demo.failed("did not come to serve the page")
    return int(found[1])


def wait_ms(page: http.client.HTTPConnection, content: bytes) -> float:
    """Ask once, and return how long that took."""
    start_s = time.perf_counter()
    page.request("POST", "/predict", content)
    answer = page.getresponse()
    answer.read()
    if answer.status != 200:
        raise RuntimeError(f"a drawing was answered with {answer.status} {answer.reason}")
    return 1000 * (time.perf_counter() - start_s)


def three() -> bytes:
    """Return a 3 drawn as wide as on the page, in a PNG file of the size that the page sends."""
    image = Image.new("RGBA", (SENT_PX, SENT_PX), "white")
    ImageDraw.Draw(image).line(THREE, fill="black", width=SENT_PX // 12, joint="curve")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
