"""The metadata of a checkpoint: config, data, software, settings and devices of the run that wrote it.

They decide whether a run may resume here, and whether it resumes bit for bit.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

import mnist_jax
from mnist_jax import config as configs
from mnist_jax.checkpoint.checkpoint import Checkpoint
from mnist_jax.checkpoint.integrity import CheckpointError, IncompatibleCheckpointError
from mnist_jax.config import Config, ConfigError
from mnist_jax.console import print_stderr
from mnist_jax.records.metrics import parse_metrics
from mnist_jax.runtime import compilation_cache, devices
from mnist_jax.training.data import MAX_CLASSES, MAX_SIDE_PX, REGISTRY, Dataset
from mnist_jax.training.train_state import TrainState

MAX_CPU_THREADS = 4096

# Settings of JAX for other numbers, or for debugging, with which the training does not work. The values work.
REQUIRED_SETTINGS = {
    "jax_enable_x64": False,
    "jax_disable_jit": False,
    "jax_numpy_rank_promotion": "allow",
    "jax_numpy_dtype_promotion": "standard",
    **dict.fromkeys([f"jax_transfer_guard{kind}" for kind in ("", "_host_to_device", "_device_to_host")], "allow"),
}
# Settings of JAX that cannot change a number, by a part of their names. All others are recorded.
_NO_NUMBERS = re.compile(
    "cache|log|dump|traceback|timeout|cross_host|proxy|pprint|leak|explain|captured|embedded|source|export|serializ"
    "|visible|preemption|recoverab|distributed|mock|transfer_guard|check|profil|xla_backend|platform|collectives"
)


def prepare_jax(cpu_threads: int | None) -> None:
    """Configure JAX so that a run continues with the same bits. Call it before JAX touches a device.

    Args:
        cpu_threads: the size of XLA's thread pool that the run has used, None if that does not matter.

    Raises:
        ConfigError: an environment variable has a value with which the training does not work.
    """
    for name, required in REQUIRED_SETTINGS.items():
        if (value := getattr(jax.config, name)) not in (required, None):
            raise ConfigError(f"{name.upper()}={value}: the training works only with {required}; unset it")
    try:
        devices.cpu_threads()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    devices.enable_determinism()
    devices.allocate_on_demand()
    if jax.config.values["jax_default_matmul_precision"] is None:
        # The default of NVIDIA's GPUs: products of numbers with 10 fraction bits, sums in float32. Set explicitly, it
        # is recorded in each checkpoint. On a CPU it changes no bit; a TPU multiplies three times for it.
        jax.config.update("jax_default_matmul_precision", "tensorfloat32")
    try:
        compilation_cache.enable(devices.cpu_threads)
    except (OSError, RuntimeError) as error:
        print_stderr(f"notice: compiled programs are not cached ({error}); set XDG_CACHE_HOME to a writable folder")
    if cpu_threads is not None:
        devices.set_cpu_threads(cpu_threads)


def initialize_devices() -> None:
    """Initialize JAX's backend, which waits for all processes.

    Raises:
        ConfigError: the platform that JAX_PLATFORMS names cannot be used.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX 0.10 asserts where a known platform has no device.
        platforms = jax.config.values["jax_platforms"]
        if not platforms:
            raise
        reason = str(error).partition("\n")[0] or "it has no device here"
        raise ConfigError(f"JAX_PLATFORMS={platforms} cannot be used: {reason}; unset it, or set it to cpu") from error


def cpu_threads_of(checkpoints: Sequence[Checkpoint]) -> int | None:
    """Return the size of XLA's thread pool from the newest readable checkpoint, None if it has none.

    Args:
        checkpoints: the checkpoints of the run, oldest first.
    """
    for checkpoint in reversed(checkpoints):
        with contextlib.suppress(CheckpointError, OSError):  # Restoring it reports the error.
            metadata = checkpoint.metadata()
            devices = metadata.get("devices") if isinstance(metadata, dict) else None
            threads = devices.get("cpu_threads") if isinstance(devices, dict) else None
            return threads if type(threads) is int and 0 < threads <= MAX_CPU_THREADS else None
    return None


def describe_environment(*, fsdp: int = 1) -> dict[str, dict[str, Any]]:
    """Return what the bits of a run depend on, as JSON values: software, settings and devices.

    `fsdp` is the number of devices over which the state is sharded.
    """
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    settings = {name: str(value) for name, value in jax.config.values.items() if not _NO_NUMBERS.search(name)}
    return {
        "software": {"mnist_jax": mnist_jax.__version__, **{package: version(package) for package in packages}},
        "settings": dict(sorted(settings.items())),
        "devices": devices.describe_devices(fsdp=fsdp),
    }


