"""The devices of a run: their mesh, shardings, and what decides the bits of a computation.

This file needs nothing else of the package; copy it into your own project.
"""

import os
import platform
import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

FSDP_AXIS = "fsdp"


def make_mesh(*, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh of devices with the axes "data" and "fsdp". Batches are sharded over both, the state over "fsdp".

    JAX lists the devices of a process one after another, so those that share a state are in one process, if it has
    enough of them.

    Args:
        fsdp: number of devices over which the state is sharded. 1: each device holds all of it.
        devices: by default all devices of all processes.

    Raises:
        ValueError: `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if count % fsdp:
        choices = ", ".join(str(number) for number in range(1, count + 1) if count % number == 0)
        raise ValueError(f"fsdp={fsdp} does not divide the number of devices, {count}; use {choices}")
    return Mesh(np.asarray(devices).reshape(-1, fsdp), ("data", FSDP_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of replicated arrays, such as the dataset."""
    return NamedSharding(mesh, PartitionSpec())


def split_over_batch(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def split_over_fsdp(tree: Any, mesh: Mesh) -> Any:
    """Return the shardings of the leaves of a train state, a tree of `NamedSharding`.

    A leaf is split along its longest dimension that the size of the axis "fsdp" divides. Scalars and leaves without
    such a dimension are replicated: they are small, and padding would be stored and sent too. With `fsdp=1`
    all leaves are replicated.
    """
    parts = mesh.shape[FSDP_AXIS]

    def sharding(leaf: Any) -> NamedSharding:
        divisible = [axis for axis, size in enumerate(leaf.shape) if parts > 1 and size % parts == 0]
        if not divisible:
            return replicated(mesh)
        longest = max(divisible, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, FSDP_AXIS))

    return jax.tree.map(sharding, tree)


def make_global_array(array: np.ndarray[Any, Any], sharding: NamedSharding) -> jax.Array:
    """Return a sharded array of which each process provides the parts on its own devices.

    With several processes `jax.device_put` would compare their arrays, so they would wait for each other.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def check_batch_divides(batch_size: int, mesh: Mesh) -> None:
    """Raise ValueError unless a batch divides evenly over the devices."""
    devices = mesh.size
    if batch_size % devices:
        lower = batch_size // devices * devices
        choices = " or ".join(str(size) for size in (lower, lower + devices) if size)
        raise ValueError(f"batch_size={batch_size} does not divide over {devices} devices; use {choices}")


def describe_devices(*, fsdp: int = 1) -> dict[str, Any]:
    """Return what decides the bits of a computation besides the software, as JSON values.

    On a CPU, XLA may split sums by the size of its thread pool: the same 24 updates ended with different bits with 1
    thread and with 2. `cpu_threads` and `cpu` are None on an accelerator, where they do not matter. There its runtime,
    driver and libraries decide: another version of cuDNN may choose another kernel.
    """
    device = jax.devices()[0]
    on_cpu = device.platform == "cpu"
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": jax.device_count(),
        "processes": jax.process_count(),
        "fsdp": fsdp,
        "cpu_threads": cpu_threads() if on_cpu else None,
        "cpu": _cpu_model() if on_cpu else None,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        **({} if on_cpu else _describe_accelerator(device)),
    }


def _describe_accelerator(device: jax.Device) -> dict[str, str]:
    """Return what computes on an accelerator: runtime, driver, libraries, and settings of the communication."""
    driver = Path("/proc/driver/nvidia/version")
    libraries = ("nvidia-", "jax-cuda", "libtpu")
    return {
        "runtime": device.client.platform_version,
        **({"driver": driver.read_text().partition("\n")[0]} if driver.exists() else {}),
        **{found.name: found.version for found in metadata.distributions() if found.name.startswith(libraries)},
        **{name: value for name, value in os.environ.items() if name.startswith("NCCL_")},
    }


def cpu_threads() -> int:
    """Return the size of XLA's thread pool: as the environment says, or a thread per core that the process may use.

    Raises:
        ValueError: an environment variable is no number of threads.
    """
    for name in ("PJRT_NPROC", "NPROC"):
        if value := os.environ.get(name):
            if not (value.isascii() and value.isdigit() and 0 < int(value) < 2**16):
                raise ValueError(f"{name}={value} is no number of threads; unset it, or use a whole number above 0")
            return int(value)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    """Return the name of the processor. The bits depend on its vector instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def set_cpu_threads(threads: int) -> None:
    """Set the size of XLA's thread pool, unless the environment does. Call it before JAX uses a device."""
    if not os.environ.get("PJRT_NPROC") and not os.environ.get("NPROC"):
        os.environ["PJRT_NPROC"] = str(threads)


def enable_determinism() -> None:
    """Use only deterministic XLA kernels, unless XLA_FLAGS contradicts. Call it before JAX uses a device.

    All CPU kernels are deterministic. Some GPU kernels add in the order in which threads finish.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def are_deterministic(xla_flags: str) -> bool:
    """Return whether XLA_FLAGS leave only deterministic kernels on a GPU; of a repeated flag the last one counts."""
    values = dict(re.findall(r"--(xla_gpu_\w+)=(\w+)", xla_flags.lower()))
    is_off = values.get("xla_gpu_deterministic_ops") in ("false", "0")
    return not is_off or values.get("xla_gpu_exclude_nondeterministic_ops") in ("true", "1")


def on_local_cpu() -> SingleDeviceSharding:
    """Return the sharding of arrays on a CPU of this process, or on its first device if JAX_PLATFORMS excludes CPUs.

    A small result that is computed there does not wait for the calls in flight on an accelerator.
    """
    try:
        return SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        return SingleDeviceSharding(jax.local_devices()[0])


def allocate_on_demand() -> None:
    """Allocate memory of an accelerator as needed, unless the environment says otherwise.

    By default JAX allocates three quarters of it before the first computation. On an H200 that is 105 GB, which took
    1.8 s of each start, and other processes could not use them. Call it before JAX uses a device.
    """
    if not os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE"):
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def use_cpu() -> None:
    """Compute on the CPU, and leave an accelerator to others. Call it before JAX uses a device."""
    jax.config.update("jax_platforms", "cpu")


def initialize_cudnn(device: jax.Device) -> None:
    """Compute a convolution on a GPU, so that its cuDNN is initialized.

    XLA initializes it for the first convolution. If that is recorded as a part of a CUDA graph, it fails with "No DNN
    support for stream" (jax 0.11).
    """
    image, kernel = (jax.device_put(np.ones(shape, np.float32), device) for shape in ((1, 8, 8, 1), (3, 3, 1, 8)))
    layout = ("NHWC", "HWIO", "NHWC")
    jax.block_until_ready(jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=layout))
