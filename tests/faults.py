"""A campaign of faults, and what becomes of the runs that they hit: every one survived, and nothing silently wrong.

`python tests/faults.py N` injects N bit flips, and of the other faults in proportion, and prints a table. Its columns:

    detected             it was told of, and a rerun carried on from the newest good checkpoint; or the run was refused
    harmless             the result is that of a run without the fault, and nothing needed telling
    most steps lost      that were made and had to be recomputed, as the rerun told (it knows them to a log line)
    silently wrong       other bits than were saved, or than an undisturbed run ends with, and not a word: must be 0
    begun anew unasked   at step 0, although there was a checkpoint: must be 0

Any other promise that is broken (an exit code, a file that should be in quarantine) is an AssertionError: a test
fails with it, and the campaign lists it below its table.

`python tests/faults.py drive FAULTS ARGS` is the training command with faults built in: functions below, which
change the program before its training begins. So a fault comes at an exact place, with no clock involved.
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
from functools import cache, cached_property, partial, wraps
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

from forked import ForkedProcess, can_fork
from runs import Ended, Process, Run, end
from several import Several, free_port

from mnist_jax.runtime.preemption import STOP_SIGNALS

# JAX, and what imports it, is imported inside of functions: the driven command has to begin without it.

STEPS, SAVE_EVERY = 120, 20
UNFINISHED = ".orbax-checkpoint-tmp"
LEFTOVERS = (UNFINISHED, "removed/", ".ready")  # what the names of what a killed save leaves have in them
ALL_SAVES = list(range(STEPS + 1))


class Part(NamedTuple):
    """A part of a save that can fail: the calls of a function for which `is_it` is true."""

    function: str
    is_it: Callable[..., bool] = lambda *_, **__: True


# In the order in which a save makes them.
FALLIBLE = {
    "mkdir": Part("os.mkdir", lambda path, *_, **__: UNFINISHED in str(path)),
    "write of the state": Part("orbax.checkpoint.PyTreeCheckpointHandler.save"),
    "write of a leaf": Part("tensorstore.open"),
    "digests of files": Part("mnist_jax.checkpoint.integrity.describe_file"),
    "fsync": Part("mnist_jax.checkpoint.integrity.fsync_path", lambda path: UNFINISHED in str(path)),
    "write of the metadata": Part("pathlib.Path.write_text", lambda path, *_, **__: path.name == "metadata"),
    "manifest": Part("mnist_jax.checkpoint.integrity.write_manifest"),
    "rename": Part("os.rename", lambda old, new, **_: f"{new}{UNFINISHED}" == str(old) and Path(new).name.isdigit()),
    "fsync of the rename": Part("mnist_jax.checkpoint.integrity.fsync_path", lambda path: path.name == "checkpoints"),
}
REMOVAL = {  # of an old checkpoint, when a newer one is committed
    "rename of an old one": Part("os.rename", lambda _old, new, **__: Path(new).parent.name == "removed"),
    "removal of an old one": Part("mnist_jax.checkpoint.integrity.remove", lambda path: path.parent.name == "removed"),
}


class Result(NamedTuple):
    """What became of one fault."""

    verdict: str
    lost_steps: int = 0

    @property
    def is_survived(self) -> bool:
        """Whether nothing was wrong without a word."""
        return self.verdict in (DETECTED, HARMLESS)


DETECTED, HARMLESS, WRONG, ANEW = "detected", "harmless", "silently wrong", "begun anew unasked"


@dataclass
class FaultyRun(Run):
    """A run whose command has faults built in: tuples of a function of this file and what it is called with."""

    faults: tuple[tuple[Any, ...], ...] = ()
    prefix: tuple[str, ...] = ()

    def start(self, *args: str) -> Process:
        """Start the command, the plain one where there are no faults; `prefix` is a command that starts it."""
        self._starts = len(self.events("start"))
        faults = json.dumps([(fault.__name__, *details) for fault, *details in self.faults])
        arguments = ["--workdir", str(self.workdir), *args]
        is_late = not any(PHASES[0] in details for details in self.faults)  # A forked process has imported JAX.
        if not self.prefix and is_late and can_fork(self.environment):
            return ForkedProcess(arguments, {**os.environ, **self.environment}, faults if self.faults else None)
        program = (__file__, "drive", faults) if self.faults else ("-m", "mnist_jax.train")
        return subprocess.Popen(
            [*self.prefix, sys.executable, *program, *arguments],
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_two(self, *args: str) -> Several:
        """Start two processes that train together."""
        address = f"127.0.0.1:{free_port()}"
        named = ("--coordinator", address, "--num-processes", "2", "--process-id")
        return Several(self, [self.start(*named, str(index), *args) for index in range(2)])

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """Return the history, or the events of one kind, without lines that a full disk tore."""
        from mnist_jax.records.metrics import read_events

        return [record for record in read_events(self.workdir / "events.jsonl") if event in (None, record["event"])]


@dataclass(frozen=True)
class Campaign:
    """A folder for runs, the training that all of them make, and how it ends when nothing disturbs it."""

    root: Path
    environment: dict[str, str]
    args: tuple[str, ...]
    whole: Run

    @property
    def runs(self) -> Path:
        """Where the runs are that are disturbed, until `run_row` is done with them."""
        return self.root / "runs"

    @cached_property
    def pristine(self) -> "Pristine":
        """The checkpoints of the undisturbed run, as they were saved."""
        return read_pristine(self.whole)

    def new_run(self, *faults: tuple[Any, ...], within: Path | None = None) -> FaultyRun:
        """Return a run in a directory of its own."""
        self.runs.mkdir(exist_ok=True)
        return FaultyRun(Path(tempfile.mkdtemp(dir=within or self.runs)) / "run", self.environment, faults=faults)

    def carry_on(self, run: FaultyRun) -> Ended:
        """Run the plain command to its end, bare as soon as the run knows its own settings."""
        run.faults = ()
        return run.finish(*(() if (run.workdir / "config.json").exists() else self.args))

    @cached_property
    def whole_of_two(self) -> Run:
        """The same training made by two processes; their sums are rounded in another order."""
        run = FaultyRun(self.root / "whole of two", self.environment)
        ended = run.start_two(*self.args).end()
        assert [one.code for one in ended] == [0, 0], ended
        return run

    def ended_alike(self, run: Run, ended: Ended, whole: Run | None = None) -> bool:
        """Tell whether a run that says that it is finished has the bits of the undisturbed one."""
        whole = whole or self.whole
        assert ended.code == 0, ended.err
        assert ended.last_line.startswith("finished "), ended.out
        sha256 = whole.events("exit")[-1]["state_sha256"]
        return (ended.fields["state_sha256"], run.metrics()) == (sha256, whole.metrics())


def prepare(root: Path, environment: dict[str, str]) -> Campaign:
    """Make the undisturbed run: on the MNIST in the folder `MNIST_DIR`, or else on the built-in digits."""
    folder = os.environ.get("MNIST_DIR")
    data = ("--data-dir", str(Path(folder).absolute())) if folder else ("--dataset", "digits")
    settings = f"--steps {STEPS} --log-every-steps 7 --eval-every-steps 60 --keep 3 --lock-wait-s 300"
    args = (*data, *settings.split(), "--checkpoint-every-steps", str(SAVE_EVERY), "--checkpoint-every-s", "1000")
    whole = Run(root / "whole", environment)
    ended = whole.finish(*args)
    assert ended.code == 0, ended.err
    return Campaign(root, environment, args, whole)


class Found(NamedTuple):
    """What a start finds in a run directory."""

    newest: int | None
    leftovers: set[str]
    events: int


def look(run: Run) -> Found:
    """Return what the next start of a run will find."""
    names = _names(run)
    steps = [int(name) for name in names if name.isdigit()]
    leftovers = {name for name in names if any(kind in name for kind in LEFTOVERS)}
    return Found(max(steps, default=None), leftovers, len(run.events()))


def _names(run: Run) -> set[str]:
    """Return the names in the directory of the checkpoints, and those in `removed`, which comes and goes."""
    checkpoints, names = run.workdir / "checkpoints", set[str]()
    for folder in ("", "removed/"):
        with suppress(FileNotFoundError):
            names |= {folder + name for name in os.listdir(checkpoints / folder)}
    return names


def judge_start(run: Run, found: Found) -> Result:
    """Judge what the latest start made of what it found, as far as it came."""
    events = run.events()[found.events :]
    phases = {record.get("phase") for record in events}
    resumes = [record["step"] for record in events if record["event"] == "resume"]
    if "data" in phases:
        removed = [set(record["names"]) for record in events if record["event"] == "unfinished_removed"]
        assert removed == ([found.leftovers] if found.leftovers else []), (removed, found)
    if found.newest is not None and "compile" in phases and not resumes:
        return Result(ANEW)
    assert resumes in ([], [found.newest]), (resumes, found)
    lost_steps = max((record["lost_steps"] for record in events if "lost_steps" in record), default=0)
    return Result(DETECTED if lost_steps or found.leftovers else HARMLESS, lost_steps)


# ---- Damage to the files of checkpoints -----------------------------------------------------------------------------


class Pristine(NamedTuple):
    """The checkpoints of the undisturbed run: where they are, and what was saved in them."""

    directory: Path
    like: Any
    saved: dict[int, tuple[dict[str, bytes], dict[str, Any]]]  # step -> bytes of the leaves, the metadata


def read_pristine(whole: Run) -> Pristine:
    """Read the checkpoints of the undisturbed run; their digests are those that the run told when it saved them."""
    from mnist_jax import config as configs
    from mnist_jax.checkpoint.checkpoint import list_checkpoints
    from mnist_jax.training import data, loop

    config = configs.load(whole.workdir / "config.json")
    blueprint = loop.make_trainer(config, data.load(config.dataset, config.data_dir, notify=print))
    like, saved = blueprint.abstract_state, {}
    told = {record["step"]: record["sha256"] for record in whole.events("save")}
    for checkpoint in list_checkpoints(whole.workdir / "checkpoints"):
        state, metadata = checkpoint.read(like)
        assert checkpoint.manifest()["state_sha256"] == told[checkpoint.step]
        saved[checkpoint.step] = _bits(state), metadata
    return Pristine(whole.workdir / "checkpoints", like, saved)


def damage(campaign: Campaign, harm: str, number: int) -> list[Result]:
    """Harm a copy of the checkpoints, and judge what is restored from it."""
    with tempfile.TemporaryDirectory(dir=campaign.root) as folder:
        directory = Path(folder, "checkpoints")
        shutil.copytree(campaign.pristine.directory, directory)
        harmed = DAMAGE[harm](directory, random.Random(f"{harm} {number}"))
        return [judge_restore(campaign.pristine, directory, harmed)]


def judge_restore(pristine: Pristine, directory: Path, harmed: set[int]) -> Result:
    """Restore, compare with what was saved, and look where the files are that were not good."""
    from mnist_jax.checkpoint.checkpointer import Checkpointer
    from mnist_jax.checkpoint.integrity import NoGoodCheckpointError

    before = _places(directory)
    checkpointer = Checkpointer(directory)
    try:
        restored = checkpointer.restore(pristine.like)
    except NoGoodCheckpointError:
        assert harmed == set(pristine.saved), "a good checkpoint was there"
        assert _places(directory) == before, "something was moved although nothing is good"
        return Result(DETECTED)
    finally:
        checkpointer.close()
    if restored is None:
        return Result(ANEW)
    if (_bits(restored.state), restored.metadata) != pristine.saved[restored.step]:
        return Result(WRONG)
    passed_over = {step for step in pristine.saved if step > restored.step}
    assert passed_over <= harmed, "a good checkpoint was passed over"
    assert {error.step for error, _ in restored.quarantined} == passed_over
    for error, refuge in restored.quarantined:  # Put back, all is as it was: nothing was deleted or written to.
        refuge.rename(directory / str(error.step))
    assert _places(directory) == before, "a file is neither where it was nor in quarantine"
    return Result(DETECTED if passed_over else HARMLESS, max(pristine.saved) - restored.step)


def _bits(state: Any) -> dict[str, bytes]:
    from mnist_jax.checkpoint.integrity import host_leaves

    return {name: leaf.tobytes() for name, leaf in host_leaves(state).items()}


def _places(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return what tells one file from another, and one that was written to from one that was not, by their names."""
    facts = {path.relative_to(directory).as_posix(): path.stat() for path in directory.rglob("*") if path.is_file()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in facts.items()}


