"""The command `python -m mnist_jax.predict`: predict the digits in images. Safe while the run trains."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from mnist_jax import cli
from mnist_jax import config as configs
from mnist_jax.config import ConfigError
from mnist_jax.console import Terminal, exit_process
from mnist_jax.runtime.preemption import StopSignal

if TYPE_CHECKING:
    from mnist_jax.inference.classifier import Classifier


@dataclass(frozen=True)
class Options:
    """Predict the digit in each image, of any size and in any colours."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Directory of the run. Read-only."""
    images: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="IMAGE [IMAGE ...]", help_behavior_hint="(required)"),
    ]
    """Images of one digit each: PNG, JPEG, WebP, AVIF, GIF, BMP or TIFF; - is standard input."""
    step: configs.WhichStep = "latest"
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON instead of text."""


@dataclass(frozen=True)
class Prediction:
    """The prediction for an image, or the error; then all else but `problem` and `places` is None.

    `is_sure`: whether the probability is at least `classifier.MIN_SURE`. `problem` is "unreadable", "blank" or "several
    digits"; `places` are the boxes of several digits, in shares of the image's height and width.
    """

    image: str
    answer: str | None = None
    probability: float | None = None
    runner_up: str | None = None
    runner_up_probability: float | None = None
    probabilities: dict[str, float] | None = None
    error: str | None = None
    is_sure: bool | None = None
    problem: str | None = None
    places: list[dict[str, float]] | None = None

    def __str__(self) -> str:
        """Return the line for people."""
        return (
            f"{self.image}: {self.answer} ({self.probability:.2%}), "
            f"then {self.runner_up} ({self.runner_up_probability:.2%}){'' if self.is_sure else ': not sure'}"
        )


def main(args: Sequence[str]) -> int:
    """Print the predictions, and return the exit code: 1 if an image shows no single digit, others as `cli.run`."""
    return cli.run(partial(print_predictions, cli.parse(Options, "predict", args)))


def print_predictions(options: Options, stop: StopSignal, terminal: Terminal) -> int:
    """Print the predictions, and return 1 if an image cannot be read, is blank or shows several digits."""
    if not options.images:
        raise ConfigError("no image is given: predict WORKDIR IMAGE [IMAGE ...]")
    from mnist_jax.inference import classifier, preprocessing

    model = stop.run(lambda: classifier.load(options.workdir, options.step, on_cpu=True))
    preprocessing.check_shape(model.image_shape)
    if warning := preprocessing.dataset_warning(model.data.name):
        terminal.warn(f"warning: {warning}")
    predictions = []
    for path in options.images:
        prediction = stop.run(partial(predict, model, path))  # Opening a named pipe waits for a writer.
        predictions.append(prediction)
        if prediction.error:
            terminal.warn(f"error: {path}: {prediction.error}")
        elif not options.json:
            terminal.info(str(prediction))
    if options.json:
        terminal.info(cli.to_json([asdict(prediction) for prediction in predictions]))
    return 1 if any(prediction.error for prediction in predictions) else 0


def predict(model: "Classifier", path: Path) -> Prediction:
    """Return the prediction for an image file, or the error."""
    from mnist_jax.inference import classifier, preprocessing
    from mnist_jax.inference.images import MAX_BYTES, UnreadableImageError

    try:
        image = preprocessing.prepare(read(path, MAX_BYTES + 1), model.data.name)
    except OSError as error:
        return Prediction(str(path), error=f"it cannot be read ({error.strerror})", problem="unreadable")
    except UnreadableImageError as error:
        places = [box._asdict() for box in error.places] or None
        return Prediction(str(path), error=str(error), problem=error.problem, places=places)
    probabilities = dict(zip(model.class_names, map(float, model.predict(image)), strict=True))
    (first, p_first), (second, p_second) = sorted(probabilities.items(), key=lambda item: -item[1])[:2]
    is_sure = p_first >= classifier.MIN_SURE
    return Prediction(str(path), first, p_first, second, p_second, probabilities, is_sure=is_sure)


def read(path: Path, max_bytes: int) -> bytes:
    """Return at most the first `max_bytes` of a file, or of standard input for "-"."""
    if str(path) == "-":
        return sys.stdin.buffer.read(max_bytes)
    with path.open("rb") as file:
        return file.read(max_bytes)


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
