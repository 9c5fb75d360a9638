"""Shared by the examples of other libraries: train whole epochs until the test accuracy is 99 %."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import images

GOAL = 0.99
MAX_EPOCHS = 20
QUICK_IMAGES = 1000


@dataclass(frozen=True)
class Options:
    """Dataset and length of the training."""

    data_dir: Path
    steps: int | None = None
    """Updates to make instead of whole epochs, for --quick."""

    def read(self) -> dict[str, images.Array]:
        """Return images and labels, only the first ones if `steps` is given."""
        return images.read(self.data_dir, None if self.steps is None else QUICK_IMAGES)


def train_to_goal(options: Options, train_epoch: Callable[[], object], test_accuracy: Callable[[], float]) -> None:
    """Train and evaluate in turn until the goal is reached, and print each result."""
    for epoch in range(1, MAX_EPOCHS + 1):
        train_epoch()
        accuracy = test_accuracy()
        print(f"epochs={epoch} test_accuracy={accuracy:.4f}", flush=True)
        if accuracy >= GOAL or options.steps is not None:
            return
