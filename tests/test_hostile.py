"""A run directory is untrusted data: what is in it may be refused, and is never executed or followed.

Every command in this file runs in process, so a traceback is a failure.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import DIGITS_CONFIG, Run, in_new_process, snapshot, train_here
from tampering import (
    change_manifest,
    largest_file,
    read_hashes,
    read_manifest,
    read_metadata,
    read_ones,
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
from mnist_jax.checkpoint.integrity import CorruptCheckpointError, IncompatibleCheckpointError
from mnist_jax.config import Config
from mnist_jax.report import __main__ as report
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import data, trainer

pytestmark = [
    pytest.mark.usefixtures("in_this_process"),
    pytest.mark.timeout(120),  # Opening a pipe would block forever.
]

CONFIG = Config(**DIGITS_CONFIG, steps=40, log_every_steps=10, checkpoint_every_steps=10)
START = ("--dataset", "digits", "--lock-wait-s", "0")


@pytest.fixture(scope="module", autouse=True)
def digits_are_loaded_once():
    load, digits = data.load, data.load("digits", notify=print)

    def load_once(name, data_dir=None, *, notify):
        return digits if (name, data_dir) == ("digits", None) else load(name, data_dir, notify=notify)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", load_once)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """An undisturbed run with checkpoints 22, 30 and 40."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with StopSignal() as stop:
        assert train_here(CONFIG, workdir, stop) == 0
    (workdir / "lock").touch()
    return workdir


@pytest.fixture
def run_in(finished, tmp_path) -> Path:
    """A copy of that run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def outside(tmp_path):
    """Files outside of the run directory, which must not change."""
    directory = tmp_path / "outside"
    (directory / "directory").mkdir(parents=True)
    (directory / "file").write_text("precious")
    (directory / "directory" / "file").write_text("precious as well")
    before = snapshot(directory)
    yield directory
    assert snapshot(directory) == before


class Called(NamedTuple):
    """What a command returned and wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def call(capsys) -> Callable[..., Called]:
    """Call a command in this process."""

    def call_main(main, workdir: Path, *args: str) -> Called:
        capsys.readouterr()
        place = ["--workdir", str(workdir)] if main is train.main else [str(workdir)]
        return Called(main([*place, *args]), *capsys.readouterr())

    return call_main


@pytest.fixture
def stop_after_restore(monkeypatch) -> None:
    """Send a signal when a start has restored its checkpoint; these tests do not need the training."""
    monkeypatch.setattr(trainer.Trainer, "compile", lambda self: os.kill(os.getpid(), signal.SIGTERM))


def newest(workdir: Path) -> Path:
    return workdir / "checkpoints" / "40"


def replace(path: Path, kind: str, outside: Path) -> None:
    """Put something else in the place of a file or directory."""
    remove(path)
    if kind == "link":
        path.symlink_to(outside / ("file" if path.suffix or path.name == "lock" else "directory"))
    elif kind == "dangling link":
        path.symlink_to(outside / "nothing")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_text("a file")


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def checkpoint_files(workdir: Path) -> dict:
    """Return all that is in `checkpoints`, except the time of the directory itself, which each start changes."""
    found = snapshot(workdir / "checkpoints")
    del found[str(workdir / "checkpoints")]
    return found


def assert_resumes_from_30(call, workdir: Path, *, is_foretold: bool = True) -> None:
    """Check that status foretells and train does it: checkpoint 40 is quarantined, and 30 is used.

    Status does not compare the hashes of leaves, which anybody can compute, with the leaves.
    """
    foretold = json.loads(call(status.main, workdir, "--verify", "--json").out)["next_start"]
    assert not is_foretold or (foretold["action"], foretold["step"], foretold["exit_code"]) == ("resume", 30, 0)
    assert call(train.main, workdir, *START).code == 0
    assert Run(workdir).events("resume")[-1]["step"] == 30
    assert [path.name.split("-")[0] for path in (workdir / "checkpoints" / "quarantine").iterdir()] == ["40"]


