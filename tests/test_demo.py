"""The page on which one draws: what it answers, to whom, and what a person sees, with a mouse or a finger."""

import http.client
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from runs import snapshot, stop
from tampering import change_metadata

from mnist_jax import predict
from mnist_jax.console import Terminal
from mnist_jax.demo import __main__ as demo
from mnist_jax.inference import classifier, preprocessing
from mnist_jax.runtime.preemption import StopSignal

pytestmark = pytest.mark.usefixtures("in_this_process")


def arc(x: float, y: float, rx: float, ry: float, start: float, stop: float) -> list[tuple[float, float]]:
    """A dozen points on an ellipse, from one angle to another in degrees: 0 is right, 90 below, 270 above."""
    angles = [math.radians(start + (stop - start) * i / 11) for i in range(12)]
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


def line(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
    return [(x0 + (x1 - x0) * i / 11, y0 + (y1 - y0) * i / 11) for i in range(12)]


# As people write them: the strokes of each digit on a sheet that goes from 0 to 1.
STROKES = {
    "0": [arc(0.5, 0.5, 0.2, 0.3, 280, -95)],
    "1": [line(0.54, 0.2, 0.47, 0.8)],
    "2": [arc(0.48, 0.36, 0.19, 0.16, 195, 385) + line(0.63, 0.47, 0.3, 0.77) + line(0.3, 0.77, 0.72, 0.76)],
    "3": [arc(0.48, 0.34, 0.17, 0.14, 200, 440) + arc(0.48, 0.63, 0.2, 0.16, 280, 520)],
    "4": [line(0.38, 0.2, 0.3, 0.52) + line(0.3, 0.52, 0.7, 0.5), line(0.64, 0.22, 0.58, 0.82)],
    "5": [line(0.4, 0.22, 0.36, 0.45) + arc(0.47, 0.6, 0.19, 0.18, 240, 500), line(0.4, 0.22, 0.68, 0.2)],
    "6": [line(0.6, 0.18, 0.37, 0.5) + arc(0.49, 0.64, 0.16, 0.16, 190, -170)],
    "7": [line(0.3, 0.24, 0.7, 0.22) + line(0.7, 0.22, 0.45, 0.82)],
    "8": [arc(0.5, 0.34, 0.14, 0.14, 45, -225) + arc(0.5, 0.64, 0.17, 0.16, -130, 230)],
    "9": [arc(0.48, 0.37, 0.16, 0.16, 330, -20) + line(0.64, 0.36, 0.57, 0.82)],
}


def drawing(digit: str) -> bytes:
    """A PNG file like those that the page sends."""
    image = Image.new("RGBA", (140, 140), "white")
    for points in STROKES[digit]:
        scaled = [(140 * x, 140 * y) for x, y in points]
        ImageDraw.Draw(image).line(scaled, fill="black", width=12, joint="curve")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# Processes


@contextmanager
def serving(workdir: Path, environment: dict[str, str], *args: str) -> Iterator[subprocess.Popen[str]]:
    """The command at work, on a port that was free."""
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
    """Wait for the line that tells that the page is there, and return its port."""
    for said in process.stdout:
        if found := re.match(r"draw at http://[0-9.]+:([0-9]+) and step [0-9]+ of .* reads it; Ctrl-C ends it\n", said):
            return int(found[1])
    raise AssertionError(process.stderr.read())


def ask(port: int, path: str, body: object = None, **headers: str) -> tuple[int, dict]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def send(port: int, *parts: bytes) -> bytes:
    """Send bytes as they are, and return what comes back before the server hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(b"".join(parts))
        return b"".join(iter(lambda: connection.recv(2**16), b""))


@pytest.fixture(scope="module")
def port(trained_run, environment) -> Iterator[int]:
    """Where the page of a finished run is."""
    with serving(trained_run.workdir, environment) as process:
        yield port_of(process)
        assert stop(process, signal.SIGTERM).err == ""  # whatever the tests asked


# In this process


@pytest.fixture(scope="module")
def reader(trained_run) -> demo.Reader:
    return demo.Reader(trained_run.workdir, "latest", Terminal())


@pytest.fixture(scope="module")
def client(reader):
    return demo.make_app(reader).test_client()


@pytest.fixture
def growing(trained_run, tmp_path) -> tuple[Path, Callable[[], Path], Callable[[], Path]]:
    """A copy of a run at its first checkpoint, and what puts the last one there: whole, or with a bit of it flipped."""
    workdir = tmp_path / "run"
    shutil.copytree(trained_run.workdir, workdir)
    first, *_, last = classifier.find_checkpoints(workdir)
    for checkpoint in classifier.find_checkpoints(workdir)[1:]:
        checkpoint.path.rename(tmp_path / checkpoint.path.name)

    def put() -> Path:
        (tmp_path / last.path.name).rename(last.path)
        return last.path

    def put_damaged() -> Path:
        damaged = workdir / "checkpoints" / str(last.step - 1)
        shutil.copytree(first.path, tmp_path / damaged.name)
        (tmp_path / damaged.name / "manifest.json").write_bytes(b"{")
        (tmp_path / damaged.name).rename(damaged)
        return damaged

    return workdir, put, put_damaged


# What is answered


@pytest.mark.parametrize("digit", STROKES)
def test_a_drawn_digit_is_read(client, digit):
    answer = client.post("/predict", data=drawing(digit))
    assert answer.status_code == 200
    assert answer.json["answer"] == digit


def test_the_page_is_told_what_the_command_predict_tells(client, trained_run, tmp_path, capsys):
    (tmp_path / "3.png").write_bytes(drawing("3"))
    assert predict.main([str(trained_run.workdir), str(tmp_path / "3.png"), "--json"]) == 0
    [told] = json.loads(capsys.readouterr().out)
    found = client.post("/predict", data=drawing("3")).json
    assert dict(zip(found["model"]["class_names"], found["probabilities"], strict=True)) == told["probabilities"]
    assert found["answer"] == told["answer"]
    assert found["image"] == preprocessing.prepare(drawing("3")).ravel().tolist()


def test_it_is_told_who_reads(client, reader, trained_run):
    [evaluated] = [e for e in trained_run.events("evaluation") if e["step"] == reader.model.step]
    about = {
        "run": trained_run.workdir.name,
        "dataset": "mnist",
        "class_names": [*map(str, range(10))],
        "step": max(trained_run.steps()),
        "test_accuracy": evaluated["accuracy"],
    }
    assert client.get("/model").json == about
    assert client.post("/predict", data=drawing("7")).json["model"] == about


@pytest.mark.parametrize(("forms", "warnings"), [(("mnist",), 0), (("digits",), 1)])
def test_a_run_that_has_learned_no_digits_is_warned_of(trained_run, monkeypatch, capsys, forms, warnings):
    monkeypatch.setattr(preprocessing, "FORMS", forms)
    first = min(trained_run.steps())
    with StopSignal() as stop_signal:
        found = demo.find_reader(demo.Options(trained_run.workdir, step=first), stop_signal, Terminal())
    assert found.model.step == first
    assert capsys.readouterr().err.count("warning: this run has learned mnist, and pictures are made") == warnings


def jpeg(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("L", size, 255).save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "code", "reason"),
    [
        (b"", 400, "it is empty"),
        (b"GIF89a", 400, "it is neither PNG nor JPEG"),
        (drawing("3")[:500], 400, "it is damaged"),
        (jpeg((280, 280)), 400, "nothing is drawn on it"),
        (jpeg((2001, 2000)), 400, "2001×2000 pixels, more than 4 million"),
        (bytes(demo.MAX_BYTES + 1), 413, "exceeds"),
    ],
)
def test_what_cannot_be_read_is_answered_with_a_reason(client, body, code, reason):
    answer = client.post("/predict", data=body)
    assert answer.status_code == code
    assert answer.json.keys() == {"error"}
    assert reason in answer.json["error"]


@st.composite
def damaged_drawings(draw: st.DrawFn) -> bytes:
    content = bytearray(drawing(draw(st.sampled_from(sorted(STROKES)))))
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)):
        content[place] = value
    return bytes(content[: draw(st.none() | st.integers(0, len(content)))])


@given(body=st.binary(max_size=300) | damaged_drawings())
@settings(deadline=None, max_examples=150)
def test_whatever_is_sent_is_answered_and_never_with_a_fault_of_ours(client, body):
    answer = client.post("/predict", data=body)
    assert answer.status_code in (200, 400)
    if answer.status_code == 200:
        assert abs(sum(answer.json["probabilities"]) - 1) < 1e-5
        assert len(answer.json["image"]) == 28 * 28
    else:
        assert answer.json.keys() == {"error"}


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [("GET", "/predict", 405), ("POST", "/", 405), ("DELETE", "/model", 405), ("GET", "/nowhere", 404)],
)
def test_other_methods_and_paths_are_refused_in_json(client, method, path, code):
    answer = client.open(path, method=method)
    assert (answer.status_code, answer.is_json) == (code, True)
    assert ("Allow" in answer.headers) == (code == 405)


def test_a_fault_of_ours_is_not_shown_to_those_who_ask(reader, monkeypatch, caplog):
    monkeypatch.setattr(preprocessing, "prepare", lambda *_, **__: 1 / 0)
    answer = demo.make_app(reader).test_client().post("/predict", data=b"x")
    assert (answer.status_code, answer.is_json) == (500, True)
    assert "division" not in answer.text
    assert "ZeroDivisionError" in caplog.text  # but to those who serve


def test_a_browser_loads_and_runs_nothing_but_the_page_itself(client):
    page = client.get("/")
    for answer in (page, client.get("/model"), client.get("/nowhere"), client.post("/predict")):
        policy = answer.headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe" not in policy
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
    assert set(re.findall("https?://[^'\"]*", page.text)) == {"http://www.w3.org/2000/svg"}  # a name, and no address


@pytest.mark.parametrize(
    ("host", "code"),
    [
        *(("localhost:{}", 200), ("127.0.0.1:{}", 200), ("[::1]:{}", 200)),
        *(("LOCALHOST:{}", 200), ("localhost", 200), ("localhost:9", 200)),  # through a tunnel, say
        *(("rebound.example:{}", 403), ("localhost.example:{}", 403), ("", 403), ("[", 403)),
    ],
)
def test_a_page_from_elsewhere_whose_name_leads_here_is_refused(port, host, code):
    status, answer = ask(port, "/model", Host=host.format(port))
    assert (status, "error" in answer) == (code, code == 403)


def test_another_site_may_not_ask(client):
    def code(site: str) -> int:
        return client.post("/predict", data=drawing("1"), headers={"Sec-Fetch-Site": site}).status_code

    assert [code(site) for site in ("same-origin", "none", "same-site", "cross-site")] == [200, 200, 403, 403]


# A run at work


def test_a_newer_checkpoint_is_taken_and_compiles_nothing(growing, monkeypatch):
    workdir, put, _ = growing
    reader = demo.Reader(workdir, "latest", Terminal())
    before = reader.model
    reader.look()
    assert reader.model is before
    newest = put()
    monkeypatch.setattr(classifier, "_make_trainer", lambda *_: before._trainer)  # whose functions are compiled
    reader.look()
    assert reader.model.checkpoint.path == newest


def test_a_checkpoint_that_cannot_be_read_is_told_of_once_and_the_one_before_stays(growing, capsys):
    workdir, put, put_damaged = growing
    reader = demo.Reader(workdir, "latest", Terminal())
    first = reader.model
    put_damaged()
    for _ in range(3):
        reader.look()
    assert reader.model is first
    [told] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"warning: .*manifest\.json.* Step {first.step} goes on reading\.", told)
    newest = put()
    reader.look()
    assert (reader.model.checkpoint.path, capsys.readouterr().err) == (newest, "")


def test_a_fault_that_may_pass_is_told_of_once_and_tried_again(growing, monkeypatch, capsys):
    workdir, put, _ = growing
    reader = demo.Reader(workdir, "latest", Terminal())
    newest = put()
    with monkeypatch.context() as patch:
        patch.setattr(classifier, "load", lambda *_: (_ for _ in ()).throw(OSError("too many open files")))
        for _ in range(3):
            reader.look()
    assert capsys.readouterr().err.count("too many open files") == 1
    reader.look()
    assert reader.model.checkpoint.path == newest


def test_the_best_is_waited_for_until_one_is_evaluated(growing, environment):
    workdir, put, _ = growing
    [first] = classifier.find_checkpoints(workdir)
    change_metadata(first.path, test_accuracy=None)
    with serving(workdir, environment, "--step", "best") as process:
        assert "was evaluated yet" in process.stdout.readline()
        newest = put()
        assert ask(port_of(process), "/model")[1]["step"] == int(newest.name)
        assert stop(process, signal.SIGTERM).code == 0


def test_a_checkpoint_that_vanishes_while_it_is_read_is_no_fault(growing, monkeypatch, capsys):
    workdir, put, put_damaged = growing
    reader = demo.Reader(workdir, "latest", Terminal())
    vanishing = put_damaged()
    look = classifier.choose

    def remove_and_choose(checkpoints, *args):
        chosen = look(checkpoints, *args)
        if vanishing.exists():
            shutil.rmtree(vanishing)
            put()
        return chosen

    monkeypatch.setattr(classifier, "choose", remove_and_choose)
    reader.look()
    assert (reader.model.step, capsys.readouterr().err) == (int(vanishing.name) + 1, "")


def test_a_run_that_is_removed_leaves_its_reader_at_work(growing, capsys):
    workdir, _, _ = growing
    reader = demo.Reader(workdir, "best", Terminal())
    shutil.rmtree(workdir)
    for _ in range(3):
        reader.look()
    assert capsys.readouterr().err.count("there is no run in") == 1
    assert demo.make_app(reader).test_client().post("/predict", data=drawing("1")).json["answer"] == "1"


def test_a_run_is_waited_for_and_followed_and_nothing_is_written(growing, environment, tmp_path):
    workdir, put, _ = growing
    [first] = classifier.find_checkpoints(workdir)
    first.path.rename(tmp_path / "first")
    with serving(workdir, environment) as process:
        said = process.stdout.readline()
        assert said == f"nothing has been saved yet in {workdir}; wait for the first checkpoint; the page comes then\n"
        (tmp_path / "first").rename(first.path)
        port = port_of(process)
        assert ask(port, "/model")[1]["step"] == first.step
        newest = put()
        before = snapshot(workdir)
        while (step := ask(port, "/predict", drawing("1"))[1]["model"]["step"]) == first.step:
            assert process.poll() is None
        assert step == int(newest.name)
        assert snapshot(workdir) == before
        ended = stop(process, signal.SIGTERM)
    assert (ended.code, ended.out, ended.err) == (0, "SIGTERM: the page is closed\n", "")


# The process


def test_ctrl_c_ends_it_in_an_orderly_way_also_amid_answers_and_nothing_is_written(trained_run, environment):
    before = snapshot(trained_run.workdir)
    with serving(trained_run.workdir, environment) as process:
        port = port_of(process)
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("POST", "/predict", drawing("3"))
            ended = stop(process, signal.SIGINT)
    assert (ended.code, ended.out, ended.err) == (0, "SIGINT: the page is closed\n", "")
    assert snapshot(trained_run.workdir) == before


def test_a_signal_is_heeded_while_it_waits_for_the_first_checkpoint(tmp_path, environment):
    (tmp_path / "config.json").write_text("{}")
    with serving(tmp_path, environment) as process:
        assert process.stdout.readline().startswith("nothing has been saved yet")
        ended = stop(process, signal.SIGTERM)
    assert (ended.code, ended.err) == (128 + signal.SIGTERM, "SIGTERM: stopped before the end\n")


def test_it_listens_to_this_machine_alone_unless_told_otherwise_and_then_it_warns(port, trained_run, environment):
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port))
    with serving(trained_run.workdir, environment, "--host", "0.0.0.0") as process:
        status, model = ask(port_of(process), "/model", Host="elsewhere.example")
        assert (status, model["dataset"]) == (200, "mnist")
        assert stop(process, signal.SIGTERM).err == "warning: anybody who reaches 0.0.0.0 can use this page\n"


@pytest.mark.parametrize(
    ("host", "port", "problem"),
    [
        ("127.0.0.1", None, "the port is in use; name another one with --port N"),
        ("192.0.2.1", 0, "Cannot assign requested address; --host takes an address of this machine"),
        (64 * "é", 0, "; --host takes an address of this machine"),
        ("127.0.0.1", 65536, "--port 65536: ports go from 0 to 65535"),
    ],
)
def test_a_place_that_cannot_be_had_is_an_error_with_a_way_out(tmp_path, capsys, host, port, problem):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if port is None else port
        assert demo.main([str(tmp_path), "--host", host, "--port", str(port)]) == 2
    assert problem in capsys.readouterr().err


def test_a_port_that_one_may_not_use_is_an_error_with_a_way_out(tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket, "create_server", refuse)
    assert demo.main([str(tmp_path), "--port", "80"]) == 2
    assert capsys.readouterr().err.startswith("error: cannot listen at 127.0.0.1, port 80: you may not use this port")


def test_where_there_is_no_run_it_says_so(tmp_path, capsys):
    assert demo.main([str(tmp_path), "--port", "0"]) == 2
    assert capsys.readouterr().err == f"error: there is no run in {tmp_path}\n"


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ((b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3000000\r\n\r\n",), 413),
        (
            (
                b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
                b"1e8480\r\n" + bytes(0x1E8480),
            ),
            413,
        ),
        ((b"GET /model HTTP/1.1\r\nX: ".ljust(2**14, b"x"),), 431),
        ((b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",), 400),
        ((b"\x16\x03\x01 \r\n\r\n",), 400),
    ],
)
def test_what_is_too_much_or_makes_no_sense_is_cut_short(port, request_, code):
    assert re.match(rf"HTTP/1\.[01] {code} ".encode(), send(port, *request_))
    assert ask(port, "/model")[0] == 200


def test_a_body_in_pieces_is_read_and_a_little_too_much_is_told_in_json(port):
    content = drawing("2")
    pieces = (content[first : first + 700] for first in range(0, len(content), 700))
    assert ask(port, "/predict", pieces)[1]["answer"] == "2"
    status, answer = ask(port, "/predict", iter(16 * [bytes(70_000)]))
    assert (status, answer.keys()) == (413, {"error"})


# What a person sees


@pytest.fixture(scope="module")
def browser(port) -> Iterator:
    """A browser, in which the page is open."""
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
    finally:
        driver.quit()


class Page:
    """The page, as a person uses it."""

    def __init__(self, driver) -> None:
        self.driver = driver

    def run(self, script: str, *args: object):
        return self.driver.execute_script(script, *args)

    def draw(self, digit: str, kind: str = "mouse", *, parts: int = 1, on_part: Callable[[], object] = int) -> None:
        """Draw a digit; each stroke in so many parts, with something to be done after each but the last."""
        from selenium.webdriver.common.actions.action_builder import ActionBuilder
        from selenium.webdriver.common.actions.pointer_input import PointerInput

        box = self.run("return sheet.getBoundingClientRect().toJSON()")
        for points in STROKES[digit]:
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

    def wait(self) -> None:
        """Wait until what is drawn has been read."""
        self.wait_for("return !asking && (read === changes || !strokes.length)")

    def wait_for(self, script: str) -> None:
        from selenium.webdriver.support.wait import WebDriverWait

        WebDriverWait(self.driver, 60, poll_frequency=0.02).until(lambda _: self.run(script))

    @property
    def answer(self) -> str:
        return self.run("return answerBox.textContent")

    @property
    def bars(self) -> list[float]:
        """How long the bars are, that of the full length being 1."""
        return self.run(
            "return [...document.querySelectorAll('.bar > span')].map((bar) => +bar.style.getPropertyValue('--share'))"
        )

    @property
    def ink(self) -> list[int]:
        """How much ink is on the sheet, and in the image that the model sees."""
        return self.run(
            "const sum = (canvas, channel) => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height)"
            ".data.reduce((sum, value, index) => sum + (index % 4 === channel ? value : 0), 0);"
            "return [sum(sheet, 3), sum(image, 0)]"
        )

    def clear(self) -> None:
        self.driver.find_element("id", "clear").click()


@pytest.fixture
def page(browser) -> Page:
    """The page with an empty sheet."""
    browser.run("strokes = []; change()")
    return browser


@pytest.mark.parametrize(("digit", "kind"), [*((digit, "mouse") for digit in STROKES), ("3", "touch"), ("4", "pen")])
def test_a_digit_that_somebody_draws_is_read(page, digit, kind):
    page.draw(digit, kind)
    page.wait()
    assert page.answer == digit
    best = int(np.argmax(page.bars))
    likeliest = page.run("return [...document.querySelectorAll('.likeliest')].map((row) => row.innerText)")
    assert [row.split() for row in likeliest] == [[digit, f"{max(page.bars):.1%}"]]
    assert best == int(digit)


def test_the_bars_move_while_the_hand_does(page):
    seen = []

    def look() -> None:
        page.wait()
        seen.append((page.answer, page.bars, page.ink))

    page.draw("3", parts=4, on_part=look)
    assert len(seen) == 3
    assert all(answer for answer, _, _ in seen)
    assert len({tuple(bars) for _, bars, _ in seen}) == 3
    assert all(min(ink) > 0 for _, _, ink in seen)
    page.wait()
    assert page.answer == "3"


def test_questions_do_not_queue(page):
    page.run("performance.clearResourceTimings()")
    page.draw("2")
    page.wait()
    spans = page.run(
        "return performance.getEntriesByType('resource').filter((entry) => entry.name.endsWith('/predict'))"
        ".map((entry) => [entry.startTime, entry.responseEnd])"
    )
    assert len(spans) >= 2
    assert all(end <= next_start for (_, end), (next_start, _) in pairwise(spans))


def hint_is_there(page: Page) -> bool:
    return page.driver.find_element("id", "hint").is_displayed()


def test_an_empty_sheet_says_what_to_do_and_clear_brings_it_back(page):
    empty = page.ink
    assert (page.answer, set(page.bars), hint_is_there(page)) == ("", {0}, True)
    for clear in (page.clear, lambda: page.driver.find_element("tag name", "body").send_keys("\ue00c")):  # Escape
        page.draw("7")
        page.wait()
        assert (page.answer, hint_is_there(page)) == ("7", False)
        clear()
        assert (page.answer, set(page.bars), hint_is_there(page), page.ink) == ("", {0}, True, empty)
    assert empty == [0, 0]


def test_a_sheet_that_is_cleared_amid_a_stroke_stays_empty(page):
    page.draw("3", parts=2, on_part=lambda: page.driver.find_element("tag name", "body").send_keys("\ue00c"))
    page.wait()
    assert (page.answer, page.ink, hint_is_there(page)) == ("", [0, 0], True)


def test_an_answer_to_what_has_been_cleared_is_not_shown(page):
    page.run("strokes = [[[0.5, 0.2], [0.5, 0.8]]]; change(); strokes = []; change()")
    page.wait_for("return !asking")
    assert (page.answer, set(page.bars)) == ("", {0})


def test_undo_takes_the_last_stroke_back(page):
    page.draw("4")
    page.wait()
    whole = page.ink
    page.driver.find_element("id", "undo").click()
    page.wait()
    assert page.answer not in ("", "4")
    assert 0 < page.ink[0] < whole[0]
    page.driver.find_element("id", "undo").click()
    assert (page.answer, page.ink) == ("", [0, 0])


def test_the_page_tells_who_reads_and_learns_of_another(page, trained_run, port):
    accuracy = ask(port, "/model")[1]["test_accuracy"]
    step = max(trained_run.steps())
    told = f"{trained_run.workdir.name} · step {step} · test accuracy {accuracy:.2%}"
    line = "return modelLine.textContent"
    assert page.run(line) == told
    page.draw("1")
    page.wait()
    asked = page.run("return changes")
    page.run("introduce({...model, step: 1})")  # as if that one had read before
    assert "step 1 " in page.run(line)
    # It asks every other second who reads; just when it does, it may have overlooked this.
    page.wait_for(f"if (changes === {asked}) introduce({{...model, step: 1}}); return changes > {asked}")
    page.wait()
    assert page.run(line) == told


@pytest.mark.parametrize("digit", ["7", ""])
def test_when_the_server_goes_away_the_page_says_so_and_goes_on_when_it_is_back(page, digit):
    page.run("window.realFetch = fetch; window.fetch = () => Promise.reject(new TypeError('no connection'))")
    notice = "return notice.textContent"
    if digit:
        page.draw(digit)
    page.wait_for(notice)  # It asks every other second also while nobody draws.
    assert page.run(notice).startswith("The server does not answer.")
    assert (page.ink[0] > 0) == bool(digit)
    page.run("window.fetch = realFetch")
    page.wait()
    page.wait_for(f"{notice} === ''")
    assert page.answer == digit


def test_nothing_comes_from_elsewhere(page, port):
    page.driver.refresh()
    page.draw("1")
    page.wait()
    names = page.run("return performance.getEntries().map((entry) => entry.name).filter((name) => name.includes(':'))")
    assert names
    assert {name for name in names if not name.startswith(f"http://127.0.0.1:{port}/")} <= {"data:image/svg+xml"}


def test_on_a_phone_nothing_is_wider_than_the_screen_and_drawing_does_not_scroll(page):
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        page.wait_for("return innerWidth === 390")
        page.run("document.body.style.paddingBottom = '100vh'")  # There is where to scroll to.
        page.draw("3", "touch")
        page.wait()
        assert page.answer == "3"
        assert page.run("return document.documentElement.scrollWidth") == 390
        assert page.run("return scrollY") == 0
        assert page.run("return sheet.getBoundingClientRect().bottom < bars.getBoundingClientRect().top")
    finally:
        page.run("document.body.style.paddingBottom = ''")
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_browser_has_nothing_to_complain_of(page):
    assert [entry for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"] == []
