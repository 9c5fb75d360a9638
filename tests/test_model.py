import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import Mesh
from runs import in_new_process

from mnist_jax.runtime import devices
from mnist_jax.training import data
from mnist_jax.training.model import MODELS, conv, pool, pooled_conv_of_one_channel, power_of_relu, slide

ORIGINALS = [name for name in MODELS if name.startswith("original")]
DROPPING = ["cnn-large", "original-dropout", "original-power"]


@pytest.fixture(scope="module")
def digits() -> data.Dataset:
    return data.load("digits", notify=print)


EMPTY_IMAGE = np.zeros((1, 28, 28, 1), np.uint8)


def abstract_params(name: str):
    """Return the shapes and types of a model's parameters."""
    return jax.eval_shape(functools.partial(MODELS[name].init, train=False), jax.random.key(0), EMPTY_IMAGE)["params"]


@functools.cache
def variables_of(name: str):
    """Return a model's first variables; the originals have the same ones."""
    if name in ORIGINALS[1:]:
        return variables_of(ORIGINALS[0])
    return jax.jit(functools.partial(MODELS[name].init, train=False))(jax.random.key(0), EMPTY_IMAGE)


def params_of(name: str):
    return variables_of(name)["params"]


@functools.partial(jax.jit, static_argnames=("name", "train", "for_cpu"))
def logits(name, params, images, *, train=False, key=None, for_cpu=True, batch_stats=None):
    variables = {**variables_of(name), "params": params}
    if batch_stats is not None:
        variables["batch_stats"] = batch_stats
    rngs = None if key is None else {"dropout": key}
    model = MODELS[name].clone(for_cpu=for_cpu)
    if not train:
        return model.apply(variables, images, train=False, rngs=rngs)
    return model.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])[0]


def whole_numbers(*shapes: tuple[int, ...]):
    """Yield arrays of small whole numbers: sums of their products are exact in float32, in whatever order."""
    rng = np.random.default_rng(0)
    for shape in shapes:
        yield jnp.asarray(rng.integers(-3, 4, shape), jnp.float32)


def numbers(*shapes: tuple[int, ...]):
    rng = np.random.default_rng(0)
    for shape in shapes:
        yield jnp.asarray(rng.normal(size=shape), jnp.float32)


def pooled_conv(x, kernel, margin):
    return pool(conv(x, kernel, margin))


def plain_pooled_conv(x, kernel, margin):
    return nn.max_pool(slide(x, kernel, margin), (2, 2), (2, 2))


def value_and_gradients(function, x, kernel, g):
    """Return the value of a function of two arrays, and the gradients of its product with g."""

    def compute(x, kernel, g):
        y, backward = jax.vjp(function, x, kernel)
        return y, *backward(g)

    return jax.jit(compute)(x, kernel, g)


# Kernel size, margin, batch size, height, width, input channels, output channels.
CONVOLUTIONS = [
    (5, 2, 7, 28, 28, 1, 16),
    (5, 2, 50, 14, 14, 16, 32),
    (3, 0, 64, 12, 12, 8, 32),
    (3, 1, 1, 14, 14, 8, 32),
    (5, 0, 3, 6, 10, 3, 5),
    (1, 0, 4, 9, 5, 2, 3),
    (7, 3, 2, 4, 4, 4, 1),
    (3, 1, 33, 12, 8, 1, 1),
]


@pytest.mark.parametrize(("size", "margin", "batch", "height", "width", "inputs", "outputs"), CONVOLUTIONS)
def test_conv_and_both_its_gradients_are_exactly_those_of_the_convolution_of_xla(
    size, margin, batch, height, width, inputs, outputs
):
    less = size - 1 - 2 * margin
    arguments = tuple(
        whole_numbers(
            (batch, height, width, inputs),
            (size, size, inputs, outputs),
            (batch, height - less, width - less, outputs),
        )
    )
    found = value_and_gradients(functools.partial(conv, margin=margin), *arguments)
    wanted = value_and_gradients(functools.partial(slide, margin=margin), *arguments)
    for part, one, other in zip(("y", "dx", "dk"), found, wanted, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=part)


# With 16 output channels and more, the last one is a product of matrices.
POOLED = [
    (pooled_conv, 1, 5),
    (pooled_conv, 6, 5),
    (pooled_conv_of_one_channel, 1, 5),
    (pooled_conv_of_one_channel, 1, 16),
]
# Kernel size, margin, batch size, height, width.
POOLED_SIZES = [
    (5, 2, 4, 28, 28),
    (5, 0, 4, 28, 28),
    (3, 1, 1, 8, 12),
    (3, 0, 2, 4, 6),
    (7, 3, 3, 6, 2),
    (1, 0, 2, 4, 4),
]


