"""Settings: the command line, the file of a run, and what may not change in a run that has begun."""

import contextlib
import dataclasses
import errno
import importlib
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
import tyro

from mnist_jax import cli, predict, train
from mnist_jax import config as configs
from mnist_jax.config import Config, ConfigError
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import data

MAX = 2**31 - 1
FIELDS = tuple(field.name for field in dataclasses.fields(Config))

# Every field is in one of these groups. A field that changes the mathematics has two values that differ.
MATHEMATICS: dict[str, tuple[Any, Any]] = {
    "preset": ("fast", "accurate"),
    "model": ("cnn", "original"),
    "batch_size": (128, 64),
    "learning_rate": (0.1, 0.2),
    "adam_b1": (0.9, 0.8),
    "adam_b2": (0.9, 0.8),
    "label_smoothing": (0.0, 0.1),
    "shift_px": (0.0, 1.0),
    "schedule": ("cosine", "linear"),
    "rotation_deg": (0.0, 1.0),
    "zoom": (0.0, 0.1),
    "average_decay": (0.0, 0.9),
    "seed": (0, 1),
    "init_from": (None, Path("/runs/parent@best")),
    "dataset": ("mnist", "digits"),
}
LENGTH = {"epochs": 2.5, "steps": 7}
FREE: dict[str, Any] = {
    "workdir": Path("somewhere"),
    "data_dir": Path("/data/" + os.fsdecode(b"\xff")),
    "fsdp": 4,
    "log_every_steps": 2,
    "eval_every_steps": 3,
    "checkpoint_every_s": 0.5,
    "checkpoint_every_steps": 4,
    "keep": 5,
    "mirror": "s3://bucket/run",
    "lock_wait_s": 0.0,
    "coordinator": "host:1",
    "num_processes": 2,
    "process_id": 1,
    "peer_timeout_s": 6,
    "preemption_notice": "gcp",
    "preempted_exit_code": 75,
    "fresh": True,
}
# A config in which every field differs from its default.
FULL = Config(**LENGTH, **FREE, **{field: values[-1] for field, values in MATHEMATICS.items()})


# Each flag that takes a path: the command, the field, and arguments in which PATH stands for it.
PATH_FLAGS = [
    ("train", "workdir", ["--workdir", "PATH"]),
    ("train", "data_dir", ["--data-dir", "PATH"]),
    ("train", "init_from", ["--init-from", "PATH"]),
    *(
        (command, "workdir", ["PATH"])
        for command in ("evaluate", "replay", "status", "demo.__main__", "report.__main__")
    ),
    *(
        (command, "data_dir", ["run", "--data-dir", "PATH"])
        for command in ("evaluate", "demo.__main__", "report.__main__")
    ),
    ("report.__main__", "others", ["run", "PATH"]),
    ("report.__main__", "out", ["run", "--out", "PATH"]),
    ("predict", "workdir", ["PATH", "image"]),
    ("predict", "images", ["run", "PATH"]),
    ("export", "workdir", ["PATH", "out"]),
    ("export", "out", ["run", "PATH"]),
]


def test_every_path_flag_is_in_the_table() -> None:
    listed = {(command, name) for command, name, _ in PATH_FLAGS}
    for command in {command for command, _, _ in PATH_FLAGS}:
        kind = Config if command == "train" else importlib.import_module(f"mnist_jax.{command}").Options
        for name, type_ in typing.get_type_hints(kind).items():
            assert (Path in (type_, *typing.get_args(type_))) == ((command, name) in listed), (command, name)


# The command line


@pytest.mark.parametrize(
    ("args", "preset", "model", "epochs"),
    [
        ([], "fast", "cnn", 1),
        (["--dataset", "digits"], "fast", "cnn", 10),
        (["--model", "cnn-large"], "fast", "cnn-large", 1),
        (["--preset", "accurate"], "accurate", "cnn-large", 10),
        (["--model", "original-power", "--dataset", "digits"], "original", "original-power", 100),
        (["--preset", "accurate", "--model", "original"], "accurate", "original", 10),
    ],
)
def test_defaults_follow_preset_model_and_dataset(args, preset, model, epochs) -> None:
    config = cli.parse_config(args)
    expected = {**configs.PRESETS[preset], "preset": preset, "model": model, "epochs": epochs}
    assert {name: getattr(config, name) for name in expected} == expected


