"""Runs of the command as a user starts them: real processes, real signals, and the files that they leave."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forked
from forked import ForkedProcess, can_fork

from mnist_jax import cli
from mnist_jax.config import MATHEMATICS, PRESETS, Config
from mnist_jax.console import print_stderr
from mnist_jax.records.metrics import read_events
from mnist_jax.runtime.multihost import ProcessGroup
from mnist_jax.runtime.preemption import StopSignal

DEADLINE_S = 120
# The usual small run: a model that compiles fast, and a constant learning rate, so that runs of any length share their
# compiled programs. An epoch has 22 steps.
_CHOICES = {"dataset": "digits", "model": "cnn-tiny", "schedule": "constant", "batch_size": 64}
DIGITS = tuple(word for name, value in _CHOICES.items() for word in (f"--{name.replace('_', '-')}", str(value)))
DIGITS_CONFIG: dict[str, Any] = {**PRESETS["fast"], "preset": "fast", **_CHOICES}  # the same for `Config`
AVERAGED = ("--average-decay", "0.9")
SMALL = (
    *(*DIGITS, *AVERAGED, "--steps", "40", "--keep", "9"),
    *("--log-every-steps", "10", "--eval-every-steps", "20", "--checkpoint-every-steps", "10"),
)
_MNIST = os.environ.get("MNIST_DIR")
REFERENCE = (
    *(("--data-dir", str(Path(_MNIST).absolute())) if _MNIST else ("--dataset", "digits")),
    *("--steps", "200", "--log-every-steps", "20", "--eval-every-steps", "100", "--checkpoint-every-s", "0.5"),
)
ALL_THREADS = {"PJRT_NPROC": ""}  # variables of a run that uses all cores, unlike most runs of the tests
Process = subprocess.Popen[str] | ForkedProcess


@dataclass
class Run:
    """A run directory, and the environment of the processes that train in it."""

    workdir: Path
    environment: dict[str, str] = field(default_factory=dict)
    faults: tuple[tuple[Any, ...], ...] = ()  # to inject: functions of faults.py and their arguments
    prefix: tuple[str, ...] = ()  # a command that starts the command
    _starts: int = 0  # number of starts before the latest one

    def start(self, *args: str) -> Process:
        """Start the command in this directory."""
        self._starts = len(self.events("start"))
        arguments, environment = ["--workdir", str(self.workdir), *args], {**os.environ, **self.environment}
        faults = json.dumps([(fault.__name__, *details) for fault, *details in self.faults]) if self.faults else None
        # A forked process has imported JAX, so a fault in that import needs a new interpreter.
        if not self.prefix and "import of JAX" not in str(faults) and can_fork(self.environment):
            return ForkedProcess(arguments, environment, faults)
        program = (
            ("-m", "mnist_jax.train") if faults is None else (Path(__file__).with_name("faults.py"), "drive", faults)
        )
        return subprocess.Popen(
            [*self.prefix, sys.executable, *program, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, *args: str) -> "Ended":
        """Run the command to its end."""
        return end(self.start(*args))

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """Return the event log, or the events of one kind, without incomplete lines."""
        return [record for record in read_events(self.workdir / "events.jsonl") if event in (None, record["event"])]

    def metrics(self) -> bytes:
        """Return the bytes of `metrics.jsonl`."""
        return (self.workdir / "metrics.jsonl").read_bytes()

    def lines(self) -> int:
        """Return the number of lines of `metrics.jsonl`."""
        path = self.workdir / "metrics.jsonl"
        return len(path.read_bytes().splitlines()) if path.exists() else 0

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints."""
        return sorted(int(path.name) for path in (self.workdir / "checkpoints").iterdir() if path.name.isdigit())

    def wait_for(self, condition: Callable[[], bool], process: Process) -> bool:
        """Wait for a condition, and return whether it held before the process ended."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            if process.poll() is not None:
                return False
            assert time.monotonic() < deadline, "the condition did not hold in time"
            time.sleep(0.002)
        return True

    def wait_for_phase(self, phase: str, process: Process) -> bool:
        """Wait until the latest start has reached a phase, and return whether it did before it ended."""

        def has_reached() -> bool:
            events = self.events()
            starts = [index for index, record in enumerate(events) if record["event"] == "start"]
            return len(starts) > self._starts and any(e.get("phase") == phase for e in events[starts[-1] :])

        return self.wait_for(has_reached, process)


@dataclass
class Ended:
    """A process that has ended: its exit code and its output."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line on standard output."""
        return self.out.splitlines()[-1]

    @property
    def fields(self) -> dict[str, str]:
        """The fields of the last line."""
        return dict(pair.split("=") for pair in self.last_line.split()[1:])


