"""The cache of compiled programs on disk: verified, and shared by all processes of a run.

This file needs nothing else of the package; copy it into your own project.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def enable(cpu_threads: Callable[[], int]) -> None:
    """Cache compiled programs on disk, in `JAX_COMPILATION_CACHE_DIR` or the user's cache directory.

    Args:
        cpu_threads: returns the size of XLA's thread pool, see `devices.cpu_threads`; called for each program.

    Raises:
        RuntimeError: the user has no home directory.
        OSError: the directory cannot be written.
    """
    if cache := _own_cache():
        cache.mkdir(parents=True, exist_ok=True)
        if not os.access(cache, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(cache))
        _remove_corrupt_programs(cache)
        jax.config.update("jax_compilation_cache_dir", str(cache))
    _name_cpu_programs(cpu_threads)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    # By default JAX passes a directory for XLA's autotuning results as an option of each program (0.10). The name of a
    # program depends on its options, so programs would not be found in a cache that was copied or mounted elsewhere.
    if "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES" not in os.environ:
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def write_digests() -> None:
    """Write a digest beside each new program in the user's cache directory, which only process 0 of a run fills."""
    if jax.process_index() != 0:
        return
    with contextlib.suppress(OSError, RuntimeError):  # A program without a digest is compiled again.
        for program in (_own_cache() or Path(os.devnull)).glob("*-cache"):
            digest = _digest_path(program)
            if not digest.exists():
                digest.write_text(_sha256(program))


def _name_cpu_programs(cpu_threads: Callable[[], int]) -> None:
    """Add the number of threads to the names of programs for CPUs, and give all processes of a run the same names.

    JAX names a program by a digest of what it depends on. The digest leaves out the size of XLA's thread pool (jax 0.10
    to 0.12), for which XLA splits loops: with two threads, `cnn` took 1.23 times as long in a program that was compiled
    with one; the bits were the same. It includes a fingerprint of the topology, which differs between processes, so all
    but process 0 would compile at each start: 6 s instead of 2 s with two cores. A process with another number of
    threads than process 0 still compiles. JAX has no public setting for either; where its private function is renamed,
    JAX's own names apply.
    """
    try:
        from jax._src import cache_key

        by_topology = cache_key._hash_accelerator_config
    except (ImportError, AttributeError):
        return

    def hash_accelerators(digest: Any, accelerators: Any, *others: Any) -> None:
        """Add devices to the digest: those of several processes on CPUs by process and processor."""
        processes = [device.process_index for device in accelerators.flat]
        on_cpu = accelerators.flat[0].platform == "cpu"
        if on_cpu:
            digest.update(json.dumps(cpu_threads()).encode())
        if on_cpu and len(set(processes)) > 1:
            digest.update(json.dumps([processes, _processor()]).encode())
        else:
            by_topology(digest, accelerators, *others)

    if by_topology.__module__ != __name__:  # It is replaced once. The types differ: ours passes on what JAX's takes.
        cache_key._hash_accelerator_config = hash_accelerators  # type: ignore[assignment]


def _processor() -> list[str]:
    """Return the model of the processor and its instruction sets. A program runs only where both are the same."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return [platform.processor() or platform.machine()]
    first = cpuinfo.read_text().partition("\n\n")[0].splitlines()
    return [line for line in first if line.startswith(("model name", "flags", "Features", "CPU part"))]


def _own_cache() -> Path | None:
    """Return our directory of compiled programs, None if the user names one for all programs of JAX."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mnist_jax"


def _remove_corrupt_programs(cache: Path) -> None:
    """Remove programs that differ from their digests or have none.

    JAX does not verify them: a torn one is compiled again at each start, a swapped one ends the process, and one with a
    flipped bit may compute other numbers.
    """
    with contextlib.suppress(OSError):
        for program in cache.glob("*-cache"):
            digest = _digest_path(program)
            if not digest.exists() or digest.read_text() != _sha256(program):
                program.unlink()
                digest.unlink(missing_ok=True)


def _digest_path(program: Path) -> Path:
    return program.with_name(f"{program.name}.sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
