"""What the commands share: standard streams that cannot fail them, and how they leave."""

import contextlib
import os
import sys
from typing import NoReturn


def mend_standard_streams() -> None:
    """Open what the caller closed, as cron and daemons do, and let no letter be an error that a stream cannot write."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it stays open to the end
        getattr(sys, name).reconfigure(errors="backslashreplace")


def notice(text: str) -> None:
    """Write a line on standard error, if anybody reads it."""
    with contextlib.suppress(OSError):
        print(visible(text), file=sys.stderr, flush=True)


def visible(text: str) -> str:
    """Return a text in which control characters are spelled out: what a file says may not command a terminal."""
    return text.translate(_SPELLED_OUT)


_SPELLED_OUT = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def leave(code: int) -> NoReturn:
    """End the process with everything written, and without waiting for the interpreter to be taken down.

    A download or a compilation that a signal made us leave still runs in its thread; it would hold up the orderly end,
    or crash in it.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
