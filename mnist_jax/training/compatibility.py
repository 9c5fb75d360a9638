"""What a checkpoint says of the run that wrote it: its config, data, software, settings and devices.

From these it follows whether a run may be carried on here, and whether bit for bit.
"""

import contextlib
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
from mnist_jax.runtime import devices
from mnist_jax.training.data import REGISTRY, Dataset
from mnist_jax.training.train_state import TrainState

MAX_CPU_THREADS = 4096


def prepare_jax(cpu_threads: int | None) -> None:
    """Set what has to be set before JAX touches a device, so that the bits of a run are the same again.

    Args:
        cpu_threads: with how many the run has computed so far, None where that does not matter.
    """
    devices.enable_determinism()
    devices.enable_compilation_cache()
    if cpu_threads is not None:
        devices.set_cpu_threads(cpu_threads)


def cpu_threads_of(checkpoints: Sequence[Checkpoint]) -> int | None:
    """Return with how many threads a run has computed so far, as its newest readable checkpoint says, if it does.

    Args:
        checkpoints: those of the run, oldest first.
    """
    for checkpoint in reversed(checkpoints):
        with contextlib.suppress(CheckpointError, OSError):  # Who restores it tells of that.
            metadata = checkpoint.metadata()
            devices = metadata.get("devices") if isinstance(metadata, dict) else None
            threads = devices.get("cpu_threads") if isinstance(devices, dict) else None
            return threads if type(threads) is int and 0 < threads <= MAX_CPU_THREADS else None
    return None


def describe_environment() -> dict[str, dict[str, Any]]:
    """Return the software, its settings and the devices that the bits of a run depend on, as JSON values."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    settings = ("jax_threefry_partitionable", "jax_default_prng_impl", "jax_default_matmul_precision")
    return {
        "software": {"mnist_jax": mnist_jax.__version__, **{package: version(package) for package in packages}},
        "settings": {setting: str(getattr(jax.config, setting)) for setting in settings},
        "devices": devices.describe_devices(),
    }


def merge_environments(environments: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the environment of several processes: that of the first, and where another has something else, that too.

    Args:
        environments: of each process, in their order, as it describes it.
    """
    first, *others = environments
    joined = {part: dict(values) for part, values in first.items()}
    for index, other in enumerate(others, start=1):
        for part, values in other.items():
            for name, value in values.items():
                if first[part].get(name) != value:
                    joined[part][f"{name} of process {index}"] = value
    return joined


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """Return what a data set is, as JSON values."""
    sizes = {"train_images": len(dataset.train_labels), "test_images": len(dataset.test_labels)}
    return {"name": dataset.name, **sizes, "sha256": dataset.fingerprint}


def check_step(step: int, state: TrainState) -> None:
    """Check that a state has made as many updates as its checkpoint says.

    Raises:
        IncompatibleCheckpointError: it has not; the checkpoint was not written by a run.
    """
    if int(state.step) != step:
        raise IncompatibleCheckpointError(f"the checkpoint of step {step} holds a state of step {int(state.step)}")


def check_metadata(metadata: Any, step: int) -> dict[str, Any]:
    """Return what a run wrote of itself into the checkpoint of a step, if it is that.

    Raises:
        IncompatibleCheckpointError: it is not what a run of ours writes.
    """
    if not isinstance(metadata, dict):
        raise IncompatibleCheckpointError(f"the checkpoint of step {step} says nothing usable of its run")
    parts = ("config", "data", "software", "settings", "devices", "metrics")
    for name, kind in {"reason": str, **dict.fromkeys(parts, dict)}.items():
        if not isinstance(metadata.get(name), kind):
            raise IncompatibleCheckpointError(f"the checkpoint of step {step} says nothing usable of the run's {name}")
    size, sha256 = metadata["metrics"].get("bytes"), metadata["metrics"].get("sha256")
    if type(size) is not int or size < 0 or not isinstance(sha256, str):
        raise IncompatibleCheckpointError(
            f"the checkpoint of step {step} says nothing usable of the run's metrics.jsonl"
        )
    return metadata


class Data(NamedTuple):
    """Which data set a run learns, and how many images are in its two parts."""

    name: str
    train_images: int
    test_images: int


def data_of(metadata: Any, step: int) -> Data:
    """Return what the checkpoint of a step says of the data.

    Raises:
        IncompatibleCheckpointError: it is not what a run of ours writes.
    """
    found = Data(*(check_metadata(metadata, step)["data"].get(name) for name in Data._fields))
    is_size = (type(size) is int and 0 < size < 2**31 for size in found[1:])
    if found.name not in (*REGISTRY, "digits") or not all(is_size):
        raise IncompatibleCheckpointError(f"the checkpoint of step {step} says nothing usable of the run's data")
    return found


def check_same_run(metadata: Mapping[str, Any], config: Config, dataset: Dataset, *, where: Path) -> None:
    """Check that a config and a data set are those with which the run that wrote `metadata` can be carried on.

    Raises:
        ConfigError: the run began with other data, or its mathematics would change.
    """
    configs.check_same_mathematics(configs.from_json(metadata["config"], where), config, where=where)
    if metadata["data"] != describe_data(dataset):
        raise ConfigError(f"the run began with other data: {metadata['data']}, and this is {describe_data(dataset)}")


def diff_environment(metadata: Mapping[str, Any], environment: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what differs from the environment in `metadata`; where nothing does, a run resumes bit for bit."""
    return [
        f"{part} {name} {metadata[part].get(name)} -> {environment[part].get(name)}"
        for part in environment
        for name in sorted(metadata[part].keys() | environment[part].keys())
        if metadata[part].get(name) != environment[part].get(name)
    ]
