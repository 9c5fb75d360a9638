import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import cache_key
from jax.sharding import AbstractMesh, AxisType
from runs import in_new_process

from mnist_jax.runtime import compilation_cache, devices


def test_batch_must_divide_over_devices():
    def mesh_of(count: int) -> AbstractMesh:
        return AbstractMesh((count, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    for batch_size, count in [(128, 1), (128, 8), (8, 8), (96, 3)]:
        devices.check_batch_divides(batch_size, mesh_of(count))
    with pytest.raises(ValueError, match="batch_size=100 does not divide over 8 devices; use 96 or 104"):
        devices.check_batch_divides(100, mesh_of(8))
    with pytest.raises(ValueError, match=r"use 8$"):
        devices.check_batch_divides(5, mesh_of(8))


def set_up_and_compute(cores: list[int] | None = None) -> dict[str, Any]:
    """Do what a run does before it trains, and return what came of it. Runs in a new process."""
    if cores is not None:
        os.sched_setaffinity(0, cores)
    devices.enable_determinism()
    compilation_cache.enable(devices.cpu_threads)
    devices.use_cpu()
    mesh, array = devices.make_mesh(), np.arange(12 * 5).reshape(12, 5)
    jax.block_until_ready(jax.jit(jnp.dot)(jnp.ones((300, 300)), jnp.ones((300, 300))))
    shardings = {"split": devices.split_over_batch(mesh), "replicated": devices.replicated(mesh)}
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    return {
        "devices": devices.describe_devices(),
        "rows": {
            name: [shard.data.shape[0] for shard in devices.make_global_array(array, sharding).addressable_shards]
            for name, sharding in shardings.items()
        },
        "pool": names.count("tf_XLAEigen"),
        "cache": str(jax.config.jax_compilation_cache_dir),
    }


FLAGS = "--xla_force_host_platform_device_count=3"


@pytest.fixture(scope="module")
def three_devices(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    # JAX would fail as soon as it looks for CUDA here.
    variables = {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cuda", "HOME": str(home), "NPROC": "5"}
    return home, in_new_process(set_up_and_compute, **variables)


def test_batch_is_sharded_and_the_rest_replicated(three_devices):
    assert three_devices[1]["rows"] == {"split": [4, 4, 4], "replicated": [12, 12, 12]}


def test_description_names_what_decides_the_bits(three_devices):
    described = three_devices[1]["devices"]
    assert (described["platform"], described["count"], described["cpu_threads"]) == ("cpu", 3, 5)
    assert described["cpu"]
    here = devices.describe_devices()
    assert json.loads(json.dumps(here)) == here == devices.describe_devices()


def test_description_of_an_accelerator_names_its_libraries(monkeypatch):
    client = SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
    device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", client=client)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setenv("NCCL_ALGO", "Ring")

    def describe(**installed: str) -> dict[str, Any]:
        packages = [SimpleNamespace(name=name, version=version) for name, version in installed.items()]
        monkeypatch.setattr(devices.metadata, "distributions", lambda: packages)
        return devices.describe_devices()

    described = describe(**{"nvidia-cudnn-cu13": "9.10", "jax-cuda13-plugin": "0.10.2", "numpy": "2.0"})
    assert described["runtime"] == "PJRT C API\ncuda 13000"
    assert (described["NCCL_ALGO"], described["jax-cuda13-plugin"], described["cpu"]) == ("Ring", "0.10.2", None)
    assert "numpy" not in described
    assert describe(**{"nvidia-cudnn-cu13": "9.11", "jax-cuda13-plugin": "0.10.2"}) == {
        **described,
        "nvidia-cudnn-cu13": "9.11",
    }


def test_small_results_are_computed_on_a_cpu(monkeypatch):
    local_devices = jax.local_devices
    cpu, accelerator = local_devices(backend="cpu")[0], object()
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [cpu] if backend == "cpu" else [accelerator])
    assert devices.on_local_cpu().device_set == {cpu}

    def without_cpu(backend: str | None = None) -> list[Any]:
        return local_devices(backend=backend and "no such backend")

    monkeypatch.setattr(jax, "local_devices", without_cpu)
    assert devices.on_local_cpu().device_set == {local_devices()[0]}


def test_determinism_keeps_the_flags_of_the_user(three_devices, monkeypatch):
    assert three_devices[1]["devices"]["xla_flags"] == f"{FLAGS} --xla_gpu_deterministic_ops=true"
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    devices.enable_determinism()
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_deterministic_ops=false"


def test_all_programs_of_a_run_have_a_digest(environment, shared_folder):
    """A start removes programs without one, and would compile them again. These are of one process and of two."""
    programs = {path.name for path in (shared_folder / "programs").glob("*-cache")}
    assert len(programs) > 10
    assert programs == {path.name.removesuffix(".sha256") for path in (shared_folder / "programs").glob("*.sha256")}


def test_compiled_programs_are_cached_under_home(three_devices):
    home, found = three_devices
    assert Path(found["cache"]).is_relative_to(home / ".cache" / "mnist_jax")
    assert list(Path(found["cache"]).iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_thread_pool_has_the_size_that_we_say(tmp_path, monkeypatch):
    one_core = sorted(os.sched_getaffinity(0))[:1]
    variables = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "named")}
    found = in_new_process(set_up_and_compute, one_core, **variables)
    assert found["pool"] == found["devices"]["cpu_threads"] == 1
    assert found["cache"] == str(tmp_path / "named")
    both = {**variables, "PJRT_NPROC": "3", "NPROC": "5"}
    found = in_new_process(set_up_and_compute, one_core, **both)
    assert found["pool"] == found["devices"]["cpu_threads"] == 3
    for name, value in {"PJRT_NPROC": "", "NPROC": "5"}.items():
        monkeypatch.setenv(name, value)
    devices.set_cpu_threads(7)
    assert (os.environ["PJRT_NPROC"], devices.cpu_threads()) == ("", 5)


def test_processes_share_programs_only_on_equal_processors_with_equal_threads(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(jax.config, "update", lambda name, value: None)
    compilation_cache.enable(devices.cpu_threads)
    monkeypatch.setattr(compilation_cache, "Path", lambda _: tmp_path / "cpuinfo")

    def name_of_program(*processes: int, flags: str = "avx2", threads: int = 2) -> str:
        monkeypatch.setenv("PJRT_NPROC", str(threads))
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nmodel name : X\nflags : {flags}\n\nprocessor : 1\n")
        digest, cpus = hashlib.sha256(), [SimpleNamespace(platform="cpu", process_index=i) for i in processes]
        cache_key._hash_accelerator_config(digest, np.array(cpus))
        return digest.hexdigest()

    assert name_of_program(0, 1) == name_of_program(0, 1)
    assert name_of_program(0, 1) != name_of_program(0, 1, 1)
    assert name_of_program(0, 1) != name_of_program(0, 1, flags="avx512")
    assert name_of_program(0, 1) != name_of_program(0, 1, threads=3)


@pytest.mark.parametrize("damage", ["torn", "swapped", "one bit", "no digest"])
def test_corrupt_compiled_program_is_removed(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(jax.config, "update", lambda name, value: None)
        compilation_cache.enable(devices.cpu_threads)
        cache = tmp_path / "mnist_jax"
        for name in "ab":
            (cache / f"{name}-cache").write_bytes(name.encode() * 1000)
        compilation_cache.write_digests()
        program = cache / "a-cache"
        if damage == "torn":
            program.write_bytes(b"a" * 10)
        elif damage == "swapped":
            program.write_bytes(b"b" * 1000)
        elif damage == "one bit":
            program.write_bytes(b"a" * 500 + b"c" + b"a" * 499)
        else:
            (cache / "a-cache.sha256").unlink()
        compilation_cache.enable(devices.cpu_threads)
    assert sorted(path.name for path in cache.iterdir()) == ["b-cache", "b-cache.sha256"]
