"""The networks: a few convolutions each, computed in one form on CPUs and in the usual form elsewhere.

model = MODELS["cnn"]
variables = model.init(key, images, train=False)
logits = model.apply(variables, images, train=False)
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # of a 2x2 square of pixels
VECTOR = 16  # float32 numbers in the longest vector of a processor

Padding = Literal["SAME", "VALID"]


def identity(x: Array) -> Array:
    """Return x as it is."""
    return x


class Network(nn.Module):
    """Convolutions with 2x2 max pooling, a dense layer, and a logit for each class.

    Attributes:
        features: output channels of the convolutions.
        kernel_sizes: height and width of their kernels, in pixels; odd.
        unpooled: numbers of the convolutions without pooling, from 1.
        padding: "SAME" pads with zeros, so that a convolution keeps height and width; "VALID" does not pad.
        hidden: width of the dense layer.
        classes: number of logits; `Trainer` sets it.
        activation: of the hidden layers. It must be non-decreasing, because it is applied after the pooling, to a
            quarter of the values.
        logits_activation: of the last layer.
        dropout: share of the hidden units dropped in training, in [0, 1); see `draw_dropout`.
        batch_norm: normalize before the hidden activations (S. Ioffe and C. Szegedy, 2015), by the batch in training
            and by running means and variances in evaluation. These are the mutable collection "batch_stats". They
            follow by a hundredth per update, so evaluations before some hundreds of updates are inaccurate.
        pixel_mean, pixel_std: pixels are scaled to [0, 1], minus `pixel_mean`, divided by `pixel_std`.
        batch_statistics: in training, compute these two from the batch. Evaluation uses the fixed ones, so that a
            prediction does not depend on the other images of its batch.
        batch_axes: axes of the mesh over which a batch is split, in the body of a `jax.shard_map`. Statistics of the
            batch are means over them too.
        for_cpu: compute convolutions in a form that is fast on CPUs; `Trainer` sets it. On other devices XLA's own
            form is fast.
    """

    features: tuple[int, ...]
    kernel_sizes: tuple[int, ...]
    hidden: int
    classes: int = 10
    unpooled: tuple[int, ...] = ()
    padding: Padding = "VALID"
    activation: Callable[[Array], Array] = nn.relu
    logits_activation: Callable[[Array], Array] = identity
    dropout: float = 0.0
    batch_norm: bool = False
    pixel_mean: float = 0.1307  # mean and standard deviation of the 60,000 training images of MNIST
    pixel_std: float = 0.3081
    batch_statistics: bool = False
    batch_axes: tuple[str, ...] = ()
    for_cpu: bool = False

    @nn.compact
    def __call__(self, images: Array, *, train: bool, kept_units: Array | None = None) -> Array:
        """Compute the logits.

        Args:
            images: [N, H, W, C], uint8 or floats in [0, 1]; H and W must be `min_side_px` or more.
            train: use the statistics of the batch, and drop units.
            kept_units: [N, hidden] bool, from `draw_dropout`; needed in training if `dropout` is above 0.

        Returns:
            [N, classes] float32.
        """
        x = images / 255.0 if images.dtype == jnp.uint8 else images
        x = self._normalize_pixels(x, from_batch=self.batch_statistics and train)

        def normalize(x: Array, name: str) -> Array:
            if not self.batch_norm:
                return x
            # Flax's type says one axis. Its only use is in `lax.pmean`, which takes several.
            axes: Any = self.batch_axes or None
            return nn.BatchNorm(use_running_average=not train, axis_name=axes, name=name)(x)

        use_bias = not self.batch_norm  # The normalization has a bias of its own.
        for number, (features, size) in enumerate(zip(self.features, self.kernel_sizes, strict=True), start=1):
            pooled = number not in self.unpooled
            x = Conv(features, size, self.padding, use_bias, pooled, self.for_cpu, name=f"conv{number}")(x)
            x = self.activation(normalize(x, f"conv{number}_norm"))
        x = nn.Dense(self.hidden, use_bias, name="dense1")(x.reshape(x.shape[0], -1))
        x = self.activation(normalize(x, "dense1_norm"))
        if train and self.dropout:
            if kept_units is None:
                raise TypeError(f"dropout={self.dropout} needs kept_units in training; see draw_dropout")
            x = jnp.where(kept_units, x / (1 - self.dropout), 0)
        return self.logits_activation(nn.Dense(self.classes, name="logits")(x))

    def _normalize_pixels(self, x: Array, *, from_batch: bool) -> Array:
        if not from_batch:
            return (x - self.pixel_mean) / self.pixel_std
        x = x - lax.pmean(x.mean(), self.batch_axes)
        std = jnp.sqrt(lax.pmean(jnp.square(x).mean(), self.batch_axes))
        return x / jnp.maximum(std, 1e-6)  # In a batch of one uniform grey, it is 0.

    def draw_dropout(self, key: Array, size: int) -> Array | None:
        """Draw the hidden units that `size` images keep, [size, hidden] bool; None if the model has no dropout."""
        return jax.random.bernoulli(key, 1 - self.dropout, (size, self.hidden)) if self.dropout else None

    @property
    def min_side_px(self) -> int:
        """The smallest height and width of an image, of which one pixel is left after the last pooling."""
        side_px = 1
        for number, size in reversed([*enumerate(self.kernel_sizes, start=1)]):
            side_px = side_px * (1 if number in self.unpooled else 2) + (size - 1 if self.padding == "VALID" else 0)
        return side_px


class Conv(nn.Module):
    """Convolve, pool if `pooled`, and add a bias if `use_bias`.

    The bias is added after the pooling: the result is the same, with a quarter of the work.
    """

    features: int
    kernel_size: int
    padding: Padding
    use_bias: bool
    pooled: bool
    for_cpu: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return [N, H, W, features] of x [N, H, W, C]. "VALID" subtracts K - 1 from H and W; pooling halves them.

        Pooling ignores the last row and column of an odd height and width.
        """
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        margin = self.kernel_size // 2 if self.padding == "SAME" else 0
        if self.pooled and self.for_cpu and x.shape[-1] == 1:
            y = pooled_conv_of_one_channel(x, kernel, margin)
        else:
            y = (conv if self.for_cpu else slide)(x, kernel, margin)
            y = pool(y) if self.pooled else y
        return y + self.param("bias", nn.initializers.zeros, (self.features,)) if self.use_bias else y