def test_flags_override_the_preset() -> None:
    config = cli.parse_config(["--model", "original", "--epochs", "7", "--learning-rate", "0.5"])
    assert (config.model, config.epochs, config.batch_size, config.learning_rate) == ("original", 7, 50, 0.5)


@pytest.mark.parametrize("run", [FULL, Config()])
def test_a_flag_changes_only_its_field(run: Config) -> None:
    assert cli.parse_config(["--seed", "9"], run) == dataclasses.replace(run, seed=9)


RANGES: dict[str, tuple[Any, Any, list[Any]]] = {
    **dict.fromkeys(("steps", "batch_size", "log_every_steps", "eval_every_steps"), (1, MAX, [0, MAX + 1])),
    **dict.fromkeys(("fsdp", "checkpoint_every_steps", "keep", "peer_timeout_s"), (1, MAX, [0, MAX + 1])),
    "seed": (0, 2**32 - 1, [-1, 2**32]),
    "preempted_exit_code": (0, 255, [-1, 256]),
    "shift_px": (0, 28, [-1, 29]),
    "rotation_deg": (0, 180, [-1, 181]),
    **dict.fromkeys(
        ("adam_b1", "adam_b2", "label_smoothing", "zoom", "average_decay"), (0, 0.999, [-0.5, 1, math.nan])
    ),
    "lock_wait_s": (0, 1e300, [-0.5, math.inf, math.nan]),
    **dict.fromkeys(
        ("epochs", "learning_rate", "checkpoint_every_s"), (1e-300, 1e300, [0, -0.5, math.inf, math.nan, 10**400])
    ),
}


@pytest.mark.parametrize("field", RANGES)
def test_values_out_of_range_name_field_value_and_rule(field: str, tmp_path: Path) -> None:
    low, high, wrong = RANGES[field]
    for value in (low, high):
        assert getattr(Config(**{field: value}), field) == value
    for value in wrong:
        with pytest.raises(ConfigError, match=f"^{field}={value} is out of range; use a value .*[01]"):
            Config(**{field: value})
        if field in Config().to_json():
            refused(tmp_path, json.dumps({**Config().to_json(), field: value}).encode(), f"{field}={value}")


def test_every_number_has_a_range() -> None:
    types = typing.get_type_hints(Config)
    numbers = {name for name in FIELDS if {int, float} & {types[name], *typing.get_args(types[name])}}
    assert numbers == {*RANGES, "num_processes", "process_id"}


