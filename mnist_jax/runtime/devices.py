"""The devices that a run computes on: their mesh, how arrays lie on it, and what they are called.

This file stands alone; lift it into your own project.
"""

import os
import platform
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH_AXIS = "batch"


def data_mesh() -> Mesh:
    """Return a mesh with one axis, over which batches are split: all devices of all processes."""
    return Mesh(np.asarray(jax.devices()), (BATCH_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole: the train state, the data set."""
    return NamedSharding(mesh, PartitionSpec())


def split_over_batch(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXIS))


def make_global_array(array: np.ndarray[Any, Any], sharding: NamedSharding) -> jax.Array:
    """Return an array on the devices that a sharding names, to which each process gives the parts on its own ones.

    Between processes `jax.device_put` would compare what they bring, and so would make them wait for each other.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def local_replica(tree: Any) -> Any:
    """Return of arrays that lie whole on every device the copies on one device of this process."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def check_batch_divides(batch_size: int, mesh: Mesh) -> None:
    """Raise ValueError unless each device gets the same number of a batch's images."""
    devices = mesh.size
    if batch_size % devices:
        lower = batch_size // devices * devices
        choices = " or ".join(str(size) for size in (lower, lower + devices) if size)
        raise ValueError(f"batch_size={batch_size} does not divide over {devices} devices; use {choices}")


def describe_devices() -> dict[str, Any]:
    """Return what decides, besides the software, which bits a computation ends in, as JSON values.

    `cpu_threads` and `cpu` are null on an accelerator, where they decide nothing. On a CPU, XLA may divide sums by
    the size of its thread pool: the same 24 updates ended with different bits with 1 thread and with 2.
    """
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
        "processes": jax.process_count(),
        "cpu_threads": cpu_threads() if on_cpu else None,
        "cpu": _cpu_model() if on_cpu else None,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def cpu_threads() -> int:
    """Return the size of the thread pool that XLA makes for a CPU device.

    It has a thread for each core that the process may use, unless the environment says otherwise.
    """
    fixed = os.environ.get("PJRT_NPROC") or os.environ.get("NPROC")
    if fixed:
        return int(fixed)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    """Return the name of the processor; its vector instructions are among what the bits depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def set_cpu_threads(threads: int) -> None:
    """Have XLA make its thread pool of a CPU device of this size, on however many cores, for the bits may depend on it.

    Call it before JAX touches a device. A size that the environment asks for stays.
    """
    if not os.environ.get("PJRT_NPROC") and not os.environ.get("NPROC"):
        os.environ["PJRT_NPROC"] = str(threads)


def enable_determinism() -> None:
    """Have XLA use only kernels that give the same bits each time. Call it before JAX touches a device.

    On the CPU they all do. On a GPU some sum in the order in which threads happen to come by.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def share_accelerator(*, on_cpu: bool) -> None:
    """Take of an accelerator, which a run may be using, only what is needed, or nothing and compute on the CPU.

    Call it before JAX touches a device.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if on_cpu:
        jax.config.update("jax_platforms", "cpu")


def enable_compilation_cache() -> None:
    """Keep compiled programs on disk, in `JAX_COMPILATION_CACHE_DIR` or the user's cache, for the next start."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(cache / "mnist_jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
