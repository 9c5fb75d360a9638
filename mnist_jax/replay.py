"""The command `python -m mnist_jax.replay`: train again from one kept checkpoint to a later one, and compare.

This proves on your machine that resuming is exact. Read-only.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro

from mnist_jax import cli
from mnist_jax import config as configs
from mnist_jax.checkpoint.checkpoint import Checkpoint, list_checkpoints
from mnist_jax.checkpoint.integrity import CheckpointError, digest_leaves, host_leaves
from mnist_jax.config import ConfigError
from mnist_jax.console import Terminal, exit_process
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import compatibility, data, setup
from mnist_jax.training.data import Dataset
from mnist_jax.training.train_state import TrainState
from mnist_jax.training.trainer import Trainer

MAX_STEPS_PER_CALL = 16  # Signals are checked between calls.


@dataclass(frozen=True)
class Options:
    """Train again between two checkpoints of a run, and compare the states."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Directory of the run. Read-only."""
    first: Annotated[
        int | None, tyro.conf.arg(name="from", metavar="STEP", help_behavior_hint="(default: the oldest)")
    ] = None
    """Step to start from: that of a checkpoint, or 0."""
    last: Annotated[
        int | None, tyro.conf.arg(name="to", metavar="STEP", help_behavior_hint="(default: the newest)")
    ] = None
    """Step of the checkpoint to compare with."""


def main(args: Sequence[str]) -> int:
    """Replay part of a run, and return the exit code: 0 identical, 1 not identical, others as `cli.run`."""
    return cli.run(partial(print_differences, cli.parse(Options, "replay", args)))


def print_differences(options: Options, stop: StopSignal, terminal: Terminal) -> int:
    """Print whether the states are identical, and return 1 if they are not."""
    differences = replay(options, stop, terminal)
    terminal.info("\n".join(["not identical:", *differences]) if differences else "identical")
    return 1 if differences else 0


def replay(options: Options, stop: StopSignal, terminal: Terminal) -> list[str]:
    """Return a line for each leaf that differs between the recomputed state and the saved one."""
    configs.check_directory(options.workdir)
    trainer, dataset, state, expected, metadata = read_states(options, stop, terminal)
    stop.run(trainer.compile)
    step, last = (0 if state is None else int(state.step)), int(expected.step)
    state = stop.run(lambda: trainer.init_state()) if state is None else state  # It compiles inside `run`.
    device_data = trainer.put(dataset)
    terminal.info(f"training from step {step} to step {last} again")
    environment = compatibility.describe_environment(fsdp=trainer.config.fsdp)
    for change in compatibility.diff_environment(metadata, environment):
        terminal.warn(f"warning: the bits may differ: {change}")
    while step < last:
        n = min(MAX_STEPS_PER_CALL, trainer.next_boundary(step) - step, last - step)
        state, _ = trainer.advance(state, device_data, step=step, n=n)
        state.step.block_until_ready()
        step += n
        stop.check()
    return compare(expected, state)


class States(NamedTuple):
    """What a replay needs: the state to start from (None for that of the config), and the one to compare with."""

    trainer: Trainer
    dataset: Dataset
    first: TrainState | None
    last: TrainState
    metadata: dict[str, Any]  # of the last one


def read_states(options: Options, stop: StopSignal, terminal: Terminal) -> States:
    """Read two checkpoints. If a running training has removed one meanwhile, choose again.

    Raises:
        CheckpointError: a checkpoint is corrupt, or cannot be read now.
        ConfigError: there is no such checkpoint, or the running training has removed one that was asked for.
    """
    while True:
        checkpoints = list_checkpoints(options.workdir / "checkpoints")
        first, last = choose(options, checkpoints)
        try:
            return _read_states(first, last, stop, terminal)
        except (CheckpointError, OSError) as error:
            left = list_checkpoints(options.workdir / "checkpoints")
            gone = {checkpoint.step for checkpoint in checkpoints if checkpoint not in left}
            if not gone:
                raise
            if asked := sorted(gone & {options.first, options.last}):
                steps = ", ".join(str(checkpoint.step) for checkpoint in left)
                raise ConfigError(
                    f"the running training has removed the checkpoint of step {asked[0]}; use one of {steps}, or train "
                    "with a higher --keep"
                ) from error


def _read_states(first: Checkpoint | None, last: Checkpoint, stop: StopSignal, terminal: Terminal) -> States:
    compatibility.prepare_jax(compatibility.cpu_threads_of([last]))
    metadata = compatibility.check_metadata(last.metadata(), last.step)
    config = configs.from_json(metadata["config"], last.path)
    if first is None and config.init_from is not None:
        raise ConfigError(
            f"the run began with init_from={config.init_from}, and its checkpoint of step 0 is not kept; use --from "
            "with the step of another checkpoint"
        )
    dataset = stop.run(lambda: data.load(config.dataset, config.data_dir, notify=terminal.info))
    compatibility.check_same_run(metadata, config, dataset, where=last.path)
    # Here may be other devices. Then `replay` reports that fsdp has changed.
    config = dataclasses.replace(config, fsdp=math.gcd(config.fsdp, jax.device_count()))
    trainer = setup.make_trainer(config, dataset)
    if last.step > trainer.total_steps:
        raise ConfigError(f"step {last.step} is beyond the run's end, step {trainer.total_steps}")
    state = None if first is None else _read_state(first, trainer)
    return States(trainer, dataset, state, _read_state(last, trainer), metadata)


def _read_state(checkpoint: Checkpoint, trainer: Trainer) -> TrainState:
    state: TrainState = checkpoint.read(trainer.abstract_state)[0]
    compatibility.check_step(checkpoint.step, state)
    return state


def choose(options: Options, checkpoints: Sequence[Checkpoint]) -> tuple[Checkpoint | None, Checkpoint]:
    """Return the checkpoint to start from (None for step 0) and the one to compare with."""
    kept = {checkpoint.step: checkpoint for checkpoint in checkpoints}
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


def compare(expected: Any, found: Any) -> list[str]:
    """Return a line for each leaf with different bits: how many values differ, and the largest difference."""
    expected_digests, found_digests = digest_leaves(expected), digest_leaves(found)
    expected_values, found_values = host_leaves(expected), host_leaves(found)
    lines = []
    for name, digest in expected_digests.items():
        if found_digests[name] != digest:
            difference = np.abs(found_values[name].astype(np.float64) - expected_values[name].astype(np.float64))
            count = np.count_nonzero(difference)
            lines.append(
                f"  leaf {name} differs in {count} of {difference.size} values, by {difference.max():.3g} at most"
            )
    return lines


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
