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


def test_unreadable_images_do_not_stop_the_others(small_run, images, tmp_path):
    (tmp_path / "text.png").write_text("seven")
    (tmp_path / "huge.png").write_bytes(bytes(2**26 + 1))
    bad = [tmp_path / "text.png", tmp_path / "nothing.png", tmp_path / "huge.png", tmp_path]
    command = [sys.executable, "-m", "mnist_jax.predict", small_run.workdir, images[0], *bad, images[1], "--json"]
    ended = subprocess.run(
        [*map(str, command)], env={**os.environ, **small_run.environment}, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1
    errors = {row["image"]: row["error"] for row in json.loads(ended.stdout) if row["error"]}
    assert list(errors) == [str(path) for path in bad]
    assert [line.partition(": ")[2] for line in ended.stderr.splitlines()] == [
        f"{path}: {error}" for path, error in errors.items()
    ]


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