# Files and directories of the run


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("config.json", "link"),
        ("config.json.partial", "dangling link"),
        ("lock", "pipe"),
        ("metrics.jsonl", "link"),
        ("events.jsonl", "directory"),
        ("checkpoints", "link"),
        ("checkpoints/quarantine", "file"),
        ("tensorboard", "dangling link"),
        ("tensorboard/train", "link"),
    ],
)
def test_links_and_pipes_in_a_run_are_refused(run_in, outside, call, name, kind):
    replace(run_in / name, kind, outside)
    before = snapshot(run_in)
    starts = ((train.main, *START), (train.main, *START, "--fresh"))
    for main, *args in (*starts, (status.main, "--verify"), (replay.main,), (evaluate.main,), (report.main,)):
        ended = call(main, run_in, *args)
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith("error: ")
        assert str(run_in / name) in ended.err
    before[str(run_in / "lock")] = snapshot(run_in)[str(run_in / "lock")]  # Each start writes there.
    assert snapshot(run_in) == before


def test_tensorboard_files_are_always_new(run_in, outside, call):
    remove(newest(run_in))
    for name, kind in (("0000000001", "link"), ("9999999999", "pipe")):
        place = run_in / "tensorboard" / "train" / f"events.out.tfevents.{name}"
        place.symlink_to(outside / "file") if kind == "link" else os.mkfifo(place)
    assert call(train.main, run_in, *START).code == 0
    [file] = (run_in / "tensorboard" / "train").iterdir()
    assert stat.S_ISREG(file.lstat().st_mode)


def test_links_in_leftovers_are_not_followed(run_in, outside, call):
    checkpoints = run_in / "checkpoints"
    (checkpoints / "removed").mkdir(exist_ok=True)
    (checkpoints / "40.unfinished").symlink_to(outside / "directory")
    (checkpoints / "5.ready").symlink_to(outside / "nothing")
    os.mkfifo(checkpoints / "removed" / "5")
    leftover = checkpoints / "40.orbax-checkpoint-tmp"
    leftover.mkdir()
    (leftover / "state").symlink_to(outside / "directory")
    (leftover / "manifest.json").symlink_to(outside / "file")
    os.mkfifo(leftover / "pipe")
    assert call(train.main, run_in, *START).code == 0
    left = {path.relative_to(checkpoints).as_posix() for path in checkpoints.rglob("*")}
    assert left.isdisjoint({"40.unfinished", "5.ready", "removed/5", "40.orbax-checkpoint-tmp"})


BAD_CONFIGS = {
    "torn": b'{"dataset": "dig',
    "not UTF-8": b'{"dataset": "\xff\xfe"}',
    "nested": 100_000 * b"[",
    "unknown field": {"post_save_hook": "touch /tmp/x"},
    "field of one start": {"workdir": "/"},
    "dataset is a path": {"dataset": "../x"},
    "batch of more images than there are": {"batch_size": 2**31 - 1},
    "data_dir with a zero byte": {"dataset": "mnist", "data_dir": "a\0b"},
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_a_foreign_config_is_refused(tmp_path, call, kind):
    content, workdir = BAD_CONFIGS[kind], tmp_path / "run"
    workdir.mkdir()
    content = content if isinstance(content, bytes) else json.dumps({**CONFIG.to_json(), **content}).encode()
    (workdir / "config.json").write_bytes(content)
    assert call(status.main, workdir, "--json").code == 0
    ended = call(train.main, workdir, "--lock-wait-s", "0")
    assert ended.code == 2
    assert ended.err.startswith("error: ")
    assert len(ended.err) < 1000
    assert not any((workdir / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    "content",
    [
        b'{"step": 40, "split": "test", "accuracy": NaN}\n{"step": 30, "split": "test", "accuracy": 1e308}\n',
        100_000 * b"[" + b'\n{"event": "start", "step": 99999999999999999999, "text": "\\ud800"}\n\x00\x00',
    ],
    ids=["numbers", "nested"],
)
def test_a_run_with_foreign_records_ends_the_same(run_in, finished, call, content):
    for name in ("metrics.jsonl", "events.jsonl"):
        (run_in / name).write_bytes(content)
    remove(newest(run_in))
    assert call(status.main, run_in, "--json").code == 0
    assert call(train.main, run_in, *START).code == 0
    ends = [directory.joinpath("events.jsonl").read_bytes().splitlines()[-1] for directory in (finished, run_in)]
    assert len({json.loads(line)["state_sha256"] for line in ends}) == 1


def test_the_command_itself_ends_with_2_and_one_line(run_in, environment):
    (run_in / "config.json").write_bytes(100_000 * b"[")
    ended = Run(run_in, environment).finish("--lock-wait-s", "0")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1


# Files of a checkpoint


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (".", "link to its copy"),
        ("manifest.json", "pipe"),
        ("state", "file"),
        ("run", "dangling link"),
        ("run/metadata", "directory"),
        ("state/hashes.0.json", "link to its copy"),
        ("the largest file", "link to its copy"),
        ("the largest file", "8 TB"),
    ],
)
def test_a_checkpoint_with_a_link_or_pipe_is_quarantined(
    run_in, tmp_path, outside, call, stop_after_restore, name, kind
):
    path = largest_file(newest(run_in)) if name == "the largest file" else newest(run_in) / name
    copy = tmp_path / "copy"
    path.rename(copy)
    if kind == "link to its copy":  # The bytes are right, but outside of the run directory.
        path.symlink_to(copy)
    elif kind == "8 TB":
        path.touch()
        os.truncate(path, 2**43)
    else:
        replace(path, kind, outside)
    before = snapshot(copy)
    assert call(replay.main, run_in).code == 65
    assert_resumes_from_30(call, run_in)
    assert snapshot(copy) == before


