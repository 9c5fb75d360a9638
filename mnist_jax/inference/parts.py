"""Parts: find the digit among the connected parts of the foreground; lines, frames and specks are not part of it."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from mnist_jax.inference.foreground import rectangularity

MIN_FOREGROUND = 0.3  # of a pixel that belongs to a part
MIN_SIDE_SHARE = 0.06  # of a digit; smaller parts are specks
LINE_SHARE = 0.04  # the largest width of a printed line
EIGHT = np.ones((3, 3), bool)


class Box(NamedTuple):
    """The place of a part in rows and columns; the ends are excluded."""

    top: float
    left: float
    bottom: float
    right: float

    @property
    def height(self) -> float:
        """The number of rows."""
        return self.bottom - self.top

    @property
    def width(self) -> float:
        """The number of columns."""
        return self.right - self.left

    @property
    def side(self) -> float:
        """The longer side."""
        return max(self.height, self.width)

    def touches(self, shape: tuple[int, ...]) -> bool:
        """Return whether the part touches an edge of a picture of a shape [H, W]."""
        return self.top == 0 or self.left == 0 or self.bottom == shape[0] or self.right == shape[1]

    def relative_to(self, shape: tuple[int, ...]) -> "Box":
        """Return the box in shares of a picture's shape [H, W]."""
        return Box(self.top / shape[0], self.left / shape[1], self.bottom / shape[0], self.right / shape[1])


class Digit(NamedTuple):
    """A digit: its place, and its foreground, cropped: [h, w] in [0, 1]."""

    box: Box
    foreground: np.ndarray


def find_digits(foreground: np.ndarray) -> list[Digit]:
    """Return the digits in foreground [H, W] in [0, 1], from left to right."""
    is_foreground = without_lines(foreground > MIN_FOREGROUND)
    labels, count = ndimage.label(is_foreground, EIGHT)
    boxes = {
        number: Box(rows.start, columns.start, rows.stop, columns.stop)
        for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1)
    }
    mass = ndimage.sum_labels(foreground, labels, np.arange(count + 1))
    boxes = {number: box for number, box in boxes.items() if not is_frame(box, labels == number)}
    boxes = without_edges(boxes, foreground.shape)
    if not boxes:
        return []
    largest = max(mass[number] for number in boxes)
    boxes = {number: box for number, box in boxes.items() if mass[number] > largest / 20}
    digits = []
    for group in join(boxes):
        box = around([boxes[number] for number in group])
        # The soft rim of a stroke has less foreground than a part needs.
        region = ndimage.binary_dilation(np.isin(labels, group), EIGHT, iterations=2)
        digit = np.where(region & (is_foreground | (foreground <= MIN_FOREGROUND)), foreground, 0)
        rows, columns = np.nonzero(digit > 0.1)
        digits.append(Digit(box, digit[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]))
    return sorted(digits, key=lambda digit: digit.box.left)


def without_lines(is_foreground: np.ndarray) -> np.ndarray:
    """Return foreground [H, W] bool without thin lines across the whole picture, as those of ruled or squared paper."""
    rows, columns = long_lines(is_foreground), long_lines(is_foreground.T).T
    lines = rows | columns
    if not lines.any():
        return is_foreground
    # A stroke across a line is thicker than the line, or at least goes on beyond it.
    width = max(line_width(rows), line_width(columns.T)) + 2
    strokes = ndimage.binary_opening(is_foreground, np.ones((width, width), bool))
    cleaned = is_foreground & (~lines | strokes)
    return cleaned | (is_foreground & ndimage.binary_closing(cleaned, np.ones((width + 1, width + 1), bool)))


def long_lines(is_foreground: np.ndarray) -> np.ndarray:
    """Return the pixels of thin, nearly horizontal lines from the left edge to the right edge: [H, W] bool."""
    height, width = is_foreground.shape
    length, thickness = max(3, width // 3), max(2, round(LINE_SHARE * height))
    # One pixel of tolerance up and down, so that the lines may be slightly turned.
    thick = ndimage.binary_dilation(is_foreground, np.ones((3, 1), bool))
    long = ndimage.minimum_filter(thick, (1, length), mode="constant", cval=1)
    long = ndimage.maximum_filter(long, (1, length), mode="constant", cval=0) & is_foreground
    labels, _ = ndimage.label(ndimage.binary_dilation(long, EIGHT))
    lines = np.zeros_like(is_foreground)
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        crosses = columns.start <= 0.03 * width and columns.stop >= 0.97 * width
        if crosses and np.quantile((long & (labels == number))[rows].sum(axis=0), 0.25) <= thickness:
            lines |= long & (labels == number)
    return lines


def line_width(lines: np.ndarray) -> int:
    """Return the width of nearly horizontal lines [H, W] bool in pixels, 0 if there is none."""
    starts = np.diff(lines.astype(np.int8), axis=0, prepend=0) == 1
    return round(lines.sum() / starts.sum()) if lines.any() else 0


def is_frame(box: Box, part: np.ndarray) -> bool:
    """Return whether a part is a frame: it surrounds another large part, or is nearly a rectangle's outline."""
    height, width = part.shape
    if box.height < 0.4 * height or box.width < 0.4 * width:
        return False
    cropped = part[box.top : box.bottom, box.left : box.right]
    middle = cropped[box.height // 4 : -(box.height // 4), box.width // 4 : -(box.width // 4)]
    return not middle.any() and rectangularity(ndimage.binary_fill_holes(cropped)) > 0.9


def without_edges(boxes: dict[int, Box], shape: tuple[int, ...]) -> dict[int, Box]:
    """Return the parts that may belong to a digit. What touches an edge does not, if there is anything else.

    A part at a corner is a shadow or a table, unless it spans most of the picture as a closely cropped digit does.
    """
    height, width = shape
    inner, outer = {}, {}
    for number, box in boxes.items():
        if box.side < max(2, MIN_SIDE_SHARE * max(shape)):
            continue
        at_rows, at_columns = box.top == 0 or box.bottom == height, box.left == 0 or box.right == width
        if not at_rows and not at_columns:
            inner[number] = box
        elif min(box.height / height, box.width / width) > (0.6 if at_rows and at_columns else 0.2):
            outer[number] = box
    return inner or outer


def join(boxes: dict[int, Box]) -> list[list[int]]:
    """Return groups of parts that belong to one digit.

    Two large parts beside or above each other are two digits; a part much smaller than its neighbour belongs to it.
    """
    order = sorted(boxes, key=lambda number: -boxes[number].height)
    groups: list[list[int]] = []
    for number in order:
        box = boxes[number]
        own = None
        for group in groups:
            other = around([boxes[member] for member in group])
            if box.height < 0.5 * other.height or overlap(box, other) > 0.35:
                own = group
                break
        if own is None:
            groups.append([number])
        else:
            own.append(number)
    return groups


def overlap(box: Box, other: Box) -> float:
    """Return by which share of the smaller extent two boxes overlap, in the direction in which they overlap less."""
    rows = (min(box.bottom, other.bottom) - max(box.top, other.top)) / min(box.height, other.height)
    columns = (min(box.right, other.right) - max(box.left, other.left)) / min(box.width, other.width)
    return min(rows, columns)


def around(boxes: list[Box]) -> Box:
    """Return the box around boxes."""
    tops, lefts, bottoms, rights = zip(*boxes, strict=True)
    return Box(min(tops), min(lefts), max(bottoms), max(rights))
