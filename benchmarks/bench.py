"""The size of a benchmark, its dataset, and starts of our own runs."""

import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.images import Images
from benchmarks.processes import ON_CPU, Process
from mnist_jax.records.metrics import read_events

DEADLINE_S = 300
ENDLESS = ("--steps", "200000", "--eval-every-steps", "200000")


class Plan(NamedTuple):
    """Number and length of the measurements."""

    rounds: int = 15
    window_s: float = 2.0
    together_rounds: int = 160  # many short ones: two processes on two cores vary by 10 %
    together_calls: int = 10
    seeds: int = 10
    accurate_seeds: int = 5
    steps: int | None = None  # limit of a training run; None: to its end
    save_rounds: int = 60
    save_window_s: float = 1.0
    saves: int = 100
    stops: int = 100
    resumes: int = 15
    cold_starts: int = 5
    drawings: int = 500


QUICK = Plan(
    rounds=1,
    window_s=0.3,
    together_rounds=1,
    together_calls=3,
    seeds=1,
    accurate_seeds=1,
    steps=3,
    save_rounds=1,
    save_window_s=0.3,
    saves=5,
    stops=3,
    resumes=1,
    cold_starts=1,
    drawings=5,
)


class Bench(NamedTuple):
    """What all rows use."""

    plan: Plan
    images: Images
    folder: Path  # empty at the start; for run directories
    threads: int  # for each contestant
    platform: str = "cpu"  # of the rows in `gpu`

    @property
    def environment(self) -> dict[str, str]:
        """What selects the platform."""
        return ON_CPU if self.platform == "cpu" else {}

    @property
    def length_flags(self) -> tuple[str, ...]:
        """The flags for the length of a training run."""
        return () if self.plan.steps is None else ("--steps", str(self.plan.steps))

    def start(self, workdir: Path, *flags: str, environment: dict[str, str] = ON_CPU) -> Process:
        """Start a run of ours."""
        flags = (*self.images.flags, "--workdir", str(workdir), *flags)
        return Process("mnist_jax.train", *flags, environment=environment)


def wait_for_phase(phase: str, workdir: Path, process: Process) -> float:
    """Wait until the run in `workdir` enters a phase, and return that time, by time.time().

    Raises:
        BenchmarkError: it exited before, or took too long.
    """
    while time.time() < process.start_s + DEADLINE_S:
        has_exited = process.has_exited
        for event in read_events(workdir / "events.jsonl"):
            if event.get("phase") == phase and event["time"] >= process.start_s:
                return event["time"]
        if has_exited:
            break
        time.sleep(0.01)  # Polling faster would slow down what is measured.
    raise process.error(f"did not reach the phase {phase}")
