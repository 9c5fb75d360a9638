"""Signals that ask a process to stop or to save.

A handler sets a flag and does nothing else. Work that cannot check the flag runs in a thread, which
`StopSignal.run` abandons when the flag is set.

This file needs nothing else of the package; copy it into your own project.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from types import FrameType
from typing import Any, Self, TypeVar

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGABRT, signal.SIGHUP, signal.SIGUSR1)
SAVE_SIGNALS = (signal.SIGUSR2,)  # save and continue

# A second stop signal within this time belongs to the same request as the first. `timeout` signals a process and then
# its process group, within 20 ms. Slurm signals the tasks of a preempted job and also `srun`, which forwards the
# signal: 3 to 24 ms later, measured nine times on an idle machine. Two SIGINTs are Ctrl-C pressed twice: two requests.
DUPLICATE_S = 0.02
SCHEDULER_DUPLICATE_S = 1.0

T = TypeVar("T")


class StoppedError(Exception):
    """A stop signal interrupted the work."""


class StopSignal:
    """Receive signals that ask to stop or to save, while a `with` block runs.

        with StopSignal() as stop:
            while step < total_steps and not stop.received:
                state, step = train_step(state), step + 1
            save(state)

    The first stop signal sets `received`; check it between steps. A second one ends the process at once with exit code
    128+n, unless it is a duplicate of the first (see `DUPLICATE_S`). A save signal sets another flag, which
    `pop_save_request` reads. The handlers do nothing else, because they can run between any two instructions: in the
    middle of a save, or while a lock is held.

    Enter the block in the main thread, where Python runs signal handlers. Enter it after calls that install handlers of
    their own, such as `jax.distributed.initialize` unless `jax_enable_preemption_service` is off. The end of the block
    restores the previous handlers.
    """

    def __init__(self, *, exit_at_second: bool = True) -> None:
        """Prepare the handlers; the `with` block installs them.

        Args:
            exit_at_second: whether a second stop signal ends the process; False in a notebook.
        """
        self.received: signal.Signals | None = None  # the first stop signal
        self._first: tuple[int, float] | None = None  # the first one that this process caught, and when
        self._exit_at_second = exit_at_second
        self._save_requested = False
        self._handlers = {**dict.fromkeys(STOP_SIGNALS, self._on_stop), **dict.fromkeys(SAVE_SIGNALS, self._on_save)}
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers."""
        for number, handler in self._handlers.items():
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # The user started the process with `nohup`.
            self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _on_stop(self, number: int, _frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self._first is None:
            self._first = number, now_s
            self.record_signal(number)
            return
        first, first_s = self._first
        duplicate_s = SCHEDULER_DUPLICATE_S if number == first != signal.SIGINT else DUPLICATE_S
        if now_s - first_s > duplicate_s and self._exit_at_second:
            os._exit(128 + number)

    def _on_save(self, _number: int, _frame: FrameType | None) -> None:
        self._save_requested = True

    def record_signal(self, number: int) -> None:
        """Record a stop signal that another process caught. It does not count as the first one of this process."""
        if self.received is None:
            self.received = signal.Signals(number)

    def request(self) -> None:
        """Request a stop from any thread, as SIGTERM does."""
        self.record_signal(signal.SIGTERM)

    def check(self) -> None:
        """Raise `StoppedError` if a stop signal was received."""
        if self.received is not None:
            raise StoppedError

    @property
    def seconds_since(self) -> float | None:
        """Seconds since this process caught its first stop signal, None if it caught none."""
        return None if self._first is None else time.monotonic() - self._first[1]

    def pop_save_request(self) -> bool:
        """Return whether a save signal was received since the last call."""
        requested, self._save_requested = self._save_requested, False
        return requested

    def run(self, work: Callable[[], T], *, poll_s: float = 0.05) -> T:
        """Return `work()`, or abandon it as soon as a stop signal is received.

        Use it for long work that cannot check the flag, such as a download or a compilation. The work runs in a thread,
        because Python runs no signal handler while the main thread is inside a C++ function. Abandoned work continues
        in the background, so exit soon, and with `os._exit`: a normal exit would tear the interpreter down under it.

        Raises:
            StoppedError: a stop signal was received before the work was done.
        """
        self.check()
        future = start_in_thread(work)
        while not wait([future], timeout=poll_s).done:
            self.check()
        return future.result()


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