def harm_files(
    harm: Callable[[Path, random.Random], object], directory: Path, chances: random.Random, *, by_size: bool
) -> set[int]:
    """Harm a file of the newest checkpoint, and one time in five a file of each one; return the steps."""
    steps = _steps(directory)
    harmed = steps if chances.random() < 0.2 else steps[-1:]
    for step in harmed:
        harm(_choose(directory / str(step), chances, by_size=by_size), chances)
    return set(harmed)


def swap(directory: Path, chances: random.Random) -> set[int]:
    """Swap two files, half of the time of the same name, or the whole directories of the newest step and another."""
    *others, newest = _steps(directory)
    other = chances.choice(others)
    first, second = directory / str(newest), directory / str(other)
    if chances.random() < 0.75:
        first = _choose(first, chances, by_size=False)
        same = second / first.relative_to(directory / str(newest))
        second = same if same.exists() and chances.random() < 0.7 else _choose(second, chances, by_size=False)
    aside = first.with_name("aside")
    for old, new in ((first, aside), (second, first), (aside, second)):
        old.rename(new)
    return {newest, other}


def flip_bit(path: Path, chances: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[chances.randrange(len(data))] ^= 1 << chances.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, chances: random.Random) -> None:
    os.truncate(path, chances.randrange(path.stat().st_size))


