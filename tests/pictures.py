"""Pictures of digits under conditions such as shadows, frames and thin pens, and the table of right answers.

`scripts/pictures RUN` prints the table. All random numbers are drawn from a seed of the condition, the font and the
digit: the same fonts give the same pictures.
"""

import argparse
import io
import string
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from mnist_jax.inference import classifier, preprocessing
from mnist_jax.inference.images import UnreadableImageError
from mnist_jax.training import data

Array = np.ndarray
Random = np.random.Generator

# Fonts by file name; the table uses those that are installed. matplotlib has the first line.
OUTLINES = """
DejaVuSans DejaVuSans-Bold DejaVuSansMono DejaVuSerif STIXGeneral STIXGeneralItalic cmr10 cmss10 cmtt10 cmb10
LiberationSans-Regular LiberationSans-Bold LiberationSerif-Regular LiberationMono-Regular LiberationSansNarrow-Regular
FreeSans FreeSerif FreeMono FreeSansBold Carlito-Regular Caladea-Regular OpenSans-Regular OpenSans-Light
Lato-Regular Lato-Light Lato-Black Roboto-Regular Roboto-Light RobotoCondensed-Regular Cantarell-Regular
dkg dkgBd Breip breipfont femkeklaver Kristi Rufscript010 Humor-Sans ComicNeue-Regular ComicNeue-Bold
DancingScript-Regular KaushanScript-Regular BecauseWeBuild-Regular BecauseWeLearn-Regular
""".split()  # noqa: SIM905
# Hershey's fonts are strokes.
PENS = "rowmans futural scripts rowmand scriptc futuram timesr timesi rowmant timesib".split()  # noqa: SIM905
HERSHEY = Path("/usr/share/hershey-fonts")
SIDE_PX = 200
INK, PAPER = (20, 28, 100), (235, 232, 225)


class Picture(NamedTuple):
    """A file, and the right answer: a digit, or None if there is none."""

    name: str
    content: bytes
    answer: int | None


# Digits


@cache
def font_files() -> dict[str, Path]:
    """Return the installed fonts of the list above, matplotlib's own first."""
    own = sorted((Path(mpl.get_data_path()) / "fonts" / "ttf").glob("*.ttf"))
    installed = map(Path, sorted(font_manager.findSystemFonts()))
    found: dict[str, Path] = {}
    for path in [*own, *installed]:
        found.setdefault(path.stem, path)
    return {name: found[name] for name in OUTLINES if name in found}


