import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from runs import in_new_process

from mnist_jax.runtime import devices


@pytest.mark.parametrize(
    ("batch_size", "count", "message"),
    [
        (100, 8, "batch_size=100 does not divide over 8 devices; use 96 or 104"),
        (7, 2, "batch_size=7 does not divide over 2 devices; use 6 or 8"),
        (5, 8, "batch_size=5 does not divide over 8 devices; use 8"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_ones_that_do(batch_size, count, message):
    with pytest.raises(ValueError, match="batch_size") as raised:
        devices.check_batch_divides(batch_size, mesh_of(count))
    assert str(raised.value) == message


@pytest.mark.parametrize(("batch_size", "count"), [(128, 1), (128, 8), (8, 8), (1, 1), (96, 3)])
def test_a_batch_that_divides_is_accepted(batch_size, count):
    devices.check_batch_divides(batch_size, mesh_of(count))


def mesh_of(count: int) -> AbstractMesh:
    return AbstractMesh((count,), (devices.BATCH_AXIS,), axis_types=(AxisType.Auto,))


def layout_on_all_devices() -> list[list[int]]:
    mesh = devices.data_mesh()
    array = np.arange(12 * 5).reshape(12, 5)
    return [
        [len(jax.devices()), mesh.size],
        *(
            [shard.data.shape[0] for shard in jax.device_put(array, lay(mesh)).addressable_shards]
            for lay in (devices.split_over_batch, devices.replicated)
        ),
    ]


def test_the_mesh_holds_all_devices_and_a_batch_is_split_over_them_while_the_rest_is_whole_on_each():
    four = "--xla_force_host_platform_device_count=4"
    assert in_new_process(layout_on_all_devices, XLA_FLAGS=four) == [[4, 4], [3, 3, 3, 3], [12, 12, 12, 12]]


def test_devices_are_described_in_json_values_that_are_the_same_each_time():
    described = devices.describe_devices()
    assert json.loads(json.dumps(described)) == described == devices.describe_devices()
    assert described["count"] == len(jax.devices())
    assert described["kind"] == jax.devices()[0].device_kind
    if described["platform"] == "cpu":
        assert described["cpu_threads"] > 0
        assert described["cpu"]
    else:
        assert described["cpu_threads"] is described["cpu"] is None


def describe() -> dict[str, Any]:
    return devices.describe_devices()


def test_the_description_tells_the_number_of_devices_and_the_flags_of_xla():
    flags = "--xla_force_host_platform_device_count=3"
    described = in_new_process(describe, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    assert (described["platform"], described["count"], described["xla_flags"]) == ("cpu", 3, flags)


def threads_said_and_found(cores: list[int] | None = None) -> list[int]:
    """Return the size of XLA's thread pool as we say it is, and the number of its threads there are."""
    if cores is not None:
        os.sched_setaffinity(0, cores)
    said = devices.cpu_threads()
    jax.block_until_ready(jnp.ones((300, 300)) @ jnp.ones((300, 300)))
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return [said, names.count("tf_XLAEigen")]


@pytest.mark.skipif(sys.platform != "linux", reason="the threads of a process are counted in /proc")
@pytest.mark.parametrize(
    ("variables", "size"),
    [
        ({"PJRT_NPROC": "3"}, 3),
        ({"NPROC": "5"}, 5),
        ({"PJRT_NPROC": "3", "NPROC": "5"}, 3),
        ({"PJRT_NPROC": "", "NPROC": "5"}, 5),
    ],
)
def test_the_environment_sets_the_size_of_the_thread_pool_and_xla_takes_it_as_we_do(variables, size):
    assert in_new_process(threads_said_and_found, JAX_PLATFORMS="cpu", **variables) == [size, size]


@pytest.mark.skipif(sys.platform != "linux", reason="the threads of a process are counted in /proc")
def test_the_thread_pool_has_a_thread_for_each_core_that_the_process_may_use_and_xla_counts_them_as_we_do():
    cores = sorted(os.sched_getaffinity(0))
    for allowed in (cores[:1], cores):
        found = in_new_process(threads_said_and_found, allowed, JAX_PLATFORMS="cpu")
        assert found == [len(allowed), len(allowed)]


def prefer_determinism_and_compute() -> list[Any]:
    devices.enable_determinism()
    return [os.environ["XLA_FLAGS"], jax.device_count(), float(jnp.arange(4.0).sum())]


@pytest.mark.parametrize(
    ("before", "after", "count"),
    [
        ("", "--xla_gpu_deterministic_ops=true", 1),
        (
            "--xla_force_host_platform_device_count=2",
            "--xla_force_host_platform_device_count=2 --xla_gpu_deterministic_ops=true",
            2,
        ),
        ("--xla_gpu_deterministic_ops=false", "--xla_gpu_deterministic_ops=false", 1),
    ],
)
def test_determinism_is_asked_for_besides_the_users_flags_never_against_them_and_xla_knows_the_flag(
    before, after, count
):
    result = in_new_process(prefer_determinism_and_compute, XLA_FLAGS=before, JAX_PLATFORMS="cpu")
    assert result == [after, count, 6.0]


def keep_compiled_programs_and_compute() -> str:
    devices.enable_compilation_cache()
    jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.arange(4.0)))
    return str(jax.config.jax_compilation_cache_dir)


def test_compiled_programs_are_kept_in_the_users_cache(tmp_path):
    folder = Path(in_new_process(keep_compiled_programs_and_compute, XDG_CACHE_HOME=str(tmp_path)))
    assert folder.is_relative_to(tmp_path / "mnist_jax")
    assert list(folder.iterdir())


def test_compiled_programs_are_kept_under_home_where_no_cache_is_named(tmp_path):
    folder = Path(in_new_process(keep_compiled_programs_and_compute, HOME=str(tmp_path)))
    assert folder.is_relative_to(tmp_path / ".cache" / "mnist_jax")
    assert list(folder.iterdir())


def test_compiled_programs_are_kept_where_the_user_says_if_he_does(tmp_path):
    named, cache = tmp_path / "named", tmp_path / "cache"
    variables = {"JAX_COMPILATION_CACHE_DIR": str(named), "XDG_CACHE_HOME": str(cache)}
    assert in_new_process(keep_compiled_programs_and_compute, **variables) == str(named)
    assert list(named.iterdir())
    assert not cache.exists()


def platform_of_a_guest() -> list[str]:
    devices.share_accelerator(on_cpu=True)
    return [jax.devices()[0].platform, os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"]]


def test_a_guest_leaves_an_accelerator_alone_and_would_not_take_all_of_its_memory():
    # There is none here, so that JAX fails as soon as it looks for it.
    assert in_new_process(platform_of_a_guest, JAX_PLATFORMS="cuda") == ["cpu", "false"]
