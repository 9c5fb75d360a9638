"""The command `python -m mnist_jax.evaluate`: how good a trained classifier is, digit by digit.

It writes nothing in the run directory, also while the run is at work.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from mnist_jax import cli
from mnist_jax import config as configs
from mnist_jax.console import Terminal, exit_process
from mnist_jax.records.metrics import accuracy_at, read_metrics
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import data


@dataclass(frozen=True)
class Options:
    """Evaluate a run's classifier on all test images: loss, accuracy, confusions."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Directory of the run. Nothing is written there."""
    step: configs.WhichStep = "latest"
    data_dir: configs.DataDir = None
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of text."""


@dataclass(frozen=True)
class Result:
    """How good a checkpoint is on the test images."""

    workdir: str
    step: int
    dataset: str
    images: int
    loss: float
    accuracy: float
    recorded_accuracy: float | None  # what the run itself found at this step, if it evaluated there
    class_names: list[str]
    class_accuracy: list[float | None]  # None for a class without images
    confusion: list[list[int]]  # a row for each label, a column for each answer


def main(args: Sequence[str]) -> int:
    """Print how good a checkpoint is, and return the exit code; see `cli.run`."""
    options = configs.cli(Options, "evaluate", args)

    def work(stop: StopSignal, terminal: Terminal) -> int:
        result = evaluate(options, stop, terminal)
        terminal.info(json.dumps(asdict(result), indent=2) if options.json else describe(result))
        return 0

    return cli.run(work)


def evaluate(options: Options, stop: StopSignal, terminal: Terminal) -> Result:
    """Return how good a checkpoint is.

    Raises:
        CheckpointError, ConfigError, DataError, OSError: there is nothing to evaluate, or nothing to do it with.
        StoppedError: a signal came.
    """
    from mnist_jax.inference import classifier

    model = stop.run(lambda: classifier.load(options.workdir, options.step, on_cpu=False))
    name, folder = model.data.name, options.data_dir or model.config.data_dir
    dataset = stop.run(lambda: data.load(name, folder, notify=terminal.warn))
    found = model.evaluate(dataset, stop)
    confusion = classifier.confusion_matrix(dataset.test_labels, found.logits.argmax(axis=1))
    totals = confusion.sum(axis=1)
    records = (record for record, _ in read_metrics(options.workdir / "metrics.jsonl"))
    recorded = accuracy_at(model.step, records)
    return Result(
        workdir=str(options.workdir),
        step=model.step,
        dataset=name,
        images=len(dataset.test_labels),
        loss=found.loss,
        accuracy=found.accuracy,
        recorded_accuracy=recorded if recorded is not None and 0 <= recorded <= 1 else None,
        class_names=list(model.class_names),
        class_accuracy=[
            int(right) / int(all_) if all_ else None for right, all_ in zip(np.diag(confusion), totals, strict=True)
        ],
        confusion=confusion.tolist(),
    )


def describe(result: Result) -> str:
    """Return the text for people."""
    wrong = result.images - round(result.accuracy * result.images)
    lines = [
        f"step {result.step} of the run in {result.workdir}, on the test images of {result.dataset}",
        f"test loss {result.loss:.4f}, test accuracy {result.accuracy:.4f}: {wrong:,} of {result.images:,} wrong",
    ]
    if result.recorded_accuracy not in (None, result.accuracy):
        lines.append(
            f"the run itself recorded a test accuracy of {result.recorded_accuracy:.4f} here, on other devices?"
        )
    lines += ["", "a row for each label, a column for each answer"]
    lines.append("label    accuracy " + "".join(f"{_cut(name, 5):>6}" for name in result.class_names))
    for name, accuracy, counts in zip(result.class_names, result.class_accuracy, result.confusion, strict=True):
        share = "" if accuracy is None else f"{accuracy:.4f}"
        lines.append(f"{_cut(name, 8):8} {share:8} " + "".join(f"{count or '·':>6}" for count in counts))
    return "\n".join(lines)


def _cut(name: str, width: int) -> str:
    return name if len(name) <= width else f"{name[: width - 1]}…"


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
