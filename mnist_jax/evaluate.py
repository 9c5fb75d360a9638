"""The command `python -m mnist_jax.evaluate`: evaluate a classifier on the test images. Safe while the run trains."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from mnist_jax import cli
from mnist_jax import config as configs
from mnist_jax.console import Terminal, exit_process
from mnist_jax.runtime.preemption import StopSignal


@dataclass(frozen=True)
class Options:
    """Evaluate a run on all test images: loss, accuracy, confusion matrix."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Directory of the run. Read-only."""
    step: configs.WhichStep = "latest"
    data_dir: configs.DataDir = None
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of text."""


@dataclass(frozen=True)
class Result:
    """The metrics of a checkpoint on the test images."""

    workdir: str
    step: int
    dataset: str
    images: int
    loss: float
    accuracy: float
    recorded_accuracy: float | None  # if the run evaluated this step
    class_names: list[str]
    class_accuracy: list[float | None]  # None for a class without images
    confusion: list[list[int]]  # a row for each label, a column for each prediction


def main(args: Sequence[str]) -> int:
    """Print the metrics of a checkpoint, and return the exit code; see `cli.run`."""
    return cli.run(partial(print_evaluation, cli.parse(Options, "evaluate", args)))


def print_evaluation(options: Options, stop: StopSignal, terminal: Terminal) -> int:
    """Print the metrics of a checkpoint."""
    result = evaluate(options, stop, terminal)
    terminal.info(cli.to_json(asdict(result)) if options.json else describe(result))
    return 0


def evaluate(options: Options, stop: StopSignal, terminal: Terminal) -> Result:
    """Return the metrics of a checkpoint."""
    from mnist_jax.inference import classifier

    model = stop.run(lambda: classifier.load(options.workdir, options.step))
    dataset = stop.run(lambda: model.load_dataset(options.data_dir, notify=terminal.warn))
    found = model.evaluate(dataset, stop)
    return Result(
        workdir=str(options.workdir),
        step=model.step,
        dataset=model.data.name,
        images=len(dataset.test_labels),
        loss=found.loss,
        accuracy=found.accuracy,
        recorded_accuracy=model.test_accuracy,
        class_names=list(model.class_names),
        class_accuracy=[
            int(row[label]) / int(row.sum()) if row.any() else None for label, row in enumerate(found.confusion)
        ],
        confusion=found.confusion.tolist(),
    )


def describe(result: Result) -> str:
    """Return the text for people."""
    incorrect = f"{result.images - int(np.trace(result.confusion)):,} of {result.images:,} incorrect"
    lines = [
        f"step {result.step} of the run in {result.workdir}, on the test images of {result.dataset}",
        f"test loss {result.loss:.4f}, test accuracy {result.accuracy:.4f}: {incorrect}",
    ]
    if result.recorded_accuracy not in (None, result.accuracy):
        lines.append(f"the run measured a test accuracy of {result.recorded_accuracy:.4f}; other devices can change it")
    lines += ["", "a row for each label, a column for each prediction"]
    lines.append("label    accuracy " + "".join(f"{name[:5]:>6}" for name in result.class_names))
    for name, accuracy, counts in zip(result.class_names, result.class_accuracy, result.confusion, strict=True):
        share = "" if accuracy is None else f"{accuracy:.4f}"
        lines.append(f"{name[:8]:8} {share:8} " + "".join(f"{count or '·':>6}" for count in counts))
    return "\n".join(lines)


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