@pytest.mark.parametrize(
    ("coordinator", "num_processes", "process_id", "message"),
    [
        (None, 2, None, "all three"),
        ("a:1", 2, None, "all three"),
        ("a:1", 0, 0, "num_processes=0"),
        ("a:1", 2, -1, "process_id=-1"),
        ("a:1", 2, 2, "use 0 to 1"),
        *((address, 2, 1, "HOST:PORT") for address in ("a", "a:", ":1", "a:0", "a:65536", "a:b", "a:" + 5000 * "9")),
    ],
)
def test_wrong_process_flags_are_refused(coordinator, num_processes, process_id, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    Config(coordinator="[::1]:65535", num_processes=2, process_id=1)
    Config(num_processes=1)


def test_a_url_is_no_workdir_and_a_mirror_is_a_url() -> None:
    with pytest.raises(ConfigError, match=r"workdir=gs:/bucket/run is a URL.*\n?.*--mirror"):
        Config(workdir=Path("gs://bucket/run"))
    for url in ("bucket/run", "http://host/run", "s3:/bucket", "s3://", ""):
        with pytest.raises(ConfigError, match=f"mirror={url} .*s3://BUCKET/PATH"):
            Config(mirror=url)
    for url in ("https://me:hunter2@host/run", "https://host/run?sig=hunter2"):
        with pytest.raises(ConfigError, match="mirror=https://host/run ") as refusal:
            Config(mirror=url)
        assert "hunter2" not in str(refusal.value)
    for scheme in ("s3", "gs", "az", "file"):
        Config(mirror=f"{scheme}:///run")


@pytest.mark.parametrize(("command", "name", "arguments"), PATH_FLAGS)
def test_every_path_is_expanded(command: str, name: str, arguments: list[str], monkeypatch) -> None:
    kind = Config if command == "train" else importlib.import_module(f"mnist_jax.{command}").Options
    monkeypatch.setenv("HOME", "/home/me")
    forms = [[argument.replace("PATH", "~/x") for argument in arguments]]
    if len(arguments) > 1 and arguments[-2].startswith("--"):
        forms.append([*forms[0][:-2], f"{arguments[-2]}=~/x"])
    for form in forms:
        assert getattr(cli.parse(kind, command, form), name) in (Path("/home/me/x"), (Path("/home/me/x"),))


# The same function expands all paths and refuses these.
@pytest.mark.parametrize(
    ("kind", "name", "before"), [(Config, "data_dir", ["--data-dir"]), (predict.Options, "images", ["run"])]
)
def test_a_path_is_a_local_one(kind: Any, name: str, before: list[str], capsys) -> None:
    for path, problem in (
        ("gs://bucket/x", f"{name}=gs:/bucket/x is a"),
        ("https://host/x", f"{name}=https:/host/x is a"),
        ("", "is empty"),
        ("~nobody-has-this-name/x", f"{name}=~nobody-has-this-name/x"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.parse(kind, "command", [*before, path])
        assert end.value.code == 2
        assert problem in unframed(capsys.readouterr().err)


@pytest.mark.parametrize("flag", ["--data-dir", "--data_dir"])  # tyro accepts both.
def test_an_empty_value_is_refused(flag: str, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.parse(Config, "train", [f"{flag}="])
    assert f"error: {flag} is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--learning-rte", "0.1"], ["--learning-rte"]),
        (["--steps", "1.5"], ["--steps", "1.5"]),
        (["--seed", "-1"], ["seed=-1 ", "from 0 to 4294967295"]),
        (["--model", "resnet"], ["--model", "resnet", *typing.get_args(configs.ModelName)]),
        (["--preset=fats", "--seed", "1"], ["--preset", "fats", *typing.get_args(configs.PresetName)]),
    ],
)
def test_bad_usage_exits_with_2_and_is_named(args: list[str], named: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as end:
        cli.parse_config(args)
    assert end.value.code == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert all(word in unframed(written.err) for word in named)


def test_help_describes_every_flag_in_80_columns(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        cli.parse_config(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    parts = re.split(r"^\W{0,4}(--[a-z][a-z0-9-]+)", text, flags=re.MULTILINE)
    sections = {name: unframed(part) for name, part in zip(parts[1::2], parts[2::2], strict=True)}
    assert sections.keys() == {"--" + field.replace("_", "-") for field in FIELDS}
    for name, section in sections.items():
        assert re.search(r"[A-Z][^.]+\.", section), f"{name} has no sentence"
        assert re.search(r"\(default: [^)]+\)", section), f"{name} has no default"
    assert "(default: 1 for fast, 10 for accurate, 10 for original)" in sections["--epochs"]


@pytest.mark.parametrize("args", [["--help"], ["--stepz", "1"]])
def test_no_columns_means_the_usual_number(args: list[str], capsys, monkeypatch) -> None:
    shown = []
    for columns in ("", "0"):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit):
            cli.parse_config(args)
        shown.append(capsys.readouterr())
    assert shown[0] == shown[1]
    assert "--steps" in shown[0].out + shown[0].err


def test_workdir_is_accepted_where_the_run_is_positional(capsys) -> None:
    @dataclasses.dataclass
    class Options:
        workdir: tyro.conf.Positional[Path]
        images: tyro.conf.Positional[tuple[Path, ...]]
        step: configs.WhichStep = "latest"

    expected = Options(Path("run"), (Path("a"), Path("b")), 7)
    for args in ("run a b --step 7", "--step 7 a b --workdir run", "a --workdir=run b --step 7"):
        assert cli.parse(Options, "predict", args.split()) == expected
    with pytest.raises(SystemExit):
        cli.parse(Options, "predict", ["a", "--workdir"])
    assert "workdir" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.parse(Options, "predict", ["--help"])
    assert "--workdir DIR" in capsys.readouterr().out


def test_help_and_usage_errors_do_not_import_jax() -> None:
    program = (
        "import sys; from mnist_jax import train\n"
        "for args in (['--help'], ['--epochs', '0']):\n"
        "    try: train.main(args)\n"
        "    except SystemExit as end: print('code', end.code)\n"
        "print('slow', sorted({'jax', 'flax', 'optax', 'orbax', 'sklearn', 'tensorflow_datasets'} & {*sys.modules}))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert [line for line in ended.stdout.splitlines() if line[:5] in ("code ", "slow ")] == [
        "code 0",
        "code 2",
        "slow []",
    ]


@pytest.mark.parametrize(("variable", "is_coloured"), [("", True), ("1", False)])
def test_no_color_turns_colours_off(variable: str, is_coloured: bool) -> None:
    terminal, end = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "NO_COLOR": variable}
    with subprocess.Popen([sys.executable, "-m", "mnist_jax.train", "--help"], stdout=end, env=environment):
        os.close(end)
        words = b""
        with contextlib.suppress(OSError):  # raised when no process has the other end open
            while more := os.read(terminal, 65536):
                words += more
        os.close(terminal)
    assert b"--workdir" in words
    assert (b"\x1b[" in words) == is_coloured


# The file of a run


@pytest.mark.parametrize("config", [FULL, Config()])
def test_load_returns_what_save_wrote(config: Config, tmp_path: Path) -> None:
    configs.save(config, tmp_path / "config.json")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    of_one_start = ("workdir", "mirror", "lock_wait_s", "fresh", "coordinator", "num_processes", "process_id")
    defaults = {name: getattr(Config(), name) for name in (*of_one_start, "peer_timeout_s", "preemption_notice")}
    assert configs.load(tmp_path / "config.json") == dataclasses.replace(config, **defaults)
    relative = dataclasses.replace(config, data_dir=Path("folder"))
    configs.save(relative, tmp_path / "config.json")
    assert configs.load(tmp_path / "config.json").data_dir == Path("folder").absolute()


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    configs.save(Config(seed=1), path)

    def fail(file: int) -> None:
        os.truncate(file, 50)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"config.json cannot be written: No space left"):
        configs.save(Config(seed=2), path)
    assert configs.load(path).seed == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_save_fsyncs_the_file_and_then_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, bool]] = []
    path = tmp_path / "config.json"
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.readlink(f"/proc/self/fd/{file}"), path.exists())))
    configs.save(Config(), path)
    assert synced == [(f"{path}.partial", False), (str(tmp_path), True)]


