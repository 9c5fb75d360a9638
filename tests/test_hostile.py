"""A run directory is data from somewhere: what lies in it may be refused, and is never obeyed.

Nothing in it is executed, nothing that it leads to is written, and whoever looks at it gets an error and no traceback.
"""

import contextlib
import gc
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import Run, snapshot
from tampering import (
    change_manifest,
    read_hashes,
    read_manifest,
    read_metadata,
    update_files,
    write_file,
    write_format_3,
    write_hashes,
    write_manifest,
    write_metadata,
)

from mnist_jax import evaluate, replay, status, train
from mnist_jax.checkpoint import integrity
from mnist_jax.checkpoint.checkpoint import Checkpoint
from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.checkpoint.integrity import CorruptCheckpointError, IncompatibleCheckpointError, ReadError
from mnist_jax.config import Config
from mnist_jax.records.metrics import Journal, read_events
from mnist_jax.report import __main__ as report
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import data

pytestmark = [
    pytest.mark.usefixtures("in_this_process"),
    pytest.mark.timeout(60),  # A pipe that is opened is waited for without end.
    # Where one leaf cannot be read, Orbax abandons its coroutines for the others, and Python says so when they go.
    pytest.mark.filterwarnings("ignore:.*coroutine object _read_array:pytest.PytestUnraisableExceptionWarning"),
]

CONFIG = Config(dataset="digits", steps=40, batch_size=64, log_every_steps=10, checkpoint_every_steps=10)
START = ("--dataset", "digits", "--lock-wait-s", "0")


@pytest.fixture(scope="module", autouse=True)
def digits_are_loaded_once():
    load, digits = data.load, data.load("digits", notify=print)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            data,
            "load",
            lambda name, data_dir=None, *, notify: (
                digits if (name, data_dir) == ("digits", None) else load(name, data_dir, notify=notify)
            ),
        )
        yield


@pytest.fixture(scope="module", autouse=True)
def abandoned_coroutines_go_here():
    yield
    gc.collect()  # Later, outside this file, their warning would be an error.


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that nothing disturbed, with checkpoints 22, 30 and 40."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with StopSignal() as stop:
        assert train.run(CONFIG, workdir, stop) == 0
    (workdir / "lock").touch()
    return workdir


@pytest.fixture
def run_in(finished, tmp_path):
    """A copy of that run, to be changed."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def outside(tmp_path):
    """A place that no run directory has a say in; at the end of the test it is as it was."""
    directory = tmp_path / "outside"
    directory.mkdir()
    (directory / "file").write_text("precious")
    (directory / "directory").mkdir()
    (directory / "directory" / "file").write_text("precious as well")
    before = snapshot(directory)
    yield directory
    found = snapshot(directory)
    assert {path: found.get(path) for path in before} == before
    assert found.keys() == before.keys()


class Told(NamedTuple):
    """What a command returned and wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def tell(capsys) -> Callable[..., Told]:
    """Call a command in this process, where a traceback is a failure."""

    def call(main, workdir: Path, *args: str) -> Told:
        before = ["--workdir", str(workdir)] if main is train.main else [str(workdir)]
        capsys.readouterr()
        return Told(main([*before, *args]), *capsys.readouterr())

    return call


@pytest.fixture
def leave_when_resumed(monkeypatch) -> None:
    """Have a signal end a start as soon as it has said what it carries on; training again is not the matter here."""
    write = Journal.event

    def write_and_signal(self, event, **details):
        write(self, event, **details)
        if event == "resume":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Journal, "event", write_and_signal)


# Something else in the place of a file or a directory of a run

FILES = ("config.json", "config.json.partial", "lock", "metrics.jsonl", "events.jsonl")
DIRECTORIES = ("checkpoints", "checkpoints/quarantine", "tensorboard")
ROLES = [
    *((name, kind) for name in FILES for kind in ("link", "dangling link", "pipe", "directory")),
    *((name, kind) for name in DIRECTORIES for kind in ("link", "dangling link", "pipe", "file")),
]


def put(path: Path, kind: str, outside: Path, *, target: str) -> None:
    """Have something else be in the place of a file or a directory."""
    remove(path)
    if kind == "link":
        path.symlink_to(outside / target)
    elif kind == "dangling link":
        path.symlink_to(outside / "nothing")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_text("a file")


def snapshot_of_checkpoints(workdir: Path) -> dict:
    """Return all that lies in `checkpoints`; each start makes and removes a file there, which its own time tells."""
    found = snapshot(workdir / "checkpoints")
    del found[str(workdir / "checkpoints")]
    return found


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize(("name", "kind"), ROLES)
def test_what_is_in_the_place_of_a_file_or_directory_of_a_run_is_refused_and_named(run_in, outside, tell, name, kind):
    put(run_in / name, kind, outside, target="file" if name in FILES else "directory")
    before = snapshot(run_in)
    readers = ((status.main,), (status.main, "--verify"), (replay.main,), (evaluate.main,), (report.main,))
    for main, *args in ((train.main, *START), *readers):
        told = tell(main, run_in, *args)
        assert (told.code, told.out) == (2, "")
        assert told.err.startswith("error: ")
        assert str(run_in / name) in told.err
    after = snapshot(run_in)
    if name != "lock":  # That one belongs to whoever asks.
        after[str(run_in / "lock")] = before[str(run_in / "lock")]
    assert after == before


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoints"])
def test_fresh_moves_a_run_aside_as_it_is_and_follows_no_link(run_in, outside, tell, name):
    put(run_in / name, "link", outside, target="file" if name in FILES else "directory")
    told = tell(train.main, run_in, *START, "--fresh", "--steps", "40", "--log-every-steps", "10")
    assert told.code in (0, 2)
    if told.code == 0:
        assert (run_in.with_name("run.old-1") / name).is_symlink()
        assert not (run_in / name).is_symlink()


@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("name", ["0000000001", "9999999999"])
def test_a_file_for_tensorboard_is_a_new_one_whatever_is_there(run_in, outside, tell, name, kind):
    remove(run_in / "checkpoints" / "40")
    put(run_in / "tensorboard" / f"events.out.tfevents.{name}", kind, outside, target="file")
    assert tell(train.main, run_in, *START).code == 0
    assert tell(train.main, run_in, *START).code == 0
    assert len(list((run_in / "tensorboard").iterdir())) == 4


