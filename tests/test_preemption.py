import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mnist_jax.runtime.preemption import SAVE_SIGNALS, STOP_SIGNALS, StoppedError, StopSignal


@pytest.fixture
def stop():
    with StopSignal() as stop:
        yield stop


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_stop_signal_sets_the_flag(stop, number):
    stop.check()
    send(number)
    assert stop.received is number
    assert not stop.pop_save_request()
    with pytest.raises(StoppedError):
        stop.check()


@pytest.mark.parametrize("number", SAVE_SIGNALS)
def test_save_signal_does_not_stop(stop, number):
    send(number)
    send(number)
    assert stop.received is None
    assert stop.pop_save_request()
    assert not stop.pop_save_request()


def test_handler_takes_no_lock(stop):
    with threading.Lock():
        send(signal.SIGTERM)
        assert stop.received is signal.SIGTERM


def test_previous_handlers_are_restored():
    before = {number: signal.getsignal(number) for number in (*STOP_SIGNALS, *SAVE_SIGNALS)}
    with StopSignal():
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
    assert {number: signal.getsignal(number) for number in before} == before


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            send(signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# More than one signal

PROGRAM = """
import time
from mnist_jax.runtime.preemption import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    try:
        while True:
            time.sleep(0.01)
            if stop.received: print("first", flush=True); time.sleep(60)
    finally:
        print("unwound", flush=True)
"""


@pytest.mark.parametrize(
    ("first", "second", "after_s"),
    [
        (signal.SIGTERM, signal.SIGINT, 0.05),
        (signal.SIGINT, signal.SIGINT, 0.05),
        (signal.SIGTERM, signal.SIGTERM, 1.05),
    ],
)
def test_second_signal_exits_at_once(first, second, after_s):
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(first)
            assert process.stdout.readline() == "first\n"
            time.sleep(after_s)
            process.send_signal(second)
            assert process.wait(timeout=20) == 128 + second
            assert process.stdout.read() == ""
        finally:
            process.kill()


def test_duplicate_signal_is_ignored(stop):
    """As a scheduler sends it: 12 times later than measured with Slurm."""
    send(signal.SIGTERM)
    send(signal.SIGCONT)
    time.sleep(0.3)
    send(signal.SIGTERM)
    assert stop.received is signal.SIGTERM


def test_signal_of_another_process_is_not_a_first_one(stop):
    stop.record_signal(signal.SIGTERM)
    assert stop.seconds_since is None
    before_s = time.monotonic()
    send(signal.SIGINT)
    time.sleep(0.05)
    assert stop.received is signal.SIGTERM
    assert 0.05 <= stop.seconds_since <= time.monotonic() - before_s


# Work that cannot check the flag


def test_run_returns_the_result_or_raises(stop):
    assert stop.run(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        stop.run(lambda: 1 / 0)


def test_run_abandons_the_work(stop):
    may_end, ended = threading.Event(), threading.Event()

    def work():
        assert may_end.wait(60)
        ended.set()

    threading.Timer(0.1, send, [signal.SIGUSR1]).start()
    with pytest.raises(StoppedError):
        stop.run(work)
    assert stop.received is signal.SIGUSR1
    assert not ended.is_set()
    may_end.set()
    assert ended.wait(60)
    with pytest.raises(StoppedError):
        stop.run(lambda: pytest.fail("a stop was received before"))


def test_run_abandons_a_c_function():
    # hashlib releases the GIL and runs no bytecode for a while, as a compilation does.
    program = """
import hashlib, os
from mnist_jax.runtime.preemption import StoppedError, StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    try:
        stop.run(lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000))
    except StoppedError:
        os._exit(3)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 3