@pytest.mark.parametrize("content", [b"", b'{"seed": 0', b"\xff\xfe\x00", 100_000 * b"[", b"[]", b"null", 2**21 * b" "])
def test_a_config_file_that_is_not_ours_is_refused(content: bytes, tmp_path: Path) -> None:
    refused(tmp_path, content, "--fresh")


def test_an_unreadable_config_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        configs.load(tmp_path)


# Fields that were added after the first version, with the value that means what runs did before.
OLD_VALUES = {"init_from": None, "fsdp": 1, "schedule": "cosine"}


@pytest.mark.parametrize(
    ("preset", "field", "old"),
    [*(("fast", *pair) for pair in OLD_VALUES.items()), ("original", "schedule", "constant")],
)
def test_a_run_of_a_version_without_a_setting_has_its_old_meaning(preset, field, old, tmp_path: Path) -> None:
    values = {**FULL.to_json(), "preset": preset}
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in values.items() if name != field}))
    assert configs.load(tmp_path / "config.json").to_json() == {**values, field: old}


def test_missing_and_unknown_settings_are_named(tmp_path: Path) -> None:
    values = Config().to_json()
    for field in values:
        less = {name: value for name, value in values.items() if name != field}
        if field in OLD_VALUES:
            continue
        refused(tmp_path, json.dumps(less).encode(), repr(field), "--fresh")
    for field in ("momentum", "workdir", "fresh", "mirror"):
        refused(tmp_path, json.dumps({**values, field: None}).encode(), repr(field))


