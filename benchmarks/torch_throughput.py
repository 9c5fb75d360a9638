"""PyTorch training of one of our models as a worker: eager, data in memory, batches gathered by index.

Unlike ours it keeps no sums of loss and accuracy, which is to its advantage. On a GPU there is one command more:
"compiled", float32 with `torch.compile`. It is compiled at its first call.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.nn.functional import cross_entropy

from benchmarks import images
from benchmarks.processes import serve
from benchmarks.torch_models import of_classifier
from mnist_jax.training.model import MODELS

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Options:
    """Model, dataset and device."""

    data_dir: Path
    model: str
    batch_size: int
    threads: int
    try_s: float  # duration of a trial of a memory format
    device: str


def main(options: Options) -> None:
    """Choose a memory format for each precision, and train on request."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as in our training
    arrays = images.read(options.data_dir)
    pixels = torch.tensor(arrays["train_images"], device=options.device).unsqueeze(1)
    labels = torch.tensor(arrays["train_labels"], device=options.device).long()
    trials, commands = {}, {}
    for precision in PRECISIONS:
        rates = {}
        for layout in FORMATS:
            updates = train(options, pixels, labels, precision, layout)
            run(updates, options.try_s / 2)
            trial = run(updates, options.try_s)
            rates[layout] = trials[f"{precision} {layout}"] = options.batch_size * trial["steps"] / trial["seconds"]
        best = max(rates, key=lambda layout: rates[layout])
        commands[precision] = partial(run, train(options, pixels, labels, precision, best))
        if options.device == "cuda" and precision == "float32":
            commands["compiled"] = partial(run, train(options, pixels, labels, precision, best, is_compiled=True))
    parameters = sum(weights.numel() for weights in of_classifier(MODELS[options.model]).parameters())
    serve({"parameters": parameters, "images_per_s": trials}, commands)


def train(
    options: Options,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    precision: str,
    layout: str,
    *,
    is_compiled: bool = False,
) -> Iterator[None]:
    """Make one update per `next`. pixels: [N, 1, 28, 28] uint8, labels: [N] int64."""
    model = MODELS[options.model]
    network = of_classifier(model).to(options.device, memory_format=FORMATS[layout])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=options.device == "cuda")
    if is_compiled:
        network = torch.compile(network, mode="reduce-overhead")  # with CUDA graphs
    while True:
        order = torch.randperm(len(labels), device=options.device)
        for rows in order.split(options.batch_size)[: len(labels) // options.batch_size]:
            batch = pixels[rows].float().div_(255).sub_(model.pixel_mean).div_(model.pixel_std)
            batch = batch.contiguous(memory_format=FORMATS[layout])
            with torch.autocast(options.device, torch.bfloat16, enabled=precision == "bfloat16"):
                loss = cross_entropy(network(batch), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def run(updates: Iterator[None], seconds: float) -> dict[str, Any]:
    """Train for some seconds, and return the number of updates and their duration."""
    steps, start_s = 0, time.monotonic()
    while time.monotonic() - start_s < seconds:
        next(updates)
        steps += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"steps": steps, "seconds": time.monotonic() - start_s}


if __name__ == "__main__":
    main(tyro.cli(Options))
