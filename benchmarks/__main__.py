"""The command `python -m benchmarks`: measure, print a table, and write the numbers."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import tyro

from benchmarks import drawing, gpu, images, interruptions, report, speed, together
from benchmarks.bench import QUICK, Bench, Plan
from benchmarks.report import Row
from mnist_jax.training.array_files import DataError

ROWS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "throughput": speed.throughput,
    "time-to-99": speed.time_to_99,
    "accurate": speed.accurate,
    "torch-example": partial(speed.example, module="example_torch"),
    "keras-example": partial(speed.example, module="example_keras"),
    "flax-example": partial(speed.example, module="example_flax"),
    "safety": interruptions.safety,
    "save": interruptions.save,
    "stop": interruptions.stop,
    "resume": interruptions.resume,
    "cold": interruptions.cold,
    "drawing": drawing.drawing,
    "processes": together.together,
    **gpu.ROWS,
}


@dataclass(frozen=True)
class Options:
    """Measure mnist_jax side by side with others. It takes over an hour on an otherwise idle machine."""

    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder with the four official .gz files of MNIST; by default they are downloaded once."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Check that everything runs, in a tiny form; the numbers mean nothing."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File to write all numbers to."""
    platform: Literal["gpu", "cpu"] = "gpu"
    """Device of the rows whose names begin with gpu. Without a GPU they are skipped, unless it is cpu."""
    only: tuple[Literal[tuple(ROWS)], ...] = ()  # type: ignore[valid-type]
    """Rows to measure; default: all."""


def main(options: Options) -> int:
    """Measure, and return the exit code: 0, 1 if a row failed, 2 if there is no dataset."""
    about = {**report.describe_machine(), "quick": options.quick}
    with TemporaryDirectory(prefix="benchmark.") as temporary:
        os.environ["TMPDIR"] = temporary  # so that leftovers of killed processes are removed too
        folders = [Path(temporary, name) for name in ("images", "runs")]
        for folder in folders:
            folder.mkdir()
        try:
            found = images.prepare(options.data_dir, folders[0], notify=notify, allow_digits=options.quick)
        except DataError as error:
            hint = "" if options.data_dir else ". Use --data-dir DIR to read MNIST from a folder."
            notify(f"error: {error}{hint}")
            return 2
        plan = QUICK if options.quick else Plan()
        bench = Bench(plan, found, folders[1], report.cores(), options.platform)
        rows: list[Row] = []
        failures: dict[str, str] = {}
        for name in options.only or tuple(ROWS):
            measure(bench, name, rows, failures)
            if options.json:  # After each name: a benchmark that is ended early has written what it measured.
                report.write(options.json, rows, {**about, "failures": failures})
    report.show(rows, about)
    if options.quick:
        print("This was --quick: the numbers mean nothing.")
    return 1 if failures else 0


def measure(bench: Bench, name: str, rows: list[Row], failures: dict[str, str]) -> None:
    """Add the rows of a name, or its error. A failure loses neither these rows nor the others."""
    if name in gpu.ROWS and bench.platform == "gpu" and not gpu.has_gpu():
        notify(f"{name}: skipped, no GPU")
        return
    start_s = time.monotonic()
    try:
        rows += ROWS[name](bench)
        notify(f"{name}: measured in {time.monotonic() - start_s:.0f} s")
    except Exception as error:
        failures[name] = f"{type(error).__name__}: {error}"
        notify(f"{name}: {failures[name]}")


def notify(text: str) -> None:
    """Print progress on standard error; the table is on standard output."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Context managers then clean up.
    try:
        sys.exit(main(tyro.cli(Options, prog="scripts/benchmark")))
    except KeyboardInterrupt:
        sys.exit(130)
