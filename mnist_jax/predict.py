"""The command `python -m mnist_jax.predict`: which digit is in a picture.

It writes nothing in the run directory, also while the run is at work.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from mnist_jax import cli
from mnist_jax import config as configs
from mnist_jax.config import ConfigError
from mnist_jax.console import Terminal, exit_process
from mnist_jax.runtime.preemption import StopSignal


@dataclass(frozen=True)
class Options:
    """Tell which digit is in a picture: PNG or JPEG, of any size, in any colours."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Directory of the run whose classifier is asked. Nothing is written there."""
    images: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(required)"),
    ]
    """Pictures of one digit each."""
    step: configs.WhichStep = "latest"
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of text."""


@dataclass(frozen=True)
class Prediction:
    """What a picture is taken for, or why it cannot be looked at; then all else is None."""

    image: str
    answer: str | None = None
    probability: float | None = None
    runner_up: str | None = None
    runner_up_probability: float | None = None
    probabilities: dict[str, float] | None = None
    error: str | None = None


def main(args: Sequence[str]) -> int:
    """Print what the pictures are taken for, and return the exit code: 1 where one could not be read.

    For others see `cli.run`.
    """
    options = configs.cli(Options, "predict", args)

    def work(stop: StopSignal, terminal: Terminal) -> int:
        predictions = []
        for prediction in predict(options, stop, terminal):
            predictions.append(prediction)
            if prediction.error:
                terminal.warn(f"error: {prediction.image}: {prediction.error}")
            elif not options.json:
                terminal.info(describe(prediction))
        if options.json:
            terminal.info(json.dumps([asdict(prediction) for prediction in predictions], indent=2))
        return 1 if any(prediction.error for prediction in predictions) else 0

    return cli.run(work)


def predict(options: Options, stop: StopSignal, terminal: Terminal) -> Iterator[Prediction]:
    """Yield what the pictures are taken for, in their order.

    Raises:
        CheckpointError, ConfigError, OSError: there is no classifier to ask.
        StoppedError: a signal came.
    """
    if not options.images:
        raise ConfigError("no picture is named; name one or more: predict WORKDIR IMAGE [IMAGE ...]")
    from mnist_jax.inference import classifier, preprocessing

    model = stop.run(lambda: classifier.load(options.workdir, options.step))
    if caution := preprocessing.caution(model.data.name):
        terminal.warn(f"warning: {caution}")

    def ask(path: Path) -> np.ndarray:
        with path.open("rb") as file:
            content = file.read(preprocessing.MAX_BYTES + 1)
        return model.predict(preprocessing.prepare(content, model.data.name))

    for path in options.images:
        try:
            probabilities = stop.run(partial(ask, path))  # A file may be a pipe to which nobody writes.
        except OSError as error:
            yield Prediction(str(path), error=f"it cannot be read ({error.strerror})")
        except preprocessing.UnreadableImageError as error:
            yield Prediction(str(path), error=str(error))
        else:
            yield rank(str(path), dict(zip(model.class_names, map(float, probabilities), strict=True)))


def rank(image: str, probabilities: dict[str, float]) -> Prediction:
    """Return the likeliest answer for an image, and the second."""
    first, second = sorted(probabilities, key=lambda answer: -probabilities[answer])[:2]
    return Prediction(image, first, probabilities[first], second, probabilities[second], probabilities)


def describe(found: Prediction) -> str:
    """Return the line for people."""
    return (
        f"{found.image}: {found.answer} ({_percent(found.probability)}), "
        f"then {found.runner_up} ({_percent(found.runner_up_probability)})"
    )


def _percent(share: float | None) -> str:
    assert share is not None
    return f"{share:.1%}" if 0.001 <= share <= 0.999 else f"{share:.2%}"


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
