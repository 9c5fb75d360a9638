"""The loop in this process, where parts of it can be made to fail."""

import io
import json
import os
import pathlib
import shutil
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import DIGITS_CONFIG, signal_here, train_here

from mnist_jax.checkpoint import integrity
from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.checkpoint.remote import RemoteError, RemoteStore
from mnist_jax.config import Config
from mnist_jax.console import Terminal
from mnist_jax.records.metrics import EventLog, MetricWriter
from mnist_jax.runtime.lock import exclusive_lock
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import data, dispatch, loop, recorder, remote_copies, selection, setup, trainer
from mnist_jax.training.dispatch import DispatchQueue
from mnist_jax.training.recorder import Recorder
from mnist_jax.training.remote_copies import RemoteCopies

pytestmark = pytest.mark.usefixtures("in_this_process")

DEFAULTS = {**DIGITS_CONFIG, "steps": 40, "log_every_steps": 10, "checkpoint_every_steps": 10}


def attempt(workdir: Path, loading: Future | None = None, **settings) -> int:
    """Start or resume a run, and return the exit code."""
    with StopSignal() as stop:
        return train_here(Config(**{**DEFAULTS, **settings}), workdir, stop, loading)


def events(workdir: Path, event: str) -> list[dict]:
    records = map(json.loads, (workdir / "events.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == event]


def result(workdir: Path) -> tuple[str, bytes]:
    """Return state digest and metrics of a finished run."""
    return events(workdir, "exit")[-1]["state_sha256"], (workdir / "metrics.jsonl").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(in_this_process, tmp_path_factory) -> Path:
    """The run directory of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert attempt(workdir) == 0
    return workdir


@pytest.fixture
def copied(undisturbed, tmp_path) -> Path:
    """A copy of the uninterrupted run."""
    return Path(shutil.copytree(undisturbed, tmp_path / "copied"))


def fail_to_save(monkeypatch, *, steps) -> None:
    """Let the disk be full whenever one of these steps is saved."""
    write_manifest = integrity.write_manifest

    def write_or_fail(directory, step, *args):
        if step in steps:
            raise OSError(28, "No space left on device")
        return write_manifest(directory, step, *args)

    monkeypatch.setattr(integrity, "write_manifest", write_or_fail)


def spy(monkeypatch, owner, name, look) -> None:
    """Call `look` with the arguments of a method before the method."""
    original = getattr(owner, name)

    def method(self, *args, **kwargs):
        look(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, method)


# ---- The order of events


def test_order_of_events(tmp_path, monkeypatch):
    happened = []
    spy(monkeypatch, MetricWriter, "write", lambda self, step, split, **_: happened.append(f"line {split} {step}"))
    spy(monkeypatch, MetricWriter, "sync", lambda self: happened.append("sync"))
    spy(
        monkeypatch,
        Checkpointer,
        "save",
        lambda self, step, *_, metadata, **__: happened.append(f"save {step} {metadata['reason']}"),
    )

    def stop_at_25(self):
        if self.dispatcher.step == 25 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)

    spy(monkeypatch, Recorder, "request_save_if_due", stop_at_25)
    # A call may not pass step 25.
    settings = {"log_every_steps": 5, "eval_every_steps": 20, "checkpoint_every_steps": None}
    for _ in range(2):
        assert attempt(tmp_path / "run", **settings) == 0
    assert happened == [
        *(f"line train {step}" for step in (5, 10, 15, 20)),
        *("line test 20", "sync", "save 20 best test accuracy so far"),
        *("line train 25", "sync", "save 25 signal SIGTERM"),
        *(f"line train {step}" for step in (30, 35, 40)),
        *("line test 40", "sync", "save 40 best test accuracy so far"),
        *("sync", "save 40 end"),
    ]


def test_only_log_intervals_fetch_from_the_device(tmp_path, monkeypatch):
    fetched, means = [], dispatch.means

    def count(sums):
        fetched.append(1)
        with jax.transfer_guard_device_to_host("allow"):
            return means(sums)

    monkeypatch.setattr(dispatch, "means", count)
    assert attempt(tmp_path, log_every_steps=20, eval_every_steps=40, checkpoint_every_steps=None) == 0
    assert len(fetched) == 3  # two intervals and one evaluation
    assert np.isfinite(events(tmp_path, "evaluation")[0]["loss"])


def test_at_most_two_calls_are_in_flight(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    queue = DispatchQueue()
    assert [queue.put(1, name) for name in "abcd"] == [None, "a", "b", "c"]
    assert waited == ["a", "b", "c"]


@pytest.mark.parametrize(("seconds_per_step", "steps_per_call"), [(0.5, 1), (0.01, 6), (1e-5, 6000)])
def test_call_length_adapts_to_the_step_time(monkeypatch, seconds_per_step, steps_per_call):
    now = 0.0
    monkeypatch.setattr(dispatch.time, "monotonic", lambda: now)
    monkeypatch.setattr(jax, "block_until_ready", lambda result: None)
    queue = DispatchQueue()
    for _ in range(60):
        n = queue.steps_per_call
        queue.put(n, None)
        now += n * seconds_per_step
    assert queue.steps_per_call == pytest.approx(steps_per_call, rel=0.05)


def test_short_calls_count_by_their_steps(monkeypatch):
    """A call ends early at the end of an epoch. It takes long for its steps, and there is one for each long one."""
    now = 0.0
    monkeypatch.setattr(dispatch.time, "monotonic", lambda: now)
    monkeypatch.setattr(jax, "block_until_ready", lambda result: None)
    queue = DispatchQueue()
    for number in range(60):
        n = 100 if number % 2 else 4
        queue.put(n, None)
        now += 0.004 + n * 1e-4
    assert queue.seconds_per_step == pytest.approx((0.008 + 104e-4) / 104, rel=0.2)


def test_each_epoch_has_its_order_and_each_interval_its_sums(tmp_path, monkeypatch):
    epochs, images = [], []
    compile_, means = trainer.Trainer.compile, dispatch.means

    def compile_and_watch(self):
        compile_(self)
        order = self.epoch_order
        self.epoch_order = lambda epoch: (epochs.append(int(epoch)), order(epoch))[1]

    monkeypatch.setattr(trainer.Trainer, "compile", compile_and_watch)
    monkeypatch.setattr(dispatch, "means", lambda sums: (images.append(int(sums.images)), means(sums))[1])
    assert attempt(tmp_path, log_every_steps=20, eval_every_steps=40) == 0
    assert epochs == [0, 1]  # 22 steps each
    assert images[:2] == [20 * 64, 20 * 64]


def test_averaged_weights_are_evaluated_and_change_no_training(tmp_path, undisturbed):
    assert attempt(tmp_path, average_decay=0.9) == 0
    plain, averaged = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (undisturbed, tmp_path)
    )
    for one, other in zip(plain, averaged, strict=True):
        assert (one == other) == (one["split"] == "train")


def test_progress_line_fits_80_columns(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(Terminal, "interval", lambda self, text: lines.append(text))
    attempt(tmp_path)
    assert len(lines) == 4
    assert max(map(len, lines)) < 80


# ---- Saves that fail or are due


def test_failed_background_saves_are_retried(tmp_path, monkeypatch, capfd, undisturbed):
    fail_to_save(monkeypatch, steps={10, 20})
    assert attempt(tmp_path) == 0
    assert [event["step"] for event in events(tmp_path, "save_failed")] == [10, 20]
    assert "No space left on device" in events(tmp_path, "save_failed")[0]["error"]
    assert {event["step"] for event in events(tmp_path, "save")} >= {30, 40}
    assert "warning: the checkpoint of step 10" in capfd.readouterr().err
    assert result(tmp_path) == result(undisturbed)


def test_failed_final_save_exits_74_and_the_rerun_is_exact(tmp_path, monkeypatch, capfd, undisturbed):
    with monkeypatch.context() as patch:
        fail_to_save(patch, steps=range(21, 41))
        assert attempt(tmp_path) == 74
    err = capfd.readouterr().err
    assert "the checkpoint of step 40" in err
    assert "The newest checkpoint is of step 20." in err
    assert [(event["code"], event["step"]) for event in events(tmp_path, "exit")] == [(74, 20)]
    assert attempt(tmp_path) == 0
    assert "20 steps or more after it are recomputed" in capfd.readouterr().out
    assert [(event["step"], event["lost_steps"]) for event in events(tmp_path, "resume")] == [(20, 20)]
    assert result(tmp_path) == result(undisturbed)


def test_signal_in_the_final_save_loses_nothing(tmp_path, monkeypatch, undisturbed):
    write_manifest, signalled = integrity.write_manifest, []

    def signal_and_write(directory, step, *args):
        if step == 40:
            signalled.append(step)
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)  # The main thread handles it while the save is unfinished.
        return write_manifest(directory, step, *args)

    monkeypatch.setattr(integrity, "write_manifest", signal_and_write)
    assert attempt(tmp_path, preempted_exit_code=75) == 0
    assert signalled == [40]
    assert [event["outcome"] for event in events(tmp_path, "exit")] == ["finished"]
    assert result(tmp_path) == result(undisturbed)


def test_steps_lost_before_the_first_checkpoint_are_reported(tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        fail_to_save(patch, steps=range(100))
        assert attempt(tmp_path) == 74
    assert "The newest checkpoint is none." in capfd.readouterr().err
    assert attempt(tmp_path) == 0
    assert [(event["step"], event["lost_steps"]) for event in events(tmp_path, "lost")] == [(0, 40)]
    assert "40 steps or more are recomputed" in capfd.readouterr().out


def test_failed_timed_save_is_retried_soon(tmp_path, monkeypatch):
    failed, written, write_manifest = [], [], integrity.write_manifest

    def fail_twice(directory, step, *args):
        if len(failed) < 2:
            failed.append(step)
            raise OSError(28, "No space left on device")
        if not written:
            os.kill(os.getpid(), signal.SIGTERM)
        written.append(step)
        return write_manifest(directory, step, *args)

    monkeypatch.setattr(integrity, "write_manifest", fail_twice)
    monkeypatch.setattr(recorder, "RETRY_SAVE_S", 0.01)
    monkeypatch.setattr(dispatch, "means", lambda sums: (1.0, 0.5))  # Only the first evaluation is the best so far.
    settings = {"checkpoint_every_steps": None, "checkpoint_every_s": 1000, "log_every_steps": 1000}
    assert attempt(tmp_path, **settings, eval_every_steps=200, steps=20_000) == 0
    assert [event["step"] for event in events(tmp_path, "save_failed")] == failed == [200, failed[1]]
    saved = events(tmp_path, "save")[0]
    assert saved["reason"] == "time"
    assert 200 < failed[1] < saved["step"] == written[0]


# With one step per interval each call ends one. The evaluation at the end waits for all calls in any case.
@pytest.mark.parametrize(("log_every_steps", "steps"), [(1, [*range(1, 41)]), (2, [*range(1, 41, 2), 40])])
def test_timed_save_waits_for_no_call_in_flight(tmp_path, monkeypatch, log_every_steps, steps):
    saved = []
    monkeypatch.setattr(loop, "save", lambda dispatcher, _, __, reason: saved.append((dispatcher.step, reason)))
    now = 0.0

    def monotonic():
        nonlocal now
        now += 1
        return now

    monkeypatch.setattr(recorder.time, "monotonic", monotonic)
    monkeypatch.setattr(dispatch, "CALL_S", 1e-9)  # one step per call
    spy(monkeypatch, Recorder, "request_save_if_due", lambda self: setattr(self, "_next_save_s", 0.0))
    settings = {"checkpoint_every_steps": None, "log_every_steps": log_every_steps}
    assert attempt(tmp_path, **settings, eval_every_steps=400) == 0
    assert [step for step, reason in saved if reason == "time"] == steps


def test_next_timed_save_is_earlier_by_the_duration_of_the_last(tmp_path, monkeypatch):
    results, reasons = Checkpointer.results, []

    def results_of_long_saves(self):
        saves = results(self)
        if "time" in [save.metadata["reason"] for save in saves] and "time" not in reasons:
            os.kill(os.getpid(), signal.SIGTERM)
        reasons.extend(save.metadata["reason"] for save in saves)
        return [save._replace(seconds=999.999) for save in saves]

    monkeypatch.setattr(Checkpointer, "results", results_of_long_saves)
    settings = {"checkpoint_every_steps": None, "checkpoint_every_s": 1000, "log_every_steps": 1000}
    assert attempt(tmp_path, **settings, eval_every_steps=200, steps=20_000) == 0
    assert "time" in reasons


def test_best_checkpoint_is_kept_after_a_resume(tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.1, 0.1])
    monkeypatch.setattr(dispatch, "means", lambda sums: (1.0, next(accuracies)))

    def stop_at_20(self):
        if self.dispatcher.step == 20 and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)

    spy(monkeypatch, Recorder, "request_save_if_due", stop_at_20)
    settings = {"keep": 1, "log_every_steps": 1000, "eval_every_steps": 10, "checkpoint_every_steps": None}
    for _ in range(2):
        assert attempt(tmp_path, **settings) == 0
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [20, 40]


def test_checkpoint_of_an_interrupted_evaluation_is_kept_as_the_best(tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.1, 0.1])
    monkeypatch.setattr(dispatch, "means", lambda sums: (1.0, next(accuracies)))

    def stop_in_the_evaluation(self, name, step):
        if (name, step) == ("evaluate", 20) and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            signal_here()

    spy(monkeypatch, Recorder, "log_phase", stop_in_the_evaluation)
    settings = {"keep": 1, "log_every_steps": 1000, "eval_every_steps": 10, "checkpoint_every_steps": None}
    assert attempt(tmp_path, **settings) == 0
    assert events(tmp_path, "exit")[-1]["step"] == 20
    assert attempt(tmp_path, **settings) == 0
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [20, 40]
    assert selection.read(tmp_path, "best", lambda checkpoint: checkpoint.step) == 20


def test_full_disk_delays_metrics_and_no_checkpoint_precedes_them(tmp_path, monkeypatch, capfd):
    settings = {"log_every_steps": 5, "eval_every_steps": 40}
    assert attempt(tmp_path / "undisturbed", **settings) == 0
    disk, open_ = {"room": None}, pathlib.Path.open

    def open_limited(path, mode="r", *args, **kwargs):
        file = open_(path, mode, *args, **kwargs)
        if mode in ("ab", "xb") and path.name.startswith(("metrics", "events.")):
            file = LimitedFile(file, disk)
        return file

    def fill_and_free(self):
        disk["room"] = {5: 3, 25: None}.get(self.dispatcher.step, disk["room"])

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", open_limited)
        spy(patch, Recorder, "request_save_if_due", fill_and_free)
        assert attempt(tmp_path / "run", **settings) == 0
    err = capfd.readouterr().err
    assert err.count("cannot be written and are kept in memory") == 1
    assert err.count("have now been written") == 1
    assert [event["step"] for event in events(tmp_path / "run", "save_failed")] == [10, 20]
    assert events(tmp_path / "run", "save")[0]["step"] == 30
    assert result(tmp_path / "run") == result(tmp_path / "undisturbed")


class LimitedFile:
    """A file on a disk that has room for some more bytes, None for all."""

    def __init__(self, file, disk):
        self.file, self.disk = file, disk

    def write(self, data):
        if self.disk["room"] is None:
            return self.file.write(data)
        is_short = self.disk["room"] < len(data)
        if (data and not self.disk["room"]) or (is_short and isinstance(self.file, io.BufferedIOBase)):
            raise OSError(28, "No space left on device")
        written = self.file.write(data[: self.disk["room"]])
        self.disk["room"] -= written
        return written

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


# ---- Remote copies


def test_failed_upload_is_a_warning_and_the_last_decides(tmp_path, monkeypatch, capfd):
    url, upload, fails = f"file://{tmp_path}/remote", RemoteStore.upload, lambda step: step < 40

    def upload_or_fail(self, run, step, **options):
        if fails(step):
            raise RemoteError(f"{self.url}: no answer")
        return upload(self, run, step, **options)

    monkeypatch.setattr(RemoteStore, "upload", upload_or_fail)
    assert attempt(tmp_path / "run", mirror=url) == 0
    assert f"warning: {url}: no answer" in capfd.readouterr().err
    assert events(tmp_path / "run", "copy_failed")
    assert RemoteStore(url).newest_step() == 40
    shutil.rmtree(tmp_path / "remote")
    fails = lambda step: True  # noqa: E731
    assert attempt(tmp_path / "run", mirror=url) == 74
    err = capfd.readouterr().err
    assert f"error: {url}: no answer" in err
    assert "The newest checkpoint is of step 40." in err
    fails = lambda step: False  # noqa: E731
    assert attempt(tmp_path / "run", mirror=url) == 0  # The run is finished; only its copy was missing.
    assert RemoteStore(url).newest_step() == 40


def test_checkpoint_is_kept_while_it_is_uploaded(tmp_path, monkeypatch):
    upload, uploaded = RemoteStore.upload, []

    def upload_when_others_are_saved(self, run, step, **options):
        deadline_s = time.monotonic() + 60
        while step < 30 and not (run / "checkpoints" / str(step + 6)).exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        uploaded.append(step)
        return upload(self, run, step, **options)

    monkeypatch.setattr(RemoteStore, "upload", upload_when_others_are_saved)
    assert attempt(tmp_path / "run", mirror=f"file://{tmp_path}/remote", keep=1, checkpoint_every_steps=2) == 0
    assert [event["step"] for event in events(tmp_path / "run", "copy")] == uploaded
    assert min(uploaded) < 30
    assert not events(tmp_path / "run", "copy_failed")
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert len(kept) <= 4  # the last, the best, one that is uploaded, and one that waits


def test_last_upload_has_a_time_limit_after_a_signal(tmp_path, monkeypatch):
    is_over = threading.Event()
    monkeypatch.setattr(RemoteStore, "upload", lambda *_, **__: is_over.wait(60))
    monkeypatch.setattr(remote_copies, "LAST_UPLOAD_TIMEOUT_S", 0.1)
    log, checkpointer, stop = EventLog(tmp_path), Checkpointer(tmp_path / "checkpoints"), StopSignal()
    copies = RemoteCopies(f"file://{tmp_path}/remote", tmp_path, checkpointer, log)
    copies.begin(40)
    stop.request()
    with pytest.raises(RemoteError, match=r"/remote: the last upload took over 0\.1 s"):
        copies.finish(stop)
    is_over.set()
    checkpointer.close()
    log.close()


# ---- What is refused, and what is resumed all the same


def test_stop_before_the_processes_share_the_run(copied, monkeypatch, capfd):
    def be_stopped(*_, stop, **__):
        stop.request()
        stop.check()

    monkeypatch.setattr(setup, "share_run", be_stopped)
    assert attempt(copied, preempted_exit_code=75) == 75
    assert capfd.readouterr().out.splitlines()[-1].startswith("stopped step=40 signal=SIGTERM state_sha256=")
    assert events(copied, "exit")[-1]["outcome"] == "stopped"


def test_changed_config_is_refused_and_not_written(copied, capfd):
    (copied / "config.json").unlink()
    assert attempt(copied, seed=1, learning_rate=0.5) == 2
    err = capfd.readouterr().err
    assert "seed           0     1" in err
    assert "learning_rate  0.01  0.5" in err
    assert not (copied / "config.json").exists()
    assert attempt(copied) == 0
    assert json.loads((copied / "config.json").read_text())["seed"] == 0


def test_dataset_that_the_caller_loads_is_used(tmp_path, monkeypatch, capfd):
    loading, dataset = Future(), data.load("digits", notify=pytest.fail)
    monkeypatch.setattr(data, "load", pytest.fail)
    threading.Timer(0.5, loading.set_result, [dataset]).start()
    assert attempt(tmp_path, loading) == 0
    failed = Future()
    failed.set_exception(data.DataError("the file is corrupt"))
    assert attempt(tmp_path, failed) == 2
    assert "error: the file is corrupt" in capfd.readouterr().err


def test_other_dataset_is_refused(copied, monkeypatch, capfd):
    dataset = data.load("digits", notify=pytest.fail)
    dataset.train_images[5, 14, 14] ^= 1
    monkeypatch.setattr(data, "load", lambda *_, **__: dataset)
    assert attempt(copied) == 2
    assert "dataset differs" in capfd.readouterr().err


def test_checkpoint_of_another_tree_is_refused(tmp_path, capfd):
    assert attempt(tmp_path, average_decay=0.9, checkpoint_every_steps=None, eval_every_steps=40) == 0
    assert attempt(tmp_path) == 2
    assert "leaf average" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["40"]


def test_loss_that_is_not_finite_is_not_recorded_or_saved(tmp_path, capfd):
    assert attempt(tmp_path, learning_rate=1e30, checkpoint_every_steps=None) == 1
    assert "the loss of the updates up to step" in capfd.readouterr().err
    assert b"NaN" not in (tmp_path / "metrics.jsonl").read_bytes()
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("lost", ["all corrupt", "all gone"])
def test_no_good_checkpoint_exits_65_and_keeps_the_metrics(copied, capfd, lost):
    metrics = (copied / "metrics.jsonl").read_bytes()
    if lost == "all gone":
        shutil.rmtree(copied / "checkpoints")
    for manifest in (copied / "checkpoints").glob("*/manifest.json"):
        manifest.write_text("{")
    assert attempt(copied) == 65
    assert "checkpoints" in capfd.readouterr().err
    assert events(copied, "exit")[-1]["code"] == 65
    assert (copied / "metrics.jsonl").read_bytes() == metrics


def test_corrupt_checkpoint_is_quarantined_and_an_older_one_resumed(copied, capfd, undisturbed):
    (copied / "checkpoints" / "40" / "manifest.json").write_text("{")
    assert attempt(copied) == 0
    moved_to = copied / "checkpoints" / "quarantine" / "40-bad-manifest"
    assert str(moved_to) in capfd.readouterr().err
    assert [(event["step"], event["moved_to"]) for event in events(copied, "quarantine")] == [(40, str(moved_to))]
    assert [event["lost_steps"] for event in events(copied, "resume")] == [10]
    assert moved_to.is_dir()
    assert result(copied) == result(undisturbed)


@pytest.mark.parametrize("change", ["deleted", "edited"])
def test_changed_metrics_are_rebuilt(copied, capfd, undisturbed, change):
    path = copied / "metrics.jsonl"
    if change == "deleted":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b'"step": 10', b'"step": 11', 1))
    assert attempt(copied) == 0
    assert "metrics.jsonl" in capfd.readouterr().err
    assert result(copied) == result(undisturbed)
    assert [event["step"] for event in events(copied, "metrics_changed")] == [40]


def test_jax_setting_that_changes_bits_is_reported(copied):
    with jax.threefry_partitionable(False):
        assert attempt(copied) == 0
    [resume] = events(copied, "resume")
    assert resume["exact"] is False
    assert resume["changed"] == ["settings jax_threefry_partitionable True -> False"]


def test_lock_file_that_is_removed_ends_the_run(tmp_path, monkeypatch, capfd):
    """Otherwise a second process could take the lock, and both would write."""

    def remove(self):
        if self.dispatcher.step == 20:
            (tmp_path / "lock").unlink()

    with monkeypatch.context() as patch, exclusive_lock(tmp_path, wait_s=0, notify=pytest.fail):
        spy(patch, Recorder, "request_save_if_due", remove)
        assert attempt(tmp_path) == 73
    assert "lock" in capfd.readouterr().err
    assert max(int(path.name) for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) < 30
    assert attempt(tmp_path) == 0


def test_directory_that_cannot_hold_a_run_is_refused(tmp_path, capfd):
    (tmp_path / "file").touch()
    assert attempt(tmp_path / "file" / "run") == 2
    assert "choose another --workdir" in capfd.readouterr().err
