"""What a run is: its settings, their checks, the command line made of them, and what two of them differ in.

No JAX here: `--help` and a usage error come at once.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import tyro

T = TypeVar("T")
DatasetName = Literal["auto", "mnist", "fashion_mnist", "kmnist", "digits"]
ModelName = Literal["cnn", "cnn-large", "original", "original-dropout", "original-normalized", "original-power"]
PresetName = Literal["fast", "accurate", "original"]


WhichStep = Annotated[
    Literal["latest", "best"] | int,
    tyro.conf.arg(
        metavar="{latest,best,N}",
        help="Which checkpoint: the latest, the one with the highest test accuracy so far, or that of a step.",
    ),
]
DataDir = Annotated[
    Path | None,
    tyro.conf.arg(
        metavar="DIR",
        help="Folder that holds the four official .gz files of the data set.",
        help_behavior_hint="(default: where the run had them)",
    ),
]


class ConfigError(ValueError):
    """A setting is out of range, a config file cannot be used, or a flag contradicts the run."""


class Preset(NamedTuple):
    """The settings of a preset: how is trained unless the user says otherwise."""

    model: ModelName
    epochs: float
    batch_size: int
    learning_rate: float
    adam_b1: float = 0.9
    adam_b2: float = 0.999
    label_smoothing: float = 0.0
    shift_px: float = 0.0
    rotation_deg: float = 0.0
    zoom: float = 0.0
    average_decay: float = 0.0


PRESETS: dict[PresetName, Preset] = {
    "fast": Preset("cnn", 1.5, 128, 7e-3, adam_b1=0.7, adam_b2=0.9, label_smoothing=0.1),
    "accurate": Preset(
        *("cnn-large", 10, 128, 1e-2),
        adam_b2=0.99,
        label_smoothing=0.1,
        shift_px=2.5,
        rotation_deg=15.0,
        zoom=0.15,
        average_decay=0.999,
    ),
    "original": Preset("original", 10, 50, 1e-4),
}
DIGITS_EPOCHS_FACTOR = 10  # The built-in digits are so few that an epoch of them is soon over.


def _optional(metavar: str, default: str) -> Any:
    """Describe a flag whose default is worked out later."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


def _one_of(names: Any) -> str:
    """Return the metavar of a choice of names."""
    return "{" + ",".join(typing.get_args(names)) + "}"


