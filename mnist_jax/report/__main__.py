"""The command `python -m mnist_jax.report`: write a report of a run as one HTML page.

Writes the page and its figures only; safe while the run trains.
"""

import base64
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jinja2
import numpy as np
import tyro

from mnist_jax import cli
from mnist_jax import config as configs
from mnist_jax.checkpoint.integrity import CheckpointError
from mnist_jax.config import ConfigError
from mnist_jax.console import Terminal, escape_control, exit_process
from mnist_jax.records.metrics import read_events
from mnist_jax.report.history import Attempt, Curve, as_text, format_time, read_attempts, read_curve
from mnist_jax.runtime import lock
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import data
from mnist_jax.training.array_files import DataError

IMAGES = {f"{name}{theme}.png" for name in ("run", "confusion", "mistakes") for theme in ("", "-dark")}
MAX_MISTAKES = 24


@dataclass(frozen=True)
class Options:
    """Write a report: curves, attempts, confusion matrix, worst mistakes, checkpoints."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Directory of the run."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: WORKDIR/report)")] = None
    """Directory for report.html and its images; the files of an earlier report are replaced."""
    data_dir: configs.DataDir = None


def main(args: Sequence[str]) -> int:
    """Write the page, print its path, and return the exit code; see `cli.run`."""
    return cli.run(partial(write_report, configs.cli(Options, "report", args)))


def write_report(options: Options, stop: StopSignal, terminal: Terminal) -> int:
    """Write the page and print its path."""
    folder = options.out or options.workdir / "report"
    if folder.is_symlink() and folder.absolute().is_relative_to(options.workdir.absolute()):
        raise ConfigError(f"{folder} is a symbolic link that may lead out of the run; remove it, or use --out DIR")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a directory; remove it, or use --out DIR")
    write(make_report(options, stop, terminal), folder)
    terminal.info(str(folder / "report.html"))
    return 0


def write(files: dict[str, bytes], folder: Path) -> None:
    """Write the files, and remove the images of an earlier report."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in IMAGES - files.keys():
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        configs.write_whole(folder / name, content)


def make_report(options: Options, stop: StopSignal, terminal: Terminal) -> dict[str, bytes]:
    """Return the page and its images, by file name."""
    from mnist_jax.report import run_status

    status = stop.run(lambda: run_status.examine(options.workdir, verify=True))
    events = read_events(options.workdir / "events.jsonl")
    attempts = read_attempts(events, is_running=status.in_use_by is not None, now_s=time.time())
    train, test = (read_curve(options.workdir / "metrics.jsonl", split) for split in ("train", "test"))
    facts = {**describe_run(options.workdir), **describe_progress(status, attempts, test)}
    results = evaluate_newest(options, stop, terminal)
    images = draw(attempts, train, test, results, stop)
    page = render(
        name=options.workdir.absolute().name,
        facts={**facts, **count_interruptions(status, attempts)},
        status=status,
        attempts=attempts,
        results=results,
        images=images,
    )
    return {**images, "report.html": page}


def describe_run(workdir: Path) -> dict[str, str]:
    """Return the settings of a run and its newest state, as far as they can be read."""
    from mnist_jax.inference import classifier
    from mnist_jax.training import compatibility

    facts = {"Directory": str(workdir)}
    try:
        config = configs.load(workdir / "config.json")
        facts["Training"] = f"{config.model} on {config.dataset}, preset {config.preset}, seed {config.seed}"
        newest = classifier.find_checkpoints(workdir)[-1]
        total = config.total_steps(compatibility.data_of(newest.metadata(), newest.step).train_images)
        facts["Newest checkpoint"] = f"step {newest.step:,} of {total:,}"
        facts["Its SHA-256"] = str(newest.manifest()["state_sha256"])
    except (CheckpointError, ConfigError, OSError, IndexError):
        pass
    return facts


def describe_progress(status: Any, attempts: Sequence[Attempt], test: Curve) -> dict[str, str]:
    """Return the state of a run, its latest test accuracy and what the next start does."""
    state = attempts[-1].outcome if attempts else "unknown: events.jsonl is missing or empty"
    return {
        "State": f"in use by {lock.Holder(**status.in_use_by)}" if status.in_use_by else state,
        "Test accuracy": f"{test.accuracies[-1]:.2%} at step {test.steps[-1]:,}" if test.steps else "not evaluated yet",
        "The next start": status.next_start.text,
    }