@pytest.mark.parametrize("field", [*Config().to_json()])
def test_settings_of_a_wrong_type_are_named(field: str, tmp_path: Path) -> None:
    kind = typing.get_type_hints(Config)[field]
    wrong: list[Any] = [True, ["3"], {}]
    wrong += [None] if type(None) not in typing.get_args(kind) else []
    wrong += ["3"] if Path not in typing.get_args(kind) else ["a\0b", "a\ud800b"]
    wrong += [3.0] if int in (kind, *typing.get_args(kind)) else []
    for value in wrong:
        refused(tmp_path, json.dumps({**Config().to_json(), field: value}).encode(), f"{field}={value!r}", "--fresh")


def refused(tmp_path: Path, content: bytes, *named: str) -> None:
    """Check that a config file is refused with a message that has its path and these words."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        configs.load(path)
    assert all(word in str(refusal.value) for word in (str(path), *named)), refusal.value


# What may not change in a run that has begun


def test_every_field_is_mathematics_or_length_or_free() -> None:
    assert sorted([*MATHEMATICS, *LENGTH, *FREE]) == sorted(FIELDS)


@pytest.mark.parametrize("field", MATHEMATICS)
def test_mathematics_may_not_change(field: str) -> None:
    old, new = MATHEMATICS[field]
    run = Config(**{field: old})
    assert configs.contradictions(run, dataclasses.replace(run, **{field: new})) == [(field, old, new)]


def test_cadence_and_housekeeping_may_change() -> None:
    assert configs.contradictions(Config(), dataclasses.replace(Config(), **FREE)) == []
    defaults = {field: getattr(Config(), field) for field in FREE}
    assert configs.contradictions(FULL, dataclasses.replace(FULL, **defaults, dataset="auto")) == []


def test_the_length_may_change_only_at_a_constant_learning_rate() -> None:
    one_cycle, constant = (Config(schedule=name, steps=3, epochs=4) for name in ("cosine", "constant"))
    change = {"steps": 5, "epochs": 6}
    asked = dataclasses.replace(one_cycle, **change)
    assert configs.contradictions(one_cycle, asked) == [("steps", 3, 5), ("epochs", 4, 6)]
    assert configs.contradictions(constant, dataclasses.replace(constant, steps=5)) == []
    assert configs.contradictions(constant, dataclasses.replace(constant, epochs=6, steps=None)) == []
    # `steps` overrides `epochs`: the change would be ignored silently.
    assert configs.contradictions(constant, dataclasses.replace(constant, **change)) == [("epochs", 4, 6)]


def test_contradictions_are_shown_as_a_table() -> None:
    with pytest.raises(ConfigError) as refusal:
        configs.check_same_mathematics(Config(seed=1, steps=7), Config(seed=2), where=Path("runs/mnist"))
    first, *table, _, further, _, last = str(refusal.value).splitlines()
    assert "runs/mnist" in first
    assert table == ["  field  run  asked", "  seed   1    2", "  steps  7    None"]
    assert "--init-from runs/mnist " in further
    assert "--fresh" in last
    with pytest.raises(ConfigError) as refusal:
        configs.check_same_mathematics(Config(seed=1), Config(seed=2), where=Path("runs/mnist"))
    assert "--init-from" not in str(refusal.value)


# How long a run is


def test_an_epoch_is_whole_batches() -> None:
    assert [Config(batch_size=batch).steps_per_epoch(1438) for batch in (1, 128, 719, 720, 1438)] == [1438, 11, 2, 1, 1]
    for steps in (None, 10):
        with pytest.raises(ConfigError, match="batch_size=1439, but there are 1438 training images"):
            Config(batch_size=1439, steps=steps).total_steps(1438)


def test_the_length_is_epochs_unless_steps_are_given() -> None:
    for epochs, steps in ((3, 1404), (1.5, 702), (1.15, 538), (0.002, 1), (MAX / 468, MAX)):
        assert Config(batch_size=128, epochs=epochs).total_steps(60_000) == steps
    assert Config(batch_size=128, epochs=3, steps=7).total_steps(60_000) == 7
    for epochs in (0.001, 5e6, 1e300):
        with pytest.raises(ConfigError, match=re.escape(f"epochs={epochs} makes ")):
            Config(batch_size=128, epochs=epochs).total_steps(60_000)


# Which run is meant


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, in which the network is not used."""
    monkeypatch.chdir(tmp_path)

    def resolve(name: str, data_dir: Path | None, *, notify: object) -> str:
        assert name != "auto", "asked the network for the dataset"
        return name

    monkeypatch.setattr(data, "resolve", resolve)
    return tmp_path


