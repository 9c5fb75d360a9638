"""How processes agree. Real processes do so in test_multihost.py."""

import os
import signal
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from mnist_jax.runtime import devices
from mnist_jax.runtime.agreement import Agreement
from mnist_jax.runtime.preemption import StopSignal


@pytest.fixture
def alone():
    with StopSignal() as stop:
        yield Agreement(Mesh(np.asarray(jax.devices()[:1]), (devices.BATCH_AXIS,)), stop)


def test_a_process_that_is_alone_does_at_once_what_it_wishes(alone):
    assert not alone.should_stop
    assert alone.steps_per_call(17) == 17
    assert not alone.pop_save_request()
    alone.request_save()
    assert alone.pop_save_request() == "time"
    assert not alone.pop_save_request()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert alone.pop_save_request() == "signal SIGUSR2"
    assert not alone.pop_save_request()
    os.kill(os.getpid(), signal.SIGTERM)
    assert alone.should_stop


def test_who_fails_asks_to_stop_without_a_signal(alone):
    alone.request_stop()
    assert alone.should_stop


def test_a_process_that_is_alone_sends_nothing(alone):
    assert alone.send(17) is None
    alone.update(None)
    assert alone.steps_per_call(17) == 17


@pytest.fixture
def of_two(alone):
    """The agreement of process 0 of two, whose sums are made here."""
    alone._is_alone = False
    return alone


def total(*rows: Any) -> np.ndarray:
    return np.array(rows, np.int32)


def test_a_request_of_any_process_holds_for_all(of_two):
    of_two.update(total([0, 0, 0, 4], [0, 0, 0, 9]))
    assert not of_two.should_stop
    assert of_two.steps_per_call(17) == 4  # what process 0 proposed
    of_two.update(total([0, 0, 0, 4], [0, 0, 2, 9]))
    of_two.update(total([0, 0, 1, 4], [0, 0, 0, 9]))
    assert of_two.pop_save_request() == "signal SIGUSR2"
    assert of_two.pop_save_request() == ""
    of_two.update(total([0, 0, 0, 4], [1, signal.SIGHUP, 0, 9]))
    of_two.update(total([0, 0, 0, 4], [0, 0, 0, 9]))
    assert of_two.should_stop
    assert of_two._stop.received is signal.SIGHUP
