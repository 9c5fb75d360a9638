import json

from mnist_jax.report import history
from mnist_jax.report.history import Turn


def test_measurements_that_are_none_are_left_out(tmp_path):
    good = {"step": 1, "split": "train", "loss": 0.5, "accuracy": 0.5}
    odd = [{"loss": "0"}, {"loss": float("nan")}, {"loss": 1e300}, {"accuracy": float("nan")}, {"accuracy": 7.0}]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({**good, **change}) + "\n" for change in ({}, *odd, {"step": 9})))
    assert history.read_curve(path, "train") == ([1, 9], [0.5, 0.5], [0.5, 0.5])
    assert history.read_curve(tmp_path / "none", "test") == ([], [], [])


def test_a_turn_knows_how_long_it_ran_only_where_times_are_told():
    assert Turn(0, 1).length_s is None
    assert Turn(0, 1, 5.0, 7.5).length_s == 2.5
