"""Settings: the command line, the file of a run, and what may not change in a run that has begun."""

import contextlib
import dataclasses
import json
import math
import os
import pty
import re
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_jax import config as configs
from mnist_jax import train
from mnist_jax.config import Config, ConfigError, Difference
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import data

MODELS = typing.get_args(configs.ModelName)
DATASETS = typing.get_args(configs.DatasetName)
MANY = 2**31 - 1

# Every field is in one of these groups: what a run computes, how long it is, and all that may change freely.
MATHEMATICS = (
    "preset",
    "model",
    "batch_size",
    "learning_rate",
    "adam_b1",
    "adam_b2",
    "label_smoothing",
    "shift_px",
    "rotation_deg",
    "zoom",
    "average_decay",
    "seed",
    "dataset",
)
LENGTH = ("epochs", "steps")
FREE = (
    "workdir",
    "data_dir",
    "log_every_steps",
    "eval_every_steps",
    "checkpoint_every_s",
    "checkpoint_every_steps",
    "keep",
    "mirror",
    "lock_wait_s",
    "coordinator",
    "num_processes",
    "process_id",
    "peer_timeout_s",
    "preempted_exit_code",
    "fresh",
)
FIELDS = tuple(field.name for field in dataclasses.fields(Config))

COUNTS = st.integers(1, MANY)
SHARES = st.floats(min_value=0, max_value=1, exclude_max=True)
SECONDS_AND_RATES = st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False)
FILE_NAMES = st.binary(min_size=1, max_size=20).filter(lambda name: not set(name) & set(b"\0/")).map(os.fsdecode)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "workdir": st.none() | FILE_NAMES.map(Path),
    "dataset": st.sampled_from(DATASETS),
    "data_dir": st.none() | FILE_NAMES.map(Path),
    "preset": st.none() | st.sampled_from(list(configs.PRESETS)),
    "model": st.sampled_from(MODELS),
    "epochs": SECONDS_AND_RATES,
    "steps": st.none() | COUNTS,
    "batch_size": COUNTS,
    "learning_rate": SECONDS_AND_RATES,
    "adam_b1": SHARES,
    "adam_b2": SHARES,
    "label_smoothing": SHARES,
    "shift_px": st.floats(0, 28),
    "rotation_deg": st.floats(0, 180),
    "zoom": SHARES,
    "average_decay": SHARES,
    "seed": st.integers(0, 2**32 - 1),
    "log_every_steps": COUNTS,
    "eval_every_steps": st.none() | COUNTS,
    "checkpoint_every_s": SECONDS_AND_RATES,
    "checkpoint_every_steps": st.none() | COUNTS,
    "keep": COUNTS,
    "lock_wait_s": st.floats(min_value=0, allow_nan=False, allow_infinity=False),
    "preempted_exit_code": st.integers(0, 255),
    "peer_timeout_s": COUNTS,
    "fresh": st.booleans(),
}
CONFIGS = st.builds(Config, **VALUES)


# The command line


@pytest.mark.parametrize(
    ("args", "preset", "model", "epochs_factor"),
    [
        ([], "fast", "cnn", 1),
        (["--model", "cnn", "--dataset", "mnist"], "fast", "cnn", 1),
        (["--model", "cnn-large"], "fast", "cnn-large", 1),
        (["--preset", "accurate"], "accurate", "cnn-large", 1),
        (["--preset", "accurate", "--model", "cnn", "--dataset", "digits"], "accurate", "cnn", 10),
        (["--preset", "accurate", "--model", "original-power"], "accurate", "original-power", 1),
        (["--preset", "original"], "original", "original", 1),
        (["--dataset", "kmnist"], "fast", "cnn", 1),
        (["--dataset", "digits"], "fast", "cnn", 10),
        (["--model", "original"], "original", "original", 1),
        (["--model", "original-dropout", "--dataset", "fashion_mnist"], "original", "original-dropout", 1),
        (["--model", "original-power", "--dataset", "digits"], "original", "original-power", 10),
        (["--dataset", "digits", "--model", "original-normalized"], "original", "original-normalized", 10),
    ],
)
def test_the_defaults_are_those_of_the_preset_or_of_the_one_that_suits_the_model(
    args: list[str], preset: configs.PresetName, model: configs.ModelName, epochs_factor: int
) -> None:
    config = configs.parse(args)
    preset_values = configs.PRESETS[preset]
    assert (config.preset, config.steps) == (preset, None)
    wanted = preset_values._replace(model=model, epochs=epochs_factor * preset_values.epochs)
    assert configs.Preset(*(getattr(config, name) for name in preset_values._fields)) == wanted


