"""Preprocessing: convert a picture of a digit, of any size, colours and light, to the form of the training images.

`images` decodes the file, `foreground` finds what is written, `parts` finds the digit in it. This module gives the
digit the form of the training images.

MNIST's authors (Y. LeCun, C. Cortes, C. J. C. Burges) scaled each digit with its aspect ratio into 20×20 pixels and
moved it by whole pixels so that the centre of mass is in the middle of 28×28. In all but two of the 70,000 images the
mean row and the mean column, numbered from 0, are in [13.5, 14.5). This module does the same. In 98 % of them the
strokes are between 8 % and 20 % of the digit's longer side wide; digits of thinner or thicker pens are adapted.
"""

import numpy as np
from PIL import Image
from scipy import ndimage

from mnist_jax.config import ConfigError
from mnist_jax.inference.foreground import find_foreground
from mnist_jax.inference.images import MAX_PIXELS, UnreadableImageError, decode
from mnist_jax.inference.parts import Box, Digit, find_digits

BOX_PX, SIZE_PX = 20, 28
MIN_STROKE, MAX_STROKE = 0.08, 0.2  # widths of strokes that stay, in shares of the digit's longer side
STROKE = 0.1  # what thinner and thicker ones become
MAX_ASPECT = 1.6  # width to height; 1 of 1,000 images of MNIST is wider
MAX_STROKES = 2.5  # that a row of pixels of one digit crosses on average


class BlankImageError(UnreadableImageError):
    """Nothing is drawn on a picture."""

    problem = "blank"


class SeveralDigitsError(UnreadableImageError):
    """A picture shows several digits; `places` are their boxes, in shares of its height and width."""

    problem = "several digits"

    def __init__(self, places: list[Box]) -> None:
        """Describe the places."""
        self.places = places
        where = "; ".join(
            f"x {box.left:.0%} to {box.right:.0%}, y {box.top:.0%} to {box.bottom:.0%}" for box in places[:9]
        )
        super().__init__(f"it looks like several digits ({where}); crop it to one of them")


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
    """Return the digit in an image file as [28, 28, 1] uint8, foreground 255 on background 0.

    Args:
        content: the file; `images.FORMATS` lists the formats.
        dataset: "digits" for the form of the built-in digits; all others get the form of MNIST.
        max_pixels: limit for the size of the image.

    Raises:
        UnreadableImageError: the file cannot be read, or is too large.
        BlankImageError: the picture shows nothing.
        SeveralDigitsError: it shows more than one digit.
    """
    digit = find_digit(decode(content, max_pixels=max_pixels))
    return as_digits(digit) if dataset == "digits" else as_mnist(adapt_strokes(digit))


def find_digit(pixels: np.ndarray) -> np.ndarray:
    """Return the foreground of the digit in RGBA pixels [H, W, 4] in [0, 1], cropped: [h, w] in [0, 1].

    Raises:
        BlankImageError: there is none.
        SeveralDigitsError: there are several.
    """
    shape = pixels.shape[:2]
    digits = _digits(pixels, cropped=False)
    if not digits or digits[0].box.touches(shape):
        digits = _digits(pixels, cropped=True) or digits
    elif len(digits) == 1 and has_uneven_edges(pixels):
        whole = _digits(pixels, cropped=True)
        if len(whole) == 1 and completes(whole[0].box, digits[0].box, shape):
            digits = whole
    if not digits:
        raise BlankImageError("nothing is drawn on it, or with too little contrast")
    if len(digits) > 1 or is_row(digits[0].foreground):
        raise SeveralDigitsError([digit.box.relative_to(shape) for digit in digits])
    return digits[0].foreground


def has_uneven_edges(pixels: np.ndarray) -> bool:
    """Return whether something lies at the edges of RGBA pixels [H, W, 4]: a shadow, a line, or the end of a digit."""
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return bool(np.ptp(edges, axis=0).max() > 0.3)


def completes(whole: Box, part: Box, shape: tuple[int, ...]) -> bool:
    """Return whether a box adds to a part of a digit a stroke along one edge of the picture. A table is longer."""
    at_rows, at_columns = (whole.top == 0) + (whole.bottom == shape[0]), (whole.left == 0) + (whole.right == shape[1])
    contains = whole.top <= part.top and whole.left <= part.left and whole.bottom >= part.bottom
    length = whole.width / shape[1] if at_rows else whole.height / shape[0]
    return at_rows + at_columns == 1 and contains and whole.right >= part.right and length < 0.95


def is_row(foreground: np.ndarray) -> bool:
    """Return whether connected foreground [h, w] is several digits: it is wide, and rows cross many strokes."""
    starts = np.diff(foreground > 0.5, axis=1, prepend=False) & (foreground > 0.5)
    return foreground.shape[1] > MAX_ASPECT * foreground.shape[0] and starts.sum() > MAX_STROKES * foreground.shape[0]


def _digits(pixels: np.ndarray, *, cropped: bool) -> list[Digit]:
    foreground = find_foreground(pixels, cropped=cropped)
    return [] if foreground is None else find_digits(foreground)


def adapt_strokes(digit: np.ndarray) -> np.ndarray:
    """Return a digit [h, w] in [0, 1] with strokes as wide as in MNIST, by a dilation or erosion of its outline."""
    zoom = max(1, 4 * BOX_PX / max(digit.shape))
    image = resize(digit, *(max(1, round(zoom * length)) for length in digit.shape))
    side = max(image.shape)
    image = np.pad(image, 2 + side // 16)
    is_foreground = image > 0.5 * image.max()
    # The area of a long stroke is its length times its width; its outline is twice its length, and crosses on average
    # 4/π rows or columns per pixel.
    crossings = sum(np.count_nonzero(np.diff(is_foreground, axis=axis)) for axis in (0, 1))
    width = 2 * is_foreground.sum() / (np.pi / 4 * crossings) / side
    if MIN_STROKE <= width <= MAX_STROKE:
        return digit
    # Distances from the outline, in pixels, positive inside.
    if width < MIN_STROKE:
        distance = 0.5 - ndimage.distance_transform_edt(~is_foreground)
    else:
        distance = ndimage.distance_transform_edt(is_foreground) - 0.5
    adapted = np.clip(distance + (STROKE - width) * side / 2 + 0.5, 0, 1)
    rows, columns = np.nonzero(adapted > 0.1)
    if not rows.size:  # It is a dot.
        return digit
    return adapted[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


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
    scaled = resize(digit, height, width)
    return scaled / scaled.max()


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return an image [H, W] resized to [height, width] with anti-aliasing."""
    # Pillow's BOX filter sometimes skips a row whose middle lies on the border of two boxes.
    return np.asarray(Image.fromarray(image.astype(np.float32)).resize((width, height), Image.Resampling.HAMMING))
