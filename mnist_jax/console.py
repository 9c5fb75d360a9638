"""What the commands share: standard split_keys that cannot fail them, and how they leave."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from typing import NoReturn, TextIO

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType


def repair_standard_streams() -> None:
    """Open what the caller closed, as cron and daemons do, and let no letter be an error that a stream cannot write."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it stays open to the end
        getattr(sys, name).reconfigure(errors="backslashreplace")


def print_stderr(text: str) -> None:
    """Write a line on standard error, if anybody reads it."""
    with contextlib.suppress(OSError):
        print(escape_control(text), file=sys.stderr, flush=True)


def escape_control(text: str) -> str:
    """Return a text in which control characters are spelled out: what a file says may not command a terminal."""
    return text.translate(_SPELLED_OUT)


_SPELLED_OUT = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def exit_process(code: int) -> NoReturn:
    """End the process with everything written, and without waiting for the interpreter to be taken down.

    A download or a compilation that a signal made us leave still runs in its thread; it would hold up the orderly end,
    or crash in it.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


class Terminal:
    """The lines that a person sees: one live line on a terminal, one plain line an interval elsewhere.

    No cursor is hidden and no thread draws, because a second Ctrl-C may end the process anywhere. If nothing reads any
    more (a pipe that was closed, a terminal that is gone) nothing is written, and the training goes on.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        """Write to standard output and standard error, unless it is not enabled."""
        self._enabled = enabled
        self._console = _Console(
            highlight=False,
            soft_wrap=True,
            emoji=False,
            markup=False,
            force_terminal=sys.stdout.isatty(),
            quiet=not enabled,
        )
        self._live_line_shown = False
        self._next_refresh_s = 0.0

    @property
    def is_live(self) -> bool:
        """Whether somebody watches."""
        return self._enabled and self._console.is_terminal and not self._console.is_dumb_terminal

    @property
    def is_refresh_due(self) -> bool:
        """Whether somebody watches, and the live line is a tenth of a second old."""
        return self.is_live and time.monotonic() >= self._next_refresh_s

    def info(self, text: str) -> None:
        """Write a line that stays."""
        self._clear()
        self._write(text)

    def warn(self, text: str) -> None:
        """Write a line that stays, on standard error."""
        if not self._enabled:
            return
        self._clear()
        try:
            print(escape_control(text), file=sys.stderr, flush=True)
        except OSError:
            _give_up(sys.stderr)

    def progress(self, text: str) -> None:
        """Rewrite the live line."""
        self._next_refresh_s = time.monotonic() + 0.1
        self._clear()
        self._live_line_shown = True
        self._write(text[: self._console.width - 1], end="")

    def interval(self, text: str) -> None:
        """Write the line of an interval, unless output is a terminal: there the live line has it."""
        if not self.is_live:
            self._write(text)

    def _clear(self) -> None:
        if self._live_line_shown:
            self._live_line_shown = False
            with self._gone_is_well():
                self._console.control(Control((ControlType.ERASE_IN_LINE, 2), ControlType.CARRIAGE_RETURN))

    def _write(self, text: str, end: str = "\n") -> None:
        with self._gone_is_well():
            self._console.print(escape_control(text), end=end)

    @contextlib.contextmanager
    def _gone_is_well(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._console.quiet = True
            _give_up(sys.stdout)


def _give_up(stream: TextIO) -> None:
    """Send what is still buffered, and what may follow, nowhere: not into another error when the process ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave the error to `Terminal`; rich would end the process."""
        raise
