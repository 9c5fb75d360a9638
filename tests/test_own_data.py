"""Images of the user: four IDX files of another shape and with other classes train, resume, and can be used."""

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from arrays import to_idx
from runs import Run, act_at, signal_here

import mnist_jax
from mnist_jax import evaluate, export, predict, replay, train
from mnist_jax.checkpoint.integrity import CheckpointError
from mnist_jax.console import Terminal
from mnist_jax.demo import __main__ as demo
from mnist_jax.report import __main__ as report
from mnist_jax.training import compatibility, data
from mnist_jax.training.data import FILES, DataError

HEIGHT, WIDTH, CLASSES = 20, 25, 4
FLAGS = (
    *("--dataset", "idx", "--model", "cnn-tiny", "--steps", "12", "--batch-size", "32"),
    *("--learning-rate", "0.02", "--shift-px", "1"),
    *("--log-every-steps", "4", "--eval-every-steps", "6", "--checkpoint-every-steps", "4", "--keep", "9"),
)


def make_arrays() -> dict[str, np.ndarray]:
    """Return images whose bright quarter is their class."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 200), ("test", 50)):
        labels = rng.integers(0, CLASSES, count).astype(np.uint8)
        images = rng.integers(0, 100, (count, HEIGHT, WIDTH)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[10 * (label // 2) :, 12 * (label % 2) :][:10, :12] += 150
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    return arrays


ARRAYS = make_arrays()


def write(folder: Path, **changed: np.ndarray) -> Path:
    """Write the four files, two of them packed."""
    folder.mkdir(exist_ok=True)
    for part, array in {**ARRAYS, **changed}.items():
        name, content = FILES[part], to_idx(array)
        if part.startswith("train"):
            (folder / name).write_bytes(gzip.compress(content))
        else:
            (folder / name.removesuffix(".gz")).write_bytes(content)
    return folder


def start(workdir: Path, *args: str) -> int:
    return train.main(["--workdir", str(workdir), *args])


@pytest.fixture(scope="module")
def run(in_this_process, tmp_path_factory) -> Run:
    """A finished run. Read-only."""
    folder = tmp_path_factory.mktemp("own")
    write(folder / "files")
    assert start(folder / "run", *FLAGS, "--data-dir", str(folder / "files")) == 0
    return Run(folder / "run")


def digest(run: Run) -> str:
    return run.events("exit")[-1]["state_sha256"]


def test_own_images_are_learned_and_resume_exactly(run: Run, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        act_at(patch, 2, signal_here)
        assert start(tmp_path, *FLAGS, "--data-dir", str(run.workdir.parent / "files")) == 0
    assert 2 <= Run(tmp_path).events("exit")[-1]["step"] < 12
    assert start(tmp_path) == 0  # config.json knows the folder.
    assert Run(tmp_path).events("resume")[-1]["exact"]
    assert (digest(Run(tmp_path)), Run(tmp_path).metrics()) == (digest(run), run.metrics())
    assert json.loads(run.metrics().splitlines()[-1])["accuracy"] > 0.8


def test_own_images_evaluate_replay_report_and_export(run: Run, tmp_path: Path, capsys) -> None:
    assert evaluate.main([str(run.workdir), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["images"], result["class_names"]) == (50, ["0", "1", "2", "3"])
    assert np.array(result["confusion"]).sum(axis=1).tolist() == np.bincount(ARRAYS["test_labels"]).tolist()
    assert replay.main([str(run.workdir), "--from", "8"]) == 0
    assert report.main([str(run.workdir), "--out", str(tmp_path / "report")]) == 0
    assert (tmp_path / "report" / "confusion.png").exists()
    # The entropy of labels of four classes that are smoothed by 0.1, as those of the preset fast are.
    assert "below 0.349 nats" in " ".join((tmp_path / "report" / "report.html").read_text().split())
    assert export.main([str(run.workdir), str(tmp_path / "weights.safetensors")]) == 0
    assert f"[N, {HEIGHT}, {WIDTH}, 1]".encode() in (tmp_path / "weights.safetensors").read_bytes()


def test_predict_refuses_pictures_and_load_takes_arrays(run: Run, tmp_path: Path, capsys) -> None:
    assert predict.main([str(run.workdir), str(tmp_path / "picture.png")]) == 2
    assert f"{HEIGHT}×{WIDTH}" in capsys.readouterr().err
    model = mnist_jax.load(run.workdir)
    probabilities = model.predict(ARRAYS["test_images"][0][..., np.newaxis])
    assert (probabilities.shape, model.class_names) == ((CLASSES,), ("0", "1", "2", "3"))


def test_labels_of_qmnist_are_the_first_column(tmp_path: Path) -> None:
    extended = np.arange(8) * 1000 + ARRAYS["train_labels"][:, np.newaxis].astype(int)
    found = data.load("idx", write(tmp_path, train_labels=extended.astype(">i4")), notify=pytest.fail)
    assert found.train_labels.tolist() == ARRAYS["train_labels"].tolist()
    assert found.fingerprint == data.load("idx", write(tmp_path / "plain"), notify=pytest.fail).fingerprint


IMAGES, LABELS = ARRAYS["test_images"], ARRAYS["test_labels"]
WRONG = {
    "another size": ({"test_images": IMAGES[:, :, :-1]}, r"t10k-images\S* holds \[50, 20, 24\] .*\[N, 20, 25\]"),
    "labels as images": ({"train_images": LABELS}, r"train-images\S* holds \[50\] uint8, expected \[N, H, W\]"),
    "no images": ({"test_images": IMAGES[:0]}, r"t10k-images\S* holds \[0, 20, 25\]"),
    "too large": ({"train_images": np.zeros((200, 1, 1025), np.uint8)}, r"\[200, 1, 1025\].* 1024"),
    "floats": ({"train_images": IMAGES.astype(">i4")}, r"holds \[50, 20, 25\] int32, expected .*uint8"),
    "other labels": ({"test_labels": LABELS[1:]}, r"t10k-labels\S* holds \[49\] uint8, expected \[50\]"),
    "a new class": ({"test_labels": LABELS + np.uint8(1)}, r"t10k-labels.* labels below 4"),
    "one class": ({"train_labels": np.zeros(200, np.uint8)}, r"train-labels.* 2 classes"),
    "negative": ({"train_labels": np.full(200, -1, ">i4")}, r"train-labels.* from 0 to 255"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_named_with_both_shapes(kind: str, tmp_path: Path) -> None:
    changed, message = WRONG[kind]
    with pytest.raises(DataError, match=message):
        data.load("idx", write(tmp_path, **changed), notify=pytest.fail)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (write(tmp_path) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte.gz cannot be read \(No such file"):
        data.load("idx", tmp_path, notify=pytest.fail)
    with pytest.raises(DataError, match="--data-dir"):
        data.load("idx", None, notify=pytest.fail)


def test_images_that_are_too_small_for_the_model_are_refused(tmp_path: Path, in_this_process, capsys) -> None:
    small = {f"{split}_images": ARRAYS[f"{split}_images"][:, :11] for split in ("train", "test")}
    write(tmp_path / "files", **small)
    assert start(tmp_path / "run", *FLAGS, "--model", "cnn", "--data-dir", str(tmp_path / "files")) == 2
    assert re.search(r"model=cnn needs images of 12 pixels .* 11×25; use another --model", capsys.readouterr().err)
    assert not (tmp_path / "run" / "config.json").exists()


def test_demo_does_not_show_a_run_that_is_started_over_with_images_of_another_shape(
    run: Run, small_copy: Path, tmp_path: Path, capsys
) -> None:
    reloader = demo.ModelReloader(small_copy, "latest", Terminal())
    first = reloader.model
    small_copy.rename(tmp_path / "old")
    shutil.copytree(run.workdir, small_copy)
    reloader.reload()
    assert reloader.model is first
    assert "20×25 pixels" in capsys.readouterr().err


def test_a_wrong_data_dir_is_forgotten(run: Run, tmp_path: Path, in_this_process, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = (*FLAGS, "--data-dir")
    assert train.main([*args, "filez"]) == 2
    assert "data_dir=filez is not a folder" in capsys.readouterr().err
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "empty").mkdir()
    assert train.main([*args, "empty"]) == 2
    assert not (tmp_path / "runs" / "idx" / "config.json").exists()
    assert train.main([*FLAGS]) == 2
    assert "--data-dir" in capsys.readouterr().err
    assert train.main([*args, str(run.workdir.parent / "files")]) == 0
    assert digest(Run(tmp_path / "runs" / "idx")) == digest(run)


def test_forged_shapes_in_metadata_are_refused(run: Run) -> None:
    from mnist_jax.checkpoint.checkpoint import list_checkpoints

    metadata = list_checkpoints(run.workdir / "checkpoints")[-1].metadata()
    assert compatibility.data_of(metadata, 12)[1:] == (200, 50, HEIGHT, WIDTH, CLASSES)
    for name in ("height", "width", "classes"):
        for value in (0, -1, 2000, 2**40, None, "20", 1.5):
            with pytest.raises(CheckpointError):
                compatibility.data_of({**metadata, "data": {**metadata["data"], name: value}}, 12)


def test_changed_files_are_refused(run: Run, tmp_path: Path, capsys) -> None:
    shutil.copytree(run.workdir, tmp_path / "run")
    write(tmp_path / "files", train_labels=ARRAYS["train_labels"][::-1].copy())
    assert start(tmp_path / "run", "--data-dir", str(tmp_path / "files"), "--keep", "8") == 2
    assert "the dataset differs" in capsys.readouterr().err
    assert evaluate.main([str(run.workdir), "--data-dir", str(tmp_path / "files")]) == 2
    assert "the dataset differs" in capsys.readouterr().err
