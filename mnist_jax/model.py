"""The classifiers: two small convolutions, written so that their gradients are as fast inside a loop as outside.

model = MODELS["cnn"]
params = model.init(key, images, train=False)["params"]
logits = model.apply({"params": params}, images, train=False)
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # of a 2x2 square of pixels


class Classifier(nn.Module):
    """Two convolutions with 2x2 max pooling, a dense layer, and ten logits.

    Attributes:
        features: output channels of the two convolutions.
        kernel_sizes: height and width of their kernels, in pixels; odd.
        hidden: width of the dense layer.
        activation: of the hidden layers. It must not decrease, for it is taken after the pooling: the same values,
            of a quarter as many.
        logits_activation: of the last layer.
        dropout: share of the hidden units dropped in training, in [0, 1); needs `rngs={"dropout": key}`.
        pixel_mean, pixel_std: what is taken off pixels scaled to [0, 1], and what they are then divided by.
        batch_statistics: in training, take these two from the batch instead. Evaluation keeps the fixed ones, which
            the batch's are estimates of: the answer for an image must not hang on the images next to it.
    """

    features: tuple[int, int] = (8, 32)
    kernel_sizes: tuple[int, int] = (5, 3)
    hidden: int = 128
    activation: Callable[[Array], Array] = nn.relu
    logits_activation: Callable[[Array], Array] = lambda x: x
    dropout: float = 0.0
    pixel_mean: float = 0.1307  # these two are those of the 60,000 training images of MNIST
    pixel_std: float = 0.3081
    batch_statistics: bool = False

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> Array:
        """Return logits [N, 10] float32 of images [N, H, W, C], uint8 or floats in [0, 1]; H and W divisible by 4."""
        x = images / 255.0 if images.dtype == jnp.uint8 else images
        from_batch = self.batch_statistics and train
        # A batch of one single grey has no spread to divide by.
        mean, std = (x.mean(), jnp.maximum(x.std(), 1e-6)) if from_batch else (self.pixel_mean, self.pixel_std)
        x = (x - mean) / std
        x = self.activation(PooledConv(self.features[0], self.kernel_sizes[0], name="conv1")(x))
        x = self.activation(PooledConv(self.features[1], self.kernel_sizes[1], name="conv2")(x))
        x = self.activation(nn.Dense(self.hidden, name="dense1")(x.reshape(len(x), -1)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return self.logits_activation(nn.Dense(10, name="logits")(x))


class PooledConv(nn.Module):
    """Convolve, pool, and add a bias: after the pooling, where it is the same and a quarter of the work."""

    features: int
    kernel_size: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Return [N, H/2, W/2, features] of x [N, H, W, C]; H and W even."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return (pooled_conv_of_one_channel if x.shape[-1] == 1 else pooled_conv)(x, kernel) + bias


def power_of_relu(x: Array, *, exponent: float, chord: float = 1e-2) -> Array:
    """Return relu(x) ** exponent, but for x in (0, chord) the straight line between its values at 0 and at `chord`.

    With an exponent below 1 the power itself has an infinite slope at 0, which times the zero of the ReLU makes the
    gradient NaN. The line's slope is chord ** (exponent - 1), 63 for an exponent of 0.1; elsewhere nothing changes.
    """
    x = nn.relu(x)
    return jnp.where(x > chord, jnp.maximum(x, chord) ** exponent, x * chord ** (exponent - 1))


def pooled_conv(x: Array, kernel: Array) -> Array:
    """Return the 2x2 max pooling of `conv(x, kernel)`, [N, H/2, W/2, O]."""
    # On a CPU the gradient of `nn.max_pool` takes 19.5 ms where that of four strided slices takes 0.9 ms.
    y = conv(x, kernel)
    return functools.reduce(jnp.maximum, [y[:, i::2, j::2] for i, j in CORNERS])


def pooled_conv_of_one_channel(x: Array, kernel: Array) -> Array:
    """Return `pooled_conv(x, kernel)` by a convolution of half the height and width, and four times the channels.

    Each 2x2 square of pixels becomes one pixel with four channels, and each of the four outputs that the pooling
    compares becomes a group of channels, with the kernel shifted to the corner it stands for. That is 1.4 times the
    arithmetic or more, but vectors have something to work on: with 8 features 9.9 -> 4.1 ms, gradient included.
    """
    half = kernel.shape[0] // 2
    reach = -(-half // 2)  # of the new kernel around its centre, in squares
    low, high = 2 * reach - half, 2 * reach - half + 1
    shifted = [jnp.pad(kernel, ((low + i, high - i), (low + j, high - j), (0, 0), (0, 0))) for i, j in CORNERS]
    kernel = jnp.concatenate(shifted, axis=-1)
    kernel = jnp.concatenate([kernel[i::2, j::2] for i, j in CORNERS], axis=-2)
    squares = jnp.concatenate([x[:, i::2, j::2] for i, j in CORNERS], axis=-1)
    return functools.reduce(jnp.maximum, jnp.split(conv(squares, kernel), 4, axis=-1))


@jax.custom_vjp
def conv(x: Array, kernel: Array) -> Array:
    """Convolve x [N, H, W, I] with a kernel [K, K, I, O], K odd, at stride 1, zero-padded to [N, H, W, O].

    The value is y[n, p, o] = sum over d, i of x[n, p + d, i] k[d, i, o], for pixels p and offsets d from the centre.
    So, for a cotangent g of y:

    * dk[d, i, o] = sum over n, p of x[n, p + d, i] g[n, p, o]: a convolution too, of an "image" x whose channels are
      the examples n, with a "kernel" g as large as the image. Its "batch" is i, and its "pixels" are the offsets d.
    * dx[n, q, i] = sum over d, o of g[n, q - d, o] k[d, i, o]: g convolved with the kernel turned by half a turn.

    These are what XLA derives as well, but on a CPU, inside a loop, its layout for them misses the fast kernel: for
    16 -> 32 channels, 5x5, 14x14 pixels and a batch of 128, dk took 298 ms so and 9 ms with the transposes written out.
    """
    return _slide(x, kernel, kernel.shape[0] // 2)


def _slide(x: Array, kernel: Array, margin: int) -> Array:
    padding = ((margin, margin), (margin, margin))
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _gradients_written_out(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
    margin = kernel.shape[0] // 2
    dx = _slide(g, kernel[::-1, ::-1].swapaxes(2, 3), margin)
    dk = _slide(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), margin)
    return dx, dk.transpose(1, 2, 0, 3)


def _gradients_by_xla(x: Array, kernel: Array, g: Array) -> tuple[Array, Array]:
    _, gradients = jax.vjp(lambda x, kernel: _slide(x, kernel, kernel.shape[0] // 2), x, kernel)
    return gradients(g)


def _conv_backward(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    # Chosen where the program is lowered, not by `jax.default_backend()`: a GPU machine may compile for its CPU.
    return lax.platform_dependent(*residuals, g, cpu=_gradients_written_out, default=_gradients_by_xla)


conv.defvjp(lambda x, kernel: (conv(x, kernel), (x, kernel)), _conv_backward)

ORIGINAL = Classifier(features=(16, 32), kernel_sizes=(5, 5), hidden=1024, pixel_mean=0.0, pixel_std=1.0)

MODELS: dict[str, Classifier] = {
    "cnn": Classifier(),
    "original": ORIGINAL,
    "original-dropout": ORIGINAL.clone(dropout=0.5),
    "original-normalized": ORIGINAL.clone(batch_statistics=True, pixel_mean=0.1307, pixel_std=0.3081),
    "original-power": ORIGINAL.clone(
        dropout=0.5,
        activation=functools.partial(power_of_relu, exponent=0.1),
        logits_activation=functools.partial(power_of_relu, exponent=2.0),
    ),
}
