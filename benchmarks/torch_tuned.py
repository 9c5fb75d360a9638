"""The fastest PyTorch recipe to 99 % that we know: one epoch with a one-cycle learning rate."""

import math
from dataclasses import dataclass

import torch
import tyro
from torch.nn.functional import cross_entropy

from benchmarks import examples
from benchmarks.torch_models import convolutional

BATCH_SIZE = 256


@dataclass(frozen=True)
class Options(examples.Options):
    """As for the examples, with threads and seed."""

    threads: int = 1
    seed: int = 0


def main(options: Options) -> None:
    """Train, and print the accuracy on the test images."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    arrays = options.read()
    labels = {part: torch.tensor(arrays[f"{part}_labels"]).long() for part in ("train", "test")}
    pixels = {part: torch.tensor(arrays[f"{part}_images"]).unsqueeze(1) for part in ("train", "test")}
    network = convolutional(features=(24, 32), kernel_sizes=(5, 3), padding="valid", hidden=256)
    network.to(memory_format=torch.channels_last)
    total_steps = math.ceil(len(labels["train"]) / BATCH_SIZE)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, betas=(0.7, 0.9))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-2, total_steps=total_steps, cycle_momentum=False
    )
    for rows in torch.randperm(len(labels["train"])).split(BATCH_SIZE)[: options.steps]:
        loss = cross_entropy(network(normalized(pixels["train"][rows])), labels["train"][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.inference_mode():
        predictions = torch.cat([network(normalized(part)).argmax(1) for part in pixels["test"].split(1000)])
    accuracy = (predictions == labels["test"]).float().mean().item()
    print(f"test_accuracy={accuracy:.4f}")


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """Return images with mean 0 and standard deviation 1. pixels: [N, 1, 28, 28] uint8."""
    return pixels.float().div_(255).sub_(0.1307).div_(0.3081).contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    main(tyro.cli(Options))
