"""Our training as one of several workers that compute together: `python -m benchmarks.ours_together [silent]`.

The flags are those of `python -m mnist_jax.train`. A silent worker tells the others nothing: there is no agreement.
"""

import gc
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.processes import serve
from mnist_jax import config as configs
from mnist_jax import council, data, loop, provenance
from mnist_jax.peers import meet
from mnist_jax.preemption import StopSignal
from mnist_jax.training import Training

STEPS_PER_CALL = 4  # About as many as fit into the time of a call; without agreement no two could choose alike.


def main(args: Sequence[str]) -> None:
    """Make what `loop.train` makes for a run, and train when told to."""
    gc.freeze()  # as `train.py` does after its imports
    if args[0] == "silent":
        args = args[1:]
        abstract_wishes = council.abstract_wishes
        council.abstract_wishes = lambda mesh: abstract_wishes(mesh).update(shape=(mesh.size, 0))
    config = configs.parse(args)
    stop = StopSignal()
    peers = meet(stop, config.coordinator, config.num_processes, config.process_id, config.peer_timeout_s)
    provenance.prepare_jax(None)
    dataset = data.load(config.dataset, config.data_dir, say=print)
    blueprint = loop.make_blueprint(config, dataset)
    training = Training(blueprint, blueprint.compile(), dataset, blueprint.create(), stop, peers, is_evaluated=True)
    serve({}, {"train": partial(train, training)})


def train(training: Training, calls: float) -> dict[str, Any]:
    """Make so many calls, and return how many updates that were, and how long they took."""
    first, start_s = training.step, time.monotonic()
    for _ in range(int(calls)):
        training.pace.steps_per_call = STEPS_PER_CALL
        training.advance()
    training.pace.drain()
    return {"steps": training.step - first, "seconds": time.monotonic() - start_s}


if __name__ == "__main__":
    main(sys.argv[1:])
