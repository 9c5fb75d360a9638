"""A process of a layout, so many processes of so many devices: what it sees of checkpoints that other layouts wrote."""

import json
import sys
from pathlib import Path
from typing import Any

import jax

from mnist_jax import config as configs
from mnist_jax import data, loop
from mnist_jax.checkpoint import Checkpoint, describe_leaves, host_leaves
from mnist_jax.peers import meet
from mnist_jax.preemption import StopSignal


def on_each_device(tree: Any) -> list[Any]:
    """Return the copies of a tree on the devices of this process."""
    return [
        jax.tree.map(lambda leaf, number=number: leaf.addressable_shards[number].data, tree)
        for number in range(jax.local_device_count())
    ]


def main(coordinator: str, count: str, index: str, *paths: str) -> None:
    """Print of each checkpoint whether each device of this process holds the very bits that were saved."""
    with StopSignal() as stop:
        peers = meet(stop, coordinator or None, int(count), int(index), timeout_s=60)
        results = []
        for path in map(Path, paths):
            checkpoint = Checkpoint(path)
            config = configs.from_json(checkpoint.manifest()["about"]["config"], path)
            blueprint = loop.make_blueprint(config, data.load(config.dataset, say=print))
            tree, manifest = checkpoint.read(blueprint.abstract_state)
            copies = [describe_leaves(host_leaves(copy)) for copy in on_each_device(tree)]
            results.append([copy == manifest["leaves"] for copy in copies])
        print(json.dumps({"devices": jax.device_count(), "processes": jax.process_count(), "same": results}))
        peers.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