def fill_with_zeros(path: Path, chances: random.Random) -> None:
    data = bytearray(path.read_bytes())
    first, last = (0, len(data)) if chances.random() < 0.3 else sorted(chances.sample(range(len(data) + 1), 2))
    data[first:last] = bytes(last - first)
    path.write_bytes(data)


def delete(path: Path, chances: random.Random) -> None:
    path.unlink()


def _steps(directory: Path) -> list[int]:
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit())


def _choose(folder: Path, chances: random.Random, *, by_size: bool) -> Path:
    """Choose a file: as often as it has bytes, or each as often as the others, so that small ones get their share."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    [path] = chances.choices(paths, [path.stat().st_size if by_size else 1 for path in paths])
    return path


DAMAGE: dict[str, Callable[[Path, random.Random], set[int]]] = {
    "bit flip, each bit alike": partial(harm_files, flip_bit, by_size=True),
    "bit flip, each file alike": partial(harm_files, flip_bit, by_size=False),
    "truncated file": partial(harm_files, truncate, by_size=False),
    "zeros in a file": partial(harm_files, fill_with_zeros, by_size=False),
    "deleted file": partial(harm_files, delete, by_size=False),
    "swap between steps": swap,
}


# ---- Kills ----------------------------------------------------------------------------------------------------------


def kill_again_and_again(campaign: Campaign, count: int, seed: int, *, in_save: bool) -> list[Result]:
    """Kill runs until `count` kills hit, one after another in the same run, and let each run come to its end.

    A kill in a save hits where that leaves something unfinished. What became of a kill, the next start shows.
    While a save is written the training goes on as far as the next one: two intervals are lost at the most.
    """
    chances, results = random.Random(f"{seed} {in_save}"), []
    while len(results) < count:
        run, hit, ended = campaign.new_run(*((slow_saves,),) * in_save), False, None
        while ended is None or ended.code != 0:
            found = look(run)
            if len(results) + hit < count:
                ended = _kill(campaign, run, chances, in_save=in_save)
            else:
                ended = campaign.carry_on(run)
            assert ended.code in (0, -signal.SIGKILL), ended.err
            result = judge_start(run, found)
            assert result.lost_steps <= 2 * SAVE_EVERY, result
            if hit:
                results.append(result)
            hit = not in_save or bool(look(run).leftovers)
        if not campaign.ended_alike(run, ended):
            results[-1:] = [Result(WRONG)]
        assert look(run).leftovers == set()
    return results


def kill_one_of_two(campaign: Campaign, count: int, seed: int) -> list[Result]:
    """Kill one of two processes, each in turn, in a save until `count` kills hit, and let each run come to its end.

    The other one leaves by itself. Whether a kill hit is seen when it is made: process 0 may clean up what process 1
    leaves unfinished.
    """
    chances, results = random.Random(f"{seed} of two"), []
    while len(results) < count:
        run, hit, codes = campaign.new_run((slow_saves,)), False, None
        while codes != [0, 0]:
            found = look(run)
            if is_last := len(results) + hit >= count:
                run.faults = ()
            several = run.start_two(*campaign.args, *() if is_last else ("--peer-timeout-s", "20"))
            victim = (seed + len(results) + hit) % 2
            is_hit = not is_last and _kill_in_save(campaign, several, victim, chances)
            ended = several.end()
            codes = [one.code for one in ended]
            if not is_last and codes != [0, 0]:
                assert codes[victim] in (0, -signal.SIGKILL), ended[victim]
                assert codes[1 - victim] in (0, 69, -signal.SIGABRT), ended[1 - victim]
            elif is_last:
                assert codes == [0, 0], ended
            result = judge_start(run, found)
            assert result.lost_steps <= 2 * SAVE_EVERY, result
            if hit:
                results.append(result)
            hit = is_hit
        if not campaign.ended_alike(run, ended[0], campaign.whole_of_two):
            results[-1:] = [Result(WRONG)]
        assert look(run).leftovers == set()
    return results


def _kill(campaign: Campaign, run: FaultyRun, chances: random.Random, *, in_save: bool) -> Ended:
    process = run.start(*campaign.args)
    if in_save:
        _wait_for_save(campaign, run, process, chances, kinds=LEFTOVERS[:2])
    else:
        phase = chances.choice(("import", "data", "compile", "train", "train", "train"))
        far = chances.random()
        if phase != "import":
            run.wait_for_phase(phase, process)
        if phase == "train":
            run.wait_for(lambda: len(run.metrics()) >= far * len(campaign.whole.metrics()), process)
        # The moment is any one in the phase; none of them is waited for, and none may fail.
        time.sleep(chances.uniform(0, 1.0 if phase == "import" else 0.2))
    process.kill()
    return end(process)


def _kill_in_save(campaign: Campaign, several: Several, victim: int, chances: random.Random) -> bool:
    """Kill one of several processes in a save, and tell whether it was in one."""
    _wait_for_save(campaign, several.run, several.processes[0], chances, kinds=LEFTOVERS)
    several.signal(signal.SIGKILL, victim)
    return bool(look(several.run).leftovers) and several.processes[victim].wait() == -signal.SIGKILL


def _wait_for_save(
    campaign: Campaign, run: Run, process: Process, chances: random.Random, kinds: tuple[str, ...]
) -> None:
    """Wait for any moment in a save."""
    far, kind = chances.uniform(0, 0.8), chances.choice(kinds)
    run.wait_for_phase("train", process)
    run.wait_for(lambda: len(run.metrics()) >= far * len(campaign.whole.metrics()), process)
    run.wait_for(lambda: any(kind in name for name in _names(run)), process)
    time.sleep(chances.uniform(0, 0.5))


def slow_saves() -> None:
    """Have each file take its time to the disk, and each old checkpoint to go, so that a kill can come in between."""
    from mnist_jax.checkpoint import integrity

    before(integrity, "fsync_path", lambda path: time.sleep(0.01 * (UNFINISHED in str(path))))
    before(integrity, "remove", lambda path: time.sleep(0.3 * (path.parent.name == "removed")))


# ---- Signals --------------------------------------------------------------------------------------------------------

PHASES = (
    *("the import of JAX", "the loading of the data", "the compilation", "the first step", "mid-training"),
    *("an evaluation", "a periodic save", "the final save", "the save after a first signal"),
)


def stop_in(campaign: Campaign, phase: str, number: signal.Signals, *faults: tuple[Any, ...]) -> list[Result]:
    """Have a run stopped by a signal in a phase, and carry it on: nothing is lost but by a second signal."""
    run = campaign.new_run((signal_in, phase, number), *faults)
    ended = run.finish(*campaign.args)
    is_second, is_over = phase == PHASES[-1], phase == "the final save"
    assert ended.code == (128 + number if is_second else 0), ended
    if not is_second:
        assert ended.last_line.startswith("finished " if is_over else "stopped "), ended.out
        assert is_over or ended.fields["signal"] == number.name
    found = look(run)
    ended = campaign.carry_on(run)
    result = judge_start(run, found)
    assert result.lost_steps <= 2 * SAVE_EVERY * is_second, result
    if not campaign.ended_alike(run, ended):
        return [Result(WRONG)]
    return [result if result.verdict == ANEW or is_over else result._replace(verdict=DETECTED)]


def signal_in(phase: str, number: int) -> None:
    """Have the process send itself a signal in a phase, and in the save that follows upon a first one a second."""

    @cache  # Once; `nth` tells the second one from the first.
    def strike(nth: int = 1) -> None:
        os.kill(os.getpid(), number)

    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "jax":
                strike()

    if phase == "the import of JAX":
        sys.meta_path.insert(0, Finder())
        return

    from mnist_jax.checkpoint import integrity
    from mnist_jax.training import data, dispatch, trainer

    def in_update(*_: Any, step: int, **__: Any) -> None:
        # Calls end at multiples of 7 and of 20: the stop in mid-training is at 80, in the middle of a log interval.
        if step >= {"the first step": 0, "mid-training": 77}.get(phase, 50):
            strike()

    def in_save(directory: Path, step: int, *_: Any) -> None:
        reason = json.loads((directory / "run" / "metadata").read_text())["reason"]
        # A signal that follows too soon is taken for the same wish.
        time.sleep(1.05 if phase == PHASES[-1] and reason.startswith("signal") else 0.05)
        first = {"a periodic save": reason == "steps", "the final save": step == STEPS}
        if phase == PHASES[-1] and reason.startswith("signal"):
            strike(2)
        elif first.get(phase):
            strike()
        time.sleep(0.05)  # This is the thread that saves: let the main one act, with the save unfinished.

    match phase:
        case "the loading of the data":
            before(data, "load", lambda *_, **__: strike())
            before(data, "_unpack", lambda *_: strike())  # where `begin_to_load` begins it
        case "the compilation":
            before(trainer.Trainer, "compile", lambda _: strike())
        case "an evaluation":
            before(dispatch.Dispatcher, "_evaluate", lambda _: strike())
        case "the first step" | "mid-training" | "the save after a first signal":
            before(trainer.Trainer, "advance", in_update)
    before(integrity, "write_manifest", in_save)


# ---- Disks and clocks -----------------------------------------------------------------------------------------------


def endure(campaign: Campaign, run: FaultyRun, *told: str) -> list[Result]:
    """Have a run reach its end in spite of a fault, and tell of it with these events."""
    ended = run.finish(*campaign.args)
    if not campaign.ended_alike(run, ended):
        return [Result(WRONG)]
    assert {record["event"] for record in run.events()} >= set(told), run.events()
    assert not look(run).leftovers or "removal_failed" in told
    return [Result(DETECTED if told else HARMLESS)]


def end_of_fault(campaign: Campaign, run: FaultyRun, cure: Callable[[], object] = lambda: None) -> list[Result]:
    """Have a run end with 74 and name its newest checkpoint, from which it is carried on when the fault is gone."""
    ended = run.finish(*campaign.args)
    assert ended.code == 74, ended
    assert f"The newest checkpoint is of step {run.steps()[-1]}." in ended.err
    assert not look(run).leftovers, look(run).leftovers
    cure()
    found = look(run)
    ended = campaign.carry_on(run)
    result = judge_start(run, found)
    assert result.verdict != HARMLESS, "nothing was told"
    return [result if campaign.ended_alike(run, ended) else Result(WRONG)]


def fill_disk(campaign: Campaign, *, is_freed: bool) -> list[Result]:
    """Have a real disk full from the save of step 60 on: to that of step 100, or to the end."""
    with small_disk(campaign.root) as disk:
        ballast = disk / "ballast"
        run = campaign.new_run((full_disk, str(ballast), 60, 100 if is_freed else None), within=disk)
        return endure(campaign, run, "save_failed") if is_freed else end_of_fault(campaign, run, cure=ballast.unlink)


class CannotMount(Exception):
    """This process may not mount a disk."""


@contextmanager
def small_disk(root: Path) -> Iterator[Path]:
    """Mount a disk of 24 MB, on which about ten checkpoints fit."""
    disk = Path(tempfile.mkdtemp(dir=root))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        raise CannotMount(mounted.stderr.strip())
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def lose_run_directory(campaign: Campaign, *, is_replaced: bool) -> list[Result]:
    """Remove a run's directory under it: it ends with 74, and leaves alone what somebody puts in that place."""
    run = campaign.new_run((removed, "run", 60, is_replaced))
    ended = run.finish(*campaign.args)
    assert ended.code == 74, ended
    assert f"{run.workdir} was " in ended.err
    left = [path.name for path in run.workdir.parent.rglob("*")]
    assert left == (["run", "of another"] if is_replaced else []), left
    return [Result(DETECTED)]


