import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import snapshot

from mnist_jax import predict, train
from mnist_jax.config import Config
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import data

pytestmark = pytest.mark.usefixtures("in_this_process")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run on the built-in digits."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with StopSignal() as stop:
        assert train.run(Config(dataset="digits", steps=66, batch_size=64), workdir, stop) == 0
    return workdir


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Built-in digits as a person might have them: large, dark on light."""
    folder, dataset = tmp_path_factory.mktemp("pictures"), data.load("digits", notify=print)
    paths = [folder / f"{number}-is-{dataset.test_labels[number]}.png" for number in range(20)]
    for path, image in zip(paths, dataset.test_images[:20], strict=True):
        Image.fromarray(255 - image[..., 0]).resize((160, 160), Image.Resampling.BICUBIC).save(path)
    return paths


def told(*args: object, capfd) -> tuple[int, str, str]:
    return predict.main([*map(str, args)]), *capfd.readouterr()


def test_most_pictures_are_taken_for_what_they_are(finished, pictures, capfd):
    before = snapshot(finished)
    code, out, err = told(finished, *pictures, capfd=capfd)
    assert (code, err) == (0, "")
    assert snapshot(finished) == before
    lines = out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(path) for path in pictures]
    answers = [line.partition(": ")[2].split()[0] for line in lines]
    assert sum(path.stem.endswith(answer) for path, answer in zip(pictures, answers, strict=True)) >= 17


def test_for_programs_there_are_all_ten_probabilities(finished, pictures, capfd):
    code, out, _ = told(finished, *pictures[:3], "--json", capfd=capfd)
    assert code == 0
    for path, found in zip(pictures, json.loads(out), strict=False):
        assert found["image"] == str(path)
        assert found["error"] is None
        assert list(found["probabilities"]) == list("0123456789")
        first, second, *_ = sorted(found["probabilities"].values(), reverse=True)
        assert (found["probability"], found["runner_up_probability"]) == (first, second)
        assert found["probabilities"][found["answer"]] == first
        assert found["probabilities"][found["runner_up"]] == second
        np.testing.assert_allclose(sum(found["probabilities"].values()), 1, rtol=1e-5)


def test_what_cannot_be_read_is_an_error_each_and_the_others_are_answered(finished, pictures, tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("seven")
    (tmp_path / "huge.png").write_bytes(bytes(2**26 + 1))
    Image.new("RGB", (50, 50), "white").save(tmp_path / "blank.jpg")
    bad = [tmp_path / name for name in ("empty.png", "text.png", "nothing.png", "blank.jpg", "huge.png")]
    command = [sys.executable, "-m", "mnist_jax.predict", finished, pictures[0], *bad, tmp_path, pictures[1]]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1
    assert [line.partition(": ")[0] for line in ended.stdout.splitlines()] == [str(path) for path in pictures[:2]]
    reasons = {
        "empty.png": "it is empty",
        "text.png": "it is neither PNG nor JPEG",
        "nothing.png": "it cannot be read (No such file or directory)",
        "blank.jpg": "nothing is drawn on it: all of it has nearly the same colour",
        "huge.png": "it has more than 67 MB",
    }
    wanted = [f"error: {tmp_path / name}: {reason}" for name, reason in reasons.items()]
    assert ended.stderr.splitlines() == [*wanted, f"error: {tmp_path}: it cannot be read (Is a directory)"]


def test_a_pipe_to_which_nobody_writes_is_left_at_a_signal(finished, tmp_path, capfd):
    os.mkfifo(tmp_path / "pipe.png")
    threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    assert told(finished, tmp_path / "pipe.png", capfd=capfd) == (143, "", "SIGTERM: stopped before the end\n")
    (tmp_path / "pipe.png").open("wb").close()  # So that the thread that waits there ends.


def test_an_error_is_told_to_programs_as_well(finished, tmp_path, capfd):
    (tmp_path / "empty.png").touch()
    code, out, err = told(finished, tmp_path / "empty.png", "--json", capfd=capfd)
    [found] = json.loads(out)
    assert (code, found["error"], found["answer"]) == (1, "it is empty", None)
    assert "it is empty" in err


def test_without_a_picture_or_a_run_there_is_nothing_to_do(finished, pictures, tmp_path, capfd):
    assert told(finished, capfd=capfd)[0] == 2
    code, _, err = told(tmp_path, pictures[0], capfd=capfd)
    assert (code, err) == (2, f"error: there is no run in {tmp_path}\n")