def _of_preset(metavar: str, field: str) -> Any:
    """Describe a flag whose default depends on the preset."""
    return _optional(
        metavar, ", ".join(f"{preset} {getattr(preset_values, field)}" for preset, preset_values in PRESETS.items())
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a digit classifier. Stop it at any moment; the same command carries on.

    In a directory that holds a run, its settings are the defaults of all flags.
    """

    workdir: Annotated[Path | None, _optional("DIR", "runs/<dataset>")] = None
    """Directory of the run: checkpoints, metrics, events. A run that is there is carried on."""
    dataset: DatasetName = "auto"
    """Images to learn. auto is MNIST where it is on disk or can be downloaded, the built-in digits elsewhere."""
    data_dir: Annotated[Path | None, _optional("DIR", "where TensorFlow Datasets keeps its data")] = None
    """Folder that holds the four official .gz files of the data set."""
    preset: Annotated[
        PresetName | None, _optional(_one_of(PresetName), "original for the original models, fast otherwise")
    ] = None
    """Set of defaults: 99 % in seconds, more in minutes, or as the script trained that this program is modelled on."""
    model: Annotated[ModelName, _of_preset(_one_of(ModelName), "model")] = "cnn"
    """Network to train."""
    epochs: Annotated[float, _of_preset("PASSES", "epochs")] = PRESETS["fast"].epochs
    """Length of the training, in passes over the training images, whole or not; ten times that on built-in digits."""
    steps: Annotated[int | None, _optional("STEPS", "as many as --epochs makes")] = None
    """Length of the training, in updates; wins over --epochs."""
    batch_size: Annotated[int, _of_preset("IMAGES", "batch_size")] = PRESETS["fast"].batch_size
    """Images an update learns from, over all devices together."""
    learning_rate: Annotated[float, _of_preset("RATE", "learning_rate")] = PRESETS["fast"].learning_rate
    """Learning rate of Adam. It rises to this and falls again over the run; with the preset original it is constant."""
    adam_b1: Annotated[float, _of_preset("DECAY", "adam_b1")] = 0.9
    """Decay of Adam's average of the gradients, per update."""
    adam_b2: Annotated[float, _of_preset("DECAY", "adam_b2")] = 0.999
    """Decay of Adam's average of the squared gradients, per update."""
    label_smoothing: Annotated[float, _of_preset("SHARE", "label_smoothing")] = 0.0
    """Share of a label that is spread evenly over all classes in training."""
    shift_px: Annotated[float, _of_preset("PIXELS", "shift_px")] = 0.0
    """In training, images are shifted at random by up to so much, down and to the right and the other way."""
    rotation_deg: Annotated[float, _of_preset("DEGREES", "rotation_deg")] = 0.0
    """In training, images are rotated at random by up to so much, in both directions."""
    zoom: Annotated[float, _of_preset("SHARE", "zoom")] = 0.0
    """In training, images are stretched or shrunk at random by up to this share of their size."""
    average_decay: Annotated[float, _of_preset("DECAY", "average_decay")] = 0.0
    """Decay of an average of the weights, per update, that is evaluated in their place. 0 averages nothing."""
    seed: int = 0
    """Seed of the weights, of the order of the images and of dropout."""
    log_every_steps: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 100
    """Updates that one training line of metrics.jsonl sums up."""
    eval_every_steps: Annotated[int | None, _optional("STEPS", "one epoch")] = None
    """Updates between evaluations on the test images; the end is always evaluated."""
    checkpoint_every_s: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 30.0
    """Seconds between checkpoints: the most that a crash can cost."""
    checkpoint_every_steps: Annotated[int | None, _optional("STEPS", "only the seconds count")] = None
    """Updates between checkpoints, besides those that the seconds ask for."""
    keep: Annotated[int, tyro.conf.arg(metavar="N")] = 3
    """Number of newest checkpoints to keep; the best one is kept besides."""
    mirror: Annotated[str | None, _optional("URL", "no copy")] = None
    """Object store that gets a copy of the checkpoints, s3://BUCKET/PATH or gs://BUCKET/PATH. Say it at each start."""
    lock_wait_s: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 60.0
    """Seconds to wait for another process that is at work in the directory, as one that is just saving to leave."""
    coordinator: Annotated[str | None, _optional("HOST:PORT", "what the scheduler says, or alone")] = None
    """Where process 0 of several is reached by the others. Say the next two as well."""
    num_processes: Annotated[int | None, _optional("N", "what the scheduler says, or 1")] = None
    """Number of processes that train together. 1 trains alone, whatever a scheduler says."""
    process_id: Annotated[int | None, _optional("I", "what the scheduler says, or 0")] = None
    """Which of these processes this is, from 0."""
    peer_timeout_s: Annotated[int, tyro.conf.arg(metavar="SECONDS")] = 60
    """Seconds of silence after which a process of several is taken for dead, and all others leave."""
    preempted_exit_code: Annotated[int, tyro.conf.arg(metavar="CODE")] = 0
    """Exit code after a signal stopped the run and all is saved. 75, say, tells a scheduler to start it again."""
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start anew. A run that is in the directory is moved aside, not deleted."""

    def __post_init__(self) -> None:
        """Check each field by itself."""
        for name, least, most in _RANGES:
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ConfigError(f"{name}={value} is out of range; use a value from {least} to {most}")
        for name in ("epochs", "learning_rate", "checkpoint_every_s"):
            value = getattr(self, name)
            if not 0 < value <= sys.float_info.max:
                raise ConfigError(f"{name}={value} is out of range; use a finite value above 0")
        for name in ("adam_b1", "adam_b2", "label_smoothing", "zoom", "average_decay"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(f"{name}={value} is out of range; use a value from 0 to below 1")
        if self.workdir is not None and re.match(r"[a-z][a-z0-9]+:/", str(self.workdir)):
            raise ConfigError(
                f"workdir={self.workdir} is no directory but an address. A run needs a file system that has renaming "
                "and locks, as NFS and Lustre have and object stores have not; use a directory, and --mirror "
                "for a copy in S3 or Google Cloud Storage"
            )
        if self.mirror is not None and not re.match(r"(s3|gs|file)://.", self.mirror):
            raise ConfigError(
                f"mirror={self.mirror} is no place for a copy; use s3://BUCKET/PATH, gs://BUCKET/PATH or file:///PATH"
            )
        self._check_processes()
        if not 0 <= self.lock_wait_s <= sys.float_info.max:
            raise ConfigError(f"lock_wait_s={self.lock_wait_s} is out of range; use a finite value of 0 or more")

    def _check_processes(self) -> None:
        named = (self.coordinator, self.num_processes, self.process_id)
        if named in ((None, None, None), (None, 1, None)):
            return
        if self.coordinator is None or self.num_processes is None or self.process_id is None:
            raise ConfigError(
                f"coordinator={self.coordinator}, num_processes={self.num_processes} and process_id={self.process_id} "
                "say too little; name all three, or none of them under a scheduler"
            )
        host, _, port = self.coordinator.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port[:6]) < 2**16):
            raise ConfigError(f"coordinator={self.coordinator} is no address; use HOST:PORT, a port below {2**16}")
        if self.process_id >= self.num_processes:
            raise ConfigError(
                f"process_id={self.process_id} is out of range; use 0 to {self.num_processes - 1}, "
                f"for num_processes={self.num_processes}"
            )

    @classmethod
    def of_preset(cls, preset: PresetName | None, model: ModelName, dataset: DatasetName) -> "Config":
        """Return the defaults of a preset, or of the one that suits a model, for a data set.

        The preset's own network takes the place of "cnn", which is what a config has that names none.
        """
        preset = preset or ("original" if model.startswith("original") else "fast")
        preset_values = PRESETS[preset]
        preset_values = preset_values._replace(
            model=preset_values.model if model == "cnn" else model,
            epochs=preset_values.epochs * (DIGITS_EPOCHS_FACTOR if dataset == "digits" else 1),
        )
        return cls(preset=preset, dataset=dataset, **preset_values._asdict())

    @property
    def schedule(self) -> Literal["one-cycle", "constant"]:
        """The course of the learning rate; "one-cycle" depends on the number of steps."""
        return "constant" if self.preset == "original" else "one-cycle"

    def steps_per_epoch(self, train_size: int) -> int:
        """Return the number of whole batches in `train_size` images; the next order deals the others in again.

        Raises:
            ConfigError: a batch would hold more images than there are.
        """
        if self.batch_size > train_size:
            raise ConfigError(f"batch_size={self.batch_size}, but there are {train_size} training images; use fewer")
        return train_size // self.batch_size

    def total_steps(self, train_size: int) -> int:
        """Return the number of updates of the whole training on `train_size` images.

        Raises:
            ConfigError: a batch would hold more images than there are, or the epochs make no step, or too many.
        """
        steps_per_epoch = self.steps_per_epoch(train_size)
        if self.steps is not None:
            return self.steps
        total = float(self.epochs) * steps_per_epoch
        if not 0.5 < total <= _MANY:
            raise ConfigError(f"epochs={self.epochs} makes {total:.10g} steps; use as many as make 1 to {_MANY}")
        return round(total)

    def to_json(self) -> dict[str, Any]:
        """Return the settings that belong to the run, as JSON values. Those of one start alone do not."""
        return {
            name: os.path.abspath(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items()
            if name not in _NOT_OF_THE_RUN
        }


_MANY = 2**31 - 1
_RANGES = (
    ("steps", 1, _MANY),
    ("batch_size", 1, _MANY),
    ("shift_px", 0, 28),
    ("rotation_deg", 0, 180),
    ("seed", 0, 2**32 - 1),
    ("log_every_steps", 1, _MANY),
    ("eval_every_steps", 1, _MANY),
    ("checkpoint_every_steps", 1, _MANY),
    ("keep", 1, _MANY),
    ("preempted_exit_code", 0, 255),
    ("num_processes", 1, _MANY),
    ("process_id", 0, _MANY),
    ("peer_timeout_s", 1, _MANY),
)
_MATHEMATICS = ("preset", *(field for field in Preset._fields if field != "epochs"), "seed")
_NOT_OF_THE_RUN = (
    *("workdir", "lock_wait_s", "fresh", "mirror"),
    *("coordinator", "num_processes", "process_id", "peer_timeout_s"),
)
MAX_CONFIG_BYTES = 2**20
RECORDS = ("config.json", "metrics.jsonl", "events.jsonl")  # A checkpoint is of no use without them.
_FILES = (*RECORDS, "config.json.partial", "lock")
_DIRECTORIES = ("checkpoints", "checkpoints/quarantine", "tensorboard")


def parse(args: Sequence[str], default: Config | None = None) -> Config:
    """Return the config that command-line arguments ask for.

    Args:
        args: the arguments, without the program's name.
        default: what holds where they are silent: the settings of a run that is carried on. Without it, it is the
            preset for the model and the data set that the arguments name.

    Raises:
        SystemExit: an unknown flag or a value out of range, after a message (code 2); or `--help` (code 0).
    """
    if default is None:
        named = parse(args, Config())
        default = Config.of_preset(named.preset, named.model, named.dataset)
    return cli(Config, "train", args, default=default)


def cli(kind: type[T], command: str, args: Sequence[str], **options: Any) -> T:
    """Return what the arguments ask a command for; a message is in colours unless `NO_COLOR` is set (no-color.org).

    Raises:
        SystemExit: bad usage, after a message (code 2); or `--help` (code 0).
    """
    if os.environ.get("NO_COLOR"):
        tyro._experimental_options["ansi_codes"] = False  # It has no other way to ask for that from within.
    return tyro.cli(kind, prog=f"python -m mnist_jax.{command}", args=args, **options)


def holds_a_run(workdir: Path) -> bool:
    """Tell whether a run has begun in a directory."""
    return any((workdir / name).exists() for name in ("config.json", "events.jsonl", "checkpoints"))


def check_holds_a_run(workdir: Path) -> None:
    """Check that a run has begun in a directory, and that what it writes there stays there.

    Raises:
        ConfigError: there is no run, or something else is in the place of a file of it.
    """
    if not holds_a_run(workdir):
        raise ConfigError(f"there is no run in {workdir}")
    check_directory(workdir)


def check_directory(workdir: Path) -> None:
    """Check that what a run writes in its directory stays there.

    Raises:
        ConfigError: a link, a pipe or a device is in the place of a file of the run, and may lead anywhere.
    """
    for names, is_correct, what in ((_FILES, Path.is_file, "file"), (_DIRECTORIES, Path.is_dir, "directory")):
        for name in names:
            path = workdir / name
            if os.path.lexists(path) and (path.is_symlink() or not is_correct(path)):
                raise ConfigError(f"{path} should be a {what} and no link; put one there, or use another --workdir")


def save(config: Config, path: Path) -> None:
    """Write the settings of a run to a JSON file, whole or not at all, also when the power fails."""
    write_whole(path, (json.dumps(config.to_json(), indent=2) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, in the place of one that may be there, whole or not at all.

    Raises:
        OSError: the disk does not take it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)  # It may be a link, which would be followed.
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error


def load(path: Path) -> Config:
    """Read the settings of a run that `save` wrote.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or its values are none of ours.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); restore it, or start anew with --fresh"
        ) from error
    return from_bytes(content, path)


