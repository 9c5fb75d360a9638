"""Our classifiers in PyTorch, for training in PyTorch's own way."""

from collections.abc import Sequence

import torch
from flax import linen
from torch import nn

from mnist_jax.training.model import Network


def of_classifier(model: Network) -> nn.Sequential:
    """Return the network that a classifier of ours describes.

    Raises:
        ValueError: it has an activation that this does not know, or normalizes.
    """
    if model.activation is not linen.relu:
        raise ValueError(f"activation={model.activation}, and only relu is known here")
    if model.batch_norm:
        raise ValueError("batch_norm is not known here")
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
    """Return convolutions, all but the unpooled ones with 2x2 max pooling, a dense layer, and ten logits.

    The activation comes after the pooling, as in ours: the same values, of a quarter as many.
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