def test_a_config_that_names_no_preset_is_one_of_the_fast_one() -> None:
    assert dataclasses.replace(Config(), preset="fast").schedule == Config().schedule == "one-cycle"


def test_a_flag_wins_over_the_preset() -> None:
    config = configs.parse(["--model", "original", "--epochs", "7", "--batch-size", "64", "--learning-rate", "0.5"])
    assert (config.model, config.epochs, config.batch_size, config.learning_rate) == ("original", 7, 64, 0.5)


@settings(deadline=None, max_examples=25)  # an example costs two passes of tyro, 40 ms
@given(run=CONFIGS)
def test_without_flags_the_settings_of_the_run_hold(run: Config) -> None:
    assert configs.parse([], run) == run


@settings(deadline=None, max_examples=25)
@given(run=CONFIGS, seed=VALUES["seed"])
def test_a_flag_changes_its_field_of_the_run_and_no_other(run: Config, seed: int) -> None:
    assert configs.parse(["--seed", str(seed)], run) == dataclasses.replace(run, seed=seed)


WITH_RANGE = {
    "steps": (1, MANY),
    "batch_size": (1, MANY),
    "shift_px": (0, 28),
    "rotation_deg": (0, 180),
    "seed": (0, 2**32 - 1),
    "log_every_steps": (1, MANY),
    "eval_every_steps": (1, MANY),
    "checkpoint_every_steps": (1, MANY),
    "keep": (1, MANY),
    "preempted_exit_code": (0, 255),
    "peer_timeout_s": (1, MANY),
}
POSITIVE = ("epochs", "learning_rate", "checkpoint_every_s")
NOT_NEGATIVE = ("lock_wait_s",)
BELOW_1 = ("adam_b1", "adam_b2", "label_smoothing", "zoom", "average_decay")


def test_every_number_has_a_range() -> None:
    types = typing.get_type_hints(Config)
    numbers = {name for name in FIELDS if {int, float} & {types[name], *typing.get_args(types[name])}}
    assert numbers == {*WITH_RANGE, *POSITIVE, *NOT_NEGATIVE, *BELOW_1, "num_processes", "process_id"}


