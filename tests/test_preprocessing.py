import contextlib
import io
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pictures
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw, PngImagePlugin

from mnist_jax.inference import classifier, foreground, preprocessing
from mnist_jax.inference.images import MAX_BYTES, UnreadableImageError
from mnist_jax.inference.preprocessing import prepare
from mnist_jax.training import data

WHITE = Image.new("RGB", (60, 40), "white")


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def drawing() -> np.ndarray:
    """Return a 7 of thick strokes with soft edges, [90, 70] in [0, 1], 1 being ink."""
    strokes = Image.new("L", (280, 360), 0)
    for box in ((60, 60, 220, 90), (180, 60, 220, 300)):
        strokes.paste(255, box)
    return np.asarray(strokes.resize((70, 90), Image.Resampling.BOX)) / 255


def paint(ink: tuple[int, int, int], paper: tuple[int, int, int]) -> Image.Image:
    share = drawing()[..., np.newaxis]
    return Image.fromarray(np.round(share * ink + (1 - share) * paper).astype(np.uint8))


def with_alpha(colour: int, *, stencil: bool = False) -> Image.Image:
    """Return the drawing as the alpha channel of one colour, or as the hole in it."""
    share = 1 - drawing() if stencil else drawing()
    return Image.fromarray(np.stack([np.full_like(share, colour), 255 * share], axis=-1).astype(np.uint8), "LA")


@pytest.fixture(scope="module")
def model(trained_run) -> classifier.Classifier:
    return classifier.load(trained_run.workdir)


def test_disguised_digits_are_recognized_as_well(model, mnist_dir):
    dataset = data.load("mnist", mnist_dir, notify=print)
    images, labels, rng = dataset.test_images[:300], dataset.test_labels[:300], np.random.default_rng(0)

    def disguise(image: np.ndarray) -> bytes:
        """Change size, place and polarity."""
        side = int(rng.integers(20, 120))
        width, height = (side + int(rng.integers(side)) for _ in range(2))
        place = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        photo = Image.new("L", (width, height), 0)
        photo.paste(Image.fromarray(image[..., 0]).resize((side, side), Image.Resampling.BICUBIC), place)
        return encode(Image.fromarray(255 - np.asarray(photo)) if rng.random() < 0.5 else photo)

    plain = np.mean([model.predict(image).argmax() == label for image, label in zip(images, labels, strict=True)])
    found = [model.predict(prepare(disguise(image))).argmax() for image in images]
    assert plain > 0.98
    assert np.mean(found == labels) > plain - 0.01


BLACK_ON_WHITE = paint((0, 0, 0), (255, 255, 255))
TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation: rotate by 90°
TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("description", 2**21 * "x", zip=True)
VARIANTS = {
    "light on dark": lambda: encode(paint((255, 255, 255), (0, 0, 0))),
    "red on blue": lambda: encode(paint((220, 30, 30), (30, 30, 220))),
    "green on red of the same brightness": lambda: encode(paint((0, 150, 0), (255, 21, 0))),
    "pencil": lambda: encode(paint((150, 150, 150), (230, 230, 220))),
    "black on transparent": lambda: encode(with_alpha(0)),
    "white on transparent": lambda: encode(with_alpha(255)),
    "transparent on white": lambda: encode(with_alpha(255, stencil=True)),
    "transparent on black": lambda: encode(with_alpha(0, stencil=True)),
    "palette": lambda: encode(paint((200, 0, 0), (255, 255, 255)).quantize(64)),
    "16 bits": lambda: encode(Image.fromarray((65535 * (0.9 - 0.6 * drawing())).astype(np.uint16))),
    "jpeg": lambda: encode(BLACK_ON_WHITE, "JPEG", quality=95),
    "cmyk": lambda: encode(BLACK_ON_WHITE.convert("CMYK"), "JPEG", quality=95),
    "rotated by EXIF": lambda: encode(BLACK_ON_WHITE.transpose(Image.Transpose.ROTATE_90), exif=TURNED),
    **{kind.lower(): partial(encode, BLACK_ON_WHITE, kind) for kind in ("WEBP", "GIF", "BMP", "TIFF", "AVIF")},
    "12 of 16 bits": lambda: encode(Image.fromarray((4095 * (0.9 - 0.6 * drawing())).astype(np.uint16))),
    "9 of 16 bits": lambda: encode(Image.fromarray((511 * (0.9 - 0.6 * drawing())).astype(np.uint16))),
    "with a text of 2 MB": lambda: encode(BLACK_ON_WHITE, pnginfo=TEXT),
    "with a broken colour profile": lambda: encode(BLACK_ON_WHITE, icc_profile=bytes(2**21)),
    "larger than any screen": lambda: encode(BLACK_ON_WHITE.resize((2800, 3600), Image.Resampling.BICUBIC)),
    "with wide margins": lambda: encode(
        Image.fromarray(np.pad(255 - np.uint8(255 * drawing()), 200, constant_values=255))
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_variants_of_an_image_give_the_same_digit(variant):
    expected = prepare(encode(BLACK_ON_WHITE))
    assert expected.max() == 255
    difference = np.abs(prepare(VARIANTS[variant]()).astype(int) - expected)
    assert difference.mean() < 4
    assert np.mean(difference > 64) < 0.01


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 60), st.integers(1, 60)), elements=st.sampled_from([0, 255])))
@settings(max_examples=30)
def test_digit_has_the_size_and_centre_of_mnist(pixels):
    if not pixels.any() or pixels.all():
        pixels = np.pad(np.full_like(pixels, 255), 3)
    occupied_rows, occupied_columns = np.nonzero(pixels)
    cropped = pixels[occupied_rows.min() : occupied_rows.max() + 1, occupied_columns.min() : occupied_columns.max() + 1]
    image = preprocessing.as_mnist(cropped)
    assert (image.shape, image.dtype, image.max()) == ((28, 28, 1), np.uint8, 255)
    rows, columns = (np.nonzero(image.max(axis=(axis, 2)))[0] for axis in (1, 0))
    height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
    assert max(height, width) == 20
    assert abs(min(height, width) - max(1, 20 * min(cropped.shape) / max(cropped.shape))) <= 1
    for axis, occupied in ((1, rows), (0, columns)):
        mean = image.sum(axis=(axis, 2)) @ np.arange(28) / image.sum()
        # In the middle up to rounding, or as far there as possible without leaving the image.
        assert 13.4 < mean < 14.6 or occupied.min() == 0 or occupied.max() == 27


