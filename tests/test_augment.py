import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from mnist_jax.training import augment, data

STILL = {"shift_px": 0.0, "rotation_deg": 0.0, "zoom": 0.0}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return data.load("digits", notify=print).train_images[:64]


def distort(images, seed: int = 0, **amounts) -> np.ndarray:
    distorted = jax.jit(lambda images, key: augment.augment(images, key, **{**STILL, **amounts}))
    return np.asarray(distorted(images, jax.random.key(seed)))


def centres(images) -> np.ndarray:
    """Return the centres of mass, [N, 2]."""
    return np.array([ndimage.center_of_mass(image[..., 0]) for image in images])


def angles(images) -> np.ndarray:
    """Return the directions of the longest axis, in degrees, [N]."""
    y, x = np.indices(images.shape[1:3]) - (np.array(images.shape[1:3]) - 1).reshape(2, 1, 1) / 2
    return np.array(
        [np.degrees(np.arctan2((image[..., 0] * y * x).sum(), (image[..., 0] * x * x).sum())) for image in images]
    )


def test_without_any_amount_an_image_stays_what_it_is(images):
    np.testing.assert_allclose(distort(images), images / np.float32(255), atol=1e-5)


def test_bytes_and_floats_between_0_and_1_are_distorted_alike(images):
    amounts = {"shift_px": 2.0, "rotation_deg": 10.0, "zoom": 0.1}
    np.testing.assert_allclose(
        distort(images, **amounts), distort((images / 255).astype(np.float32), **amounts), atol=1e-5
    )


def test_the_result_is_float32_between_0_and_1_of_the_same_shape(images):
    found = distort(images, shift_px=5.0, rotation_deg=180.0, zoom=0.9)
    assert (found.shape, found.dtype) == (images.shape, np.float32)
    assert found.min() >= 0
    assert found.max() <= 1


def test_images_are_shifted_in_both_directions_and_by_no_more_than_asked_for():
    point = np.zeros((200, 28, 28, 1), np.uint8)
    point[:, 14, 14] = 255
    moved = centres(distort(point, shift_px=3.0)) - 14
    assert np.abs(moved).max() <= 3.001
    assert moved.min(axis=0).max() < -2.5
    assert moved.max(axis=0).min() > 2.5
    assert abs(np.corrcoef(moved.T)[0, 1]) < 0.3  # up and down, left and right: each by itself


def test_images_are_rotated_in_both_directions_and_by_no_more_than_asked_for():
    line = np.zeros((200, 28, 28, 1), np.uint8)
    line[:, 13:15, 4:24] = 255
    turned = angles(distort(line, rotation_deg=20.0))
    assert 18 < turned.max() < 20.5
    assert -20.5 < turned.min() < -18


def test_images_become_larger_and_smaller_by_no_more_than_asked_for():
    square = np.zeros((200, 28, 28, 1), np.uint8)
    square[:, 9:19, 9:19] = 255
    areas = distort(square, zoom=0.1).sum(axis=(1, 2, 3)) / 100
    assert 1 / 1.1**2 - 0.02 < areas.min() < 0.9
    assert 1.12 < areas.max() < 1 / 0.9**2 + 0.02


def test_each_image_is_distorted_by_itself_and_by_the_key_alone(images):
    same = np.repeat(images[:1], 4, axis=0)
    first = distort(same, shift_px=2.0)
    assert len({image.tobytes() for image in first}) == 4
    np.testing.assert_array_equal(first, distort(same, shift_px=2.0))
    assert not np.array_equal(first, distort(same, seed=1, shift_px=2.0))


def test_what_comes_in_from_outside_is_empty():
    full = np.full((50, 28, 28, 1), 255, np.uint8)
    found = distort(full, shift_px=10.0)
    np.testing.assert_allclose(found[:, 14, 14], 1, rtol=1e-5)
    assert np.sum(np.any(found == 0, axis=(1, 2, 3))) > 40


def test_unchanged_returns_the_very_images(images):
    assert augment.unchanged(images, jnp.zeros(())) is images
