"""Preprocessing: convert an image of a digit, of any size, colours and polarity, to the form of the training images.

MNIST's authors (Y. LeCun, C. Cortes, C. J. C. Burges) scaled each digit with its aspect ratio into 20×20 pixels and
moved it by whole pixels so that the centre of mass is in the middle of 28×28. In all but two of the 70,000 images the
mean row and the mean column, numbered from 0, are in [13.5, 14.5). This module does the same.
"""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage

from mnist_jax.config import ConfigError

MAX_BYTES = 2**26
MAX_PIXELS = 2**26  # Phone cameras have up to 50 million.
SIDE_PX = 1024  # Larger images are scaled down first.
MIN_CONTRAST = 0.1  # 1 is the contrast between black and white.
BOX_PX, SIZE_PX = 20, 28

Image.MAX_IMAGE_PIXELS = None  # Pillow would print a warning; `decode` has its own limit.


class UnreadableImageError(ValueError):
    """A file contains no usable digit; the message is the reason."""


def check_shape(image_shape: tuple[int, int]) -> None:
    """Raise ConfigError if a classifier takes images of another shape than `prepare` produces."""
    if image_shape != (SIZE_PX, SIZE_PX):
        height, width = image_shape
        raise ConfigError(
            f"this run was trained on images of {height}×{width} pixels, but pictures are preprocessed to "
            f"{SIZE_PX}×{SIZE_PX}; call mnist_jax.load(WORKDIR).predict with an array of its shape"
        )


def dataset_warning(dataset: str) -> str | None:
    """Return a warning if `prepare` does not produce images like those of a dataset."""
    if dataset in ("mnist", "digits"):
        return None
    return f"this run was trained on {dataset}, but images are preprocessed as handwritten digits"


def prepare(content: bytes, dataset: str = "mnist", *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the digit in a PNG or JPEG file as [28, 28, 1] uint8, foreground 255 on background 0.

    Args:
        content: the file.
        dataset: "digits" for the form of the built-in digits; all others get the form of MNIST.
        max_pixels: limit for the size of the image.

    Raises:
        UnreadableImageError: the file is not PNG or JPEG, is corrupt or too large, or shows nothing.
    """
    digit = crop(foreground_mask(decode(content, max_pixels=max_pixels)))
    return as_digits(digit) if dataset == "digits" else as_mnist(digit)


def decode(content: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the pixels of a PNG or JPEG file, at most SIDE_PX a side: RGBA, [H, W, 4] in [0, 1]."""
    if not content:
        raise UnreadableImageError("it is empty")
    if len(content) > MAX_BYTES:
        raise UnreadableImageError(f"it has more than {MAX_BYTES / 1e6:.0f} MB")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as file:
            if file.width * file.height > max_pixels:
                limit = f"{max_pixels / 1e6:.0f} million"
                raise UnreadableImageError(f"it has {file.width}×{file.height} pixels, more than {limit}")
            file.draft("RGB", (SIDE_PX, SIDE_PX))  # JPEG can be decoded at a fraction of its size.
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith(("I", "F")):  # 16 bits per pixel; `convert` would clip them.
                image = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
            image = image.convert("RGBA")
            image.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.HAMMING)
            return np.asarray(image, np.float32) / 255
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError("it is neither PNG nor JPEG") from error
    except Exception as error:  # Pillow raises many types for corrupt files.
        raise UnreadableImageError(f"it is corrupt: {error}") from error


def foreground_mask(pixels: np.ndarray) -> np.ndarray:
    """Return the foreground, [H, W] in [0, 1], of RGBA pixels [H, W, 4] in [0, 1].

    The background is the median colour of the edges, and the foreground is what differs from it. So the polarity and
    the colours do not matter. Transparent parts belong to the background.
    """
    colors, alpha = pixels[..., :3], pixels[..., 3:]
    is_dark = np.sum(colors * alpha) < 0.5 * np.sum(alpha) * 3
    colors = colors * alpha + (1 - alpha) * is_dark  # Dark drawings are put on white, light ones on black.
    edges = np.concatenate([colors[0], colors[-1], colors[:, 0], colors[:, -1]])
    distance = np.sqrt(np.mean((colors - np.median(edges, axis=0)) ** 2, axis=-1))
    if distance.max() < MIN_CONTRAST:
        raise UnreadableImageError("nothing is drawn on it: all pixels have nearly the same colour")
    if np.ptp(distance) < MIN_CONTRAST:
        raise UnreadableImageError("foreground and background cannot be distinguished: its edges have two colours")
    threshold = otsu(distance)
    background, foreground = distance[distance <= threshold], distance[distance > threshold]
    # Paper and ink both have shades.
    low, high = min(background.mean() + 3 * background.std(), threshold), foreground.mean()
    return np.clip((distance - low) / (high - low), 0, 1)


def otsu(values: np.ndarray) -> float:
    """Return the threshold that maximizes the variance between two classes (N. Otsu, 1979). Values must differ."""
    counts, limits = np.histogram(values, 256)
    below, centers = np.cumsum(counts)[:-1], (limits[:-1] + limits[1:]) / 2
    sums = np.cumsum(counts * centers)
    above = values.size - below
    between = below * above * (sums[:-1] / np.maximum(below, 1) - (sums[-1] - sums[:-1]) / np.maximum(above, 1)) ** 2
    return float(limits[1 + np.argmax(between)])


def crop(mask: np.ndarray) -> np.ndarray:
    """Return the part of a mask [H, W] that has foreground. Specks below 1/20 of the largest part are removed."""
    parts, count = ndimage.label(mask > 0.1, np.ones((3, 3)))
    mass = ndimage.sum_labels(mask, parts, np.arange(count + 1))
    mass[0] = 0
    kept = np.where((mass > mass.max() / 20)[parts], mask, 0)
    rows, columns = np.nonzero(kept)
    return kept[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def as_mnist(digit: np.ndarray) -> np.ndarray:
    """Return a cropped digit in the form of MNIST: [28, 28, 1] uint8."""
    scaled = scale(digit, *(max(1, round(BOX_PX * length / max(digit.shape))) for length in digit.shape))
    image = np.zeros((SIZE_PX, SIZE_PX, 1), np.uint8)
    places = []
    for axis, length in enumerate(scaled.shape):
        mean = scaled.sum(1 - axis) @ np.arange(length) / scaled.sum()
        first = np.clip(round(SIZE_PX / 2 - mean), 0, SIZE_PX - length)
        places.append(first + np.arange(length))
    image[np.ix_(*places, [0])] = np.round(255 * scaled)[..., np.newaxis]
    return image


def as_digits(digit: np.ndarray) -> np.ndarray:
    """Return a cropped digit in the form of the built-in digits: 8×8 squares of 17 shades, [28, 28, 1] uint8.

    All 1,797 of them fill the eight rows, and most fill the six middle columns, whatever their aspect ratio was.
    """
    shades = np.pad(np.round(16 * scale(digit, 8, 6)), ((0, 0), (1, 1))) * (255 / 16)
    return np.pad(np.kron(shades, np.ones((3, 3))), 2).astype(np.uint8)[..., np.newaxis]


def scale(digit: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a digit scaled to [height, width] with anti-aliasing; its maximum is 1."""
    # Pillow's BOX filter sometimes skips a row whose middle lies on the border of two boxes.
    scaled = np.asarray(Image.fromarray(digit.astype(np.float32)).resize((width, height), Image.Resampling.HAMMING))
    return scaled / scaled.max()