def from_bytes(content: bytes, path: Path | str) -> Config:
    """Return the settings in a JSON file that `save` wrote; `path` says where it lies.

    Raises:
        ConfigError: it is too large or not JSON, or its values are none of ours.
    """
    if len(content) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path} has more than {MAX_CONFIG_BYTES} bytes; restore it, or start anew with --fresh")
    try:
        values = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); restore it, or start anew with --fresh") from error
    return from_json(values, path)


def from_json(values: Any, path: Path | str) -> Config:
    """Return the settings in JSON values, as `Config.to_json` made them; `path` says where they come from.

    Raises:
        ConfigError: a field is unknown, missing, of a wrong type or out of range.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no table of settings; restore it, or start anew with --fresh")
    types = typing.get_type_hints(Config)
    for name in types:
        if name not in values and name not in _NOT_OF_THE_RUN:
            raise ConfigError(f"{path} lacks {name}; restore it, or start anew with --fresh")
    for name, value in values.items():
        if name not in types or name in _NOT_OF_THE_RUN:
            raise ConfigError(f"{path} has a setting {name!r} that is not known here; another version wrote it?")
        if not _fits(value, types[name]):
            wanted = _in_words(types[name])
            raise ConfigError(f"{path}: {name}={value!r} should be {wanted}; restore it, or start anew with --fresh")
    data_dir = None if values["data_dir"] is None else Path(values["data_dir"])
    if data_dir and not _is_path(data_dir):
        raise ConfigError(f"{path}: data_dir={values['data_dir']!r} is no path; restore it, or start anew with --fresh")
    try:
        return Config(**{**values, "data_dir": data_dir})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _fits(value: object, kind: Any) -> bool:
    """Tell whether a JSON value is one of a field's type."""
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if options := typing.get_args(kind):
        return any(_fits(value, option) for option in options)
    return type(value) is (str if kind is Path else kind) or (kind is float and type(value) is int)


