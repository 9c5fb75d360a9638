"""The command `python -m mnist_jax.status`: the checkpoints and the history of a run, and what the next start does.

Read-only; safe while the run trains.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from mnist_jax import cli
from mnist_jax import config as configs
from mnist_jax.config import ConfigError
from mnist_jax.console import Terminal, exit_process
from mnist_jax.report.history import format_time
from mnist_jax.report.run_status import Status, examine
from mnist_jax.runtime import lock
from mnist_jax.runtime.preemption import StopSignal


@dataclass(frozen=True)
class Options:
    """List a run's checkpoints and history, and what the next start does."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Directory of the run. Read-only."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read every byte of the checkpoints and compare it with what was saved."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of text."""


def main(args: Sequence[str]) -> int:
    """Print the status of a run, and return the exit code: 65 if every checkpoint is corrupt, others as `cli.run`."""
    return cli.run(partial(print_status, cli.parse(Options, "status", args)))


def print_status(options: Options, stop: StopSignal, terminal: Terminal) -> int:
    """Print the status of a run, and return 65 if every checkpoint is corrupt or missing, otherwise 0."""
    try:
        status = stop.run(lambda: examine(options.workdir, verify=options.verify))
        terminal.info(cli.to_json(asdict(status)) if options.json else describe(status))
    except RecursionError:
        raise ConfigError(
            f"{options.workdir} contains JSON that is nested too deeply; another program wrote it"
        ) from None
    return 65 if status.next_start.exit_code == 65 else 0


def describe(status: Status) -> str:
    """Return the text for people."""
    rows = [("step", "saved", "MB", "reason", "accuracy", "")]
    for found in status.checkpoints:
        accuracy = "" if found.test_accuracy is None else f"{found.test_accuracy:.4f}"
        state = found.problem or ("good" if found.good else "")
        size = f"{found.bytes / 1e6:.2f}"
        rows.append((str(found.step), format_time(found.time), size, found.reason or "", accuracy, state))
    lines = [f"run in {status.workdir}"]
    if status.in_use_by:
        lines.append(f"in use by {lock.Holder(**status.in_use_by)}")
    lines += ["", "checkpoints", configs.columns(rows) if status.checkpoints else "  none"]
    if status.quarantine:
        lines += ["", "corrupt, in checkpoints/quarantine", *(f"  {name}" for name in status.quarantine)]
    lines += ["", "history", configs.columns([_row(event) for event in status.history]) if status.history else "  none"]
    lines += ["", f"the next start {status.next_start.text}"]
    if any(found.good is None for found in status.checkpoints):
        lines.append("--verify reads every byte of the checkpoints and finds corrupt ones")
    return "\n".join(lines)


def _row(event: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return time, name, step and details of an event."""
    details = []
    if event["event"] == "resume":
        details.append("exact" if event.get("exact") else f"not bit for bit: {event.get('changed')}")
    if event.get("lost_steps"):
        details.append(f"{event['lost_steps']} steps or more were lost and recomputed")
    names = ("signal", "outcome", "code", "error", "reason", "moved_to", "names", "text")
    details += [f"{name} {event[name]}" for name in names if event.get(name) is not None]
    return format_time(event.get("time")), event["event"], f"step {event['step']}", ", ".join(details)


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
