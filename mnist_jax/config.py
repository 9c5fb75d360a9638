"""The settings of a run: their rules, the file config.json, and what may change in it.

Imports no JAX, so that `--help` and usage errors come at once.
"""

import contextlib
import dataclasses
import errno
import inspect
import itertools
import json
import math
import os
import re
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

T = TypeVar("T")
DatasetName = Literal["auto", "mnist", "fashion_mnist", "kmnist", "digits", "idx"]
ModelName = Literal[
    "cnn", "cnn-tiny", "cnn-large", "original", "original-dropout", "original-normalized", "original-power"
]
PreemptionNotice = Literal["auto", "gcp", "aws", "azure", "none"]
PresetName = Literal["fast", "accurate", "original"]
ScheduleName = Literal["linear", "cosine", "constant"]

WhichStep = Annotated[
    Literal["latest", "best"] | int,
    tyro.conf.arg(
        metavar="{latest,best,N}",
        help="Checkpoint to use: the latest, the one with the highest test accuracy so far, or the one of a step.",
    ),
]
DataDir = Annotated[
    Path | None,
    tyro.conf.arg(
        metavar="DIR",
        help="Folder with the dataset, in one of the layouts of docs/data.md.",
        help_behavior_hint="(default: the one that the run used)",
    ),
]

PRESETS: dict[PresetName, dict[str, Any]] = {
    "fast": {
        "model": "cnn",
        "epochs": 1,
        "batch_size": 128,
        "learning_rate": 1e-2,
        "schedule": "linear",
        "adam_b1": 0.7,
        "adam_b2": 0.9,
        "label_smoothing": 0.1,
    },
    "accurate": {
        "model": "cnn-large",
        "epochs": 10,
        "batch_size": 128,
        "learning_rate": 1e-2,
        "schedule": "cosine",
        "adam_b2": 0.99,
        "label_smoothing": 0.1,
        "shift_px": 2.5,
        "rotation_deg": 15.0,
        "zoom": 0.15,
        "average_decay": 0.999,
    },
    "original": {
        "model": "original",
        "epochs": 10,
        "batch_size": 50,
        "learning_rate": 1e-4,
        "schedule": "constant",
    },
}
DIGITS_EPOCHS_FACTOR = 10  # The built-in digits are few, so an epoch of them is short.


class ConfigError(ValueError):
    """A setting is out of range, a config file cannot be used, or a flag contradicts the run."""


