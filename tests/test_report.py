"""The report: a page that needs nothing else, also of a run that never got far, and of untrusted files."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from runs import snapshot
from tampering import HOSTILE_EVENTS, HOSTILE_TEXTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist_jax import evaluate
from mnist_jax.checkpoint.checkpoint import list_checkpoints
from mnist_jax.console import Terminal
from mnist_jax.report import __main__ as report
from mnist_jax.report import figures
from mnist_jax.report.history import Curve, read_attempts
from mnist_jax.report.run_status import CheckpointStatus, NextStart, Status
from mnist_jax.runtime.preemption import StoppedError, StopSignal
from mnist_jax.training import data

pytestmark = pytest.mark.usefixtures("in_this_process")

# What is wider than the page, or has more content than it shows.
WIDER = """return [...document.querySelectorAll('table, td, th, dl, dd, img, p')].filter(
    (e) => e.getBoundingClientRect().right > innerWidth || e.scrollWidth > e.clientWidth + 1).map((e) => e.outerHTML)"""
IMAGES = {f"{name}{theme}.png" for name in ("run", "confusion", "mistakes") for theme in ("", "-dark")}


class Page(HTMLParser):
    """A report as a browser parses it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.tags, self.addresses, self.words = html, set(), [], []
        self.feed(html)
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data):
        self.words += data.split()


def write_page(*args: object, capsys) -> Page:
    code = report.main([*map(str, args)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return Page(Path(out.splitlines()[-1]).read_text())


@pytest.fixture(scope="module")
def folder(small_run, tmp_path_factory) -> Path:
    """The report of a finished run, as a user makes it, with an environment that troubles Matplotlib."""
    folder = tmp_path_factory.mktemp("report") / "new"
    before = snapshot(small_run.workdir)
    environment = {**os.environ, **small_run.environment, "MPLBACKEND": "unknown", "HOME": "/proc/nowhere"}
    environment.pop("MPLCONFIGDIR", None)
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", "mnist_jax.report", str(small_run.workdir), "--out", str(folder)],
        env={**environment, "XDG_CONFIG_HOME": "/proc/nowhere"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[-1] == str(folder / "report.html")
    assert snapshot(small_run.workdir) == before
    return folder


@pytest.fixture(scope="module")
def page(folder) -> Page:
    return Page((folder / "report.html").read_text())


# Content


def test_page_is_self_contained(page, folder):
    assert not {"script", "link", "iframe", "object", "a"} & page.tags
    assert not re.search(r"https?:|//\w|@import|url\(", re.sub(r"data:[^\"]*", "", page.html))
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page.html
    assert {path.name for path in folder.iterdir()} == {*IMAGES, "report.html"}
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    embedded = [base64.b64decode(address.partition(",")[2]) for address in page.addresses]
    assert sorted(embedded) == sorted((folder / name).read_bytes() for name in IMAGES)


def test_page_has_the_facts_of_the_run(page, small_run):
    [end] = small_run.events("exit")
    assert "cnn-tiny on digits, preset fast, seed 0" in page.text
    assert "step 40 of 40" in page.text
    assert f"{end['test_accuracy']:.2%} at step 40" in page.text
    assert end["state_sha256"] in page.text
    assert "finished" in page.text
    for name, value in (("label_smoothing", "0.1"), ("batch_size", "64"), ("adam_b1", "0.7")):
        assert f"{name} {value}" in page.text
    [start] = small_run.events("start")
    assert f"jax {start['software']['jax']}" in page.text
    assert "1 × cpu" in page.text
    assert re.search(r"Goodput \d+%: [\d.]+ s of training", page.text)
    assert re.search(r"Throughput [\d,]+ images/s", page.text)
    assert "because of label smoothing 0.1: the test" in page.text
    assert "below 0.500 nats" in page.text
    for step in small_run.steps():
        assert re.search(
            rf"\b{step} \d{{4}}-\d\d-\d\d [\d:]+ [+-]\d{{4}} [\d.]+ MB [a-z ]+ ([\d.]+ % )?good", page.text
        )


def test_confusion_matrix_is_that_of_evaluate(small_run, page):
    with StopSignal() as stop:
        evaluated = evaluate.evaluate(evaluate.Options(small_run.workdir), stop, Terminal())
        results = report.evaluate_newest(small_run.workdir, report.Options(small_run.workdir), stop, Terminal())
    assert results.confusion.tolist() == evaluated.confusion
    incorrect = round(evaluated.images * (1 - evaluated.accuracy))
    assert len(results.mistakes) == min(24, incorrect) > 0
    assert f"Step 40: {incorrect} of 359 test images have an incorrect prediction" in page.text
    correct = sum(count * accuracy for _, count, accuracy, _ in results.classes)
    assert round(correct) == 359 - incorrect
    for name, count, accuracy, wrong in results.classes:
        assert f"{name} {count} {100 * accuracy:.2f} % {wrong}".strip() in page.text


def test_worst_mistakes_come_first():
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1) * np.ones((40, 28, 28, 1), np.uint8)
    labels = np.full(40, 8)
    logits = np.zeros((40, 10), np.float32)
    logits[:, 4] = 1 + np.arange(40)
    labels[39] = 4
    mistakes = report.worst_mistakes(images, labels, logits, [str(digit) for digit in range(10)])
    assert [int(image[0, 0, 0]) for image, _ in mistakes] == list(range(38, 14, -1))
    assert mistakes[0][1] == "8, predicted 4 (100%)"
    [(_, caption)] = report.worst_mistakes(images[:1], labels[:1], logits[:1], 10 * ["Bag"])
    assert "(23%)" in caption  # e / (e + 9)


def test_page_fits_phone_and_dark_mode(folder):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromedriver are not on the PATH")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
        size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        for scheme, suffix in (("light", ""), ("dark", "-dark")):
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            browser.get((folder / "report.html").as_uri())
            decode = "return Promise.all([...document.images].map(i => i.decode().then(() => i.currentSrc)))"
            shown = [base64.b64decode(source.partition(",")[2]) for source in browser.execute_script(decode)]
            assert shown == [(folder / f"{name}{suffix}.png").read_bytes() for name in ("run", "confusion", "mistakes")]
            assert browser.execute_script("return document.documentElement.scrollWidth") == 390
            assert browser.execute_script(WIDER) == []
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        paper = {"width": 690, "height": 1000, "deviceScaleFactor": 1, "mobile": False}  # A4 without its margins
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", paper)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": [feature]})  # dark
        assert browser.execute_script(WIDER) == []
        assert browser.execute_script("return document.querySelector('thead').offsetHeight") > 0
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert browser.get_log("browser") == []  # The security policy of the page forbids nothing that it uses.


