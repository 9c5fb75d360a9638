"""The command `python -m mnist_jax.report`: a page on a run, to open in a browser and to send to others.

It writes the page and its pictures, and nothing else, also while the run is at work.
"""

import base64
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jinja2
import numpy as np
import tyro

from mnist_jax import cli
from mnist_jax import config as configs
from mnist_jax.config import Config, ConfigError
from mnist_jax.console import Terminal, escape_control, exit_process
from mnist_jax.records.metrics import read_events
from mnist_jax.report import promises
from mnist_jax.report.history import Curve, Turn, as_number, as_text, count, describe_end, read_curve, read_turns
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import data
from mnist_jax.training.data import DataError

if TYPE_CHECKING:
    from mnist_jax.report.figures import Mark
    from mnist_jax.report.run_status import Status

PICTURES = ("story", "confusion", "mistakes")
MAX_MISTAKES = 24


@dataclass(frozen=True)
class Options:
    """Write a page on a run: curves, interruptions, mistakes, promises held."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Directory of the run."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="(default: WORKDIR/report)")] = None
    """Where to write report.html and its pictures. Of an earlier report they are replaced."""
    data_dir: configs.DataDir = None


def main(args: Sequence[str]) -> int:
    """Write the page, print its path, and return the exit code; see `cli.run`."""
    options = configs.cli(Options, "report", args)

    def work(stop: StopSignal, terminal: Terminal) -> int:
        folder = options.out or options.workdir / "report"
        if folder.is_symlink() and folder.absolute().is_relative_to(options.workdir.absolute()):
            raise ConfigError(f"{folder} is a symbolic link, and may lead anywhere; remove it, or give --out DIR")
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is no directory; remove it, or give --out DIR")
        write(report(options, stop, terminal), folder)
        terminal.info(str(folder / "report.html"))
        return 0

    return cli.run(work)


def write(files: dict[str, bytes], folder: Path) -> None:
    """Write each file whole or not at all, and remove the pictures of an earlier report that this one has not.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in _picture_files() - files.keys():
        (folder / name).unlink(missing_ok=True)
    for name, content in files.items():
        configs.write_whole(folder / name, content)


def _picture_files() -> set[str]:
    return {f"{name}{theme}.png" for name in PICTURES for theme in ("", "-dark")}


def report(options: Options, stop: StopSignal, terminal: Terminal) -> dict[str, bytes]:
    """Return the page and its pictures by their names.

    Raises:
        ConfigError: there is no run.
        OSError: it cannot be read.
        StoppedError: a signal came.
    """
    from mnist_jax.report import run_status

    found = stop.run(lambda: run_status.examine(options.workdir, verify=True))
    events = read_events(options.workdir / "events.jsonl")
    turns = list(read_turns(events, is_running=found.in_use_by is not None, now_s=time.time()))
    train, test = (read_curve(options.workdir / "metrics.jsonl", split) for split in ("train", "test"))
    facts = identify(options.workdir, events)
    judgement = judge(options, stop, terminal)
    pictures = draw(turns, train, test, judgement, stop)
    page = render(
        name=options.workdir.absolute().name,
        written_s=time.time(),
        facts=facts,
        found=found,
        turns=turns,
        progress=describe_progress(turns, train, test, found),
        judgement=judgement,
        promises=list(promises.check(turns, events, found, facts.config)),
        pictures=pictures,
    )
    return {**pictures, "report.html": page}


class Facts(NamedTuple):
    """What a run says of itself; None where it does not."""

    config: Config | None
    total_steps: int | None
    state: tuple[int, str] | None  # the step of the newest state that is known, and its SHA-256


def identify(workdir: Path, events: Sequence[dict[str, Any]]) -> Facts:
    """Return which run it is, as its settings and its newest checkpoint say."""
    from mnist_jax.checkpoint.integrity import CheckpointError
    from mnist_jax.inference import classifier
    from mnist_jax.training import compatibility

    config = total_steps = None
    exits = [event for event in events if event["event"] == "exit"]
    step, sha256 = (exits[-1]["step"], as_text(exits[-1].get("state_sha256"))) if exits else (0, "")
    try:
        config = configs.load(workdir / "config.json")
        total_steps = config.steps
        newest = classifier.find_checkpoints(workdir)[-1]
        step, sha256 = newest.step, str(newest.manifest()["state_sha256"])
        total_steps = config.total_steps(compatibility.data_of(newest.metadata(), step).train_images)
    except (CheckpointError, ConfigError, OSError, IndexError):
        pass
    return Facts(config, total_steps, (step, sha256) if re.fullmatch("[0-9a-f]{64}", sha256) else None)


class Progress(NamedTuple):
    """How far a run has come: steps, a word or some for its state, and the latest test accuracy with its step."""

    step: int
    state: str
    test_accuracy: float | None
    test_step: int | None


def describe_progress(turns: Sequence[Turn], train: Curve, test: Curve, found: "Status") -> Progress:
    """Return how far a run has come, as far as the records show."""
    from mnist_jax.runtime import lock

    step = max([0, *train.steps[-1:], *test.steps[-1:], *(checkpoint.step for checkpoint in found.checkpoints[-1:])])
    if found.in_use_by:
        state = f"running, by {lock.Holder(**found.in_use_by)}"
    elif not turns:
        state = "not known, for its history is not there" if step else "not started yet"
    else:
        state = describe_end(turns[-1])
    accuracy = test.accuracies[-1] if test.steps else None
    return Progress(step, state, accuracy, test.steps[-1] if test.steps else None)


