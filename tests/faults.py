"""A campaign of fault injection: every fault must be survived, and no result may be silently wrong.

`python tests/faults.py N` injects N bit flips, and the other faults in proportion. Words after N select the rows that
contain one of them, such as `SIGKILL`. It prints a table with the columns

    injected             number of faults
    detected             reported, and a rerun resumed from the newest good checkpoint; or the run was refused
    harmless             the result is that of a run without the fault, and there was nothing to report
    most steps lost      steps that had to be recomputed, as the rerun reported (exact to an interval of the log)
    silently wrong       different bits than were saved, or than an undisturbed run ends with, unreported: must be 0
    restarted unasked    from step 0, although there was a checkpoint: must be 0

Any other broken promise (an exit code, a file that is not in quarantine) is an AssertionError: a test fails with it,
and the campaign prints it below the table.

`python tests/faults.py drive FAULTS ARGS` is the training command with faults injected: functions below, which patch
the program before its training starts. So a fault comes at an exact place, and no clock is involved.
"""

import errno
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

from runs import DIGITS, Ended, Process, Run, end
from several import start as start_several

from mnist_jax.runtime.preemption import STOP_SIGNALS

# JAX is imported inside of functions: the command must start without it.

STEPS, SAVE_EVERY = 120, 20
UNFINISHED = ".orbax-checkpoint-tmp"
LEFTOVERS = (
    UNFINISHED,
    "removed/",
)  # parts of the names that a killed save leaves
DETECTED, HARMLESS, WRONG, RESTARTED = "detected", "harmless", "silently wrong", "restarted unasked"


class Result(NamedTuple):
    """The outcome of one fault."""

    verdict: str
    lost_steps: int = 0

    @property
    def is_survived(self) -> bool:
        return self.verdict in (DETECTED, HARMLESS)


@dataclass(frozen=True)
class Campaign:
    """A folder for runs, the training that all of them do, and its undisturbed run."""

    root: Path
    environment: dict[str, str]
    args: tuple[str, ...]
    whole: Run

    @cached_property
    def pristine(self) -> "Pristine":
        return read_pristine(self.whole)

    @cached_property
    def whole_of_two(self) -> Run:
        """The same training by two processes, whose sums are rounded in another order."""
        run = Run(self.root / "whole of two", self.environment)
        ended = start_several(run, *self.args).end()
        assert [one.code for one in ended] == [0, 0], ended
        return run

    def new_run(self, *faults: tuple[Any, ...], within: Path | None = None) -> Run:
        (self.root / "runs").mkdir(exist_ok=True)
        folder = tempfile.mkdtemp(dir=within or self.root / "runs")
        return Run(Path(folder) / "run", self.environment, faults=faults)

    def resume(self, run: Run) -> Ended:
        """Run the command without faults to its end, and without flags if the run has its config."""
        run.faults = ()
        return run.finish(*(() if (run.workdir / "config.json").exists() else self.args))

    def ends_like_whole(self, run: Run, ended: Ended, whole: Run | None = None) -> bool:
        """Return whether a finished run has the bits of the undisturbed one."""
        whole = whole or self.whole
        assert ended.code == 0, ended.err
        assert ended.last_line.startswith("finished "), ended.out
        sha256 = whole.events("exit")[-1]["state_sha256"]
        return (ended.fields["state_sha256"], run.metrics()) == (sha256, whole.metrics())


def prepare(root: Path, environment: dict[str, str], data: tuple[str, ...] = DIGITS) -> Campaign:
    settings = f"--steps {STEPS} --log-every-steps 7 --eval-every-steps 60 --keep 3 --lock-wait-s 300"
    args = (*data, *settings.split(), "--checkpoint-every-steps", str(SAVE_EVERY), "--checkpoint-every-s", "1000")
    whole = Run(root / "whole", environment)
    ended = whole.finish(*args)
    assert ended.code == 0, ended.err
    return Campaign(root, environment, args, whole)


class Found(NamedTuple):
    newest: int | None
    leftovers: set[str]
    events: int


def look(run: Run) -> Found:
    names = checkpoint_names(run)
    leftovers = {name for name in names if any(part in name for part in LEFTOVERS)}
    return Found(max((int(name) for name in names if name.isdigit()), default=None), leftovers, len(run.events()))


def checkpoint_names(run: Run) -> set[str]:
    """Return the names in `checkpoints` and in `checkpoints/removed`, which comes and goes."""
    checkpoints, names = run.workdir / "checkpoints", set[str]()
    for folder in ("", "removed/"):
        with suppress(FileNotFoundError):
            names |= {folder + name for name in os.listdir(checkpoints / folder)}
    return names


