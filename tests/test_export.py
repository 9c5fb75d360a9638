import json
import os
import signal
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from mnist_jax import export
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


@pytest.mark.parametrize("name", ["cnn", "cnn-large", "original-power"])  # of each kind one
def test_numpy_alone_gets_the_logits_of_each_model_from_its_file(name):
    model, images = MODELS[name].clone(for_cpu=True), data.load("digits", notify=print).test_images[:12]
    initialize, apply = (jax.jit(partial(function, train=False)) for function in (model.init, model.apply))
    variables = {"batch_stats": {}, **initialize(jax.random.key(0), images)}
    # No bias is zero, no running mean 0 and no variance 1, so that each array has its part in the result.
    variables = jax.tree.map(
        lambda leaf: leaf + 0.1 * np.abs(np.sin(np.arange(leaf.size))).reshape(leaf.shape), variables
    )
    wanted = np.asarray(apply(variables, images))
    found = logits_of(export.pack(variables, name, {}), images)
    assert np.ptp(wanted, axis=0).max() > 0.1
    # float64 here, and sums of thousands of float32 there.
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def run(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mnist_jax.export", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_file_holds_the_classifier_of_the_run_and_says_where_it_comes_from(trained_run, mnist_dir, tmp_path):
    ended = run(trained_run.workdir, tmp_path / "weights.safetensors")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "the weights of step 702" in ended.stdout
    content = (tmp_path / "weights.safetensors").read_bytes()
    dataset = data.load("mnist", mnist_dir, notify=print)
    answers = logits_of(content, dataset.test_images[:500]).argmax(axis=1)
    assert np.mean(answers == dataset.test_labels[:500]) > 0.98
    arrays, metadata = read(content)
    assert {name: array.shape for name, array in arrays.items()} == {
        "params.conv1.bias": (8,),
        "params.conv1.kernel": (5, 5, 1, 8),
        "params.conv2.bias": (32,),
        "params.conv2.kernel": (3, 3, 8, 32),
        "params.dense1.bias": (64,),
        "params.dense1.kernel": (800, 64),
        "params.logits.bias": (10,),
        "params.logits.kernel": (64, 10),
    }
    [end] = trained_run.events("exit")
    assert metadata["state_sha256"] == end["state_sha256"]
    assert metadata["test_accuracy"] == str(end["test_accuracy"])
    assert (metadata["step"], metadata["model"], metadata["dataset"]) == ("702", "cnn", "mnist")
    assert json.loads(metadata["class_names"]) == list("0123456789")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_file_that_is_there_stays_as_it_is(trained_run, tmp_path, capfd):
    out = tmp_path / "weights.safetensors"
    out.write_text("precious")
    assert export.main([str(trained_run.workdir), str(out)]) == 2
    assert "is there already; name another file" in capfd.readouterr().err
    assert out.read_text() == "precious"
    out.rename(tmp_path / "weights.safetensors.partial")
    assert export.main([str(trained_run.workdir), str(out)]) == 2
    assert (tmp_path / "weights.safetensors.partial").read_text() == "precious"
    assert not out.exists()


def test_a_signal_leaves_no_file(trained_run, tmp_path, monkeypatch, capfd):
    pack = export.pack

    def signal_and_pack(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return pack(*arguments)

    monkeypatch.setattr(export, "pack", signal_and_pack)
    assert export.main([str(trained_run.workdir), str(tmp_path / "weights.safetensors")]) == 128 + signal.SIGTERM
    assert capfd.readouterr() == ("", "SIGTERM: stopped before the end\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("workdir", "out", "message"),
    [
        ("nowhere", "weights.safetensors", "there is no run in"),
        ("nowhere", "no/weights.safetensors", "no is no directory; make it"),
    ],
)
def test_what_cannot_be_exported_is_said_in_a_line(workdir, out, message, tmp_path, capfd):
    assert export.main([str(tmp_path / workdir), str(tmp_path / out)]) == 2
    written = capfd.readouterr()
    assert message in written.err
    assert written.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