def full_disk(ballast: str, first: int, last: int | None) -> None:
    """Fill the disk up at the save of step `first`, and free it again at that of step `last`."""

    def change(step: int, _directory: Path) -> None:
        if step == first:
            fill(Path(ballast))
        elif step == last:
            Path(ballast).unlink(missing_ok=True)

    before_saves(change)


def fill(ballast: Path) -> None:
    """Fill a small disk up; a larger one, for somebody may have unmounted the small one, by no more than 64 MB."""
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        while file.tell() < 2**26:
            file.write(bytes(4096))


def failing(part: str, number: int, steps: list[int]) -> None:
    """Have a part of the saves of some steps fail with an error number."""
    name, is_it = (FALLIBLE | REMOVAL)[part]
    owner, saving = resolve_name(name.rpartition(".")[0]), [-1]

    def fail(*args: Any, **options: Any) -> None:
        if saving[-1] in steps and is_it(*args, **options):
            raise OSError(number, os.strerror(number))

    before(owner, name.rpartition(".")[2], fail)
    before_saves(lambda step, _: saving.append(step))


def removed(what: str, at_step: int, is_replaced: bool = False) -> None:
    """Remove the checkpoints, or the whole run, at the save of a step, and maybe put something of another there."""

    def remove(step: int, directory: Path) -> None:
        if step == at_step and directory.exists():
            path = directory if what == "checkpoints" else directory.parent
            shutil.rmtree(path)
            if is_replaced:
                path.mkdir()
                (path / "of another").touch()

    before_saves(remove)