def find_run(*args: str) -> tuple[Config, Path]:
    with contextlib.ExitStack() as locks:
        return train.find_run(args, cli.parse_config(args, Config()), StopSignal(), locks)


def make_run(directory: str, config: Config) -> Config:
    Path(directory).mkdir(parents=True, exist_ok=True)
    configs.save(config, Path(directory) / "config.json")
    (Path(directory) / "events.jsonl").touch()
    return config


def contents(directory: Path) -> dict[Path, bytes]:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_new_run_has_the_preset_and_name_of_its_dataset(here: Path) -> None:
    config, workdir = find_run("--dataset", "digits", "--model", "original")
    assert workdir == Path("runs/digits")
    assert (config.dataset, config.model, config.epochs, config.batch_size) == ("digits", "original", 100, 50)
    assert contents(here).keys() == {Path("runs/digits/lock")}  # No more is made before the run begins.


def test_auto_becomes_the_dataset_that_there_is(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "resolve", lambda name, data_dir, *, notify: "digits")
    config, workdir = find_run("--fresh")  # There is nothing to move aside.
    assert (config.dataset, workdir, config.epochs) == ("digits", Path("runs/digits"), 10)
    assert contents(here).keys() == {Path("runs/digits/lock")}


@pytest.mark.parametrize("flags", [(), ("--workdir", "one")])
def test_remote_copy_says_what_a_lost_run_was(flags: tuple[str, ...], here: Path) -> None:
    """No other dataset is announced, and no network is asked for it."""
    manifest = here / "copy" / "checkpoints" / "20" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text('{"files": {}}')
    configs.save(Config.of_preset("fast", "cnn", "kmnist"), here / "copy" / "config.json")
    config, workdir = find_run("--mirror", f"file://{here}/copy", *flags)
    assert config.dataset == "kmnist"
    assert workdir == Path("one" if flags else "runs/kmnist")
    assert (workdir / "checkpoints" / "20").is_dir()


@pytest.mark.parametrize("place", ["one", "link", "one/copy", ".", "%6Fne"])
def test_remote_copy_in_the_run_or_around_it_is_refused(place: str, here: Path) -> None:
    make_run("one", Config(dataset="digits"))
    Path("link").symlink_to("one")
    with pytest.raises(ConfigError, match=r"mirror=.* overlaps"):
        find_run("--workdir", "one", "--mirror", f"file://{here}/{place}")


def test_byte_order_mark_of_an_editor_is_accepted(here: Path) -> None:
    run = make_run("one", Config(dataset="digits", seed=5))
    Path("one/config.json").write_bytes(b"\xef\xbb\xbf" + Path("one/config.json").read_bytes())
    assert find_run("--workdir", "one")[0] == dataclasses.replace(run, workdir=Path("one"))


def test_fresh_start_on_a_mount_point_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("one", Config(dataset="digits"))
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "one":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ConfigError, match="--workdir"):
        find_run("--workdir", "one", "--fresh", "--dataset", "digits")
    assert (here / "one" / "config.json").exists()


def test_the_settings_of_the_run_are_the_defaults(here: Path) -> None:
    run = make_run("one", Config(dataset="digits", model="original", batch_size=7, seed=5, keep=9))
    config, workdir = find_run("--workdir", "one", "--keep", "2")
    assert (config, workdir) == (dataclasses.replace(run, workdir=Path("one"), keep=2), Path("one"))


def test_a_contradicting_flag_is_refused(here: Path) -> None:
    make_run("one", Config.of_preset("fast", "cnn", "digits"))
    Path("one/checkpoints/7").mkdir(parents=True)
    before = contents(here)
    with pytest.raises(ConfigError, match=r"one holds a run .*\n.*\n  seed +0 +6") as refusal:
        find_run("--workdir", "one", "--seed", "6")
    assert "--fresh" in str(refusal.value)
    with pytest.raises(ConfigError, match=r"  preset +fast +accurate"):
        find_run("--workdir", "one", "--preset", "accurate")
    Path("one/lock").unlink()
    assert contents(here) == before