# Something else in the place of a checkpoint or of its parts


def newest(workdir: Path) -> Path:
    return workdir / "checkpoints" / "40"


def largest_file(workdir: Path) -> Path:
    return max((path for path in newest(workdir).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def state(workdir: Path) -> Path:
    return newest(workdir) / "state"


def manifest(workdir: Path) -> Path:
    return newest(workdir) / "manifest.json"


def run_item(workdir: Path) -> Path:
    return newest(workdir) / "run"


def metadata(workdir: Path) -> Path:
    return run_item(workdir) / "metadata"


def hashes(workdir: Path) -> Path:
    return state(workdir) / "hashes.0.json"


@pytest.mark.parametrize("kind", ["link to its copy", "dangling link", "pipe", "directory", "file"])
@pytest.mark.parametrize("place", [newest, manifest, state, run_item, metadata, hashes, largest_file])
def test_a_checkpoint_with_something_else_in_its_place_is_set_aside(
    run_in, tmp_path, outside, tell, leave_when_resumed, place, kind
):
    path = place(run_in)
    copy = tmp_path / "copy"
    path.rename(copy)
    if kind == "link to its copy":  # Its bytes are right, and it is elsewhere.
        path.symlink_to(copy)
    else:
        put(path, kind, outside, target="file")
    before = snapshot(copy)
    assert tell(status.main, run_in).code == 0
    looked = tell(status.main, run_in, "--verify")
    assert looked.code == 0
    assert "resumes from step 30 of 40; sets aside: step 40: " in looked.out
    assert tell(replay.main, run_in).code == 65
    told = tell(train.main, run_in, *START)
    assert told.code == 0
    assert "warning: a checkpoint is not good, step 40: " in told.err
    assert "resumed cnn on digits from step 30 of 40" in told.out
    assert [path.name.split("-")[0] for path in (run_in / "checkpoints" / "quarantine").iterdir()] == ["40"]
    assert snapshot(copy) == before


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "directory", "file"])
def test_what_lies_in_a_checkpoint_besides_is_no_part_of_it(run_in, outside, tell, kind):
    for name in ("besides", "hashes.1.json", "checkpoint", "_strings.json", "zarr.json"):
        put(state(run_in) / name, kind, outside, target="file")
    put(run_item(run_in) / "besides", kind, outside, target="file")
    put(state(run_in) / "array_metadatas" / "process_1", kind, outside, target="file")
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
        put(newest(run_in) / name, kind, outside, target="file")
    assert tell(replay.main, run_in, "--from", "30").out.endswith("\nidentical\n")
    told = tell(train.main, run_in, *START)
    assert told.code == 0
    assert (told.out.splitlines()[-1].split()[:2], told.err) == (["finished", "step=40"], "")


@pytest.mark.parametrize("name", ["40.unfinished", "40.orbax-checkpoint-tmp", "5.ready", "removed/5"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "file", "directory", "directory of links", "pipe"])
def test_of_a_leftover_that_leads_elsewhere_only_the_link_goes(run_in, outside, tell, name, kind):
    path = run_in / "checkpoints" / name
    path.parent.mkdir(exist_ok=True)
    put(path, "directory" if kind == "directory of links" else kind, outside, target="directory")
    if kind == "directory of links":
        (path / "state").symlink_to(outside / "directory")
        (path / "manifest.json").symlink_to(outside / "file")
        os.mkfifo(path / "pipe")
    assert tell(train.main, run_in, *START).code == 0
    assert not os.path.lexists(path)


def test_what_is_not_named_as_a_checkpoint_is_none_and_stays(run_in, tell):
    names = ["00005", "+5", "-1", "5 ", " 5", "٣", "²", "4e1", "0x28", "40.0", "1_0", 23 * "9", "40\n", "40-1", "None"]
    for name in names:
        shutil.copytree(newest(run_in), run_in / "checkpoints" / name)
    assert [found["step"] for found in json.loads(tell(status.main, run_in, "--json").out)["checkpoints"]] == [
        22,
        30,
        40,
    ]
    assert tell(train.main, run_in, *START).code == 0
    assert all((run_in / "checkpoints" / name / "manifest.json").exists() for name in names)


def test_an_empty_directory_with_a_number_for_a_name_is_a_damaged_checkpoint(run_in, tell):
    (run_in / "checkpoints" / (18 * "9")).mkdir()
    told = tell(train.main, run_in, *START)
    assert told.code == 0
    assert "is finished" in told.out


@pytest.mark.parametrize("step", [10, 41, 2**31, 10**18 - 1])
def test_a_checkpoint_that_was_put_under_another_step_is_refused(run_in, tell, step):
    shutil.copytree(newest(run_in), run_in / "checkpoints" / str(step))
    for old in {22, 30, 40} - {step}:
        remove(run_in / "checkpoints" / str(old))
    change_manifest(run_in / "checkpoints" / str(step), step=step)
    assert tell(status.main, run_in, "--verify").code == 0
    for main, *args in ((replay.main, "--from", "0"), (evaluate.main,), (train.main, *START)):
        told = tell(main, run_in, *args)
        assert told.code == 2
        assert f"the checkpoint of step {step} holds a state of step 40" in told.err


def test_a_replay_does_not_begin_with_a_state_of_another_step(run_in, tell):
    """It would say that all is identical, for there would be nothing to train."""
    remove(run_in / "checkpoints" / "30")
    shutil.copytree(newest(run_in), run_in / "checkpoints" / "30")
    change_manifest(run_in / "checkpoints" / "30", step=30)
    told = tell(replay.main, run_in, "--from", "30")
    assert told.code == 2
    assert "step 30" in told.err


# The config

