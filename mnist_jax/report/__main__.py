"""The command `python -m mnist_jax.report`: write a report of a run, or of several to compare, as one HTML page.

Writes the page, its figures and TensorBoard's copies of two of them only; safe while the run trains.
"""

import base64
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import jinja2
import numpy as np
import tyro

from mnist_jax import cli
from mnist_jax import config as configs
from mnist_jax.checkpoint.integrity import CheckpointError
from mnist_jax.config import Config, ConfigError
from mnist_jax.console import Terminal, escape_control, exit_process
from mnist_jax.records import tensorboard
from mnist_jax.records.metrics import read_events
from mnist_jax.report.history import MAX_TEXT, Attempt, Curve, as_number, as_text, format_time, goodput, read_curve
from mnist_jax.runtime import lock
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training.array_files import DataError

if TYPE_CHECKING:
    from mnist_jax.report.run_status import Status

IMAGE = re.compile(r"(\d+-)?(run|confusion|mistakes|comparison)(-dark)?\.png")
MAX_MISTAKES = 24
COMPARED = ("Training", "State", "Test accuracy", "Goodput", "Throughput", "Software", "Hardware")


@dataclass(frozen=True)
class Options:
    """Write a report: curves, attempts, mistakes. Several runs are compared."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Directory of the run."""
    others: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="WORKDIR")] = ()
    """Directories of runs to compare it with."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: WORKDIR/report)")] = None
    """Directory for report.html and its images; the files of an earlier report are replaced."""
    data_dir: configs.DataDir = None


@dataclass
class RunReport:
    """What the page shows of a run. `facts` and `settings` are texts by their names."""

    name: str
    facts: dict[str, str]
    settings: dict[str, str]
    status: "Status"
    attempts: Sequence[Attempt]
    train: Curve
    test: Curve
    loss: "TrainingLoss"
    results: "TestResults"
    images: dict[str, bytes] = field(default_factory=dict)


def main(args: Sequence[str]) -> int:
    """Write the page, print its path, and return the exit code; see `cli.run`."""
    return cli.run(partial(write_report, cli.parse(Options, "report", args)))


def write_report(options: Options, stop: StopSignal, terminal: Terminal) -> int:
    """Write the page and print its path. In the run itself, write the images for TensorBoard too."""
    folder = options.out or options.workdir / "report"
    if folder.is_symlink() and folder.absolute().is_relative_to(options.workdir.absolute()):
        raise ConfigError(f"{folder} is a symbolic link that may lead out of the run; remove it, or use --out DIR")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a directory; remove it, or use --out DIR")
    runs = [read_run(workdir, options, stop, terminal) for workdir in (options.workdir, *options.others)]
    draw(runs, stop)
    write(make_page(runs), folder)
    first = runs[0]
    if options.out is None and first.results.mistakes:
        shown = {"worst mistakes": first.images["mistakes.png"], "confusion matrix": first.images["confusion.png"]}
        tensorboard.replace_images(options.workdir, first.results.step, shown)
    terminal.info(str(folder / "report.html"))
    return 0


def write(files: dict[str, bytes], folder: Path) -> None:
    """Write the files, and remove the images of an earlier report."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if IMAGE.fullmatch(path.name) and path.name not in files:
            path.unlink()
    for name, content in files.items():
        configs.write_whole(folder / name, content)


def read_run(workdir: Path, options: Options, stop: StopSignal, terminal: Terminal) -> RunReport:
    """Read a run and evaluate its newest checkpoint."""
    from mnist_jax.report import run_status

    status = stop.run(lambda: run_status.examine(workdir, verify=True))
    events = read_events(workdir / "events.jsonl")
    attempts = run_status.attempts_in(workdir, events, is_running=status.in_use_by is not None)
    train, test = (read_curve(workdir / "metrics.jsonl", split) for split in ("train", "test"))
    facts = {
        **describe_run(workdir),
        **describe_progress(status, attempts, test),
        **count_interruptions(status, attempts),
        **describe_speed(attempts),
        **describe_environment(events),
    }
    config = read_config(workdir)
    settings = {} if config is None else {name: str(value) for name, value in config.to_json().items()}
    results = evaluate_newest(workdir, options, stop, terminal)
    loss = TrainingLoss() if config is None else TrainingLoss.of(config, count_classes(workdir))
    return RunReport(workdir.absolute().name, facts, settings, status, attempts, train, test, loss, results)


def read_config(workdir: Path) -> Config | None:
    """Return the settings of a run, None if they cannot be read."""
    try:
        return configs.load(workdir / "config.json")
    except (ConfigError, OSError):
        return None