def merge_environments(environments: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the environment of several processes: that of process 0, and what differs in the others.

    Args:
        environments: what `describe_environment` returned in each process, in their order.
    """
    first, *others = environments
    merged = {part: dict(values) for part, values in first.items()}
    for index, other in enumerate(others, start=1):
        for part, values in other.items():
            for name, value in values.items():
                if first[part].get(name) != value:
                    merged[part][f"{name} of process {index}"] = value
    return merged


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """Return name, size and SHA-256 of a dataset, as JSON values; of the user's images also shape and classes."""
    sizes = {"train_images": len(dataset.train_labels), "test_images": len(dataset.test_labels)}
    if dataset.name == "idx":
        height, width = dataset.image_shape
        sizes |= {"height": height, "width": width, "classes": len(dataset.class_names)}
    return {"name": dataset.name, **sizes, "sha256": dataset.fingerprint}


def check_step(step: int, state: TrainState) -> None:
    """Check that the state in a checkpoint is that of its step.

    Raises:
        IncompatibleCheckpointError: it is not; the checkpoint was not written by a run.
    """
    if int(state.step) != step:
        raise IncompatibleCheckpointError(f"the checkpoint of step {step} holds a state of step {int(state.step)}")


def check_metadata(metadata: Any, step: int) -> dict[str, Any]:
    """Check that the metadata of a checkpoint has the form that a run writes, and return it.

    Raises:
        IncompatibleCheckpointError: it has another form.
    """
    if not isinstance(metadata, dict):
        raise _invalid(step, "not a JSON object")
    parts = ("config", "data", "software", "settings", "devices", "metrics")
    for name, kind in {"reason": str, **dict.fromkeys(parts, dict)}.items():
        if not isinstance(metadata.get(name), kind):
            raise _invalid(step, name)
    lines = metadata["metrics"].get("lines")
    if not isinstance(lines, str) or not _are_metrics(lines):
        raise _invalid(step, "metrics")
    return metadata


def _are_metrics(lines: str) -> bool:
    content = lines.encode(errors="replace")
    return b"".join(line for _, line in parse_metrics(content.splitlines(keepends=True))).decode() == lines


class Data(NamedTuple):
    """The dataset of a run: its name, the number of images in its two parts, their shape, and the classes."""

    name: str
    train_images: int
    test_images: int
    height: int = 28
    width: int = 28
    classes: int = 10


def data_of(metadata: Any, step: int) -> Data:
    """Return the dataset in the metadata of a checkpoint.

    Raises:
        IncompatibleCheckpointError: the metadata does not have the form that a run writes.
    """
    described = check_metadata(metadata, step)["data"]
    names = Data._fields if described.get("name") == "idx" else Data._fields[:3]
    found = Data(*(described.get(name) for name in names))
    is_size = (type(size) is int and 0 < size < 2**31 for size in found[1:])
    if found.name not in (*REGISTRY, "digits", "idx") or not all(is_size):
        raise _invalid(step, "data")
    if max(found.height, found.width) > MAX_SIDE_PX or found.classes > MAX_CLASSES:
        raise _invalid(step, "data")
    return found


def _invalid(step: int, part: str) -> IncompatibleCheckpointError:
    return IncompatibleCheckpointError(f"the checkpoint of step {step} has invalid metadata: {part}")


def check_same_run(metadata: Mapping[str, Any], config: Config, dataset: Dataset, *, where: Path) -> None:
    """Check that the run that wrote `metadata` may resume with a config and a dataset; `where` is for messages.

    Raises:
        ConfigError: the run began with other data, or its mathematics would change.
    """
    configs.check_same_mathematics(configs.from_json(metadata["config"], where), config, where=where)
    if metadata["data"] != describe_data(dataset):
        raise ConfigError(
            f"the dataset differs from that of the run: {metadata['data']}, but these are {describe_data(dataset)}"
        )


def check_length(step: int, config: Config, train_size: int) -> None:
    """Check that a run is not asked to end before the step that it has reached.

    Raises:
        ConfigError: it is.
    """
    total_steps = config.total_steps(train_size)
    if step > total_steps:
        makes = "is" if config.steps is not None else f"makes {total_steps} steps,"
        asked = f"steps={config.steps}" if config.steps is not None else f"epochs={config.epochs}"
        raise ConfigError(
            f"{asked} {makes} below the {step} steps that the run has made; use --steps {step} or more, or another "
            "--workdir"
        )


def diff_environment(metadata: Mapping[str, Any], environment: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what differs from the environment in `metadata`. If nothing does, the run resumes bit for bit.

    Nondeterministic kernels are also listed, because with them each attempt may compute different bits.
    """
    differences = [
        f"{part} {name} {metadata[part].get(name)} -> {described.get(name)}"
        for part, described in environment.items()
        for name in sorted(metadata[part].keys() | described.keys())
        if metadata[part].get(name) != described.get(name)
    ]
    described = environment["devices"]
    flags = [value for name, value in described.items() if name.startswith("xla_flags")]  # of each process
    if described.get("platform") != "cpu" and not all(map(devices.are_deterministic, flags)):
        differences.append("devices xla_flags allow kernels that are not deterministic")
    return differences