@pytest.mark.parametrize(
    ("args", "preset", "model"),
    [
        (["--preset", "accurate"], "accurate", "cnn-large"),
        (["--model", "original-power"], "original", "original-power"),
        (["--preset", "accurate", "--model", "original"], "accurate", "original"),
    ],
)
def test_before_the_first_checkpoint_anything_may_change(args, preset, model, here: Path) -> None:
    make_run("one", dataclasses.replace(Config.of_preset("fast", "cnn", "digits"), seed=5))
    config, _ = find_run("--workdir", "one", *args)
    assert config == dataclasses.replace(Config.of_preset(preset, model, "digits"), workdir=Path("one"))
    config, _ = find_run("--workdir", "one", "--seed", "6")
    assert (config.seed, config.dataset, config.preset) == (6, "digits", "fast")


def test_before_the_first_checkpoint_other_data_keep_preset_and_model(here: Path) -> None:
    make_run("one", Config.of_preset("accurate", "cnn", "mnist"))
    config, _ = find_run("--workdir", "one", "--dataset", "digits")
    assert config == dataclasses.replace(Config.of_preset("accurate", "cnn", "digits"), workdir=Path("one"))


@pytest.mark.parametrize("last", ["mnist", "digits"])
def test_without_flags_the_latest_run_resumes(last: str, here: Path) -> None:
    for name in ("mnist", "digits"):
        make_run(f"runs/{name}", Config(dataset=name))
        os.utime(f"runs/{name}/config.json", (1000, 1000 + (name == last)))
    config, workdir = find_run()
    assert (workdir, config.dataset) == (Path("runs") / last, last)


def test_a_data_dir_means_mnist(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("runs/digits", Config(dataset="digits"))
    monkeypatch.setattr(data, "resolve", lambda name, data_dir, *, notify: "mnist")
    config, workdir = find_run("--data-dir", "files")
    assert (workdir, config.dataset) == (Path("runs/mnist"), "mnist")


def test_fresh_moves_the_old_run_aside(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run("runs/digits", Config(dataset="digits", seed=5, batch_size=7))
    Path("runs/digits/checkpoints").mkdir()
    Path("runs/digits/checkpoints/7").write_bytes(b"seven")
    before = contents(Path("runs/digits"))
    args = ("--dataset", "digits", "--fresh", "--seed", "6")
    config, workdir = find_run(*args)
    assert (workdir.absolute(), config) == (here / "runs" / "digits", cli.parse_config(args))  # nothing of the old run
    assert contents(workdir).keys() == {Path("lock")}
    Path("runs/digits.old-1/lock").unlink()
    assert contents(Path("runs/digits.old-1")) == before
    assert "runs/digits.old-1" in capsys.readouterr().out

    Path("runs/digits/lock").unlink()
    make_run("runs/digits", config)
    find_run("--dataset", "digits", "--fresh")
    assert contents(Path("runs/digits.old-1")) == before
    assert configs.load(Path("runs/digits.old-2/config.json")).seed == 6


def test_fresh_ignores_an_unreadable_config(here: Path) -> None:
    make_run("one", Config(dataset="digits"))
    Path("one/config.json").write_text("{")
    with pytest.raises(ConfigError, match="--fresh"):
        find_run("--workdir", "one")
    find_run("--workdir", "one", "--dataset", "digits", "--fresh")
    assert Path("one.old-1/config.json").read_text() == "{"


def test_fresh_in_the_working_directory_keeps_its_place(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run("one", Config(dataset="digits", seed=5))
    monkeypatch.chdir("one")
    _, workdir = find_run("--workdir", ".", "--dataset", "digits", "--fresh")
    assert contents(here / "one").keys() == {Path("lock")}
    assert workdir == here / "one"
    assert configs.load(here / "one.old-1" / "config.json").seed == 5


def unframed(text: str) -> str:
    """Return tyro's output without frames and line breaks."""
    return " ".join(re.sub(r"[─│╭╮╰╯|+]|--+(?= |$)", " ", text).split())
