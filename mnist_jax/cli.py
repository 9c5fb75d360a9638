"""The command line of all commands: arguments, exit codes, and the one place that turns an error into a message.

Imports no JAX, so that `--help` and usage errors come at once.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

import tyro

import mnist_jax
from mnist_jax.config import Config, ConfigError, is_address
from mnist_jax.console import Terminal, repair_standard_streams
from mnist_jax.runtime.preemption import StoppedError, StopSignal

T = TypeVar("T")
MAX_USAGE = 80


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
    terminal = Terminal()
    with StopSignal() as stop:
        try:
            return work(stop, terminal)
        except StoppedError:
            assert stop.received is not None
            terminal.warn(f"{stop.reason}: stopped before the end")
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
        warn(f"error: {who}{error}{hint or ''}{notes}")


def to_json(value: Any) -> str:
    """Return a value as JSON. Numbers that JSON has no word for, such as NaN in a corrupt file, become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(value), indent=2, allow_nan=False)


def exit_code(error: Exception) -> int:
    """Return the exit code of an error. If another process failed, it is the code of that process."""
    if code := getattr(error, "exit_code", None):
        return int(code)
    return _find(EXIT_CODES, error) or ExitCode.UNEXPECTED


def _find(table: Mapping[str, T], error: Exception) -> T | None:
    """Return the entry for the most specific class of an error, None if there is none."""
    return next((table[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in table), None)


def parse_config(args: Sequence[str], default: Config | None = None) -> Config:
    """Return the config that command-line arguments ask for.

    Args:
        args: the arguments, without the program's name.
        default: config whose values are the defaults, such as that of a run to resume. If it is None, the defaults
            are those of the preset for the model and the dataset in the arguments.

    Raises:
        SystemExit: an unknown flag or a value out of range, after a message (code 2); or `--help` (code 0).
    """
    if default is None:
        asked = parse_config(args, Config())
        default = Config.of_preset(asked.preset, asked.model, asked.dataset)
    return parse(Config, "train", args, default=default)


def parse(kind: type[T], command: str, args: Sequence[str], **settings: Any) -> T:
    """Parse the arguments of a command. Messages have colours on a terminal, unless `NO_COLOR` is set (no-color.org).

    Where the run directory is an argument without a name, `--workdir DIR` is accepted in its place.

    Raises:
        SystemExit: bad usage, after a message (code 2); or `--help` or `--version` (code 0).
    """
    repair_standard_streams()
    if "--version" in args:
        print(version())
        raise SystemExit(0)
    if os.environ.get("NO_COLOR"):
        tyro._experimental_options["ansi_codes"] = False  # There is no public option at run time.
    has_help = not {"-h", "--help"}.isdisjoint(args)
    help_text = _HelpText(sys.stdout)
    try:
        _check_no_argument_is_empty(args)
        with contextlib.redirect_stdout(help_text) if has_help else contextlib.nullcontext():
            options = tyro.cli(kind, prog=f"python -m mnist_jax.{command}", args=_workdir_first(kind, args), **settings)
        return expand_paths(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(ExitCode.USAGE) from error
    finally:
        if text := help_text.getvalue():
            also = "WORKDIR may also be given as --workdir DIR.\n" if _has_workdir_first(kind) else ""
            print(f"{_shorten_usage(text)}{also}The flag --version prints the version.")


def version() -> str:
    """Return the line that `--version` prints."""
    return f"mnist_jax {mnist_jax.__version__}"


class _HelpText(io.StringIO):
    """Collects help with the characters and colours of the stream that will show it."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    @property
    def encoding(self) -> Any:  # type: ignore[override]
        return getattr(self._stream, "encoding", None)

    def isatty(self) -> bool:
        return bool(self._stream.isatty())


def _shorten_usage(text: str) -> str:
    """Return a help text whose first line, the usage, has at most `MAX_USAGE` characters; tyro does not wrap it."""
    usage, rest = text.split("\n", 1)
    if len(re.sub(r"\x1b\[[0-9;]*m", "", usage)) > MAX_USAGE:
        usage = re.sub(r"( \[--[^\]]*\])+", " [OPTIONS]", usage)
    return f"{usage}\n{rest}"


def _workdir_first(kind: Any, args: Sequence[str]) -> Sequence[str]:
    """Return the arguments with `--workdir DIR` as the first positional argument, where `kind` has it as one."""
    if not _has_workdir_first(kind):
        return args
    for index, word in enumerate(args):
        if word.startswith("--workdir="):
            return [word.removeprefix("--workdir="), *args[:index], *args[index + 1 :]]
        if word == "--workdir" and index + 1 < len(args):
            return [args[index + 1], *args[:index], *args[index + 2 :]]
    return args


def _has_workdir_first(kind: Any) -> bool:
    """Return whether the run directory is a positional argument of a command."""
    return any(field.name == "workdir" and field.default is dataclasses.MISSING for field in dataclasses.fields(kind))


def _check_no_argument_is_empty(args: Sequence[str]) -> None:
    """Raise ConfigError if an argument is empty, such as an unset variable of a shell: as a path it would be "."."""
    for before, argument in zip(["", *args], args, strict=False):
        if not argument or re.fullmatch(r"--[\w-]+=", argument):
            flag = argument.rstrip("=") or (before if before.startswith("--") else "an argument")
            raise ConfigError(f"{flag} is empty; give it a value, or leave it out")


def expand_paths(options: T) -> T:
    """Return the options of a command with the home directory in the place of ~ in all paths.

    Raises:
        ConfigError: a path is an address, or there is no such home directory.
    """
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Path):
            changed[name] = _expand(name, value)
        elif isinstance(value, tuple):
            changed[name] = tuple(_expand(name, item) if isinstance(item, Path) else item for item in value)
    return dataclasses.replace(options, **changed)  # type: ignore[type-var]


def _expand(name: str, path: Path) -> Path:
    if is_address(path):
        raise ConfigError(f"{name}={path} is an address, but it must be on this machine; use a file or a folder")
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{name}={path} cannot be expanded ({error}); use the path without ~") from error