def _flag(metavar: str, default: str | None = None) -> Any:
    """Describe a flag; `default` replaces the default value in the help."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=default and f"(default: {default})")


def _choice(names: Any, default: str) -> Any:
    """Describe a flag that takes one of some names."""
    return _flag("{" + ",".join(typing.get_args(names)) + "}", default)


def _by_preset(field: str) -> str:
    """Return the default of a flag that depends on the preset."""
    return ", ".join(f"{values[field]} for {preset}" for preset, values in PRESETS.items() if field in values)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a digit classifier. Stop it at any moment; the same command resumes.

    In a directory that holds a run, the settings of that run are the defaults.
    """

    workdir: Annotated[Path | None, _flag("DIR", "runs/<dataset>")] = None
    """Run directory: checkpoints, metrics, events. If it holds a run, that run is resumed."""
    dataset: DatasetName = "auto"
    """Images to train on. auto is MNIST if it is on disk or can be downloaded, else the built-in digits. idx are your
    own, in --data-dir."""
    data_dir: Annotated[Path | None, _flag("DIR", "the usual folders, see docs/data.md, else a download")] = None
    """Folder with the dataset, in one of the layouts of docs/data.md."""
    preset: Annotated[PresetName | None, _choice(PresetName, "original for the original models, else fast")] = None
    """Set of defaults. fast: 99 % in seconds. accurate: 99.6 % in minutes. original: like the TensorFlow 1 script."""
    model: Annotated[ModelName, _choice(ModelName, _by_preset("model"))] = "cnn"
    """Network to train."""
    init_from: Annotated[Path | None, _flag("RUN[@best|@STEP]", "random weights")] = None
    """Run directory whose weights a new run starts from: those of the latest checkpoint, the best, or one of a step."""
    epochs: Annotated[float, _flag("EPOCHS", _by_preset("epochs"))] = 1.0
    """Length of the training in passes over the images. On the built-in digits the default is ten times higher."""
    steps: Annotated[int | None, _flag("STEPS", "computed from --epochs")] = None
    """Length of the training in updates. Overrides --epochs."""
    batch_size: Annotated[int, _flag("IMAGES", _by_preset("batch_size"))] = 128
    """Images per update, over all devices together."""
    learning_rate: Annotated[float, _flag("RATE", _by_preset("learning_rate"))] = 1e-2
    """Learning rate of Adam, at the peak of the schedule."""
    schedule: Annotated[ScheduleName, _choice(ScheduleName, _by_preset("schedule"))] = "linear"
    """Learning rate over the training. linear and cosine rise to the peak and fall to almost 0 at the end, so they
    depend on its length."""
    adam_b1: Annotated[float, _flag("DECAY", f"{_by_preset('adam_b1')}, else 0.9")] = 0.9
    """Decay of Adam's mean of the gradients, per update."""
    adam_b2: Annotated[float, _flag("DECAY", f"{_by_preset('adam_b2')}, else 0.999")] = 0.999
    """Decay of Adam's mean of the squared gradients, per update."""
    label_smoothing: Annotated[float, _flag("FRACTION", f"{_by_preset('label_smoothing')}, else 0")] = 0.0
    """Fraction of each label that is spread evenly over all classes in training."""
    shift_px: Annotated[float, _flag("PIXELS", f"{_by_preset('shift_px')}, else 0")] = 0.0
    """Augmentation: largest random shift, in each direction."""
    rotation_deg: Annotated[float, _flag("DEGREES", f"{_by_preset('rotation_deg')}, else 0")] = 0.0
    """Augmentation: largest random rotation, in both directions."""
    zoom: Annotated[float, _flag("FRACTION", f"{_by_preset('zoom')}, else 0")] = 0.0
    """Augmentation: largest random change of height and of width, as a fraction of the size."""
    average_decay: Annotated[float, _flag("DECAY", f"{_by_preset('average_decay')}, else 0")] = 0.0
    """Decay of the moving average (EMA) of the weights, per update. The average is evaluated. 0 turns it off."""
    fsdp: Annotated[int, _flag("N")] = 1
    """Number of devices over which parameters and optimizer state are sharded. All devices share each batch."""
    seed: int = 0
    """Random seed of the initial weights, the order of the images, augmentation and dropout."""
    log_every_steps: Annotated[int, _flag("STEPS")] = 100
    """Updates per line of training metrics."""
    eval_every_steps: Annotated[int | None, _flag("STEPS", "one epoch")] = None
    """Updates between evaluations on the test images. The last step is always evaluated."""
    checkpoint_every_s: Annotated[float, _flag("SECONDS")] = 30.0
    """Seconds between checkpoints. A crash loses about this much work."""
    checkpoint_every_steps: Annotated[int | None, _flag("STEPS", "none")] = None
    """Updates between checkpoints, in addition to --checkpoint-every-s."""
    keep: Annotated[int, _flag("N")] = 3
    """Number of newest checkpoints to keep, in addition to the best one."""
    mirror: Annotated[str | None, _flag("URL", "no copy")] = None
    """Object store for a copy: s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH. To be given at each start."""
    lock_wait_s: Annotated[float, _flag("SECONDS")] = 60.0
    """Seconds to wait for another process that uses the run directory."""
    coordinator: Annotated[str | None, _flag("HOST:PORT", "from the scheduler, if any")] = None
    """Address of process 0. To start several processes by hand, give this flag and the next two to each."""
    num_processes: Annotated[int | None, _flag("N", "from the scheduler, else 1")] = None
    """Number of processes that train together. 1 ignores the scheduler."""
    process_id: Annotated[int | None, _flag("I", "from the scheduler, else 0")] = None
    """Index of this process, from 0."""
    peer_timeout_s: Annotated[int, _flag("SECONDS")] = 60
    """Seconds without a sign of life after which a process counts as lost and the others exit."""
    preemption_notice: PreemptionNotice = "auto"
    """Cloud whose notice of the end of this spot machine stops the run, as a signal does. auto: the cloud that the
    machine is in, if any. Not stored: it belongs to the machine."""
    preempted_exit_code: Annotated[int, _flag("CODE")] = 0
    """Exit code of a run that a signal or a notice stopped. Example: 75 for a scheduler that restarts on it."""
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start over. A run in the directory is moved aside, not deleted."""

    def __post_init__(self) -> None:
        """Check the rules of all fields.

        Raises:
            ConfigError: a value breaks a rule.
        """
        for low, high, rule, names in _RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and not low <= value <= high:
                    raise ConfigError(f"{name}={value} is out of range; use a value {rule}")
        if self.workdir is not None and is_address(self.workdir):
            raise ConfigError(
                f"workdir={self.workdir} is a URL, but a run needs a file system with rename and locks; "
                "use a directory, and --mirror for a copy in an object store"
            )
        if self.data_dir is not None and is_address(self.data_dir):
            raise ConfigError(f"data_dir={self.data_dir} is an address; copy the files to a folder, and name that")
        if self.mirror is not None and not re.match(r"(s3|gs|az|file)://.", self.mirror):
            shown = re.sub("//[^/]*@", "//", re.split("[?#]", self.mirror)[0])  # The rest may be a password.
            raise ConfigError(
                f"mirror={shown} is not a URL of an object store; "
                "use s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH or file:///PATH"
            )
        self._check_processes()

    def _check_processes(self) -> None:
        fields = self.coordinator, self.num_processes, self.process_id
        if fields in ((None, None, None), (None, 1, None)):
            return
        if self.coordinator is None or self.num_processes is None or self.process_id is None:
            raise ConfigError(
                "coordinator={}, num_processes={} and process_id={} are incomplete; give all three, "
                "or none of them under a scheduler".format(*fields)
            )
        host, _, port = self.coordinator.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port[:6]) < 2**16):
            raise ConfigError(f"coordinator={self.coordinator} is not an address; use HOST:PORT, a port below {2**16}")
        if self.process_id >= self.num_processes:
            raise ConfigError(
                f"process_id={self.process_id} is out of range; use 0 to {self.num_processes - 1} "
                f"with num_processes={self.num_processes}"
            )

    @classmethod
    def of_preset(cls, preset: PresetName | None, model: ModelName, dataset: DatasetName) -> "Config":
        """Return the defaults of a preset on a dataset. Without a preset, the model decides.

        The model of the preset replaces "cnn", because "cnn" is also the value of a config that names no model.
        """
        preset = preset or ("original" if model.startswith("original") else "fast")
        values = dict(PRESETS[preset])
        if model != "cnn":
            values["model"] = model
        if dataset == "digits":
            values["epochs"] *= DIGITS_EPOCHS_FACTOR
        return cls(preset=preset, dataset=dataset, **values)

    def steps_per_epoch(self, train_size: int) -> int:
        """Return the number of whole batches in `train_size` images. The rest is shuffled into the next epoch.

        Raises:
            ConfigError: a batch is larger than the training set.
        """
        if self.batch_size > train_size:
            raise ConfigError(f"batch_size={self.batch_size}, but there are {train_size} training images; use fewer")
        return train_size // self.batch_size

    def total_steps(self, train_size: int) -> int:
        """Return the number of updates of the whole training on `train_size` images.

        Raises:
            ConfigError: a batch is larger than the training set, or the epochs make no step or too many.
        """
        steps_per_epoch = self.steps_per_epoch(train_size)
        if self.steps is not None:
            return self.steps
        total = float(self.epochs) * steps_per_epoch
        if not 0.5 < total <= MAX_COUNT:
            raise ConfigError(f"epochs={self.epochs} makes {total:.10g} steps; use epochs that make 1 to {MAX_COUNT}")
        return round(total)

    def to_json(self) -> dict[str, Any]:
        """Return the settings of the run as JSON values. The settings of a single start are left out."""
        return {
            name: os.path.abspath(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items()
            if name not in _NOT_OF_THE_RUN
        }


MAX_COUNT = 2**31 - 1
_FINITE, _ABOVE_0, _BELOW_1 = sys.float_info.max, math.ulp(0), math.nextafter(1, 0)
_RANGES: tuple[tuple[float, float, str, tuple[str, ...]], ...] = (
    (1, MAX_COUNT, f"from 1 to {MAX_COUNT}", ("steps", "batch_size", "log_every_steps", "eval_every_steps", "fsdp")),
    (1, MAX_COUNT, f"from 1 to {MAX_COUNT}", ("checkpoint_every_steps", "keep", "num_processes", "peer_timeout_s")),
    (0, MAX_COUNT, f"from 0 to {MAX_COUNT}", ("process_id",)),
    (0, 2**32 - 1, f"from 0 to {2**32 - 1}", ("seed",)),
    (0, 255, "from 0 to 255", ("preempted_exit_code",)),
    (0, 28, "from 0 to 28", ("shift_px",)),
    (0, 180, "from 0 to 180", ("rotation_deg",)),
    (0, _BELOW_1, "from 0 to below 1", ("adam_b1", "adam_b2", "label_smoothing", "zoom", "average_decay")),
    (0, _FINITE, "that is finite and 0 or more", ("lock_wait_s",)),
    (_ABOVE_0, _FINITE, "that is finite and above 0", ("epochs", "learning_rate", "checkpoint_every_s")),
)
# What a run computes. The dataset and the length are compared apart.
MATHEMATICS = (
    *("preset", "model", "batch_size", "learning_rate", "schedule", "adam_b1", "adam_b2", "label_smoothing"),
    *("shift_px", "rotation_deg", "zoom", "average_decay", "seed", "init_from"),
)
# Fields that runs of older versions lack, each with the value that means what those versions did.
_ADDED_FIELDS = {"init_from": None, "fsdp": 1}
# Settings of a single start.
_NOT_OF_THE_RUN = (
    *("workdir", "lock_wait_s", "fresh", "mirror", "preemption_notice"),
    *("coordinator", "num_processes", "process_id", "peer_timeout_s"),
)
MAX_CONFIG_BYTES = 2**20
RECORDS = ("config.json", "metrics.jsonl", "events.jsonl")  # A checkpoint is useless without them.
_FILES = (*RECORDS, "config.json.partial", "lock")
# Errors that may not come again: the same command may succeed later.
_TRANSIENT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC, errno.EDQUOT, errno.EIO)
_DIRECTORIES = (
    *("checkpoints", "checkpoints/quarantine"),
    *("tensorboard", "tensorboard/train", "tensorboard/test", "tensorboard/report"),
)


def split_init_from(init_from: Path) -> tuple[Path, WhichStep]:
    """Return the run directory and the checkpoint that `init_from` names: RUN, RUN@latest, RUN@best or RUN@STEP."""
    run, _, which = str(init_from).rpartition("@")
    if run and which in ("latest", "best"):
        return Path(run), typing.cast(WhichStep, which)
    if run and re.fullmatch("[0-9]{1,18}", which):
        return Path(run), int(which)
    return init_from, "latest"


def absolute_init_from(config: Config) -> Config:
    """Return a config whose `init_from` is absolute, because a restart may happen in another working directory."""
    if config.init_from is None:
        return config
    return dataclasses.replace(config, init_from=Path(os.path.abspath(config.init_from)))


def is_address(path: Path | str) -> bool:
    """Return whether a path is a URL such as gs://bucket/path, of which `Path` makes gs:/bucket/path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) is not None


