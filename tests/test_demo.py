"""The demo page: predictions, reloading, the network, and the page in a browser."""

import base64
import http.client
import io
import json
import logging
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from pictures import DRAWN
from PIL import Image, ImageDraw
from runs import SMALL, snapshot, stop
from tampering import change_metadata, read_metadata

from mnist_jax import predict, train
from mnist_jax.console import Terminal
from mnist_jax.demo import __main__ as demo
from mnist_jax.inference import classifier, preprocessing
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import selection
from mnist_jax.training.data import DataError

pytestmark = pytest.mark.usefixtures("in_this_process")


def drawing(digit: str) -> bytes:
    """A PNG file like those in the requests of the page."""
    image = Image.new("RGBA", (140, 140), "white")
    for points in DRAWN[int(digit)]:
        scaled = [(140 * x, 140 * y) for x, y in points]
        ImageDraw.Draw(image).line(scaled, fill="black", width=12, joint="curve")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@contextmanager
def serving(workdir: Path, environment: dict[str, str], *args: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command on a free port."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "mnist_jax.demo", str(workdir), "--port", "0", *args],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def port_of(process: subprocess.Popen[str]) -> int:
    """Wait until the page is served, and return its port."""
    for line in process.stdout:
        if found := re.match(r"draw at http://[0-9.]+:([0-9]+) ", line):
            return int(found[1])
    raise AssertionError(process.stderr.read())


def ask(port: int, path: str, body: object = None, **headers: str) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET" if body is None else "POST", path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()


@pytest.fixture(scope="module")
def port(trained_run) -> Iterator[int]:
    """The port of the page of a finished run. The server reports no errors, whatever the tests request."""
    before, terminal = snapshot(trained_run.workdir), mock.create_autospec(Terminal, instance=True)
    [end] = trained_run.events("exit")
    options = demo.Options(trained_run.workdir, port=0, step=end["step"])  # so that it watches for no newer one
    thread = threading.Thread(target=demo.serve, args=(options, StopSignal(), terminal))
    made, make_server = queue.Queue(), demo.make_server

    def make_and_put(*args):
        server = make_server(*args)
        made.put(server)
        return server

    logged, handler = [], logging.Handler(logging.WARNING)
    handler.emit = logged.append
    with pytest.MonkeyPatch.context() as patch:
        for name in ("waitress", demo.__name__):  # Flask's logger has the name of the module.
            patch.setattr(logging.getLogger(name), "handlers", [handler])
        with patch.context() as at_start:
            at_start.setattr(demo, "make_server", make_and_put)
            thread.start()
            server = made.get(timeout=60)
        with closing_at_the_end(server, thread):
            yield server.effective_port
            assert (logged, terminal.warn.call_args_list) == ([], [])
    assert snapshot(trained_run.workdir) == before


@contextmanager
def closing_at_the_end(server, thread: threading.Thread) -> Iterator[None]:
    """Close a server that a thread runs, and wait for the thread."""
    try:
        yield
    finally:
        server.close()
        server.task_dispatcher.shutdown()
        server.trigger.close()
        thread.join()


@pytest.fixture(scope="module")
def reloader(trained_run) -> demo.ModelReloader:
    return demo.ModelReloader(trained_run.workdir, "latest", Terminal())


@pytest.fixture(scope="module")
def client(reloader):
    return demo.make_app(reloader).test_client()


@pytest.fixture
def growing(small_copy, tmp_path) -> tuple[Path, Callable[[], Path], Callable[[], Path]]:
    """A run at its first checkpoint, and functions that add a newer one: good, or corrupt."""
    first, *others = selection.find_checkpoints(small_copy)
    for checkpoint in others:
        checkpoint.path.rename(tmp_path / checkpoint.path.name)
    folder = small_copy / "checkpoints"

    def add() -> Path:
        return (tmp_path / "40").rename(folder / "40")

    def add_corrupt() -> Path:
        shutil.copytree(first.path, tmp_path / "39")
        (tmp_path / "39" / "manifest.json").write_bytes(b"{")
        return (tmp_path / "39").rename(folder / "39")

    return small_copy, add, add_corrupt


# Predictions


def test_drawn_digits_are_recognized(client):
    answers = {digit: client.post("/predict", data=drawing(digit)).json["answer"] for digit in "0123456789"}
    assert answers == {digit: digit for digit in answers}


def test_page_and_predict_agree(client, trained_run, tmp_path, capsys):
    (tmp_path / "3.png").write_bytes(drawing("3"))
    assert predict.main([str(trained_run.workdir), str(tmp_path / "3.png"), "--json"]) == 0
    [expected] = json.loads(capsys.readouterr().out)
    found = client.post("/predict", data=drawing("3")).json
    [end] = trained_run.events("exit")
    model = {
        "run": trained_run.workdir.name,
        "class_names": list(expected["probabilities"]),
        "step": end["step"],
        "test_accuracy": end["test_accuracy"],
    }
    assert client.get("/model").json == model
    assert found == {
        "answer": expected["answer"],
        "is_sure": expected["is_sure"],
        "probabilities": list(expected["probabilities"].values()),
        "image": preprocessing.prepare(drawing("3")).ravel().tolist(),
        "model": model,
    }


def test_unreadable_images_have_a_reason(client):
    huge = io.BytesIO()
    Image.new("L", (2001, 2000), 255).save(huge, "JPEG")
    for body, reason in ((b"", "empty"), (drawing("3")[:500], "corrupt"), (huge.getvalue(), "2001×2000 pixels")):
        answer = client.post("/predict", data=body)
        assert answer.status_code == 400
        assert reason in answer.json["error"]


def test_test_image_is_predicted_as_it_is(client, reloader):
    chosen = client.get("/test-image").json
    images, labels = reloader.test_set()
    assert chosen["image"] == images[chosen["index"]].ravel().tolist()
    assert chosen["label"] == str(labels[chosen["index"]])
    answer = client.post(f"/predict?test={chosen['index']}").json
    assert answer["image"] == chosen["image"]
    assert answer["probabilities"] == reloader.model.predict(images[chosen["index"]]).tolist()
    assert client.post(f"/predict?test={len(images)}").status_code == 400


def test_missing_test_images_have_a_reason(client, reloader, monkeypatch):
    monkeypatch.setattr(reloader, "test_set", lambda: (_ for _ in ()).throw(DataError("a file is missing")))
    answer = client.get("/test-image")
    assert (answer.status_code, answer.json["error"]) == (404, "There are no test images: a file is missing")


def test_test_images_come_from_the_folder_that_is_named(trained_run, tmp_path):
    with pytest.raises(DataError, match=str(tmp_path)):
        demo.ModelReloader(trained_run.workdir, "latest", Terminal(), tmp_path).test_set()


def test_blank_sheet_is_a_finding_not_a_bad_request(client):
    blank = io.BytesIO()
    Image.new("L", (140, 140), 255).save(blank, "PNG")
    answer = client.post("/predict", data=blank.getvalue())
    assert (answer.status_code, list(answer.json)) == (200, ["error"])


# Reloading


def test_newer_checkpoint_is_loaded(growing):
    workdir, add, _ = growing
    reloader = demo.ModelReloader(workdir, "latest", Terminal())
    before = reloader.model
    reloader.reload()
    assert reloader.model is before
    newest = add()
    reloader.reload()
    assert reloader.model.checkpoint.path == newest


def test_errors_are_reported_once_and_retried(growing, monkeypatch, capsys):
    workdir, add, add_corrupt = growing
    reloader = demo.ModelReloader(workdir, "latest", Terminal())
    first = reloader.model
    add_corrupt()
    for _ in range(3):
        reloader.reload()
    [warning] = capsys.readouterr().err.splitlines()
    assert "manifest.json" in warning
    newest = add()
    with monkeypatch.context() as patch:
        patch.setattr(classifier, "load", lambda *_, **__: (_ for _ in ()).throw(OSError("too many open files")))
        for _ in range(3):
            reloader.reload()
    assert capsys.readouterr().err.count("too many open files") == 1
    assert reloader.model is first
    reloader.reload()
    assert reloader.model.checkpoint.path == newest
    shutil.rmtree(workdir)
    for _ in range(3):
        reloader.reload()
    assert capsys.readouterr().err.count("no run") == 1
    assert reloader.model.checkpoint.path == newest


def test_run_that_is_started_over_is_loaded(small_copy, tmp_path):
    """It has the same steps again, and perhaps other data."""
    reloader = demo.ModelReloader(small_copy, "latest", Terminal())
    first, (images, _) = reloader.model, reloader.test_set()
    assert reloader.test_set()[0] is images
    small_copy.rename(tmp_path / "old")
    reloader.reload()
    assert train.main(["--workdir", str(small_copy), *SMALL, "--seed", "1"]) == 0
    checkpoint = small_copy / "checkpoints" / "40"
    change_metadata(checkpoint, data={**read_metadata(checkpoint)["data"], "sha256": "another"})
    reloader.reload()
    assert (reloader.model.step, reloader.model.config.seed) == (first.step, 1)
    assert reloader.test_set()[0] is not images


def test_demo_waits_for_a_run_and_follows_it(growing, environment, tmp_path):
    workdir, add, _ = growing
    [first] = selection.find_checkpoints(workdir)
    first.path.rename(tmp_path / "first")
    with serving(workdir, environment, "--host", "0.0.0.0") as process:
        assert "no checkpoint yet" in process.stdout.readline()
        (tmp_path / "first").rename(first.path)
        port = port_of(process)
        headers = {"Host": "any.example"}
        assert json.loads(ask(port, "/model", **headers)[1])["step"] == first.step
        add()
        before = snapshot(workdir)
        while json.loads(ask(port, "/predict", drawing("1"), **headers)[1])["model"]["step"] == first.step:
            assert process.poll() is None
        assert snapshot(workdir) == before
        ended = stop(process, signal.SIGTERM)
    assert ended.code == 0
    assert "everyone who can reach 0.0.0.0" in ended.err
    assert ended.err.count("\n") == 1


def test_signal_ends_the_wait(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    assert demo.main([str(tmp_path), "--port", "0"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().out.count("no checkpoint yet") == 1


# Network


def test_page_may_not_load_anything_else(client):
    page = client.get("/").text
    assert "default-src 'none'; script-src 'unsafe-inline'" in page
    assert set(re.findall("https?://[^'\"]*", page)) == {"http://www.w3.org/2000/svg"}  # an XML namespace


def test_other_host_names_are_forbidden(reloader):
    client = demo.make_app(reloader, {"localhost", "127.0.0.1", "::1"}).test_client()
    hosts = (
        "localhost:80",
        "127.0.0.1:8000",
        "[::1]:9",
        "LOCALHOST",
        "rebound.example:80",
        "localhost.example",
        "",
        "[",
    )
    codes = [client.get("/model", headers={"Host": host}).status_code for host in hosts]
    assert codes == [200, 200, 200, 200, 403, 403, 403, 403]
    assert "Behind a proxy" in client.get("/model", headers={"Host": "notebook.example"}).text


def test_server_is_local_and_limits_requests(port):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))
    assert ask(port, "/model", Host="rebound.example")[0] == 403
    assert ask(port, "/predict", iter(16 * [bytes(70_000)]))[0] == 413
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n\r\n")
        assert connection.recv(2**12).split()[1] == b"413"
    content = drawing("2")
    chunks = (content[first : first + 700] for first in range(0, len(content), 700))
    assert json.loads(ask(port, "/predict", chunks)[1])["answer"] == "2"


def test_unfinished_requests_delay_no_other_and_are_closed():
    def app(environ, start_response):
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    server = demo.make_server(app, demo.listen("127.0.0.1", 0), timeout_s=1)
    thread = threading.Thread(target=server.run)
    thread.start()
    with closing_at_the_end(server, thread), ExitStack() as stack:
        unfinished = []
        for _ in range(300):  # Waitress accepts 100 by default.
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.effective_port), timeout=60))
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n")
            unfinished.append(connection)
        started_s = time.monotonic()
        assert ask(server.effective_port, "/model") == (200, b"ok")
        answered_s = time.monotonic()
        assert [connection.recv(1) for connection in unfinished] == 300 * [b""]
        assert answered_s - started_s < 0.5 * (time.monotonic() - started_s)


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", None), ("192.0.2.1", 0), (64 * "é", 0), ("127.0.0.1", 65536)])
def test_unusable_address_is_usage_error(tmp_path, capsys, host, port):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if port is None else port
        assert demo.main([str(tmp_path), "--host", host, "--port", str(port)]) == 2
    err = capsys.readouterr().err
    assert "--port" in err
    assert err.count("\n") == 1


