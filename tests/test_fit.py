"""Training from Python: `mnist_jax.fit` in a thread and in a notebook."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from runs import DIGITS_CONFIG, in_new_process

import mnist_jax
from mnist_jax.config import Config, ConfigError
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import data
from mnist_jax.training.dispatch import Dispatcher
from mnist_jax.training.fit import Result

CONFIG = Config(**DIGITS_CONFIG, steps=40, log_every_steps=10, eval_every_steps=20)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """The directory of an undisturbed run."""
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(in_this_process, workdir) -> Result:
    """The result of the call that makes it."""
    return mnist_jax.fit(CONFIG, workdir=workdir)


def test_import_brings_no_jax():
    program = "import mnist_jax, sys; assert mnist_jax.Config().steps is None; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_fit_returns_metrics_and_digest(whole):
    assert (whole.step, whole.is_stopped, len(whole.state_sha256)) == (40, False, 64)
    assert whole.test_accuracy == whole.metrics[-1]["accuracy"]
    assert [record["step"] for record in whole.metrics] == [10, 20, 20, 30, 40, 40]


def test_fit_in_a_thread_stops_on_request_and_resumes_exactly(whole, tmp_path, monkeypatch):
    stop, results, advance = StopSignal(), [], Dispatcher.advance

    def advance_and_request(self):
        if self.step >= 15:
            stop.request()
        return advance(self)

    monkeypatch.setattr(Dispatcher, "advance", advance_and_request)
    thread = threading.Thread(target=lambda: results.append(mnist_jax.fit(CONFIG, workdir=tmp_path, stop=stop)))
    thread.start()
    thread.join()
    [stopped] = results
    assert stopped.is_stopped
    assert 15 <= stopped.step < 40
    monkeypatch.undo()
    assert mnist_jax.fit(CONFIG, workdir=str(tmp_path)) == whole


def test_fit_refuses_another_config(whole, workdir):
    with pytest.raises(ConfigError, match="learning_rate"):
        mnist_jax.fit(Config(**{**vars(CONFIG), "learning_rate": 0.5}), workdir=workdir)
    events = [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]
    assert events[-1]["outcome"] == "failed"


def test_load_predicts(whole, workdir):
    classifier = mnist_jax.load(workdir)
    digits = data.load("digits", notify=print)
    predictions = [int(np.argmax(classifier.predict(image))) for image in digits.test_images[:20]]
    assert np.mean(predictions == digits.test_labels[:20]) > 0.8


def platforms_before_and_after_load(workdir: Path) -> list[str | None]:
    import jax

    before = jax.config.values["jax_platforms"]
    mnist_jax.load(workdir)
    return [before, jax.config.values["jax_platforms"]]


def test_load_does_not_move_a_later_fit_to_the_cpu(small_run, environment):
    before, after = in_new_process(platforms_before_and_after_load, small_run.workdir, **environment, JAX_PLATFORMS="")
    assert before == after


CELL = f"""
import os, signal, threading
import mnist_jax
from mnist_jax.training.dispatch import Dispatcher

def interrupt(self, advance=Dispatcher.advance):
    if self.step >= 15 and not interrupted:
        interrupted.append(1)
        os.kill(os.getpid(), signal.SIGINT)  # as the stop button does
    return advance(self)

Dispatcher.advance = interrupt
config = mnist_jax.Config(**{DIGITS_CONFIG}, steps=40, log_every_steps=10, eval_every_steps=20)
result = mnist_jax.fit(config, workdir="run")
print("RESULT", result.step, result.is_stopped, result.state_sha256)
"""


def test_notebook_cell_that_is_interrupted_resumes_when_it_runs_again(whole, tmp_path, environment, monkeypatch):
    for name, value in environment.items():
        if name != "HOME":  # Jupyter looks for its kernels there.
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(mnist_jax.__file__).parents[1]), *sys.path]))
    cells = [nbformat.v4.new_code_cell(source) for source in ("interrupted = []", CELL, CELL)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    results = [
        line.split()[1:]
        for cell in notebook.cells
        for output in cell.outputs
        for line in output.get("text", "").splitlines()
        if line.startswith("RESULT")
    ]
    assert [is_stopped for _, is_stopped, _ in results] == ["True", "False"]
    assert results[1] == ["40", "False", whole.state_sha256]
