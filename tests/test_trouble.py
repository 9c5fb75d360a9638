"""Exhausted resources are no corruption: nothing is moved or lost, and the run resumes when they are back."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from faults import (
    RESOURCES,
    UNFINISHED,
    CannotMountError,
    exhausted_at_restore,
    exhausted_at_saves,
    fill,
    limit,
    small_disk,
)
from runs import DIGITS, Ended, Run

from mnist_jax import train
from mnist_jax.checkpoint import integrity
from mnist_jax.checkpoint.checkpoint import list_checkpoints
from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.checkpoint.integrity import ReadError

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits and mounts are those of Linux"),
    pytest.mark.usefixtures("in_this_process"),
]

ARGS = (
    *(*DIGITS, "--steps", "60", "--checkpoint-every-steps", "20"),
    # The first evaluation imports TensorBoard: before any limit is set.
    *("--eval-every-steps", "30", "--log-every-steps", "7"),
)
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
# Root may start any number of threads. This user has the other rights of root, but not that one.
AS_ANOTHER_USER = (
    *("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"),
    *("--inh-caps=-all,+dac_override", "--ambient-caps=-all,+dac_override"),
)
RETRIED = (74, -signal.SIGABRT, 127)  # 127: glibc found no memory for the data of a thread


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, environment) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run", environment)
    assert run.finish(*ARGS).code == 0
    assert run.steps()[-2:] == [40, 60]
    return run


@pytest.fixture
def interrupted(undisturbed, tmp_path) -> Run:
    """A run that was killed after the save of step 40."""
    shutil.copytree(undisturbed.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "60")
    return Run(tmp_path / "run", undisturbed.environment)


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a small disk."""
    with ExitStack() as mounts:

        def mount(place: Path, size: str) -> Path:
            try:
                return mounts.enter_context(small_disk(place, size))
            except CannotMountError as error:
                pytest.skip(f"cannot mount a disk: {error}")

        yield mount


@pytest.fixture
def call(capfd) -> Callable[..., Ended]:
    """Call the command in this process: a full disk, unlike a limit, needs no process of its own."""

    def call_main(workdir: Path) -> Ended:
        capfd.readouterr()
        return Ended(train.main(["--workdir", str(workdir), *ARGS]), *capfd.readouterr())

    return call_main


def limited(kind: str) -> tuple[str, ...]:
    """Return the start of a command that is subject to a limit."""
    if kind != "threads" or not IS_ROOT:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("there is no setpriv, and root is exempt from this limit")
    return AS_ANOTHER_USER


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def check_ends_like(run: Run, ended: Ended, undisturbed: Run) -> None:
    assert ended.code == 0, ended.err
    assert run.events("exit")[-1]["state_sha256"] == undisturbed.events("exit")[-1]["state_sha256"]
    assert run.metrics() == undisturbed.metrics()


def test_exhausted_resources_at_restore_are_no_corruption(interrupted, undisturbed):
    checkpoints = files_in(interrupted.workdir / "checkpoints")
    for kind in RESOURCES:
        interrupted.faults, interrupted.prefix = ((exhausted_at_restore, kind),), limited(kind)
        ended = interrupted.finish(*ARGS)
        assert ended.code in RETRIED, (kind, ended)
        assert files_in(interrupted.workdir / "checkpoints") == checkpoints, kind
    run = Run(interrupted.workdir, interrupted.environment)
    check_ends_like(run, run.finish(*ARGS), undisturbed)
    assert [event["step"] for event in run.events("resume") if event["exact"]] == [40]


@pytest.mark.parametrize("kind", RESOURCES)
def test_exhausted_resources_fail_one_save_only(kind, new_run, undisturbed):
    run = new_run()
    run.faults, run.prefix = ((exhausted_at_saves, kind, [40]),), limited(kind)
    ended = run.finish(*ARGS)
    # A failure inside C++ ends the process. A lack of memory may also break the training, or a library for good.
    if kind != "files" and ended.code and (kind == "memory" or ended.code != 74):
        assert ended.code in RETRIED or kind == "memory", ended
        assert list_checkpoints(run.workdir / "checkpoints")[-1].verify()["step"] == 30
        run.faults, run.prefix = (), ()
        ended = run.finish(*ARGS)
    elif kind != "memory" or run.events("save_failed"):  # Free memory of the process may be enough for a save.
        assert [event["step"] for event in run.events("save_failed")] == [40]
        assert "step 40" in ended.err
        assert run.steps()[-2:] == [30, 60]
    check_ends_like(run, ended, undisturbed)


