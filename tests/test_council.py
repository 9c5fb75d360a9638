"""What the processes of a run tell each other within the step. Real processes do so in test_peers.py."""

import hashlib
import os
import re
import signal
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from runs import in_new_process

from mnist_jax import council, data, distributed
from mnist_jax.checkpoint.integrity import host_leaves
from mnist_jax.config import Config
from mnist_jax.council import Council
from mnist_jax.preemption import StopSignal
from mnist_jax.programs import Blueprint
from mnist_jax.steps import TrainData

COLLECTIVES = r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("


def train_and_tell(width: int) -> dict[str, Any]:
    """Train on two devices whose processes tell each other so many numbers, and return what is computed and how."""
    distributed.keep_compiled_programs()
    dataset, mesh = data.load("digits", say=print), distributed.data_mesh()
    abstract = council.abstract_wishes(mesh).update(shape=(2, width))
    council.abstract_wishes = lambda _: abstract
    config = Config(model="cnn", dataset="digits", batch_size=32)
    source = Blueprint(config, 100, len(dataset.train_labels), len(dataset.test_labels), mesh)
    programs = source.compile()
    everywhere = distributed.replicated(mesh)
    images, labels = (distributed.put(x, everywhere) for x in (dataset.train_images, dataset.train_labels))
    training = TrainData(images, labels, programs.epoch_order(np.int32(0)))
    wishes = jax.device_put(np.arange(2 * width, dtype=np.int32).reshape(2, width), abstract.sharding)
    state, sums, heard = programs.train_steps(source.create(), training, np.int32(3), wishes)
    tests = (distributed.put(x, everywhere) for x in (dataset.test_images, dataset.test_labels))
    tested, _, heard_in_test = programs.evaluate(state.variables, *tests, np.int32(0), wishes)
    bits = b"".join(leaf.tobytes() for _, leaf in sorted(host_leaves((state, sums, tested)).items()))
    return {
        "collectives": [
            sorted(re.findall(COLLECTIVES, program.as_text())) for program in (programs.train_steps, programs.evaluate)
        ],
        "sha256": hashlib.sha256(bits).hexdigest(),
        "heard": [np.asarray(heard).tolist(), np.asarray(heard_in_test).tolist()],
    }


def test_to_tell_each_other_something_takes_no_collective_and_changes_no_bit_of_the_training(environment):
    two = {**environment, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    telling, silent = (in_new_process(train_and_tell, width, **two) for width in (8, 0))
    assert silent["collectives"] == [["all-reduce"] * 2] * 2  # of whole numbers and of the others
    assert telling["collectives"] == silent["collectives"]
    assert telling["sha256"] == silent["sha256"]
    assert telling["heard"] == [[8, 10, 12, 14, 16, 18, 20, 22]] * 2  # 0 to 7 on one device, 8 to 15 on the other
    assert silent["heard"] == [[], []]


@pytest.fixture
def alone():
    with StopSignal() as stop:
        yield Council(Mesh(np.asarray(jax.devices()[:1]), (distributed.BATCH_AXIS,)), stop)


def test_a_process_that_is_alone_does_at_once_what_it_wishes(alone):
    assert not alone.is_to_stop
    assert alone.steps(17) == 17
    assert not alone.take_save_request()
    alone.ask_to_save()
    assert alone.take_save_request() == "time"
    assert not alone.take_save_request()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert alone.take_save_request() == "signal SIGUSR2"
    assert not alone.take_save_request()
    os.kill(os.getpid(), signal.SIGTERM)
    assert alone.is_to_stop


def test_who_fails_asks_to_stop_without_a_signal(alone):
    alone.ask_to_stop()
    assert alone.is_to_stop


def test_a_process_that_is_alone_tells_nothing_and_its_wishes_cost_nothing(alone):
    wishes = alone.wishes(17)
    assert wishes.shape == (1, 0)
    assert alone.wishes(3) is wishes
    alone.hear(wishes)
    assert alone.steps(17) == 17