SHORTAGES = ("files", "threads", "memory")


def short_at_restore(kind: str) -> None:
    """Let this process have no more files, threads or memory than it has when it begins to restore."""
    from mnist_jax.checkpoint.checkpointer import Checkpointer

    before(Checkpointer, "restore", lambda *_, **__: limit(kind))


def short_at_saves(kind: str, steps: list[int]) -> None:
    """Let this process have no more files, threads or memory than it has at the saves of some steps."""
    before_saves(lambda step, _: limit(kind if step in steps else None))


def limit(kind: str | None) -> None:
    """Set the soft limit of a resource to what is in use, and those of the others to their hard limits.

    There are 4 MB of memory more: where not even a thread that has started finds the bytes that it needs to say so,
    `Thread.start` of CPython 3.11 waits for ever.
    """
    numbers = (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_AS)
    for number in numbers:
        hard = resource.getrlimit(number)[1]
        resource.setrlimit(number, (hard, hard))
    descriptor = os.dup(1)  # the lowest that is free
    os.close(descriptor)
    memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**22
    used = dict(zip(SHORTAGES, zip(numbers, (descriptor, 1, memory), strict=True), strict=True))
    if kind is not None:
        number, soft = used[kind]
        resource.setrlimit(number, (soft, resource.getrlimit(number)[1]))


