"""Latency of a prediction on the page of `mnist_jax.demo`."""

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

SENT_PX = 140  # as in mnist_jax/demo/demo.html
THREE = [(40, 35), (60, 22), (87, 30), (90, 50), (65, 65), (92, 77), (95, 102), (70, 115), (40, 105)]


def drawing(bench: Bench) -> Iterator[Row]:
    """Measure the latency of predictions on an idle machine, and beside a training run in the same directory."""
    with TemporaryDirectory(dir=bench.folder) as folder:
        workdir = Path(folder)
        stop_once(bench, workdir, 0.5)
        yield from rows("prediction of a drawing", latencies_ms(bench, workdir))
        with bench.start(workdir, *ENDLESS) as training:
            wait_for_phase("train", workdir, training)
            yield from rows("prediction of a drawing beside training", latencies_ms(bench, workdir))
            if training.has_exited:
                raise training.error("exited during the measurement")


def rows(what: str, ours: list[float]) -> Iterator[Row]:
    """Yield the rows for median and 99th percentile."""
    yield Row(what=what, unit="ms", ours=ours)
    yield Row(what=what, unit="ms", ours=ours, of="p99", goals=("ours ≤ 30",))


def latencies_ms(bench: Bench, workdir: Path) -> list[float]:
    """Return the latency of each prediction, from the request to the last byte."""
    content = three()
    with Process("mnist_jax.demo", str(workdir), "--port", "0", stdout=subprocess.PIPE) as demo:
        connection = http.client.HTTPConnection("127.0.0.1", port_of(demo), timeout=DEADLINE_S)
        with contextlib.closing(connection):
            return [latency_ms(connection, content) for _ in range(bench.plan.drawings)]


def port_of(demo: Process) -> int:
    """Wait until the page is served, and return its port.

    Raises:
        BenchmarkError: it is not served.
    """
    assert demo.popen.stdout is not None
    line = demo.popen.stdout.readline()
    if not (found := re.search(r"http://127\.0\.0\.1:([0-9]+)", line)):
        raise demo.error("does not serve the page")
    return int(found[1])


def latency_ms(page: http.client.HTTPConnection, content: bytes) -> float:
    """Request one prediction, and return its latency."""
    start_s = time.perf_counter()
    page.request("POST", "/predict", content)
    response = page.getresponse()
    response.read()
    if response.status != 200:
        raise RuntimeError(f"/predict returned {response.status} {response.reason}")
    return 1000 * (time.perf_counter() - start_s)


def three() -> bytes:
    """Return a PNG file like those that the page sends: a 3 with the same line width and size."""
    image = Image.new("RGBA", (SENT_PX, SENT_PX), "white")
    ImageDraw.Draw(image).line(THREE, fill="black", width=SENT_PX // 12, joint="curve")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