def test_a_failed_last_save_exits_with_74_and_resumes(new_run, undisturbed):
    """Another thread makes the last save, and it is not started before."""
    run = new_run()
    run.faults, run.prefix = ((exhausted_at_saves, "threads", [60]),), limited("threads")
    ended = run.finish(*ARGS)
    assert ended.code == 74, ended
    assert "step 40" in ended.err
    run.faults, run.prefix = (), ()
    check_ends_like(run, run.finish(*ARGS), undisturbed)


@pytest.mark.parametrize("part", ["read_manifest", "describe_file", "combine", "hash_shards", "known_digests"])
def test_no_memory_in_a_restore_is_no_corruption(part, tmp_path, monkeypatch):
    state = {"weights": np.arange(1000.0)}
    with closing(Checkpointer(tmp_path / "checkpoints")) as checkpointer:
        checkpointer.save(1, state, wait=True)
        before = files_in(tmp_path)
        monkeypatch.setattr(integrity, part, mock.Mock(side_effect=MemoryError))
        with pytest.raises(ReadError):
            checkpointer.restore(state)
    assert files_in(tmp_path) == before


def test_too_few_files_at_the_start_can_be_retried(interrupted):
    checkpoints = files_in(interrupted.workdir / "checkpoints")
    interrupted.faults = ((limit, "files"),)
    ended = interrupted.finish(*ARGS)
    assert ended.code not in (0, 1, 2, 65), ended
    assert files_in(interrupted.workdir / "checkpoints") == checkpoints


def test_a_disk_with_room_for_one_checkpoint_keeps_it(environment, undisturbed, disk, call, tmp_path):
    size = sum(path.stat().st_blocks * 512 for path in (undisturbed.workdir / "checkpoints/40").rglob("*"))
    place = disk(tmp_path, str(size * 3 // 2 + 100_000))
    run = Run(place / "run", environment)
    ended = call(run.workdir)
    assert ended.code == 74, ended
    assert "step 20" in ended.err
    failed = {event["step"]: event["error"] for event in run.events("save_failed")}
    assert set(failed) == {30, 40, 60}
    assert all("No space left on device" in error for error in failed.values()), failed
    assert {path.name for path in (run.workdir / "checkpoints").iterdir()} - {"removed"} == {"20"}
    fill(place / "filler")
    full = call(run.workdir)
    assert full.code == 74, full  # and not 2, after which no scheduler starts it again
    assert "No space left on device" in full.err
    subprocess.run(["mount", "-o", "remount,size=24m", place], check=True)
    check_ends_like(run, call(run.workdir), undisturbed)
    assert [event["step"] for event in run.events("resume")][-1] == 20


def check_refused(parent: Path, name: bytes, call: Callable[[bytes], Ended]) -> None:
    """Check that a run directory of this name is refused, and that nothing is written there."""
    parent.mkdir()
    path = os.path.join(os.fsencode(parent), name)
    ended = call(path)
    assert ended.code == 2, ended
    assert ended.err.count("\n") == 1, ended
    assert "UTF-8" in ended.err
    assert os.listdir(os.fsencode(parent)) in ([], [name])
    assert not any(files for folder, _, files in os.walk(path) if b"checkpoints" in folder[len(path) :])


def test_a_path_that_is_not_utf_8_is_refused(tmp_path, call):
    check_refused(tmp_path / "parent", b"a\xffb", lambda path: call(os.fsdecode(path)))


def test_a_path_in_a_locale_without_utf_8_is_refused(tmp_path, environment):
    if shutil.which("localedef") is None:
        pytest.skip("there is no localedef")
    subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", tmp_path / "en_US.ISO-8859-1"], check=True)
    variables = {"LOCPATH": str(tmp_path), "LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def start(path: bytes) -> Ended:
        command = [sys.executable, "-m", "mnist_jax.train", "--workdir", path, *ARGS]
        ended = subprocess.run(command, env={**os.environ, **environment, **variables}, capture_output=True)
        return Ended(ended.returncode, ended.stdout.decode("latin-1"), ended.stderr.decode("latin-1"))

    check_refused(tmp_path / "parent", "ü".encode("latin-1"), start)


def test_a_leftover_that_cannot_be_removed_is_reported_once(interrupted, undisturbed, disk, call):
    leftover = interrupted.workdir / "checkpoints" / f"60{UNFINISHED}"
    leftover.mkdir()
    mounted = disk(leftover, "100k").name
    ended = call(interrupted.workdir)
    check_ends_like(interrupted, ended, undisturbed)
    assert [event["step"] for event in interrupted.events("resume")] == [40]
    [failed] = interrupted.events("removal_failed")
    assert failed["step"] >= 40
    assert ended.err.count("\n") == 1, ended.err
    [left] = interrupted.workdir.rglob(mounted)
    assert left.is_mount()
