"""Augmentation: distortions that leave a digit what it is, drawn anew each time that an image is learned from."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.ndimage import map_coordinates


def unchanged(images: Array, _key: Array) -> Array:
    """Return the images as they are, in the place of a distortion."""
    return images


def augment(images: Array, key: Array, *, shift_px: float, rotation_deg: float, zoom: float) -> Array:
    """Shift, rotate and stretch each image by random amounts of its own, about its centre.

    Args:
        images: [N, H, W, C], uint8 or floats in [0, 1].
        key: the random key; equal keys give equal distortions.
        shift_px: the farthest that an image is shifted, in pixels, vertically and horizontally.
        rotation_deg: the farthest that it is rotated, in degrees, in both directions.
        zoom: the share by which its height and its width become smaller or larger at the most, in [0, 1).

    Returns:
        [N, H, W, C] float32 in [0, 1], interpolated linearly; what comes in from outside is 0.
    """
    amounts = jax.random.uniform(key, (len(images), 5), minval=-1.0, maxval=1.0)
    pixels = images / 255.0 if images.dtype == jnp.uint8 else images
    centre = (jnp.array(images.shape[1:3]) - 1) / 2
    rows, columns = jnp.indices(images.shape[1:3])

    def augment_one(image: Array, amounts: Array) -> Array:
        """Look up for each pixel of the result where in the image it comes from."""
        shift, angle = amounts[:2] * shift_px, jnp.deg2rad(amounts[2] * rotation_deg)
        y, x = rows - centre[0], columns - centre[1]
        y, x = y * jnp.cos(angle) + x * jnp.sin(angle), x * jnp.cos(angle) - y * jnp.sin(angle)
        y, x = y * (1 + amounts[3] * zoom) + centre[0] + shift[0], x * (1 + amounts[4] * zoom) + centre[1] + shift[1]
        return jax.vmap(lambda channel: map_coordinates(channel, [y, x], order=1), in_axes=-1, out_axes=-1)(image)

    return jax.vmap(augment_one)(pixels, amounts)
