"""The benchmark's own parts; PyTorch and Keras are not needed for these."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import images, report
from benchmarks.processes import Failed, Process, Worker, alternate, run
from benchmarks.report import Row

ROOT = Path(__file__).parents[1]

ECHO = """
from benchmarks.processes import serve
print("a line for people", flush=True)
serve({"parameters": 3}, {"train": lambda seconds: {"steps": 2 * seconds}, "fail": lambda _: {}["oh"]})
"""
RESTLESS = """
import time
from benchmarks.processes import serve
time.process_time = time.monotonic  # As if it worked all the time.
serve({}, {"train": lambda _: {}})
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Make a module that other processes can run."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")

    def make(source: str) -> str:
        (tmp_path / "contestant.py").write_text(source)
        return "contestant"

    return make


def row(**values) -> Row:
    return Row(**{"what": "this", "unit": "s", "ours": [1.0, 2.0, 6.0], **values})


def test_a_row_shows_its_median_with_the_spread_and_whether_each_goal_is_reached():
    cells = row(theirs=[4.0], ratio=[3.0, 5.0], goals=("ours ≤ 2", "ratio ≥ 4.5")).cells()
    assert cells == ["this", "s", "median", "2 (1 – 6)", "4", "4 (3 – 5)", "ours ≤ 2, ratio ≥ 4.5", "yes, no"]


@pytest.mark.parametrize(("of", "limit"), [("mean", 3.0), ("median", 2.0), ("p99", 5.92)])
def test_a_goal_is_held_against_the_statistic_of_its_row(of, limit):
    assert row(of=of, goals=(f"ours ≤ {limit + 1e-9}", f"ours ≤ {limit - 1e-9}")).reached() == [True, False]


def test_the_json_holds_every_single_number(tmp_path):
    report.write(tmp_path / "numbers.json", [row(goals=("ours ≥ 2",))], {"cores": 2})
    written = json.loads((tmp_path / "numbers.json").read_text())
    assert written["cores"] == 2
    assert (written["rows"][0]["ours"], written["rows"][0]["reached"]) == ([1.0, 2.0, 6.0], [True])


def test_nothing_of_the_table_is_cut_off_in_a_file(capsys):
    what = "a very long name " * 10
    report.show([row(what=what.strip())], {"cpu": "[one] of a kind"})
    out = capsys.readouterr().out
    assert what.strip() in out
    assert "cpu [one] of a kind" in out


def test_contestants_alternate_and_each_round_reverses_their_order():
    calls = []
    contestants = {name: lambda number, name=name: calls.append(name) or number for name in "abc"}
    assert alternate(contestants, 3) == {name: [0, 1, 2] for name in "abc"}
    assert "".join(calls) == "abccbaabc"


def test_images_are_read_as_they_were_written(tmp_path):
    arrays = {
        "train_images": np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28),
        "test_labels": np.arange(300).astype(np.uint8),
    }
    for part in images.FILES:
        images.write(tmp_path / images.FILES[part], arrays["train_images" if "images" in part else "test_labels"])
    found = images.read(tmp_path)
    assert np.array_equal(found["test_images"], arrays["train_images"])
    assert np.array_equal(found["train_labels"], arrays["test_labels"])
    assert len(images.read(tmp_path, 100)["train_labels"]) == 100


def test_a_process_tells_its_time_its_memory_and_its_last_line(module):
    script = "import time; time.sleep(0.2); ink = bytes(range(256)) * 400_000; print('done step=3 a=b=c')"
    ended = run(module(script))
    assert ended.fields == {"step": "3", "a": "b=c"}
    assert 0.2 < ended.seconds < 30
    assert ended.peak_mb > 102


def test_a_process_that_fails_brings_its_last_words(module):
    with pytest.raises(Failed, match=r"contestant ended with code 1:\n.*oh dear"):
        run(module("raise SystemExit('oh dear')"))


def test_a_process_ends_with_its_block(module):
    with pytest.raises(KeyboardInterrupt), Process(module("import time; time.sleep(60)")) as process:
        raise KeyboardInterrupt
    assert process.popen.returncode == -signal.SIGKILL


def test_a_worker_answers_each_command(module):
    with Worker(module(ECHO)) as worker:
        assert worker.about == {"parameters": 3}
        assert [worker.ask("train", seconds)["steps"] for seconds in (1.5, 2)] == [3, 4]


def test_a_worker_that_fails_brings_its_last_words(module):
    with Worker(module(ECHO)) as worker, pytest.raises(Failed, match="KeyError: 'oh'"):
        worker.ask("fail", 1)
    with pytest.raises(Failed, match="No module named"), Worker("nobody"):
        pass


def test_a_worker_that_works_while_it_should_be_idle_is_found_out(module):
    with Worker(module(RESTLESS)) as worker:
        time.sleep(0.3)  # Its turn to be idle; what it does meanwhile is measured.
        with pytest.raises(Failed, match="while it was another's turn"):
            worker.ask("train", 1)


def test_quick_measures_our_own_rows_on_the_built_in_digits(tmp_path, environment):
    numbers = tmp_path / "numbers.json"
    command = ["-m", "benchmarks", "--quick", "--json", str(numbers), "--only", "save"]
    pretended = {**os.environ, **environment, "TFDS_DATA_DIR": str(tmp_path / "none"), "PYTHONPATH": str(ROOT)}
    script = subprocess.run([sys.executable, *command], env=pretended, capture_output=True, text=True)
    assert script.returncode == 0, script.stderr
    rows = json.loads(numbers.read_text())["rows"]
    assert [len(row["ours"]) for row in rows] == [5, 5]