def count_classes(workdir: Path) -> int:
    """Return the number of classes of a run, 10 if its newest checkpoint cannot be read."""
    from mnist_jax.training import compatibility, selection

    try:
        newest = selection.find_checkpoints(workdir)[-1]
        return compatibility.data_of(newest.metadata(), newest.step).classes
    except (CheckpointError, ConfigError, OSError, IndexError):
        return 10


@dataclass(frozen=True)
class TrainingLoss:
    """How the training loss differs from the test loss: its name, and its lowest possible value in nats."""

    name: str = "training"
    minimum: float = 0.0

    @classmethod
    def of(cls, config: Config, classes: int) -> "TrainingLoss":
        """Return it for a run: with smoothed labels the lowest loss is their entropy."""
        smoothing = config.label_smoothing
        shares = np.full(classes, smoothing / classes)
        shares[0] += 1 - smoothing
        entropy = -float(np.sum(shares * np.log(np.maximum(shares, 1e-30))))
        is_augmented = config.shift_px or config.rotation_deg or config.zoom
        differences = (
            f"label smoothing {smoothing:g}" if smoothing else "",
            "augmented images" if is_augmented else "",
        )
        return cls(", ".join(["training", *filter(None, differences)]), entropy)


def describe_run(workdir: Path) -> dict[str, str]:
    """Return the settings of a run and its newest state, as far as they can be read."""
    from mnist_jax.training import compatibility, selection

    facts = {"Directory": str(workdir)}
    try:
        config = configs.load(workdir / "config.json")
        facts["Training"] = f"{config.model} on {config.dataset}, preset {config.preset}, seed {config.seed}"
        newest = selection.find_checkpoints(workdir)[-1]
        metadata = compatibility.check_metadata(newest.metadata(), newest.step)
        if isinstance(parent := metadata.get("parent"), dict):
            facts["Initial weights"] = (
                f"step {parent.get('step')} of {parent.get('run')}, SHA-256 {parent.get('state_sha256')}"
            )
        total = config.total_steps(compatibility.data_of(metadata, newest.step).train_images)
        facts["Newest checkpoint"] = f"step {newest.step:,} of {total:,}"
        facts["Its SHA-256"] = str(newest.manifest()["state_sha256"])
    except (CheckpointError, ConfigError, OSError, IndexError):
        pass
    return facts


def describe_progress(status: "Status", attempts: Sequence[Attempt], test: Curve) -> dict[str, str]:
    """Return the state of a run, its latest test accuracy and what the next start does."""
    state = attempts[-1].outcome if attempts else "unknown: events.jsonl is missing or empty"
    return {
        "State": f"in use by {lock.Holder(**status.in_use_by)}" if status.in_use_by else state,
        "Test accuracy": f"{test.accuracies[-1]:.2%} at step {test.steps[-1]:,}" if test.steps else "not evaluated yet",
        "The next start": status.next_start.text,
    }


def count_interruptions(status: "Status", attempts: Sequence[Attempt]) -> dict[str, str]:
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
        "Stops by a signal or a notice": f"{len(stops)}" + (f", saved within {max(times_s):.2f} s" if times_s else ""),
        "Kills": f"{kills}; {recomputed:,} steps were lost and recomputed",
        "Checkpoints": f"{good} of {len(status.checkpoints)} have every byte that was saved; "
        f"{len(status.quarantine)} in quarantine",
    }


def describe_speed(attempts: Sequence[Attempt]) -> dict[str, str]:
    """Return the goodput and the throughput of a run, as far as the event log has them."""
    useful_s, wall_s, elapsed_s = goodput(attempts)
    facts = {}
    if wall_s > 0:
        facts["Goodput"] = (
            f"{useful_s / wall_s:.0%}: {useful_s:.1f} s of training that was not lost, in {wall_s:.1f} s of attempts; "
            f"{useful_s / max(elapsed_s, wall_s):.0%} of the time since the first start"
        )
    if speeds := [speed for attempt in attempts for _, speed in attempt.speeds]:
        facts["Throughput"] = f"{np.median(speeds):,.0f} images/s (median of the log intervals)"
    return facts


