"""The proof of exactness: that it holds where the states are the same, and tells where they are not."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import snapshot
from tampering import write_format_3, write_manifest

from mnist_jax import replay, train
from mnist_jax.checkpoint.checkpoint import Checkpoint
from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.checkpoint.integrity import digest_leaves
from mnist_jax.config import Config
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import data, setup
from mnist_jax.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("in_this_process")

# 22 steps an epoch. The signal comes in the middle of an interval of the log.
CONFIG = Config(dataset="digits", steps=40, batch_size=64, log_every_steps=10, checkpoint_every_steps=10, keep=9)
STOPPED_AT = 25


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that was stopped once and carried on to its end."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    for start in range(2):
        with StopSignal() as stop, pytest.MonkeyPatch.context() as patch:
            if start == 0:
                stop_at(patch, STOPPED_AT)
            assert train.run(CONFIG, workdir, stop) == 0
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert sorted(steps) == [10, 20, 22, STOPPED_AT, 30, 40]
    return workdir


def stop_at(patch: pytest.MonkeyPatch, end: int) -> None:
    """Have a call end at a step, and a signal come there."""
    next_boundary, advance = Trainer.next_boundary, Trainer.advance

    def advance_and_signal(self, state, data, *, step: int, n: int):
        result = advance(self, state, data, step=step, n=n)
        if step + n == end:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    def boundary(self, step: int) -> int:
        return min(next_boundary(self, step), end if step < end else self.total_steps)

    patch.setattr(Trainer, "next_boundary", boundary)
    patch.setattr(Trainer, "advance", advance_and_signal)


@pytest.fixture
def run_in(finished, tmp_path):
    """A copy of that run, to be changed."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def replayed(workdir: Path, *args: object, capsys) -> tuple[int, str, str]:
    code = replay.main([str(workdir), *map(str, args)])
    return code, *capsys.readouterr()


def change(workdir: Path, step: int, leaf: str, new) -> None:
    """Save another value of a leaf in a checkpoint of the same step, whose digests fit."""
    dataset = data.load("digits", notify=print)
    like = setup.make_trainer(CONFIG, dataset).abstract_state
    state, metadata = Checkpoint(workdir / "checkpoints" / str(step)).read(like)
    part, _, path = leaf.partition(".")
    assert part == "params"
    layer, name = path.split(".")
    params = {**state.params, layer: {**state.params[layer], name: new(state.params[layer][name])}}
    shutil.rmtree(workdir / "checkpoints" / str(step))
    store = Checkpointer(workdir / "checkpoints", keep=9)
    store.save(step, state.replace(params=params), metadata=metadata, wait=True)
    store.close()


@pytest.mark.parametrize(
    ("args", "first", "last"),
    [
        ((), 10, 40),
        (("--from", 0), 0, 40),
        (("--from", 0, "--to", 10), 0, 10),
        (("--from", STOPPED_AT), STOPPED_AT, 40),
        (("--to", STOPPED_AT), 10, STOPPED_AT),
    ],
)
def test_each_stretch_of_a_run_is_identical_when_it_is_trained_again(finished, capsys, args, first, last):
    code, out, err = replayed(finished, *args, capsys=capsys)
    assert (code, err) == (0, "")
    assert out == f"training from step {first} to step {last} again\nidentical\n"


def test_it_writes_nothing_in_the_run_directory(finished, capsys):
    before = snapshot(finished)
    assert replayed(finished, "--from", 30, capsys=capsys)[0] == 0
    assert replayed(finished, "--from", 31, capsys=capsys)[0] == 2
    assert snapshot(finished) == before


def test_a_leaf_that_differs_is_named_with_how_many_values_and_by_how_much(run_in, capsys):
    change(run_in, 40, "params.dense1.bias", lambda leaf: leaf.at[np.array([3, 5, 8])].add(np.float32([1, -2.5, 0.5])))
    assert replayed(run_in, "--from", 30, capsys=capsys)[:2] == (
        1,
        "training from step 30 to step 40 again\n"
        "not identical:\n"
        "  leaf params.dense1.bias differs in 3 of 64 values, by 2.5 at most\n",
    )
    assert replayed(run_in, "--from", 20, "--to", 30, capsys=capsys)[0] == 0