@pytest.mark.parametrize(("field", "least", "most"), [(field, *limits) for field, limits in WITH_RANGE.items()])
def test_a_number_out_of_its_range_is_a_usage_error_that_names_field_value_and_range(
    field: str, least: int, most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in (least, most):
        assert getattr(configs.parse([flag(field), str(value)]), field) == value
    kind = type(getattr(configs.parse([flag(field), str(least)]), field))
    for value in (least - 1, most + 1):
        message = usage_error([flag(field), str(value)], capsys)
        assert f"{field}={kind(value)} " in message
        assert f"from {least} to {most}" in message


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num-processes", "2"], "say too little; name all three"),
        (["--process-id", "0"], "say too little; name all three"),
        (["--coordinator", "a:1", "--num-processes", "2"], "say too little; name all three"),
        (["--coordinator", "a:1", "--num-processes", "0", "--process-id", "0"], "num_processes=0 is out of range"),
        (["--coordinator", "a:1", "--num-processes", "2", "--process-id", "-1"], "process_id=-1 is out of range"),
        (["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"], "use 0 to 1, for num_processes=2"),
        *(
            (["--coordinator", address, "--num-processes", "2", "--process-id", "1"], "is no address; use HOST:PORT")
            for address in ("a", "a:", ":1", "a:0", "a:65536", "a:b", "a:-1", "a:" + 5000 * "9")
        ),
    ],
)
def test_processes_that_are_named_wrongly_or_in_part_are_a_usage_error(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in usage_error(args, capsys)


@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket/run", "hdfs://host/run"])
def test_an_object_store_is_no_place_for_a_run_and_is_not_taken_for_a_directory(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is no directory but an address" in usage_error(["--workdir", address], capsys)


@pytest.mark.parametrize("place", ["bucket/run", "http://host/run", "s3:/bucket", "s3://", ""])
def test_a_mirror_is_an_address_of_an_object_store(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "use s3://BUCKET/PATH, gs://BUCKET/PATH or file:///PATH" in usage_error(["--mirror", place], capsys)
    for scheme in ("s3", "gs", "file"):
        assert configs.parse(["--mirror", f"{scheme}:///run"]).mirror == f"{scheme}:///run"


def test_processes_are_named_in_full_or_left_to_a_scheduler_or_ruled_out() -> None:
    named = configs.parse(["--coordinator", "[::1]:65535", "--num-processes", "2", "--process-id", "1"])
    assert (named.coordinator, named.num_processes, named.process_id) == ("[::1]:65535", 2, 1)
    assert configs.parse([]).num_processes is None
    assert configs.parse(["--num-processes", "1"]).num_processes == 1


@pytest.mark.parametrize("field", POSITIVE)
@pytest.mark.parametrize("value", ["0", "-0.5", "inf", "nan"])
def test_a_rate_or_time_that_is_not_positive_and_finite_is_a_usage_error(
    field: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = usage_error([flag(field), value], capsys)
    assert f"{field}={float(value)} " in message
    assert "finite value above 0" in message


@pytest.mark.parametrize("field", BELOW_1)
@pytest.mark.parametrize("value", ["-0.5", "1", "nan"])
def test_a_share_that_is_negative_or_the_whole_is_a_usage_error(
    field: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = usage_error([flag(field), value], capsys)
    assert f"{field}={float(value)} " in message
    assert "from 0 to below 1" in message


@pytest.mark.parametrize("value", ["-0.5", "inf", "nan"])
def test_a_wait_that_is_negative_or_without_end_is_a_usage_error(
    value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = usage_error(["--lock-wait-s", value], capsys)
    assert f"lock_wait_s={float(value)} " in message
    assert "finite value of 0 or more" in message
    assert configs.parse(["--lock-wait-s", "0"]).lock_wait_s == 0


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--learning-rte", "0.1"], ["--learning-rte"]),
        (["5"], ["5"]),
        (["--steps", "1.5"], ["--steps", "1.5"]),
        (["--model", "resnet"], ["--model", "resnet", *MODELS]),
        (["--dataset", "imagenet"], ["--dataset", "imagenet", *DATASETS]),
        (["--steps"], ["--steps"]),
    ],
)
def test_what_cannot_be_understood_is_a_usage_error_that_names_it(
    args: list[str], named: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = usage_error(args, capsys)
    for word in named:
        assert word in message


def test_help_shows_every_field_with_a_sentence_and_a_default() -> None:
    sections = help_sections()
    assert {flag(field) for field in FIELDS} == sections.keys()
    for name, text in sections.items():
        assert re.search(r"[A-Z][\w'-]*( [^.]+){2,}\.", text), f"{name} has no sentence"
        assert re.search(r"\(default: [^)]+\)", text), f"{name} has no default"
    epochs = ", ".join(f"{preset} {preset_values.epochs}" for preset, preset_values in configs.PRESETS.items())
    assert f"(default: {epochs})" in sections["--epochs"]


def test_help_and_usage_errors_come_without_the_slow_imports() -> None:
    program = (
        "import sys; from mnist_jax import train\n"
        "try: train.main(sys.argv[1:])\n"
        "except SystemExit as end: print('code', end.code)\n"
        "print('slow', sorted({'jax', 'flax', 'optax', 'orbax', 'sklearn', 'tensorflow_datasets'} & {*sys.modules}))"
    )
    for args, code in ((["--help"], 0), (["--epochs", "0"], 2)):
        ended = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, check=True)
        assert ended.stdout.splitlines()[-2:] == [f"code {code}", "slow []"]


# The file of a run


@settings(deadline=None)
@given(config=CONFIGS)
def test_a_run_is_loaded_as_it_was_saved(config: Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "config.json"
    configs.save(config, path)
    # Where a run lies, how long it and its processes were waited for and that it began afresh are not its settings; the
    # folder of its data does not hang on where the command was given.
    data_dir = None if config.data_dir is None else Path(os.path.abspath(config.data_dir))
    of_one_start = {name: getattr(Config(), name) for name in ("workdir", "lock_wait_s", "fresh", "peer_timeout_s")}
    assert configs.load(path) == dataclasses.replace(config, **of_one_start, data_dir=data_dir)


def test_saving_leaves_nothing_beside_the_file(tmp_path: Path) -> None:
    configs.save(Config(), tmp_path / "config.json")
    configs.save(Config(seed=1), tmp_path / "config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_save_that_fails_leaves_the_old_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    configs.save(Config(seed=1), path)

    def full_disk(file: int) -> None:
        os.truncate(file, 50)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        configs.save(Config(seed=2), path)
    assert configs.load(path).seed == 1


@pytest.mark.parametrize("content", [b"", b"{", b'{"seed": 0', b"\xff\xfe\x00", b"\0" * 100, b"seed = 0"])
def test_a_config_file_that_is_not_json_is_named(content: bytes, tmp_path: Path) -> None:
    refused(tmp_path, content, "not JSON", "--fresh")


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b'"seed"'])
def test_a_config_file_that_holds_no_table_is_named(content: bytes, tmp_path: Path) -> None:
    refused(tmp_path, content, "no table", "--fresh")


def test_a_config_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.mkdir()
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        configs.load(path)


@pytest.mark.parametrize("field", [*Config().to_json()])
def test_a_setting_that_the_config_file_lacks_is_named(field: str, tmp_path: Path) -> None:
    values = Config().to_json()
    del values[field]
    refused(tmp_path, json.dumps(values).encode(), f"lacks {field}", "--fresh")


@pytest.mark.parametrize("field", ["momentum", "workdir", "fresh", "mirror"])
def test_a_setting_that_is_not_known_is_named(field: str, tmp_path: Path) -> None:
    refused(tmp_path, json.dumps({**Config().to_json(), field: None}).encode(), repr(field))


WRONG_TYPES = {
    "dataset": ["imagenet", "", None, 1],
    "data_dir": [1, True, ["data"]],
    "preset": ["slow", 1, ["fast"]],
    "model": ["resnet", None, 1, ["cnn"]],
    "epochs": ["3", None, True],
    "steps": ["3", 3.0, True],
    "batch_size": ["3", 3.0, None, True],
    "learning_rate": ["0.1", None, True, [0.1]],
    **{name: ["0.1", None, True] for name in ("adam_b1", "adam_b2", "label_smoothing", "zoom", "average_decay")},
    **{name: ["2", None, True] for name in ("shift_px", "rotation_deg")},
    "seed": ["0", 0.0, None, False],
    "log_every_steps": ["3", 3.0, None],
    "eval_every_steps": ["3", 3.0, True],
    "checkpoint_every_s": ["30", None, True],
    "checkpoint_every_steps": ["3", 3.0, True],
    "keep": ["3", 3.0, None],
    "preempted_exit_code": ["75", 75.0, None, True],
}


def test_the_wrong_types_are_tried_on_every_setting() -> None:
    assert WRONG_TYPES.keys() == Config().to_json().keys()


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WRONG_TYPES for value in WRONG_TYPES[field]])
def test_a_setting_of_a_wrong_type_is_named(field: str, value: object, tmp_path: Path) -> None:
    message = refused(tmp_path, json.dumps({**Config().to_json(), field: value}).encode(), field, repr(value))
    assert "<class" not in message
    assert "typing." not in message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, limits[0] - 1) for field, limits in WITH_RANGE.items() if field in WRONG_TYPES),
        *((field, limits[1] + 1) for field, limits in WITH_RANGE.items() if field in WRONG_TYPES),
        *((field, value) for field in POSITIVE for value in (0, -1.0, math.inf, math.nan)),
    ],
)
def test_a_setting_out_of_its_range_is_named_and_so_is_the_file(field: str, value: float, tmp_path: Path) -> None:
    refused(tmp_path, json.dumps({**Config().to_json(), field: value}).encode(), f"{field}={value}", "range")


