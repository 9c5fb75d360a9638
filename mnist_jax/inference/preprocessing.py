"""From a picture of a digit, whatever its size, colours and polarity, to an image like those that a model has learned.

MNIST's authors (Y. LeCun, C. Cortes, C. J. C. Burges) scaled each digit, with its aspect ratio and anti-aliased, into
20×20 pixels, and laid it into 28×28 so that its centre of mass is in the middle. In all but two of the 70,000 images
the rows and the columns, numbered from 0, have their mean in [13.5, 14.5): it was moved by whole pixels, as here.
"""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from scipy import ndimage

MAX_BYTES = 2**26
MAX_PIXELS = 2**26  # the cameras of phones go up to 50 million
SIDE_PX = 1024  # Larger pictures are scaled down first.
MIN_CONTRAST = 0.1  # of that between black and white
BOX_PX, SIZE_PX = 20, 28
FORMS = ("mnist", "digits")  # the data sets whose images look like what `prepare` makes

Image.MAX_IMAGE_PIXELS = None  # It would warn on standard error; `decode` has a limit of its own.


class UnreadableImageError(ValueError):
    """There is no digit to be had from a file; the message says why."""


def caution(dataset: str) -> str | None:
    """Return what somebody should know who shows pictures to a model that has learned a data set, if anything."""
    if dataset in FORMS:
        return None
    return f"this run has learned {dataset}, and pictures are made to look like handwritten digits"


def prepare(content: bytes, dataset: str = "mnist", *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the digit in a PNG or JPEG file as an image of a data set: [28, 28, 1] uint8, ink 255 on ground 0.

    Args:
        content: the file.
        dataset: whose form is wanted: that of the built-in "digits", and for all others MNIST's.
        max_pixels: the picture may have so many.

    Raises:
        UnreadableImageError: it is no such file, is damaged or too large, or nothing is drawn on it.
    """
    digit = crop(foreground_mask(decode(content, max_pixels=max_pixels)))
    return as_digits(digit) if dataset == "digits" else as_mnist(digit)


def decode(content: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the pixels of a PNG or JPEG file, scaled down to SIDE_PX where they are more: [H, W, 4] in [0, 1], RGBA.

    Raises:
        UnreadableImageError: it is no such file, is damaged or too large.
    """
    if not content:
        raise UnreadableImageError("it is empty")
    if len(content) > MAX_BYTES:
        raise UnreadableImageError(f"it has more than {MAX_BYTES / 1e6:.0f} MB")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            if image.width * image.height > max_pixels:
                raise UnreadableImageError(
                    f"it has {image.width}×{image.height} pixels, more than {max_pixels / 1e6:.0f} million"
                )
            image.draft("RGB", (SIDE_PX, SIDE_PX))  # JPEG can be decoded at a half, a quarter or an eighth of its size.
            picture = ImageOps.exif_transpose(image)
            if picture.mode.startswith(("I", "F")):  # 16 bits a pixel, of which the conversion would cut off the most
                picture = Image.fromarray((np.asarray(picture) / 257).astype(np.uint8))
            picture = picture.convert("RGBA")
            picture.thumbnail((SIDE_PX, SIDE_PX), Image.Resampling.HAMMING)
            return np.asarray(picture, np.float32) / 255
    except UnreadableImageError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImageError("it is neither PNG nor JPEG") from error
    except Exception as error:  # Whatever Pillow says of files that it cannot make sense of.
        raise UnreadableImageError(f"it is damaged: {error}") from error


def foreground_mask(pixels: np.ndarray) -> np.ndarray:
    """Return how much ink is where: [H, W] in [0, 1], of RGBA pixels [H, W, 4] in [0, 1].

    Ink is what has not the colour of the ground, and the ground is what is at the edges. So dark on light and light on
    dark are the same, in whatever colours. What is transparent is a ground of its own.

    Raises:
        UnreadableImageError: all of it has nearly the same colour.
    """
    colours, alpha = pixels[..., :3], pixels[..., 3:]
    is_dark = np.sum(colours * alpha) < 0.5 * np.sum(alpha) * 3
    colours = colours * alpha + (1 - alpha) * is_dark  # on white or on black, whichever stands out
    edges = np.concatenate([colours[0], colours[-1], colours[:, 0], colours[:, -1]])
    distance = np.sqrt(np.mean((colours - np.median(edges, axis=0)) ** 2, axis=-1))
    if distance.max() < MIN_CONTRAST:
        raise UnreadableImageError("nothing is drawn on it: all of it has nearly the same colour")
    if np.ptp(distance) < MIN_CONTRAST:
        raise UnreadableImageError(
            "no ground can be told from ink: its edges have two colours, as much of one as of the other"
        )
    threshold = otsu(distance)
    ground, drawn = distance[distance <= threshold], distance[distance > threshold]
    low, high = min(ground.mean() + 3 * ground.std(), threshold), drawn.mean()  # paper has its shades, and so has ink
    return np.clip((distance - low) / (high - low), 0, 1)


def otsu(values: np.ndarray) -> float:
    """Return the threshold that divides values, not all equal, into two classes as unlike as can be (N. Otsu, 1979)."""
    counts, limits = np.histogram(values, 256)
    below, middles = np.cumsum(counts)[:-1], (limits[:-1] + limits[1:]) / 2
    sums = np.cumsum(counts * middles)
    above = values.size - below
    between = below * above * (sums[:-1] / np.maximum(below, 1) - (sums[-1] - sums[:-1]) / np.maximum(above, 1)) ** 2
    return float(limits[1 + np.argmax(between)])


def crop(drawing: np.ndarray) -> np.ndarray:
    """Return the part of a drawing [H, W] that has ink; specks, with less than 1/20 of the largest part, are none."""
    parts, count = ndimage.label(drawing > 0.1, np.ones((3, 3)))
    mass = ndimage.sum_labels(drawing, parts, np.arange(count + 1))
    mass[0] = 0
    kept = np.where((mass > mass.max() / 20)[parts], drawing, 0)
    rows, columns = np.nonzero(kept)
    return kept[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def as_mnist(digit: np.ndarray) -> np.ndarray:
    """Return a cropped digit as MNIST's authors would have: [28, 28, 1] uint8."""
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
    """Return a cropped digit as `data` has those of scikit-learn: 8×8 squares of 17 shades, [28, 28, 1] uint8.

    All 1,797 of them fill the eight rows, and most the six columns in the middle, whatever their aspect ratio was.
    """
    shades = np.pad(np.round(16 * scale(digit, 8, 6)), ((0, 0), (1, 1))) * (255 / 16)
    return np.pad(np.kron(shades, np.ones((3, 3))), 2).astype(np.uint8)[..., np.newaxis]


def scale(digit: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a digit scaled to [height, width], anti-aliased, with its darkest ink 1."""
    # Pillow's BOX leaves a row out now and then, whose middle lies on the border of two boxes.
    scaled = np.asarray(Image.fromarray(digit.astype(np.float32)).resize((width, height), Image.Resampling.HAMMING))
    return scaled / scaled.max()
