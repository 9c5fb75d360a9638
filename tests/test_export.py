import json
import os
import signal
import subprocess
import sys
from functools import partial

import jax
import jax.export
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from mnist_jax import export
from mnist_jax.inference import classifier
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import data
from mnist_jax.training.model import MODELS

pytestmark = pytest.mark.usefixtures("in_this_process")


def read(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the arrays and the metadata of a safetensors file, read by numpy and the format's description alone."""
    size = int.from_bytes(content[:8], "little")
    header, numbers = json.loads(content[8 : 8 + size]), content[8 + size :]
    metadata = header.pop("__metadata__")
    arrays = {}
    for name, row in header.items():
        assert row["dtype"] == "F32"
        first, end = row["data_offsets"]
        arrays[name] = np.frombuffer(numbers[first:end], "<f4").reshape(row["shape"])
    return arrays, metadata


def activate(x: np.ndarray, activation: dict[str, float | str]) -> np.ndarray:
    relu = np.maximum(x, 0)
    match activation:
        case {"name": "identity"}:
            return x
        case {"name": "relu"}:
            return relu
        case {"name": "power_of_relu", "exponent": exponent, "chord": chord}:
            return np.where(x > chord, np.maximum(relu, chord) ** exponent, relu * chord ** (exponent - 1))
    raise AssertionError(activation)


def logits_of(content: bytes, images: np.ndarray) -> np.ndarray:
    """Compute what the file says is to be computed, in numpy."""
    arrays, metadata = read(content)
    how = json.loads(metadata["architecture"])

    def finish(x: np.ndarray, layer: str) -> np.ndarray:
        x = x + arrays.get(f"params.{layer}.bias", 0)
        if f"batch_stats.{layer}_norm.mean" in arrays:
            mean, var = (arrays[f"batch_stats.{layer}_norm.{name}"] for name in ("mean", "var"))
            scale, bias = (arrays[f"params.{layer}_norm.{name}"] for name in ("scale", "bias"))
            x = scale * (x - mean) / np.sqrt(var + how["epsilon"]) + bias
        return activate(x, how["activation"])

    x = (images / 255.0 - how["pixel_mean"]) / how["pixel_std"]
    for number in range(1, 9):
        if (kernel := arrays.get(f"params.conv{number}.kernel")) is None:
            break
        if how["padding"] == "SAME":
            margin = len(kernel) // 2
            x = np.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
        windows = sliding_window_view(x, kernel.shape[:2], axis=(1, 2))
        x = np.einsum("nhwcij,ijco->nhwo", windows, kernel, optimize=True)
        if number not in how["unpooled"]:
            n, height, width, channels = x.shape
            x = x.reshape(n, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
        x = finish(x, f"conv{number}")
    x = finish(x.reshape(len(x), -1) @ arrays["params.dense1.kernel"], "dense1")
    x = x @ arrays["params.logits.kernel"] + arrays["params.logits.bias"]
    return activate(x, how["logits_activation"])


@pytest.mark.parametrize("name", ["cnn", "cnn-large", "original-power"])  # one of each kind
def test_numpy_and_the_program_compute_the_logits_from_a_file(name):
    model, images = MODELS[name].clone(for_cpu=True), data.load("digits", notify=print).test_images[:12]
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    rng = np.random.default_rng(0)

    def random_leaf(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if len(shape.shape) == 1:  # No bias is 0, no variance is 1, so that each array matters.
            return rng.uniform(0.1, 0.5, shape.shape).astype(np.float32)
        return rng.normal(0, np.prod(shape.shape[:-1]) ** -0.5, shape.shape).astype(np.float32)

    variables = {"batch_stats": {}, **jax.tree.map(random_leaf, shapes)}
    expected = np.asarray(jax.jit(partial(model.apply, train=False))(variables, images))
    found = logits_of(export.pack(variables, name, {}), images)
    assert np.ptp(expected, axis=0).max() > 0.1
    # float64 here, and sums of thousands of float32 there.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    program = jax.export.deserialize(bytearray(export.serialize(variables, name)))
    np.testing.assert_allclose(program.call(images), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_file_holds_the_classifier_of_the_run(small_run, tmp_path, capfd):
    out = tmp_path / "weights.safetensors"
    assert export.main([str(small_run.workdir), str(out)]) == 0
    assert capfd.readouterr().err == ""
    dataset = data.load("digits", notify=print)
    predictions = logits_of(out.read_bytes(), dataset.test_images).argmax(axis=1)
    [end] = small_run.events("exit")
    assert np.mean(predictions == dataset.test_labels) == end["test_accuracy"]
    _, metadata = read(out.read_bytes())
    assert metadata["state_sha256"] == end["state_sha256"]
    assert metadata["test_accuracy"] == str(end["test_accuracy"])
    assert (metadata["step"], metadata["model"], metadata["dataset"]) == ("40", "cnn-tiny", "digits")
    assert json.loads(metadata["class_names"]) == list("0123456789")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


# A process that has JAX, and cannot import this package.
CALLER = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] != "mnist_jax", name
sys.meta_path.insert(0, Refuse())
import numpy as np
from jax import export
program, images, logits = sys.argv[1:]
exported = export.deserialize(bytearray(open(program, "rb").read()))
assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
images = np.load(images)
np.savez(logits, *(exported.call(images[:size]) for size in (1, 7, len(images))))
assert "mnist_jax" not in sys.modules
"""
# XLA compiles another program for each batch size, and the evaluation has compiler options of its own.
LOGITS_TOLERANCE = 1e-5


def test_program_computes_the_logits_of_the_evaluation_for_any_batch_size(small_run, tmp_path):
    dataset = data.load("digits", notify=print)
    with StopSignal() as stop:
        expected = classifier.load(small_run.workdir).evaluate(dataset, stop)
    program, images, logits = (tmp_path / name for name in ("program.stablehlo", "images.npy", "logits.npz"))
    assert export.main([str(small_run.workdir), str(program)]) == 0
    np.save(images, dataset.test_images)
    caller = [sys.executable, "-I", "-c", CALLER, program, images, logits]
    ended = subprocess.run(caller, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = [*np.load(logits).values()]
    assert [values.shape for values in found] == [(1, 10), (7, 10), (359, 10)]
    for values in found:
        np.testing.assert_allclose(values, expected.logits[: len(values)], rtol=0, atol=LOGITS_TOLERANCE)
    assert np.mean(found[-1].argmax(axis=1) == dataset.test_labels) == expected.accuracy


@pytest.mark.parametrize("name", ["w.pt", "w", "w.safetensors.gz", "w.SAFETENSORS"])
def test_unknown_suffix_is_refused(small_run, tmp_path, capfd, name):
    assert export.main([str(small_run.workdir), str(tmp_path / name)]) == 2
    err = capfd.readouterr().err
    assert all(word in err for word in (name, ".safetensors", ".stablehlo"))
    assert not list(tmp_path.iterdir())


def test_existing_file_stays(small_run, tmp_path, capfd):
    out = tmp_path / "weights.safetensors"
    for existing in (out, tmp_path / "weights.safetensors.partial"):
        existing.write_text("precious")
        assert export.main([str(small_run.workdir), str(out)]) == 2
        assert str(existing) in capfd.readouterr().err
        assert existing.read_text() == "precious"
        existing.unlink()
    assert not out.exists()


def test_signal_leaves_no_file(small_run, tmp_path, monkeypatch):
    pack = export.pack

    def signal_and_pack(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return pack(*arguments)

    monkeypatch.setattr(export, "pack", signal_and_pack)
    assert export.main([str(small_run.workdir), str(tmp_path / "weights.safetensors")]) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["weights.safetensors", "no/weights.safetensors"])
def test_missing_run_or_folder_is_usage_error(out, tmp_path, capfd):
    assert export.main([str(tmp_path / "nowhere"), str(tmp_path / out)]) == 2
    err = capfd.readouterr().err
    assert ("nowhere" in err) == (out == "weights.safetensors")
    assert not list(tmp_path.iterdir())
