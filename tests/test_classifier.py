import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from runs import in_new_process
from tampering import change_metadata

from mnist_jax import train
from mnist_jax.checkpoint.checkpoint import Checkpoint, list_checkpoints
from mnist_jax.checkpoint.integrity import CorruptCheckpointError, IncompatibleCheckpointError
from mnist_jax.config import Config, ConfigError
from mnist_jax.inference import classifier
from mnist_jax.inference.classifier import NoCheckpointYetError
from mnist_jax.records.metrics import read_metrics
from mnist_jax.runtime.preemption import StoppedError, StopSignal
from mnist_jax.training import data

pytestmark = pytest.mark.usefixtures("in_this_process")

DIGITS = data.load("digits", notify=print)
# 22 steps an epoch. The average of the weights is what is evaluated, and not the weights.
CONFIG = Config(dataset="digits", steps=44, batch_size=64, eval_every_steps=11, keep=9, average_decay=0.9)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with StopSignal() as stop:
        assert train.run(CONFIG, workdir, stop) == 0
    assert [checkpoint.step for checkpoint in list_checkpoints(workdir / "checkpoints")] == [11, 22, 33, 44]
    return workdir


@pytest.fixture
def run_in(finished, tmp_path) -> Path:
    """A copy of that run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def write_metadata(workdir: Path, step: int, **about: object) -> None:
    """Have the checkpoint of a step say something else of its run."""
    change_metadata(workdir / "checkpoints" / str(step), **about)


@pytest.mark.parametrize("step", [11, 22, 33, 44])
def test_an_evaluation_comes_to_the_very_numbers_of_the_run(finished, step):
    [wanted] = [r for r, _ in read_metrics(finished / "metrics.jsonl") if (r["split"], r["step"]) == ("test", step)]
    with StopSignal() as stop:
        found = classifier.load(finished, step).evaluate(DIGITS, stop)
    assert (found.loss, found.accuracy) == (wanted["loss"], wanted["accuracy"])
    assert found.logits.shape == (359, 10)
    assert np.mean(found.logits.argmax(axis=1) == DIGITS.test_labels) == found.accuracy


def test_a_single_answer_is_that_of_the_evaluation(finished):
    model = classifier.load(finished, "latest")
    with StopSignal() as stop:
        logits = model.evaluate(DIGITS, stop).logits[:20].astype(np.float64)
    wanted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = np.stack([model.predict(image) for image in DIGITS.test_images[:20]])
    assert found.shape == (20, 10)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-7)  # float32, of one image and of 500


def test_the_checkpoint_that_is_asked_for_is_read(run_in):
    for step, accuracy in ((11, 0.5), (22, 0.8), (33, 0.8), (44, 0.7)):
        write_metadata(run_in, step, test_accuracy=accuracy)
    chosen = {which: classifier.load(run_in, which) for which in ("latest", "best", 11)}
    assert {which: model.step for which, model in chosen.items()} == {"latest": 44, "best": 22, 11: 11}
    assert chosen["best"].sha256 == Checkpoint(run_in / "checkpoints" / "22").manifest()["state_sha256"]


def test_a_checkpoint_that_was_not_evaluated_is_never_the_best(run_in):
    for step, accuracy in ((11, float("nan")), (22, 7.0), (33, "all"), (44, 0.1)):
        write_metadata(run_in, step, test_accuracy=accuracy)
    assert classifier.load(run_in, "best").step == 44
    write_metadata(run_in, 44, test_accuracy=None)
    with pytest.raises(NoCheckpointYetError, match="was evaluated yet; use --step latest"):
        classifier.load(run_in, "best")


def test_a_checkpoint_that_the_run_removes_meanwhile_is_looked_for_again(run_in, monkeypatch):
    read = Checkpoint.read

    def remove_and_read(checkpoint, like):
        if checkpoint.step == 44:
            shutil.rmtree(checkpoint.path)
        return read(checkpoint, like)

    monkeypatch.setattr(Checkpoint, "read", remove_and_read)
    assert classifier.load(run_in, "latest").step == 33
    with pytest.raises(ConfigError, match="has no checkpoint of step 44; there are: 11, 22, 33"):
        classifier.load(run_in, 44)


def test_a_damaged_checkpoint_is_an_error_and_not_passed_over(run_in):
    state = max((run_in / "checkpoints" / "44" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    state.write_bytes(state.read_bytes()[:-1] + b"!")
    with pytest.raises(CorruptCheckpointError, match="step 44"):
        classifier.load(run_in, "latest")
    assert classifier.load(run_in, 33).step == 33


@pytest.mark.parametrize(
    "about",
    [{"name": "letters"}, {"train_images": 0}, {"train_images": True}, {"test_images": 2**31}, {"test_images": "9"}],
)
def test_a_checkpoint_that_says_nothing_usable_of_the_data_is_refused(run_in, about):
    known = {"name": "digits", "train_images": 1438, "test_images": 359}
    write_metadata(run_in, 44, data={**known, **about})
    with pytest.raises(IncompatibleCheckpointError, match="step 44 has invalid metadata: data"):
        classifier.load(run_in, "latest")


def test_where_nothing_is_saved_yet_it_is_said(tmp_path):
    with pytest.raises(ConfigError, match="there is no run in"):
        classifier.load(tmp_path, "latest")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NoCheckpointYetError, match="nothing has been saved yet in"):
        classifier.load(tmp_path, "latest")


def test_other_data_than_the_run_has_seen_are_refused(finished):
    other = data.Dataset(**{**vars(data.load("digits", notify=print)), "test_labels": DIGITS.test_labels[::-1]})
    with StopSignal() as stop, pytest.raises(ConfigError, match="the run began with other data"):
        classifier.load(finished, "latest").evaluate(other, stop)


def test_a_signal_ends_an_evaluation(finished, monkeypatch):
    put = classifier.devices.make_global_array

    def signal_and_put(*arguments):  # when all is compiled
        os.kill(os.getpid(), signal.SIGTERM)
        return put(*arguments)

    model = classifier.load(finished, "latest")
    monkeypatch.setattr(classifier.devices, "make_global_array", signal_and_put)
    with StopSignal() as stop, pytest.raises(StoppedError):
        model.evaluate(DIGITS, stop)


def accuracy_on(workdir: str) -> float:
    import jax

    assert jax.device_count() == 3
    with StopSignal() as stop:
        return classifier.load(Path(workdir), "latest").evaluate(DIGITS, stop).accuracy


def test_a_batch_that_does_not_divide_over_the_devices_at_hand_is_no_hindrance(finished, environment):
    three = {**environment, "XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    [*_, (wanted, _)] = read_metrics(finished / "metrics.jsonl")
    assert in_new_process(accuracy_on, str(finished), **three) == wanted["accuracy"]


def test_another_checkpoint_of_the_run_needs_no_new_compilation(finished):
    first = classifier.load(finished, 11)
    first.predict(DIGITS.test_images[0])
    second = classifier.load(finished, 22)
    assert second._trainer is first._trainer
    assert "predict" in vars(second._trainer)
