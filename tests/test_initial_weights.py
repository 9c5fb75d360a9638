"""`--init-from`: a new run begins with the weights of another run, and is as exact as any run."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from runs import DIGITS, SMALL, Run, act_at, signal_here
from several import start as start_several
from tampering import flip_bit, largest_file, read_metadata

import mnist_jax
from mnist_jax import config as configs
from mnist_jax import replay, train
from mnist_jax.checkpoint.checkpoint import Checkpoint
from mnist_jax.checkpoint.integrity import host_leaves
from mnist_jax.config import Config, ConfigError
from mnist_jax.report import __main__ as report
from mnist_jax.training import setup
from mnist_jax.training.data import load
from mnist_jax.training.recorder import Recorder

pytestmark = pytest.mark.usefixtures("in_this_process")

FLAGS = SMALL  # The weights of `small_run` are averaged. Its best checkpoint is that of step 40 or 20.


def start(workdir: Path, *args: object) -> int:
    return train.main(["--workdir", str(workdir), *map(str, args)])


def result(workdir: Path) -> tuple[str, bytes]:
    exited = Run(workdir).events("exit")[-1]
    assert exited["outcome"] == "finished"
    return exited["state_sha256"], Run(workdir).metrics()


def weights(workdir: Path, step: int) -> dict[str, str]:
    """Return the SHA-256 of params and batch statistics in a checkpoint, by leaf."""
    table = Checkpoint(workdir / "checkpoints" / str(step)).manifest()["leaves"]
    return {name: row["sha256"] for name, row in table.items() if name.startswith(("params.", "batch_stats."))}


def leaves(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Return the state in a checkpoint, by leaf."""
    trainer = setup.make_trainer(configs.load(workdir / "config.json"), load("digits", notify=print))
    return host_leaves(Checkpoint(workdir / "checkpoints" / str(step)).read(trainer.abstract_state)[0])


@pytest.fixture(scope="module")
def child(small_run, in_this_process, tmp_path_factory) -> Path:
    """An uninterrupted run from the weights of step 20 of another run."""
    workdir = tmp_path_factory.mktemp("child") / "run"
    assert start(workdir, *FLAGS, "--init-from", f"{small_run.workdir}@20") == 0
    return workdir


def test_step_0_has_the_weights_of_the_parent_and_a_fresh_optimizer(child, small_run):
    assert weights(child, 0) == weights(small_run.workdir, 20)
    state = leaves(child, 0)
    assert (int(state["step"]), int(state["metrics.images"])) == (0, 0)
    assert not any(values.any() for name, values in state.items() if name.startswith("opt_state"))
    for name, values in state.items():
        if name.startswith("average.params."):  # The moving average begins with the params.
            np.testing.assert_array_equal(values, state[name.removeprefix("average.")])
    assert result(child)[0] != small_run.events("exit")[-1]["state_sha256"]


def test_parent_is_recorded_in_config_and_checkpoints(child, small_run):
    assert configs.load(child / "config.json").init_from == Path(f"{small_run.workdir}@20")
    sha256 = Checkpoint(small_run.workdir / "checkpoints" / "20").manifest()["state_sha256"]
    parent = {"run": str(small_run.workdir), "step": 20, "state_sha256": sha256}
    assert [read_metadata(child / "checkpoints" / str(step))["parent"] for step in (0, 40)] == [parent, parent]
    shown = report.describe_run(child)["Initial weights"]
    assert shown == f"step 20 of {small_run.workdir}, SHA-256 {sha256}"


def test_stopped_run_without_its_parent_resumes_exactly(child, small_copy, tmp_path, monkeypatch, capsys):
    run, args = tmp_path / "child", (*FLAGS, "--init-from", f"{small_copy}@20")
    with monkeypatch.context() as patch:
        act_at(patch, 5, signal_here)
        assert start(run, *args) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("stopped step=5 ")
    shutil.rmtree(run / "checkpoints" / "5")  # Only the checkpoint of step 0 is left.
    shutil.rmtree(small_copy)
    assert start(run, *args) == 0
    assert "resumed cnn-tiny on digits from step 0 of 40 (saved because: initial weights" in capsys.readouterr().out
    assert result(run) == result(child)
    assert [event["exact"] for event in Run(run).events("resume")] == [True]
    assert read_metadata(run / "checkpoints" / "40")["parent"]["run"] == str(small_copy)


def test_stop_before_the_first_save_needs_the_parent_again(child, small_copy, tmp_path, monkeypatch, capsys):
    run, log_phase = tmp_path / "child", Recorder.log_phase

    def log_and_signal(self, name, step):
        log_phase(self, name, step)
        if name == "compile":
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "log_phase", log_and_signal)
        assert start(run, *FLAGS, "--init-from", f"{small_copy}@20") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "stopped step=0 signal=SIGTERM state_sha256=none"
    moved = small_copy.rename(small_copy.with_name("moved"))
    assert start(run) == 2
    assert f"there is no run in {small_copy}" in capsys.readouterr().err
    moved.rename(small_copy)
    assert start(run) == 0
    assert result(run) == result(child)


