"""Our models in PyTorch."""

from collections.abc import Sequence

import torch
from flax import linen
from torch import nn

from mnist_jax.training.model import Network


def of_classifier(model: Network) -> nn.Sequential:
    """Return the PyTorch network for one of our models.

    Raises:
        ValueError: its activation is not relu, or it has batch normalization.
    """
    if model.activation is not linen.relu:
        raise ValueError(f"activation={model.activation} is not supported; use relu")
    if model.batch_norm:
        raise ValueError("batch_norm is not supported")
    return convolutional(
        features=model.features,
        kernel_sizes=model.kernel_sizes,
        unpooled=model.unpooled,
        padding=model.padding.lower(),
        hidden=model.hidden,
        dropout=model.dropout,
    )


def convolutional(
    *,
    features: Sequence[int],
    kernel_sizes: Sequence[int],
    padding: str,
    hidden: int,
    unpooled: Sequence[int] = (),
    dropout: float = 0.0,
) -> nn.Sequential:
    """Return convolutions with 2x2 max pooling (except `unpooled`), a dense layer, and ten logits.

    The activation follows the pooling, as in ours: the same values from a quarter of the inputs.
    """
    layers: list[nn.Module] = []
    channels = 1
    for number, (outputs, size) in enumerate(zip(features, kernel_sizes, strict=True), start=1):
        pooling = [] if number in unpooled else [nn.MaxPool2d(2)]
        layers += [nn.Conv2d(channels, outputs, size, padding=padding), *pooling, nn.ReLU()]
        channels = outputs
    layers.append(nn.Flatten())
    width = nn.Sequential(*layers)(torch.zeros(1, 1, 28, 28)).numel()
    drop = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(*layers, nn.Linear(width, hidden), nn.ReLU(), *drop, nn.Linear(hidden, 10))