def describe_environment(events: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return software and hardware of the latest start."""
    start: dict[str, Any] = next((event for event in reversed(events) if event["event"] == "start"), {})
    software, devices = (part if isinstance(part, dict) else {} for part in map(start.get, ("software", "devices")))
    facts = {}
    if software:
        facts["Software"] = ", ".join(f"{name} {as_text(version)}" for name, version in software.items())[:MAX_TEXT]
    if devices:
        count, threads = as_number(devices.get("count")), as_number(devices.get("cpu_threads"))
        kind = as_text(devices.get("cpu")) or as_text(devices.get("kind"))
        facts["Hardware"] = f"{count or 0:g} × {as_text(devices.get('platform'))}, {kind}"
        facts["Hardware"] += f", {threads:g} threads" if threads else ""
    return facts


@dataclass
class TestResults:
    """The predictions of the newest checkpoint for the test images; `missing` is the reason if there are none."""

    missing: str | None
    step: int
    class_names: Sequence[str]
    confusion: np.ndarray  # [classes, classes], a row for each label
    mistakes: list[tuple[np.ndarray, str]]  # image [H, W, 1] uint8, caption

    @property
    def classes(self) -> list[tuple[str, int, float, str]]:
        """Name, number of images, accuracy and the most frequent wrong prediction of each class that has images."""
        rows = []
        for label, counts in enumerate(self.confusion):
            wrong = np.where(np.arange(len(counts)) == label, 0, counts)
            most = f"{self.class_names[int(wrong.argmax())]} ({wrong.max()})" if wrong.any() else ""
            if counts.any():
                rows.append((self.class_names[label], int(counts.sum()), float(counts[label] / counts.sum()), most))
        return rows


def evaluate_newest(workdir: Path, options: Options, stop: StopSignal, terminal: Terminal) -> TestResults:
    """Evaluate the newest checkpoint."""
    from mnist_jax.inference import classifier

    try:
        model = stop.run(lambda: classifier.load(workdir, "latest", on_cpu=True))
        dataset = stop.run(lambda: model.load_dataset(options.data_dir, notify=terminal.warn))
        found = model.evaluate(dataset, stop)
    except (CheckpointError, ConfigError, DataError, OSError) as error:
        return TestResults(as_text(str(error)), 0, (), np.zeros((10, 10), int), [])
    mistakes = worst_mistakes(dataset.test_images, dataset.test_labels, found.logits, model.class_names)
    return TestResults(None, model.step, model.class_names, found.confusion, mistakes)


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


def draw(runs: Sequence[RunReport], stop: StopSignal) -> None:
    """Draw the figures of each run, light and dark, by file name."""
    os.environ["MPLBACKEND"] = "agg"  # Importing Matplotlib fails on a value that it does not know.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # It warns if HOME is not writable.
    from mnist_jax.report import figures

    for run in runs:
        results = run.results
        for dark, suffix in ((False, ".png"), (True, "-dark.png")):
            run.images[f"run{suffix}"] = figures.plot_run(
                run.attempts, run.train, run.test, train_name=run.loss.name, min_loss=run.loss.minimum, dark=dark
            )
            stop.check()
            if results.missing is None:
                matrix = figures.plot_confusion(results.confusion, results.class_names, dark=dark)
                run.images[f"confusion{suffix}"] = matrix
            if results.mistakes:
                mistakes = figures.plot_mistakes(*zip(*results.mistakes, strict=True), dark=dark)
                run.images[f"mistakes{suffix}"] = mistakes
            stop.check()


def make_page(runs: Sequence[RunReport]) -> dict[str, bytes]:
    """Return the page and its images, by file name. If there are several runs, the page compares them first."""
    from mnist_jax.report import figures

    if len(runs) == 1:
        return {**runs[0].images, "report.html": render(runs=runs)}
    curves = [(run.train, run.test) for run in runs]
    comparison = {
        "comparison.png": figures.plot_comparison(curves, dark=False),
        "comparison-dark.png": figures.plot_comparison(curves, dark=True),
    }
    rows = {name: [run.facts.get(name, "") for run in runs] for name in COMPARED}
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        rows[name] = [run.settings.get(name, "") for run in runs]
    different = {name: values for name, values in rows.items() if name in COMPARED or len(set(values)) > 1}
    files = {f"{n}-{name}": content for n, run in enumerate(runs, 1) for name, content in run.images.items()}
    page = render(runs=runs, comparison=different, comparison_images=comparison)
    return {**files, **comparison, "report.html": page}


def render(
    *,
    runs: Sequence[RunReport],
    comparison: dict[str, list[str]] | None = None,
    comparison_images: dict[str, bytes] | None = None,
) -> bytes:
    """Return the page with the images embedded. Text from files is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: escape_control(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        clock=format_time,
        duration=lambda seconds: str(timedelta(seconds=round(seconds))),
        url=lambda png: f"data:image/png;base64,{base64.b64encode(png).decode()}",
    )
    values = {"comparison": comparison, "comparison_images": comparison_images or {}, "written_s": time.time()}
    page = environment.get_template("report.html").render(runs=runs, **values)
    return page.encode(errors="backslashreplace")  # JSON may contain lone surrogates.


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
