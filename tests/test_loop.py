"""The loop in this process, where its parts can be made to fail."""

import json
import os
import shutil
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
import pytest

from mnist_jax import train
from mnist_jax.checkpoint import integrity
from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.checkpoint.remote import RemoteError, RemoteStore
from mnist_jax.config import Config
from mnist_jax.console import Terminal
from mnist_jax.records.metrics import Journal
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import dispatch, loop, recorder, trainer
from mnist_jax.training.dispatch import DispatchQueue
from mnist_jax.training.recorder import Recorder, RemoteCopies

pytestmark = pytest.mark.usefixtures("in_this_process")


def config(**settings) -> Config:
    settings = {
        "dataset": "digits",
        "steps": 40,
        "log_every_steps": 10,
        "checkpoint_every_steps": 10,
        "batch_size": 64,
        **settings,
    }
    return Config(**settings)


def events(workdir: Path, event: str) -> list[dict]:
    records = map(json.loads, (workdir / "events.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == event]


def fail_to_save(monkeypatch, *, steps) -> None:
    """Have the disk be full whenever one of these steps is saved."""
    write_manifest = integrity.write_manifest

    def write_or_fail(directory, step, *args):
        if step in steps:
            raise OSError(28, "No squeue left on device")
        return write_manifest(directory, step, *args)

    monkeypatch.setattr(integrity, "write_manifest", write_or_fail)


def test_a_failed_background_save_is_told_and_training_goes_on_and_the_next_save_is_tried(tmp_path, monkeypatch, capfd):
    with StopSignal() as stop:
        assert train.run(config(), tmp_path / "undisturbed", stop) == 0
        fail_to_save(monkeypatch, steps={10, 20})
        assert train.run(config(), tmp_path / "run", stop) == 0
    assert [event["step"] for event in events(tmp_path / "run", "save_failed")] == [10, 20]
    assert "No squeue left on device" in events(tmp_path / "run", "save_failed")[0]["error"]
    assert {event["step"] for event in events(tmp_path / "run", "save")} >= {30, 40}
    assert "warning: the checkpoint of step 10 could not be saved" in capfd.readouterr().err
    ends = [events(tmp_path / name, "exit")[-1] for name in ("undisturbed", "run")]
    assert ends[0]["state_sha256"] == ends[1]["state_sha256"]
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("undisturbed", "run")]
    assert metrics[0] == metrics[1]


def test_a_copy_that_failed_is_told_and_training_goes_on_and_only_the_last_one_decides(tmp_path, monkeypatch, capfd):
    settings = config(mirror=f"file://{tmp_path}/mirror")
    push = RemoteStore.upload

    def fail_but_at_the_end(self, run, step, **options):
        if step < 40:
            raise RemoteError(f"{self.url}: the door is shut")
        return push(self, run, step, **options)

    def fail(self, run, step, **options):
        raise RemoteError(f"{self.url}: the door is shut")

    with StopSignal() as stop:
        monkeypatch.setattr(RemoteStore, "upload", fail_but_at_the_end)
        assert train.run(settings, tmp_path / "run", stop) == 0
        assert f"warning: {settings.mirror}: the door is shut. Training goes on" in capfd.readouterr().err
        monkeypatch.setattr(RemoteStore, "upload", fail)
        assert train.run(settings, tmp_path / "another", stop) == 74
        assert (
            f"error: {settings.mirror}: the door is shut\nThe newest checkpoint is of step 40."
            in capfd.readouterr().err
        )
        monkeypatch.setattr(RemoteStore, "upload", push)
        assert RemoteStore(settings.mirror).newest_step() == 40
        shutil.rmtree(tmp_path / "mirror")
        assert train.run(settings, tmp_path / "another", stop) == 0  # It is finished, and only its copy was missing.
    assert events(tmp_path / "run", "copy_failed")
    assert RemoteStore(settings.mirror).newest_step() == 40


def test_a_checkpoint_stays_while_it_is_copied_however_many_newer_ones_there_are(tmp_path, monkeypatch):
    push, waited = RemoteStore.upload, []

    def push_when_others_are_saved(self, run, step, **options):
        deadline_s = time.monotonic() + 60
        while step < 30 and not (run / "checkpoints" / str(step + 6)).exists():
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        waited.append(step)
        return push(self, run, step, **options)

    monkeypatch.setattr(RemoteStore, "upload", push_when_others_are_saved)
    settings = config(mirror=f"file://{tmp_path}/mirror", keep=1, checkpoint_every_steps=2)
    with StopSignal() as stop:
        assert train.run(settings, tmp_path / "run", stop) == 0
    assert [event["step"] for event in events(tmp_path / "run", "copy")] == waited
    assert min(waited) < 30
    assert not events(tmp_path / "run", "copy_failed")
    kept = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert len(kept) <= 4  # the last, the best, one that was being copied, and one that waited


def test_a_last_copy_that_failed_before_the_end_is_tried_once_more(tmp_path, monkeypatch):
    push, end, tried = RemoteStore.upload, Recorder.end, []

    def fail_once(self, run, step, **options):
        tried.append(step)
        if tried.count(40) == 1:
            raise RemoteError(f"{self.url}: the door is shut")
        return push(self, run, step, **options)

    def end_later(self, stop):
        self.checkpointer.wait()
        self.report_saves()
        assert self.copies._mirror.wait(60)
        return end(self, stop)

    monkeypatch.setattr(RemoteStore, "upload", fail_once)
    monkeypatch.setattr(Recorder, "end", end_later)
    settings = config(mirror=f"file://{tmp_path}/mirror")
    with StopSignal() as stop:
        assert train.run(settings, tmp_path / "run", stop) == 0
    assert tried[-2:] == [40, 40]
    assert RemoteStore(settings.mirror).newest_step() == 40


def test_after_a_signal_the_last_copy_is_waited_for_no_longer_than_schedulers_have_patience(tmp_path, monkeypatch):
    go_on = threading.Event()
    monkeypatch.setattr(RemoteStore, "upload", lambda *_, **__: go_on.wait(60))
    monkeypatch.setattr(recorder, "LAST_COPY_S", 0.1)
    journal, store = Journal(tmp_path), Checkpointer(tmp_path / "checkpoints")
    copies = RemoteCopies(f"file://{tmp_path}/mirror", tmp_path, store, journal)
    stop = StopSignal()
    copies.begin(40)
    stop.record_signal(signal.SIGTERM)
    with pytest.raises(RemoteError, match=r"/mirror: the last copy was not made in 0\.1 s"):
        copies.finish(stop)
    go_on.set()
    store.close()
    journal.close()


def test_a_save_that_time_asked_for_and_that_failed_is_tried_again_soon(tmp_path, monkeypatch):
    failed = []
    write_manifest = integrity.write_manifest

    def fail_twice(directory, step, *args):
        if len(failed) < 2:
            failed.append(step)
            raise OSError(28, "No squeue left on device")
        return write_manifest(directory, step, *args)

    monkeypatch.setattr(integrity, "write_manifest", fail_twice)
    monkeypatch.setattr(recorder, "RETRY_SAVE_S", 0.01)
    settings = {"checkpoint_every_steps": None, "checkpoint_every_s": 0.05, "eval_every_steps": 400, "steps": 400}
    with StopSignal() as stop:
        assert train.run(config(**settings), tmp_path, stop) == 0
    assert [event["step"] for event in events(tmp_path, "save_failed")] == failed
    first_saved = events(tmp_path, "save")[0]
    assert first_saved["reason"] == "time"
    assert failed[0] < failed[1] < first_saved["step"] < 400


# The evaluation at the end waits for all calls anyway.
@pytest.mark.parametrize(("log_every_steps", "steps"), [(1, [1, 2, 3, 4, 5, 6]), (2, [1, 3, 5, 6])])
def test_a_save_that_time_asks_for_waits_for_no_interval_unless_each_call_ends_one(
    tmp_path, monkeypatch, log_every_steps, steps
):
    saved = []

    def note_and_be_due_again(dispatcher, checkpointer, recorder, reason):
        saved.append((dispatcher.step, reason))
        recorder._next_save_s = 0.0

    monkeypatch.setattr(loop, "save", note_and_be_due_again)
    monkeypatch.setattr(dispatch, "CALL_S", 1e-9)  # Each call makes one step.
    settings = {"checkpoint_every_steps": None, "checkpoint_every_s": 1e-9, "log_every_steps": log_every_steps}
    with StopSignal() as stop:
        assert train.run(config(**settings, eval_every_steps=7, steps=6), tmp_path, stop) == 0
    assert [step for step, reason in saved if reason == "time"] == steps


def test_the_next_save_begins_as_much_earlier_as_a_save_takes(tmp_path, monkeypatch):
    """So a crash costs no more than the seconds between checkpoints, also when it comes in the middle of a save."""
    results = Checkpointer.results
    monkeypatch.setattr(
        Checkpointer, "results", lambda self: [saved._replace(seconds=999.999) for saved in results(self)]
    )
    settings = {"checkpoint_every_steps": None, "checkpoint_every_s": 1000, "eval_every_steps": 10, "steps": 400}
    with StopSignal() as stop:
        assert train.run(config(**settings), tmp_path, stop) == 0
    reasons = [event["reason"] for event in events(tmp_path, "save")]
    assert "time" in reasons


def test_a_final_save_that_fails_has_code_74_and_the_older_checkpoint_is_named_and_whole(tmp_path, monkeypatch, capfd):
    with StopSignal() as stop, monkeypatch.context() as patch:
        fail_to_save(patch, steps={40})
        assert train.run(config(), tmp_path, stop) == 74
        err = capfd.readouterr().err
        assert "the checkpoint of step 40 could not be saved" in err
        assert "The newest checkpoint is of step 30." in err
        assert events(tmp_path, "exit")[-1]["code"] == 74
        assert events(tmp_path, "exit")[-1]["step"] == 30
    with StopSignal() as stop:
        assert train.run(config(), tmp_path, stop) == 0
    assert events(tmp_path, "resume")[-1]["step"] == 30


def test_a_signal_before_the_processes_know_the_run_tells_of_its_newest_checkpoint(tmp_path, monkeypatch, capfd):
    with StopSignal() as stop:
        assert train.run(config(steps=10), tmp_path, stop) == 0

    def be_stopped(*_, stop, **__):
        stop.request()
        stop.check()

    monkeypatch.setattr(loop, "share_run", be_stopped)
    with StopSignal() as stop:
        assert train.run(config(steps=10, preempted_exit_code=75), tmp_path, stop) == 75
    assert capfd.readouterr().out.splitlines()[-1].startswith("stopped step=10 signal=SIGTERM state_sha256=")
    assert events(tmp_path, "exit")[-1]["outcome"] == "stopped"


def test_a_config_that_was_changed_behind_the_checkpoints_is_refused(tmp_path, capfd):
    with StopSignal() as stop:
        assert train.run(config(steps=10), tmp_path, stop) == 0
        assert train.run(config(steps=10, seed=1, learning_rate=0.5), tmp_path, stop) == 2
    err = capfd.readouterr().err
    assert "seed           0      1" in err
    assert "learning_rate  0.007  0.5" in err


def test_a_refused_config_does_not_take_the_place_of_one_that_was_lost(tmp_path):
    with StopSignal() as stop:
        assert train.run(config(steps=10, seed=1), tmp_path, stop) == 0
        (tmp_path / "config.json").unlink()
        assert train.run(config(steps=10, seed=2), tmp_path, stop) == 2
        assert not (tmp_path / "config.json").exists()
        assert train.run(config(steps=10, seed=1), tmp_path, stop) == 0
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 1


def test_data_that_the_caller_has_begun_to_load_is_waited_for_and_not_loaded_again(tmp_path, monkeypatch):
    dataset = loop.data.load("digits", notify=pytest.fail)
    loading = Future()
    threading.Timer(0.5, loading.set_result, [dataset]).start()
    monkeypatch.setattr(loop.data, "load", pytest.fail)
    with StopSignal() as stop:
        assert train.run(config(steps=10), tmp_path, stop, loading) == 0
    assert events(tmp_path, "save")[-1]["step"] == 10


def test_data_that_cannot_be_loaded_by_the_caller_ends_the_run_with_2_and_the_reason(tmp_path, capfd):
    loading = Future()
    loading.set_exception(loop.data.DataError("the file is damaged"))
    with StopSignal() as stop:
        assert train.run(config(steps=10), tmp_path, stop, loading) == 2
    assert capfd.readouterr().err == "error: the file is damaged\n"


def test_other_data_than_the_run_began_with_is_refused(tmp_path, monkeypatch, capfd):
    with StopSignal() as stop:
        assert train.run(config(steps=10), tmp_path, stop) == 0
        load = loop.data.load

        def load_with_a_changed_pixel(*args, **kwargs):
            dataset = load(*args, **kwargs)
            dataset.train_images[5, 14, 14] ^= 1
            return dataset

        monkeypatch.setattr(loop.data, "load", load_with_a_changed_pixel)
        assert train.run(config(steps=10), tmp_path, stop) == 2
    assert "other data" in capfd.readouterr().err


def test_the_order_of_what_happens_to_a_run_that_is_stopped_and_carried_on(tmp_path, monkeypatch):
    """Record what is dispatched, journalled, evaluated and saved, and compare it whole."""
    happened = []
    spy(monkeypatch, Journal, "record", lambda step, split, **_: happened.append(f"line {split} {step}"))
    spy(monkeypatch, Journal, "sync", lambda: happened.append("sync"))
    for name in ("save",):
        spy(
            monkeypatch,
            Checkpointer,
            name,
            lambda step, *_, metadata, **__: happened.append(f"save {step} {metadata['reason']}"),
        )

    def stop_after_25(self):
        if self.step == 25 and not os.path.exists(tmp_path / "stopped"):
            (tmp_path / "stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)

    spy(monkeypatch, Recorder, "ask_to_save_if_due", stop_after_25, with_self=True)
    # A call may not pass step 25.
    settings = {"steps": 40, "log_every_steps": 5, "eval_every_steps": 20, "checkpoint_every_steps": None}
    for _ in range(2):
        with StopSignal() as stop:
            assert train.run(config(**settings), tmp_path / "run", stop) == 0
    assert happened == [
        "line train 5",
        "line train 10",
        "line train 15",
        "line train 20",
        "line test 20",
        "sync",
        "save 20 best test accuracy so far",
        "line train 25",
        "sync",
        "save 25 signal SIGTERM",
        "line train 30",
        "line train 35",
        "line train 40",
        "line test 40",
        "sync",
        "save 40 best test accuracy so far",
        "sync",
        "save 40 end",
    ]


def spy(monkeypatch, owner, name, look, *, with_self=False) -> None:
    original = getattr(owner, name)

    def looked_at(self, *args, **kwargs):
        look(self) if with_self else look(*args, **kwargs)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, looked_at)


def test_at_most_two_calls_are_in_flight_and_each_is_waited_for_once(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    queue = DispatchQueue(call_s=0.04)
    assert [queue.put(1, name) for name in "abcd"] == [None, "a", "b", "c"]
    assert waited == ["a", "b", "c"]


@pytest.mark.parametrize(("seconds_per_step", "steps_per_call"), [(0.5, 1), (0.01, 4), (1e-5, 4000)])
def test_a_call_makes_as_many_steps_as_fit_into_its_time(monkeypatch, seconds_per_step, steps_per_call):
    now = 0.0
    monkeypatch.setattr(dispatch.time, "monotonic", lambda: now)
    monkeypatch.setattr(jax, "block_until_ready", lambda result: None)
    queue = DispatchQueue(call_s=0.04)
    for _ in range(60):
        n = queue.steps_per_call
        queue.put(n, None)
        now += n * seconds_per_step
    assert queue.steps_per_call == pytest.approx(steps_per_call, rel=0.05)


def test_training_fetches_nothing_from_the_device_but_at_the_end_of_an_interval(tmp_path, monkeypatch):
    """Between two lines of the log no value comes back to the host: no step waits for it."""
    fetched = []
    means = dispatch.means

    def count(sums):
        fetched.append(1)
        with jax.transfer_guard_device_to_host("allow"):
            return means(sums)

    monkeypatch.setattr(dispatch, "means", count)
    settings = {"steps": 60, "log_every_steps": 30, "eval_every_steps": 60, "checkpoint_every_steps": None}
    with StopSignal() as stop:
        assert train.run(config(**settings), tmp_path, stop) == 0
    assert len(fetched) == 3  # two lines of training and one of the test
    assert np.isfinite(events(tmp_path, "evaluation")[0]["loss"])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (12.4, "12s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (90000, "25h00m")]
)
def test_a_length_of_time_is_told_in_its_two_largest_units(seconds, text):
    assert recorder._duration(seconds) == text


def test_the_live_line_of_the_default_run_fits_a_terminal_of_80_columns(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(Terminal, "interval", lambda self, text: lines.append(text))
    with StopSignal() as stop:
        train.run(config(), tmp_path, stop)
    assert len(lines) == 4
    assert max(map(len, lines)) < 80


def test_no_call_goes_past_the_end_of_an_epoch(tmp_path, monkeypatch):
    calls, advance = [], dispatch.Dispatcher.advance

    def watched(self):
        before = self.step
        ended = advance(self)
        calls.append((before, self.step))
        return ended

    monkeypatch.setattr(dispatch, "CALL_S", 1000.0)  # Calls grow as fast as they may.
    monkeypatch.setattr(dispatch.Dispatcher, "advance", watched)
    settings = {"steps": 100, "log_every_steps": 100, "eval_every_steps": 100, "checkpoint_every_steps": None}
    with StopSignal() as stop:
        assert train.run(config(**settings), tmp_path, stop) == 0
    assert {22, 44, 66, 88} <= {end for _, end in calls}


def test_a_run_that_lost_its_end_in_another_epoch_ends_like_an_undisturbed_one(tmp_path, monkeypatch):
    # 22 steps an epoch. It is carried on from step 30, in the second epoch, and evaluated at steps 15 and 30 before.
    settings = {"eval_every_steps": 15}
    with StopSignal() as stop:
        assert train.run(config(**settings), tmp_path / "undisturbed", stop) == 0
        with monkeypatch.context() as patch:
            fail_to_save(patch, steps={40})
            assert train.run(config(**settings), tmp_path / "run", stop) == 74
        assert train.run(config(**settings), tmp_path / "run", stop) == 0
    assert events(tmp_path / "run", "resume")[-1]["step"] == 30
    undisturbed, run = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("undisturbed", "run"))
    assert run == undisturbed
    ends = [events(tmp_path / name, "exit")[-1]["state_sha256"] for name in ("undisturbed", "run")]
    assert ends[0] == ends[1]


def test_each_epoch_has_its_own_order_and_each_interval_its_own_sums(tmp_path, monkeypatch):
    epochs, images = [], []
    compile_ = trainer.Trainer.compile

    def compile_and_watch(self):
        compile_(self)
        order = self.epoch_order

        def epoch_order(epoch):
            epochs.append(int(epoch))
            return order(epoch)

        self.epoch_order = epoch_order

    means = dispatch.means

    def count(sums):
        images.append(int(sums.images))
        return means(sums)

    monkeypatch.setattr(trainer.Trainer, "compile", compile_and_watch)
    monkeypatch.setattr(dispatch, "means", count)
    with StopSignal() as stop:
        assert train.run(config(steps=50, log_every_steps=25, eval_every_steps=50), tmp_path, stop) == 0
    assert epochs == [0, 1, 2]
    assert images[:2] == [25 * 64, 25 * 64]


def test_an_average_is_evaluated_in_the_place_of_the_weights_and_changes_nothing_of_the_training(tmp_path):
    with StopSignal() as stop:
        for decay in (0.0, 0.9):
            assert train.run(config(average_decay=decay), tmp_path / str(decay), stop) == 0
    of_weights, of_average = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("0.0", "0.9")
    )
    for one, other in zip(of_weights, of_average, strict=True):
        assert (one == other) == (one["split"] == "train")


def test_a_checkpoint_of_another_tree_is_told_apart_and_nothing_is_begun_anew(tmp_path, capfd):
    with StopSignal() as stop:
        assert train.run(config(steps=10, average_decay=0.9), tmp_path, stop) == 0
        assert train.run(config(steps=10), tmp_path, stop) == 2
    message = capfd.readouterr().err
    assert "the checkpoint of step 10 holds another tree: leaf average" in message
    assert "If another version of this program wrote it" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["10"]


def test_a_loss_that_is_not_finite_is_no_line_of_the_metrics(tmp_path, capfd):
    with StopSignal() as stop:
        settings = {"learning_rate": 1e30, "checkpoint_every_steps": None}
        assert train.run(config(**settings), tmp_path, stop) == 1
    assert "the loss of the updates up to step" in capfd.readouterr().err
    assert b"NaN" not in (tmp_path / "metrics.jsonl").read_bytes()
    assert not list((tmp_path / "checkpoints").iterdir())


def test_if_no_checkpoint_is_good_the_code_is_65_and_nothing_is_begun_anew(tmp_path, capfd):
    with StopSignal() as stop:
        assert train.run(config(steps=10), tmp_path, stop) == 0
        metrics = (tmp_path / "metrics.jsonl").read_bytes()
        (tmp_path / "checkpoints" / "10" / "manifest.json").write_text("{")
        assert train.run(config(steps=10), tmp_path, stop) == 65
    assert "are corrupt" in capfd.readouterr().err
    assert events(tmp_path, "exit")[-1]["code"] == 65
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_a_bad_checkpoint_is_told_and_the_run_carries_on_from_the_one_before(tmp_path, capfd):
    with StopSignal() as stop:
        assert train.run(config(steps=20), tmp_path, stop) == 0
        sha = events(tmp_path, "exit")[-1]["state_sha256"]
        (tmp_path / "checkpoints" / "20" / "manifest.json").write_text("{")
        assert train.run(config(steps=20), tmp_path, stop) == 0
    refuge = tmp_path / "checkpoints" / "quarantine" / "20-bad-manifest"
    assert "step 20: manifest.json cannot be understood" in (err := capfd.readouterr().err)
    assert f"It was moved to {refuge}" in err
    assert [(event["step"], event["moved_to"]) for event in events(tmp_path, "quarantine")] == [(20, str(refuge))]
    assert [event["lost_steps"] for event in events(tmp_path, "resume")] == [10]
    assert refuge.is_dir()
    assert events(tmp_path, "exit")[-1]["state_sha256"] == sha


def test_checkpoints_that_are_gone_are_an_error_and_no_reason_to_begin_anew(tmp_path, capfd):
    with StopSignal() as stop:
        assert train.run(config(steps=10), tmp_path, stop) == 0
        metrics = (tmp_path / "metrics.jsonl").read_bytes()
        shutil.rmtree(tmp_path / "checkpoints")
        assert train.run(config(steps=10), tmp_path, stop) == 65
    assert "are gone" in capfd.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("change", ["deleted", "edited", "garbage at its head"])
def test_metrics_that_changed_since_the_checkpoint_are_told_of(tmp_path, capfd, change):
    path = tmp_path / "metrics.jsonl"
    with StopSignal() as stop, pytest.MonkeyPatch.context() as patch:
        fail_to_save(patch, steps={40})
        assert train.run(config(), tmp_path, stop) == 74
        assert "metrics.jsonl" not in capfd.readouterr().err
        lines = path.read_bytes()
        if change == "deleted":
            path.unlink()
        elif change == "edited":
            path.write_bytes(lines.replace(b'"step": 10', b'"step": 11', 1))
        else:
            path.write_bytes(b"?\n" + lines)
    with StopSignal() as stop:
        assert train.run(config(), tmp_path, stop) == 0
    assert "metrics.jsonl is not what it was" in capfd.readouterr().err
    assert [event["step"] for event in events(tmp_path, "metrics_changed")] == [30]


def test_a_setting_of_jax_that_changes_the_bits_is_told_of(tmp_path):
    with StopSignal() as stop:
        assert train.run(config(steps=10), tmp_path, stop) == 0
        with jax.threefry_partitionable(False):
            assert train.run(config(steps=10), tmp_path, stop) == 0
    [resume] = events(tmp_path, "resume")
    assert resume["exact"] is False
    assert resume["changed"] == ["settings jax_threefry_partitionable True -> False"]


def test_the_best_checkpoint_is_still_kept_after_a_resume(tmp_path, monkeypatch):
    accuracies = iter([0.5, 0.9, 0.1, 0.1, 0.1, 0.1])
    monkeypatch.setattr(dispatch, "means", lambda sums: (1.0, next(accuracies)))
    settings = {"keep": 1, "log_every_steps": 1000, "eval_every_steps": 10, "steps": 60, "checkpoint_every_steps": None}

    original = Recorder.ask_to_save_if_due

    def save_and_stop(self):
        original(self)
        if self.step == 20 and not (tmp_path / "cut").exists():
            (tmp_path / "cut").touch()
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Recorder, "ask_to_save_if_due", save_and_stop)
    for _ in range(2):
        with StopSignal() as stop:
            assert train.run(config(**settings), tmp_path, stop) == 0
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [20, 60]


