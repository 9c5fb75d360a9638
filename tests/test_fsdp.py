"""`--fsdp N`: the state split over N of 8 devices."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from runs import DIGITS_CONFIG, act_at, compile_once, in_new_process

from mnist_jax import replay
from mnist_jax.checkpoint.checkpoint import Checkpoint
from mnist_jax.checkpoint.integrity import digest_leaves, json_sha256
from mnist_jax.config import Config, ConfigError
from mnist_jax.console import Terminal
from mnist_jax.inference import classifier
from mnist_jax.runtime import devices
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import data
from mnist_jax.training.fit import fit
from mnist_jax.training.model import MODELS, Network
from mnist_jax.training.train_step import TrainData
from mnist_jax.training.trainer import Trainer

EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
CONFIG = Config(**DIGITS_CONFIG, steps=30, average_decay=0.9, log_every_steps=10, fsdp=4)
STOP_AT = 15


def test_longest_divisible_dimension_is_split():
    def spec(*shape: int, fsdp: int = 4) -> P:
        mesh = AbstractMesh((2, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
        return devices.split_over_fsdp(jax.ShapeDtypeStruct(shape, jnp.float32), mesh).spec

    assert spec(3, 3, 8, 32) == P(None, None, None, "fsdp")
    assert spec(800, 64) == P("fsdp")
    assert spec(802, 64) == P(None, "fsdp")  # 802 is longer, but 4 does not divide it.
    assert spec(8, 8) == P("fsdp")
    assert spec(10) == spec(5, 7) == spec() == P()
    assert spec(800, 64, fsdp=1) == P()


def test_n_must_divide_the_devices():
    assert dict(devices.make_mesh(fsdp=1).shape) == {"data": jax.device_count(), "fsdp": 1}
    with pytest.raises(ValueError, match="fsdp=3 does not divide the number of devices, 8; use 1, 2, 4, 8"):
        devices.make_mesh(fsdp=3, devices=jax.devices()[:1] * 8)


# The computation


def train_with(counts: list[int]) -> list[dict[str, Any]]:
    """Return what a few updates with each N make of the state, in a process with 8 devices."""
    digits = data.load("digits", notify=print)
    MODELS["tiny"] = Network(features=(4,), kernel_sizes=(5,), hidden=16, batch_norm=True)
    found = []
    for count in counts:
        config = dataclasses.replace(CONFIG, model="tiny", fsdp=count)
        sizes = {"train_size": len(digits.train_labels), "test_size": len(digits.test_labels)}
        trainer = Trainer(config, devices.make_mesh(fsdp=count), **sizes)
        *training, images, labels = trainer.put(digits)
        state = trainer.init_state()
        digests = [json_sha256(digest_leaves(state))]
        state, sums = trainer.train_steps(state, TrainData(*training, trainer.epoch_order(0)), np.int32(5))
        digests.append(json_sha256(digest_leaves(state.replace(average=None))))
        leaves, abstract = jax.tree.leaves(state), jax.tree.leaves(trainer.abstract_state)
        evaluation, _ = trainer.evaluate(state.eval_variables, images, labels, np.int32(0))
        mean = state.opt_state[0].mu["dense1"]["kernel"]
        nan = np.zeros(mean.shape, np.float32)
        nan[-1] = np.nan  # on the last of N devices
        corrupt = [jax.device_put(nan, leaf.sharding) if leaf is mean else leaf for leaf in leaves]
        found.append(
            {
                "digests": digests,
                "losses": [float(sums.loss), float(evaluation.loss)],
                "messages": re.findall(r" (all-\w+|reduce-scatter|collective-\w+)\(", trainer.train_steps.as_text()),
                "vectors": re.findall(r"= (f32\[\d+\])\S* all-reduce\(", trainer.train_steps.as_text()),
                "params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
                "split variables": sum(
                    not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.variables)
                ),
                "as declared": [leaf.sharding for leaf in leaves] == [leaf.sharding for leaf in abstract],
                "bytes": [sum(leaf.addressable_shards[i].data.nbytes for leaf in leaves[:-4]) for i in range(8)],
                "finite": [
                    bool(trainer.is_finite(jax.tree.unflatten(jax.tree.structure(state), values)))
                    for values in (leaves, corrupt)
                ],
            }
        )
    return found


@pytest.fixture(scope="module")
def trained() -> list[dict[str, Any]]:
    return in_new_process(train_with, [1, 4], **EIGHT)


def test_split_state_is_trained_like_a_replicated_one(trained):
    whole, split = trained
    assert split["digests"] == whole["digests"]
    assert whole["digests"][0] != whole["digests"][1]
    np.testing.assert_allclose(split["losses"], whole["losses"], rtol=1e-5)


def test_devices_exchange_one_array_of_gradients_and_the_statistics_of_the_batch(trained):
    whole, split = trained
    # The gradients; statistics and their gradients of two normalizations; the correct predictions of a call.
    assert whole["messages"] == ["all-reduce"] * (1 + 2 * 2 + 1)
    assert whole["vectors"] == split["vectors"] == [f"f32[{whole['params'] + 1}]"]  # the gradients and the loss
    assert split["messages"].count("all-gather") == split["split variables"] > 5
    assert [name for name in split["messages"] if name != "all-gather"] == whole["messages"]


def test_each_device_holds_its_part(trained):
    whole, split = trained
    assert whole["as declared"]
    assert split["as declared"]
    assert len(set(split["bytes"])) == len(set(whole["bytes"])) == 1
    assert split["bytes"][0] < 1.05 * whole["bytes"][0] / 4


def test_every_part_is_checked_for_finite_numbers(trained):
    assert [found["finite"] for found in trained] == [[True, False]] * 2


# Runs


def stop_and_resume(folder: str) -> dict[str, Any]:
    """Make a run, one that is stopped and resumed, and one that resumes with another N; 8 devices."""
    Trainer.compile = compile_once(Trainer.compile)
    whole = fit(CONFIG, workdir=f"{folder}/whole")
    stop = StopSignal(exit_at_second=False)
    with pytest.MonkeyPatch.context() as patch:
        act_at(patch, STOP_AT, stop.request)
        stopped = fit(CONFIG, workdir=f"{folder}/4", stop=stop)
    shutil.copytree(f"{folder}/4", f"{folder}/8")
    resumed = fit(CONFIG, workdir=f"{folder}/4")
    stop = StopSignal(exit_at_second=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "compile", lambda _: stop.request())  # It takes long, and nothing is to be trained.
        elastic = fit(dataclasses.replace(CONFIG, fsdp=8), workdir=f"{folder}/8", stop=stop)
    checkpoint = Checkpoint(Path(folder, "4", "checkpoints", str(stopped.step)))
    restored = []
    for count in (1, 2, 4, 8):
        sizes = {"train_size": 1438, "test_size": 359}
        like = Trainer(CONFIG, devices.make_mesh(fsdp=count), **sizes).abstract_state
        restored.append(json_sha256(digest_leaves(checkpoint.read(like)[0])))
    with StopSignal() as signals:
        options = replay.Options(Path(folder, "whole"), first=0)
        differences = replay.replay(options, signals, Terminal())
    return {
        "stopped": [stopped.is_stopped, stopped.step, stopped.state_sha256],
        "whole": [whole.state_sha256, whole.metrics],
        "resumed": [resumed.state_sha256, resumed.metrics],
        "elastic": [elastic.step, elastic.state_sha256],
        "restored": restored,
        "replayed": differences,
    }


@pytest.fixture(scope="module")
def attempts(tmp_path_factory, environment) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("attempts")
    return folder, in_new_process(stop_and_resume, str(folder), **environment, **EIGHT)


def resumes(folder: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == "resume"]


def test_resume_with_the_same_n_is_exact(attempts):
    folder, found = attempts
    assert found["stopped"][:2] == [True, STOP_AT]
    assert found["resumed"] == found["whole"]
    assert [resume["exact"] for resume in resumes(folder / "4")] == [True]


def test_every_n_restores_the_saved_state(attempts):
    folder, found = attempts
    assert set(found["restored"]) == {found["stopped"][2]}
    [resume] = resumes(folder / "8")
    assert (resume["step"], resume["changed"]) == (STOP_AT, ["devices fsdp 4 -> 8"])
    assert found["elastic"] == found["stopped"][1:]


def test_other_commands_read_a_split_run(attempts):
    folder, found = attempts
    assert found["replayed"] == []  # on 8 devices
    with StopSignal() as stop:
        states = replay.read_states(replay.Options(folder / "8"), stop, Terminal())
        model = classifier.load(folder / "whole")
        accuracy = model.evaluate(states.dataset, stop).accuracy
    # This process has one device.
    assert (states.metadata["config"]["fsdp"], states.trainer.config.fsdp) == (4, 1)
    assert accuracy == found["whole"][1][-1]["accuracy"]


def test_run_with_a_wrong_n_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="fsdp=4 does not divide the number of devices, 1; use 1"):
        fit(CONFIG, workdir=tmp_path / "run")
