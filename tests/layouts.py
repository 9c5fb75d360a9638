"""Layouts, so many processes of so many devices: what they write, and what they see of what others wrote.

`python layouts.py COORDINATOR COUNT INDEX DEVICES.. -- CHECKPOINT..` is a process of one or more layouts.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mnist_jax import data, distributed
from mnist_jax.checkpoint import Checkpoint, CheckpointStore, describe_leaves, host_leaves
from mnist_jax.command import leave
from mnist_jax.config import Config
from mnist_jax.peers import meet
from mnist_jax.preemption import StopSignal
from mnist_jax.programs import Blueprint


def blueprint(devices: int, seed: int = 0) -> Blueprint:
    """Return what a training on the first devices is made from."""
    dataset = data.load("digits", say=print)
    mesh = Mesh(np.asarray(jax.devices()[:devices]), (distributed.BATCH_AXIS,))
    config = Config(model="cnn", dataset="digits", seed=seed)
    return Blueprint(config, 100, len(dataset.train_labels), len(dataset.test_labels), mesh)


def write(directory: str, devices: list[int]) -> list[str]:
    """Save a state of its own for each number of devices, and return where they lie."""
    store = CheckpointStore(directory, keep=len(devices))
    for number in devices:
        store.save_and_wait(number, distributed.one_copy(blueprint(number, seed=number).create()))
    store.close()
    return [str(Path(directory, str(number))) for number in devices]


def on_each_device(tree: Any) -> list[Any]:
    """Return the copies of a tree on the devices of this process."""
    local = range(len(jax.tree.leaves(tree)[0].addressable_shards))
    return [jax.tree.map(lambda leaf, number=number: leaf.addressable_shards[number].data, tree) for number in local]


def same_on_each_device(devices: int, path: str) -> list[bool]:
    """Tell of each device of this process whether it holds the very bits that were saved."""
    tree, manifest = Checkpoint(Path(path)).read(blueprint(devices).abstract_state)
    return [describe_leaves(host_leaves(copy)) == manifest["leaves"] for copy in on_each_device(tree)]


def main(coordinator: str, count: str, index: str, *words: str) -> None:
    """Print for each number of devices and each checkpoint what this process sees."""
    end = words.index("--")
    devices, paths = list(map(int, words[:end])), words[end + 1 :]
    with StopSignal() as stop:
        peers = meet(stop, coordinator or None, int(count), int(index), timeout_s=60)
        same = [[same_on_each_device(number, path) for path in paths] for number in devices]
        print(json.dumps({"processes": jax.process_count(), "devices": jax.device_count(), "same": same}))
        peers.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)  # as the command does: threads of JAX and of the peers may still be at work