def test_a_value_that_differs_at_the_beginning_has_changed_others_at_the_end(run_in, capsys):
    change(run_in, 30, "params.logits.bias", lambda leaf: leaf.at[0].add(0.01))
    code, out, _ = replayed(run_in, "--from", 30, capsys=capsys)
    assert code == 1
    assert "\n  leaf params.logits.bias differs in " in out
    assert "\n  leaf params.conv1.kernel differs in " in out
    assert "leaf step " not in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--from", 15), "has no checkpoint of step 15; there are: 10, 20, 22, 25, 30, 40"),
        (("--to", 41), "has no checkpoint of step 41"),
        (("--from", -1), "has no checkpoint of step -1"),
        (("--from", 30, "--to", 20), "from=30 is not before to=20"),
        (("--from", 30, "--to", 30), "from=30 is not before to=30"),
        (("--from", 0, "--to", 0), "from=0 is not before to=0"),
    ],
)
def test_steps_that_are_no_stretch_are_refused_with_2(finished, capsys, args, words):
    code, out, err = replayed(finished, *args, capsys=capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err


@pytest.mark.parametrize("there_is", ["nothing", "an empty directory", "a file", "a config alone"])
def test_where_there_is_no_run_the_code_is_2(tmp_path, capsys, there_is):
    workdir = tmp_path / "run"
    if there_is == "a file":
        workdir.touch()
    elif there_is != "nothing":
        workdir.mkdir()
        if there_is == "a config alone":
            (workdir / "config.json").write_text("{}")
    before = snapshot(tmp_path)
    code, out, err = replayed(workdir, capsys=capsys)
    assert (code, out) == (2, "")
    assert str(workdir) in err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("step", [30, 40])
@pytest.mark.parametrize("damage", ["manifest", "leaves"])
def test_a_damaged_checkpoint_is_told_with_65(run_in, capsys, step, damage):
    directory = run_in / "checkpoints" / str(step)
    files = [path for path in directory.rglob("*") if path.is_file()]
    path = directory / "manifest.json" if damage == "manifest" else max(files, key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-50])
    before = snapshot(run_in)
    code, _, err = replayed(run_in, "--from", 30, capsys=capsys)
    assert code == 65
    assert f"error: a checkpoint is corrupt, step {step}: " in err
    assert path.name in err
    assert snapshot(run_in) == before  # It is not for the replay to set it aside.


def test_a_checkpoint_of_another_format_is_refused_with_2(run_in, capsys):
    write_manifest(run_in / "checkpoints" / "40", {"format": 2, "step": 40})
    code, _, err = replayed(run_in, capsys=capsys)
    assert code == 2
    assert "step 40 has format 2, and this version reads format 4" in err
    shutil.rmtree(run_in / "checkpoints" / "40")
    write_format_3(run_in / "checkpoints", 40)
    code, _, err = replayed(run_in, capsys=capsys)
    assert code == 2
    assert "step 40 has format 3, and this version reads format 4" in err


def test_other_data_is_refused_with_2(run_in, monkeypatch, capsys):
    load = data.load

    def load_with_a_changed_pixel(*args, **kwargs):
        dataset = load(*args, **kwargs)
        dataset.train_images[5, 14, 14] ^= 1
        return dataset

    monkeypatch.setattr(replay.data, "load", load_with_a_changed_pixel)
    code, _, err = replayed(run_in, capsys=capsys)
    assert code == 2
    assert "other data" in err


def test_what_changed_since_is_told_before_the_comparison(run_in, monkeypatch, capsys):
    describe = replay.compatibility.describe_environment

    def describe_another():
        environment = describe()
        return {**environment, "software": {**environment["software"], "jax": "0.0.1"}}

    monkeypatch.setattr(replay.compatibility, "describe_environment", describe_another)
    code, out, err = replayed(run_in, "--from", 30, capsys=capsys)
    assert (code, out.splitlines()[-1]) == (0, "identical")
    assert "warning: the bits may differ because this changed: software jax " in err
    assert err.endswith("-> 0.0.1\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_trains_ends_it_with_128_and_its_number(finished, monkeypatch, capsys, number):
    advance, steps = Trainer.advance, []

    def advance_and_signal(self, state, data, *, step: int, n: int):
        steps.append(step)
        result = advance(self, state, data, step=step, n=n)
        if len(steps) == 2:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(Trainer, "advance", advance_and_signal)
    before = snapshot(finished)
    code, _, err = replayed(finished, "--from", 0, capsys=capsys)
    assert code == 128 + number
    assert err == f"{number.name}: stopped before the end\n"
    assert steps == [0, 10]  # No call was made after it.
    assert snapshot(finished) == before


IN_COMPILE = """
import runpy, sys
from mnist_jax.training.trainer import Trainer
compile_ = Trainer.compile
def compile_and_tell(self):
    print("compiling", file=sys.stderr, flush=True)
    return compile_(self)
Trainer.compile = compile_and_tell
runpy.run_module("mnist_jax.replay", run_name="__main__")
"""


def test_a_signal_while_it_compiles_ends_the_process_with_143_and_without_a_crash(finished, environment, tmp_path):
    # An empty cache makes the compilation last for seconds: it is left, not waited for.
    process = subprocess.Popen(
        [sys.executable, "-c", IN_COMPILE, str(finished), "--from", "0"],
        env={**os.environ, **environment, "XDG_CACHE_HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr.readline() == "compiling\n"
    cache = tmp_path / "mnist_jax"
    while process.poll() is None and not any(cache.glob("*")):  # The first program is made, and others are not.
        pass
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (143, "", "SIGTERM: stopped before the end\n")


def test_the_end_of_a_replay_is_the_very_state_that_the_run_ended_in(finished, monkeypatch, capsys):
    """The comparison compares what it says: the leaves of the newest checkpoint and those of the state made anew."""
    compared = []
    compare = replay.compare

    def watched(wanted, found):
        compared.append((wanted, found))
        return compare(wanted, found)

    monkeypatch.setattr(replay, "compare", watched)
    assert replayed(finished, "--from", 0, capsys=capsys)[0] == 0
    [(wanted, found)] = compared
    manifest = Checkpoint(finished / "checkpoints" / "40").manifest()
    assert digest_leaves(wanted) == digest_leaves(found) == manifest["leaves"]
    pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True)
    assert all(before is not after for before, after in pairs)