def _is_path(path: Path) -> bool:
    """Tell whether a file could have this name at all."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _in_words(kind: Any) -> str:
    """Say what a JSON value of a field's type is."""
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if options := typing.get_args(kind):
        return " or ".join(map(_in_words, options))
    words = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path", type(None): "null"}
    return words[kind]


class Difference(NamedTuple):
    """A setting in which what is asked contradicts the run."""

    field: str
    run: Any
    asked: Any


def contradictions(run: Config, asked: Config) -> Iterator[Difference]:
    """Yield the settings that would change the mathematics of a run that has begun.

    Cadence and housekeeping may change freely. So may the number of steps, unless the learning rate depends on it.
    """
    fields = list(_MATHEMATICS)
    if asked.dataset != "auto":
        fields.append("dataset")
    if run.schedule == "one-cycle":
        fields += ["steps", "epochs"]
    elif asked.steps is not None:
        fields.append("epochs")  # `steps` wins over it: asking for other epochs would be ignored without a word.
    for name in fields:
        before, now = getattr(run, name), getattr(asked, name)
        if before != now:
            yield Difference(name, before, now)


def check_same_mathematics(run: Config, asked: Config, *, where: Path) -> None:
    """Check that a run may be carried on with the settings that are asked; `where` says in the message where it lies.

    Raises:
        ConfigError: they would change its mathematics.
    """
    differences = list(contradictions(run, asked))
    if differences:
        raise ConfigError(describe_contradictions(where, differences))


def describe_contradictions(workdir: Path, differences: Sequence[Difference]) -> str:
    """Return a table of contradictions and the ways out, for the user."""
    table = columns([("field", "run", "asked"), *((row.field, str(row.run), str(row.asked)) for row in differences)])
    return (
        f"{workdir} holds a run with other settings, and these would change its mathematics:\n{table}\n"
        "Leave the flags out to carry that run on, use another --workdir for a second\n"
        "run, or add --fresh to move the old run aside and start anew."
    )


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of equal length as lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