def test_how_many_steps_were_lost_is_told(tmp_path, monkeypatch, capfd):
    with StopSignal() as stop:
        with monkeypatch.context() as patch:
            fail_to_save(patch, steps={30, 40})
            assert train.run(config(eval_every_steps=40), tmp_path, stop) == 74
        assert train.run(config(eval_every_steps=40), tmp_path, stop) == 0
        assert "20 steps or more after it are recomputed" in capfd.readouterr().out
        assert train.run(config(eval_every_steps=40), tmp_path, stop) == 0
        assert "recomputed" not in capfd.readouterr().out
    assert [(event["step"], event["lost_steps"]) for event in events(tmp_path, "resume")] == [(20, 20), (40, 0)]


def test_steps_lost_before_the_first_checkpoint_are_told_of(tmp_path, monkeypatch, capfd):
    with StopSignal() as stop:
        with monkeypatch.context() as patch:
            fail_to_save(patch, steps=range(100))
            assert train.run(config(), tmp_path, stop) == 74
        assert "The newest checkpoint is none." in capfd.readouterr().err
        assert train.run(config(), tmp_path, stop) == 0
    assert [(event["step"], event["lost_steps"]) for event in events(tmp_path, "lost")] == [(0, 40)]
    assert "nothing had been saved yet: 40 steps or more are recomputed" in capfd.readouterr().out


