import json

import numpy as np
import pytest
from runs import snapshot
from tampering import change_metadata

from mnist_jax import evaluate
from mnist_jax.inference import classifier

pytestmark = pytest.mark.usefixtures("in_this_process")


def run(*args: object, capfd) -> tuple[int, str, str]:
    return evaluate.main([*map(str, args)]), *capfd.readouterr()


def test_evaluate_agrees_with_the_run(small_run, capfd):
    before = snapshot(small_run.workdir)
    code, out, err = run(small_run.workdir, "--json", capfd=capfd)
    assert (code, err) == (0, "")
    assert snapshot(small_run.workdir) == before
    result = json.loads(out)
    *_, last = map(json.loads, small_run.metrics().splitlines())
    assert (result["step"], result["loss"], result["accuracy"]) == (40, last["loss"], last["accuracy"])
    assert result["recorded_accuracy"] == last["accuracy"]
    confusion = np.array(result["confusion"])
    assert (confusion.shape, confusion.sum(), result["images"]) == ((10, 10), 359, 359)
    assert np.trace(confusion) / 359 == result["accuracy"]
    np.testing.assert_array_equal(result["class_accuracy"], np.diag(confusion) / confusion.sum(axis=1))

    code, text, err = run(small_run.workdir, capfd=capfd)
    assert (code, err) == (0, "")
    assert "step 40 " in text
    assert f"test loss {result['loss']:.4f}, test accuracy {result['accuracy']:.4f}" in text
    rows = [row.replace("·", "0").split() for row in text.splitlines()[-10:]]
    assert [[int(cell) for cell in row[2:]] for row in rows] == result["confusion"]


def test_long_class_names_fit_the_table():
    names = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    confusion = (1000 * np.eye(10, dtype=int)).tolist()
    confusion[3], accuracies = [0] * 10, [1.0] * 3 + [None] + [1.0] * 6
    result = evaluate.Result("run", 5, "fashion_mnist", 9000, 0.1, 1.0, 0.5, names, accuracies, confusion)
    head, *rows = evaluate.describe(result).splitlines()[-11:]
    assert {len(row) for row in (head, *rows)} == {len(head)}
    assert len(head) <= 79
    assert "0.5000" in evaluate.describe(result)  # The recorded accuracy is another one.


def test_evaluate_needs_no_metrics_file(small_copy, capfd):
    change_metadata(small_copy / "checkpoints" / "40", test_accuracy=None, metrics={"lines": ""})
    for metrics in ("", '{"step": 40, "split": "test", "accuracy": NaN}\n'):
        (small_copy / "metrics.jsonl").write_text(metrics)
        code, out, err = run(small_copy, "--json", capfd=capfd)
        assert (code, err, json.loads(out)["recorded_accuracy"]) == (0, "", None)


def test_confusion_matrix_counts_pairs():
    labels, predictions = np.array([3, 3, 3, 9]), np.array([3, 5, 5, 0])
    matrix = classifier.confusion_matrix(labels, predictions)
    assert (matrix[3, 3], matrix[3, 5], matrix[9, 0], matrix.sum()) == (1, 2, 1, 4)


@pytest.mark.parametrize(
    ("args", "message"),
    [(("--step", "468"), "no checkpoint of step 468; there are: 10, 20"), (("--data-dir", "/nowhere"), "/nowhere")],
)
def test_unusable_options_are_usage_errors(small_run, args, message, capfd):
    code, out, err = run(small_run.workdir, *args, capfd=capfd)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
