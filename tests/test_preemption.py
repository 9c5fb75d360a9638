import os
import pty
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


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])  # by `nohup`, in a background job
def test_ignored_signals_stay_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            send(number)
            assert stop.received is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


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


def pair(first: signal.Signals, second: signal.Signals, after_s: float, stdin: int = subprocess.DEVNULL) -> int | None:
    """Send two signals, and return the exit code, None if the process still runs."""
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=stdin, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(first)
            sent_s = time.monotonic()
            assert process.stdout.readline() == "first\n"
            time.sleep(max(0.0, sent_s + after_s - time.monotonic()))
            process.send_signal(second)
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                return None
        finally:
            process.kill()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_signals_within_a_second_are_one_request(second):
    assert pair(signal.SIGINT, second, after_s=0.3) is None


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_request_exits_at_once(second):
    assert pair(signal.SIGTERM, second, after_s=1.1) == 128 + second


def test_cpu_time_signal_is_never_a_second_request():
    assert pair(signal.SIGXCPU, signal.SIGXCPU, after_s=1.1) is None


@pytest.mark.parametrize(("first", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, None)])
def test_second_ctrl_c_at_a_terminal_exits_at_once(first, code):
    controller, terminal = pty.openpty()
    try:
        assert pair(first, signal.SIGINT, after_s=0.2, stdin=terminal) == code
    finally:
        os.close(controller)
        os.close(terminal)


SUPERVISED = """
import hashlib, os, signal, time
from mnist_jax.runtime.preemption import StopSignal
def work():
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) >= {signal.SIGTERM, signal.SIGINT, signal.SIGUSR2}
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)
with StopSignal() as stop:
    stop.supervise(work)
"""


def test_supervised_work_in_c_does_not_delay_the_handlers():
    with subprocess.Popen([sys.executable, "-c", SUPERVISED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(1.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 128 + signal.SIGTERM


def test_supervise_returns_the_result_or_raises(stop):
    assert stop.supervise(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        stop.supervise(lambda: 1 / 0)


BLOCKED = """
import os, signal
from mnist_jax.runtime.preemption import STOP_SIGNALS, StopSignal
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
os.kill(os.getpid(), signal.SIGTERM)
with StopSignal() as stop:
    assert stop.received is signal.SIGTERM
assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
"""


def test_signals_that_the_parent_blocked_are_unblocked():
    subprocess.run([sys.executable, "-c", BLOCKED], check=True)


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