# What may not change in a run that has begun


def test_every_field_is_mathematics_or_length_or_free() -> None:
    assert sorted([*MATHEMATICS, *LENGTH, *FREE]) == sorted(FIELDS)


@given(config=CONFIGS)
def test_a_config_never_contradicts_itself(config: Config) -> None:
    assert list(configs.contradictions(config, config)) == []


@given(run=CONFIGS, values=st.data(), field=st.sampled_from(MATHEMATICS))
def test_a_changed_field_of_the_mathematics_is_reported_with_both_values(
    run: Config, values: st.DataObject, field: str
) -> None:
    old = getattr(run, field)
    new = values.draw(VALUES[field].filter(lambda value: value not in (old, "auto")))
    found = list(configs.contradictions(run, dataclasses.replace(run, **{field: new})))
    assert Difference(field, old, new) in found
    # Another model may have another schedule, but the number of steps is what it was.
    assert {difference.field for difference in found} == {field}


@given(run=CONFIGS, asked=CONFIGS)
def test_cadence_and_housekeeping_may_change_freely(run: Config, asked: Config) -> None:
    changed = dataclasses.replace(run, **{field: getattr(asked, field) for field in FREE})
    assert list(configs.contradictions(run, changed)) == []


@given(run=CONFIGS, asked=CONFIGS)
def test_auto_never_contradicts(run: Config, asked: Config) -> None:
    asked = dataclasses.replace(asked, dataset="auto")
    assert "dataset" not in {difference.field for difference in configs.contradictions(run, asked)}


