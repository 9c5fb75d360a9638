"""The agreement of a single process. Several processes agree in test_multihost.py."""

import os
import signal

import jax
import numpy as np
import pytest

from mnist_jax.runtime import devices
from mnist_jax.runtime.agreement import Agreement
from mnist_jax.runtime.preemption import Notice, StopSignal


@pytest.fixture
def stop():
    with StopSignal() as stop:
        yield stop


@pytest.fixture
def agreement(stop):
    return Agreement(devices.make_mesh(devices=jax.devices()[:1]), stop)


def test_single_process_decides_at_once(agreement):
    assert agreement.send(17) is None
    agreement.update(None)
    assert agreement.steps_per_call(17) == 17
    assert not agreement.pop_save_request()
    agreement.request_save()
    assert agreement.pop_save_request() == "time"
    agreement.request_save()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert agreement.pop_save_request() == "signal SIGUSR2"
    assert not agreement.pop_save_request()
    assert not agreement.should_stop
    os.kill(os.getpid(), signal.SIGTERM)
    assert agreement.should_stop


def test_failure_stops_without_a_signal(agreement):
    agreement.request_stop()
    assert agreement.should_stop


@pytest.mark.parametrize(("number", "reason"), [(Notice.AZURE, "azure notice"), (signal.SIGHUP, "SIGHUP")])
def test_reason_of_another_process_stops_this_one(agreement, stop, number, reason):
    agreement.update(np.array([[0, 0, 0, 3], [1, number, 0, 3]]))
    assert stop.reason == reason
    assert agreement.should_stop