def test_runs_are_compared(small_copy, small_run, tmp_path, capsys):
    config = json.loads((small_copy / "config.json").read_text())
    (small_copy / "config.json").write_text(json.dumps({**config, "log_every_steps": 7}))
    page = write_page(small_run.workdir, small_copy, "--out", tmp_path / "out", capsys=capsys)
    assert "Comparison of 2 runs" in page.text
    assert "log_every_steps 10 7" in page.text
    assert "eval_every_steps 20 20" not in page.text
    names = {"comparison.png", "comparison-dark.png", *(f"{n}-{name}" for n in (1, 2) for name in IMAGES)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names, "report.html"}
    assert page.text.count("Accuracy per class") == 2


def test_report_adds_images_to_tensorboard(small_copy, capsys):
    for _ in range(2):
        write_page(small_copy, capsys=capsys)
    images = EventAccumulator(str(small_copy / "tensorboard" / "report")).Reload()
    assert images.Tags()["images"] == ["worst mistakes", "confusion matrix"]
    [image] = images.Images("worst mistakes")
    assert image.step == 40
    assert image.encoded_image_string == (small_copy / "report" / "mistakes.png").read_bytes()
    assert image.width == 975


# Missing or corrupt parts


def test_run_without_checkpoint_has_a_page(tmp_path, small_run, capsys):
    shutil.copy(small_run.workdir / "config.json", tmp_path)
    page = write_page(tmp_path, capsys=capsys)
    assert "no checkpoint yet" in page.text
    assert len(page.addresses) == 2
    (tmp_path / "config.json").unlink()
    (tmp_path / "events.jsonl").write_text(json.dumps(small_run.events("start")[0]) + "\n")
    assert "State killed" in write_page(tmp_path, capsys=capsys).text