@given(run=CONFIGS.filter(lambda run: run.preset != "original"), epochs=VALUES["epochs"], steps=VALUES["steps"])
def test_the_length_contradicts_where_the_learning_rate_depends_on_it(
    run: Config, epochs: float, steps: int | None
) -> None:
    asked = dataclasses.replace(run, epochs=epochs, steps=steps)
    expected = {name for name in LENGTH if getattr(run, name) != getattr(asked, name)}
    assert {difference.field for difference in configs.contradictions(run, asked)} == expected


@given(run=CONFIGS.filter(lambda run: run.preset == "original"), epochs=VALUES["epochs"], steps=VALUES["steps"])
def test_the_length_may_change_where_the_learning_rate_is_constant(
    run: Config, epochs: float, steps: int | None
) -> None:
    asked = dataclasses.replace(run, epochs=epochs, steps=steps)
    # But other epochs that the steps win over would be ignored without a word.
    ignored = steps is not None and epochs != run.epochs
    assert list(configs.contradictions(run, asked)) == ([Difference("epochs", run.epochs, epochs)] if ignored else [])


def test_a_file_that_the_disk_does_not_take_leaves_the_one_before_and_nothing_besides(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="file cannot be written: No space left on device"):
        configs.write_whole(path, b"new")
    assert {found.name: found.read_text() for found in tmp_path.iterdir()} == {"file": "old"}