def test_mnist_images_stay_nearly_unchanged(mnist_dir):
    images = data.load("mnist", mnist_dir, notify=print).test_images[:100]
    again = np.stack([prepare(encode(Image.fromarray(image[..., 0]))) for image in images])
    assert np.abs(again.astype(int) - images).mean() < 5


def test_digits_have_the_form_of_the_built_in_ones():
    for image in data.load("digits", notify=print).test_images[:20]:
        content = encode(Image.fromarray(image[..., 0]).resize((140, 140), Image.Resampling.BICUBIC))
        again = prepare(content, "digits")
        squares = again[2:26:3, 2:26:3]
        np.testing.assert_array_equal(again, np.pad(np.kron(squares[..., 0], np.ones((3, 3))), 2)[..., np.newaxis])
        assert squares[:, 0].max() == squares[:, -1].max() == 0
        assert squares.max(axis=(1, 2)).min() > 0
        assert set(np.unique(squares)) <= {int(shade * 255 / 16) for shade in range(17)}


def test_specks_shadows_and_paper_grain_are_background():
    rng = np.random.default_rng(0)
    share = np.pad(np.kron(drawing(), np.ones((3, 3))), 60)
    height, width = share.shape
    paper = 0.9 - 0.25 * np.arange(width) / width + rng.normal(0, 0.02, (height, width))
    paper[20:23, 20:23] = paper[-30:-27, 200:203] = 0.1
    photo = np.uint8(255 * np.clip(paper * (1 - share) + 0.15 * share, 0, 1))
    found = prepare(encode(Image.fromarray(photo).convert("RGB"), "JPEG", quality=80))
    assert np.abs(found.astype(int) - prepare(encode(BLACK_ON_WHITE))).mean() < 6


UNREADABLE = {
    "it is empty": lambda: b"",
    "it is none of PNG, JPEG, WEBP": lambda: b"hello",
    "is HEIC; convert it": lambda: bytes(4) + b"ftypheic" + bytes(99),
    "it is corrupt": lambda: encode(BLACK_ON_WHITE)[:150],
    "is corrupt": lambda: encode(BLACK_ON_WHITE, "JPEG")[:400],
    "nothing is drawn on it": lambda: encode(WHITE),
    "nothing is drawn": lambda: encode(paint((250, 250, 250), (255, 255, 255))),
    "nothing": lambda: encode(Image.new("RGBA", (30, 30), (0, 0, 0, 0))),
    "nothing is": lambda: encode(Image.fromarray(np.uint8([[0, 255]]).repeat(15, axis=1).repeat(30, axis=0))),
    "it has 20000×20000 pixels, more than": lambda: encode(Image.new("1", (20000, 20000))),
    "more than 67 MB": lambda: b"\x89PNG" + bytes(MAX_BYTES),
}


@pytest.mark.parametrize("reason", UNREADABLE)
def test_unreadable_images_have_a_reason(reason):
    with pytest.raises(UnreadableImageError, match=reason):
        prepare(UNREADABLE[reason]())


