"""Foreground: find what is written in a picture, under uneven light and whatever the colours are."""

import numpy as np
from scipy import ndimage

MIN_CONTRAST = 0.15  # of foreground to the paper beside it; 1 is that of black ink
MIN_PAPER = 0.3  # of white; the grain of darker paper must not look like foreground
WINDOW_SHARE = 0.35  # of the longer side: wider than any stroke, narrower than most shadows


def find_foreground(pixels: np.ndarray, *, cropped: bool = False) -> np.ndarray | None:
    """Return the foreground of RGBA pixels [H, W, 4] in [0, 1]: [H, W] in [0, 1], or None if the contrast is too low.

    Args:
        pixels: the picture.
        cropped: whether the picture ends where the digit ends. Otherwise, what lies dark along an edge is background: a
            table, the strip of a scanner, a shadow.
    """
    gray = darken_foreground(pixels)
    paper = background(gray, cropped=cropped)
    contrast = (paper - gray) / np.maximum(paper, MIN_PAPER)
    contrast = ndimage.gaussian_filter(contrast, 0.4)
    contrast -= np.median(contrast)  # The background is an upper bound; noise is below it.
    noise = 1.4826 * float(np.median(np.abs(contrast)))
    level = float(np.quantile(contrast, 0.999))
    if level < max(MIN_CONTRAST, 4 * noise):
        return None
    # Faint foreground has an outline; faint grain has more pixels of middle contrast than of full contrast.
    faint, full = np.sum((contrast > 0.25 * level) & (contrast <= 0.5 * level)), np.sum(contrast > 0.5 * level)
    if level < 2 * MIN_CONTRAST and faint > full:
        return None
    threshold = 0.45 * level
    high = float(contrast[contrast > threshold].mean())
    low = min(3 * noise + 0.02, threshold)
    return np.clip((contrast - low) / (high - low), 0, 1)


def darken_foreground(pixels: np.ndarray) -> np.ndarray:
    """Return a gray image [H, W] in [0, 1] in which the foreground is darker than the paper around it.

    The axis of the colours from paper to foreground is the principal axis of the deviations from the local median. The
    deviations of the foreground are larger than those of the gaps in it, so their sign says on which side it lies.
    """
    colors, alpha = pixels[..., :3], pixels[..., 3:]
    is_dark = np.sum(colors * alpha) < 0.5 * np.sum(alpha) * 3
    colors = colors * alpha + (1 - alpha) * is_dark  # Dark drawings are put on white, light ones on black.
    colors = cut_to_sheet(colors)
    small = shrink(colors, 24)
    wide, narrow = (small - ndimage.median_filter(small, (size, size, 1)) for size in (15, 9))
    # The wide window shows bold strokes, but also the ends of shadows; the narrow one neither.
    is_narrow = np.sum(narrow**2, axis=-1) < np.sum(wide**2, axis=-1)
    agree = np.sum(wide * narrow, axis=-1) > 0
    deviations = np.where(is_narrow[..., np.newaxis], narrow, wide)[agree]
    axis = np.linalg.eigh(deviations.T @ deviations)[1][:, -1]
    if np.sum((deviations @ axis) ** 3) > 0:
        axis = -axis
    weights = axis / np.abs(axis).sum()
    return colors @ weights - np.minimum(weights, 0).sum()


def cut_to_sheet(colors: np.ndarray) -> np.ndarray:
    """Return an image [H, W, 3] in which the table around a sheet of paper, if there is one, has the paper's colour.

    A sheet is a large rectangle, turned by at most 15°, whose brightness differs from that of its surroundings.
    """
    step = -(-max(colors.shape) // 100)
    small = shrink(colors, 100)
    gray = small.mean(axis=-1)
    if min(gray.shape) < 20 or np.ptp(gray) < MIN_CONTRAST:
        return colors
    is_light = gray > otsu(gray)
    for is_sheet in (is_light, ~is_light):
        parts, count = ndimage.label(is_sheet)
        sizes = np.bincount(parts.ravel(), minlength=2)
        sizes[0] = 0
        part = parts == np.argmax(sizes)
        if not count or part[[0, -1]].any() or part[:, [0, -1]].any():
            continue
        filled = ndimage.binary_fill_holes(part)
        extents = [filled.any(axis=axis).mean() for axis in (0, 1)]
        is_large = filled.mean() > 0.25 and min(extents) > 0.4 and part.sum() > 0.5 * filled.sum()
        if is_large and rectangularity(filled) > 0.92:
            inside = ndimage.binary_erosion(filled)
            inside = inside.repeat(step, 0).repeat(step, 1)[: colors.shape[0], : colors.shape[1]]
            return np.where(inside[..., np.newaxis], colors, np.median(colors[inside], axis=0))
    return colors


def rectangularity(mask: np.ndarray) -> float:
    """Return the share of a mask [H, W] in the smallest rectangle around it that is turned by at most 15°."""
    rows, columns = np.nonzero(mask)
    best = 0.0
    for angle in np.radians(np.arange(-15, 16, 3)):
        across = columns * np.cos(angle) + rows * np.sin(angle)
        along = rows * np.cos(angle) - columns * np.sin(angle)
        best = max(best, mask.sum() / ((np.ptp(across) + 1) * (np.ptp(along) + 1)))
    return best


def otsu(values: np.ndarray) -> float:
    """Return the threshold that maximizes the variance between two classes (N. Otsu, 1979). Values must differ."""
    counts, limits = np.histogram(values, 256)
    below, centers = np.cumsum(counts)[:-1], (limits[:-1] + limits[1:]) / 2
    sums = np.cumsum(counts * centers)
    above = values.size - below
    between = below * above * (sums[:-1] / np.maximum(below, 1) - (sums[-1] - sums[:-1]) / np.maximum(above, 1)) ** 2
    return float(limits[1 + np.argmax(between)])


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """Return the means of square blocks of an image [H, W, C], so that it has about `side` rows or columns."""
    step = -(-max(image.shape) // side)
    for axis in (0, 1):
        starts = np.arange(0, image.shape[axis], step)
        sizes = np.diff(np.append(starts, image.shape[axis]))
        shape = [1, 1, 1]
        shape[axis] = len(starts)
        image = np.add.reduceat(image, starts, axis) / sizes.reshape(shape)
    return image


def background(gray: np.ndarray, *, cropped: bool) -> np.ndarray:
    """Return the paper without its foreground: a morphological closing of a gray image [H, W].

    It follows the edges of shadows, because a square fits into a shadow; none fits into a stroke.
    """
    size = 2 * int(WINDOW_SHARE * max(gray.shape) / 2) + 1
    if cropped:
        return ndimage.grey_closing(gray, (size, size), mode="nearest")
    # Squares may extend beyond the edges.
    height, width = gray.shape
    upper = ndimage.maximum_filter(np.pad(gray, size // 2), size, mode="constant", cval=0.0)
    lower = ndimage.minimum_filter(upper, size, mode="constant", cval=np.inf)
    return lower[size // 2 :, size // 2 :][:height, :width]
