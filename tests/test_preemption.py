import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mnist_jax.runtime.preemption import SAVE_SIGNALS, STOP_SIGNALS, StoppedError, StopSignal


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_each_stop_signal_sets_the_flag_and_nothing_else(number):
    with StopSignal() as stop:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received is number
        assert not stop.pop_save_request()


@pytest.mark.parametrize("number", SAVE_SIGNALS)
def test_a_save_signal_is_a_request_that_is_taken_once_and_does_not_stop(number):
    with StopSignal() as stop:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.received is None
        assert stop.pop_save_request()
        assert not stop.pop_save_request()


def test_a_look_at_the_flag_raises_what_leaves_the_work():
    with StopSignal() as stop:
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedError):
            stop.check()


def test_how_long_ago_the_signal_came_is_known_to_the_process_that_it_came_to():
    with StopSignal() as stop:
        stop.record_signal(signal.SIGTERM)
        assert stop.seconds_since is None
        before_s = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        assert 0.05 <= stop.seconds_since <= time.monotonic() - before_s


def test_the_handlers_that_were_there_before_are_put_back():
    def mine(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, mine)
    others = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGABRT, signal.SIGUSR1)}
    try:
        with StopSignal():
            assert signal.getsignal(signal.SIGTERM) is not mine
        assert signal.getsignal(signal.SIGTERM) is mine
        assert {number: signal.getsignal(number) for number in others} == others
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("first", "second", "after_s"),
    [
        (signal.SIGTERM, signal.SIGINT, 0.05),
        (signal.SIGTERM, signal.SIGHUP, 0.05),
        (signal.SIGINT, signal.SIGINT, 0.05),
        (signal.SIGTERM, signal.SIGTERM, 1.05),
    ],
)
def test_the_second_stop_signal_ends_the_process_at_once_with_128_plus_its_number(first, second, after_s):
    program = """
import sys, time
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
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
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


def test_one_wish_that_is_delivered_twice_is_one():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGCONT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is signal.SIGTERM


def test_the_same_signal_of_a_scheduler_may_come_again_some_time_later():
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)  # Twelve times what was seen with Slurm.
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is signal.SIGTERM


def test_a_signal_after_one_that_another_process_caught_is_the_first():
    with StopSignal() as stop:
        stop.record_signal(signal.SIGTERM)
        assert stop.received is signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received is signal.SIGTERM


def test_a_hangup_that_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_handler_that_comes_while_locks_are_held_deadlocks_nothing():
    lock = threading.Lock()
    with StopSignal() as stop, lock:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is signal.SIGTERM


def test_run_returns_what_the_work_returns_and_raises_what_it_raises():
    with StopSignal() as stop:
        assert stop.run(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            stop.run(lambda: 1 / 0)


def test_run_is_left_while_the_work_still_goes_on():
    work_may_end, ended = threading.Event(), threading.Event()

    def work():
        work_may_end.wait(10)
        ended.set()

    def send_signal():
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGUSR1)

    with StopSignal() as stop:
        threading.Thread(target=send_signal).start()
        with pytest.raises(StoppedError):
            stop.run(work)
        assert stop.received is signal.SIGUSR1
        assert not ended.is_set()
        work_may_end.set()
        assert ended.wait(60)


def test_run_does_not_begin_when_a_stop_signal_came_before():
    begun = []
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StoppedError):
            stop.run(lambda: begun.append(1))
    assert begun == []


def test_run_in_a_call_of_c_that_python_cannot_interrupt_is_left_as_well():
    # hashlib lets the GIL go and returns to no bytecode for a second or so, as a compilation does.
    program = """
import hashlib, sys, time
from mnist_jax.runtime.preemption import StoppedError, StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    try:
        stop.run(lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000))
    except StoppedError:
        print("left", flush=True)
        import os
        os._exit(3)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 3
        assert process.stdout.read() == "left\n"
