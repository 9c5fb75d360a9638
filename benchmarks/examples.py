"""What the examples of others have in common: they train by epochs until 99 % of the test images are right."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import images

GOAL = 0.99
MAX_EPOCHS = 20
TRIAL_IMAGES = 1000


@dataclass(frozen=True)
class Options:
    """What an example is trained on, and how far."""

    data_dir: Path
    steps: int | None = None
    """For a trial: updates to make, in the place of whole epochs."""

    def read(self) -> dict[str, images.Array]:
        """Return the images and labels; a trial sees few."""
        return images.read(self.data_dir, None if self.steps is None else TRIAL_IMAGES)


def train_to_goal(options: Options, train_epoch: Callable[[], object], test_accuracy: Callable[[], float]) -> None:
    """Train and evaluate in turn until the goal is reached, and print how it went."""
    for epoch in range(1, MAX_EPOCHS + 1):
        train_epoch()
        accuracy = test_accuracy()
        print(f"epochs={epoch} test_accuracy={accuracy:.4f}", flush=True)
        if accuracy >= GOAL or options.steps is not None:
            return
