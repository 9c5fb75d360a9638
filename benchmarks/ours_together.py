"""Our training as one process of a group: `python -m benchmarks.ours_together [silent]`.

The flags are those of `python -m mnist_jax.train`. With `silent` there is no agreement.
"""

import gc
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.processes import serve
from mnist_jax import cli
from mnist_jax.runtime.agreement import Agreement
from mnist_jax.runtime.multihost import initialize
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import compatibility, data, setup
from mnist_jax.training.dispatch import Dispatcher

STEPS_PER_CALL = 4  # about as many as fit into a call; without agreement it must be fixed


def main(args: Sequence[str]) -> None:
    """Prepare a run as `loop.train_and_evaluate` does, and train on request."""
    gc.freeze()  # as in `train.py`
    if args[0] == "silent":
        args = args[1:]
        # There is no flag for this: a run without agreement could not stop.
        Agreement.send = lambda *_: None  # type: ignore[method-assign]
        Agreement.steps_per_call = lambda _, proposed: proposed  # type: ignore[method-assign, assignment]
    config = cli.parse_config(args)
    stop = StopSignal()
    group = initialize(
        stop,
        config.coordinator,
        count=config.num_processes,
        index=config.process_id,
        timeout_s=config.peer_timeout_s,
        notify=print,
    )
    compatibility.prepare_jax(None)
    dataset = data.load(config.dataset, config.data_dir, notify=print)
    trainer = setup.make_trainer(config, dataset)
    trainer.compile()
    dispatcher = Dispatcher(trainer, dataset, trainer.init_state(), stop=stop, group=group, is_evaluated=True)
    serve({}, {"train": partial(train, dispatcher)})


def train(dispatcher: Dispatcher, calls: float) -> dict[str, Any]:
    """Make some calls, and return the number of updates and their duration."""
    first, start_s = dispatcher.step, time.monotonic()
    for _ in range(int(calls)):
        dispatcher.queue.steps_per_call = STEPS_PER_CALL
        dispatcher.advance()
    dispatcher.queue.drain()
    return {"steps": dispatcher.step - first, "seconds": time.monotonic() - start_s}


if __name__ == "__main__":
    main(sys.argv[1:])