def count_interruptions(status: Any, attempts: Sequence[Attempt]) -> dict[str, str]:
    """Return how exact the resumes were, how long the stops took, what the kills cost, and which checkpoints are good.

    The event log is the only source. `replay` proves exactness.
    """
    resumes = [attempt.resume for attempt in attempts if attempt.resume]
    stops = [attempt.saved_in_s for attempt in attempts if attempt.end == "stopped"]
    times_s = [seconds for seconds in stops if seconds is not None]
    kills = sum(attempt.end == "killed" for attempt in attempts)
    recomputed = sum(attempt.recomputed_steps for attempt in attempts)
    good = sum(checkpoint.good is True for checkpoint in status.checkpoints)
    return {
        "Resumes": f"{len(resumes)}, of which {resumes.count('exact')} exact",
        "Stops by a signal": f"{len(stops)}" + (f", saved within {max(times_s):.2f} s" if times_s else ""),
        "Kills": f"{kills}; {recomputed:,} steps were lost and recomputed",
        "Checkpoints": f"{good} of {len(status.checkpoints)} have every byte that was saved; "
        f"{len(status.quarantine)} in quarantine",
    }


@dataclass
class TestResults:
    """The predictions of the newest checkpoint for the test images; `missing` is the reason if there are none."""

    missing: str | None
    step: int
    class_names: Sequence[str]
    confusion: np.ndarray  # [classes, classes], a row for each label
    mistakes: list[tuple[np.ndarray, str]]  # image [H, W, 1] uint8, caption


def evaluate_newest(options: Options, stop: StopSignal, terminal: Terminal) -> TestResults:
    """Evaluate the newest checkpoint."""
    from mnist_jax.inference import classifier

    try:
        model = stop.run(lambda: classifier.load(options.workdir, "latest"))
        folder = options.data_dir or model.config.data_dir
        dataset = stop.run(lambda: data.load(model.data.name, folder, notify=terminal.warn))
        logits = model.evaluate(dataset, stop).logits
    except (CheckpointError, ConfigError, DataError, OSError) as error:
        return TestResults(as_text(str(error)), 0, (), np.zeros((10, 10), int), [])
    confusion = classifier.confusion_matrix(dataset.test_labels, logits.argmax(axis=1), len(model.class_names))
    mistakes = worst_mistakes(dataset.test_images, dataset.test_labels, logits, model.class_names)
    return TestResults(None, model.step, model.class_names, confusion, mistakes)


def worst_mistakes(
    images: np.ndarray, labels: np.ndarray, logits: np.ndarray, class_names: Sequence[str]
) -> list[tuple[np.ndarray, str]]:
    """Return the images whose label has the lowest probability, lowest first, with captions.

    Args:
        images: [N, H, W, 1] uint8.
        labels: [N] in [0, classes).
        logits: [N, classes] float32.
        class_names: the names of the labels.
    """
    logits = logits.astype(np.float64)
    log_probabilities = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    predictions = logits.argmax(axis=1)
    wrong = np.flatnonzero(predictions != labels)
    worst = wrong[np.argsort(log_probabilities[wrong, labels[wrong]], kind="stable")][:MAX_MISTAKES]
    return [
        (
            images[index],
            f"{class_names[labels[index]]}, predicted {class_names[predictions[index]]} "
            f"({np.exp(log_probabilities[index, predictions[index]]):.0%})",
        )
        for index in worst
    ]


def draw(
    attempts: Sequence[Attempt], train: Curve, test: Curve, results: TestResults, stop: StopSignal
) -> dict[str, bytes]:
    """Return the figures by file name, each light and dark."""
    os.environ["MPLBACKEND"] = "agg"  # Importing Matplotlib fails on a value that it does not know.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # It warns if HOME is not writable.
    from mnist_jax.report import figures

    drawn: dict[str, bytes] = {}
    for dark, suffix in ((False, ".png"), (True, "-dark.png")):
        drawn[f"run{suffix}"] = figures.plot_run(attempts, train, test, dark=dark)
        stop.check()
        if results.missing is None:
            drawn[f"confusion{suffix}"] = figures.plot_confusion(results.confusion, results.class_names, dark=dark)
        if results.mistakes:
            drawn[f"mistakes{suffix}"] = figures.plot_mistakes(*zip(*results.mistakes, strict=True), dark=dark)
        stop.check()
    return drawn


def render(*, images: dict[str, bytes], **values: Any) -> bytes:
    """Return the page with the images embedded. Text from files is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: escape_control(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(clock=format_time, duration=lambda seconds: str(timedelta(seconds=round(seconds))))
    urls = {
        name.removesuffix(".png"): f"data:image/png;base64,{base64.b64encode(content).decode()}"
        for name, content in images.items()
    }
    page = environment.get_template("report.html").render(images=urls, written_s=time.time(), **values)
    return page.encode(errors="backslashreplace")  # JSON may contain lone surrogates.


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