def clock_set_back(at_step: int) -> None:
    """Set the clock back by a day at the save of a step."""
    now = time.time

    def set_back(step: int, _directory: Path) -> None:
        if step == at_step:
            time.time = lambda: now() - 86_400

    before_saves(set_back)


# ---- Crowds ---------------------------------------------------------------------------------------------------------


def crowd(campaign: Campaign, size: int, *, is_first_killed: bool = False) -> list[Result]:
    """Start many processes in one directory at once: one works at a time, others wait or leave with 73.

    Half of them do not wait. Where the first to work is killed, all others wait, and one carries on what it began.
    """
    from mnist_jax.checkpoint.checkpoint import list_checkpoints
    from mnist_jax.runtime.lock import holder

    run = campaign.new_run(*((slow_saves,),) * is_first_killed)
    hasty = () if is_first_killed else ("--lock-wait-s", "0")
    processes = [run.start(*campaign.args, *hasty * (number % 2)) for number in range(size)]
    if is_first_killed:
        assert run.wait_for(lambda: any(e.get("phase") == "train" for e in run.events()), processes[0])
        at_work = holder(run.workdir)
        [first] = [process for process in processes if at_work and process.pid == at_work.pid]
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
    if not all(campaign.ended_alike(run, ended) for ended in finished):
        return [Result(WRONG)] * size
    lost_steps = max((record.get("lost_steps", 0) for record in run.events()), default=0)
    assert all("is in use by process" in ended.err for ended in all_ended if ended.code == 73)
    return [Result(DETECTED, lost_steps) if "is in use by" in ended.err else Result(HARMLESS) for ended in all_ended]


