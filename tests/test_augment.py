import jax
import numpy as np
import pytest
from scipy import ndimage

from mnist_jax.training import augment, data

pytestmark = pytest.mark.usefixtures("no_optimizations")

SIZE = 100  # The same in all tests: without jit, each operation is compiled once for all amounts.


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    return data.load("digits", notify=print).train_images[:SIZE]


def distort(images, seed: int = 0, *, shift_px=0.0, rotation_deg=0.0, zoom=0.0) -> np.ndarray:
    amounts = {"shift_px": shift_px, "rotation_deg": rotation_deg, "zoom": zoom}
    return np.asarray(augment.augment(images, jax.random.key(seed), **amounts))


def drawing(*area: slice) -> np.ndarray:
    images = np.zeros((SIZE, 28, 28, 1), np.uint8)
    images[:, area[0], area[1]] = 255
    return images


def test_images_keep_their_form(digits):
    found = distort(digits, shift_px=5.0, rotation_deg=180.0, zoom=0.9)
    assert (found.shape, found.dtype) == (digits.shape, np.float32)
    assert found.min() >= 0
    assert found.max() <= 1
    np.testing.assert_allclose(distort(digits, shift_px=1e-9), digits / np.float32(255), atol=1e-5)
    assert augment.augment(digits, jax.random.key(0), shift_px=0.0, rotation_deg=0.0, zoom=0.0) is digits


def test_bytes_and_floats_are_augmented_alike(digits):
    amounts = {"shift_px": 2.0, "rotation_deg": 10.0, "zoom": 0.1}
    floats = (digits / 255).astype(np.float32)
    np.testing.assert_allclose(distort(digits, **amounts), distort(floats, **amounts), atol=1e-5)


def test_shifts_go_both_ways_within_the_limit():
    moved = distort(drawing(slice(14, 15), slice(14, 15)), shift_px=3.0)
    moved = np.array([ndimage.center_of_mass(image[..., 0]) for image in moved]) - 14
    assert np.abs(moved).max() <= 3.001
    assert moved.min(axis=0).max() < -2.5
    assert moved.max(axis=0).min() > 2.5
    assert abs(np.corrcoef(moved.T)[0, 1]) < 0.3  # The two directions are independent.


def test_rotations_go_both_ways_within_the_limit():
    turned = distort(drawing(slice(13, 15), slice(4, 24)), rotation_deg=20.0)[..., 0]
    y, x = np.indices((28, 28)) - 13.5
    angles = np.degrees(np.arctan2((turned * y * x).sum(axis=(1, 2)), (turned * x * x).sum(axis=(1, 2))))
    assert 18 < angles.max() < 20.5
    assert -20.5 < angles.min() < -18


def test_zoom_goes_both_ways_within_the_limit():
    areas = distort(drawing(slice(9, 19), slice(9, 19)), zoom=0.1).sum(axis=(1, 2, 3)) / 100
    assert 1 / 1.1**2 - 0.02 < areas.min() < 0.9
    assert 1.1 < areas.max() < 1 / 0.9**2 + 0.02


def test_each_image_is_augmented_by_itself_and_by_the_key_alone(digits):
    same = np.repeat(digits[:1], SIZE, axis=0)
    first = distort(same, shift_px=2.0)
    assert len({image.tobytes() for image in first}) == SIZE
    np.testing.assert_array_equal(first, distort(same, shift_px=2.0))
    assert not np.array_equal(first, distort(same, seed=1, shift_px=2.0))


def test_pixels_from_outside_are_empty():
    found = distort(drawing(slice(None), slice(None)), shift_px=10.0)
    np.testing.assert_allclose(found[:, 14, 14], 1, rtol=1e-5)
    assert np.sum(np.any(found == 0, axis=(1, 2, 3))) > 0.8 * SIZE