class Mistake(NamedTuple):
    """A test image that was taken for something else, and in words for what."""

    image: np.ndarray  # [28, 28, 1] uint8
    caption: str


@dataclass
class Judgement:
    """What the newest checkpoint makes of the test images; `missing` says why there is nothing."""

    missing: str | None = None
    step: int = 0
    images: int = 0
    wrong: int = 0
    class_names: tuple[str, ...] = ()
    confusion: np.ndarray = field(default_factory=lambda: np.zeros((10, 10), int))
    mistakes: list[Mistake] = field(default_factory=list)


def judge(options: Options, stop: StopSignal, terminal: Terminal) -> Judgement:
    """Return what the newest checkpoint makes of the test images.

    Raises:
        StoppedError: a signal came.
    """
    from mnist_jax.checkpoint.integrity import CheckpointError
    from mnist_jax.inference import classifier

    try:
        model = stop.run(lambda: classifier.load(options.workdir, "latest"))
        folder = options.data_dir or model.config.data_dir
        dataset = stop.run(lambda: data.load(model.data.name, folder, notify=terminal.warn))
        logits = model.evaluate(dataset, stop).logits
    except (CheckpointError, ConfigError, DataError, OSError) as error:
        return Judgement(missing=as_text(str(error)))
    answers = logits.argmax(axis=1)
    return Judgement(
        step=model.step,
        images=len(answers),
        wrong=int((answers != dataset.test_labels).sum()),
        class_names=model.class_names,
        confusion=classifier.confusion_matrix(dataset.test_labels, answers),
        mistakes=worst_mistakes(dataset.test_images, dataset.test_labels, logits, model.class_names),
    )


def worst_mistakes(
    images: np.ndarray, labels: np.ndarray, logits: np.ndarray, class_names: Sequence[str]
) -> list[Mistake]:
    """Return the images whose label was held the least likely, the least likely first.

    Args:
        images: [N, 28, 28, 1] uint8.
        labels: [N] in [0, 10).
        logits: [N, 10] float32.
        class_names: what the labels mean.
    """
    logits = logits.astype(np.float64)
    log_likelihoods = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    answers = logits.argmax(axis=1)
    wrong = np.flatnonzero(answers != labels)
    worst = wrong[np.argsort(log_likelihoods[wrong, labels[wrong]], kind="stable")][:MAX_MISTAKES]
    return [
        Mistake(
            images[index],
            f"{_with_article(class_names[labels[index]])}, taken for {class_names[answers[index]]} "
            f"({np.exp(log_likelihoods[index, answers[index]]):.0%})".replace("%", "\N{NO-BREAK SPACE}%"),
        )
        for index in worst
    ]


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in '8AEIOUaeiou' else 'a'} {name}"


def draw(turns: Sequence[Turn], train: Curve, test: Curve, judgement: Judgement, stop: StopSignal) -> dict[str, bytes]:
    """Return the pictures by the names of their files, each light and dark.

    Raises:
        StoppedError: a signal came.
    """
    from mnist_jax.report import figures

    timed = [(turn.began_s, turn.ended_s) for turn in turns if turn.began_s is not None and turn.ended_s is not None]
    drawn: dict[str, bytes] = {}
    for dark in (False, True):
        suffix = "-dark.png" if dark else ".png"
        drawn[f"story{suffix}"] = figures.plot_run(
            train=train,
            test=test,
            starts=[turn.first_step for turn in turns],
            marks=list(mark_ends(turns)),
            lost=[(turn.first_step, turn.first_step + turn.repeated_steps) for turn in turns if turn.repeated_steps],
            turns=timed,
            spans=[span for turn in turns for span in turn.spans],
            dark=dark,
        )
        stop.check()
        if judgement.missing is None:
            drawn[f"confusion{suffix}"] = figures.plot_confusion(judgement.confusion, judgement.class_names, dark=dark)
        if judgement.mistakes:
            images = np.stack([mistake.image for mistake in judgement.mistakes])
            captions = [mistake.caption for mistake in judgement.mistakes]
            drawn[f"mistakes{suffix}"] = figures.plot_mistakes(images, captions, dark=dark)
        stop.check()
    return drawn


def mark_ends(turns: Sequence[Turn]) -> Iterator["Mark"]:
    """Yield how and where each turn ended, in words of our own: what a file says stays out of the pictures."""
    from mnist_jax.report.figures import Mark

    for turn in turns:
        if turn.end != "running":
            label = turn.reason if turn.end == "stopped" and turn.reason else turn.end
            lost = f", {count(turn.lost_steps, 'step')} lost" if turn.lost_steps else ""
            yield Mark(turn.last_step, turn.end, label + lost)


def render(*, pictures: dict[str, bytes], **values: Any) -> bytes:
    """Return the page: all text that comes from files is escaped, and the pictures are inside."""
    from mnist_jax.report.figures import duration

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: escape_control(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(clock=_clock, duration=duration, end=describe_end)
    environment.globals.update(count=count)
    urls = {
        name.removesuffix(".png"): f"data:image/png;base64,{base64.b64encode(content).decode()}"
        for name, content in pictures.items()
    }
    page = environment.get_template("report.html").render(pictures=urls, **values)
    return page.encode(errors="backslashreplace")  # A file may hold half a character.


def _clock(seconds: float | None) -> str:
    """Return a time as people write it; "" where it is none."""
    usable = as_number(seconds)
    return "" if usable is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(usable))


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
