"""Replay says that a part of a run is identical, or which leaf differs."""

import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from runs import DIGITS_CONFIG, act_at, signal_here, snapshot, train_here
from tampering import largest_file

from mnist_jax import replay
from mnist_jax.checkpoint.checkpoint import Checkpoint
from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.config import Config
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import data, setup
from mnist_jax.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("in_this_process")

# 22 steps an epoch. The signal arrives in the middle of a log interval.
CONFIG = Config(
    **DIGITS_CONFIG,
    steps=40,
    average_decay=0.9,
    log_every_steps=10,
    checkpoint_every_steps=10,
    keep=9,
)
STOPPED_AT = 25


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that was stopped once and resumed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    for start in range(2):
        with StopSignal() as stop, pytest.MonkeyPatch.context() as patch:
            if start == 0:
                act_at(patch, STOPPED_AT, signal_here)
            assert train_here(CONFIG, workdir, stop) == 0
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert sorted(steps) == [10, 20, 22, STOPPED_AT, 30, 40]
    return workdir


@pytest.fixture
def run_copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def run(workdir: Path, *args: object, capsys) -> tuple[int, str, str]:
    return replay.main([str(workdir), *map(str, args)]), *capsys.readouterr()


def change(workdir: Path, step: int, layer: str, new) -> None:
    """Save another bias in a checkpoint, with correct digests."""
    like = setup.make_trainer(CONFIG, data.load("digits", notify=print)).abstract_state
    state, metadata = Checkpoint(workdir / "checkpoints" / str(step)).read(like)
    params = {**state.params, layer: {**state.params[layer], "bias": new(state.params[layer]["bias"])}}
    shutil.rmtree(workdir / "checkpoints" / str(step))
    checkpointer = Checkpointer(workdir / "checkpoints", keep=9)
    checkpointer.save(step, state.replace(params=params), metadata=metadata, wait=True)
    checkpointer.close()


@pytest.mark.parametrize(
    ("args", "first", "last"), [((), 10, 40), (("--from", 0), 0, 40), (("--to", STOPPED_AT), 10, STOPPED_AT)]
)
def test_replay_is_identical(finished, capsys, args, first, last):
    before = snapshot(finished)
    code, out, err = run(finished, *args, capsys=capsys)
    assert (code, err) == (0, "")
    assert f"from step {first} to step {last} " in out
    assert out.endswith("\nidentical\n")
    assert snapshot(finished) == before


def test_different_leaf_is_named(run_copy, capsys):
    change(run_copy, 40, "dense1", lambda bias: bias.at[np.array([3, 5, 8])].add(np.float32([1, -2.5, 0.5])))
    code, out, _ = run(run_copy, "--from", 30, capsys=capsys)
    assert code == 1
    assert out.partition("\n")[2] == (
        "not identical:\n  leaf params.dense1.bias differs in 3 of 32 values, by 2.5 at most\n"
    )
    assert run(run_copy, "--from", 20, "--to", 30, capsys=capsys)[0] == 0


def test_different_start_changes_all_parameters(run_copy, capsys):
    change(run_copy, 30, "logits", lambda bias: bias.at[0].add(0.01))
    code, out, _ = run(run_copy, "--from", 30, capsys=capsys)
    assert code == 1
    assert "leaf params.logits.bias differs" in out
    assert "leaf params.conv1.kernel differs" in out
    assert "leaf step " not in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--from", 15), "no checkpoint of step 15; there are: 10, 20, 22, 25, 30, 40"),
        (("--to", 41), "no checkpoint of step 41"),
        (("--from", 30, "--to", 20), "from=30 is not before to=20"),
        (("--from", 0, "--to", 0), "from=0 is not before to=0"),
    ],
)
def test_unusable_steps_are_usage_errors(finished, capsys, args, words):
    code, out, err = run(finished, *args, capsys=capsys)
    assert (code, out) == (2, "")
    assert words in err


def test_missing_run_is_usage_error(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    for workdir in (tmp_path / "nothing", tmp_path):
        code, out, err = run(workdir, capsys=capsys)
        assert (code, out) == (2, "")
        assert str(workdir) in err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(("step", "name"), [(30, "manifest.json"), (40, "")])
def test_corrupt_checkpoint_exits_65(run_copy, capsys, step, name):
    directory = run_copy / "checkpoints" / str(step)
    path = directory / name if name else largest_file(directory)
    path.write_bytes(path.read_bytes()[:-50])
    before = snapshot(run_copy)
    code, _, err = run(run_copy, "--from", 30, capsys=capsys)
    assert code == 65
    assert f"step {step} is corrupt: " in err
    assert path.name in err
    assert snapshot(run_copy) == before


@pytest.mark.parametrize(
    ("args", "code", "words"), [((), 0, "from step 20 to step 40 again"), (("--from", 10), 2, "--keep")]
)
def test_checkpoint_that_the_training_removes_is_replaced(run_copy, monkeypatch, capsys, args, code, words):
    read = Checkpoint.read

    def remove_and_read(checkpoint, like):
        shutil.rmtree(run_copy / "checkpoints" / "10", ignore_errors=True)
        return read(checkpoint, like)

    monkeypatch.setattr(Checkpoint, "read", remove_and_read)
    found, out, err = run(run_copy, *args, capsys=capsys)
    assert found == code
    assert words in out + err
    assert code == 0 or "removed the checkpoint of step 10; use one of 20, 22, 25, 30, 40" in err


def test_other_data_is_usage_error(finished, monkeypatch, capsys):
    load = data.load

    def load_with_a_changed_pixel(*args, **kwargs):
        dataset = load(*args, **kwargs)
        dataset.train_images[5, 14, 14] ^= 1
        return dataset

    monkeypatch.setattr(replay.data, "load", load_with_a_changed_pixel)
    assert run(finished, capsys=capsys)[0] == 2


def test_changed_software_is_a_warning(finished, monkeypatch, capsys):
    describe = replay.compatibility.describe_environment

    def describe_another(**options):
        environment = describe(**options)
        return {**environment, "software": {**environment["software"], "jax": "0.0.1"}}

    monkeypatch.setattr(replay.compatibility, "describe_environment", describe_another)
    code, out, err = run(finished, "--from", 30, capsys=capsys)
    assert (code, out.splitlines()[-1]) == (0, "identical")
    assert "software jax " in err
    assert "0.0.1" in err


def test_signal_stops_replay_between_calls(finished, monkeypatch, capsys):
    advance, steps = Trainer.advance, []

    def advance_and_signal(self, state, data, *, step: int, n: int):
        steps.append(step)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self, state, data, step=step, n=n)

    monkeypatch.setattr(Trainer, "advance", advance_and_signal)
    assert run(finished, "--from", 0, capsys=capsys)[0] == 128 + signal.SIGINT
    assert steps == [0, 10]


def test_signal_during_compile_exits_at_once(finished, monkeypatch, capsys):
    ended, waited = threading.Event(), []

    def signal_and_compile(self):
        os.kill(os.getpid(), signal.SIGTERM)
        waited.append(ended.wait(20))  # as if it took so long

    monkeypatch.setattr(Trainer, "compile", signal_and_compile)
    code, out, err = run(finished, "--from", "0", capsys=capsys)
    assert (code, out, waited) == (143, "", [])
    ended.set()
    assert err.count("\n") == 1