def holds_a_run(workdir: Path) -> bool:
    """Return whether a directory holds a run."""
    return any((workdir / name).exists() for name in ("config.json", "events.jsonl", "checkpoints"))


def check_holds_a_run(workdir: Path) -> None:
    """Check that a directory holds a run, and that all files of the run are inside it.

    Raises:
        ConfigError: there is no run, or a file of it is not a file of its own.
    """
    if not holds_a_run(workdir):
        raise ConfigError(f"there is no run in {workdir}")
    check_directory(workdir)


def check_directory(workdir: Path) -> None:
    """Check that all that a run writes stays inside its directory.

    Raises:
        ConfigError: a link, a pipe or a device has the name of a file of the run; it may lead anywhere.
    """
    for names, is_correct, kind in ((_FILES, Path.is_file, "file"), (_DIRECTORIES, Path.is_dir, "directory")):
        for name in names:
            path = workdir / name
            if os.path.lexists(path) and (path.is_symlink() or not is_correct(path)):
                raise ConfigError(f"{path} must be a {kind}, not a link; replace it, or use another --workdir")


def directory_error(workdir: Path, error: OSError) -> OSError | ConfigError:
    """Return the error to raise if a run cannot use its directory: an OSError if the same start may succeed later."""
    what = f"{workdir} cannot hold a run ({error})"
    if error.errno in _TRANSIENT:
        return OSError(f"{what}; free space, raise the limits of this process or check the disk, and start again")
    return ConfigError(f"{what}; choose another --workdir")