def test_lines_that_the_disk_does_not_take_are_kept_and_no_checkpoint_gets_ahead_of_them(tmp_path, monkeypatch, capfd):
    settings = {"log_every_steps": 5, "eval_every_steps": 40}
    with StopSignal() as stop:
        assert train.run(config(**settings), tmp_path / "undisturbed", stop) == 0
    ask_to_save_if_due = Recorder.ask_to_save_if_due

    def fill_and_free(self):
        for file in (self.journal._metrics, self.journal._events, self.journal._scalars):
            if self.step == 5:
                file._file = DiskThatTakesLittle(file._file)
            if self.step == 25 and isinstance(file._file, DiskThatTakesLittle):
                file._file = file._file.file
        ask_to_save_if_due(self)

    monkeypatch.setattr(Recorder, "ask_to_save_if_due", fill_and_free)
    with StopSignal() as stop:
        assert train.run(config(**settings), tmp_path / "run", stop) == 0
    err = capfd.readouterr().err
    assert err.count("lines of the journal cannot be written and are kept for later") == 1
    assert "could not be written are written now" in err
    assert [event["step"] for event in events(tmp_path / "run", "save_failed")] == [10, 20]
    assert events(tmp_path / "run", "save")[0]["step"] == 30
    undisturbed, run = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in ("undisturbed", "run"))
    assert run == undisturbed


class DiskThatTakesLittle:
    """A file on a disk that has room for three more bytes, and then for none."""

    def __init__(self, file):
        self.file, self.room = file, 3

    def write(self, data):
        if not self.room and data:
            raise OSError(28, "No squeue left on device")
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("place", ["a file", "under a file"])
def test_a_place_that_cannot_hold_a_run_is_refused(tmp_path, capfd, place):
    (tmp_path / "file").touch()
    with StopSignal() as stop:
        assert train.run(config(), tmp_path / ("file" if place == "a file" else "file/run"), stop) == 2
    assert "choose another --workdir" in capfd.readouterr().err
