import contextlib
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from mnist_jax.inference import classifier, preprocessing
from mnist_jax.inference.preprocessing import UnreadableImageError, prepare
from mnist_jax.training import data

DIGITS = data.load("digits", notify=print)
ALL = 255 * np.ones((40, 60, 3), np.uint8)


def file(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def drawing() -> np.ndarray:
    """Return a 7 of thick strokes with soft edges, [90, 70] in [0, 1], 1 being ink."""
    strokes = Image.new("L", (280, 360), 0)
    for box in ((60, 60, 220, 90), (180, 60, 220, 300)):
        strokes.paste(255, box)
    return np.asarray(strokes.resize((70, 90), Image.Resampling.BOX)) / 255


def paint(ink: tuple[int, int, int], ground: tuple[int, int, int]) -> Image.Image:
    share = drawing()[..., np.newaxis]
    return Image.fromarray(np.round(share * ink + (1 - share) * ground).astype(np.uint8))


def with_alpha(colour: int, *, stencil: bool = False) -> Image.Image:
    """Return the drawing in a transparent picture of one colour, or cut out of it."""
    share = 1 - drawing() if stencil else drawing()
    return Image.fromarray(np.stack([np.full_like(share, colour), 255 * share], axis=-1).astype(np.uint8), "LA")


def test_a_thousand_digits_of_other_sizes_places_and_polarities_are_as_well_recognized(trained_run, mnist_dir):
    model, dataset = classifier.load(trained_run.workdir, "latest"), data.load("mnist", mnist_dir, notify=print)
    images, labels, chance = dataset.test_images[:1000], dataset.test_labels[:1000], np.random.default_rng(0)

    def disguise(image: np.ndarray) -> bytes:
        side = int(chance.integers(20, 120))
        width, height = (side + int(chance.integers(side)) for _ in range(2))
        place = int(chance.integers(width - side + 1)), int(chance.integers(height - side + 1))
        picture = Image.new("L", (width, height), 0)
        picture.paste(Image.fromarray(image[..., 0]).resize((side, side), Image.Resampling.BICUBIC), place)
        return file(Image.fromarray(255 - np.asarray(picture)) if chance.random() < 0.5 else picture)

    plain = np.mean([model.predict(image).argmax() == label for image, label in zip(images, labels, strict=True)])
    found = [model.predict(prepare(disguise(image))).argmax() for image in images]
    assert plain > 0.98
    assert np.mean(found == labels) > plain - 0.01


TURNED = Image.Exif()
TURNED[0x0112] = 6  # turn it by a quarter, clockwise, to see it as it was
DRESSES = {
    "light on dark": file(paint((255, 255, 255), (0, 0, 0))),
    "red on blue": file(paint((220, 30, 30), (30, 30, 220))),
    "green on red of the same brightness": file(paint((0, 150, 0), (255, 21, 0))),
    "pencil": file(paint((150, 150, 150), (230, 230, 220))),
    "black on transparent": file(with_alpha(0)),
    "white on transparent": file(with_alpha(255)),
    "cut out of white": file(with_alpha(255, stencil=True)),
    "cut out of black": file(with_alpha(0, stencil=True)),
    "palette": file(paint((200, 0, 0), (255, 255, 255)).quantize(64)),
    "16 bits": file(Image.fromarray((65535 * (0.9 - 0.6 * drawing())).astype(np.uint16))),
    "jpeg": file(paint((0, 0, 0), (255, 255, 255)), "JPEG", quality=95),
    "cmyk": file(paint((0, 0, 0), (255, 255, 255)).convert("CMYK"), "JPEG", quality=95),
    "grey jpeg": file(paint((0, 0, 0), (255, 255, 255)).convert("L"), "JPEG", quality=95),
    "turned by its camera": file(paint((0, 0, 0), (255, 255, 255)).transpose(Image.Transpose.ROTATE_90), exif=TURNED),
    "four times as large": file(paint((0, 0, 0), (255, 255, 255)).resize((280, 360), Image.Resampling.BICUBIC)),
    "larger than any screen": file(paint((0, 0, 0), (255, 255, 255)).resize((2800, 3600), Image.Resampling.BICUBIC)),
    "with wide margins": file(Image.fromarray(np.pad(255 - np.uint8(255 * drawing()), 200, constant_values=255))),
}


@pytest.mark.parametrize("dress", DRESSES)
def test_the_same_digit_is_the_same_image_in_whatever_dress(dress):
    wanted = prepare(file(paint((0, 0, 0), (255, 255, 255))))
    assert wanted.max() == 255
    difference = np.abs(prepare(DRESSES[dress]).astype(int) - wanted)
    assert difference.mean() < 4
    assert np.mean(difference > 64) < 0.01


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 60), st.integers(1, 60)), elements=st.sampled_from([0, 255])))
def test_any_drawing_fills_twenty_pixels_and_lies_with_its_centre_of_mass_in_the_middle(pixels):
    if not pixels.any() or pixels.all():
        pixels = np.pad(np.full_like(pixels, 255), 3)
    cropped = preprocessing.crop(pixels / 255)
    image = preprocessing.as_mnist(cropped)
    assert (image.shape, image.dtype, image.max()) == ((28, 28, 1), np.uint8, 255)
    rows, columns = (np.nonzero(image.max(axis=(axis, 2)))[0] for axis in (1, 0))
    height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
    assert max(height, width) == 20
    assert abs(min(height, width) - max(1, 20 * min(cropped.shape) / max(cropped.shape))) <= 1
    for axis, occupied in ((1, rows), (0, columns)):
        mean = image.sum(axis=(axis, 2)) @ np.arange(28) / image.sum()
        # In the middle, up to the rounding of shades, or as far there as it can be without leaving the image.
        assert 13.4 < mean < 14.6 or occupied.min() == 0 or occupied.max() == 27