def judge_start(run: Run, found: Found) -> Result:
    """Judge what the latest start did with what it found, as far as it came."""
    events = run.events()[found.events :]
    phases = {record.get("phase") for record in events}
    resumes = [record["step"] for record in events if record["event"] == "resume"]
    if "data" in phases:
        removed = [set(record["names"]) for record in events if record["event"] == "unfinished_removed"]
        assert removed == ([found.leftovers] if found.leftovers else []), (removed, found)
    if found.newest is not None and "compile" in phases and not resumes:
        return Result(RESTARTED)
    assert resumes in ([], [found.newest]), (resumes, found)
    lost_steps = max((record["lost_steps"] for record in events if "lost_steps" in record), default=0)
    return Result(DETECTED if lost_steps or found.leftovers else HARMLESS, lost_steps)


# ---- Corrupt files of checkpoints -----------------------------------------------------------------------------------


class Pristine(NamedTuple):
    """The checkpoints of the undisturbed run, and what was saved in them."""

    directory: Path
    like: Any
    saved: dict[int, tuple[dict[str, bytes], dict[str, Any]]]  # step -> bytes of the leaves, metadata


def read_pristine(whole: Run) -> Pristine:
    """Read the checkpoints of the undisturbed run, whose digests must be those in its event log."""
    from mnist_jax import config as configs
    from mnist_jax.checkpoint.checkpoint import list_checkpoints
    from mnist_jax.training import data, setup

    config = configs.load(whole.workdir / "config.json")
    trainer = setup.make_trainer(config, data.load(config.dataset, config.data_dir, notify=print))
    like, saved = trainer.abstract_state, {}
    logged = {record["step"]: record["sha256"] for record in whole.events("save")}
    for checkpoint in list_checkpoints(whole.workdir / "checkpoints"):
        state, metadata = checkpoint.read(like)
        assert checkpoint.manifest()["state_sha256"] == logged[checkpoint.step]
        saved[checkpoint.step] = leaf_bytes(state), metadata
    return Pristine(whole.workdir / "checkpoints", like, saved)


def corrupt(campaign: Campaign, kind: str, number: int) -> list[Result]:
    """Corrupt a copy of the checkpoints, and judge what is restored from it."""
    with tempfile.TemporaryDirectory(dir=campaign.root) as folder:
        directory = Path(folder, "checkpoints")
        shutil.copytree(campaign.pristine.directory, directory)
        corrupted = CORRUPTIONS[kind](directory, random.Random(f"{kind} {number}"))
        return [judge_restore(campaign.pristine, directory, corrupted)]


def judge_restore(pristine: Pristine, directory: Path, corrupted: set[int]) -> Result:
    """Restore, compare with what was saved, and check that the corrupt files are in quarantine."""
    from mnist_jax.checkpoint.checkpointer import Checkpointer
    from mnist_jax.checkpoint.integrity import NoGoodCheckpointError

    before = file_identities(directory)
    checkpointer = Checkpointer(directory)
    try:
        restored = checkpointer.restore(pristine.like)
    except NoGoodCheckpointError:
        assert corrupted == set(pristine.saved), "there was a good checkpoint"
        assert file_identities(directory) == before, "a file was moved although no checkpoint is good"
        return Result(DETECTED)
    finally:
        checkpointer.close()
    if restored is None:
        return Result(RESTARTED)
    if (leaf_bytes(restored.state), restored.metadata) != pristine.saved[restored.step]:
        return Result(WRONG)
    quarantined = {step for step in pristine.saved if step > restored.step}
    assert quarantined <= corrupted, "a good checkpoint was not used"
    assert {error.step for error, _ in restored.quarantined} == quarantined
    for error, place in restored.quarantined:  # Moved back, all files are as before: none was deleted or written.
        place.rename(directory / str(error.step))
    assert file_identities(directory) == before, "a file is neither in its place nor in quarantine"
    return Result(DETECTED if quarantined else HARMLESS, max(pristine.saved) - restored.step)


def leaf_bytes(state: Any) -> dict[str, bytes]:
    from mnist_jax.checkpoint.integrity import host_leaves

    return {name: leaf.tobytes() for name, leaf in host_leaves(state).items()}