# ---- The driven command ---------------------------------------------------------------------------------------------


def drive(faults: str, args: list[str]) -> int:
    """Be the training command, with faults that are built in when its signals are caught and before JAX is imported."""
    from mnist_jax import train

    def build_in(*_: object) -> None:
        for name, *details in json.loads(faults):
            globals()[name](*details)

    before(train, "initialize", build_in)
    return train.main(args)


def before(owner: Any, name: str, action: Callable[..., object]) -> None:
    """Have something done before each call of a function, with the same arguments."""
    function = getattr(owner, name)

    @wraps(function)
    def both(*args: Any, **options: Any) -> Any:
        action(*args, **options)
        return function(*args, **options)

    setattr(owner, name, both)


def before_saves(action: Callable[..., object]) -> None:
    """Have something done before each save, when those before it have ended: `action(step, directory)`."""
    from mnist_jax.checkpoint.checkpointer import Checkpointer

    def act(checkpointer: Any, step: int, *_: object, **__: object) -> None:
        checkpointer.wait()
        action(step, checkpointer.directory)

    before(Checkpointer, "save", act)


# ---- The campaign ---------------------------------------------------------------------------------------------------

Job = Callable[[], list[Result]]


def faults(campaign: Campaign, n: int) -> dict[str, list[Job]]:
    """Return the jobs of each fault: `n` bit flips, and of the others in proportion."""
    rounds, tenth, kills = max(1, 3 * n // 1000), max(1, n // 10), max(5, n // 5)
    counts = {"bit flip, each bit alike": n - n // 2, "bit flip, each file alike": n // 2}
    killed_of_two = max(2, 3 * n // 100)
    back, last = (clock_set_back, 40), list(range(60, STEPS + 1))
    parts = list(itertools.product(FALLIBLE, (errno.ENOSPC, errno.EIO, errno.EACCES)))

    def kill(count: int, *, in_save: bool) -> list[Job]:  # five times a job, one after another
        return [
            partial(kill_again_and_again, campaign, min(5, count - first), first, in_save=in_save)
            for first in range(0, count, 5)
        ]

    def lasting(*fault: Any, told: tuple[str, ...]) -> Job:
        return lambda: endure(campaign, campaign.new_run(fault), *told)

    def final(*fault: Any) -> Job:
        return lambda: end_of_fault(campaign, campaign.new_run(fault))

    return {
        **{harm: [partial(damage, campaign, harm, n) for n in range(counts.get(harm, tenth))] for harm in DAMAGE},
        "SIGKILL at any moment": kill(kills - 2 * kills // 5, in_save=False),
        "SIGKILL in a save": kill(2 * kills // 5, in_save=True),
        "SIGKILL of one of two in a save": [
            partial(kill_one_of_two, campaign, min(5, killed_of_two - first), first)
            for first in range(0, killed_of_two, 5)
        ],
        **{
            f"signal in {phase}": [partial(stop_in, campaign, phase, number) for number in STOP_SIGNALS * rounds]
            for phase in PHASES
        },
        "full disk, freed in time": [partial(fill_disk, campaign, is_freed=True)],
        "full disk to the end": [partial(fill_disk, campaign, is_freed=False)],
        "some saves fail": [lasting(failing, *part, [40, 60, 80], told=("save_failed",)) for part in parts],
        "all saves fail from one on": [final(failing, *part, last) for part in parts],
        "old checkpoints stay": [
            lasting(failing, part, errno.EBUSY, ALL_SAVES, told=("removal_failed",)) for part in REMOVAL
        ],
        "checkpoints removed": [lasting(removed, "checkpoints", n, told=("checkpoints_vanished",)) for n in (60, 80)],
        "run directory removed": [partial(lose_run_directory, campaign, is_replaced=there) for there in (False, True)],
        "clock set back": [lasting(*back, told=()), partial(stop_in, campaign, "mid-training", signal.SIGTERM, back)],
        **{
            f"{size} processes at once": [
                partial(crowd, campaign, size, is_first_killed=dies) for dies in (False, True)
            ]
            for size in (2, 10)
        },
    }


class Row(NamedTuple):
    """What became of the faults of one kind; `broken` are the promises that were broken."""

    fault: str
    results: list[Result]
    broken: list[str]

    def cells(self) -> list[int]:
        """Return the numbers of the table."""
        verdicts = [result.verdict for result in self.results]
        most = max((result.lost_steps for result in self.results), default=0)
        injected = len(verdicts) + len(self.broken)
        return [injected, *map(verdicts.count, (DETECTED, HARMLESS)), most, *map(verdicts.count, (WRONG, ANEW))]

    @property
    def is_good(self) -> bool:
        """Whether all faults were survived."""
        return not self.broken and all(result.is_survived for result in self.results)


def run_row(campaign: Campaign, fault: str, jobs: list[Job]) -> Row:
    """Do the jobs, and tell on one line how it went."""
    row, started_s = Row(fault, [], []), time.monotonic()

    def do(job: Job) -> None:
        try:
            row.results.extend(job())
        except CannotMount as error:
            print(f"{fault}: not injected, for a small disk cannot be mounted here: {error}")
        except Exception:  # Told below the table, and the exit code is 1; the other faults still get their turn.
            row.broken.append(traceback.format_exc())

    # Restores are of this process, and a crowd is large enough.
    with ThreadPoolExecutor(1 if fault in DAMAGE or "at once" in fault or "of two" in fault else 2) as pool:
        list(pool.map(do, jobs))
    shutil.rmtree(campaign.runs, ignore_errors=True)  # Hundreds of runs would take gigabytes.
    word = "survived" if row.is_good else "NOT ALL SURVIVED"
    print(f"{fault}: {len(row.results)} {word}, {time.monotonic() - started_s:.0f} s", flush=True)
    return row


def print_table(rows: list[Row]) -> None:
    """Print the table, and below it what is wrong besides."""
    heads = ("fault", "injected", DETECTED, HARMLESS, "most steps lost", WRONG, ANEW)
    print("\n" + "  ".join([f"{heads[0]:<40}", *heads[1:]]))
    for row in rows:
        numbers = (f"{number:>{len(head)}}" for number, head in zip(row.cells(), heads[1:], strict=True))
        print("  ".join([f"{row.fault:<40}", *numbers]))
    for row in rows:
        for broken in row.broken:
            print(f"\n{row.fault}: a promise was broken\n{broken}")


def main(args: list[str]) -> int:
    """Run the campaign, and return 1 where a fault was not survived."""
    if args[:1] == ["drive"]:
        from mnist_jax import train

        train.exit_process(drive(args[1], args[2:]))
    # Under a shell's `&` and `nohup` these are ignored, also in the processes that are started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with tempfile.TemporaryDirectory(prefix="faults-") as root:
        campaign = prepare(Path(root), {"HOME": root, "XDG_CACHE_HOME": root})
        rows = [run_row(campaign, *row) for row in faults(campaign, int(args[0]) if args else 1000).items()]
    print_table(rows)
    return 0 if all(row.is_good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
