"""Being asked to stop: signals that only set a flag, and work that is left at once when the flag is set.

This file stands alone; lift it into your own project.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGABRT, signal.SIGHUP, signal.SIGUSR1)
SAVE_SIGNALS = (signal.SIGUSR2,)

# Within so many seconds a second signal is taken for one wish with the first. `timeout` signals a process and then its
# group, within 20 ms. Slurm signals the tasks of a preempted job, and `srun`, which passes that on: 3 to 24 ms later in
# nine times, on an idle machine. But who presses Ctrl-C twice means it.
ECHO_S = 0.02
ECHO_OF_SCHEDULERS_S = 1.0

T = TypeVar("T")


class StoppedError(Exception):
    """The work in hand was left because a signal asked to stop."""


class StopSignal:
    """Listen for signals that ask to stop, while the `with` block runs.

    The first stop signal sets `received`, and that is all: look at it between steps, save, and leave. The second one
    ends the process at once with exit code 128+n, unless it is the first one's echo (see `ECHO_S`). A save signal sets
    a flag of its own. A handler can come between any two instructions, in the middle of a save or with a lock held, so
    it does no more than that.

    The handlers that were there before are put back at the end of the block. Python delivers signals to its main
    thread, so enter the block there, and after anything that installs handlers of its own: `jax.distributed` does,
    unless `jax_enable_preemption_service` is off.

        with StopSignal() as stop:
            while step < total_steps and not stop.received:
                state = train_step(state)
    """

    def __init__(
        self,
        stop_signals: Sequence[signal.Signals] = STOP_SIGNALS,
        save_signals: Sequence[signal.Signals] = SAVE_SIGNALS,
        *,
        exit_at_second: bool = True,
    ) -> None:
        """Choose the signals; nothing is installed before the `with` block.

        Args:
            stop_signals: ask to stop.
            save_signals: ask to save and go on.
            exit_at_second: whether a second stop signal ends the process; in a notebook it must not.
        """
        self._exit_at_second = exit_at_second
        self.received: signal.Signals | None = None
        self._caught: tuple[int, float] | None = None  # the first one that came to this process, and when
        self._save_requested = False
        self._handlers = {**dict.fromkeys(stop_signals, self._stop), **dict.fromkeys(save_signals, self._save)}
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Install the handlers."""
        for number, handler in self._handlers.items():
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # `nohup` asked for that.
            self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if self._caught is None:
            self._caught = number, now_s
            self.record_signal(number)
            return
        first, first_s = self._caught
        echo_s = ECHO_OF_SCHEDULERS_S if number == first != signal.SIGINT else ECHO_S
        if now_s - first_s > echo_s and self._exit_at_second:
            os._exit(128 + number)

    def _save(self, _number: int, _frame: FrameType | None) -> None:
        self._save_requested = True

    def record_signal(self, number: int) -> None:
        """Take note of a stop signal that another process caught. One that this process catches later is its first."""
        if self.received is None:
            self.received = signal.Signals(number)

    def request(self) -> None:
        """Request a stop from any thread, as SIGTERM does."""
        self.record_signal(signal.SIGTERM)

    def check(self) -> None:
        """Raise `StoppedError` if a stop signal came."""
        if self.received is not None:
            raise StoppedError

    @property
    def seconds_since(self) -> float | None:
        """How long ago the first stop signal came to this process, or None where none did."""
        return None if self._caught is None else time.monotonic() - self._caught[1]

    def pop_save_request(self) -> bool:
        """Tell whether a save signal came since the last call."""
        requested, self._save_requested = self._save_requested, False
        return requested

    def run(self, work: Callable[[], T], *, look_every_s: float = 0.05) -> T:
        """Return `work()`, or leave it running and raise `StoppedError` as soon as a stop signal comes.

        For work that is long and does not look at the flag: a download, a compilation. It runs in a thread of its
        own, because Python calls no handler while the main thread is inside a C++ function. When it is left it goes
        on in the background, so the caller should end the process soon, and with `os._exit`: the interpreter's own
        end would pull the ground from under that thread.

        Raises:
            StoppedError: a stop signal came before the work was done.
        """
        self.check()
        future = start_in_thread(work)
        while not wait([future], timeout=look_every_s).done:
            self.check()
        return future.result()


def start_in_thread(work: Callable[[], T]) -> "Future[T]":
    """Start work in a thread that does not keep the process alive, and return its future."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=f"interruptible {work}").start()
    return future