def test_corrupt_checkpoints_are_reported(small_copy, capsys):
    for checkpoint in list_checkpoints(small_copy / "checkpoints"):
        (checkpoint.path / "manifest.json").write_text("{}")
    page = write_page(small_copy, capsys=capsys)
    assert page.text.count("manifest.json") >= 5
    assert "0 of 4" in page.text
    assert len(page.addresses) == 2


def test_missing_event_log_and_dataset_are_reported(small_copy, capsys, monkeypatch):
    def fail(*_, **__):
        raise report.DataError("the dataset is missing")

    monkeypatch.setattr(data, "load", fail)
    (small_copy / "events.jsonl").unlink()
    page = write_page(small_copy, capsys=capsys)
    assert "events.jsonl is missing" in page.text
    assert "Not available: the dataset is missing" in page.text
    assert len(page.addresses) == 2


def test_signal_stops_the_report(small_run):
    with StopSignal() as stop:
        stop.record_signal(signal.SIGTERM)
        with pytest.raises(StoppedError):
            report.read_run(small_run.workdir, report.Options(small_run.workdir), stop, Terminal())


# Output


def test_unusable_folders_are_usage_errors(tmp_path, capsys):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert report.main([str(run)]) == 2
    assert str(run) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    run.mkdir()
    elsewhere.mkdir()
    (run / "events.jsonl").touch()
    (run / "report").symlink_to(elsewhere)
    assert report.main([str(run)]) == 2
    assert "symbolic link" in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []
    (run / "report").unlink()
    (run / "report").touch()
    assert report.main([str(run)]) == 2
    assert "not a directory" in capsys.readouterr().err


def test_write_replaces_an_earlier_report(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").symlink_to(kept)
    (out / "report.html.partial").symlink_to(kept)
    report.write({"report.html": b"1", "run.png": b"2", "mistakes.png": b"3", "notes.png": b"4"}, out)
    with pytest.raises(TypeError):
        report.write({"report.html": "no bytes"}, out)  # type: ignore[dict-item]
    report.write({"run.png": b"5"}, out)
    assert {path.name: path.read_bytes() for path in out.iterdir() if not path.name.endswith(".partial")} == {
        "report.html": b"1",
        "run.png": b"5",
        "notes.png": b"4",
    }
    assert kept.read_text() == "kept"


# Untrusted files


def test_untrusted_files_are_escaped_and_plotted():
    attempts = read_attempts(HOSTILE_EVENTS, is_running=True, now_s=2e9)
    empty = Curve([], [], [], [])
    assert figures.plot_run(attempts, empty, empty, train_name="training", min_loss=0.0, dark=True)
    for text in HOSTILE_TEXTS:
        checkpoint = CheckpointStatus(5, float("nan"), 10, text, 1e300, good=False, problem=text)
        found = Status(text, None, [checkpoint], [text], [], NextStart("refuse", None, 2, text))
        start = {"event": "start", "software": {text: text, "jax": [text]}, "devices": {"cpu": text, "count": text}}
        facts = {
            **report.describe_progress(found, attempts, empty),
            **report.count_interruptions(found, attempts),
            **report.describe_speed(attempts),
            **report.describe_environment([start]),
        }
        results = report.TestResults(text, 0, (), np.zeros((10, 10), int), [])
        images = {"run.png": b"", "run-dark.png": b""}
        loss = report.TrainingLoss()
        run = report.RunReport(text, facts, {text: text}, found, attempts, empty, empty, loss, results, images)
        html = report.render(runs=[run]).decode()
        assert html.count("&lt;b x=") >= 7 or text not in HOSTILE_TEXTS[0]
        assert not {"b", "script"} & Page(html).tags
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)