@pytest.mark.parametrize(("function", "inputs", "outputs"), POOLED)
@pytest.mark.parametrize(("size", "margin", "batch", "height", "width"), POOLED_SIZES)
def test_a_pooled_conv_is_the_max_pooling_of_a_convolution(
    function, inputs, outputs, size, margin, batch, height, width
):
    x, kernel = whole_numbers((batch, height, width, inputs), (size, size, inputs, outputs))
    found = jax.jit(function, static_argnums=2)(x, kernel, margin)
    np.testing.assert_array_equal(found, plain_pooled_conv(x, kernel, margin))


@pytest.mark.parametrize(("function", "inputs", "outputs"), POOLED)
@pytest.mark.parametrize(("size", "margin", "batch", "height", "width"), POOLED_SIZES)
def test_the_gradients_of_a_pooled_conv_are_those_of_the_max_pooling_of_a_convolution(
    function, inputs, outputs, size, margin, batch, height, width
):
    # Not whole numbers: of equal values in a square the two choose differently, and both gradients are right.
    less = size - 1 - 2 * margin
    shapes = (size, size, inputs, outputs), (batch, (height - less) // 2, (width - less) // 2, outputs)
    arguments = tuple(numbers((batch, height, width, inputs), *shapes))
    _, *found = value_and_gradients(functools.partial(function, margin=margin), *arguments)
    _, *wanted = value_and_gradients(functools.partial(plain_pooled_conv, margin=margin), *arguments)
    for one, other in zip(found, wanted, strict=True):
        # Sums of at most 784 products of about 1 in float32: an error of 1e-5 of the largest is a hundred roundings.
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def gradients_of_a_split_batch() -> list[bool]:
    """Tell, on four devices: the gradients are those of one; dx is split over the devices; dk is whole on each."""
    x, kernel, g = whole_numbers((8, 14, 14, 6), (5, 5, 6, 10), (8, 14, 14, 10))
    mesh = Mesh(np.asarray(jax.devices()), (devices.BATCH_AXIS,))
    split, everywhere = devices.split_over_batch(mesh), devices.replicated(mesh)
    placed = jax.device_put(x, split), jax.device_put(kernel, everywhere), jax.device_put(g, split)
    _, *wanted = value_and_gradients(functools.partial(conv, margin=2), x, kernel, g)
    _, dx, dk = value_and_gradients(functools.partial(conv, margin=2), *placed)
    equal = [np.array_equal(one, other) for one, other in zip((dx, dk), wanted, strict=True)]
    return [*equal, dx.sharding.shard_shape(dx.shape)[0] == 2, dk.sharding.is_fully_replicated]


def test_the_gradients_of_conv_under_a_batch_split_over_four_devices_are_those_on_one():
    four = "--xla_force_host_platform_device_count=4"
    assert in_new_process(gradients_of_a_split_batch, XLA_FLAGS=four, JAX_PLATFORMS="cpu") == [True] * 4


@pytest.mark.parametrize("exponent", [0.1, 2.0])
def test_power_of_relu_is_the_power_outside_the_chord_and_joins_it_without_a_gap(exponent):
    x = jnp.concatenate([jnp.linspace(-3, 0, 31), jnp.linspace(0.0101, 3, 31)])
    wanted = np.maximum(np.asarray(x, np.float64), 0) ** exponent
    np.testing.assert_allclose(power_of_relu(x, exponent=exponent), wanted, rtol=1e-6)
    below, above = power_of_relu(jnp.float32([0.01 * (1 - 1e-5), 0.01 * (1 + 1e-5)]), exponent=exponent)
    np.testing.assert_allclose(below, above, rtol=1e-4)


@pytest.mark.parametrize("exponent", [0.1, 2.0])
def test_power_of_relu_has_a_finite_slope_everywhere_and_none_below_zero(exponent):
    slope = jax.vmap(jax.grad(functools.partial(power_of_relu, exponent=exponent)))
    x = jnp.float32([-1e30, -1, -1e-30, 0, 1e-30, 1e-10, 1e-3, 0.01, 1, 1e3])
    assert np.all(np.isfinite(slope(x)))
    assert not np.any(slope(x)[:3])
    assert np.all(slope(x)[4:] > 0)


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_layers_of_the_originals_are_those_of_the_old_script(name):
    assert jax.tree.map(jnp.shape, abstract_params(name)) == {
        "conv1": {"kernel": (5, 5, 1, 16), "bias": (16,)},
        "conv2": {"kernel": (5, 5, 16, 32), "bias": (32,)},
        "dense1": {"kernel": (7 * 7 * 32, 1024), "bias": (1024,)},
        "logits": {"kernel": (1024, 10), "bias": (10,)},
    }


def test_the_layers_of_the_cnns_are_as_wide_as_they_are_said_to_be():
    assert jax.tree.map(jnp.shape, abstract_params("cnn")) == {
        "conv1": {"kernel": (5, 5, 1, 8), "bias": (8,)},  # 28 - 4 = 24 -> 12 pixels
        "conv2": {"kernel": (3, 3, 8, 32), "bias": (32,)},  # 12 - 2 = 10 -> 5 pixels
        "dense1": {"kernel": (5 * 5 * 32, 64), "bias": (64,)},
        "logits": {"kernel": (64, 10), "bias": (10,)},
    }
    assert jax.tree.map(jnp.shape, abstract_params("cnn-large")) == {
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


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_are_plain_dicts_of_float32(name):
    params = abstract_params(name)
    assert type(params) is dict
    assert all(type(layer) is dict for layer in params.values())
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def random_batch_stats(name: str):
    """Return running means and variances that change what is normalized by them."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(leaf.dtype), variables_of(name).get("batch_stats", {})
    )


@pytest.mark.parametrize("for_cpu", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_each_model_is_the_plain_network_that_its_fields_describe(name, for_cpu, digits):
    model, params = MODELS[name], params_of(name)
    images = digits.test_images[:16]
    batch_stats = random_batch_stats(name)

    def apply(layer, x):
        return layer.apply({"params": params[layer.name]}, x)

    def activate(x, name):
        if model.batch_norm:
            norm = {"params": params[f"{name}_norm"], "batch_stats": batch_stats[f"{name}_norm"]}
            x = nn.BatchNorm(use_running_average=True).apply(norm, x)
        return model.activation(x)

    x = (images.astype(np.float32) / 255 - model.pixel_mean) / model.pixel_std
    use_bias = not model.batch_norm
    for number, (features, size) in enumerate(zip(model.features, model.kernel_sizes, strict=True), start=1):
        layer = nn.Conv(features, (size, size), padding=model.padding, use_bias=use_bias, name=f"conv{number}")
        x = apply(layer, x)
        x = x if number in model.unpooled else nn.max_pool(x, (2, 2), (2, 2))
        x = activate(x, layer.name)
    x = activate(apply(nn.Dense(model.hidden, use_bias=use_bias, name="dense1"), x.reshape(len(x), -1)), "dense1")
    wanted = model.logits_activation(apply(nn.Dense(10, name="logits"), x))
    found = logits(name, params, images, for_cpu=for_cpu, batch_stats=batch_stats)
    assert found.shape == (16, 10)
    assert found.dtype == jnp.float32
    # Some layers of sums in float32, in another order.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@jax.jit
def all_finite(tree):
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


@functools.partial(jax.jit, static_argnames=("name", "for_cpu"))
def loss_and_gradients(name, params, images, labels, *, for_cpu=True):
    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(name, params, images, train=True, key=jax.random.key(1), for_cpu=for_cpu), labels
        ).mean()

    return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_and_its_gradients_are_finite_at_the_start(name, digits):
    loss, gradients = loss_and_gradients(name, params_of(name), digits.train_images[:16], digits.train_labels[:16])
    assert all_finite((loss, gradients))
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name", ["cnn", "cnn-large", "original-dropout"])
def test_the_form_for_cpus_learns_what_the_plain_form_learns(name, digits):
    params, differences = params_of(name), []
    # Not real images: in the flat parts of an image values are equal, and of equal ones either may be the largest. In a
    # draw of the cnn-large two may be so nearly equal that the order of a sum decides, another draw on each processor
    # (0 with AVX-512, 1 without). A form that is wrong is wrong in all draws.
    for draw in (1, 2, 3):
        images = np.random.default_rng(draw).uniform(size=(16, 28, 28, 1)).astype(np.float32)
        found, wanted = (
            jax.tree.leaves(loss_and_gradients(name, params, images, digits.train_labels[:16], for_cpu=for_cpu))
            for for_cpu in (True, False)
        )
        pairs = zip(found, wanted, strict=True)
        differences.append(max(np.abs(one - other).max() / np.abs(other).max() for one, other in pairs))
    assert sorted(differences)[1] < 1e-4, differences


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_and_its_gradients_are_finite_on_empty_images(name, digits):
    images = np.zeros_like(digits.train_images[:16])
    finite = all_finite(loss_and_gradients(name, params_of(name), images, digits.train_labels[:16]))
    assert finite


@pytest.mark.parametrize("name", MODELS)
def test_an_empty_image_has_finite_logits(name):
    assert np.all(np.isfinite(logits(name, params_of(name), EMPTY_IMAGE)))


def test_the_power_model_stays_finite_over_dozens_of_updates(digits):
    name, size = "original-power", 25
    optimizer = optax.adam(1e-4)

    @jax.jit
    def update(params, opt_state, images, labels):
        loss, gradients = loss_and_gradients(name, params, images, labels)
        updates, opt_state = optimizer.update(gradients, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    params = params_of(name)
    opt_state = optimizer.init(params)
    losses = []
    for first in range(0, 24 * size, size):
        images, labels = digits.train_images[first : first + size], digits.train_labels[first : first + size]
        params, opt_state, loss = update(params, opt_state, images, labels)
        losses.append(float(loss))
    assert np.all(np.isfinite(losses)), losses
    assert all_finite((params, opt_state))


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_follows_its_key_in_training(name, digits):
    outputs = [
        np.asarray(logits(name, params_of(name), digits.test_images[:8], train=True, key=jax.random.key(seed)))
        for seed in (1, 1, 2)
    ]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.array_equal(outputs[0], outputs[2])


def test_the_larger_cnn_normalizes_by_the_batch_in_training_and_by_the_running_numbers_at_evaluation(digits):
    model, variables = MODELS["cnn-large"], variables_of("cnn-large")

    def first_layer(images, *, train: bool):
        _, seen = model.apply(
            variables,
            images,
            train=train,
            rngs={"dropout": jax.random.key(0)},
            capture_intermediates=lambda module, _: module.name in ("conv1", "conv1_norm"),
            mutable=["intermediates", "batch_stats"],
        )
        outputs = [np.asarray(seen["intermediates"][name]["__call__"][0]) for name in ("conv1", "conv1_norm")]
        return *outputs, seen["batch_stats"]["conv1_norm"]

    pixels = (0, 1, 2)
    raw, normalized, after = first_layer(digits.train_images[:64], train=True)
    np.testing.assert_allclose(normalized.mean(pixels), 0, atol=1e-4)
    np.testing.assert_allclose(normalized.std(pixels), 1, atol=1e-3)
    np.testing.assert_allclose(after["mean"], 0.01 * raw.mean(pixels), atol=1e-5)
    np.testing.assert_allclose(after["var"], 0.99 + 0.01 * raw.var(pixels), rtol=1e-4)

    _, among_others, unchanged = first_layer(digits.train_images[:64], train=False)
    _, alone, _ = first_layer(digits.train_images[:1], train=False)
    np.testing.assert_allclose(among_others[:1], alone, atol=1e-5)
    np.testing.assert_array_equal(unchanged["mean"], variables["batch_stats"]["conv1_norm"]["mean"])


@pytest.mark.parametrize("name", MODELS)
def test_at_evaluation_no_key_changes_anything(name, digits):
    images = digits.test_images[:8]
    outputs = [logits(name, params_of(name), images, key=jax.random.key(seed)) for seed in (1, 2)]
    np.testing.assert_array_equal(outputs[0], outputs[1])


def test_the_models_that_drop_are_these():
    assert [name for name, model in MODELS.items() if model.dropout] == DROPPING


@pytest.mark.parametrize("name", MODELS)
def test_the_evaluation_of_an_image_does_not_hang_on_the_others_of_its_batch(name, digits):
    images = digits.test_images[:8]
    others = digits.test_images[8:16].copy()
    others[2] = images[2]
    one, two = (np.asarray(logits(name, params_of(name), batch)) for batch in (images, others))
    np.testing.assert_array_equal(one[2], two[2])
    assert not np.array_equal(one[3], two[3])
    alone = logits(name, params_of(name), images[2:3])[0]
    # Another batch size may be another kernel: float32 sums in another order.
    np.testing.assert_allclose(one[2], alone, rtol=0, atol=1e-5 * np.abs(alone).max())


def test_the_normalized_model_does_not_see_brightness_and_contrast_of_a_batch_in_training(digits):
    name = "original-normalized"
    images = digits.train_images[:16].astype(np.float32) / 255
    bright = images * 0.5 + 0.25
    seen = [np.asarray(logits(name, params_of(name), batch, train=True)) for batch in (images, bright)]
    # float32, with the roundings of mean and standard deviation
    np.testing.assert_allclose(seen[0], seen[1], rtol=0, atol=1e-4 * np.abs(seen[0]).max())
    evaluated = [np.asarray(logits(name, params_of(name), batch)) for batch in (images, bright)]
    assert np.abs(evaluated[0] - evaluated[1]).max() > 0.1 * np.abs(evaluated[0]).max()


@pytest.mark.parametrize("name", MODELS)
def test_floats_between_0_and_1_are_the_same_images_as_bytes(name, digits):
    images = digits.test_images[:8]
    floats = images.astype(np.float32) / np.float32(255)
    one, two = (np.asarray(logits(name, params_of(name), batch)) for batch in (images, floats))
    # XLA may divide by multiplying with the reciprocal, one rounding more.
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * np.abs(one).max())
