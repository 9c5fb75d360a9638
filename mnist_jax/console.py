"""Terminal output that never blocks a training, standard streams that cannot fail a command, the exit of a process."""

import contextlib
import io
import os
import select
import shutil
import sys
import time
from typing import NoReturn, TextIO

ERASE_LINE = "\x1b[2K\r"
REFRESH_S = 0.1
LAST_LINE_TIMEOUT_S = 5.0
# A pipe that is reported as writable takes this many bytes at once (PIPE_BUF of Linux).
CHUNK_BYTES = 4096
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


def print_line(text: str, *, on_stderr: bool = False) -> None:
    """Write a line, or drop it if the reader is gone or takes nothing for `LAST_LINE_TIMEOUT_S`."""
    with contextlib.suppress(OSError):
        _write(sys.stderr if on_stderr else sys.stdout, escape_control(text) + "\n", LAST_LINE_TIMEOUT_S)


def print_stderr(text: str) -> None:
    """Write a line on standard error, as `print_line` does."""
    print_line(text, on_stderr=True)


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

    def __init__(self, *, enabled: bool = True, blocking: bool = True) -> None:
        """Write to standard output and standard error if enabled.

        Args:
            enabled: whether to write at all.
            blocking: whether to wait for a reader that is slow (`| less`, Ctrl-S). Otherwise lines that it does not
                take at once are dropped and counted.
        """
        self._enabled = enabled
        self._timeout_s = None if blocking else 0.0
        self._dropped = 0
        self._live_line_shown = False
        self._next_refresh_s = 0.0
        self.is_live = enabled and sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")

    @property
    def is_refresh_due(self) -> bool:
        """Whether standard output is a terminal and its live line is older than `REFRESH_S`."""
        return self.is_live and time.monotonic() >= self._next_refresh_s

    def info(self, text: str) -> None:
        """Write a permanent line."""
        self._write_line(text, sys.stdout, self._timeout_s)

    def warn(self, text: str) -> None:
        """Write a permanent line on standard error."""
        if self._live_line_shown:
            self._write("", sys.stdout, self._timeout_s)
        self._write_line(text, sys.stderr, self._timeout_s)

    def last(self, text: str) -> None:
        """Write the last line; wait for a reader for `LAST_LINE_TIMEOUT_S` at most."""
        self._write_line(text, sys.stdout, None if self._timeout_s is None else LAST_LINE_TIMEOUT_S)

    def progress(self, text: str) -> None:
        """Rewrite the live line."""
        columns = shutil.get_terminal_size().columns
        self._write(escape_control(text)[: columns - 1], sys.stdout, self._timeout_s)
        self._live_line_shown = True
        self._next_refresh_s = time.monotonic() + REFRESH_S

    def interval(self, text: str) -> None:
        """Write the line of an interval, except on a terminal, where the live line shows it."""
        if not self.is_live:
            self.info(text)

    def _write_line(self, text: str, stream: TextIO, timeout_s: float | None) -> None:
        dropped = f"({self._dropped} lines are missing here: nothing read them in time)\n" if self._dropped else ""
        if self._write(f"{dropped}{escape_control(text)}\n", stream, timeout_s):
            self._dropped = 0
        else:
            self._dropped += 1

    def _write(self, text: str, stream: TextIO, timeout_s: float | None) -> bool:
        """Write a text in place of the live line, and return whether the reader took it."""
        if not self._enabled:
            return True
        if self._live_line_shown and stream is sys.stdout:
            text = ERASE_LINE + text
        try:
            is_written = _write(stream, text, timeout_s)
        except OSError:  # The reader is gone. Drop all later output.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return True
        if is_written and stream is sys.stdout:
            self._live_line_shown = False
        return is_written


def _write(stream: TextIO, text: str, timeout_s: float | None) -> bool:
    """Write a text, and return whether the reader took all of it in time; None waits for ever.

    Raises:
        OSError: the reader is gone.
    """
    try:
        descriptor = stream.fileno()
    except io.UnsupportedOperation:  # a notebook, a StringIO
        stream.write(text)
        stream.flush()
        return True
    data = memoryview(text.encode(stream.encoding or "utf-8", stream.errors or "strict"))
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    writable = select.poll()
    writable.register(descriptor, select.POLLOUT)
    while data:
        left_ms = None if deadline_s is None else max(0.0, 1000 * (deadline_s - time.monotonic()))
        events = writable.poll(left_ms)
        if not events:
            return False
        try:
            data = data[os.write(descriptor, data[:CHUNK_BYTES]) :]
        except BlockingIOError:  # The descriptor is non-blocking, and has less room than that.
            if deadline_s is not None and time.monotonic() >= deadline_s:
                return False
            time.sleep(0.01)
    return True
