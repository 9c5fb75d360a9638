"""Our training as a worker: `python -m benchmarks.ours`, with the flags of `python -m mnist_jax.train`."""

import gc
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks.processes import serve
from mnist_jax import cli
from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.runtime.multihost import ProcessGroup
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import compatibility, data, loop, setup
from mnist_jax.training.dispatch import Dispatcher
from mnist_jax.training.recorder import Recorder


def main(args: Sequence[str]) -> None:
    """Prepare a run as `loop.run` and `loop.train_and_evaluate` do, and train on request."""
    gc.freeze()  # as in `train.py`
    compatibility.prepare_jax(None)
    config = replace(cli.parse_config(args), preemption_notice="none")  # It would ask the network.
    dataset = data.load(config.dataset, config.data_dir, notify=print)
    trainer = setup.make_trainer(config, dataset)
    trainer.compile()
    with tempfile.TemporaryDirectory() as folder:
        workdir, stop = Path(folder), StopSignal()
        checkpointer = Checkpointer(workdir / "checkpoints", keep=config.keep)
        recorder = Recorder(config, workdir, checkpointer, stop=stop, enabled=True)
        state = trainer.init_state()
        checkpointer.prepare(state)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        dispatcher = Dispatcher(trainer, dataset, state, stop=stop, group=ProcessGroup(stop), is_evaluated=True)
        recorder.start_training(dispatcher, compatibility.describe_environment())
        commands = {"train": train, "train_and_save": train_and_save, "save": save}
        serve({"parameters": parameters}, {name: partial(command, recorder) for name, command in commands.items()})
        checkpointer.close()
        recorder.close()


def train(recorder: Recorder, seconds: float, *, saves: bool = False) -> dict[str, Any]:
    """Train for some seconds, and return the number of updates and their duration."""
    first, start_s = recorder.dispatcher.step, time.monotonic()
    if saves:
        loop.save(recorder.dispatcher, recorder.checkpointer, recorder, "benchmark")
    while time.monotonic() - start_s < seconds:
        recorder.write_train_metrics(recorder.dispatcher.advance())
        recorder.report_saves()
    # Otherwise the pause that follows counts as time of the calls in flight.
    recorder.dispatcher.queue.drain()
    return {"steps": recorder.dispatcher.step - first, "seconds": time.monotonic() - start_s}


def train_and_save(recorder: Recorder, seconds: float) -> dict[str, Any]:
    """Train as `train` does, with a save at the start."""
    return train(recorder, seconds, saves=True)


def save(recorder: Recorder, count: float) -> dict[str, Any]:
    """Save repeatedly during training, and return how long each save blocks it."""
    waits_s: list[float] = []
    while len(waits_s) < count:
        recorder.write_train_metrics(recorder.dispatcher.advance())
        if not recorder.checkpointer.is_saving:
            recorder.report_saves()
            if recorder.dispatcher.has_sums_in_flight:
                continue
            start_s = time.perf_counter()
            loop.save(recorder.dispatcher, recorder.checkpointer, recorder, "time")
            waits_s.append(time.perf_counter() - start_s)
    recorder.dispatcher.queue.drain()
    return {"waits_s": waits_s}


if __name__ == "__main__":
    main(sys.argv[1:])
