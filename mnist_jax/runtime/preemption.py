"""Signals, and notices of clouds, that ask a process to stop or to save.

The first signal only sets a flag, and a second request ends the process at once. Work that cannot check the flag runs
in a thread, which `StopSignal.run` abandons when the flag is set.

This file needs nothing else of the package; copy it into your own project.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from enum import IntEnum
from types import FrameType
from typing import Any, Self, TypeVar

STOP_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGABRT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGXCPU,  # the soft limit of CPU time
)
SAVE_SIGNALS = (signal.SIGUSR2,)  # save and continue

# Stop signals within this time after the first are the same request, of whatever kind they are: a supervisor signals a
# process and then its group, Slurm signals the tasks and also `srun`, which forwards the signal, others escalate from
# SIGINT to SIGTERM. A later one is a second request.
REQUEST_S = 1.0
# At a terminal a second Ctrl-C after this time is a second request. Programs that forward Ctrl-C do so within 0.03 s.
DOUBLE_CTRL_C_S = 0.1

T = TypeVar("T")


class Notice(IntEnum):
    """A notice of a cloud that it takes this machine back: a request to stop that is not a signal.

    Processes send each other these numbers where those of signals are, so they are above `signal.NSIG`.
    """

    GCP = 101
    AWS = 102
    AZURE = 103


class StoppedError(Exception):
    """A stop signal or a notice interrupted the work."""


class StopSignal:
    """Receive signals that ask to stop or to save, while a `with` block runs.

        with StopSignal() as stop:
            while step < total_steps and not stop.received:
                state, step = train_step(state), step + 1
            save(state)

    The first stop signal sets `received`; check it between steps. A second request ends the process at once with exit
    code 128+n; signals within `REQUEST_S` after the first belong to the first. A save signal sets another flag, which
    `pop_save_request` reads. The handlers do nothing else, because they can run between any two instructions: in the
    middle of a save, or while a lock is held.

    Enter the block in the main thread, where Python runs signal handlers. Enter it after calls that install handlers of
    their own, such as `jax.distributed.initialize` unless `jax_enable_preemption_service` is off. Signals that the
    parent process blocked are unblocked; SIGINT and SIGHUP stay ignored if they are, as in a background job or under
    `nohup`. The end of the block restores handlers and mask.

    Any thread may call `request`, as `notices.py` does at the notice of a cloud. The signal that the cloud sends some
    seconds later belongs to the same request: only the second signal is a second request.
    """

    def __init__(self, *, exit_at_second: bool = True) -> None:
        """Prepare the handlers; the `with` block installs them.

        Args:
            exit_at_second: whether a second stop signal ends the process; False in a notebook.
        """
        self.received: signal.Signals | Notice | None = None  # the first request to stop
        self.error: Exception | None = None  # set by any thread: what `check` and `run` raise instead of StoppedError
        self._first_s: float | None = None  # when this process caught its first stop signal
        self._requested_s: float | None = None  # when this process was first asked to stop, by a signal or otherwise
        self._caught: set[int] = set()
        self._exit_at_second = exit_at_second
        self._save_requested = False
        self._handlers = {**dict.fromkeys(STOP_SIGNALS, self._on_stop), **dict.fromkeys(SAVE_SIGNALS, self._on_save)}
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers."""
        for number, handler in self._handlers.items():
            if number in (signal.SIGINT, signal.SIGHUP) and signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, handler)
        self._previous_mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, self._handlers)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous handlers and the previous mask."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._previous_mask)

    def _on_stop(self, number: int, _frame: FrameType | None) -> None:
        now_s = time.monotonic()
        self._caught.add(number)
        if self._first_s is None:
            self._first_s = now_s
            self._record_own(number, now_s)
            return
        is_ctrl_c = self._caught == {signal.SIGINT} and os.isatty(0)
        is_second = now_s - self._first_s > (DOUBLE_CTRL_C_S if is_ctrl_c else REQUEST_S)
        if is_second and self._exit_at_second and number != signal.SIGXCPU:  # which comes again every second
            os._exit(128 + number)

    def _on_save(self, _number: int, _frame: FrameType | None) -> None:
        self._save_requested = True

    def record_signal(self, number: int) -> None:
        """Record the number of a stop signal or a notice, also of another process.

        Alone it does not count as the first signal of this process.
        """
        if self.received is None:
            self.received = Notice(number) if number in list(Notice) else signal.Signals(number)

    def request(self, reason: signal.Signals | Notice = signal.SIGTERM) -> None:
        """Request a stop from any thread. It does not count as the first signal of this process."""
        self._record_own(reason, time.monotonic())

    def _record_own(self, number: int, now_s: float) -> None:
        if self._requested_s is None:
            self._requested_s = now_s
        self.record_signal(number)

    @property
    def reason(self) -> str:
        """What requested the stop: the name of a signal, or "gcp notice"."""
        assert self.received is not None
        return f"{self.received.name.lower()} notice" if isinstance(self.received, Notice) else self.received.name

    def check(self) -> None:
        """Raise `error` if it is set, and `StoppedError` if a stop was requested."""
        if self.error is not None:
            raise self.error
        if self.received is not None:
            raise StoppedError

    @property
    def seconds_since(self) -> float | None:
        """Seconds since the first request to this process, None if there was none or only one to another process."""
        return None if self._requested_s is None else time.monotonic() - self._requested_s

    def pop_save_request(self) -> bool:
        """Return whether a save signal was received since the last call."""
        requested, self._save_requested = self._save_requested, False
        return requested

    def supervise(self, work: Callable[[], T]) -> T:
        """Return `work()`, which runs in another thread while the main thread, this one, only handles signals.

        Python runs handlers in the main thread between two of its instructions. A main thread that trains is inside a
        C++ function most of the time, and a handler runs up to 0.1 s after its signal: too late to tell one request
        from two. Here it runs at once. The signals are blocked in the other thread and in all threads that it starts,
        because jaxlib's threads are not safe against signals that another process sends to them.
        """
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._handlers)
        try:
            future = start_in_thread(work)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return future.result()

    def run(self, work: Callable[[], T], *, poll_s: float = 0.05) -> T:
        """Return `work()`, or abandon it as soon as a stop signal is received.

        Use it for long work that cannot check the flag, such as a download or a compilation. The work runs in a thread,
        because Python runs no signal handler while the main thread is inside a C++ function. Abandoned work continues
        in the background, so exit soon, and with `os._exit`: a normal exit would tear the interpreter down under it.

        Raises:
            StoppedError: a stop signal was received before the work was done.
            Exception: `error`, if it is set.
        """
        self.check()
        future = start_in_thread(work)
        while not wait([future], timeout=poll_s).done:
            self.check()
        return future.result()


def block_signals() -> None:
    """Block stop and save signals until a `StopSignal` block is entered. Call it before imports that take long."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {*STOP_SIGNALS, *SAVE_SIGNALS})


def start_in_thread(work: Callable[[], T]) -> "Future[T]":
    """Start `work` in a thread that does not keep the process alive, and return its future."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=f"interruptible {work}").start()
    return future
