import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from mnist_jax.config import ModelName
from mnist_jax.training import data
from mnist_jax.training.model import MODELS, Network, conv, pool, pooled_conv_of_one_channel, power_of_relu, slide

pytestmark = pytest.mark.usefixtures("no_optimizations")

DIGITS = data.load("digits", notify=print)
IMAGES, LABELS = DIGITS.train_images[:8], DIGITS.train_labels[:8]
SMALL = {"features": (2,), "kernel_sizes": (5,), "hidden": 4}


def draw_variables(model: Network):
    """Return random variables of a model, without compiling its `init`."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        match path[-1].key:
            case "kernel":
                return np.float32(rng.normal(size=leaf.shape, scale=np.prod(leaf.shape[:-1]) ** -0.5))
            case "scale" | "var":
                return np.float32(rng.uniform(0.5, 1.5, leaf.shape))
            case _:
                return np.float32(rng.normal(size=leaf.shape, scale=0.1))

    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), IMAGES[:1])
    return jax.tree_util.tree_map_with_path(draw, shapes)


# The convolutions


def whole_numbers(*shapes: tuple[int, ...]):
    """Return arrays of small whole numbers: sums of their products are exact in float32, in any order."""
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.integers(-3, 4, shape), jnp.float32) for shape in shapes)


def normal_numbers(*shapes: tuple[int, ...]):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def value_and_gradients(function, margin: int):
    """Return a compiled function of x, kernel and g: the value, and the gradients of its product with g."""

    def compute(x, kernel, g):
        y, backward = jax.vjp(lambda x, kernel: function(x, kernel, margin), x, kernel)
        return y, *backward(g)

    return jax.jit(compute)


@pytest.mark.parametrize(
    ("size", "margin", "x_shape", "outputs"),
    [
        (5, 2, (7, 14, 14, 16), 4),  # 16 channels and more fill the vectors
        (3, 0, (4, 12, 12, 8), 5),  # fewer: two pixels at a time
        (5, 0, (3, 6, 10, 3), 5),
        (3, 1, (4, 9, 5, 2), 3),  # an odd width
        (1, 0, (1, 4, 4, 1), 1),
    ],
)
def test_conv_and_its_gradients_are_exactly_those_of_xla(size, margin, x_shape, outputs):
    batch, height, width, inputs = x_shape
    less = size - 1 - 2 * margin
    shapes = (x_shape, (size, size, inputs, outputs), (batch, height - less, width - less, outputs))
    found, wanted = (value_and_gradients(function, margin)(*whole_numbers(*shapes)) for function in (conv, slide))
    for part, one, other in zip(("y", "dx", "dk"), found, wanted, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=part)


def pooled_conv(x, kernel, margin):
    return pool(conv(x, kernel, margin))


@pytest.mark.parametrize(
    ("function", "size", "margin", "x_shape", "outputs"),
    [
        (pooled_conv, 3, 1, (2, 8, 12, 6), 5),
        (pooled_conv, 3, 0, (2, 9, 12, 6), 5),  # an odd height: the last row is ignored
        (pooled_conv_of_one_channel, 5, 2, (4, 21, 28, 1), 5),
        (pooled_conv_of_one_channel, 5, 0, (4, 12, 13, 1), 5),
        (pooled_conv_of_one_channel, 5, 2, (4, 28, 28, 1), 5),
        (pooled_conv_of_one_channel, 5, 0, (4, 12, 8, 1), 16),
        (pooled_conv_of_one_channel, 1, 0, (2, 4, 4, 1), 5),
    ],
)
def test_pooled_conv_and_its_gradients_are_those_of_xla(function, size, margin, x_shape, outputs):
    batch, height, width, inputs = x_shape
    less = size - 1 - 2 * margin
    g_shape = batch, (height - less) // 2, (width - less) // 2, outputs
    shapes = x_shape, (size, size, inputs, outputs), g_shape
    compute = value_and_gradients(function, margin)
    plain = value_and_gradients(lambda x, k, margin: nn.max_pool(slide(x, k, margin), (2, 2), (2, 2)), margin)
    np.testing.assert_array_equal(compute(*whole_numbers(*shapes))[0], plain(*whole_numbers(*shapes))[0])
    # Among equal values the two choose different ones, and both gradients are correct: not whole numbers.
    for one, other in zip(compute(*normal_numbers(*shapes)), plain(*normal_numbers(*shapes)), strict=True):
        # Sums of at most 784 products of about 1 in float32: an error of 1e-5 of the largest is a hundred roundings.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(("name", "side_px"), [("cnn", 12), ("cnn-tiny", 6), ("cnn-large", 20), ("original", 4)])
def test_an_image_has_a_smallest_size_and_any_number_of_classes(name, side_px):
    model = MODELS[name].clone(for_cpu=True, classes=7)
    assert model.min_side_px == side_px

    def logits(height, width):
        """Return the logits, or None if nothing is left of the images for the layers after a pooling."""
        images = jnp.zeros((3, height, width, 1), jnp.uint8)
        try:
            found, variables = jax.eval_shape(lambda: model.init_with_output(jax.random.key(0), images, train=False))
        except (ZeroDivisionError, TypeError, ValueError):
            return None  # jax 0.12 computes with the empty arrays.
        return found if all(leaf.size for leaf in jax.tree.leaves(variables)) else None

    for height, width in ((side_px, side_px), (side_px + 1, side_px + 3)):
        assert logits(height, width).shape == (3, 7)
    assert logits(side_px - 1, side_px) is None


@pytest.mark.parametrize("exponent", [0.1, 2.0])
def test_power_of_relu_is_the_power_with_a_finite_slope(exponent):
    x = jnp.concatenate([jnp.linspace(-3, 0, 31), jnp.linspace(0.0101, 3, 31)])
    wanted = np.maximum(np.asarray(x, np.float64), 0) ** exponent
    np.testing.assert_allclose(power_of_relu(x, exponent=exponent), wanted, rtol=1e-6)
    below, above = power_of_relu(jnp.float32([0.01 * (1 - 1e-5), 0.01 * (1 + 1e-5)]), exponent=exponent)
    np.testing.assert_allclose(below, above, rtol=1e-4)
    slope = jax.vmap(jax.grad(functools.partial(power_of_relu, exponent=exponent)))
    slopes = slope(jnp.float32([-1e30, -1, -1e-30, 0, 1e-30, 1e-10, 1e-3, 0.01, 1, 1e3]))
    assert np.all(np.isfinite(slopes))
    assert not np.any(slopes[:3])
    assert np.all(slopes[4:] > 0)


# The networks


def test_the_layers_of_the_models_are_these():
    def shapes(name: str):
        initialize = functools.partial(MODELS[name].init, train=False)
        params = jax.eval_shape(initialize, jax.random.key(0), IMAGES[:1])["params"]
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
        return {layer: {part: leaf.shape for part, leaf in parts.items()} for layer, parts in params.items()}

    for name in MODELS:
        if name.startswith("original"):
            assert shapes(name) == {
                "conv1": {"kernel": (5, 5, 1, 16), "bias": (16,)},
                "conv2": {"kernel": (5, 5, 16, 32), "bias": (32,)},
                "dense1": {"kernel": (7 * 7 * 32, 1024), "bias": (1024,)},
                "logits": {"kernel": (1024, 10), "bias": (10,)},
            }
    assert shapes("cnn") == {
        "conv1": {"kernel": (5, 5, 1, 8), "bias": (8,)},  # 28 - 4 = 24 -> 12 pixels
        "conv2": {"kernel": (3, 3, 8, 32), "bias": (32,)},  # 12 - 2 = 10 -> 5 pixels
        "dense1": {"kernel": (5 * 5 * 32, 64), "bias": (64,)},
        "logits": {"kernel": (64, 10), "bias": (10,)},
    }
    assert shapes("cnn-tiny") == {
        "conv1": {"kernel": (5, 5, 1, 8), "bias": (8,)},  # 28 - 4 = 24 -> 12 pixels
        "dense1": {"kernel": (12 * 12 * 8, 32), "bias": (32,)},
        "logits": {"kernel": (32, 10), "bias": (10,)},
    }
    assert shapes("cnn-large") == {
        "conv1": {"kernel": (5, 5, 1, 32)},  # 28 - 4 = 24 -> 12 pixels
        "conv1_norm": {"scale": (32,), "bias": (32,)},
        "conv2": {"kernel": (3, 3, 32, 64)},  # 12 - 2 = 10 pixels
        "conv2_norm": {"scale": (64,), "bias": (64,)},
        "conv3": {"kernel": (3, 3, 64, 96)},  # 10 - 2 = 8 pixels
        "conv3_norm": {"scale": (96,), "bias": (96,)},
        "conv4": {"kernel": (3, 3, 96, 128)},  # 8 - 2 = 6 -> 3 pixels
        "conv4_norm": {"scale": (128,), "bias": (128,)},
        "dense1": {"kernel": (3 * 3 * 128, 256)},
        "dense1_norm": {"scale": (256,), "bias": (256,)},
        "logits": {"kernel": (256, 10), "bias": (10,)},
    }
    dropping = [name for name in get_args(ModelName) if MODELS[name].dropout]
    assert dropping == ["cnn-large", "original-dropout", "original-power"]


def plain_logits(model: Network, variables, images):
    """Return what the fields of a model describe, in layers of Flax."""
    params, stats = variables["params"], variables.get("batch_stats", {})

    def activate(x, name: str):
        if model.batch_norm:
            norm = {"params": params[f"{name}_norm"], "batch_stats": stats[f"{name}_norm"]}
            x = nn.BatchNorm(use_running_average=True).apply(norm, x)
        return model.activation(x)

    x = (images.astype(jnp.float32) / 255 - model.pixel_mean) / model.pixel_std
    use_bias = not model.batch_norm
    for number, (features, size) in enumerate(zip(model.features, model.kernel_sizes, strict=True), start=1):
        name = f"conv{number}"
        layer = nn.Conv(features, (size, size), padding=model.padding, use_bias=use_bias)
        x = layer.apply({"params": params[name]}, x)
        x = x if number in model.unpooled else nn.max_pool(x, (2, 2), (2, 2))
        x = activate(x, name)
    x = nn.Dense(model.hidden, use_bias=use_bias).apply({"params": params["dense1"]}, x.reshape(len(x), -1))
    return model.logits_activation(nn.Dense(10).apply({"params": params["logits"]}, activate(x, "dense1")))


# Some layers of sums in float32, in another order. The slope of the power, 63, enlarges the roundings.
@pytest.mark.parametrize(("name", "tolerance"), [("cnn-large", 1e-5), ("original-power", 1e-3)])
def test_both_forms_of_a_model_are_the_plain_network(name, tolerance):
    """A prediction depends neither on the form, nor on other images, nor on dropout."""
    model = MODELS[name]

    @jax.jit
    def compute(variables, images):
        forms = [model.clone(for_cpu=for_cpu).apply(variables, images, train=False) for for_cpu in (True, False)]
        return plain_logits(model, variables, images), forms

    wanted, forms = compute(draw_variables(model), IMAGES)
    for found in forms:
        assert (found.shape, found.dtype) == ((8, 10), jnp.float32)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def test_the_power_model_is_finite_on_empty_images_and_over_updates():
    model = MODELS["original-power"].clone(for_cpu=True)
    params = draw_variables(model)["params"]

    @jax.jit
    @jax.value_and_grad
    def compute(params, images, seed):
        kept_units = model.draw_dropout(jax.random.key(seed), len(images))
        logits = model.apply({"params": params}, images, train=True, kept_units=kept_units)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    for seed, images in enumerate((np.zeros_like(IMAGES), *[IMAGES] * 20)):
        loss, gradients = compute(params, images, seed)
        assert np.isfinite(loss)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
        params = jax.tree.map(lambda leaf, gradient: leaf - 1e-4 * np.sign(gradient), params, gradients)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_dropout_keeps_a_share_of_the_units_and_scales_them():
    model = Network(**{**SMALL, "hidden": 50}, dropout=0.2)
    plain, variables = model.clone(dropout=0.0), draw_variables(model)
    kept = model.draw_dropout(jax.random.key(0), len(IMAGES))
    assert 0.7 < np.mean(kept) < 0.9
    assert plain.draw_dropout(jax.random.key(0), len(IMAGES)) is None

    found = model.apply(variables, IMAGES, train=True, kept_units=kept)
    _, seen = plain.apply(variables, IMAGES, train=False, capture_intermediates=True, mutable=["intermediates"])
    hidden = jax.nn.relu(seen["intermediates"]["dense1"]["__call__"][0])
    logits = variables["params"]["logits"]
    wanted = np.where(kept, hidden / 0.8, 0) @ logits["kernel"] + logits["bias"]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="kept_units"):
        model.apply(variables, IMAGES, train=True)  # without the units to keep


def test_batch_normalization_uses_the_batch_only_in_training():
    model = Network(**SMALL, batch_norm=True)
    variables = draw_variables(model)

    def first_layer(images, *, train: bool):
        _, seen = model.apply(
            variables,
            images,
            train=train,
            capture_intermediates=lambda module, _: module.name in ("conv1", "conv1_norm"),
            mutable=["intermediates", "batch_stats"],
        )
        outputs = [np.asarray(seen["intermediates"][name]["__call__"][0]) for name in ("conv1", "conv1_norm")]
        return *outputs, seen["batch_stats"]["conv1_norm"]

    pixels = (0, 1, 2)
    raw, normalized, after = first_layer(IMAGES, train=True)
    stats, params = variables["batch_stats"]["conv1_norm"], variables["params"]["conv1_norm"]
    np.testing.assert_allclose(normalized.mean(pixels), params["bias"], atol=1e-4)
    np.testing.assert_allclose(normalized.std(pixels), params["scale"], rtol=1e-3)
    np.testing.assert_allclose(after["mean"], 0.99 * stats["mean"] + 0.01 * raw.mean(pixels), atol=1e-5)
    np.testing.assert_allclose(after["var"], 0.99 * stats["var"] + 0.01 * raw.var(pixels), rtol=1e-4)
    _, evaluated, unchanged = first_layer(IMAGES, train=False)
    wanted = params["scale"] * (raw - stats["mean"]) / np.sqrt(stats["var"] + nn.BatchNorm.epsilon) + params["bias"]
    np.testing.assert_allclose(evaluated, wanted, atol=1e-5)
    np.testing.assert_array_equal(unchanged["mean"], stats["mean"])


def test_batch_statistics_hide_brightness_and_contrast_only_in_training():
    model = MODELS["original-normalized"].clone(**SMALL)
    images = IMAGES.astype(np.float32) / 255
    variables = draw_variables(model)
    for train, is_hidden in ((True, True), (False, False)):
        one, other = (model.apply(variables, batch, train=train) for batch in (images, images * 0.5 + 0.25))
        assert np.allclose(one, other, rtol=0, atol=1e-4 * np.abs(one).max()) == is_hidden
    assert np.all(np.isfinite(model.apply(variables, np.zeros_like(images), train=True)))


def test_bytes_are_the_same_images_as_floats():
    model = Network(**SMALL)
    variables = draw_variables(model)
    floats = IMAGES.astype(np.float32) / np.float32(255)
    one, two = (model.apply(variables, batch, train=False) for batch in (IMAGES, floats))
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * np.abs(one).max())