def test_an_image_of_mnist_comes_out_nearly_as_it_is(mnist_dir):
    images = data.load("mnist", mnist_dir, notify=print).test_images[:200]
    again = np.stack([prepare(file(Image.fromarray(image[..., 0]))) for image in images])
    assert np.abs(again.astype(int) - images).mean() < 5


def test_an_image_of_the_built_in_digits_comes_out_in_their_own_form():
    for image in DIGITS.test_images[:50]:
        content = file(Image.fromarray(image[..., 0]).resize((140, 140), Image.Resampling.BICUBIC))
        again = prepare(content, "digits")
        squares = again[2:26:3, 2:26:3]
        np.testing.assert_array_equal(again, np.pad(np.kron(squares[..., 0], np.ones((3, 3))), 2)[..., np.newaxis])
        assert squares[:, 0].max() == squares[:, -1].max() == 0
        assert squares.max(axis=(1, 2)).min() > 0
        assert set(np.unique(squares)) <= {int(shade * 255 / 16) for shade in range(17)}


def test_specks_shadows_and_the_grain_of_paper_are_no_ink():
    chance = np.random.default_rng(0)
    share = np.pad(np.kron(drawing(), np.ones((3, 3))), 60)
    height, width = share.shape
    paper = 0.9 - 0.25 * np.arange(width) / width + chance.normal(0, 0.02, (height, width))
    paper[20:23, 20:23] = paper[-30:-27, 200:203] = 0.1
    photo = np.uint8(255 * np.clip(paper * (1 - share) + 0.15 * share, 0, 1))
    wanted = prepare(file(paint((0, 0, 0), (255, 255, 255))))
    found = prepare(file(Image.fromarray(photo).convert("RGB"), "JPEG", quality=80))
    assert np.abs(found.astype(int) - wanted).mean() < 6


WRONG = {
    "it is empty": b"",
    "it is neither PNG nor JPEG": b"hello",
    "neither PNG nor JPEG": file(Image.fromarray(ALL), "GIF"),
    "it is damaged": file(paint((0, 0, 0), (255, 255, 255)))[:150],
    "is damaged": file(paint((0, 0, 0), (255, 255, 255)), "JPEG")[:400],
    "nothing is drawn on it": file(Image.fromarray(ALL)),
    "nothing is drawn": file(paint((250, 250, 250), (255, 255, 255))),
    "all of it has nearly the same colour": file(Image.new("RGBA", (30, 30), (0, 0, 0, 0))),
    "nearly the same colour": file(Image.new("L", (1, 1))),
    "no ground can be told from ink": file(Image.fromarray(np.uint8([[0, 255]]).repeat(15, axis=1).repeat(30, axis=0))),
    "its edges have two colours": file(Image.fromarray(np.uint8([[255, 128]]).repeat(2, axis=0))),
    "it has 20000×20000 pixels, more than": file(Image.new("1", (20000, 20000))),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_looked_at_is_told_with_its_reason(message):
    with pytest.raises(UnreadableImageError, match=message):
        prepare(WRONG[message])


def test_a_file_of_many_bytes_is_not_even_opened():
    with pytest.raises(UnreadableImageError, match="more than 67 MB"):
        prepare(b"\x89PNG" + bytes(preprocessing.MAX_BYTES))


def test_the_number_of_pixels_has_the_limit_that_the_caller_wants():
    picture = file(paint((0, 0, 0), (255, 255, 255)))
    prepare(picture, max_pixels=70 * 90)
    with pytest.raises(UnreadableImageError, match="it has 70×90 pixels, more than"):
        prepare(picture, max_pixels=70 * 90 - 1)


@given(
    arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.sampled_from([0, 128, 255]))
)
def test_whatever_is_drawn_there_is_an_image_or_a_reason(pixels):
    with contextlib.suppress(UnreadableImageError):
        image = prepare(file(Image.fromarray(pixels)))
        assert (image.shape, image.dtype, image.max()) == ((28, 28, 1), np.uint8, 255)


PICTURE = file(paint((0, 0, 0), (255, 255, 255)))


@given(st.lists(st.tuples(st.integers(8, len(PICTURE) - 1), st.integers(0, 255)), max_size=5), st.binary(max_size=40))
def test_whatever_bytes_come_there_is_an_image_or_a_reason(changes, tail):
    content = bytearray(PICTURE)
    for place, byte in changes:
        content[place] = byte
    for candidate in (bytes(content), bytes(content[:-30]) + tail, tail):
        with contextlib.suppress(UnreadableImageError):
            image = prepare(candidate, max_pixels=10**6)
            assert (image.shape, image.dtype) == ((28, 28, 1), np.uint8)


def test_otsu_divides_two_heaps_between_them():
    chance = np.random.default_rng(0)
    heaps = np.concatenate([chance.normal(0.2, 0.03, 5000), chance.normal(0.7, 0.05, 500)])
    threshold = preprocessing.otsu(heaps)
    assert np.mean(heaps[:5000] > threshold) < 0.005
    assert np.mean(heaps[5000:] <= threshold) < 0.005
    assert 0 < preprocessing.otsu(np.array([0.0, 1.0])) < 1