def power_of_relu(x: Array, *, exponent: float, chord: float = 1e-2) -> Array:
    """Return relu(x) ** exponent, replaced in (0, chord) by the straight line between the values at 0 and `chord`.

    For an exponent below 1 the power has an infinite slope at 0, and its product with the zero slope of the ReLU is
    NaN. The slope of the line is chord ** (exponent - 1), which is 63 for an exponent of 0.1.
    """
    x = nn.relu(x)
    return jnp.where(x > chord, jnp.maximum(x, chord) ** exponent, x * chord ** (exponent - 1))


def slide(x: Array, kernel: Array, margin: int, strides: tuple[int, int] = (1, 1)) -> Array:
    """Convolve x [N, H, W, I], zero-padded by `margin` pixels on each side, with a kernel [K, K, I, O], by XLA."""
    padding = ((margin, margin), (margin, margin))
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def pool(y: Array) -> Array:
    """Return the 2x2 max pooling of y [N, H, W, C], without the last row and column if H and W are odd."""
    y = crop_to_even(y)
    # The gradient of `nn.max_pool` is a scatter, which takes 19.5 ms on a CPU; the gradient of slices takes 0.9 ms.
    return functools.reduce(jnp.maximum, [y[:, i::2, j::2] for i, j in CORNERS])


def crop_to_even(x: Array) -> Array:
    """Return x [N, H, W, C] without the last row of an odd height and the last column of an odd width."""
    height, width = x.shape[1:3]
    return x[:, : height - height % 2, : width - width % 2] if height % 2 or width % 2 else x


