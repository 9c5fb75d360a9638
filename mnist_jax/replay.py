"""The command `python -m mnist_jax.replay`: train again from one kept checkpoint to a later one, and compare.

It is the proof of exactness on your own machine. It writes nothing.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from mnist_jax import cli
from mnist_jax import config as configs
from mnist_jax.checkpoint.checkpoint import Checkpoint, list_checkpoints
from mnist_jax.checkpoint.integrity import digest_leaves, host_leaves
from mnist_jax.config import ConfigError
from mnist_jax.console import Terminal, exit_process
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import compatibility, data, setup

MAX_STEPS_PER_CALL = 16  # A signal is looked at between calls.


@dataclass(frozen=True)
class Options:
    """Train again between two checkpoints that a run kept, and compare the states."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Directory of the run. Nothing is written there."""
    first: Annotated[
        int | None, tyro.conf.arg(name="from", metavar="STEP", help_behavior_hint="(default: the oldest)")
    ] = None
    """Step to begin from: that of a checkpoint, or 0."""
    last: Annotated[
        int | None, tyro.conf.arg(name="to", metavar="STEP", help_behavior_hint="(default: the newest)")
    ] = None
    """Step of the checkpoint to arrive at."""


def main(args: Sequence[str]) -> int:
    """Replay a stretch of a run, and return the exit code: 0 identical, 1 not identical, others as `cli.run`."""
    options = configs.cli(Options, "replay", args)

    def work(stop: StopSignal, terminal: Terminal) -> int:
        differences = replay(options, stop, terminal)
        lines = ["not identical:", *(f"  {line}" for line in differences)] if differences else ["identical"]
        terminal.info("\n".join(lines))
        return 1 if differences else 0

    return cli.run(work)


def replay(options: Options, stop: StopSignal, terminal: Terminal) -> list[str]:
    """Return a line for each leaf in which the state that is trained again differs from the one that was saved.

    Raises:
        CheckpointError, OSError: a checkpoint cannot be read.
        ConfigError: there are no such checkpoints, or this machine cannot train that run.
        DataError: the data is not there, or is not that of the run.
        StoppedError: a signal came.
    """
    configs.check_directory(options.workdir)
    first, last = choose(options)
    compatibility.prepare_jax(compatibility.cpu_threads_of([last]))
    metadata = compatibility.check_metadata(last.metadata(), last.step)
    config = configs.from_json(metadata["config"], last.path)
    dataset = stop.run(lambda: data.load(config.dataset, config.data_dir, notify=terminal.info))
    compatibility.check_same_run(metadata, config, dataset, where=last.path)
    trainer = setup.make_trainer(config, dataset)
    like = trainer.abstract_state
    wanted = last.read(like)[0]
    compatibility.check_step(last.step, wanted)
    if last.step > trainer.total_steps:
        raise ConfigError(f"step {last.step} is beyond the run's end, step {trainer.total_steps}")
    stop.run(trainer.compile)
    state = first.read(like)[0] if first else stop.run(trainer.init_state)
    compatibility.check_step(first.step if first else 0, state)
    step, device_data = first.step if first else 0, trainer.put(dataset)
    terminal.info(f"training from step {step} to step {last.step} again")
    for change in compatibility.diff_environment(metadata, compatibility.describe_environment()):
        terminal.warn(f"warning: the bits may differ because this changed: {change}")
    while step < last.step:
        n = min(MAX_STEPS_PER_CALL, trainer.next_boundary(step) - step, last.step - step)
        state, _ = trainer.advance(state, device_data, step=step, n=n)
        state.step.block_until_ready()
        step += n
        stop.check()
    return compare(wanted, state)


def choose(options: Options) -> tuple[Checkpoint | None, Checkpoint]:
    """Return the checkpoint to begin from, None for step 0, and the one to arrive at.

    Raises:
        ConfigError: there are no such checkpoints.
    """
    kept = {checkpoint.step: checkpoint for checkpoint in list_checkpoints(options.workdir / "checkpoints")}
    if not kept:
        raise ConfigError(f"there are no checkpoints in {options.workdir}")
    last = max(kept) if options.last is None else options.last
    first = min((step for step in kept if step < last), default=0) if options.first is None else options.first
    steps = ", ".join(map(str, kept))
    for step in {last, first} - {0}:
        if step not in kept:
            raise ConfigError(f"{options.workdir} has no checkpoint of step {step}; there are: {steps}")
    if not first < last:
        raise ConfigError(f"from={first} is not before to={last}; use two of these checkpoints, or from=0: {steps}")
    return kept.get(first), kept[last]


def compare(wanted: Any, found: Any) -> list[str]:
    """Return a line for each leaf of two states whose digests differ: how many values do, and by how much at most."""
    before, after = digest_leaves(wanted), digest_leaves(found)
    wanted_values, found_values = host_leaves(wanted), host_leaves(found)
    return [
        f"leaf {name} differs {_difference(wanted_values[name], found_values[name])}"
        for name in before
        if before[name] != after[name]
    ]


def _difference(wanted: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> str:
    difference = np.abs(found.astype(np.float64) - wanted.astype(np.float64))
    return f"in {np.count_nonzero(difference)} of {difference.size} values, by {difference.max():.3g} at most"


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
