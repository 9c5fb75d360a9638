"""The page on a run: of real runs, beside one at work, of runs that never got far, and of what nobody ever wrote."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from runs import Run, end, snapshot, stop

from mnist_jax import evaluate
from mnist_jax.checkpoint.checkpoint import list_checkpoints
from mnist_jax.console import Terminal
from mnist_jax.records import metrics
from mnist_jax.report import __main__ as report
from mnist_jax.report import history, promises
from mnist_jax.report.__main__ import Facts, Judgement, Progress
from mnist_jax.report.run_status import CheckpointStatus, NextStart, Status
from mnist_jax.runtime.preemption import StoppedError, StopSignal

pytestmark = pytest.mark.usefixtures("in_this_process")

NEVER_SAVED = "nothing has been saved yet"


class Page(HTMLParser):
    """A report as a browser takes it apart."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.tags, self.addresses, self.words = html, [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data):
        self.words += data.split()

    @property
    def text(self) -> str:
        return " ".join(self.words)


def write_page(*args: object, capsys) -> Page:
    """Write a report in this process; its path is the last line."""
    code = report.main([*map(str, args)])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return Page(Path(out.splitlines()[-1]).read_text())


def refusal(*args: object, capsys) -> str:
    assert report.main([*map(str, args)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


@pytest.fixture(scope="module")
def page_folder(trained_run, tmp_path_factory) -> Path:
    """The report on a finished run of the default training, as a user makes it."""
    folder = tmp_path_factory.mktemp("report") / "there"
    before = snapshot(trained_run.workdir)
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", "mnist_jax.report", str(trained_run.workdir), "--out", str(folder)],
        env={**os.environ, **trained_run.environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[-1] == str(folder / "report.html")
    assert snapshot(trained_run.workdir) == before
    return folder


@pytest.fixture(scope="module")
def page(page_folder) -> Page:
    return Page((page_folder / "report.html").read_text())


def is_frozen_where_a_kill_costs_steps(run: Run, process: subprocess.Popen[str]) -> bool:
    process.send_signal(signal.SIGSTOP)
    last = json.loads(run.metrics().splitlines()[-1])["step"]
    if last >= max(run.steps()) + 10:
        return True
    process.send_signal(signal.SIGCONT)
    return False


@pytest.fixture(scope="module")
def eventful(tmp_path_factory, environment) -> tuple[Run, str]:
    """A run that was stopped, killed and stopped again, and the report that was written while it was at work."""
    run = Run(tmp_path_factory.mktemp("eventful") / "run", environment)
    settings = ("--dataset", "digits", "--steps", "100000", "--log-every-steps", "10", "--eval-every-steps", "100")
    process = run.start(*settings, "--checkpoint-every-s", "3600")
    assert run.wait_for(lambda: len(run.events("save")) > 0, process)
    out = tmp_path_factory.mktemp("meanwhile")
    assert report.main([str(run.workdir), "--out", str(out)]) == 0
    assert process.poll() is None
    stop(process, signal.SIGTERM)
    process = run.start()
    assert run.wait_for(lambda: is_frozen_where_a_kill_costs_steps(run, process), process)
    process.kill()
    end(process)
    process = run.start()
    assert run.wait_for(lambda: len(run.events("resume")) > 1, process)
    stop(process, signal.SIGINT)
    return run, (out / "report.html").read_text()


# What is in it


def test_the_page_needs_nothing_but_itself(page):
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "a"} & set(page.tags)
    assert not re.search(r"https?:|//\w|@import|url\(", re.sub(r"data:[^\"]*", "", page.html))
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page.html


def test_the_pictures_in_the_page_are_those_beside_it(page, page_folder):
    beside = {path.name: path.read_bytes() for path in page_folder.iterdir() if path.suffix == ".png"}
    names = {f"{name}{theme}.png" for name in ("story", "confusion", "mistakes") for theme in ("", "-dark")}
    assert beside.keys() == names
    within = [base64.b64decode(address.partition(",")[2]) for address in page.addresses]
    assert sorted(within) == sorted(beside.values())
    assert {path.name for path in page_folder.iterdir()} == {*names, "report.html"}


def test_the_head_tells_what_the_last_exit_told(page, trained_run):
    (exit_event,) = trained_run.events("exit")
    assert f"step {exit_event['step']:,} of {exit_event['step']:,}" in page.text
    assert f"{100 * exit_event['test_accuracy']:.2f} %" in page.text
    assert f"step {exit_event['step']:,}, of the SHA-256 {exit_event['state_sha256']}" in page.text
    assert "does nothing, for the run is finished" in page.text
    assert "mnist, with the model cnn, preset fast, seed 0" in page.text


def test_the_confusions_are_those_of_evaluate(trained_run, mnist_dir):
    with StopSignal() as none:
        asked = evaluate.evaluate(evaluate.Options(trained_run.workdir), none, Terminal())
        judgement = report.judge(report.Options(trained_run.workdir), none, Terminal())
    assert judgement.confusion.tolist() == asked.confusion
    assert (judgement.step, judgement.images) == (asked.step, 10_000)
    assert judgement.wrong == round(10_000 * (1 - asked.accuracy)) > 0
    assert len(judgement.mistakes) == min(24, judgement.wrong)


def test_the_worst_mistakes_come_first_with_the_share_of_the_answer():
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1) * np.ones((40, 28, 28, 1), np.uint8)
    labels = np.full(40, 8)
    logits = np.zeros((40, 10), np.float32)
    logits[:, 4] = 1 + np.arange(40)  # ever surer of a 4
    labels[39] = 4
    mistakes = report.worst_mistakes(images, labels, logits, [str(digit) for digit in range(10)])
    assert [int(mistake.image[0, 0, 0]) for mistake in mistakes] == list(range(38, 14, -1))
    assert mistakes[0].caption == "an 8, taken for 4 (100\N{NO-BREAK SPACE}%)"
    (slight,) = report.worst_mistakes(images[:1], labels[:1], logits[:1], 10 * ["Bag"])
    assert slight.caption == "a Bag, taken for Bag (23\N{NO-BREAK SPACE}%)"  # e / (e + 9)


def test_each_checkpoint_is_told_and_every_byte_of_it_was_read(page, trained_run):
    for checkpoint in list_checkpoints(trained_run.workdir / "checkpoints"):
        assert re.search(rf"\b{checkpoint.step:,} \d{{4}}-\d\d-\d\d [\d:]+ [\d.]+ MB [a-z ]+ [\d.]+ % good", page.text)


def test_stops_and_kills_are_told_with_what_they_cost(eventful, capsys):
    run, _ = eventful
    page = write_page(run.workdir, "--out", run.workdir.parent / "report", capsys=capsys)
    first, second = run.events("resume")
    turns = list(history.read_turns(run.events(), is_running=False, now_s=0.0))
    assert [turn.end for turn in turns] == ["stopped", "killed", "stopped"]
    assert [turn.reason for turn in turns] == ["SIGTERM", "", "SIGINT"]
    assert [turn.first_step for turn in turns] == [0, first["step"], second["step"]]
    assert [turn.repeated_steps for turn in turns] == [0, 0, second["lost_steps"]]
    assert [turn.lost_steps for turn in turns] == [0, second["lost_steps"], 0]
    assert second["lost_steps"] >= 10
    assert turns[1].last_step == second["step"] + second["lost_steps"]
    labels = [mark.label for mark in report.mark_ends(turns)]
    assert labels == ["SIGTERM", f"killed, {second['lost_steps']:,} steps lost", "SIGINT"]
    assert "stopped by SIGTERM" in page.text
    assert "2 resumes, each from the very bits that were saved" in page.text
    assert f"1 kill; {second['lost_steps']:,} steps lost and recomputed" in page.text


def test_the_time_of_each_turn_is_spent_in_lanes_without_a_gap(eventful):
    turns = list(history.read_turns(eventful[0].events(), is_running=False, now_s=0.0))
    for turn in turns:
        spans = [span for span in turn.spans if span.lane != "save"]
        assert [span.lane for span in spans][:2] == ["load data", "compile"]
        assert [spans[0].begin_s, spans[-1].end_s] == [turn.began_s, turn.ended_s]
        assert all(a.end_s == b.begin_s for a, b in pairwise(spans))
    assert [span.lane for span in turns[0].spans if span.lane != "save"][2:5] == ["train", "evaluate", "train"]
    saves = [span for span in turns[0].spans if span.lane == "save"]
    told = [event for event in eventful[0].events("save") if event["time"] <= turns[0].ended_s]
    assert [span.end_s for span in saves] == [event["time"] for event in told]
    assert [span.end_s - span.begin_s for span in saves] == pytest.approx(
        [event["seconds"] for event in told], abs=1e-5
    )


def test_a_run_at_work_can_be_reported(eventful):
    page = Page(eventful[1])
    assert re.search(r"State running, by process \d+ on host", page.text)
    assert "mistake" in page.text
    turns = history.read_turns(eventful[0].events()[:5], is_running=True, now_s=4e9)
    assert [(turn.end, turn.ended_s) for turn in turns] == [("running", 4e9)]


def test_a_browser_shows_it_at_the_width_of_a_phone_and_in_the_dark(page_folder):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("there is no chromium with its chromedriver")
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
            browser.get((page_folder / "report.html").as_uri())
            shown = browser.execute_script("return [...document.images].map(i => [i.currentSrc, i.naturalWidth])")
            files = [(page_folder / f"{name}{suffix}.png").read_bytes() for name in ("story", "confusion", "mistakes")]
            assert [base64.b64decode(source.partition(",")[2]) for source, _ in shown] == files
            assert all(width > 0 for _, width in shown)
            assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        assert browser.get_log("browser") == []  # Its own policy forbids nothing that it does.


# What it does without


def test_a_run_that_never_got_far_has_a_page(tmp_path, trained_run, capsys):
    shutil.copy(trained_run.workdir / "config.json", tmp_path)
    page = write_page(tmp_path, capsys=capsys)
    assert "State not started yet" in page.text
    assert page.text.count(NEVER_SAVED) == 3  # for the next start, the confusions and the mistakes
    assert len(page.addresses) == 2

    (tmp_path / "config.json").unlink()
    (tmp_path / "events.jsonl").write_text(json.dumps(trained_run.events("start")[0]) + "\n")
    page = write_page(tmp_path, capsys=capsys)
    assert "State killed" in page.text
    assert (tmp_path / "report" / "report.html").read_text() == page.html


def test_without_a_history_it_does_not_say_what_it_does_not_know(tmp_path, trained_run, capsys):
    shutil.copytree(trained_run.workdir, tmp_path / "run")
    (tmp_path / "run" / "events.jsonl").unlink()
    page = write_page(tmp_path / "run", capsys=capsys)
    assert "State not known, for its history is not there" in page.text
    assert page.text.count("There are checkpoints, but no history.") == 3


def test_with_bad_checkpoints_it_says_so_and_the_rest_is_there(tmp_path, trained_run, capsys):
    shutil.copytree(trained_run.workdir, tmp_path / "run")
    for checkpoint in list_checkpoints(tmp_path / "run" / "checkpoints"):
        (checkpoint.path / "manifest.json").write_text("{}")
    page = write_page(tmp_path / "run", capsys=capsys)
    assert "There is no confusion matrix: step" in page.text
    assert "manifest.json cannot be understood" in page.text
    assert "0 of the" in page.text
    assert len(page.addresses) == 2


def test_without_the_data_set_it_says_so_and_the_rest_is_there(tmp_path, trained_run, capsys):
    page = write_page(trained_run.workdir, "--out", tmp_path / "out", "--data-dir", tmp_path, capsys=capsys)
    assert f"There is no confusion matrix: {tmp_path}" in page.text
    assert "does nothing, for the run is finished" in page.text
    assert len(page.addresses) == 2


def test_where_there_is_no_run_there_is_no_report(tmp_path, capsys):
    assert "there is no run in" in refusal(tmp_path / "nothing", capsys=capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_signal_ends_it(trained_run):
    with StopSignal() as signals:
        signals.record_signal(signal.SIGTERM)
        with pytest.raises(StoppedError):
            report.report(report.Options(trained_run.workdir), signals, Terminal())


# Where it writes


def test_a_link_in_the_place_of_the_report_is_not_followed(tmp_path, capsys):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    (run / "events.jsonl").touch()
    (run / "report").symlink_to(elsewhere)
    assert "is a symbolic link" in refusal(run, capsys=capsys)
    assert list(elsewhere.iterdir()) == []
    (run / "report").unlink()
    (run / "report").touch()
    assert "report is no directory" in refusal(run, capsys=capsys)


def test_a_link_in_the_place_of_a_file_is_not_followed(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("kept")
    for name in ("report.html", "report.html.partial"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).symlink_to(kept)
    report.write({"report.html": b"new"}, tmp_path / "out")
    assert kept.read_text() == "kept"
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {"report.html": b"new"}


def test_a_file_that_cannot_be_written_whole_leaves_the_one_before(tmp_path):
    report.write({"report.html": b"old"}, tmp_path)
    with pytest.raises(TypeError):
        report.write({"report.html": "no bytes"}, tmp_path)  # type: ignore[dict-item]
    assert (tmp_path / "report.html").read_bytes() == b"old"


def test_a_picture_of_an_earlier_report_does_not_stay(tmp_path):
    report.write({"story.png": b"1", "mistakes.png": b"2", "notes.png": b"3"}, tmp_path)
    report.write({"story.png": b"4"}, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"story.png", "notes.png"}


# Whatever stands in the files

HOSTILE = "<b x=\"1\" onload='y'>&amp;{{ 7 * 7 }}$\\frac{"
texts = st.text(max_size=8) | st.just(HOSTILE) | st.just("\ud800\x00\x1b[31m")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
kinds = ("start", "phase", "resume", "lost", "signal", "save", "save_failed", "evaluation", "quarantine", "exit")
fields = ("time", "seconds", "phase", "exact", "changed", "lost_steps", "signal", "outcome", "error", "state_sha256")
likely = {
    "event": st.sampled_from(kinds) | texts,
    "step": st.integers(0, 2**31 - 1) | st.integers(0, 9),
}
some_events = st.lists(
    st.builds(
        lambda known, details: {**details, **known},
        st.fixed_dictionaries(likely),
        st.dictionaries(st.sampled_from(fields), json_values | st.sampled_from(["train", "data", "stopped", "failed"])),
    ),
    max_size=8,
)
histories = st.builds(
    lambda events, text: [
        *({"event": "start", "step": 0, "time": 1e9}, *events),
        *({"event": "signal", "step": 9, "signal": text}, {"event": "exit", "step": 9, "outcome": "stopped"}),
    ],
    some_events,
    texts,
)


def read_back(events: list[dict], folder: Path) -> list[dict]:
    path = folder / "events.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return metrics.read_events(path)


@given(events=histories, text=texts, number=st.floats() | st.none())
@settings(deadline=None, max_examples=80)
def test_whatever_the_files_say_it_is_told_escaped_and_without_an_error(tmp_path_factory, events, text, number):
    events = read_back(events, tmp_path_factory.getbasetemp())
    turns = list(history.read_turns(events, is_running=bool(len(text) % 2), now_s=2e9))
    checkpoint = CheckpointStatus(5, number, 10, text, number, good=False, problem=text)
    config = SimpleNamespace(dataset=text, model=text, preset=text, seed=0, label_smoothing=0.1)
    cadence = SimpleNamespace(checkpoint_every_s=1, checkpoint_every_steps=0)
    found = Status(text, None, [checkpoint], [text, HOSTILE], [], NextStart("refuse", None, 2, text))
    html = report.render(
        name=text,
        written_s=1e9,
        facts=Facts(config, None, None),
        found=found,
        turns=turns,
        progress=Progress(0, text, number, 5),
        judgement=Judgement(missing=text),
        promises=list(promises.check(turns, events, found, cadence)),
        pictures={"story.png": b"", "story-dark.png": b""},
    ).decode()
    assert "<b " not in html
    assert not {"b", "script"} & set(Page(html).tags)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)


@given(events=histories)
@settings(deadline=None, max_examples=6, phases=[Phase.generate])  # To draw is too slow to look for a smaller example.
def test_whatever_the_history_says_it_can_be_drawn_and_no_word_of_it_is_in_the_picture(tmp_path_factory, events):
    turns = list(history.read_turns(read_back(events, tmp_path_factory.getbasetemp()), is_running=False, now_s=2e9))
    empty = history.Curve([], [], [])
    with StopSignal() as none:
        assert set(report.draw(turns, empty, empty, Judgement(missing="x"), none)) == {"story.png", "story-dark.png"}
    for mark in report.mark_ends(turns):
        assert re.fullmatch(r"(SIG[A-Z0-9]+|stopped|killed|failed|finished)(, [\d,]+ steps? lost)?", mark.label)