def test_contradictions_are_told_as_an_aligned_table_and_with_the_ways_out() -> None:
    differences = [Difference("learning_rate", 0.004, 0.1), Difference("steps", None, 100000)]
    assert configs.describe_contradictions(Path("runs/mnist"), differences) == (
        "runs/mnist holds a run with other settings, and these would change its mathematics:\n"
        "  field          run    asked\n"
        "  learning_rate  0.004  0.1\n"
        "  steps          None   100000\n"
        "Leave the flags out to carry that run on, use another --workdir for a second\n"
        "run, or add --fresh to move the old run aside and start anew."
    )


@pytest.mark.parametrize(("variable", "is_coloured"), [("", True), ("1", False)])
def test_usage_errors_are_in_colours_unless_no_color_says_otherwise(variable: str, is_coloured: bool) -> None:
    terminal, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": variable}
    with subprocess.Popen([sys.executable, "-m", "mnist_jax.status", "--help"], stdout=end, env=environment):
        os.close(end)
        words = b""
        with contextlib.suppress(OSError):  # It says so when nobody writes any more.
            while more := os.read(terminal, 65536):
                words += more
        os.close(terminal)
    assert b"WORKDIR" in words
    assert (b"\x1b[" in words) == is_coloured


# How long a run is


@given(size=st.integers(1, 10**9), batch_size=st.integers(1, 10**9))
def test_an_epoch_is_as_many_whole_batches_as_there_are(size: int, batch_size: int) -> None:
    config = Config(batch_size=batch_size)
    if batch_size <= size:
        steps = config.steps_per_epoch(size)
        assert steps * batch_size <= size < (steps + 1) * batch_size
    else:
        with pytest.raises(ConfigError, match=f"batch_size={batch_size}, but there are {size} training images"):
            config.steps_per_epoch(size)


def test_the_length_is_the_epochs_unless_steps_are_given() -> None:
    assert Config(batch_size=128, epochs=3).total_steps(60_000) == 3 * 468
    assert Config(batch_size=128, epochs=3, steps=7).total_steps(60_000) == 7
    assert Config(batch_size=1438, epochs=3).total_steps(1438) == 3


def test_part_of_an_epoch_is_the_nearest_number_of_steps() -> None:
    for epochs, steps in ((1.5, 702), (1.15, 538), (0.002, 1), (0.0011, 1), (MANY / 468, MANY)):
        assert Config(batch_size=128, epochs=epochs).total_steps(60_000) == steps


@pytest.mark.parametrize("epochs", [0.001, 5e6, 1e300])
def test_epochs_that_make_no_step_or_too_many_are_refused(epochs: float) -> None:
    with pytest.raises(
        ConfigError, match=re.escape(f"epochs={epochs} makes ") + f".* steps; use as many as make 1 to {MANY}"
    ):
        Config(batch_size=128, epochs=epochs).total_steps(60_000)


@pytest.mark.parametrize("steps", [None, 10])
def test_no_run_has_a_batch_larger_than_the_data(steps: int | None) -> None:
    with pytest.raises(ConfigError, match="batch_size=1439, but there are 1438 training images; use fewer"):
        Config(batch_size=1439, steps=steps).total_steps(1438)