def outline(text: str, font: Path, height: int) -> Array:
    """Return a text in a font, cropped: [height, W] in [0, 1], 1 being ink."""
    size = 4 * height
    image = Image.new("L", (size * (1 + len(text)), 3 * size), 0)
    ImageDraw.Draw(image).text((size // 2, size // 2), text, 255, ImageFont.truetype(str(font), size))
    glyph = image.crop(image.getbbox())
    width = max(1, round(height * glyph.width / glyph.height))
    return np.asarray(glyph.resize((width, height), Image.Resampling.BOX)) / 255


Strokes = list[list[tuple[float, float]]]


@cache
def pen_strokes(name: str) -> dict[int, Strokes]:
    """Return the strokes of the ten digits in one of Hershey's fonts, in points [x, y]."""
    lines = iter((HERSHEY / f"{name}.jhf").read_text("ascii").splitlines())
    glyphs = []
    for line in lines:
        count = int(line[5:8])
        body = line[8:]
        while len(body) < 2 * count:
            body += next(lines)
        pairs = [body[2 * i : 2 * i + 2] for i in range(1, count)]
        strokes: Strokes = [[]]
        for pair in pairs:
            if pair == " R":
                strokes.append([])
            else:
                strokes[-1].append((ord(pair[0]) - ord("R"), ord(pair[1]) - ord("R")))
        glyphs.append([stroke for stroke in strokes if stroke])
    return {digit: glyphs[16 + digit] for digit in range(10)}  # The first is the space, as in ASCII.


def arc(x: float, y: float, rx: float, ry: float, start: float, stop: float) -> list[tuple[float, float]]:
    """Return points on an ellipse between two angles in degrees: 0 is right, 90 below, 270 above."""
    angles = np.radians(np.linspace(start, stop, 12))
    return [(float(x + rx * np.cos(angle)), float(y + ry * np.sin(angle))) for angle in angles]


# Digits drawn by hand, in [0, 1]: for the demo, and for a test without Hershey's fonts.
DRAWN: dict[int, Strokes] = {
    0: [arc(0.5, 0.5, 0.22, 0.35, 280, -95)],
    1: [[(0.42, 0.3), (0.54, 0.15), (0.52, 0.85)]],
    2: [[*arc(0.48, 0.34, 0.2, 0.18, 195, 385), (0.3, 0.83), (0.74, 0.82)]],
    3: [[*arc(0.48, 0.32, 0.18, 0.17, 200, 440), *arc(0.48, 0.66, 0.21, 0.19, 280, 520)]],
    4: [[(0.4, 0.15), (0.26, 0.57), (0.74, 0.55)], [(0.62, 0.3), (0.58, 0.88)]],
    5: [[(0.4, 0.17), (0.36, 0.45), *arc(0.47, 0.64, 0.2, 0.2, 240, 500)], [(0.4, 0.17), (0.7, 0.16)]],
    6: [[(0.6, 0.13), *arc(0.49, 0.66, 0.19, 0.19, 200, -170)]],
    7: [[(0.28, 0.18), (0.7, 0.17), (0.45, 0.86)]],
    8: [[*arc(0.5, 0.32, 0.15, 0.16, 45, -225), *arc(0.5, 0.66, 0.19, 0.18, -130, 230)]],
    9: [[*arc(0.48, 0.34, 0.18, 0.19, 330, -20), (0.56, 0.86)]],
}


def draw(strokes: Strokes, height: int, *, width_share: float) -> Array:
    """Return strokes of a round pen, cropped: [height, W] in [0, 1]; its width is a share of the height."""
    points = np.array([point for stroke in strokes for point in stroke], float)
    low, size = points.min(axis=0), np.ptp(points, axis=0)
    pen = 4 * height * width_share
    scale = (4 * height - pen) / max(size[1], 1e-9)
    image = Image.new("L", (int(scale * size[0] + pen) + 2, 4 * height), 0)
    canvas = ImageDraw.Draw(image)
    for stroke in strokes:
        places = [tuple(pen / 2 + scale * (np.array(point) - low)) for point in stroke]
        for start, end in pairwise(places):
            canvas.line([*start, *end], 255, max(1, round(pen)))
        for x, y in places:
            canvas.ellipse([x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2], 255)
    box = image.getbbox() or (0, 0, 4, 4)
    glyph = image.crop(box)
    return np.asarray(glyph.resize((max(1, glyph.width // 4), height), Image.Resampling.BOX)) / 255


# Scenes: functions of ink [height, W] and random numbers


def place(ink: Array, rng: Random, *, side: int = SIDE_PX, turn: float = 0) -> Array:
    """Return the ink near the middle of a sheet: [side, side] in [0, 1]."""
    image = Image.new("L", (side, side), 0)
    free = [max(0, side - length) for length in (ink.shape[1], ink.shape[0])]
    corner = [int(f / 2 + rng.uniform(-0.15, 0.15) * f) for f in free]
    image.paste(Image.fromarray(np.uint8(255 * ink)), tuple(corner))
    return np.asarray(image.rotate(turn, Image.Resampling.BICUBIC)) / 255


def paint(ink: Array, rng: Random, *, pen: tuple[int, ...] = INK, paper: tuple[int, ...] = PAPER) -> Array:
    """Return ink on paper with a grain: [H, W, 3] in [0, 1]."""
    grain = ndimage.gaussian_filter(rng.normal(size=ink.shape), 2.5)
    sheet = np.array(paper) / 255 * (1 + 0.015 * grain / grain.std())[..., np.newaxis]
    share = ink[..., np.newaxis]
    return share * np.array(pen) / 255 + (1 - share) * sheet


def save(pixels: Array, rng: Random, *, noise: float = 0.01, quality: int | None = 85) -> bytes:
    """Return pixels in [0, 1] as a JPEG or PNG file, with noise."""
    pixels = np.clip(pixels + rng.normal(0, noise, pixels.shape), 0, 1)
    image, file = Image.fromarray(np.round(255 * pixels).astype(np.uint8)), io.BytesIO()
    if quality:
        image.save(file, "JPEG", quality=quality)
    else:
        image.save(file, "PNG")
    return file.getvalue()


def photo(ink: Array, rng: Random) -> Array:
    return paint(place(ink, rng, turn=rng.uniform(-8, 8)), rng)


def ramp(shape: tuple[int, ...], rng: Random) -> Array:
    """Return a plane of any direction, from 0 to 1."""
    angle, (rows, columns) = rng.uniform(0, 2 * np.pi), np.indices(shape[:2])
    plane = np.cos(angle) * columns + np.sin(angle) * rows
    return (plane - plane.min()) / np.ptp(plane)


def shadow(pixels: Array, rng: Random, *, blur: float) -> Array:
    """Return pixels of which about half lie in a shadow of 55 %."""
    dark = (ramp(pixels.shape, rng) > rng.uniform(0.35, 0.65)).astype(float)
    return pixels * (1 - 0.45 * ndimage.gaussian_filter(dark, blur))[..., np.newaxis]


def soft_shadow(ink: Array, rng: Random) -> bytes:
    return save(shadow(photo(ink, rng), rng, blur=15), rng)


def hard_shadow(ink: Array, rng: Random) -> bytes:
    return save(shadow(photo(ink, rng), rng, blur=1.5), rng)


def falling_light(ink: Array, rng: Random) -> bytes:
    pixels = photo(ink, rng)
    return save(pixels * (1 - 0.75 * ramp(pixels.shape, rng))[..., np.newaxis], rng)


def black(ink: Array, rng: Random) -> Array:
    """Return black on white, [H, W]."""
    return 1 - place(ink, rng)


def frame_at_edge(ink: Array, rng: Random) -> bytes:
    pixels, width = black(ink, rng), int(rng.integers(1, 7))
    inner = pixels[width:-width, width:-width].copy()
    pixels[:] = rng.uniform(0, 0.3)
    pixels[width:-width, width:-width] = inner
    return save(pixels, rng)


def table_edge(ink: Array, rng: Random) -> bytes:
    """Return paper whose one or two sides show the table."""
    pixels, width = photo(ink, rng), int(rng.integers(8, 25))
    table = np.array([70, 50, 36]) / 255 * rng.uniform(0.6, 1.4)
    for turns in rng.permutation(4)[: rng.integers(1, 3)]:
        np.rot90(pixels, turns)[:width] = table
    return save(pixels, rng)


def paper_on_table(ink: Array, rng: Random) -> bytes:
    """Return a turned sheet that a dark table surrounds."""
    margin = int(rng.integers(15, 45))
    side = SIDE_PX + 2 * margin
    inside = np.pad(np.full((SIDE_PX, SIDE_PX), 255, np.uint8), margin)
    sheet = np.pad(place(ink, rng), margin)
    turn = rng.uniform(-6, 6)
    mask, ink = (
        np.asarray(Image.fromarray(np.uint8(m)).rotate(turn, Image.Resampling.BICUBIC)) / 255
        for m in (inside, 255 * sheet)
    )
    grain = ndimage.gaussian_filter(rng.normal(size=(side, side)), 3)
    table = np.array([70, 50, 36]) / 255 * (1 + 0.15 * grain / grain.std())[..., np.newaxis]
    mask = mask[..., np.newaxis]
    return save(mask * paint(ink, rng) + (1 - mask) * table, rng)


def scanner_strip(ink: Array, rng: Random) -> bytes:
    pixels, width = black(ink, rng), int(rng.integers(3, 14))
    np.rot90(pixels, rng.integers(4))[:width] = rng.uniform(0, 0.6)
    return save(pixels, rng)


def frame_inset(ink: Array, rng: Random) -> bytes:
    sheet, width, inset = place(ink, rng), int(rng.integers(1, 4)), int(rng.integers(4, 12))
    for turns in range(4):
        np.rot90(sheet, turns)[inset : inset + width, inset:-inset] = 1
    return save(1 - sheet, rng)


def lines(ink: Array, rng: Random, *, is_squared: bool) -> bytes:
    """Return ink on paper with lines as dark as 35 % of white."""
    sheet = place(ink, rng)
    gap, width = int(rng.integers(18, 40)), int(rng.integers(1, 3))
    ruled = np.zeros_like(sheet)
    for first in range(int(rng.integers(gap)), SIDE_PX, gap):
        ruled[first : first + width] = 1
        if is_squared:
            ruled[:, first : first + width] = 1
    level = rng.uniform(0.2, 0.5)
    return save(np.minimum(1 - sheet, 1 - (1 - level) * ruled), rng)


def ruled_lines(ink: Array, rng: Random) -> bytes:
    return lines(ink, rng, is_squared=False)


def squared_lines(ink: Array, rng: Random) -> bytes:
    return lines(ink, rng, is_squared=True)


def clean(ink: Array, rng: Random) -> bytes:
    side = int(rng.choice([12, 16, 20, 28, 50, 100, 400, 800]))
    image = Image.fromarray(np.uint8(255 * black(ink, rng))).resize((side, side), Image.Resampling.HAMMING)
    return save(np.asarray(image) / 255, rng, noise=0, quality=None)


def colours(ink: Array, rng: Random) -> bytes:
    while True:
        pen, paper = rng.integers(0, 256, (2, 3))
        if np.sqrt(np.mean((pen - paper) ** 2.0)) > 90:
            return save(paint(place(ink, rng), rng, pen=tuple(pen), paper=tuple(paper)), rng)


def noise(ink: Array, rng: Random) -> bytes:
    return save(0.1 + 0.8 * black(ink, rng), rng, noise=0.1, quality=None)


def strong_jpeg(ink: Array, rng: Random) -> bytes:
    return save(black(ink, rng), rng, quality=15)


def white_on_black(ink: Array, rng: Random) -> bytes:
    return save(place(ink, rng), rng)


def plain(ink: Array, rng: Random) -> bytes:
    return save(np.pad(1 - ink, 72, constant_values=1), rng, noise=0, quality=None)


Scene = Callable[[Array, Random], bytes]
SCENES: dict[str, Scene] = {
    function.__name__: function
    for function in (
        *(clean, colours, noise, strong_jpeg, white_on_black, soft_shadow, hard_shadow, falling_light),
        *(frame_at_edge, table_edge, paper_on_table, scanner_strip, frame_inset, ruled_lines, squared_lines),
    )
}
PEN_SHARES = {"thin_pen": 0.024, "hairline": 0.006, "thick_pen": 0.22}
GOALS = {
    **dict.fromkeys(["clean", "colours", "noise", "strong_jpeg", "white_on_black"], 0.93),
    **dict.fromkeys(["soft_shadow", "hard_shadow", "falling_light"], 0.93),
    **dict.fromkeys(["frame_at_edge", "table_edge", "scanner_strip", "frame_inset"], 0.9),
    "paper_on_table": 0.75,
    **dict.fromkeys(["ruled_lines", "squared_lines"], 0.85),
    **dict.fromkeys(["thin_pen", "hairline"], 0.95),
    "thick_pen": 0.88,
    "small_in_corner": 1.0,
}


def random(*key: object) -> Random:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def font_pictures(scene: str, fonts: dict[str, Path]) -> Iterator[Picture]:
    """Return the ten digits of each font in a scene."""
    for name, path in fonts.items():
        for digit in range(10):
            rng = random(scene, name, digit)
            ink = outline(str(digit), path, int(rng.uniform(0.45, 0.65) * SIDE_PX))
            yield Picture(f"{name}_{digit}", SCENES[scene](ink, rng), digit)


def pen_pictures(condition: str, pens: dict[str, dict[int, Strokes]]) -> Iterator[Picture]:
    """Return the ten digits drawn with a thin or thick pen."""
    for name, digits in pens.items():
        for digit, strokes in digits.items():
            ink = draw(strokes, 206, width_share=PEN_SHARES[condition])
            yield Picture(f"{name}_{digit}", plain(ink, random(condition, name, digit)), digit)


def corner_pictures() -> Iterator[Picture]:
    """Return digits drawn small in a corner with the thick brush of earlier versions of the page of demo."""
    for digit, strokes in DRAWN.items():
        image = Image.new("L", (140, 140), 255)
        for stroke in strokes:
            points = [(5 + 36 * x, 5 + 36 * y) for x, y in stroke]
            for x, y in points:
                ImageDraw.Draw(image).ellipse([x - 6, y - 6, x + 6, y + 6], 0)
            ImageDraw.Draw(image).line(points, 0, 12, joint="curve")
        file = io.BytesIO()
        image.save(file, "PNG")
        yield Picture(str(digit), file.getvalue(), digit)


def mnist_pictures(scene: str, images: Array, labels: Array) -> Iterator[Picture]:
    """Return images of a dataset, [N, 28, 28, 1] uint8, as ink in a scene."""
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        rng = random(scene, number)
        large = Image.fromarray(image[..., 0]).resize((140, 140), Image.Resampling.BICUBIC)
        yield Picture(f"mnist_{number}", SCENES[scene](np.asarray(large) / 255, rng), int(label))


# What is not one digit


def blank_pictures() -> Iterator[Picture]:
    for scene in ("soft_shadow", "hard_shadow", "falling_light", "frame_at_edge", "table_edge", "scanner_strip"):
        for number in range(10):
            yield Picture(f"{scene}_{number}", SCENES[scene](np.zeros((2, 2)), random("blank", scene, number)), None)


def several_pictures(fonts: dict[str, Path]) -> Iterator[Picture]:
    for scene in ("clean", "soft_shadow"):
        for name, path in fonts.items():
            rng = random("several", scene, name)
            text = "".join(str(digit) for digit in rng.integers(0, 10, rng.integers(2, 4)))
            yield Picture(f"{scene}_{name}_{text}", SCENES[scene](outline(text, path, 70), rng), None)


def letter_pictures(fonts: dict[str, Path]) -> Iterator[Picture]:
    """Return letters that do not look like digits."""
    for name, path in fonts.items():
        for letter in sorted(set(string.ascii_uppercase) - set("OISZBGQLDJTY")):
            rng = random("letter", name, letter)
            yield Picture(f"{name}_{letter}", strong_jpeg(outline(letter, path, 110), rng), None)


# The table


def conditions(images: Array, labels: Array) -> Iterator[tuple[str, list[Picture]]]:
    """Return the pictures of all rows of the table."""
    fonts = font_files()
    pens = {name: pen_strokes(name) for name in PENS if HERSHEY.is_dir()} or {"drawn": DRAWN}
    for scene in SCENES:
        yield scene, list(font_pictures(scene, fonts))
    for condition in PEN_SHARES:
        yield condition, list(pen_pictures(condition, pens))
    yield "small_in_corner", list(corner_pictures())
    for scene in SCENES:
        yield f"{scene}, MNIST", list(mnist_pictures(scene, images, labels))
    yield "blank", list(blank_pictures())
    yield "several digits", list(several_pictures(fonts))
    yield "letters", list(letter_pictures(fonts))


def main() -> int:
    """Print the table, and return 1 if a row misses its goal."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="directory of a run")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with MNIST's four files")
    parser.add_argument("--images", type=int, default=100, help="number of MNIST test images")
    args = parser.parse_args()
    dataset = data.load("mnist", args.data_dir, notify=print)
    model = classifier.load(args.run, on_cpu=True)
    print(f"fonts: {len(font_files())} and {len(PENS) if HERSHEY.is_dir() else 0} of strokes; step {model.step}\n")
    print("| condition | pictures | right | sure | wrong of the sure | goal |\n|---|---|---|---|---|---|")
    is_missed = False
    for name, pictures in conditions(dataset.test_images[: args.images], dataset.test_labels[: args.images]):
        answers = [read(model, picture.content) for picture in pictures]
        if pictures[0].answer is None:
            right = [digit is None for digit, _ in answers]
        else:
            right = [digit == picture.answer for (digit, _), picture in zip(answers, pictures, strict=True)]
        sure = np.array([probability >= classifier.MIN_SURE for _, probability in answers])
        wrong = np.sum(sure & ~np.array(right))
        goal = GOALS.get(name.removesuffix(", MNIST"), 0.0)
        is_missed |= bool(np.mean(right) < goal)
        label = name.replace("_", " ")
        print(f"| {label} | {len(pictures)} | {np.mean(right):.3f} | {np.mean(sure):.3f} | {wrong} | {goal or ''} |")
        sys.stdout.flush()
    return int(is_missed)


def read(model: classifier.Classifier, content: bytes) -> tuple[int | None, float]:
    """Return the answer and its probability; None and 0 if the picture shows no single digit."""
    try:
        probabilities = model.predict(preprocessing.prepare(content))
    except UnreadableImageError:
        return None, 0.0
    return int(probabilities.argmax()), float(probabilities.max())


if __name__ == "__main__":
    sys.exit(main())
