"""The model and the hyperparameters of PyTorch's basic MNIST example (pytorch/examples), as its users write it."""

import torch
import tyro
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import images
from benchmarks.examples import Options, train_to_goal


def main(options: Options) -> None:
    """Train until the goal accuracy is reached."""
    torch.manual_seed(1)
    arrays = options.read()
    loaders = {
        part: DataLoader(dataset(arrays[f"{part}_images"], arrays[f"{part}_labels"]), batch_size=size, shuffle=shuffle)
        for part, size, shuffle in (("train", 64, True), ("test", 1000, False))
    }
    network = nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25), nn.Flatten()),
        *(nn.Linear(64 * 12 * 12, 128), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(128, 10), nn.LogSoftmax(dim=1)),
    )
    optimizer = torch.optim.Adadelta(network.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)

    def train_epoch() -> None:
        network.train()
        for step, (batch, labels) in enumerate(loaders["train"]):
            if step == options.steps:
                break
            optimizer.zero_grad()
            functional.nll_loss(network(batch), labels).backward()
            optimizer.step()
        schedule.step()

    def test_accuracy() -> float:
        network.eval()
        with torch.no_grad():
            correct = sum((network(batch).argmax(1) == labels).sum().item() for batch, labels in loaders["test"])
        return correct / len(arrays["test_labels"])

    train_to_goal(options, train_epoch, test_accuracy)


def dataset(pixels: images.Array, labels: images.Array) -> TensorDataset:
    """Return images and labels as tensors; the images are normalized here, once."""
    x = (torch.tensor(pixels).unsqueeze(1) / 255 - 0.1307) / 0.3081
    return TensorDataset(x, torch.tensor(labels).long())


if __name__ == "__main__":
    main(tyro.cli(Options))