def save(config: Config, path: Path) -> None:
    """Write the settings of a run to a JSON file, atomically and durably."""
    write_whole(path, (json.dumps(config.to_json(), indent=2) + "\n").encode())


def write_whole(path: Path, content: bytes | bytearray) -> None:
    """Write or replace a file, atomically and durably.

    Raises:
        OSError: the file cannot be written. The old one is unchanged, unless only the fsync of the rename failed.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)  # If it is a link, opening it would follow it.
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _fsync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error


def move_aside(path: Path) -> Path:
    """Rename a file or a directory to `<name>.old-1`, or the next number that is free, and return its new path."""
    paths = (path.with_name(f"{path.name}.old-{number}") for number in itertools.count(1))
    return path.rename(next(path for path in paths if not os.path.lexists(path)))


def _fsync_directory(directory: Path) -> None:
    # As `checkpoint.integrity.fsync_path`, whose module imports JAX; that package is to be copied without this one.
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems do not support it for directories.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def load(path: Path) -> Config:
    """Read the settings of a run that `save` wrote.

    Raises:
        ConfigError: the file cannot be read, or is not what `save` writes.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise _unusable(path, f"cannot be read ({error.strerror})") from error
    return from_bytes(content, path)


def from_bytes(content: bytes, path: Path | str) -> Config:
    """Return the settings in the content of a file that `save` wrote; `path` is for messages.

    Raises:
        ConfigError: the content is not what `save` writes.
    """
    if len(content) > MAX_CONFIG_BYTES:
        raise _unusable(path, f"has more than {MAX_CONFIG_BYTES} bytes")
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise _unusable(path, f"is not JSON ({error})") from error
    return from_json(values, path)


