"""Terminal output, standard streams that cannot fail a command, and the exit of a process."""

import contextlib
import io
import os
import shutil
import sys
import time
from typing import NoReturn, TextIO

ERASE_LINE = "\x1b[2K\r"
REFRESH_S = 0.1
# Control characters are escaped: text from a file must not control the terminal.
_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def repair_standard_streams() -> None:
    """Open streams that the caller closed, as cron and daemons do, and escape characters that cannot be encoded."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - stays open until the exit
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_stderr(text: str) -> None:
    """Write a line on standard error; do nothing if it is closed."""
    with contextlib.suppress(OSError):
        print(escape_control(text), file=sys.stderr, flush=True)


def escape_control(text: str) -> str:
    """Return a text with its control characters escaped."""
    return text.translate(_ESCAPES)


def exit_process(code: int) -> NoReturn:
    """Flush the standard streams and exit without shutting the interpreter down.

    A download or a compilation that a signal interrupted may still run in a thread: it would delay a normal shutdown,
    or crash in it.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


class Terminal:
    """Output for people: one live line on a terminal, one plain line per interval elsewhere.

    It hides no cursor and draws in no thread, because a second Ctrl-C may end the process at any moment. When the
    reader is gone (a closed pipe or terminal), output is dropped and the training continues.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        """Write to standard output and standard error if enabled."""
        self._enabled = enabled
        self._live_line_shown = False
        self._next_refresh_s = 0.0
        self.is_live = enabled and sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")

    @property
    def is_refresh_due(self) -> bool:
        """Whether standard output is a terminal and its live line is older than `REFRESH_S`."""
        return self.is_live and time.monotonic() >= self._next_refresh_s

    def info(self, text: str) -> None:
        """Write a permanent line."""
        self._write(escape_control(text) + "\n", sys.stdout)

    def warn(self, text: str) -> None:
        """Write a permanent line on standard error."""
        if self._live_line_shown:
            self._write("", sys.stdout)
        self._write(escape_control(text) + "\n", sys.stderr)

    def progress(self, text: str) -> None:
        """Rewrite the live line."""
        columns = shutil.get_terminal_size().columns
        self._write(escape_control(text)[: columns - 1], sys.stdout)
        self._live_line_shown = True
        self._next_refresh_s = time.monotonic() + REFRESH_S

    def interval(self, text: str) -> None:
        """Write the line of an interval, except on a terminal, where the live line shows it."""
        if not self.is_live:
            self.info(text)

    def _write(self, text: str, stream: TextIO) -> None:
        """Write a text in place of the live line; drop this and all later output if the reader is gone."""
        if not self._enabled:
            return
        if self._live_line_shown and stream is sys.stdout:
            text, self._live_line_shown = ERASE_LINE + text, False
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
