import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image
from runs import snapshot

from mnist_jax import predict
from mnist_jax.inference.classifier import MIN_SURE
from mnist_jax.training import data

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    """Built-in digits as photos: large, dark on light."""
    folder, dataset = tmp_path_factory.mktemp("images"), data.load("digits", notify=print)
    paths = [folder / f"{number}-is-{dataset.test_labels[number]}.png" for number in range(20)]
    for path, image in zip(paths, dataset.test_images[:20], strict=True):
        Image.fromarray(255 - image[..., 0]).resize((160, 160), Image.Resampling.BICUBIC).save(path)
    return paths


def run(*args: object, capfd) -> tuple[int, str, str]:
    return predict.main([*map(str, args)]), *capfd.readouterr()


def test_predictions_are_mostly_correct(small_run, images, capfd):
    before = snapshot(small_run.workdir)
    code, out, err = run(small_run.workdir, *images, "--json", capfd=capfd)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert [prediction["image"] for prediction in found] == [str(path) for path in images]
    assert sum(path.stem.endswith(row["answer"]) for path, row in zip(images, found, strict=True)) >= 17
    for row in found:
        probabilities = row["probabilities"]
        assert list(probabilities) == list("0123456789")
        assert sum(probabilities.values()) == pytest.approx(1, rel=1e-5)
        first, second, *_ = sorted(probabilities.values(), reverse=True)
        assert (row["probability"], probabilities[row["answer"]]) == (first, first)
        assert (row["runner_up_probability"], probabilities[row["runner_up"]]) == (second, second)

    code, text, _ = run(small_run.workdir, *images, capfd=capfd)
    answers = [line.removeprefix(f"{path}: ")[0] for path, line in zip(images, text.splitlines(), strict=True)]
    assert (code, answers) == (0, [row["answer"] for row in found])
    assert snapshot(small_run.workdir) == before


def test_unreadable_images_do_not_stop_the_others(small_run, images, tmp_path, capfd):
    (tmp_path / "text.png").write_text("seven")
    (tmp_path / "huge.png").write_bytes(bytes(2**26 + 1))
    bad = [tmp_path / "text.png", tmp_path / "nothing.png", tmp_path / "huge.png", tmp_path]
    code, out, err = run(small_run.workdir, images[0], *bad, images[1], "--json", capfd=capfd)
    assert code == 1
    errors = {row["image"]: row["error"] for row in json.loads(out) if row["error"]}
    assert list(errors) == [str(path) for path in bad]
    assert [line.partition(": ")[2] for line in err.splitlines()] == [
        f"{path}: {error}" for path, error in errors.items()
    ]


def test_findings_are_fields(small_run, images, tmp_path, capfd):
    Image.new("L", (50, 50), 255).save(tmp_path / "blank.png")
    two = Image.new("L", (320, 160), 255)
    for left in (0, 160):
        two.paste(Image.open(images[0]), (left, 0))
    two.save(tmp_path / "two.png")
    (tmp_path / "text.png").write_text("seven")
    names = ("blank.png", "two.png", "text.png")
    code, out, _ = run(small_run.workdir, images[0], *(tmp_path / name for name in names), "--json", capfd=capfd)
    good, *bad = json.loads(out)
    assert code == 1
    assert (good["problem"], good["places"], good["is_sure"]) == (None, None, good["probability"] >= MIN_SURE)
    assert [row["problem"] for row in bad] == ["blank", "several digits", "unreadable"]
    assert [row["is_sure"] for row in bad] == 3 * [None]
    left, right = bad[1]["places"]
    assert 0 < left["left"] < left["right"] < 0.5 < right["left"] < right["right"] < 1


def test_unsure_answers_are_marked(small_run, images, capfd, monkeypatch):
    for limit, is_marked in ((0.0, False), (1.1, True)):
        monkeypatch.setattr("mnist_jax.inference.classifier.MIN_SURE", limit)
        assert ("not sure" in run(small_run.workdir, images[0], capfd=capfd)[1]) == is_marked


def test_image_from_standard_input(small_run, images, capfd, monkeypatch):
    with images[0].open("rb") as file:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(file))
        code, out, _ = run(small_run.workdir, "-", images[0], "--json", capfd=capfd)
    first, second = json.loads(out)
    assert (code, first["image"], first["probabilities"]) == (0, "-", second["probabilities"])


def test_signal_ends_wait_for_a_pipe(small_run, tmp_path, capfd):
    os.mkfifo(tmp_path / "pipe.png")
    threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    code, out, err = run(small_run.workdir, tmp_path / "pipe.png", capfd=capfd)
    assert (code, out) == (143, "")
    assert "SIGTERM" in err
    (tmp_path / "pipe.png").open("wb").close()  # So that the waiting thread ends.


def test_compiled_programs_are_kept_for_the_next_start(small_run, images, tmp_path):
    """A start removes cached programs without a digest, and would compile them again."""
    command = [sys.executable, "-m", "mnist_jax.predict", str(small_run.workdir), str(images[0])]
    environment = {**os.environ, **small_run.environment, "XDG_CACHE_HOME": str(tmp_path)}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    cache = tmp_path / "mnist_jax"
    programs = {path.name for path in cache.glob("*-cache")}
    assert programs
    assert programs == {path.name.removesuffix(".sha256") for path in cache.glob("*.sha256")}


def test_missing_images_or_run_are_usage_errors(small_run, images, tmp_path, capfd):
    assert run(small_run.workdir, capfd=capfd)[0] == 2
    code, _, err = run(tmp_path, images[0], capfd=capfd)
    assert code == 2
    assert str(tmp_path) in err