def end(process: Process, timeout_s: float = DEADLINE_S) -> Ended:
    """Wait for the end of a process."""
    out, err = process.communicate(timeout=timeout_s)
    return Ended(process.returncode, out, err)


def stop(process: Process, number: signal.Signals) -> Ended:
    """Send a signal to a process, and wait for its end."""
    process.send_signal(number)
    return end(process)


def train_here(config: Config, workdir: Path, stop: StopSignal, loading: Any = None) -> int:
    """Train in this process as the command does, and return the exit code."""
    from mnist_jax.training import loop

    try:
        group = ProcessGroup(stop)
        return loop.run(config, workdir, stop=stop, group=group, loading=loading, exit_code=cli.exit_code).exit_code
    except Exception as error:
        cli.report(error, print_stderr, is_training=True)
        return cli.exit_code(error)


def act_at(patch: Any, end: int, action: Callable[[], object]) -> None:
    """Have runs in this process end a call of the train step at a step, and call `action` when it is dispatched."""
    from mnist_jax.training.trainer import Trainer

    next_boundary, advance = Trainer.next_boundary, Trainer.advance

    def advance_and_act(self: Trainer, state: Any, data: Any, *, step: int, n: int) -> Any:
        result = advance(self, state, data, step=step, n=n)
        if step + n == end:
            action()
        return result

    def boundary(self: Trainer, step: int) -> int:
        return min(next_boundary(self, step), end if step < end else self.total_steps)

    patch.setattr(Trainer, "next_boundary", boundary)
    patch.setattr(Trainer, "advance", advance_and_act)


_compiled: dict[Any, Any] = {}  # what the programs depend on -> a trainer that compiled them


def compile_once(compile_: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a `Trainer.compile` that lets trainers with equal programs share what the first of them compiled."""
    from mnist_jax.training.model import MODELS

    def compile_or_share(self: Any) -> None:
        settings = tuple(getattr(self.config, name) for name in MATHEMATICS if name not in ("preset", "init_from"))
        steps = None if self.config.schedule == "constant" else self.total_steps
        sizes = self.train_size, self.test_size, self.image_shape, self.classes
        key = settings, steps, MODELS[self.config.model], self.mesh, sizes
        if key not in _compiled:
            compile_(self)
            _compiled[key] = self
        programs = ("train_steps", "evaluate", "learning_rate", "is_finite")
        vars(self).update({name: vars(_compiled[key])[name] for name in programs})
        if self is not _compiled[key]:
            vars(self)["init_state"] = lambda: _compiled[key].init_state()  # A run that resumes compiles none.

    return compile_or_share


def signal_here(number: signal.Signals = signal.SIGTERM) -> None:
    """Send this process a signal, from the thread that trains."""
    os.kill(os.getpid(), number)
    time.sleep(0.5)  # The main thread handles it, on a busy machine not at once. Until then no call is dispatched.


THREAD_VARIABLES = ("PJRT_NPROC", "NPROC", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")


def in_new_process(function: Callable[..., Any], *arguments: Any, **variables: str) -> Any:
    """Call a function of a test file in a new process, in which JAX is not initialized, and return its result.

    Args:
        function: takes and returns values that can be pickled.
        arguments: its arguments.
        variables: set in the environment, from which `THREAD_VARIABLES` are removed first.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES}
    settings = {name: value for name, value in variables.items() if name.startswith("JAX_")}
    return forked.call(_set_and_call, (settings, function, arguments), {**inherited, **variables})


def _set_and_call(settings: dict[str, str], function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import jax

    for name, value in settings.items():
        if name.lower() in jax.config.values:  # Others are read when they are needed.
            jax.config.update(name.lower(), value)
    return function(*arguments)


def snapshot(directory: Path) -> dict[str, tuple[int, int, str | bytes]]:
    """Return kind, time and content of everything in a directory; links are not followed."""
    found = {}
    for path in (directory, *directory.rglob("*")):
        about, content = path.lstat(), b""
        if stat.S_ISLNK(about.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(about.st_mode):
            content = path.read_bytes()
        found[str(path)] = (about.st_mode, about.st_mtime_ns, content)
    return found