def test_extra_files_in_a_checkpoint_are_ignored(run_in, outside, call):
    kinds = ("link", "dangling link", "pipe", "directory", "file")
    names = ("besides", "hashes.1.json", "checkpoint", "_strings.json", "zarr.json")
    for name, kind in zip(names, kinds, strict=True):
        replace(newest(run_in) / "state" / name, kind, outside)
    replace(newest(run_in) / "run" / "besides", "pipe", outside)
    (newest(run_in) / "state" / "array_metadatas" / "process_1").write_text("{}")  # Orbax alone would read it.
    replace(newest(run_in) / "_CHECKPOINT_METADATA", "link", outside)
    assert call(replay.main, run_in, "--from", "30").code == 0
    ended = call(train.main, run_in, *START)
    assert (ended.code, ended.out.splitlines()[-1].split()[:2], ended.err) == (0, ["finished", "step=40"], "")


def test_only_exact_numbers_name_checkpoints(run_in, call):
    names = ["00005", "+5", "-1", "5 ", "٣", "²", "4e1", "40.0", "1_0", 23 * "9", "40\n", "40-1"]
    for name in names:
        shutil.copytree(newest(run_in), run_in / "checkpoints" / name)
    (run_in / "checkpoints" / (18 * "9")).mkdir()  # an empty directory: a corrupt checkpoint
    found = json.loads(call(status.main, run_in, "--json").out)["checkpoints"]
    assert [checkpoint["step"] for checkpoint in found] == [22, 30, 40, int(18 * "9")]
    assert call(train.main, run_in, *START).code == 0
    assert Run(run_in).events("resume")[-1]["step"] == 40
    assert all((run_in / "checkpoints" / name / "manifest.json").exists() for name in names)


@pytest.mark.parametrize("step", [30, 10**18 - 1])
def test_a_checkpoint_under_another_step_is_refused(run_in, call, step):
    for old in (22, 30):
        remove(run_in / "checkpoints" / str(old))
    newest(run_in).rename(run_in / "checkpoints" / str(step))
    change_manifest(run_in / "checkpoints" / str(step), step=step)
    for main, *args in ((replay.main, "--from", "0"), (evaluate.main,), (train.main, *START)):
        ended = call(main, run_in, *args)
        assert ended.code == 2
        assert f"step {step}" in ended.err


def test_a_checkpoint_of_format_3_is_refused_and_stays(run_in, call):
    for step in (22, 30, 40):
        remove(run_in / "checkpoints" / str(step))
        write_format_3(run_in / "checkpoints", step)
    before = checkpoint_files(run_in)
    foretold = json.loads(call(status.main, run_in, "--verify", "--json").out)["next_start"]
    assert (foretold["action"], foretold["exit_code"]) == ("refuse", 2)
    for main, *args in ((train.main, *START), (replay.main,), (evaluate.main, "--step", "best")):
        ended = call(main, run_in, *args)
        assert ended.code == 2
        assert "format 3" in ended.err
    assert checkpoint_files(run_in) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", 100_000 * b"["),
        ("run/metadata", 100_000 * b"["),
        ("run/metadata", b"\xff"),
        ("state/hashes.0.json", b"\xff"),
    ],
    ids=["manifest nested", "metadata nested", "metadata not UTF-8", "hashes not UTF-8"],
)
def test_a_checkpoint_with_bad_json_is_quarantined(run_in, call, stop_after_restore, name, content):
    if name == "manifest.json":
        (newest(run_in) / name).write_bytes(content)
    else:
        write_file(newest(run_in), name, content)
    assert call(evaluate.main, run_in).code == 65
    assert_resumes_from_30(call, run_in, is_foretold="hashes" not in name)


