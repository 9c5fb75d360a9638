"""The command `python -m mnist_jax.status`: what is in a run directory, and what the next start would do there.

Read-only; safe while a run is at work.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mnist_jax import config as configs
from mnist_jax.config import ConfigError
from mnist_jax.console import Terminal, exit_process, repair_standard_streams
from mnist_jax.report.history import as_number
from mnist_jax.report.run_status import Status, examine
from mnist_jax.runtime import lock


@dataclass(frozen=True)
class Options:
    """List a run's checkpoints and history, and what the next start would do."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Directory of the run."""
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Read every byte of the checkpoints and compare it with what was saved."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of text."""


def main(args: Sequence[str]) -> int:
    """Print the status of a run, and return the exit code: 0, 2 where there is no run, 65 where nothing is usable."""
    options = configs.cli(Options, "status", args)
    repair_standard_streams()
    terminal = Terminal()
    try:
        status = examine(options.workdir, verify=options.verify)
        text = json.dumps(asdict(status), indent=2) if options.json else describe(status)
    except (ConfigError, OSError) as error:
        terminal.warn(f"error: {error}")
        return 2
    except RecursionError:
        terminal.warn(f"error: {options.workdir} holds JSON that is nested too deep; no run of ours wrote it")
        return 2
    terminal.info(text)
    return 65 if status.next_start.exit_code == 65 else 0


def describe(status: Status) -> str:
    """Return the text for people."""
    rows = [("step", "saved", "MB", "saved because", "accuracy", "")]
    for found in status.checkpoints:
        accuracy = "" if found.test_accuracy is None else f"{found.test_accuracy:.4f}"
        state = found.problem or ("good" if found.good else "")
        size = f"{found.bytes / 1e6:.2f}"
        rows.append((str(found.step), _clock(found.time), size, found.reason or "", accuracy, state))
    lines = [f"run in {status.workdir}"]
    if status.in_use_by:
        lines.append(f"in use by {lock.Holder(**status.in_use_by)}")
    lines += ["", "checkpoints", configs.columns(rows) if status.checkpoints else "  none"]
    if status.quarantine:
        lines += ["", "set aside in checkpoints/quarantine", *(f"  {name}" for name in status.quarantine)]
    lines += ["", "history", configs.columns([_row(event) for event in status.history]) if status.history else "  none"]
    lines += ["", f"the next start {status.next_start.text}"]
    if not any(found.good is not None for found in status.checkpoints) and status.checkpoints:
        lines.append("--verify reads every byte of the checkpoints and tells which are good")
    return "\n".join(lines)


def _row(event: dict[str, Any]) -> tuple[str, str, str, str]:
    """Return when, what, at which step, and the particulars of an event."""
    details = []
    if event["event"] == "resume":
        details.append("exact" if event.get("exact") else f"numerically equivalent: {event.get('changed')}")
    if event.get("lost_steps"):
        details.append(f"{event['lost_steps']} steps or more were lost and recomputed")
    names = ("signal", "outcome", "code", "error", "reason", "moved_to", "names", "text")
    details += [f"{name} {event[name]}" for name in names if event.get(name) is not None]
    return _clock(as_number(event.get("time"))), event["event"], f"step {event['step']}", ", ".join(details)


def _clock(seconds: float | None) -> str:
    try:
        return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):  # Anything may stand in a file.
        return ""


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