def test_caller_limits_the_number_of_pixels():
    prepare(encode(BLACK_ON_WHITE), max_pixels=70 * 90)
    with pytest.raises(UnreadableImageError, match="70×90"):
        prepare(encode(BLACK_ON_WHITE), max_pixels=70 * 90 - 1)


FILE = encode(BLACK_ON_WHITE)
changed_files = st.builds(
    lambda changes, tail: bytes(dict(changes).get(place, byte) for place, byte in enumerate(FILE[:-30])) + tail,
    st.lists(st.tuples(st.integers(8, len(FILE) - 1), st.integers(0, 255)), max_size=5),
    st.binary(max_size=40),
)
small_images = arrays.arrays(
    np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([0, 128, 255])
)


@given(changed_files | small_images.map(lambda pixels: encode(Image.fromarray(pixels))))
@settings(max_examples=50)
def test_any_file_gives_an_image_or_a_reason(content):
    with contextlib.suppress(UnreadableImageError):
        image = prepare(content, max_pixels=10**6)
        assert (image.shape, image.dtype) == ((28, 28, 1), np.uint8)


def test_otsu_separates_two_clusters():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.2, 0.03, 5000), rng.normal(0.7, 0.05, 500)])
    threshold = foreground.otsu(values)
    assert np.mean(values[:5000] > threshold) < 0.005
    assert np.mean(values[5000:] <= threshold) < 0.005
    assert 0 < foreground.otsu(np.array([0.0, 1.0])) < 1


@pytest.fixture(scope="module")
def fonts() -> dict[str, Path]:
    installed = pictures.font_files()
    return {name: installed[name] for name in ("DejaVuSans", "cmss10", "STIXGeneral")}


PENS = {"drawn": pictures.DRAWN}


def share_right(model: classifier.Classifier, shown: list[pictures.Picture]) -> float:
    return float(np.mean([pictures.read(model, picture.content)[0] == picture.answer for picture in shown]))


@pytest.mark.parametrize("scene", pictures.SCENES)
def test_pictures_of_fonts_are_read(model, scene, fonts):
    shown = list(pictures.font_pictures(scene, fonts))
    assert share_right(model, shown) >= pictures.GOALS[scene]


@pytest.mark.parametrize("pen", pictures.PEN_SHARES)
def test_thin_and_thick_pens_are_read(model, pen):
    shown = list(pictures.pen_pictures(pen, PENS))
    assert share_right(model, shown) >= pictures.GOALS[pen]


def test_small_drawings_of_a_thick_brush_are_read(model):
    assert share_right(model, list(pictures.corner_pictures())) == 1


def is_blank(content: bytes) -> bool:
    try:
        prepare(content)
    except UnreadableImageError as error:
        return isinstance(error, preprocessing.BlankImageError)
    return False


def test_blank_sheets_are_blank():
    assert np.mean([is_blank(picture.content) for picture in pictures.blank_pictures()]) > 0.95


def test_several_digits_have_places(fonts):
    image = Image.new("L", (200, 100), 255)
    for left in (20, 130):
        ImageDraw.Draw(image).ellipse((left, 20, left + 40, 80), outline=0, width=6)
    with pytest.raises(preprocessing.SeveralDigitsError) as caught:
        prepare(encode(image))
    assert np.abs(np.array(caught.value.places) - [[0.2, 0.1, 0.8, 0.3], [0.2, 0.65, 0.8, 0.85]]).max() < 0.02
    assert len(list(pictures.several_pictures(fonts))) == 6
    for picture in pictures.several_pictures(fonts):
        with pytest.raises(preprocessing.SeveralDigitsError):
            prepare(picture.content)


def test_border_around_an_image_of_mnist_changes_no_answer(model, mnist_dir):
    for image in data.load("mnist", mnist_dir, notify=print).test_images[:100, ..., 0]:
        framed = image.copy()
        framed[[0, -1]] = framed[:, [0, -1]] = 255
        (plain, _), (answer, _) = (pictures.read(model, encode(Image.fromarray(pixels))) for pixels in (image, framed))
        assert answer == plain


def test_stroke_along_an_edge_belongs_to_the_digit():
    top = int(np.nonzero(drawing().max(axis=1) > 0.5)[0].min())
    cut = BLACK_ON_WHITE.crop((0, top, *BLACK_ON_WHITE.size))
    assert np.abs(prepare(encode(cut)).astype(int) - prepare(encode(BLACK_ON_WHITE))).mean() < 6


@pytest.mark.parametrize("digit", [2, 3, 5])
def test_closely_cropped_digits_keep_their_strokes(digit):
    ink_share = pictures.draw(pictures.DRAWN[digit], 120, width_share=0.12)
    close, wide = (encode(Image.fromarray(np.uint8(255 - 255 * np.pad(ink_share, pad)))) for pad in (0, 40))
    assert np.abs(prepare(close).astype(int) - prepare(wide)).mean() < 4