def from_json(values: Any, path: Path | str) -> Config:
    """Return the settings in JSON values that `Config.to_json` made; `path` is for messages.

    Raises:
        ConfigError: a field is unknown, missing, of a wrong type or out of range.
    """
    if not isinstance(values, dict):
        raise _unusable(path, "is not a JSON object")
    types = {name: kind for name, kind in typing.get_type_hints(Config).items() if name not in _NOT_OF_THE_RUN}
    # In versions before 0.5 the preset decided.
    schedule = "constant" if values.get("preset") == "original" else "cosine"
    values = {**_ADDED_FIELDS, "schedule": schedule, **values}
    for name in types.keys() - values.keys():
        raise _unusable(path, f"has no setting {name!r}")
    for name, value in values.items():
        if name not in types:
            raise _unusable(path, f"has an unknown setting {name!r}")
        if not _has_type(value, types[name]):
            raise _unusable(path, f"has {name}={value!r}, which should be {inspect.formatannotation(types[name])}")
    paths = {name: Path(values[name]) for name in ("data_dir", "init_from") if values[name] is not None}
    try:
        return Config(**{**values, **paths})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _unusable(path: Path | str, problem: str) -> ConfigError:
    return ConfigError(f"{path} {problem}; restore the file, or start over with --fresh")


def _has_type(value: object, kind: Any) -> bool:
    """Return whether a JSON value has the type of a field."""
    options = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return value in options
    if options:
        return any(_has_type(value, option) for option in options)
    if kind is Path:
        return isinstance(value, str) and _is_path(value)
    return type(value) is kind or (kind is float and type(value) is int)


def _is_path(text: str) -> bool:
    """Return whether a file could have this path."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def contradictions(run: Config, asked: Config) -> list[tuple[str, Any, Any]]:
    """Return the settings that would change the mathematics of a run that has begun: field, old value, new value.

    Cadence and housekeeping may change. The number of steps may change unless the learning rate depends on it.
    """
    fields = list(MATHEMATICS)
    if asked.dataset != "auto":
        fields.append("dataset")
    if run.schedule != "constant":
        fields += ["steps", "epochs"]
    elif asked.steps is not None:
        fields.append("epochs")  # `steps` overrides it: other epochs would be ignored silently.
    pairs = ((name, getattr(run, name), getattr(asked, name)) for name in fields)
    return [(name, old, new) for name, old, new in pairs if old != new]


def check_same_mathematics(run: Config, asked: Config, *, where: Path) -> None:
    """Check that a run may resume with the settings asked for; `where` is for messages.

    Raises:
        ConfigError: the settings would change its mathematics.
    """
    if rows := contradictions(run, asked):
        table = columns([("field", "run", "asked"), *(tuple(map(str, row)) for row in rows)])
        is_longer = run.schedule != "constant" and {"steps", "epochs"} & {name for name, _, _ in rows}
        further = (
            f"Its learning rate depends on its length. To train further, start a new run from its weights:\n"
            f"--init-from {where} --workdir DIR.\n"
        )
        raise ConfigError(
            f"{where} holds a run with other settings; these would change its mathematics:\n{table}\n"
            f"{further if is_longer else ''}"
            "Leave out these flags to resume the run, use another --workdir for a second run,\n"
            "or add --fresh to move the run aside and start over."
        )


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of equal length as lines of aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