@pytest.mark.parametrize("name", ["manifest.json", "run/metadata", "state/hashes.0.json"])
def test_oversized_json_is_not_read(run_in, name):
    os.truncate(newest(run_in) / name, 200 * 2**20)
    if name != "manifest.json":
        update_files(newest(run_in))
    with pytest.raises(CorruptCheckpointError, match="more than"):
        Checkpoint(newest(run_in)).read({"step": np.int32(0)}, partial=True)


def test_an_unreadable_array_is_an_io_error(run_in, call):
    path = largest_file(newest(run_in))
    content = bytearray(path.read_bytes())
    content[::1000] = bytes(byte ^ 0xFF for byte in content[::1000])
    path.write_bytes(content)
    update_files(newest(run_in))  # So every digest of a file fits.
    ended = call(evaluate.main, run_in)
    assert (ended.code, ended.out) == (74, "")
    assert "step 40" in ended.err


# Manifests and metadata with valid digests, which anybody can compute


REMOVED = object()


def with_value(value: object, *path: str):
    """Set or remove a value in the manifest or, below "metadata", in the metadata."""

    def change(content: dict, outside: Path) -> None:
        for name in path[:-1]:
            content = content[name]
        content[path[-1]] = value
        if value is REMOVED:
            del content[path[-1]]

    return change


def with_file(name: str):
    """Add a file outside of the checkpoint, with its true size and digest."""

    def change(content: dict, outside: Path) -> None:
        row = {"bytes": len("precious"), "sha256": hashlib.sha256(b"precious").hexdigest()}
        content["files"] = {name.replace("OUTSIDE", str(outside)): row, **content["files"]}

    return change


def forge(workdir: Path, outside: Path, *changes) -> None:
    """Change manifest and metadata of the newest checkpoint, and compute the digests again."""
    content = {**read_manifest(newest(workdir)), "metadata": read_metadata(newest(workdir))}
    before = json.dumps(content["metadata"])
    for change in changes:
        change(content, outside)
    metadata = content.pop("metadata")
    write_manifest(newest(workdir), content)
    if json.dumps(metadata) != before:
        write_metadata(newest(workdir), metadata)


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


CORRUPT = {
    "a file outside by its path": with_file("OUTSIDE/file"),
    "a file outside by dots": with_file("../../../outside/file"),
    "no leaves": with_value(REMOVED, "leaves"),
    "no metadata among the files": with_value(REMOVED, "files", "run/metadata"),
    "no hashes among the files": with_value(REMOVED, "files", "state/hashes.0.json"),
    "another state_sha256": with_value(64 * "0", "state_sha256"),
    "a file that is a number": with_value(1, "files", "x"),
    "the step of another": with_value(41, "step"),
    "a leaf too many": with_value({"shape": [], "dtype": "int32", "sha256": ""}, "leaves", "../../x"),
    "an object dtype": with_value("O", "leaves", "step", "dtype"),
    "a shape of 10**18": with_value([10**18], "leaves", "params.conv1.kernel", "shape"),
    "a nested shape": with_value(nested(300), "leaves", "params.conv1.kernel", "shape"),
}
OF_ANOTHER_RUN = {
    "format of text": with_value("4", "format"),
    "metadata null": with_value(None, "metadata"),
    "metadata nested": with_value(nested(300), "metadata"),
    "config with a zero byte in its path": with_value("a\0b", "metadata", "config", "data_dir"),
    "infinite data": with_value(float("inf"), "metadata", "data", "train_images"),
    "devices a list": with_value([], "metadata", "devices"),
    "metrics of other lines": with_value("[]\n", "metadata", "metrics", "lines"),
}
HARMLESS = [
    with_value(10**9, "metadata", "devices", "cpu_threads"),
    with_value(10**400, "metadata", "time"),
    with_value("all", "metadata", "test_accuracy"),
    with_value(nested(300), "metadata", "besides"),
    with_value("\ud800 \x1b[31m [red]", "metadata", "reason"),
    with_value(10**400, "metadata", "metrics", "besides"),
]


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_forged_manifest_is_quarantined(run_in, outside, call, stop_after_restore, kind):
    forge(run_in, outside, CORRUPT[kind])
    ended = call(evaluate.main, run_in)
    assert ended.code == 65
    assert "step 40" in ended.err
    assert_resumes_from_30(call, run_in, is_foretold=kind != "no hashes among the files")