def test_missing_run_is_usage_error(tmp_path, capsys):
    assert demo.main([str(tmp_path), "--port", "0"]) == 2
    assert str(tmp_path) in capsys.readouterr().err


# Browser


class Page:
    """The page in a browser."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def run(self, script: str):
        return self.driver.execute_script(script)

    def draw(self, digit: str, kind: str = "mouse", *, parts: int = 1, on_part: Callable[[], object] = int) -> None:
        """Draw a digit; each stroke in parts, with `on_part` between them."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        box = self.run("return canvas.getBoundingClientRect().toJSON()")
        for points in DRAWN[int(digit)]:
            places = [(round(box["x"] + box["width"] * x), round(box["y"] + box["height"] * y)) for x, y in points]
            shares = [places[len(places) * part // parts : len(places) * (part + 1) // parts] for part in range(parts)]
            for part, share in enumerate(shares):
                builder = ActionBuilder(self.driver, mouse=PointerInput(kind, kind), duration=10)
                for number, place in enumerate(share):
                    builder.pointer_action.move_to_location(*place)
                    if part == number == 0:
                        builder.pointer_action.pointer_down()
                if part == parts - 1:
                    builder.pointer_action.pointer_up()
                builder.perform()
                if part < parts - 1:
                    on_part()

    def wait_for(self, script: str) -> None:
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 60, poll_frequency=0.02).until(lambda _: self.run(script))

    def wait(self) -> None:
        """Wait for the prediction of the present drawing."""
        self.wait_for("return !isRequesting && (predicted === changes || !strokes.length)")

    def press_escape(self) -> None:
        self.driver.find_element("tag name", "body").send_keys("\ue00c")

    def click(self, name: str) -> None:
        self.driver.find_element("id", name).click()

    @property
    def answer(self) -> str:
        return self.run("return answerBox.textContent")

    @property
    def bars(self) -> list[float]:
        """The lengths of the bars, 1 for the full length."""
        return self.run(
            "return [...document.querySelectorAll('.bar > span')].map((bar) => +bar.style.getPropertyValue('--share'))"
        )

    @property
    def ink(self) -> list[int]:
        """The sums of the pixels of the drawing, and of the image that the model sees."""
        return self.run(
            "const sum = (canvas, channel) => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)"
            ".data.reduce((sum, value, index) => sum + (index % 4 === channel ? value : 0), 0);"
            "return [sum(canvas, 3), sum(image, 0)]"
        )

    @property
    def is_empty(self) -> bool:
        hint = self.driver.find_element("id", "hint").is_displayed()
        return (self.answer, set(self.bars), self.ink, hint) == ("", {0}, [0, 0], True)


@pytest.fixture(scope="module")
def browser(port) -> Iterator[Page]:
    """A browser that has opened the page."""
    paths = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in paths:
        pytest.skip("chromium and chromedriver are not on the PATH")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,800"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(paths[1]))
    try:
        driver.get(f"http://127.0.0.1:{port}")
        yield Page(driver)
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        driver.quit()


@pytest.fixture
def page(browser) -> Page:
    """The page with an empty drawing."""
    browser.run("strokes = []; change()")
    return browser


@pytest.mark.parametrize(("digit", "kind"), [("7", "mouse"), ("3", "touch"), ("4", "pen")])
def test_digit_drawn_in_browser_is_recognized(page, digit, kind):
    assert page.is_empty
    page.draw(digit, kind)
    page.wait()
    assert (page.answer, np.argmax(page.bars), page.is_empty) == (digit, int(digit), False)
    best = page.run("return [...document.querySelectorAll('.best')].map((row) => row.innerText)")
    assert [row.split() for row in best] == [[digit, f"{max(page.bars):.1%}"]]


def test_small_drawing_in_a_corner_is_recognized(page):
    for digit, strokes in DRAWN.items():
        small = [[[0.03 + 0.25 * x, 0.03 + 0.25 * y] for x, y in points] for points in strokes]
        page.run(f"strokes = {json.dumps(small)}; change()")
        page.wait()
        assert page.answer == str(digit)


def test_prediction_follows_the_drawing(page, port):
    seen = []

    def look() -> None:
        page.wait()
        seen.append((page.answer, tuple(page.bars), page.ink))

    page.run("performance.clearResourceTimings()")
    page.draw("3", parts=4, on_part=look)
    page.wait()
    assert page.answer == "3"
    assert all(answer for answer, _, _ in seen)
    assert len({bars for _, bars, _ in seen}) == 3
    assert all(min(ink) > 0 for _, _, ink in seen)
    entries = page.run(
        "return performance.getEntriesByType('resource').map((e) => [e.name, e.startTime, e.responseEnd])"
    )
    assert all(name.startswith(f"http://127.0.0.1:{port}/") for name, _, _ in entries)
    spans = [span for name, *span in entries if name.endswith("/predict")]
    assert len(spans) >= 4
    assert all(end <= next_start for (_, end), (next_start, _) in pairwise(spans))  # Requests do not queue.


def test_clear_and_undo(page):
    for clear in (lambda: page.click("clear"), page.press_escape):
        page.draw("7")
        page.wait()
        assert page.answer == "7"
        clear()
        assert page.is_empty
    page.draw("3", parts=2, on_part=page.press_escape)  # during a stroke
    page.wait()
    assert page.is_empty
    page.run("strokes = [[[0.5, 0.2], [0.5, 0.8]]]; change(); strokes = []; change()")  # during a request
    page.wait_for("return !isRequesting")
    assert page.is_empty
    page.draw("7")
    page.wait()
    seven = page.ink
    page.draw("1")
    page.wait()
    assert page.ink[0] > seven[0]
    page.click("undo")
    page.wait()
    assert (page.answer, page.ink) == ("7", seven)
    page.click("undo")
    assert page.is_empty


def test_page_shows_the_present_model(page, trained_run):
    [end] = trained_run.events("exit")
    expected = f"{trained_run.workdir.name} · step {end['step']} · test accuracy {end['test_accuracy']:.2%}"
    assert page.run("return modelLine.textContent") == expected
    page.draw("1")
    page.wait()
    before = page.run("return changes")
    # The page polls every two seconds, and may poll between the two commands.
    page.wait_for(f"if (changes === {before}) showModel({{...model, step: 1}}); return changes > {before}")
    page.wait()
    assert page.run("return modelLine.textContent") == expected


def test_page_recovers_from_an_offline_server(page):
    page.run("window.realFetch = fetch; window.fetch = () => Promise.reject(new TypeError('no connection'))")
    page.draw("7")
    page.wait_for("return notice.textContent === OFFLINE")
    opacity = "return +getComputedStyle(document.getElementById('prediction')).opacity"
    assert page.run(opacity) < 0.5
    assert page.ink[0] > 0
    page.run("window.fetch = realFetch")
    page.wait()
    page.wait_for("return notice.textContent === ''")
    assert page.run(opacity) == 1
    assert page.answer == "7"


def test_page_fits_a_phone(page):
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        page.wait_for("return innerWidth === 390")
        page.run("document.body.style.paddingBottom = '100vh'")  # Now the page can scroll.
        page.draw("3", "touch")
        page.wait()
        assert page.answer == "3"
        assert page.run("return document.documentElement.scrollWidth") == 390
        assert page.run("return scrollY") == 0
        assert page.run("return canvas.getBoundingClientRect().bottom < bars.getBoundingClientRect().top")
    finally:
        page.run("document.body.style.paddingBottom = ''")
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_test_digit_comes_by_keyboard(page):
    page.driver.find_element("id", "test").send_keys("\ue007")
    page.wait_for("return remark.textContent.includes('labelled')")
    assert page.answer in "0123456789"
    label = page.run("return remark.textContent")[-1]
    assert page.run("return strokes[0].remark") == f"labelled {label}"
    assert min(page.ink) > 0
    page.draw("7")  # replaces it
    page.wait()
    assert (page.answer, page.run("return remark.textContent")) == ("7", "")


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_picture_is_predicted(page, way):
    send = """
        const [way, name, content] = arguments, data = new DataTransfer();
        data.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name));
        const Kind = {drop: DragEvent, paste: ClipboardEvent}[way];
        document.body.dispatchEvent(new Kind(way, {bubbles: true, dataTransfer: data, clipboardData: data}));"""
    page.driver.execute_script(send, way, "3.png", base64.b64encode(drawing("3")).decode())
    page.wait_for("return strokes.length")
    page.wait()
    assert page.answer == "3"
    assert page.ink[0] > 0
    page.click("undo")
    assert page.is_empty
    page.driver.execute_script(send, way, "3.txt", base64.b64encode(b"three").decode())
    page.wait_for("return notice.textContent.includes('cannot read')")
    page.run("showNotice('')")


def test_doubt_is_shown(page):
    page.draw("7")
    page.wait()
    shown = "show({answer: '7', is_sure: %s}); return remark.textContent"
    assert page.run(shown % "false") == "not sure"
    assert page.run(shown % "true") == ""


def test_page_fits_the_window(page):
    """A window, a phone upright and on its side, and a window of 1200 by 800 at 200 %."""
    page.run("document.getElementById('test').click()")
    page.wait_for("return remark.textContent")
    try:
        for width, height in ((1200, 800), (390, 844), (844, 390), (600, 400)):
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width != 1200}
            page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            page.wait_for(f"return innerWidth === {width} && innerHeight === {height}")
            shown = page.run("const e = document.documentElement; return [e.scrollWidth, e.scrollHeight]")
            assert shown == [width, height]
            buttons = page.run("return [...document.querySelectorAll('button')].map((b) => b.offsetHeight)")
            assert min(buttons) >= 44
            assert page.run("return canvas.clientWidth") >= 200
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_bars_are_visible_in_forced_colours(page):
    forced = {"features": [{"name": "forced-colors", "value": "active"}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", forced)
    try:
        colours = "const style = (q) => getComputedStyle(document.querySelector(q)).backgroundColor;"
        assert page.run(f"{colours} return style('.bar > span') !== style('body')")
    finally:
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
