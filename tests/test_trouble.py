"""Trouble with resources is no damage: nothing is moved or lost, and the run is carried on when the trouble is over."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from faults import SHORTAGES, UNFINISHED, FaultyRun, fill, short_at_restore, short_at_saves
from runs import Ended, Run, end

from mnist_jax.checkpoint import integrity
from mnist_jax.checkpoint.checkpoint import list_checkpoints
from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.checkpoint.integrity import ReadError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits, mounts and priorities are those of Linux")

ARGS = (
    *("--dataset", "digits", "--steps", "60", "--checkpoint-every-steps", "20"),
    # The first evaluation imports what writes for TensorBoard: before any limit is set.
    *("--eval-every-steps", "30", "--log-every-steps", "7"),
)
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
# Root may start threads without limit. Another user may here do all that root may, but for that.
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
def faulty_run(tmp_path, environment) -> Callable[..., FaultyRun]:
    def make(*faults, workdir: Path = tmp_path / "run", prefix: tuple[str, ...] = ()) -> FaultyRun:
        return FaultyRun(workdir, environment, faults=faults, prefix=prefix)

    return make


@pytest.fixture
def interrupted(undisturbed, tmp_path) -> Path:
    """The directory of a run that was killed when step 40 was saved."""
    shutil.copytree(undisturbed.workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "60")
    return tmp_path / "run"


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[..., Path]]:
    """Mount a small disk somewhere."""

    def at(place: Path, size: str) -> Path:
        place.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
        if done.returncode:
            pytest.skip(f"this user may not mount a disk: {done.stderr.decode().strip()}")
        return place

    yield at
    for place in mounted_under(tmp_path):
        subprocess.run(["umount", place], check=True)


def mounted_under(directory: Path) -> list[str]:
    """Return where disks are mounted, also where that was renamed since."""
    places = (line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines())
    return [place for place in places if Path(place).is_relative_to(directory)]


def limited(kind: str) -> tuple[str, ...]:
    """Return the beginning of a command that is subject to a limit."""
    if kind != "threads" or not IS_ROOT:
        return ()
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv is not there, and root is exempt from this limit")
    return AS_ANOTHER_USER


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def check_finished_like(run: Run, ended: Ended, undisturbed: Run) -> None:
    assert ended.code == 0, ended.err
    assert run.events("exit")[-1]["state_sha256"] == undisturbed.events("exit")[-1]["state_sha256"]
    assert run.metrics() == undisturbed.metrics()


def test_a_shortage_at_restore_is_not_damage_and_the_next_start_resumes(interrupted, faulty_run, undisturbed):
    checkpoints = files_in(interrupted / "checkpoints")
    for kind in SHORTAGES:
        ended = faulty_run((short_at_restore, kind), prefix=limited(kind)).finish(*ARGS)
        assert ended.code in RETRIED, (kind, ended)
        assert ended.code != 74 or "not known to be corrupt" in ended.err, (kind, ended)
        assert files_in(interrupted / "checkpoints") == checkpoints, kind
    run = faulty_run()
    check_finished_like(run, run.finish(*ARGS), undisturbed)
    [resume] = run.events("resume")
    assert resume["step"] == 40
    assert resume["exact"]


@pytest.mark.parametrize("kind", SHORTAGES)
def test_a_shortage_in_a_save_fails_that_save_only(kind, faulty_run, undisturbed):
    run = faulty_run((short_at_saves, kind, [40]), prefix=limited(kind))
    ended = run.finish(*ARGS)
    # In the midst of C++, or a shortage of memory that came to the training too, which then fails in its own way.
    if ended.code in RETRIED or (kind == "memory" and ended.code):
        assert ended.code != 74, ended
        assert kind != "files", ended
        assert list_checkpoints(run.workdir / "checkpoints")[-1].verify()["step"] == 30
        ended = faulty_run().finish(*ARGS)
    else:
        assert [event["step"] for event in run.events("save_failed")] == [40]
        assert "warning: the checkpoint of step 40 could not be saved" in ended.err
        assert run.steps()[-2:] == [30, 60]
    check_finished_like(run, ended, undisturbed)


def test_too_few_threads_for_the_last_save_end_with_74_and_the_next_start_resumes(faulty_run, undisturbed):
    """The last save is made by another thread than those before, which nobody needed until then."""
    run = faulty_run((short_at_saves, "threads", [60]), prefix=limited("threads"))
    ended = run.finish(*ARGS)
    assert ended.code == 74, ended
    assert "The newest checkpoint is of step 40." in ended.err
    run = faulty_run()
    check_finished_like(run, run.finish(*ARGS), undisturbed)


@pytest.mark.parametrize("part", ["read_manifest", "describe_file", "combine", "hash_shards", "known_digests"])
def test_no_memory_in_any_part_of_a_restore_is_not_damage(part, tmp_path, monkeypatch):
    state = {"weights": np.arange(1000.0)}
    with closing(Checkpointer(tmp_path / "checkpoints")) as checkpointer:
        checkpointer.save(1, state, wait=True)
        before = files_in(tmp_path)
        monkeypatch.setattr(integrity, part, mock.Mock(side_effect=MemoryError))
        with pytest.raises(ReadError):
            checkpointer.restore(state)
    assert files_in(tmp_path) == before


def test_too_few_files_for_the_start_are_not_a_bad_path(interrupted, faulty_run):
    """The limit is there from the beginning, and the exit code is one after which schedulers start again."""
    checkpoints = files_in(interrupted / "checkpoints")
    for count in (8, 10):
        ended = faulty_run(prefix=("prlimit", f"--nofile={count}:{count}")).finish(*ARGS)
        assert ended.code not in (0, 1, 2, 65), (count, ended)
        assert files_in(interrupted / "checkpoints") == checkpoints


def test_a_disk_with_room_for_one_checkpoint_and_a_half_keeps_the_first(faulty_run, undisturbed, mount, tmp_path):
    size = sum(path.stat().st_blocks * 512 for path in (undisturbed.workdir / "checkpoints/40").rglob("*"))
    disk = mount(tmp_path / "disk", str(size * 3 // 2 + 100_000))
    run = faulty_run(workdir=disk / "run")
    ended = run.finish(*ARGS)
    assert ended.code == 74, ended
    assert "The newest checkpoint is of step 20." in ended.err
    failed = {event["step"]: event["error"] for event in run.events("save_failed")}
    assert set(failed) == {30, 40, 60}
    assert all("No space left on device" in error for error in failed.values()), failed
    assert {path.name for path in (run.workdir / "checkpoints").iterdir()} - {"removed"} == {"20"}
    fill(disk / "ballast")
    full = run.finish(*ARGS)
    assert full.code == 74, full  # and not 2, after which no scheduler starts it again
    assert "No space left on device" in full.err
    subprocess.run(["mount", "-o", "remount,size=24m", disk], check=True)
    ended = run.finish(*ARGS)
    check_finished_like(run, ended, undisturbed)
    assert [event["step"] for event in run.events("resume")][-1] == 20


def test_a_path_that_a_latin_1_locale_spells_in_another_way_is_refused(tmp_path, environment):
    if shutil.which("localedef") is None:
        pytest.skip("localedef is not there")
    locales = tmp_path / "locales"
    locales.mkdir()
    subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", locales / "en_US.ISO-8859-1"], check=True)
    latin_1 = {"LOCPATH": str(locales), "LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    told = subprocess.run(
        [sys.executable, "-c", "import sys; print(sys.getfilesystemencoding())"],
        env={**os.environ, **latin_1},
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout == "iso8859-1\n"
    check_refused(tmp_path / "parent", "ü".encode("latin-1"), {**environment, **latin_1})


def test_a_path_that_is_no_utf_8_is_refused(tmp_path, environment):
    check_refused(tmp_path / "parent", b"a\xffb", {**environment, "LC_ALL": "C.UTF-8"})


def check_refused(parent: Path, name: bytes, environment: dict[str, str]) -> None:
    """Check that a run in a directory is refused in a line, and leaves nothing in any other."""
    parent.mkdir()
    path = os.path.join(os.fsencode(parent), name)
    ended = subprocess.run(
        [sys.executable, "-m", "mnist_jax.train", "--workdir", path, *ARGS],
        env={**os.environ, **environment},
        capture_output=True,
    )
    assert ended.returncode == 2, ended
    assert ended.stderr.count(b"\n") == 1, ended.stderr
    assert b"UTF-8" in ended.stderr
    assert os.listdir(os.fsencode(parent)) in ([], [name])
    found = [os.path.join(folder, file) for folder, _, files in os.walk(path) for file in files]
    assert not [name for name in found if b"checkpoints" in name], found


def test_a_run_that_may_not_set_its_priority_trains_and_saves(faulty_run):
    nice = ("nice", "-n", "11")  # below what saves run at; with 15 a busy machine would starve it
    if IS_ROOT:
        if shutil.which("setpriv") is None:
            pytest.skip("setpriv is not there, and root may set any priority")
        nice = ("setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice", *nice)
    run = faulty_run(prefix=nice)
    ended = end(run.start("--dataset", "digits", "--steps", "10", "--checkpoint-every-steps", "5"), timeout_s=250)
    assert ended.code == 0, ended.err
    assert run.steps() == [5, 10]
    assert not run.events("save_failed")


def test_a_leftover_that_cannot_be_removed_is_told_of_once(interrupted, faulty_run, undisturbed, mount):
    mount(interrupted / "checkpoints" / f"60{UNFINISHED}" / "state", "100k")
    run = faulty_run()
    ended = run.finish(*ARGS)
    check_finished_like(run, ended, undisturbed)
    assert len(mounted_under(interrupted)) == 1
    assert [event["step"] for event in run.events("resume")] == [40]
    assert len(run.events("removal_failed")) == 1
    assert ended.err.count("could not be removed") == 1
    assert ended.err.count("\n") == 1, ended.err