def file_identities(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return inode, size and time of each file: equal if no file was replaced or written."""
    stats = {path.relative_to(directory).as_posix(): path.stat() for path in directory.rglob("*") if path.is_file()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def corrupt_files(
    change: Callable[[Path, random.Random], object], directory: Path, chances: random.Random, *, by_size: bool = False
) -> set[int]:
    """Change a file of the newest checkpoint, and one time in five a file of each one; return the steps."""
    steps = numbered(directory)
    corrupted = steps if chances.random() < 0.2 else steps[-1:]
    for step in corrupted:
        change(choose(directory / str(step), chances, by_size=by_size), chances)
    return set(corrupted)


def swap(directory: Path, chances: random.Random) -> set[int]:
    """Swap two files, half of the time of the same name, or the whole directories of the newest step and another."""
    *others, newest = numbered(directory)
    other = chances.choice(others)
    first, second = directory / str(newest), directory / str(other)
    if chances.random() < 0.75:
        first = choose(first, chances)
        same = second / first.relative_to(directory / str(newest))
        second = same if same.exists() and chances.random() < 0.7 else choose(second, chances)
    aside = first.with_name("aside")
    for old, new in ((first, aside), (second, first), (aside, second)):
        old.rename(new)
    return {newest, other}


def flip_bit(path: Path, chances: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chances.randrange(len(data))] ^= 1 << chances.randrange(8)
    path.write_bytes(data)


def fill_with_zeros(path: Path, chances: random.Random) -> None:
    data = bytearray(path.read_bytes())
    first, last = (0, len(data)) if chances.random() < 0.3 else sorted(chances.sample(range(len(data) + 1), 2))
    data[first:last] = bytes(last - first)
    path.write_bytes(data)


def numbered(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def choose(folder: Path, chances: random.Random, *, by_size: bool = False) -> Path:
    """Choose a file: each with equal probability, or in proportion to its size."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    [path] = chances.choices(paths, [path.stat().st_size if by_size else 1 for path in paths])
    return path


CORRUPTIONS: dict[str, Callable[[Path, random.Random], set[int]]] = {
    "bit flip, each bit alike": partial(corrupt_files, flip_bit, by_size=True),
    "bit flip, each file alike": partial(corrupt_files, flip_bit),
    "truncated file": partial(
        corrupt_files, lambda path, chances: os.truncate(path, chances.randrange(path.stat().st_size))
    ),
    "zeros in a file": partial(corrupt_files, fill_with_zeros),
    "deleted file": partial(corrupt_files, lambda path, _: path.unlink()),
    "swap between steps": swap,
}


# ---- Kills ----------------------------------------------------------------------------------------------------------

# Starts a run, kills it, and returns how the processes ended and whether the kill hit.
Attempt = Callable[[Run, int], tuple[list[Ended], bool]]


def kill_anywhere(campaign: Campaign, count: int, seed: int) -> list[Result]:
    chances = random.Random(f"{seed} anywhere")

    def attempt(run: Run, _number: int) -> tuple[list[Ended], bool]:
        process = run.start(*campaign.args)
        phase, progress = chances.choice(("import", "data", "compile", "train", "train", "train")), chances.random()
        if phase != "import":
            run.wait_for_phase(phase, process)
        if phase == "train":
            run.wait_for(lambda: len(run.metrics()) >= progress * len(campaign.whole.metrics()), process)
        time.sleep(chances.uniform(0, 1.0 if phase == "import" else 0.2))  # any moment of the phase
        process.kill()
        return [end(process)], True

    return kill_runs(campaign, campaign.new_run, attempt, count)


def kill_in_save(campaign: Campaign, count: int, seed: int) -> list[Result]:
    """Kill runs while they save. A kill hits if it leaves something unfinished."""
    chances = random.Random(f"{seed} in a save")

    def attempt(run: Run, _number: int) -> tuple[list[Ended], bool]:
        process = run.start(*campaign.args)
        wait_for_save(campaign, run, process, chances)
        process.kill()
        return [end(process)], bool(look(run).leftovers)

    return kill_runs(campaign, partial(campaign.new_run, (slow_saves,)), attempt, count)


def kill_one_of_two(campaign: Campaign, count: int, seed: int) -> list[Result]:
    """Kill one of two processes, in turn, while they save. The other one must exit by itself."""
    chances = random.Random(f"{seed} of two")

    def attempt(run: Run, number: int) -> tuple[list[Ended], bool]:
        several = start_several(run, *campaign.args, "--peer-timeout-s", "20")
        victim = (seed + number) % 2
        wait_for_save(campaign, run, several.processes[0], chances)
        several.signal(signal.SIGKILL, victim)
        # Process 0 may clean up what process 1 leaves, so look at once.
        is_hit = bool(look(run).leftovers) and several.processes[victim].wait() == -signal.SIGKILL
        ended = several.end()
        assert ended[1 - victim].code in (0, 69, -signal.SIGABRT), ended[1 - victim]
        return ended, is_hit

    make_run = partial(campaign.new_run, (slow_saves,))
    return kill_runs(campaign, make_run, attempt, count, of_two=True)


def kill_runs(
    campaign: Campaign, make_run: Callable[[], Run], attempt: Attempt, count: int, *, of_two: bool = False
) -> list[Result]:
    """Attempt runs until `count` kills hit, several in the same run, and let each run finish.

    The start after a kill shows its outcome. The training continues while a save is written, up to the next save, so
    at most two intervals are lost.
    """
    results: list[Result] = []
    while len(results) < count:
        run, is_hit, ended = make_run(), False, list[Ended]()
        while not ended or any(one.code for one in ended):
            found, was_hit = look(run), is_hit
            if len(results) + was_hit < count:
                ended, is_hit = attempt(run, len(results) + was_hit)
                assert {one.code for one in ended} <= {0, 69, -signal.SIGABRT, -signal.SIGKILL}, ended
            else:
                run.faults, is_hit = (), False
                ended = start_several(run, *campaign.args).end() if of_two else [campaign.resume(run)]
                assert not any(one.code for one in ended), ended
            result = judge_start(run, found)
            assert result.lost_steps <= 2 * SAVE_EVERY, result
            if was_hit:
                results.append(result)
        if not campaign.ends_like_whole(run, ended[0], campaign.whole_of_two if of_two else None):
            results[-1:] = [Result(WRONG)]
        assert not look(run).leftovers
    return results


def wait_for_save(campaign: Campaign, run: Run, process: Process, chances: random.Random) -> None:
    progress, part = chances.uniform(0, 0.8), chances.choice(LEFTOVERS)
    run.wait_for_phase("train", process)
    run.wait_for(lambda: len(run.metrics()) >= progress * len(campaign.whole.metrics()), process)
    run.wait_for(lambda: any(part in name for name in checkpoint_names(run)), process)
    time.sleep(chances.uniform(0, 0.5))


def slow_saves() -> None:
    """Slow down the fsync of each file and the removal of old checkpoints, so that kills hit in between."""
    from mnist_jax.checkpoint import integrity

    before(integrity, "fsync_path", lambda path: time.sleep(0.01 * (UNFINISHED in str(path))))
    before(integrity, "remove", lambda path: time.sleep(0.3 * (path.parent.name == "removed")))


def kill_in_large_save(campaign: Campaign, megabytes: int) -> list[Result]:
    """Kill one of two processes in the save of a large state that is split over them, and restore the one before."""
    from sharded import EndedError, Group

    folder = tempfile.mkdtemp(dir=campaign.root)
    first, second = Group(2, 1), None
    try:
        print_costs("save", first.call("save_large", directory=folder, megabytes=megabytes, timeout_s=600))
        first.send("start_endless_save", where="describe_file", who=1)  # Its shards are written then.
        assert {first.answer(1), first.answer(1, timeout_s=600)} == {None, "describe_file"}
        first.answer(0)
        unfinished = sum(path.stat().st_size for path in Path(folder).rglob("*") if UNFINISHED in str(path))
        assert unfinished > megabytes * 10**6 / 2, unfinished
        first.kill(1)
        with suppress(EndedError):  # JAX may end a process that has lost another.
            assert first.call_one(0, "wait_for_save", timeout_s=900) == ["SaveError"]
        first.close()
        second = Group(2, 1)
        costs = second.call("restore_large", directory=folder, megabytes=megabytes, timeout_s=600)
        print_costs("restore", costs)
        left = os.listdir(folder)
    finally:
        first.close()
        if second is not None:
            second.close()
        shutil.rmtree(folder)
    assert left == ["1"], left
    is_good = all(cost["step"] == 1 and not cost["wrong leaves"] for cost in costs)
    return [Result(DETECTED if is_good else WRONG, lost_steps=1)]


def print_costs(what: str, costs: list[dict[str, float]]) -> None:
    """Print a line for each figure, with the value of each process."""
    for name in costs[0]:
        print(f"{what}: {name}: {', '.join(f'{cost[name]:.4g}' for cost in costs)}", flush=True)


# ---- Signals --------------------------------------------------------------------------------------------------------

PHASES = (
    *("the import of JAX", "the loading of the data", "the compilation", "the first step", "mid-training"),
    *("an evaluation", "a periodic save", "the final save", "the save after a first signal"),
)


def stop_in(campaign: Campaign, phase: str, number: signal.Signals, *faults: tuple[Any, ...]) -> list[Result]:
    """Stop a run by a signal in a phase, and resume it: only a second signal may lose steps."""
    run = campaign.new_run((signal_in, phase, number), *faults)
    ended = run.finish(*campaign.args)
    # SIGXCPU comes again every second, so it is never a second request.
    is_second, is_final = phase == PHASES[-1] and number != signal.SIGXCPU, phase == "the final save"
    assert ended.code == (128 + number if is_second else 0), ended
    if not is_second:
        assert ended.last_line.startswith("finished " if is_final else "stopped "), ended.out
        assert is_final or ended.fields["signal"] == number.name
    found = look(run)
    ended = campaign.resume(run)
    result = judge_start(run, found)
    assert result.lost_steps <= 2 * SAVE_EVERY * is_second, result
    if not campaign.ends_like_whole(run, ended):
        return [Result(WRONG)]
    return [result if result.verdict == RESTARTED or is_final else result._replace(verdict=DETECTED)]


def signal_in(phase: str, number: int) -> None:
    """Have the process send itself a signal in a phase, or a second one in the save after a first signal."""
    sent: list[int] = []

    def send(*_: object, total: int = 1, **__: object) -> None:
        if len(sent) < total:
            sent.append(number)
            os.kill(os.getpid(), number)

    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "jax":
                send()

    if phase == "the import of JAX":
        sys.meta_path.insert(0, Finder())
        return

    from mnist_jax.checkpoint import integrity
    from mnist_jax.training import data, dispatch, trainer

    # Calls end at multiples of 7 and of 20: the stop in mid-training is at 80, in the middle of a log interval.
    first_step = {"the first step": 0, "mid-training": 77, PHASES[-1]: 42}.get(phase, STEPS)

    def send_in_save(directory: Path, step: int, *_: Any) -> None:
        reason = json.loads((directory / "run" / "metadata").read_text())["reason"]
        is_second = phase == PHASES[-1] and reason.startswith("signal")
        time.sleep(1.05 if is_second else 0.05)  # An earlier signal would count as an echo of the first.
        if is_second:
            send(total=2)
        elif (phase == "a periodic save" and reason == "steps") or (phase == "the final save" and step == STEPS):
            send()
        time.sleep(0.05)  # This is the saving thread: let the main thread act while the save is unfinished.

    match phase:
        case "the loading of the data":
            before(data, "load", send)
            before(data, "_read_registered", send)  # where `begin_to_load` starts
        case "the compilation":
            before(trainer.Trainer, "compile", send)
        case "an evaluation":
            before(dispatch.Dispatcher, "_evaluate", send)
        case _:
            before(trainer.Trainer, "advance", lambda *_, step, **__: send() if step >= first_step else None)
            before(integrity, "write_manifest", send_in_save)


# ---- Disks, limits and clocks ---------------------------------------------------------------------------------------


def is_unfinished(path: Any, *_: Any, **__: Any) -> bool:
    return UNFINISHED in str(path)


# Parts of a save that can fail, in its order: the calls of a function for which the predicate is true, if there is one.
SAVE_PARTS: dict[str, tuple[str, Callable[..., bool] | None]] = {
    "mkdir": ("os.mkdir", is_unfinished),
    "write of the state": ("orbax.checkpoint.PyTreeCheckpointHandler.save", None),
    "write of a leaf": ("tensorstore.open", None),
    "digests of files": ("mnist_jax.checkpoint.integrity.describe_file", None),
    "fsync": ("mnist_jax.checkpoint.integrity.fsync_path", is_unfinished),
    "write of the metadata": ("pathlib.Path.write_text", lambda path, *_, **__: path.name == "metadata"),
    "manifest": ("mnist_jax.checkpoint.integrity.write_manifest", None),
    "rename": ("os.rename", lambda old, new, **_: str(old) == f"{new}{UNFINISHED}" and Path(new).name.isdigit()),
    "fsync of the rename": ("mnist_jax.checkpoint.integrity.fsync_path", lambda path: path.name == "checkpoints"),
}
REMOVAL_PARTS: dict[str, tuple[str, Callable[..., bool] | None]] = {  # after a newer one is committed
    "rename of an old one": ("os.rename", lambda _, new, **__: Path(new).parent.name == "removed"),
    "removal of an old one": ("mnist_jax.checkpoint.integrity.remove", lambda path: path.parent.name == "removed"),
}


def finish_with(campaign: Campaign, run: Run, *events: str) -> list[Result]:
    """Have a run finish in spite of its faults, and log these events."""
    ended = run.finish(*campaign.args)
    if not campaign.ends_like_whole(run, ended):
        return [Result(WRONG)]
    assert {record["event"] for record in run.events()} >= set(events), run.events()
    assert not look(run).leftovers or "removal_failed" in events
    return [Result(DETECTED if events else HARMLESS)]


def fail_with_74(campaign: Campaign, run: Run, repair: Callable[[], object] = lambda: None) -> list[Result]:
    """Have a run exit with 74 and name its newest checkpoint, and resume it after the repair."""
    ended = run.finish(*campaign.args)
    assert ended.code == 74, ended
    assert f"step {run.steps()[-1]}." in ended.err, ended.err
    assert not look(run).leftovers, look(run).leftovers
    repair()
    found = look(run)
    ended = campaign.resume(run)
    result = judge_start(run, found)
    assert result.verdict != HARMLESS, "no lost step was reported"
    return [result if campaign.ends_like_whole(run, ended) else Result(WRONG)]


def fill_disk(campaign: Campaign, *, is_freed: bool) -> list[Result]:
    """Have a real disk full from the save of step 60 on: to that of step 100, or to the end."""
    with small_disk(campaign.root) as disk:
        filler = disk / "filler"
        run = campaign.new_run((full_disk, str(filler), 60, 100 if is_freed else None), within=disk)
        if is_freed:
            return finish_with(campaign, run, "save_failed")
        return fail_with_74(campaign, run, repair=filler.unlink)


class CannotMountError(Exception):
    """This user must not mount a disk."""


@contextmanager
def small_disk(root: Path, size: str = "24m") -> Iterator[Path]:
    """Mount a small disk in a folder; 24 MB hold about ten checkpoints."""
    disk = Path(tempfile.mkdtemp(dir=root))
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        raise CannotMountError(mounted.stderr.strip())
    try:
        yield disk
    finally:  # The folder may have been renamed.
        places = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        subprocess.run(["umount", next(place for place in places if Path(place).name == disk.name)], check=True)


def full_disk(filler: str, first: int, last: int | None) -> None:
    """Fill the disk at the save of step `first`, and free it at that of step `last`."""

    def change(step: int, _directory: Path) -> None:
        if step == first:
            fill(Path(filler))
        elif step == last:
            Path(filler).unlink(missing_ok=True)

    before_saves(change)


def fill(filler: Path) -> None:
    """Fill a small disk, but write at most 64 MB: the small disk may have been unmounted."""
    with suppress(OSError), filler.open("ab", buffering=0) as file:
        while file.tell() < 2**26:
            file.write(bytes(4096))


def lose_run_directory(campaign: Campaign, *, is_replaced: bool) -> list[Result]:
    """Remove the directory of a run that trains: it exits with 74, and does not touch what replaces the directory."""
    run = campaign.new_run((removed, "run", 60, is_replaced))
    ended = run.finish(*campaign.args)
    assert ended.code == 74, ended
    assert str(run.workdir) in ended.err
    left = [path.name for path in run.workdir.parent.rglob("*")]
    assert left == (["run", "of another"] if is_replaced else []), left
    return [Result(DETECTED)]


def removed(what: str, at_step: int, is_replaced: bool = False) -> None:
    """Remove the checkpoints or the whole run at the save of a step, and replace it by another directory if asked."""

    def remove(step: int, directory: Path) -> None:
        if step == at_step and directory.exists():
            path = directory if what == "checkpoints" else directory.parent
            shutil.rmtree(path)
            if is_replaced:
                path.mkdir()
                (path / "of another").touch()

    before_saves(remove)


def failing(part: str, number: int, steps: list[int]) -> None:
    """Have a part of the saves of some steps fail with an error number."""
    name, predicate = (SAVE_PARTS | REMOVAL_PARTS)[part]
    owner, saving = resolve_name(name.rpartition(".")[0]), [-1]

    def fail(*args: Any, **options: Any) -> None:
        if saving[-1] in steps and (predicate is None or predicate(*args, **options)):
            raise OSError(number, os.strerror(number))

    before(owner, name.rpartition(".")[2], fail)
    before_saves(lambda step, _: saving.append(step))


RESOURCES = {"files": resource.RLIMIT_NOFILE, "threads": resource.RLIMIT_NPROC, "memory": resource.RLIMIT_AS}


def exhausted_at_restore(kind: str) -> None:
    """Limit a resource to what is in use when the restore starts."""
    from mnist_jax.checkpoint.checkpointer import Checkpointer

    before(Checkpointer, "restore", lambda *_, **__: limit(kind))


def exhausted_at_saves(kind: str, steps: list[int]) -> None:
    """Limit a resource to what is in use at the saves of some steps."""
    before_saves(lambda step, _: limit(kind if step in steps else None))


def limit(kind: str | None) -> None:
    """Set the soft limit of a resource to what is in use, and those of the others to their hard limits.

    Memory gets 4 MB more: if a new thread has no memory to report that it started, `Thread.start` of CPython 3.11
    waits forever.
    """
    for number in RESOURCES.values():
        hard = resource.getrlimit(number)[1]
        resource.setrlimit(number, (hard, hard))
    if kind is not None:
        descriptor = os.dup(1)  # the lowest free one
        os.close(descriptor)
        memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**22
        in_use = {"files": descriptor, "threads": 1, "memory": memory}[kind]
        resource.setrlimit(RESOURCES[kind], (in_use, resource.getrlimit(RESOURCES[kind])[1]))


def set_in_jax(name: str, value: str) -> None:
    """Set an option of JAX as its environment variable would have done at the import."""
    import jax

    os.environ[name] = value
    jax.config.update(name.lower(), value)


def clock_set_back(at_step: int) -> None:
    now = time.time

    def set_back(step: int, _directory: Path) -> None:
        if step == at_step:
            time.time = lambda: now() - 86_400

    before_saves(set_back)


# ---- Several starts at once -----------------------------------------------------------------------------------------


def start_at_once(campaign: Campaign, size: int, *, is_first_killed: bool = False) -> list[Result]:
    """Start many processes in one directory at once: one trains, the others wait or exit with 73.

    Half of them do not wait. If the first one is killed, all others wait, and one resumes its run.
    """
    from mnist_jax.checkpoint.checkpoint import list_checkpoints
    from mnist_jax.runtime.lock import holder

    run = campaign.new_run(*((slow_saves,),) * is_first_killed)
    no_wait = () if is_first_killed else ("--lock-wait-s", "0")
    processes = [run.start(*campaign.args, *no_wait * (number % 2)) for number in range(size)]
    if is_first_killed:
        assert run.wait_for(lambda: any(e.get("phase") == "train" for e in run.events()), processes[0])
        owner = holder(run.workdir)
        [first] = [process for process in processes if owner and process.pid == owner.pid]
        first.kill()
    all_ended = [end(process) for process in processes]
    codes = [ended.code for ended in all_ended]
    finished = [ended for ended in all_ended if ended.code == 0]
    assert codes.count(-signal.SIGKILL) == is_first_killed, codes
    assert finished, all_ended
    assert {0, 73, -signal.SIGKILL} >= set(codes), codes
    spans = [record["event"] for record in run.events() if record["event"] in ("start", "exit")]
    assert spans == ["start"] * is_first_killed + ["start", "exit"] * len(finished), spans
    for checkpoint in list_checkpoints(run.workdir / "checkpoints"):
        checkpoint.verify()
    if not all(campaign.ends_like_whole(run, ended) for ended in finished):
        return [Result(WRONG)] * size
    lost_steps = max((record.get("lost_steps", 0) for record in run.events()), default=0)
    is_told = [str(run.workdir) in ended.err for ended in all_ended]
    assert all(told for told, code in zip(is_told, codes, strict=True) if code == 73), all_ended
    return [Result(DETECTED, lost_steps) if told else Result(HARMLESS) for told in is_told]


# ---- The command with faults ----------------------------------------------------------------------------------------


def drive(faults: str, args: list[str]) -> int:
    """Run the training command, with faults injected after its signal handlers and before JAX."""
    from mnist_jax import train

    def inject(*_: object, **__: object) -> None:
        for name, *details in json.loads(faults):
            globals()[name](*details)

    before(train, "initialize", inject)
    return train.main(args)


def before(owner: Any, name: str, action: Callable[..., object]) -> None:
    """Do something before each call of a function, with the same arguments."""
    function = getattr(owner, name)

    @wraps(function)
    def both(*args: Any, **options: Any) -> Any:
        action(*args, **options)
        return function(*args, **options)

    setattr(owner, name, both)


def before_saves(action: Callable[[int, Path], object]) -> None:
    """Do `action(step, directory)` before each save, after the earlier saves."""
    from mnist_jax.checkpoint.checkpointer import Checkpointer

    def act(checkpointer: Any, step: int, *_: object, **__: object) -> None:
        checkpointer.wait()
        action(step, checkpointer.directory)

    before(Checkpointer, "save", act)


def not_finite() -> None:
    """Begin the training with parameters that are NaN."""
    import jax

    from mnist_jax.training.trainer import Trainer

    advance = Trainer.advance

    def advance_from_nan(self: Trainer, state: Any, data: Any, *, step: int, n: int) -> Any:
        if step == 0:
            state = state.replace(params=jax.tree.map(lambda leaf: leaf * float("nan"), state.params))
        return advance(self, state, data, step=step, n=n)

    Trainer.advance = advance_from_nan  # type: ignore[method-assign]


def other_pixel() -> None:
    """Load the dataset with one pixel changed."""
    from mnist_jax.training import data

    load = data.load

    def load_and_change(*args: Any, **options: Any) -> data.Dataset:
        dataset = load(*args, **options)
        dataset.test_images[0, 0, 0] ^= 1
        return dataset

    data.load = load_and_change


def log_programs() -> None:
    """Log which compiled programs JAX finds in its cache, as JAX_DEBUG_LOG_MODULES does."""
    import jax

    jax.config.update("jax_debug_log_modules", "jax._src.compiler")


def preempted_at(cloud: str, first_step: int) -> None:
    """Have the metadata server of a cloud announce the end of the machine when an update is made."""
    import metadata_server

    from mnist_jax.runtime import notices
    from mnist_jax.training.trainer import Trainer

    server = metadata_server.MetadataServer()
    server.start()
    notices.ADDRESS, notices.POLL_S = server.address, 0.01

    def announce(*_: object, step: int, n: int) -> None:
        if step + n > first_step:
            server.announce(cloud)

    before(Trainer, "advance", announce)


# ---- The campaign ---------------------------------------------------------------------------------------------------

Job = Callable[[], list[Result]]


def table(campaign: Campaign, n: int) -> dict[str, list[Job]]:
    """Return the jobs of each row: `n` bit flips, and the other faults in proportion."""
    rounds, tenth, kills, kills_of_two = max(1, 3 * n // 1000), max(1, n // 10), max(5, n // 5), max(2, 3 * n // 100)
    flips = {"bit flip, each bit alike": n - n // 2, "bit flip, each file alike": n // 2}
    failures = list(itertools.product(SAVE_PARTS, (errno.ENOSPC, errno.EIO, errno.EACCES)))
    all_steps, last_steps = list(range(STEPS + 1)), list(range(60, STEPS + 1))
    set_back = (clock_set_back, 40)

    def kill(function: Callable[..., list[Result]], count: int) -> list[Job]:  # five per job, one after another
        return [partial(function, campaign, min(5, count - first), first) for first in range(0, count, 5)]

    def finishes(*fault: Any, events: tuple[str, ...]) -> Job:
        return lambda: finish_with(campaign, campaign.new_run(fault), *events)

    def fails(*fault: Any) -> Job:
        return lambda: fail_with_74(campaign, campaign.new_run(fault))

    return {
        **{kind: [partial(corrupt, campaign, kind, i) for i in range(flips.get(kind, tenth))] for kind in CORRUPTIONS},
        "SIGKILL at any moment": kill(kill_anywhere, kills - 2 * kills // 5),
        "SIGKILL in a save": kill(kill_in_save, 2 * kills // 5),
        "SIGKILL of one of two in a save": kill(kill_one_of_two, kills_of_two),
        "SIGKILL in a save of 1 GB": [partial(kill_in_large_save, campaign, 1000)],
        **{
            f"signal in {phase}": [partial(stop_in, campaign, phase, number) for number in STOP_SIGNALS * rounds]
            for phase in PHASES
        },
        "full disk, freed in time": [partial(fill_disk, campaign, is_freed=True)],
        "full disk to the end": [partial(fill_disk, campaign, is_freed=False)],
        "some saves fail": [finishes(failing, *failure, [40, 60, 80], events=("save_failed",)) for failure in failures],
        "all saves fail from one on": [fails(failing, *failure, last_steps) for failure in failures],
        "old checkpoints stay": [
            finishes(failing, part, errno.EBUSY, all_steps, events=("removal_failed",)) for part in REMOVAL_PARTS
        ],
        "checkpoints removed": [
            finishes(removed, "checkpoints", step, events=("checkpoints_vanished",)) for step in (60, 80)
        ],
        "run directory removed": [partial(lose_run_directory, campaign, is_replaced=is_so) for is_so in (False, True)],
        "clock set back": [
            finishes(*set_back, events=()),
            partial(stop_in, campaign, "mid-training", signal.SIGTERM, set_back),
        ],
        **{
            f"{size} processes at once": [
                partial(start_at_once, campaign, size, is_first_killed=is_so) for is_so in (False, True)
            ]
            for size in (2, 10)
        },
    }


class Row(NamedTuple):
    """The results of the faults of one kind, and the tracebacks of broken promises."""

    fault: str
    results: list[Result]
    broken: list[str]

    def cells(self) -> list[int]:
        verdicts = [result.verdict for result in self.results]
        lost_steps = max((result.lost_steps for result in self.results), default=0)
        injected = len(verdicts) + len(self.broken)
        return [
            injected,
            *map(verdicts.count, (DETECTED, HARMLESS)),
            lost_steps,
            *map(verdicts.count, (WRONG, RESTARTED)),
        ]

    @property
    def is_good(self) -> bool:
        return not self.broken and all(result.is_survived for result in self.results)


def run_row(campaign: Campaign, fault: str, jobs: list[Job]) -> Row:
    row, started_s = Row(fault, [], []), time.monotonic()

    def do(job: Job) -> None:
        try:
            row.results.extend(job())
        except CannotMountError as error:
            print(f"{fault}: not injected, a small disk cannot be mounted: {error}")
        except Exception:
            row.broken.append(traceback.format_exc())

    # Restores run in this process, and several processes at once are enough.
    workers = 1 if fault in CORRUPTIONS or "at once" in fault or "of two" in fault else 2
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(do, jobs))
    shutil.rmtree(campaign.root / "runs", ignore_errors=True)  # Hundreds of runs would take gigabytes.
    word = "survived" if row.is_good else "NOT ALL SURVIVED"
    print(f"{fault}: {len(row.results)} {word}, {time.monotonic() - started_s:.0f} s", flush=True)
    return row


def print_table(rows: list[Row]) -> None:
    heads = ("fault", "injected", DETECTED, HARMLESS, "most steps lost", WRONG, RESTARTED)
    print("\n" + "  ".join([f"{heads[0]:<40}", *heads[1:]]))
    for row in rows:
        numbers = (f"{number:>{len(head)}}" for number, head in zip(row.cells(), heads[1:], strict=True))
        print("  ".join([f"{row.fault:<40}", *numbers]))
    for row in rows:
        for broken in row.broken:
            print(f"\n{row.fault}: a run did not survive\n{broken}")


def main(args: list[str]) -> int:
    if args[:1] == ["drive"]:
        from mnist_jax import train

        train.exit_process(drive(args[1], args[2:]))
    # A shell's `&` and `nohup` ignore these, also in the processes that are started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    folder = os.environ.get("MNIST_DIR")
    data = ("--data-dir", str(Path(folder).absolute())) if folder else DIGITS
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        campaign = prepare(Path(root), {"HOME": root, "XDG_CACHE_HOME": root}, data)
        all_rows = table(campaign, int(args[0]) if args else 1000).items()
        selected = [row for row in all_rows if not args[1:] or any(word in row[0] for word in args[1:])]
        rows = [run_row(campaign, *row) for row in selected]
    print_table(rows)
    return 0 if all(row.is_good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
