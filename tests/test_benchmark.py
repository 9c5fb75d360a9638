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
from benchmarks.processes import BenchmarkError, Process, Worker, alternate, run
from benchmarks.report import Row

ROOT = Path(__file__).parents[1]

WORKER = """
import time
from benchmarks.processes import serve
print("a message", flush=True)

def spin(seconds):
    time.process_time = time.monotonic  # as if it were never idle
    return {}

serve({"parameters": 3}, {"train": lambda seconds: {"steps": 2 * seconds}, "fail": lambda _: {}["oh"], "spin": spin})
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


def test_row_shows_median_spread_and_goals():
    cells = row(theirs=[4.0], ratio=[3.0, 5.0], goals=("ours ≤ 2", "ratio ≥ 4.5")).cells()
    assert cells == ["this", "s", "median", "2 (1 – 6)", "4", "4 (3 – 5)", "ours ≤ 2, ratio ≥ 4.5", "yes, no"]


@pytest.mark.parametrize(("of", "limit"), [("mean", 3.0), ("median", 2.0), ("p99", 5.92)])
def test_goal_uses_the_statistic_of_its_row(of, limit):
    assert row(of=of, goals=(f"ours ≤ {limit + 1e-9}", f"ours ≤ {limit - 1e-9}")).reached() == [True, False]


def test_files_hold_the_whole_table_and_all_numbers(tmp_path, capsys):
    rows = [row(what="a very long name" * 10, goals=("ours ≥ 2",))]
    report.show(rows, {"cpu": "[one] of a kind"})
    out = capsys.readouterr().out
    assert rows[0].what in out
    assert "cpu [one] of a kind" in out
    report.write(tmp_path / "numbers.json", rows, {"cores": 2})
    written = json.loads((tmp_path / "numbers.json").read_text())
    assert written["cores"] == 2
    assert (written["rows"][0]["ours"], written["rows"][0]["reached"]) == ([1.0, 2.0, 6.0], [True])


def test_contestants_alternate():
    calls = []
    contestants = {name: lambda number, name=name: calls.append(name) or number for name in "abc"}
    assert alternate(contestants, 3) == {name: [0, 1, 2] for name in "abc"}
    assert "".join(calls) == "abccbaabc"


def test_images_are_read_as_written(tmp_path):
    arrays = {
        "images": np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28),
        "labels": np.arange(300).astype(np.uint8),
    }
    for part in images.FILES:
        images.write(tmp_path / images.FILES[part], arrays[part.split("_")[1]])
    found = images.read(tmp_path)
    assert np.array_equal(found["test_images"], arrays["images"])
    assert np.array_equal(found["train_labels"], arrays["labels"])
    assert len(images.read(tmp_path, 100)["train_labels"]) == 100


def test_process_reports_time_memory_and_fields(module):
    script = "import time; time.sleep(0.2); ink = bytes(range(256)) * 400_000; print('done step=3 a=b=c')"
    completed = run(module(script))
    assert completed.fields == {"step": "3", "a": "b=c"}
    assert 0.2 < completed.seconds < 30
    assert completed.peak_mb > 102


def test_failed_process_reports_its_stderr(module):
    with pytest.raises(BenchmarkError, match=r"contestant exited with code 1:\n.*oh dear"):
        run(module("raise SystemExit('oh dear')"))


def test_block_kills_its_process(module):
    with pytest.raises(KeyboardInterrupt), Process(module("import time; time.sleep(60)")) as process:
        raise KeyboardInterrupt
    assert process.popen.returncode == -signal.SIGKILL


def test_worker_replies_and_reports_failures(module):
    with Worker(module(WORKER)) as worker:
        assert worker.about == {"parameters": 3}
        assert [worker.ask("train", seconds)["steps"] for seconds in (1.5, 2)] == [3, 4]
        with pytest.raises(BenchmarkError, match="KeyError: 'oh'"):
            worker.ask("fail", 1)


def test_worker_that_is_not_idle_fails(module):
    with Worker(module(WORKER)) as worker:
        worker.ask("spin", 1)
        time.sleep(0.3)  # It should be idle now.
        with pytest.raises(BenchmarkError, match="idle"):
            worker.ask("train", 1)


def test_quick_runs_on_the_built_in_digits(tmp_path, environment):
    numbers = tmp_path / "numbers.json"
    command = [
        "-m",
        "benchmarks",
        "--quick",
        "--json",
        str(numbers),
        "--platform",
        "cpu",
        "--only",
        "save",
        "gpu-devices",
    ]
    variables = {**os.environ, **environment, "TFDS_DATA_DIR": str(tmp_path / "none"), "PYTHONPATH": str(ROOT)}
    script = subprocess.run([sys.executable, *command], env=variables, capture_output=True, text=True)
    assert script.returncode == 0, script.stderr
    rows = json.loads(numbers.read_text())["rows"]
    assert [len(row["ours"]) for row in rows] == [5, 5, 1]
