"""Our training as a worker: `python -m benchmarks.ours`, with the flags of `python -m mnist_jax.train`."""

import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks.processes import serve
from mnist_jax import config as configs
from mnist_jax import data, loop, provenance
from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.journal import Journal, Terminal
from mnist_jax.keeper import Copies, Keeper
from mnist_jax.peers import Peers
from mnist_jax.preemption import StopSignal
from mnist_jax.training import Training


def main(args: Sequence[str]) -> None:
    """Make what `loop.run` and `loop.train` make for a run, and train when told to."""
    gc.freeze()  # as `train.py` does after its imports
    provenance.prepare_jax(None)
    config = configs.parse(args)
    dataset = data.load(config.dataset, config.data_dir, say=print)
    blueprint = loop.make_blueprint(config, dataset)
    programs = blueprint.compile()
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        journal, store = Journal(workdir), Checkpointer(workdir / "checkpoints", keep=config.keep)
        stop = StopSignal()
        training = Training(blueprint, programs, dataset, blueprint.create(), stop, Peers(stop), is_evaluated=True)
        copies = Copies(None, workdir, store, journal)
        keeper = Keeper(training, store, journal, Terminal(), copies, provenance.describe_environment())
        store.prepare(training.updates.state)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(training.updates.state.params))
        commands = {"train": train, "train_and_save": train_and_save, "save": save}
        serve({"parameters": parameters}, {name: partial(command, keeper) for name, command in commands.items()})
        store.close()
        journal.close()


def train(keeper: Keeper, seconds: float, *, saves: bool = False) -> dict[str, Any]:
    """Train for a while, and return how many updates that were, and how long they took."""
    first, start_s = keeper.step, time.monotonic()
    if saves:
        loop.save(keeper.training, keeper.store, keeper, "benchmark")
    while time.monotonic() - start_s < seconds:
        keeper.interval(keeper.training.advance())
        keeper.report_saves()
    keeper.training.pace.drain()  # Otherwise the pause that follows would count as the time of the calls in flight.
    return {"steps": keeper.step - first, "seconds": time.monotonic() - start_s}


def train_and_save(keeper: Keeper, seconds: float) -> dict[str, Any]:
    """Train as `train` does, with a save at the beginning."""
    return train(keeper, seconds, saves=True)


def save(keeper: Keeper, count: float) -> dict[str, Any]:
    """Save some times amid the training, and return how long it had to wait for each."""
    waits_s = []
    while len(waits_s) < count:
        keeper.interval(keeper.training.advance())
        if not keeper.store.is_saving:
            keeper.report_saves()
            if keeper.training.has_sums_in_flight:
                continue
            start_s = time.perf_counter()
            loop.save(keeper.training, keeper.store, keeper, "time")
            waits_s.append(time.perf_counter() - start_s)
    keeper.training.pace.drain()
    return {"waits_s": waits_s}


if __name__ == "__main__":
    main(sys.argv[1:])