WHOLE = CONFIG.to_json()
BAD_CONFIGS = {
    "nothing": b"",
    "torn": b'{"dataset": "dig',
    "a list": b"[]",
    "null": b"null",
    "a number": b"7",
    "a long number": b"7" * 5000,
    "not UTF-8": b'{"dataset": "\xff\xfe"}',
    "UTF-16": json.dumps(WHOLE).encode("utf-16"),
    "nested lists": 100_000 * b"[",
    "nested tables": 100_000 * b'{"a":',
    "zeros": bytes(5000),
    "a loss of a field": {name: value for name, value in WHOLE.items() if name != "seed"},
    "an unknown field": {**WHOLE, "post_save_hook": "touch /tmp/x"},
    "a field of one start": {**WHOLE, "workdir": "/"},
    "a nested value": json.dumps(WHOLE).encode().replace(b'"seed": 0', b'"seed": ' + 900 * b"[" + 900 * b"]"),
    "dataset auto": {**WHOLE, "dataset": "auto"},
    "dataset ../x": {**WHOLE, "dataset": "../x"},
    "dataset null": {**WHOLE, "dataset": None},
    "dataset list": {**WHOLE, "dataset": ["digits"]},
    "model ../x": {**WHOLE, "model": "../x"},
    "steps true": {**WHOLE, "steps": True},
    "steps text": {**WHOLE, "steps": "40"},
    "steps fraction": {**WHOLE, "steps": 40.0},
    "steps 0": {**WHOLE, "steps": 0},
    "steps many": {**WHOLE, "steps": 10**12},
    "epochs many": {**WHOLE, "steps": None, "epochs": 2**31 - 1},
    "epochs of many digits": {**WHOLE, "steps": None, "epochs": 10**308},
    "epochs none": {**WHOLE, "steps": None, "epochs": 1e-9},
    "batch of more images than there are": {**WHOLE, "batch_size": 2**31 - 1},
    "rate NaN": {**WHOLE, "learning_rate": float("nan")},
    "rate infinite": {**WHOLE, "learning_rate": float("inf")},
    "rate of many digits": {**WHOLE, "learning_rate": 10**400},
    "seconds of many digits": {**WHOLE, "checkpoint_every_s": 10**400},
    "exit code": {**WHOLE, "preempted_exit_code": 256},
    "data_dir of the digits": {**WHOLE, "data_dir": "../../../etc"},
    "data_dir elsewhere": {**WHOLE, "dataset": "mnist", "data_dir": "../../../etc"},
    "data_dir with a zero": {**WHOLE, "dataset": "mnist", "data_dir": "a\0b"},
    "data_dir with half a letter": {**WHOLE, "dataset": "mnist", "data_dir": "a\ud800b"},
    "data_dir of 5000 letters": {**WHOLE, "dataset": "mnist", "data_dir": 5000 * "a"},
    "data_dir a number": {**WHOLE, "data_dir": 7},
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_config_that_no_run_wrote_is_refused_with_2(tmp_path, outside, tell, kind):
    content = BAD_CONFIGS[kind]
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert tell(status.main, workdir).code == 0
    assert tell(status.main, workdir, "--json").code == 0
    told = tell(train.main, workdir, "--lock-wait-s", "0")
    assert told.code == 2
    assert told.err.startswith("error: ")
    assert len(told.err) < 7000
    assert not (workdir / "checkpoints").exists() or not any((workdir / "checkpoints").iterdir())


def test_a_config_of_2_megabytes_is_not_even_read(run_in, tell):
    content = (run_in / "config.json").read_bytes()
    (run_in / "config.json").write_bytes(content + 2**21 * b" ")  # It would be JSON.
    told = tell(train.main, run_in, *START)
    assert told.code == 2
    assert str(run_in / "config.json") in told.err


# Manifests whose seal fits: anybody can make one


def with_shape(shape: object):
    def change(content: dict, outside: Path) -> None:
        content["leaves"]["params.conv1.kernel"]["shape"] = shape

    return change


def with_file(name: str):
    def change(content: dict, outside: Path) -> None:
        name_of_it = name.replace("OUTSIDE", str(outside))
        there = Path(name_of_it) if name_of_it.startswith("/") else outside / "file"
        known = {"bytes": there.stat().st_size, "sha256": hashlib.sha256(there.read_bytes()).hexdigest()}
        content["files"] = {name_of_it: known, **content["files"]}

    return change


def without(name: str):
    def change(content: dict, outside: Path) -> None:
        del content[name]

    return change


def without_file(name: str):
    def change(content: dict, outside: Path) -> None:
        del content["files"][name]

    return change


def with_value(value: object, *path: str):
    """Change a value of the manifest or, where the path begins with "about", of what the run says of itself."""

    def change(content: dict, outside: Path) -> None:
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value

    return change


def with_metadata(value: object):
    return with_value(value, "about")


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


DAMAGED = {
    "a file outside by its path": with_file("OUTSIDE/file"),
    "a file outside by dots": with_file("../../../outside/file"),
    "the passwords": with_file("/etc/passwd"),
    "the name of a directory": with_value({"bytes": 0, "sha256": ""}, "files", "state"),
    "no leaves": without("leaves"),
    "no files": without("files"),
    "no state_sha256": without("state_sha256"),
    "no step": without("step"),
    "no format": without("format"),
    "no metadata among the files": without_file("run/metadata"),
    "another state_sha256": with_value(64 * "0", "state_sha256"),
    "leaves a list": with_value([], "leaves"),
    "files text": with_value("", "files"),
    "file a number": with_value(1, "files", "x"),
    "bytes true": with_value({"bytes": True, "sha256": ""}, "files", "x"),
    "shape text": with_shape("5"),
    "shape a table": with_shape({}),
    "step of another": with_value(41, "step"),
    "step text": with_value("40", "step"),
    "step null": with_value(None, "step"),
}
OF_OTHER_LEAVES = {
    "no hashes among the files": without_file("state/hashes.0.json"),
    "other leaves than the hashes have": with_value({"shape": [5], "dtype": "int32", "sha256": ""}, "leaves", "x"),
    "a leaf with dots": with_value({"shape": [], "dtype": "int32", "sha256": ""}, "leaves", "../../x"),
    "a leaf of another type": with_value("O", "leaves", "step", "dtype"),
    "no leaf at all": with_value({}, "leaves"),
    "shape of 10**18": with_shape([10**18]),
    "shape below 0": with_shape([-5, -5, 1, 8]),
    "shape of text": with_shape(["5", "5", "1", "8"]),
    "shape of fractions": with_shape([5.0, 5.0, 1.0, 8.0]),
    "shape NaN": with_shape([float("nan")]),
    "shape nested": with_shape(nested(300)),
}
OF_ANOTHER = {
    "format 3": with_value(3, "format"),
    "format 2": with_value(2, "format"),
    "format text": with_value("4", "format"),
    "format null": with_value(None, "format"),
    "format a list": with_value([4], "format"),
    "metadata a list": with_metadata([]),
    "metadata null": with_metadata(None),
    "metadata a number": with_metadata(7),
    "metadata text": with_metadata("digits"),
    "metadata empty": with_metadata({}),
    "metadata nested": with_metadata(nested(300)),
    "metadata of lists nested in a list": with_metadata([nested(300), {"devices": nested(300)}]),
    "config a list": with_value([], "about", "config"),
    "config empty": with_value({}, "about", "config"),
    "config with a zero in its path": with_value("a\0b", "about", "config", "data_dir"),
    "config with half a letter": with_value("a\ud800b", "about", "config", "data_dir"),
    "config with steps of text": with_value("40", "about", "config", "steps"),
    "data text": with_value("digits", "about", "data"),
    "data of another size": with_value(10**400, "about", "data", "train_images"),
    "data without end": with_value(float("inf"), "about", "data", "train_images"),
    "data without size": with_value(None, "about", "data", "train_images"),
    "software null": with_value(None, "about", "software"),
    "settings text": with_value("", "about", "settings"),
    "devices a list": with_value([], "about", "devices"),
    "reason a number": with_value(7, "about", "reason"),
    "metrics empty": with_value({}, "about", "metrics"),
    "metrics below 0": with_value(-1, "about", "metrics", "bytes"),
    "metrics true": with_value(True, "about", "metrics", "bytes"),
    "metrics without sha256": with_value(None, "about", "metrics", "sha256"),
}
HARMLESS = {
    "a million cores": with_value(10**9, "about", "devices", "cpu_threads"),
    "a core of text": with_value("2", "about", "devices", "cpu_threads"),
    "time NaN": with_value(float("nan"), "about", "time"),
    "time text": with_value("yesterday", "about", "time"),
    "time 1e300": with_value(1e300, "about", "time"),
    "time of 400 digits": with_value(10**400, "about", "time"),
    "accuracy text": with_value("all", "about", "test_accuracy"),
    "accuracy 1e300": with_value(1e300, "about", "test_accuracy"),
    "nested besides": with_value(nested(300), "about", "besides"),
    "half a letter in the reason": with_value("\ud800 \x1b[31m [red]", "about", "reason"),
    "metrics of more than there is": with_value(10**400, "about", "metrics", "bytes"),
}


def forge(workdir: Path, outside: Path, change) -> None:
    content = read_manifest(newest(workdir))
    before = read_metadata(newest(workdir))
    content["about"] = read_metadata(newest(workdir))
    change(content, outside)
    about = content.pop("about")
    write_manifest(newest(workdir), content)
    if json.dumps(about) != json.dumps(before):
        write_metadata(newest(workdir), about)


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_forged_manifest_that_describes_no_checkpoint_is_damage(run_in, outside, tell, kind):
    forge(run_in, outside, DAMAGED[kind])
    assert "resumes from step 30 of 40; sets aside: step 40: " in tell(status.main, run_in, "--verify").out
    for main in (replay.main, evaluate.main):
        told = tell(main, run_in)
        assert told.code == 65
        assert "a checkpoint is damaged, step 40: " in told.err


@pytest.mark.parametrize("kind", OF_OTHER_LEAVES)
def test_a_forged_manifest_of_other_leaves_than_the_hashes_have_is_damage(
    run_in, outside, tell, leave_when_resumed, kind
):
    forge(run_in, outside, OF_OTHER_LEAVES[kind])
    for args in ([], ["--verify"], ["--verify", "--json"]):
        assert tell(status.main, run_in, *args).code == 0
    for main in (replay.main, evaluate.main):
        told = tell(main, run_in)
        assert told.code == 65
        assert "a checkpoint is damaged, step 40: " in told.err
    assert "resumed cnn on digits from step 30" in tell(train.main, run_in, *START).out


@pytest.mark.parametrize("kind", OF_ANOTHER)
def test_a_forged_manifest_of_another_run_is_refused_with_2(run_in, outside, tell, kind):
    forge(run_in, outside, OF_ANOTHER[kind])
    before = snapshot_of_checkpoints(run_in)
    assert tell(status.main, run_in, "--verify").code == 0
    assert tell(status.main, run_in, "--verify", "--json").code == 0
    for main, *args in ((replay.main,), (evaluate.main,), (train.main, *START)):
        told = tell(main, run_in, *args)
        assert told.code == 2
        assert told.err.splitlines()[-1].startswith("error: ") or "error: " in told.err
    assert snapshot_of_checkpoints(run_in) == before


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_a_forged_manifest_says_besides_does_no_harm(run_in, outside, tell, kind):
    forge(run_in, outside, HARMLESS[kind])
    for args in ([], ["--json"], ["--verify"]):
        assert tell(status.main, run_in, *args).code == 0
    assert tell(replay.main, run_in, "--from", "30").code == 0
    assert tell(evaluate.main, run_in).code == 0
    assert tell(train.main, run_in, *START).code == 0
    assert os.environ["PJRT_NPROC"] in ("", *map(str, range(1, 4097)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe",
        100_000 * b"[",
        b'{"format": 4, "step": 40, "seal": ' + 900 * b"[" + 900 * b"]" + b"}",
        b'{"format": 4, "step": 40, "seal": null}',
        b'{"format": 4, "step": 40, "seal": NaN}',
        b'{"format": 1' + 5000 * b"0" + b"}",
    ],
    ids=lambda content: content[:40].decode("latin-1"),
)
def test_a_manifest_that_is_none_is_damage(run_in, tell, content):
    manifest(run_in).write_bytes(content)
    with pytest.raises(CorruptCheckpointError):
        Checkpoint(newest(run_in)).verify()
    assert "resumes from step 30" in tell(status.main, run_in).out


def test_a_manifest_of_100_megabytes_is_not_even_read(run_in):
    os.truncate(manifest(run_in), 100 * 2**20)
    with pytest.raises(CorruptCheckpointError, match="more than"):
        Checkpoint(newest(run_in)).verify()


LIKE = {"params": {"kernel": np.ones((3, 2), np.float32)}, "rng": jax.random.key(1), "step": np.int32(7)}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A checkpoint of a small tree."""
    store = Checkpointer(tmp_path_factory.mktemp("small") / "checkpoints")
    store.save(7, like(), metadata={"reason": "test", "config": {"a": 1}}, wait=True)
    store.close()
    return store.directory / "7"


@pytest.fixture(scope="module")
def forged(small, tmp_path_factory) -> Path:
    """A copy of it, written anew for each example."""
    return tmp_path_factory.mktemp("forged") / "7"


def like() -> object:
    return jax.tree.map(jax.numpy.asarray, LIKE)


def same(first: object, second: object) -> bool:
    return integrity.digest_leaves(first) == integrity.digest_leaves(second)


def paths_of(value: object, path: tuple = ()) -> list[tuple]:
    found = [path] if path else []
    if isinstance(value, dict):
        for name, inner in value.items():
            found += paths_of(inner, (*path, name))
    return found


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)


@given(draw=st.data())
@settings(deadline=None, max_examples=80)
def test_with_any_value_in_any_place_of_a_manifest_or_of_hashes_it_is_refused_or_does_no_harm(small, forged, draw):
    content = {"manifest": read_manifest(small), "hashes": read_hashes(small)}
    path = draw.draw(st.sampled_from([path for path in paths_of(content) if len(path) > 1]))
    place = content
    for name in path[:-1]:
        place = place[name]
    value = draw.draw(st.just("(removed)") | json_values)
    if value == "(removed)":
        del place[path[-1]]
    else:
        place[path[-1]] = value
    shutil.copytree(small, forged, dirs_exist_ok=True)
    if path[0] == "hashes":
        try:
            write_hashes(forged, content["hashes"])
        except Exception:  # They make no leaves.
            write_hashes(forged, content["hashes"], leaves=content["manifest"]["leaves"])
    else:
        write_manifest(forged, content["manifest"])
    checkpoint = Checkpoint(forged)
    for look in (checkpoint.manifest, checkpoint.metadata, checkpoint.verify):
        with contextlib.suppress(CorruptCheckpointError, IncompatibleCheckpointError):
            look()
    with contextlib.suppress(CorruptCheckpointError, IncompatibleCheckpointError):
        tree, _ = checkpoint.read(like())
        assert same(tree, like())
    assert checkpoint.bytes > 0


@given(draw=st.data())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_with_any_bytes_in_any_file_it_is_refused_or_does_no_harm(small, forged, draw):
    shutil.copytree(small, forged, dirs_exist_ok=True)
    names = sorted(read_manifest(small)["files"])
    path = forged / draw.draw(st.sampled_from(names))
    content = path.read_bytes()
    at = draw.draw(st.integers(0, len(content)))
    path.write_bytes(
        content[:at] + draw.draw(st.binary(max_size=9)) + content[draw.draw(st.integers(at, len(content))) :]
    )
    update_files(forged)
    with contextlib.suppress(CorruptCheckpointError, ReadError):
        tree, _ = Checkpoint(forged).read(like())
        assert same(tree, like())


# What Orbax and TensorStore keep of the leaves, with digests that fit: they believe it, and end the process where no
# memory holds it. So another process reads these.

READ = """
import resource, sys
from pathlib import Path
import numpy as np
from mnist_jax.checkpoint.checkpoint import Checkpoint
from mnist_jax.checkpoint.integrity import CheckpointError
resource.setrlimit(resource.RLIMIT_AS, 2 * (32 * 2**30,))
for path in sys.argv[1:]:
    try:
        values, metadata = Checkpoint(Path(path)).read({"w": np.ones(5, np.float32)})
        print("fine", *values["w"], flush=True)
    except CheckpointError as error:
        print(f"{type(error).__name__}: {error}".replace("\\n", " "), flush=True)
"""


def database(checkpoint: Path):
    """Return Orbax's database of a state."""
    base = {"driver": "file", "path": f"{checkpoint / 'state'}/"}
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()


def zarray(checkpoint: Path, **changes: object) -> str:
    """Return what is kept of an array, with changes."""
    return json.dumps({**json.loads(database(checkpoint).read("w/.zarray").result().value), **changes})


def stored_as(**changes: object):
    """Have the database tell of another array."""

    def change(checkpoint: Path) -> None:
        database(checkpoint).write("w/.zarray", zarray(checkpoint, **changes)).result()

    return change


def with_flag(name: str, value: object):
    def change(checkpoint: Path) -> None:
        path = checkpoint / "state" / "_METADATA"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return change


def beside_the_database(**changes: object):
    """Have Orbax read an array that lies beside its database."""

    def change(checkpoint: Path) -> None:
        with_flag("use_ocdbt", False)(checkpoint)
        (checkpoint / "state" / "w").mkdir()
        (checkpoint / "state" / "w" / ".zarray").write_text(zarray(checkpoint, **changes))
        (checkpoint / "state" / "w" / "0").write_bytes(bytes(100))

    return change


def as_zarr3(shape: list[int], chunk_shape: list[int]):
    """Have Orbax read an array of the other version of Zarr."""

    def change(checkpoint: Path) -> None:
        with_flag("use_zarr3", True)(checkpoint)
        array = {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": "float32",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
            "chunk_key_encoding": {"name": "default"},
            "fill_value": 0,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
        database(checkpoint).write("w/zarr.json", json.dumps(array)).result()
        database(checkpoint).write("w/c/0", bytes(40)).result()

    return change


def larger_everywhere(checkpoint: Path) -> None:
    """Have the hashes tell of the same large array as the database."""
    size = 10**15
    counts = integrity.chunk_counts([size], 4)
    stored_as(shape=[size], chunks=[size])(checkpoint)
    row = read_hashes(checkpoint)["leaves"]["w"]
    chunks = {str(number): row["chunks"]["0"] for number in range(counts[0])}
    write_hashes(checkpoint, {"leaves": {"w": {**row, "raw_shape": [size], "counts": counts, "chunks": chunks}}})


def overwritten(name: str, content: bytes):
    def change(checkpoint: Path) -> None:
        (checkpoint / "state" / name).write_bytes(content)

    return change


def gone(name: str):
    def change(checkpoint: Path) -> None:
        (checkpoint / "state" / name).unlink()

    return change


def with_key(key: bytes, value: bytes | None):
    def change(checkpoint: Path) -> None:
        database(checkpoint).write(key, value).result()

    return change


STORED = {
    "a shape of 10**15": stored_as(shape=[10**15]),
    "a chunk of 10**15": stored_as(chunks=[10**15]),
    "a chunk below 0": stored_as(chunks=[-5]),
    "chunks of other dimensions": stored_as(chunks=[1, 10**15, 0]),
    "a value of 10**12 bytes": stored_as(dtype="|V1000000000000"),
    "a value of 10**12 fields": stored_as(dtype=[["x", "<f4", [10**12]]]),
    "a type of twice the size": stored_as(dtype="<f8"),
    "a compressor that is none": stored_as(compressor={"id": "../x"}),
    "a large array in all places": larger_everywhere,
    "a shape of 10**15 beside the database": beside_the_database(shape=[10**15]),
    "a chunk of 10**15 beside the database": beside_the_database(chunks=[10**15]),
    "zarr 3 with a shape of 10**15": as_zarr3([10**15], [10**15]),
    "zarr 3 with a chunk of 10**13": as_zarr3([5], [10**13]),
    "no array": with_key(b"w/.zarray", None),
    "no values": with_key(b"w/0", None),
    "an array that is none": with_key(b"w/.zarray", b"[]"),
    "an array nested too deep": with_key(b"w/.zarray", 100_000 * b"["),
    "a name that leads out": with_key(b"../../x/.zarray", b'{"shape": [], "chunks": []}'),
    "a name that is no text": with_key(b"\xff/.zarray", b'{"shape": [], "chunks": []}'),
    "no flags": overwritten("_METADATA", b"{}"),
    "flags that are none": overwritten("_METADATA", b"[]"),
    "flags of no text": overwritten("_METADATA", b"\xff\xfe"),
    "flags nested too deep": overwritten("_METADATA", 100_000 * b"["),
    "no file of flags": gone("_METADATA"),
    "shardings nested too deep": overwritten("_sharding", 100_000 * b"["),
    "shardings of no text": overwritten("_sharding", b"\xff\xfe"),
    "no shardings": gone("_sharding"),
    "array_metadatas nested too deep": overwritten("array_metadatas/process_0", 100_000 * b"["),
    "array_metadatas of no text": overwritten("array_metadatas/process_0", b"\xff\xfe"),
    "a database of zeros": overwritten("manifest.ocdbt", bytes(1000)),
    "no database": gone("manifest.ocdbt"),
}


@pytest.fixture(scope="module")
def ones(tmp_path_factory) -> Path:
    """A checkpoint of five ones."""
    store = Checkpointer(tmp_path_factory.mktemp("ones") / "checkpoints")
    store.save(7, {"w": jax.numpy.ones(5)}, wait=True)
    store.close()
    return store.directory / "7"


@pytest.fixture(scope="module")
def what_is_read(ones, tmp_path_factory) -> dict[str, str]:
    """What comes of reading each of them: a line, or how the process ended that read it."""
    found, left = {}, list(STORED)
    checkpoints = {kind: tmp_path_factory.mktemp("stored") / "7" for kind in STORED}
    for kind, change in STORED.items():
        shutil.copytree(ones, checkpoints[kind])
        change(checkpoints[kind])
        update_files(checkpoints[kind])
    while left:
        command = [sys.executable, "-c", READ, *(str(checkpoints[kind]) for kind in left)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        lines = ended.stdout.splitlines()
        if ended.returncode:
            lines.append(f"the process ended with {ended.returncode}: {ended.stderr[-1000:]}")
        found |= zip(left, lines, strict=False)
        left = left[len(lines) :]
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", STORED)
def test_what_is_stored_is_believed_only_where_it_fits(what_is_read, kind):
    assert what_is_read[kind].startswith(("CorruptCheckpointError: ", "ReadError: ", "fine 1.0 1.0 1.0 1.0 1.0"))
    assert len(what_is_read[kind]) < 2000


def test_an_array_that_cannot_be_read_ends_a_command_with_a_code_and_a_line(run_in, tell):
    with_key(b"step/.zarray", None)(newest(run_in))
    update_files(newest(run_in))
    for main, *args in ((replay.main, "--from", "30"), (evaluate.main,), (train.main, *START)):
        told = tell(main, run_in, *args)
        assert told.code in (65, 74, 0)
        # Orbax closes its event loop with the first leaf that fails, and TensorStore may still call back into it.
        assert "Traceback" not in told.err or "Event loop is closed" in told.err
        assert "step 40" in told.err


def test_values_that_cannot_be_read_end_the_command_itself_with_74_and_a_line(run_in, environment, tmp_path):
    path = max(state(run_in).rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[::1000] = bytes(byte ^ 0xFF for byte in content[::1000])
    path.write_bytes(content)
    update_files(newest(run_in))
    ended = subprocess.run(
        [sys.executable, "-m", "mnist_jax.evaluate", str(run_in)],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout) == (74, "")
    assert "the checkpoint of step 40 cannot be read now" in ended.stderr
    # Orbax closes its event loop with the first leaf that fails, and TensorStore may still call back into it.
    assert ended.stderr.count("\n") == 1 or "Event loop is closed" in ended.stderr


# The digests of the leaves, with a manifest that fits

PIECE = {"chunk": 0, "box": [[0, 5]], "bytes": ""}
BAD_HASHES = {
    "no chunks": {"counts": [0]},
    "chunks below 0": {"counts": [-1]},
    "10**8 chunks": {"counts": [10**8]},
    "10**12 chunks": {"counts": [10**12]},
    "chunks without end": {"counts": [float("inf")]},
    "a dimension more": {"counts": [1, 1], "raw_shape": [5, 1]},
    "another shape": {"raw_shape": [6]},
    "a shape of 10**15": {"raw_shape": [10**15]},
    "a shape of many digits": {"raw_shape": [10**400]},
    "values of 10**12 bytes": {"itemsize": 10**12},
    "values of 10**400 bytes": {"itemsize": 10**400},
    "a piece of 10**12 bytes": {"itemsize": 10**12, "chunks": {}, "pieces": [PIECE]},
    "a piece of 10**30 bytes": {"itemsize": 10**30, "chunks": {}, "pieces": [PIECE]},
    "a piece of another chunk": {"chunks": {}, "pieces": [{**PIECE, "chunk": 10**9}]},
    "a piece that is no base64": {"chunks": {}, "pieces": [{**PIECE, "bytes": "\xff"}]},
    "no digest": {"chunks": {}},
    "a digest too much": {"chunks": {"0": "", "1": "", "-1": ""}},
    "digests that are none": {"chunks": {"0": [None]}},
}


@pytest.mark.parametrize("kind", BAD_HASHES)
@pytest.mark.parametrize("fits", [True, False])
def test_hashes_that_nobody_wrote_are_damage(ones, tmp_path, kind, fits):
    checkpoint = Path(shutil.copytree(ones, tmp_path / "7"))
    leaves = read_manifest(checkpoint)["leaves"]
    row = {**read_hashes(checkpoint)["leaves"]["w"], **BAD_HASHES[kind]}
    if fits:
        digests = [row["chunks"][number] for number in sorted(row["chunks"])]
        leaves["w"]["sha256"] = integrity.json_sha256(["w", "float32", [5], row["counts"], digests])
    write_hashes(checkpoint, {"leaves": {"w": row}}, leaves=leaves)
    with pytest.raises(CorruptCheckpointError, match="step 7"):
        Checkpoint(checkpoint).read({"w": np.ones(5, np.float32)})


@pytest.mark.parametrize("content", [b"[]", b"null", b"7", b"{}", b'{"leaves": []}', b"\xff", 100_000 * b"["])
def test_hashes_that_are_none_are_damage(ones, tmp_path, content):
    checkpoint = Path(shutil.copytree(ones, tmp_path / "7"))
    write_file(checkpoint, "state/hashes.0.json", content)
    with pytest.raises(CorruptCheckpointError, match="step 7"):
        Checkpoint(checkpoint).read({"w": np.ones(5, np.float32)})


def test_leaves_that_are_there_and_have_no_hashes_are_damage(run_in, tell):
    content = read_hashes(newest(run_in))
    del content["leaves"]["params.conv1.kernel"]
    write_hashes(newest(run_in), content, leaves=read_manifest(newest(run_in))["leaves"])
    assert tell(replay.main, run_in, "--from", "30").code == 65


# What a run says of itself


@pytest.mark.parametrize("content", [b"", b"\xff", 100_000 * b"[", b'{"a": 1' + 5000 * b"0" + b"}", b"{"])
def test_metadata_that_are_no_json_are_damage(run_in, tell, leave_when_resumed, content):
    write_file(newest(run_in), "run/metadata", content)
    for args in ([], ["--verify"], ["--json"]):
        told = tell(status.main, run_in, *args)
        assert told.code == 0
        assert "sets aside: step 40: " in told.out
        assert "run/metadata" in told.out
    for main in (replay.main, evaluate.main):
        assert tell(main, run_in).code == 65
    assert tell(evaluate.main, run_in, "--step", "best").code == 65
    assert "resumed cnn on digits from step 30" in tell(train.main, run_in, *START).out


@pytest.mark.parametrize("values", [[], None, 7, "digits", {"devices": [], "test_accuracy": {}}])
@pytest.mark.parametrize("args", [("--step", "best"), ("--step", "40"), ()])
def test_metadata_of_no_run_are_refused_with_2(run_in, tell, values, args):
    for step in (22, 30, 40):
        write_metadata(run_in / "checkpoints" / str(step), values)
    told = tell(evaluate.main, run_in, *args)
    assert (told.code, told.out) == (2, "")
    assert told.err.startswith("error: ")


@pytest.mark.parametrize("place", [metadata, hashes, largest_file])
def test_a_file_that_grew_beyond_all_memory_is_not_read(run_in, tell, place):
    os.truncate(place(run_in), 2**43)
    started = time.monotonic()
    told = tell(status.main, run_in, "--verify")
    assert told.code == 0
    assert "sets aside: step 40: " in told.out
    assert tell(status.main, run_in).code == 0
    assert tell(replay.main, run_in).code == 65
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("name", ["run/metadata", "state/hashes.0.json"])
def test_a_file_of_json_of_200_megabytes_is_not_even_read(run_in, name):
    path = newest(run_in) / name
    os.truncate(path, 200 * 2**20)
    update_files(newest(run_in))
    with pytest.raises(CorruptCheckpointError, match="more than"):
        Checkpoint(newest(run_in)).read({"step": np.int32(0)}, partial=True)


# Checkpoints of the version before


def test_a_checkpoint_of_the_version_before_is_refused_with_2_and_stays(run_in, tell):
    for step in (22, 30, 40):
        remove(run_in / "checkpoints" / str(step))
        write_format_3(run_in / "checkpoints", step)
    before = snapshot_of_checkpoints(run_in)
    for args in ([], ["--verify"], ["--json"]):
        told = tell(status.main, run_in, *args)
        assert told.code == 0
        assert "refuses: the checkpoint of step 40 has format 3" in told.out
    readers = ((replay.main,), (evaluate.main,), (evaluate.main, "--step", "best"), (evaluate.main, "--step", "22"))
    for main, *args in ((train.main, *START), *readers):
        told = tell(main, run_in, *args)
        assert told.code == 2
        assert "has format 3, and this version reads format 4" in told.err
    assert snapshot_of_checkpoints(run_in) == before


# Nothing is executed


class Touch:
    """A value whose unpickling makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("how_many", ["one", "all", "besides"])
def test_no_pickle_is_unpickled_whether_or_not_the_seal_fits(run_in, tmp_path, tell, how_many):
    marker = tmp_path / "marker"
    pickled = pickle.dumps(Touch(marker))
    np.save(tmp_path / "array.npy", np.array([Touch(marker)], dtype=object), allow_pickle=True)
    pickle.loads(pickled).close()
    assert marker.exists()  # So it would be seen.
    marker.unlink()
    if how_many == "besides":
        for name in ("checkpoint", "aggregate", "checkpoint.pkl", "state.pkl", "_METADATA.pkl", "metadata"):
            (state(run_in) / name).write_bytes(pickled)
            (newest(run_in) / name).write_bytes(pickled)
        shutil.copy(tmp_path / "array.npy", state(run_in) / "params.npy")
    else:
        files = sorted(
            (path for path in state(run_in).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
        )
        for number, path in enumerate(files[-1:] if how_many == "one" else files):
            path.write_bytes((tmp_path / "array.npy").read_bytes() if number % 2 else pickled)
    if how_many != "one":
        update_files(newest(run_in))
    # Orbax looks at some that are there besides, and makes nothing of them.
    allowed = {"one": (65,), "all": (65, 74), "besides": (0, 65, 74)}[how_many]
    told = tell(replay.main, run_in, "--from", "30")
    assert told.code in allowed
    assert tell(status.main, run_in, "--verify").code == 0
    assert tell(train.main, run_in, *START).code == (74 if told.code == 74 else 0)  # It is set aside only where bad.
    assert not marker.exists()


def test_a_run_directory_that_is_the_working_directory_brings_no_code_along(run_in, environment, tmp_path):
    marker = tmp_path / "marker"
    for name in ("jax", "orbax", "json", "tyro", "sitecustomize", "conftest", "flax", "filelock"):
        (run_in / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\nraise SystemExit(99)\n")
        (run_in / "checkpoints" / "40" / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\n")
    # `python -m` puts the working directory first on the path, which is Python's doing: so it is not called from there.
    ended = subprocess.run(
        [sys.executable, "-m", "mnist_jax.status", str(run_in), "--verify"],
        env={**os.environ, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert not marker.exists()


# The journal

lines = st.lists(
    st.binary(max_size=60)
    | st.builds(
        lambda values: json.dumps(values).encode(),
        st.fixed_dictionaries(
            {},
            optional={
                "step": st.integers(0, 50) | json_values,
                "split": st.sampled_from(["train", "test"]) | json_values,
                "accuracy": st.floats() | json_values,
                "event": st.sampled_from(["start", "save", "exit", "resume"]) | json_values,
                "loss": json_values,
            },
        ),
    ),
    max_size=8,
).map(b"\n".join)


@given(metrics=lines, events=lines, step=st.integers(0, 50))
@settings(deadline=None, max_examples=100)
def test_whatever_the_journal_holds_it_is_opened_and_cut_back_and_nothing_else_of_it_is_lost(
    tmp_path_factory, metrics, events, step
):
    workdir = tmp_path_factory.getbasetemp() / "journal"
    workdir.mkdir(exist_ok=True)
    (workdir / "metrics.jsonl").write_bytes(metrics)
    (workdir / "events.jsonl").write_bytes(events)
    journal = Journal(workdir)
    assert journal.rewind(step) >= step
    journal.accuracy_at(step)
    journal.best()
    fingerprint = journal.metrics_fingerprint()
    journal.tells_of_saves()
    assert journal.still_begins_with(fingerprint)
    journal.event("exit", step=step)
    journal.close()
    kept = (workdir / "metrics.jsonl").read_bytes()
    assert metrics.startswith(kept)
    assert fingerprint == {"bytes": len(kept), "sha256": hashlib.sha256(kept).hexdigest()}
    assert (workdir / "events.jsonl").read_bytes().startswith(events)
    assert read_events(workdir / "events.jsonl")[-1]["event"] == "exit"


@pytest.mark.parametrize(
    "content",
    [
        b'{"step": 22, "split": "test", "accuracy": NaN}\n{"step": 40, "split": "test", "accuracy": Infinity}\n',
        b'{"step": 40, "split": "test", "accuracy": -1e999}\n{"step": 30, "split": "test", "accuracy": 1e308}\n',
        b'{"event": "start", "step": 2147483647}\n{"event": "save", "step": 99999999999999999999}\n',
        100_000 * b"[" + b"\n" + b'{"event": "start", "step": 0, "text": "\\ud800"}\n\x00\x00',
        bytes(5_000_000),
    ],
    ids=["not finite", "absurd", "far", "deep", "zeros"],
)
def test_a_run_whose_journal_somebody_else_wrote_ends_as_it_would_have(run_in, finished, tell, content):
    for name in ("metrics.jsonl", "events.jsonl"):
        (run_in / name).write_bytes(content)
    remove(newest(run_in))
    assert tell(status.main, run_in, "--json").code == 0
    assert tell(train.main, run_in, *START).code == 0
    expected, found = (read_events(directory / "events.jsonl")[-1] for directory in (finished, run_in))
    assert found["state_sha256"] == expected["state_sha256"]


# As a user meets it


def spoil_with_depth(workdir: Path, outside: Path) -> None:
    (workdir / "config.json").write_bytes(100_000 * b"[")


def spoil_with_a_pipe(workdir: Path, outside: Path) -> None:
    remove(workdir / "lock")
    os.mkfifo(workdir / "lock")


def spoil_with_a_link(workdir: Path, outside: Path) -> None:
    remove(workdir / "metrics.jsonl")
    (workdir / "metrics.jsonl").symlink_to(outside / "file")


@pytest.mark.parametrize("spoil", [spoil_with_depth, spoil_with_a_pipe, spoil_with_a_link])
def test_the_command_itself_ends_with_2_and_one_line(run_in, outside, environment, spoil):
    spoil(run_in, outside)
    ended = Run(run_in, environment).finish("--lock-wait-s", "0")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