@pytest.mark.parametrize("kind", OF_ANOTHER_RUN)
def test_forged_metadata_of_another_run_are_refused(run_in, outside, call, kind):
    forge(run_in, outside, OF_ANOTHER_RUN[kind])
    before = checkpoint_files(run_in)
    assert call(status.main, run_in, "--verify", "--json").code == 0
    for main, *args in ((replay.main,), (evaluate.main, "--step", "40"), (train.main, *START)):
        ended = call(main, run_in, *args)
        assert ended.code == 2
        assert "error: " in ended.err
    assert checkpoint_files(run_in) == before


def test_forged_details_in_metadata_are_harmless(run_in, outside, call):
    forge(run_in, outside, *HARMLESS)
    for args in ([], ["--json"], ["--verify"]):
        ended = call(status.main, run_in, *args)
        assert ended.code == 0
        assert "\x1b" not in ended.out
    assert call(replay.main, run_in, "--from", "30").code == 0
    assert call(evaluate.main, run_in).code == 0
    assert call(train.main, run_in, *START).code == 0
    assert os.environ["PJRT_NPROC"] in ("", *map(str, range(1, 4097)))


class Touch:
    """A value whose unpickling creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.mark.parametrize("where", ["in all files", "in extra files"])
def test_no_pickle_is_unpickled(run_in, tmp_path, call, where):
    marker, state = tmp_path / "marker", newest(run_in) / "state"
    pickled = pickle.dumps(Touch(marker))
    pickle.loads(pickled).close()
    assert marker.exists()  # So an unpickling would be seen.
    marker.unlink()
    files = [path for path in state.rglob("*") if path.is_file()]
    if where == "in extra files":
        files = [state / name for name in ("checkpoint", "aggregate", "checkpoint.pkl", "_METADATA.pkl", "metadata")]
    for path in files:
        path.write_bytes(pickled)
    np.save(state / "params.npy", np.array([Touch(marker)], dtype=object), allow_pickle=True)
    update_files(newest(run_in))
    assert call(status.main, run_in, "--verify").code == 0
    codes = {call(replay.main, run_in, "--from", "30").code, call(train.main, run_in, *START).code}
    assert codes <= {0, 65, 74}
    assert not marker.exists()


# What Orbax and TensorStore store about arrays, with valid digests


@pytest.fixture(scope="module")
def ones(tmp_path_factory) -> Path:
    """A checkpoint of five ones."""
    store = Checkpointer(tmp_path_factory.mktemp("ones") / "checkpoints")
    store.save(7, {"w": jax.numpy.ones(5)}, metadata={"reason": "test"}, wait=True)
    store.close()
    return store.directory / "7"


def database(checkpoint: Path):
    """Return Orbax's database of a state."""
    base = {"driver": "file", "path": f"{checkpoint / 'state'}/"}
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()


def with_key(key: bytes, value: bytes | None):
    return lambda checkpoint: database(checkpoint).write(key, value).result()


def with_array(**changes: object):
    """Change the description of the array in the database."""

    def change(checkpoint: Path) -> None:
        stored = json.loads(database(checkpoint).read(b"w/.zarray").result().value)
        with_key(b"w/.zarray", json.dumps({**stored, **changes}).encode())(checkpoint)

    return change


def with_content(name: str, content: bytes):
    return lambda checkpoint: (checkpoint / "state" / name).write_bytes(content)


def with_flag(name: str, value: object):
    def change(checkpoint: Path) -> None:
        path = checkpoint / "state" / "_METADATA"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return change


def with_array_beside_the_database(checkpoint: Path) -> None:
    stored = json.loads(database(checkpoint).read(b"w/.zarray").result().value)
    with_flag("use_ocdbt", False)(checkpoint)
    (checkpoint / "state" / "w").mkdir()
    (checkpoint / "state" / "w" / ".zarray").write_text(json.dumps({**stored, "chunks": [10**15]}))
    (checkpoint / "state" / "w" / "0").write_bytes(bytes(100))


def with_a_large_array_everywhere(checkpoint: Path) -> None:
    """Have the hashes and the database agree on a large array."""
    size = 10**15
    counts = integrity.chunk_counts([size], 4)
    with_array(shape=[size], chunks=[size])(checkpoint)
    row = read_hashes(checkpoint)["leaves"]["w"]
    chunks = {str(number): row["chunks"]["0"] for number in range(counts[0])}
    write_hashes(checkpoint, {"leaves": {"w": {**row, "raw_shape": [size], "counts": counts, "chunks": chunks}}})


