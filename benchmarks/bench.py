"""How much is measured of everything, on which images, and our own runs."""

import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.images import Images
from benchmarks.processes import ON_CPU, Process
from mnist_jax.records.metrics import read_events

DEADLINE_S = 300
ENDLESS = ("--steps", "200000", "--eval-every-steps", "200000")


class Plan(NamedTuple):
    """How often, and how long."""

    rounds: int = 15
    window_s: float = 2.0
    together_rounds: int = 160  # many and short ones: how two processes take turns on two cores scatters by a tenth
    together_calls: int = 10
    seeds: int = 10
    accurate_seeds: int = 5
    steps: int | None = None  # of the trainings that otherwise go to their end
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
    """What a row needs to know."""

    plan: Plan
    images: Images
    folder: Path  # an empty one, for the runs
    threads: int  # as many for each contestant

    @property
    def to_the_end(self) -> tuple[str, ...]:
        """The flags of a training that makes all its steps, or those of a trial."""
        return () if self.plan.steps is None else ("--steps", str(self.plan.steps))

    def start(self, workdir: Path, *flags: str, environment: dict[str, str] = ON_CPU) -> Process:
        """Start a training of ours."""
        flags = (*self.images.flags, "--workdir", str(workdir), *flags)
        return Process("mnist_jax.train", *flags, environment=environment)


def wait_for_phase(phase: str, workdir: Path, process: Process) -> float:
    """Wait until the training in `workdir` has come to a phase, and return when that was, by time.time().

    Raises:
        Failed: it ended before, or took too long.
    """
    while time.time() < process.start_s + DEADLINE_S:
        has_ended = process.has_ended
        for event in read_events(workdir / "events.jsonl"):
            if event.get("phase") == phase and event["time"] >= process.start_s:
                return event["time"]
        if has_ended:
            break
        time.sleep(0.01)  # A closer look would take time from what is measured.
    raise process.failed(f"did not come to the phase {phase}")