def pooled_conv_of_one_channel(x: Array, kernel: Array, margin: int) -> Array:
    """Return `pool(conv(x, kernel, margin))` of x [N, H, W, 1] as one matrix product, for an odd K.

    Each 2x2 square of pixels becomes one pixel of four channels (space to depth). The four values that a pooling
    compares become four groups of output channels. All four read the same square of K + 1 by K + 1 pixels, each with
    the kernel in another corner. For K = 5 this is 36/25 of the arithmetic, but it is faster, because a convolution of
    one channel does not fill the vectors. These squares are small enough to copy them into the rows of a matrix.
    """
    x = crop_to_even(jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0))))
    kernel = jnp.concatenate([jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i, j in CORNERS], axis=-1)
    x = jnp.concatenate([x[:, i::2, j::2] for i, j in CORNERS], axis=-1)
    kernel = jnp.concatenate([kernel[i::2, j::2] for i, j in CORNERS], axis=-2)
    size, height, width = len(kernel), *(pixels - len(kernel) + 1 for pixels in x.shape[1:3])
    rows = jnp.concatenate([x[:, i : i + height, j : j + width] for i in range(size) for j in range(size)], axis=-1)
    y = rows.reshape(-1, kernel[..., 0].size) @ kernel.reshape(-1, kernel.shape[-1])
    return y.reshape(x.shape[0], height, width, len(CORNERS), -1).max(axis=-2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv(x: Array, kernel: Array, margin: int) -> Array:
    """Return `slide(x, kernel, margin)`, with gradients that are fast on a CPU.

    The value is y[n, p, o] = sum over d, i of x[n, p + d, i] k[d, i, o], for pixels p of the result and offsets d in
    the kernel, with x zero outside. For a cotangent g of y:

    * dk[d, i, o] = sum over n, p of x[n, p + d, i] g[n, p, o]. This is a convolution of an "image" x, whose channels
      are the examples n, with a "kernel" g as large as the image. Its "batch" is i, its "pixels" are the offsets d.
    * dx[n, q, i] = sum over d, o of g[n, q - d, o] k[d, i, o]. This is g convolved with the kernel rotated by 180
      degrees, with the margin K - 1 - margin.

    XLA derives the same, but on a CPU and inside a loop its layout misses the fast kernel: for 16 -> 32 channels, 5x5,
    14x14 pixels and a batch of 128, dk took 298 ms, and 9 ms with explicit transposes.
    """
    return slide(x, kernel, margin)


def _conv_forward(x: Array, kernel: Array, margin: int) -> tuple[Array, tuple[Array, Array]]:
    return slide(x, kernel, margin), (x, kernel)


def _conv_backward(margin: int, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    rotated, margin_left = kernel[::-1, ::-1].swapaxes(2, 3), len(kernel) - 1 - margin
    if x.shape[-1] < VECTOR and x.shape[2] % 2 == 0:
        # Few channels leave vectors half empty; two adjacent pixels have twice as many. cnn: 5.3 -> 4.8 ms.
        pairs = [jnp.pad(rotated, ((0, 0), (i, 1 - i), (0, 0), (0, 0))) for i in (0, 1)]
        dx = slide(g, jnp.concatenate(pairs, axis=-1), margin_left, strides=(1, 2)).reshape(x.shape)
    else:
        dx = slide(g, rotated, margin_left)
    dk = slide(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), margin)
    return dx, dk.transpose(1, 2, 0, 3)


conv.defvjp(_conv_forward, _conv_backward)


def describe(model: Network, image_shape: tuple[int, int] = (28, 28)) -> dict[str, Any]:
    """Describe as JSON values what an evaluation computes, for readers of exported weights."""
    height, width = image_shape

    def name(activation: Any) -> dict[str, Any]:
        settings = inspect.signature(activation).parameters.values()
        function = getattr(activation, "func", activation)
        return {"name": function.__name__, **{p.name: p.default for p in settings if p.default is not p.empty}}

    return {
        "input": f"images [N, {height}, {width}, 1] uint8, divided by 255, minus pixel_mean, divided by pixel_std",
        "pixel_mean": model.pixel_mean,
        "pixel_std": model.pixel_std,
        "convolutions": "conv1, conv2, ...: stride 1, kernels [height, width, in, out], not flipped; 2x2 max pooling "
        "unless the number is in unpooled, without the last row and column of an odd height and width; bias; "
        "normalization; activation",
        "padding": model.padding,
        "unpooled": list(model.unpooled),
        "normalization": "if there are batch_stats: scale * (x - mean) / sqrt(var + epsilon) + bias",
        "epsilon": nn.BatchNorm.epsilon,
        "activation": name(model.activation),
        "dense1": "the values in the order height, width, channel, times the kernel; bias; normalization; activation",
        "logits": "times the kernel; bias; logits_activation",
        "logits_activation": name(model.logits_activation),
        "activations": "relu: max(x, 0). power_of_relu: max(x, 0) ** exponent if x > chord, else "
        "max(x, 0) * chord ** (exponent - 1). identity: x",
    }


ORIGINAL = Network(features=(16, 32), kernel_sizes=(5, 5), hidden=1024, padding="SAME", pixel_mean=0.0, pixel_std=1.0)

MODELS: dict[str, Network] = {
    "cnn": Network(features=(8, 32), kernel_sizes=(5, 3), hidden=64),
    "cnn-tiny": Network(features=(8,), kernel_sizes=(5,), hidden=32),
    "cnn-large": Network(
        features=(32, 64, 96, 128), kernel_sizes=(5, 3, 3, 3), unpooled=(2, 3), hidden=256, batch_norm=True, dropout=0.5
    ),
    "original": ORIGINAL,
    "original-dropout": ORIGINAL.clone(dropout=0.5),
    "original-normalized": ORIGINAL.clone(batch_statistics=True, pixel_mean=0.1307, pixel_std=0.3081),
    "original-power": ORIGINAL.clone(
        dropout=0.5,
        activation=functools.partial(power_of_relu, exponent=0.1),
        logits_activation=functools.partial(power_of_relu, exponent=2.0),
    ),
}
