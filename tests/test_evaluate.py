import json
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from runs import snapshot

from mnist_jax import evaluate
from mnist_jax.inference import classifier

pytestmark = pytest.mark.usefixtures("in_this_process")


def told(*args: object, capfd) -> tuple[int, str, str]:
    return evaluate.main([*map(str, args)]), *capfd.readouterr()


@pytest.fixture(scope="module")
def result(trained_run) -> dict[str, Any]:
    """What the command says of a finished run, as JSON, in a process of its own."""
    before = snapshot(trained_run.workdir)
    command = [sys.executable, "-m", "mnist_jax.evaluate", str(trained_run.workdir), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert snapshot(trained_run.workdir) == before
    return json.loads(ended.stdout)


def test_the_numbers_are_the_runs_own(trained_run, result):
    *_, last = (json.loads(line) for line in trained_run.metrics().splitlines())
    assert (last["split"], last["step"]) == ("test", 702)
    assert (result["step"], result["loss"], result["accuracy"]) == (702, last["loss"], last["accuracy"])
    assert result["recorded_accuracy"] == last["accuracy"]


def test_the_confusions_are_those_of_all_ten_thousand_images(result):
    confusion = np.array(result["confusion"])
    assert (confusion.shape, confusion.sum(), result["images"]) == ((10, 10), 10_000, 10_000)
    assert np.trace(confusion) / 10_000 == result["accuracy"]
    assert confusion.sum(axis=1).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    np.testing.assert_array_equal(result["class_accuracy"], np.diag(confusion) / confusion.sum(axis=1))


def test_the_table_fits_a_terminal_and_says_the_same(trained_run, result, capfd):
    code, out, err = told(trained_run.workdir, "--step", "best", capfd=capfd)
    assert (code, err) == (0, "")
    first, second, blank, _, head, *rows = out.splitlines()
    assert first == f"step 702 of the run in {trained_run.workdir}, on the test images of mnist"
    wrong = 10_000 - round(10_000 * result["accuracy"])
    loss, accuracy = result["loss"], result["accuracy"]
    assert (second, blank) == (f"test loss {loss:.4f}, test accuracy {accuracy:.4f}: {wrong} of 10,000 wrong", "")
    assert head.split() == ["label", "accuracy", *"0123456789"]
    assert [row.split()[0] for row in rows] == list("0123456789")
    counts = [[0 if cell == "·" else int(cell) for cell in row.split()[2:]] for row in rows]
    assert counts == result["confusion"]
    assert max(map(len, (second, head, *rows))) <= 79


def test_names_of_any_length_keep_the_table_in_its_columns():
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    confusion = (1000 * np.eye(10, dtype=int)).tolist()
    confusion[3], shares = [0] * 10, [1.0] * 3 + [None] + [1.0] * 6
    of = ("run", 5, "fashion_mnist", 9000, 0.1, 1.0, None)
    head, *rows = evaluate.describe(evaluate.Result(*of, names, shares, confusion)).splitlines()[-11:]
    assert {len(row) for row in (head, *rows)} == {len(head)}
    assert len(head) <= 79
    assert rows[3].split() == ["Dress", *"··········"]


@pytest.mark.parametrize("metrics", [None, '{"step": 702, "split": "test", "accuracy": NaN}\n'])
def test_without_a_usable_record_there_is_an_evaluation_all_the_same(trained_run, metrics, tmp_path, capfd):
    shutil.copytree(trained_run.workdir, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    if metrics is not None:
        (tmp_path / "run" / "metrics.jsonl").write_text(metrics)
    code, out, err = told(tmp_path / "run", "--json", capfd=capfd)
    assert (code, err, json.loads(out)["recorded_accuracy"]) == (0, "", None)


def test_a_record_of_other_numbers_is_told_of():
    result = evaluate.Result("run", 5, "mnist", 4, 0.1, 0.75, 0.5, list("0123456789"), [None] * 10, [[0] * 10] * 10)
    assert "the run itself recorded a test accuracy of 0.5000 here, on other devices?" in evaluate.describe(result)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=50))
def test_a_confusion_is_counted_where_its_label_and_its_answer_meet(pairs):
    labels, answers = np.array(pairs, np.int32).reshape(-1, 2).T
    matrix = classifier.confusion_matrix(labels, answers)
    assert matrix.tolist() == [[pairs.count((label, answer)) for answer in range(10)] for label in range(10)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--step", "468000"), "has no checkpoint of step 468000; there are: 468, 702"),
        (("--data-dir", "/nowhere"), "/nowhere/train-images-idx3-ubyte.gz cannot be read"),
    ],
)
def test_what_cannot_be_evaluated_is_said_in_a_line(trained_run, args, message, capfd):
    code, out, err = told(trained_run.workdir, *args, capfd=capfd)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
