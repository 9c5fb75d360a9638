"""The table: measurements, statistics and goals."""

import dataclasses
import json
import operator
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from mnist_jax.config import columns

PACKAGES = ("jax", "flax", "torch", "keras", "numpy")
SIGNS = {"≥": operator.ge, "≤": operator.le}
STATISTICS: dict[str, Callable[[Sequence[float]], float]] = {
    "median": statistics.median,
    "mean": statistics.fmean,
    "p99": lambda values: float(np.percentile(values, 99)),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measurement, repeated."""

    what: str
    unit: str = ""
    ours: Sequence[float]
    theirs: Sequence[float] = ()
    ratio: Sequence[float] = ()  # of neighbouring measurements; above 1 is better for us unless the goal says otherwise
    of: str = "median"
    goals: Sequence[str] = ()  # such as "ratio ≥ 1.2"
    note: str = ""

    def reached(self) -> list[bool]:
        """Return for each goal whether it is reached."""
        parts = (goal.split() for goal in self.goals)
        return [SIGNS[sign](STATISTICS[self.of](getattr(self, column)), float(limit)) for column, sign, limit in parts]

    def cells(self) -> list[str]:
        """Return the row of the table."""
        reached = ["yes" if reached else "no" for reached in self.reached()]
        columns = (self._cell(values) for values in (self.ours, self.theirs, self.ratio))
        return [self.what, self.unit, self.of, *columns, ", ".join(self.goals), ", ".join(reached)]

    def _cell(self, values: Sequence[float]) -> str:
        if not values:
            return ""
        spread = f" ({number(min(values))} – {number(max(values))})" if len(values) > 1 else ""
        return number(STATISTICS[self.of](values)) + spread


def steps_per_s(what: str, ours: Sequence[float], theirs: Sequence[float], *goals: str, note: str = "") -> Row:
    """Return a row that compares updates per second."""
    return Row(what=what, unit="steps/s", ours=ours, theirs=theirs, ratio=ratio(ours, theirs), goals=goals, note=note)


def number(value: float) -> str:
    """Return a number with four significant digits, or all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def ratio(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Return the ratio of each pair."""
    return [a / b for a, b in zip(above, below, strict=True)]


def describe_machine() -> dict[str, Any]:
    """Return machine, software and date of the measurements."""
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "load before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{package: installed for package in PACKAGES if (installed := _version(package))},
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # The tests run without PyTorch and Keras.
        return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def show(rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Print the table, the notes, and the machine."""
    print(
        columns([("what", "unit", "of", "ours", "theirs", "ratio", "goal", "reached"), *(row.cells() for row in rows)])
    )
    for row in rows:
        if row.note:
            print(f"{row.what}: {row.note}")
    print(", ".join(f"{name} {value}" for name, value in about.items()))


def write(path: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Write all numbers to a JSON file."""
    tables = [{**dataclasses.asdict(row), "reached": row.reached()} for row in rows]
    path.write_text(json.dumps({**about, "rows": tables}, indent=1, ensure_ascii=False) + "\n")
