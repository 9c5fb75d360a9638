"""Augmentation: random shifts, rotations and changes of size."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.ndimage import map_coordinates


def augment(images: Array, key: Array, *, shift_px: float, rotation_deg: float, zoom: float) -> Array:
    """Shift, rotate and scale each image at random, about its centre.

    Args:
        images: [N, H, W, C], uint8 or floats in [0, 1].
        key: random key; equal keys give equal results.
        shift_px: largest shift in pixels, vertical and horizontal.
        rotation_deg: largest rotation in degrees, in both directions.
        zoom: largest change of height and of width, as a fraction of the size, in [0, 1).

    Returns:
        [N, H, W, C] float32 in [0, 1], interpolated linearly; pixels from outside the image are 0. If all three
        amounts are 0, the images as they are.
    """
    if not (shift_px or rotation_deg or zoom):
        return images
    amounts = jax.random.uniform(key, (len(images), 5), minval=-1.0, maxval=1.0)
    pixels = images / 255.0 if images.dtype == jnp.uint8 else images
    centre = (jnp.array(images.shape[1:3]) - 1) / 2
    rows, columns = jnp.indices(images.shape[1:3])

    def augment_one(image: Array, amounts: Array) -> Array:
        """Look up where in the image each pixel of the result comes from."""
        shift, angle = amounts[:2] * shift_px, jnp.deg2rad(amounts[2] * rotation_deg)
        y, x = rows - centre[0], columns - centre[1]
        y, x = y * jnp.cos(angle) + x * jnp.sin(angle), x * jnp.cos(angle) - y * jnp.sin(angle)
        y, x = y * (1 + amounts[3] * zoom) + centre[0] + shift[0], x * (1 + amounts[4] * zoom) + centre[1] + shift[1]
        return jax.vmap(lambda channel: map_coordinates(channel, [y, x], order=1), in_axes=-1, out_axes=-1)(image)

    return jax.vmap(augment_one)(pixels, amounts)