STORED = {
    "a shape of 10**15": with_array(shape=[10**15]),
    "a chunk of 10**15": with_array(chunks=[10**15]),
    "a value of 10**12 bytes": with_array(dtype="|V1000000000000"),
    "a large array everywhere": with_a_large_array_everywhere,
    "a large chunk beside the database": with_array_beside_the_database,
    "the layout of zarr 3": with_flag("use_zarr3", True),
    "a nested array": with_key(b"w/.zarray", 100_000 * b"["),
    "a name that leads out": with_key(b"../../x/.zarray", b'{"shape": [], "chunks": []}'),
    "nested flags": with_content("_METADATA", 100_000 * b"["),
    "a database of zeros": with_content("manifest.ocdbt", bytes(1000)),
}


def test_stored_arrays_are_read_only_if_they_fit(ones, tmp_path):
    for kind, change in STORED.items():
        checkpoint = tmp_path / kind.replace("*", "x") / "7"
        shutil.copytree(ones, checkpoint)
        change(checkpoint)
        update_files(checkpoint)
    paths = [str(tmp_path / kind.replace("*", "x") / "7") for kind in STORED]
    # TensorStore ends the process where no memory is left.
    outcomes = dict(zip(STORED, in_new_process(read_ones, paths, 32 * 2**30), strict=True))
    allowed = ("CorruptCheckpointError: ", "ReadError: ", "fine 1.0 1.0 1.0 1.0 1.0")
    assert not {kind: line for kind, line in outcomes.items() if not line.startswith(allowed) or len(line) > 2000}


PIECE = {"chunk": 0, "box": [[0, 5]], "bytes": ""}
BAD_HASHES = {
    "negative chunks": {"counts": [-1]},
    "10**12 chunks": {"counts": [10**12]},
    "values of 10**12 bytes": {"itemsize": 10**12},
    "a piece of 10**30 bytes": {"itemsize": 10**30, "chunks": {}, "pieces": [PIECE]},
    "a piece that is not base64": {"chunks": {}, "pieces": [{**PIECE, "bytes": "\xff"}]},
    "digests of no text": {"chunks": {"0": [None]}},
}


@pytest.mark.parametrize("kind", BAD_HASHES)
def test_forged_hashes_are_corruption(ones, tmp_path, kind):
    checkpoint = Path(shutil.copytree(ones, tmp_path / "7"))
    leaves = read_manifest(checkpoint)["leaves"]
    row = {**read_hashes(checkpoint)["leaves"]["w"], **BAD_HASHES[kind]}
    digests = [row["chunks"][number] for number in sorted(row["chunks"])]
    leaves["w"]["sha256"] = integrity.json_sha256(["w", "float32", [5], row["counts"], digests])
    write_hashes(checkpoint, {"leaves": {"w": row}}, leaves=leaves)
    with pytest.raises(CorruptCheckpointError, match="step 7"):
        Checkpoint(checkpoint).read({"w": np.ones(5, np.float32)})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)


def paths_in(value: object, path: tuple = ()) -> list[tuple]:
    children = [paths_in(inner, (*path, name)) for name, inner in value.items()] if isinstance(value, dict) else []
    return [path, *(found for child in children for found in child)]


@given(draw=st.data())
@settings(deadline=None, max_examples=20)
def test_any_value_in_a_manifest_is_refused_or_harmless(ones, tmp_path_factory, draw):
    content = read_manifest(ones)
    *parents, name = draw.draw(st.sampled_from(paths_in(content)[1:]))
    place = content
    for parent in parents:
        place = place[parent]
    place[name] = draw.draw(json_values)
    checkpoint = Checkpoint(Path(shutil.copytree(ones, tmp_path_factory.mktemp("forged") / "7")))
    write_manifest(checkpoint.path, content)
    for use in (checkpoint.metadata, checkpoint.verify):
        with contextlib.suppress(CorruptCheckpointError, IncompatibleCheckpointError):
            use()
    with contextlib.suppress(CorruptCheckpointError, IncompatibleCheckpointError):
        tree, _ = checkpoint.read({"w": np.ones(5, np.float32)})
        assert np.array_equal(tree["w"], np.ones(5))
