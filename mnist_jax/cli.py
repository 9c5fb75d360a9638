"""Exit codes, and the one place that turns an error into a message and an exit code, for all commands."""

import traceback
from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import TypeVar

from mnist_jax.console import Terminal, repair_standard_streams
from mnist_jax.runtime.preemption import StoppedError, StopSignal

T = TypeVar("T")


class ExitCode(IntEnum):
    """Exit codes besides 128+n after a signal n. The numbers from 64 are those of sysexits.h."""

    OK = 0
    FAILED = 1  # the loss is not finite; a replay differs; an image cannot be read
    USAGE = 2  # a flag, the data or the run directory cannot be used
    NO_GOOD_CHECKPOINT = 65
    PROCESS_LOST = 69
    UNEXPECTED = 70
    IN_USE = 73
    IO_ERROR = 74  # nothing is corrupt; the same command may succeed later


# By name, because importing the classes would import JAX. The most specific class of an error counts.
EXIT_CODES = {
    "DivergedError": ExitCode.FAILED,
    "ConfigError": ExitCode.USAGE,
    "DataError": ExitCode.USAGE,
    "ProcessGroupError": ExitCode.USAGE,
    "CheckpointError": ExitCode.USAGE,
    "IncompatibleCheckpointError": ExitCode.USAGE,
    "CorruptCheckpointError": ExitCode.NO_GOOD_CHECKPOINT,
    "NoGoodCheckpointError": ExitCode.NO_GOOD_CHECKPOINT,
    "ProcessLostError": ExitCode.PROCESS_LOST,
    "LockHeldError": ExitCode.IN_USE,
    "ReadError": ExitCode.IO_ERROR,
    "SaveError": ExitCode.IO_ERROR,
    "RemoteError": ExitCode.IO_ERROR,
    "OSError": ExitCode.IO_ERROR,
}
PREFIXES = {"CorruptCheckpointError": "a checkpoint is corrupt, "}
TRAINING_HINTS = {
    "LockHeldError": ": --workdir DIR.",
    "RemoteError": ". Start again, or omit --mirror.",
    "IncompatibleCheckpointError": (
        "\nIf another version of this program wrote it, resume with that version, or start over with --fresh."
    ),
}


def run(work: Callable[[StopSignal, Terminal], int]) -> int:
    """Run a command that only reads a run, and return its exit code.

    It is what `work` returns, 128+n after a signal n, or the code of an error. An unreadable run directory is a usage
    error.
    """
    repair_standard_streams()
    terminal = Terminal()
    with StopSignal() as stop:
        try:
            return work(stop, terminal)
        except StoppedError:
            assert stop.received is not None
            terminal.warn(f"{stop.received.name}: stopped before the end")
            return 128 + stop.received
        except Exception as error:
            report(error, terminal.warn)
            return ExitCode.USAGE if isinstance(error, OSError) else exit_code(error)


def report(error: Exception, warn: Callable[[str], None], *, who: str = "", is_training: bool = False) -> None:
    """Print an error in a line or two, or with its traceback if it is unexpected.

    Args:
        error: the error.
        warn: prints a line.
        who: names the process, "process 1 of 2: ", if there are several.
        is_training: whether to add hints for the command `train`.
    """
    if exit_code(error) == ExitCode.UNEXPECTED:
        traceback.print_exception(error)
    else:
        hint = _find(TRAINING_HINTS, error) if is_training else None
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        warn(f"error: {who}{_find(PREFIXES, error) or ''}{error}{hint or ''}{notes}")


def exit_code(error: Exception) -> int:
    """Return the exit code of an error. If another process failed, it is the code of that process."""
    if code := getattr(error, "exit_code", None):
        return int(code)
    return _find(EXIT_CODES, error) or ExitCode.UNEXPECTED


def _find(table: Mapping[str, T], error: Exception) -> T | None:
    """Return the entry for the most specific class of an error, None if there is none."""
    return next((table[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in table), None)
