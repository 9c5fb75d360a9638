import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from runs import in_new_process
from tampering import change_metadata, flip_bit, largest_file

from mnist_jax.checkpoint.checkpoint import Checkpoint
from mnist_jax.checkpoint.integrity import CorruptCheckpointError, IncompatibleCheckpointError
from mnist_jax.config import ConfigError
from mnist_jax.inference import classifier
from mnist_jax.records.metrics import read_metrics
from mnist_jax.runtime.preemption import StoppedError, StopSignal
from mnist_jax.training import data
from mnist_jax.training.selection import NoCheckpointYetError

pytestmark = pytest.mark.usefixtures("in_this_process")

DIGITS = data.load("digits", notify=print)


def write_metadata(workdir: Path, step: int, **changes: object) -> None:
    change_metadata(workdir / "checkpoints" / str(step), **changes)


def test_evaluation_gives_the_numbers_of_the_run(small_run):
    recorded = {r["step"]: r for r, _ in read_metrics(small_run.workdir / "metrics.jsonl") if r["split"] == "test"}
    for step in (20, 40):
        with StopSignal() as stop:
            model = classifier.load(small_run.workdir, step)
            found = model.evaluate(DIGITS, stop)
        assert (found.loss, found.accuracy) == (recorded[step]["loss"], recorded[step]["accuracy"])
        assert np.mean(found.logits.argmax(axis=1) == DIGITS.test_labels) == found.accuracy == model.test_accuracy
    logits = found.logits[:5].astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    probabilities = np.stack([model.predict(image) for image in DIGITS.test_images[:5]])
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-7)  # float32, of one image and of 500


def test_checkpoints_of_a_run_share_compiled_functions(small_run, monkeypatch):
    classifier.load(small_run.workdir, 20).predict(DIGITS.test_images[0])
    monkeypatch.setattr(classifier.Trainer, "_compile", None)
    classifier.load(small_run.workdir, 40).predict(DIGITS.test_images[0])


def test_requested_checkpoint_is_read(small_copy):
    for step, accuracy in ((10, 0.5), (20, 0.8), (30, 0.8), (40, 0.7)):
        write_metadata(small_copy, step, test_accuracy=accuracy)
    found = {which: classifier.load(small_copy, which) for which in ("latest", "best", 10)}
    assert {which: model.step for which, model in found.items()} == {"latest": 40, "best": 20, 10: 10}
    assert found["best"].sha256 == Checkpoint(small_copy / "checkpoints" / "20").manifest()["state_sha256"]


def test_best_checkpoint_was_evaluated(small_copy):
    for step, accuracy in ((10, float("nan")), (20, 7.0), (30, "all"), (40, 0.1)):
        write_metadata(small_copy, step, test_accuracy=accuracy)
    assert classifier.load(small_copy, "best").step == 40
    metrics = small_copy / "metrics.jsonl"
    before = "".join(metrics.read_text().splitlines(keepends=True)[:-1])
    write_metadata(small_copy, 40, test_accuracy=None, metrics={"lines": before})
    assert classifier.load(small_copy, "best").step == 40  # It was evaluated later.
    metrics.write_text(before)
    with pytest.raises(NoCheckpointYetError):
        classifier.load(small_copy, "best")


def test_removed_checkpoint_is_replaced_by_a_present_one(small_copy, monkeypatch):
    read = Checkpoint.read

    def remove_and_read(checkpoint, like):
        if checkpoint.step == 40:
            shutil.rmtree(checkpoint.path)
        return read(checkpoint, like)

    monkeypatch.setattr(Checkpoint, "read", remove_and_read)
    assert classifier.load(small_copy, "latest").step == 30
    with pytest.raises(ConfigError, match="no checkpoint of step 40; there are: 10, 20, 30"):
        classifier.load(small_copy, 40)


def test_corrupt_checkpoint_is_an_error(small_copy):
    flip_bit(largest_file(small_copy / "checkpoints" / "40"))
    with pytest.raises(CorruptCheckpointError, match="step 40"):
        classifier.load(small_copy, "latest")
    assert classifier.load(small_copy, 30).step == 30


@pytest.mark.parametrize("changes", [{"name": "letters"}, {"train_images": True}, {"test_images": 2**31}])
def test_unusable_data_description_is_an_error(small_copy, changes):
    write_metadata(small_copy, 40, data={"name": "digits", "train_images": 1438, "test_images": 359, **changes})
    with pytest.raises(IncompatibleCheckpointError, match="data"):
        classifier.load(small_copy, "latest")


def test_missing_run_and_missing_checkpoint_are_distinguished(tmp_path):
    with pytest.raises(ConfigError) as error:
        classifier.load(tmp_path, "latest")
    assert not isinstance(error.value, NoCheckpointYetError)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NoCheckpointYetError):
        classifier.load(tmp_path, "latest")


def test_other_data_are_an_error(small_run):
    other = data.Dataset(**{**vars(data.load("digits", notify=print)), "test_labels": DIGITS.test_labels[::-1]})
    with StopSignal() as stop, pytest.raises(ConfigError, match="data"):
        classifier.load(small_run.workdir, "latest").evaluate(other, stop)


def test_signal_stops_an_evaluation(small_run, monkeypatch):
    put = classifier.devices.make_global_array

    def signal_and_put(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return put(*arguments)

    monkeypatch.setattr(classifier.devices, "make_global_array", signal_and_put)
    with StopSignal() as stop, pytest.raises(StoppedError):
        classifier.load(small_run.workdir, "latest").evaluate(DIGITS, stop)


def accuracy_on_three_devices(workdir: str) -> float:
    import jax

    assert jax.device_count() == 3
    with StopSignal() as stop:
        return classifier.load(Path(workdir), "latest").evaluate(DIGITS, stop).accuracy


def test_training_batch_need_not_divide_over_the_devices(small_run, environment):
    three = {**environment, "XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu"}
    [end] = small_run.events("exit")
    assert in_new_process(accuracy_on_three_devices, str(small_run.workdir), **three) == end["test_accuracy"]