def test_best_and_latest_are_chosen_by_name():
    assert configs.split_init_from(Path("/a@b/run@best")) == (Path("/a@b/run"), "best")
    assert configs.split_init_from(Path("runs/x@702")) == (Path("runs/x"), 702)
    for plain in ("runs/x", "runs/x@y", "@best", "runs@x/y"):
        assert configs.split_init_from(Path(plain)) == (Path(plain), "latest")


@pytest.mark.parametrize(
    ("which", "words"),
    [("@15", "no checkpoint of step 15; there are: 10, 20, 30, 40"), ("@bets", "no run in"), ("/none", "no run in")],
)
def test_missing_parent_is_usage_error(small_run, tmp_path, capsys, which, words):
    assert start(tmp_path / "child", *FLAGS, "--init-from", f"{small_run.workdir}{which}") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"init_from={small_run.workdir}{which}: " in err
    assert words in err
    assert [path.name for path in (tmp_path / "child").iterdir()] == ["lock"]


def test_corrupt_parent_is_usage_error(small_copy, tmp_path, capsys):
    flip_bit(largest_file(small_copy / "checkpoints" / "40"))
    assert start(tmp_path / "child", *FLAGS, "--init-from", small_copy) == 2
    err = capsys.readouterr().err
    assert "step 40 is corrupt: file" in err
    assert "RUN@STEP" in err
    assert not Run(tmp_path / "child").steps()


def test_another_model_is_refused_by_leaf_and_shape(small_run, tmp_path, capsys):
    assert start(tmp_path, *FLAGS, "--model", "cnn-large", "--init-from", small_run.workdir) == 2
    err = capsys.readouterr().err
    assert "leaf params.conv1.kernel should be [5, 5, 1, 32] float32 and is [5, 5, 1, 8] float32" in err
    assert "--model cnn" in err
    assert not Run(tmp_path).steps()


def test_another_parent_contradicts_the_run(child, small_run, capsys):
    assert start(child, "--init-from", f"{small_run.workdir}@30") == 2
    assert "init_from" in capsys.readouterr().err


def test_finished_run_continues_as_a_new_run(small_copy, capsys):
    config = configs.load(small_copy / "config.json")
    configs.save(Config(**{**vars(config), "schedule": "linear"}), small_copy / "config.json")
    assert start(small_copy, "--steps", "80") == 2
    assert f"--init-from {small_copy} --workdir DIR" in capsys.readouterr().err
    assert start(small_copy, "--seed", "80") == 2
    assert "--init-from" not in capsys.readouterr().err


def test_fresh_run_begins_with_the_run_that_it_moves_aside(child, small_copy, capsys):
    assert start(small_copy, *FLAGS, "--fresh", "--init-from", f"{small_copy}@15") == 2
    assert not small_copy.with_name("run.old-1").exists()  # Nothing is moved for a run that cannot begin.
    assert start(small_copy, *FLAGS, "--fresh", "--init-from", f"{small_copy}@20") == 0
    moved = small_copy.with_name("run.old-1")
    assert configs.load(small_copy / "config.json").init_from == Path(f"{moved}@20")
    assert result(small_copy) == result(child)


def test_fit_takes_it_as_a_field(child, small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(small_run.workdir.parent)
    config = configs.load(child / "config.json")
    relative = Config(**{**vars(config), "init_from": f"{small_run.workdir.name}@20"})
    assert mnist_jax.fit(relative, workdir=tmp_path).state_sha256 == result(child)[0]
    assert mnist_jax.fit(relative, workdir=tmp_path).state_sha256 == result(child)[0]
    with pytest.raises(ConfigError, match="init_from"):
        mnist_jax.fit(Config(**{**vars(config), "init_from": None}), workdir=tmp_path)


def test_replay_needs_the_saved_step_0(child, tmp_path, capsys):
    assert replay.main([str(child), "--from", "0", "--to", "20"]) == 0
    run = Path(shutil.copytree(child, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "0")
    assert replay.main([str(run), "--from", "0", "--to", "20"]) == 2
    assert "init_from" in capsys.readouterr().err
    assert replay.main([str(run), "--from", "10", "--to", "20"]) == 0


def test_several_processes_begin_with_the_same_weights(small_run, new_run):
    run = new_run()
    flags = (*DIGITS, "--steps", "10", "--log-every-steps", "10", "--init-from", f"{small_run.workdir}@20")
    ended = start_several(run, *flags).end()
    assert [one.code for one in ended] == [0, 0], "".join(one.err for one in ended)
    assert weights(run.workdir, 0) == weights(small_run.workdir, 20)
    assert run.steps() == [0, 10]