# Which run is meant


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, in which the network is not asked for anything."""
    monkeypatch.chdir(tmp_path)

    def resolve(name: str, data_dir: Path | None, *, notify: object) -> str:
        assert name != "auto", "asked the network which data set there is"
        return name

    monkeypatch.setattr(data, "resolve", resolve)
    return tmp_path


def test_a_new_run_has_the_recipe_of_its_data_and_a_directory_of_its_name(here: Path) -> None:
    config, workdir = find_run("--dataset", "digits", "--model", "original")
    assert workdir == Path("runs/digits")
    assert (config.dataset, config.model, config.epochs, config.batch_size) == ("digits", "original", 100, 50)
    assert contents(here).keys() == {Path("runs/digits/lock")}  # No more is made before the run begins.


def test_auto_becomes_the_data_that_there_is_and_its_recipe(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "resolve", lambda name, data_dir, *, notify: "digits")
    config, workdir = find_run()
    assert (config.dataset, workdir) == ("digits", Path("runs/digits"))
    assert config.epochs == 10 * configs.PRESETS["fast"].epochs


def test_the_settings_of_the_run_in_the_directory_are_the_defaults(here: Path) -> None:
    run = make_run("one", Config(dataset="digits", model="original", batch_size=7, seed=5, keep=9))
    config, workdir = find_run("--workdir", "one", "--keep", "2")
    assert workdir == Path("one")
    assert config == dataclasses.replace(run, workdir=Path("one"), keep=2)


def test_a_flag_that_contradicts_the_run_is_refused_and_named(here: Path) -> None:
    make_run("one", Config(dataset="digits", seed=5))
    Path("one/checkpoints/7").mkdir(parents=True)
    before = contents(here)
    with pytest.raises(ConfigError, match=r"one holds a run .*\n.*\n  seed +5 +6") as refusal:
        find_run("--workdir", "one", "--seed", "6")
    assert "--fresh" in str(refusal.value)
    Path("one/lock").unlink()
    assert contents(here) == before


def test_before_the_first_checkpoint_nothing_has_begun_and_any_setting_may_change(here: Path) -> None:
    make_run("one", Config(dataset="digits", seed=5))
    config, _ = find_run("--workdir", "one", "--seed", "6")
    assert (config.seed, config.dataset) == (6, "digits")
    config, _ = find_run("--workdir", "one", "--model", "original")
    assert config == dataclasses.replace(Config.of_preset(None, "original", "digits"), workdir=Path("one"))


@pytest.mark.parametrize(
    ("args", "preset", "model"),
    [
        (["--preset", "accurate"], "accurate", "cnn-large"),
        (["--preset", "accurate", "--model", "cnn"], "accurate", "cnn"),
        (["--model", "original-power"], "original", "original-power"),
        (["--preset", "accurate", "--model", "original"], "accurate", "original"),
    ],
)
def test_before_the_first_checkpoint_another_preset_or_model_brings_its_defaults(
    args: list[str], preset: configs.PresetName, model: configs.ModelName, here: Path
) -> None:
    make_run("one", Config.of_preset("fast", "cnn", "digits"))
    config, _ = find_run("--workdir", "one", *args)
    assert config == dataclasses.replace(Config.of_preset(preset, model, "digits"), model=model, workdir=Path("one"))


def test_before_the_first_checkpoint_other_data_leave_preset_and_model_as_they_were(here: Path) -> None:
    make_run("one", Config.of_preset("accurate", "cnn", "mnist"))
    config, _ = find_run("--workdir", "one", "--dataset", "digits")
    assert config == dataclasses.replace(Config.of_preset("accurate", "cnn", "digits"), workdir=Path("one"))


def test_another_preset_contradicts_a_run_that_has_begun(here: Path) -> None:
    make_run("one", Config.of_preset("fast", "cnn", "digits"))
    Path("one/checkpoints/7").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"  preset +fast +accurate"):
        find_run("--workdir", "one", "--preset", "accurate")


def test_without_flags_the_run_that_is_there_is_carried_on(here: Path) -> None:
    make_run("runs/digits", Config(dataset="digits", seed=5))
    config, workdir = find_run()
    assert (workdir, config.dataset, config.seed) == (Path("runs/digits"), "digits", 5)


@pytest.mark.parametrize("last", ["mnist", "digits"])
def test_without_flags_the_run_last_at_work_is_carried_on(last: str, here: Path) -> None:
    for name in ("mnist", "digits"):
        make_run(f"runs/{name}", Config(dataset=name))
        os.utime(f"runs/{name}/config.json", (1000, 1000 + (name == last)))
    config, workdir = find_run()
    assert (workdir, config.dataset) == (Path("runs") / last, last)


def test_a_folder_of_mnist_files_is_no_matter_of_the_run_on_digits(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("runs/digits", Config(dataset="digits"))
    monkeypatch.setattr(data, "resolve", lambda name, data_dir, *, notify: "mnist")
    config, workdir = find_run("--data-dir", "files")
    assert (workdir, config.dataset) == (Path("runs/mnist"), "mnist")


def test_fresh_moves_the_old_run_aside_and_deletes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run("runs/digits", Config(dataset="digits", seed=5))
    Path("runs/digits/checkpoints").mkdir()
    Path("runs/digits/checkpoints/7").write_bytes(b"seven")
    before = contents(Path("runs/digits"))
    config, workdir = find_run("--dataset", "digits", "--fresh", "--seed", "6")
    assert (workdir.absolute(), config.seed) == (here / "runs" / "digits", 6)
    assert contents(workdir).keys() == {Path("lock")}
    Path("runs/digits.old-1/lock").unlink()
    assert contents(Path("runs/digits.old-1")) == before
    assert "runs/digits.old-1" in capsys.readouterr().out

    Path("runs/digits/lock").unlink()
    make_run("runs/digits", config)
    find_run("--dataset", "digits", "--fresh")
    assert contents(Path("runs/digits.old-1")) == before
    assert configs.load(Path("runs/digits.old-2/config.json")).seed == 6


def test_fresh_takes_none_of_the_old_settings(here: Path) -> None:
    make_run("one", Config(dataset="digits", seed=5, batch_size=7, keep=9))
    config, _ = find_run("--workdir", "one", "--dataset", "digits", "--fresh")
    assert config == configs.parse(["--workdir", "one", "--dataset", "digits", "--fresh"])


def test_fresh_gets_past_settings_that_cannot_be_read(here: Path) -> None:
    make_run("one", Config(dataset="digits"))
    Path("one/config.json").write_text("{")
    with pytest.raises(ConfigError, match="--fresh"):
        find_run("--workdir", "one")
    find_run("--workdir", "one", "--dataset", "digits", "--fresh")
    assert Path("one.old-1/config.json").read_text() == "{"


def test_fresh_without_an_old_run_is_a_new_run(here: Path) -> None:
    _, workdir = find_run("--workdir", "one", "--dataset", "digits", "--fresh")
    assert workdir == Path("one")
    assert contents(here).keys() == {Path("one/lock")}


def test_fresh_in_the_working_directory_itself_begins_in_its_old_place(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("one", Config(dataset="digits", seed=5))
    monkeypatch.chdir("one")
    _, workdir = find_run("--workdir", ".", "--dataset", "digits", "--fresh")
    assert contents(here / "one").keys() == {Path("lock")}
    assert workdir == here / "one"
    assert configs.load(here / "one.old-1" / "config.json").seed == 5


# The tools of these tests


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def usage_error(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message of a usage error, without its frame and its line breaks."""
    with pytest.raises(SystemExit) as end:
        configs.parse(args)
    assert end.value.code == 2
    written = capsys.readouterr()
    assert written.out == ""
    return unframed(written.err)


def help_sections() -> dict[str, str]:
    """Return what `--help` says about each flag."""
    command = [sys.executable, "-m", "mnist_jax.train", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^│ (--[a-z0-9-]+)", text, flags=re.MULTILINE)
    return {name: unframed(part) for name, part in zip(parts[1::2], parts[2::2], strict=True)}


def unframed(text: str) -> str:
    return " ".join(re.sub(r"[─│╭╮╰╯]", " ", text).split())


def refused(tmp_path: Path, content: bytes, *named: str) -> str:
    """Return the message with which a config file of this content is refused, its path and `named` being in it."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        configs.load(path)
    for word in (str(path), *named):
        assert word in str(refusal.value)
    assert path.read_bytes() == content
    return str(refusal.value)


def find_run(*args: str) -> tuple[Config, Path]:
    with contextlib.ExitStack() as locks:
        return train.find_run(args, configs.parse(args, Config()), StopSignal(), locks)


def make_run(directory: str, config: Config) -> Config:
    Path(directory).mkdir(parents=True, exist_ok=True)
    configs.save(config, Path(directory) / "config.json")
    (Path(directory) / "events.jsonl").touch()
    return config


def contents(directory: Path) -> dict[Path, bytes]:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
