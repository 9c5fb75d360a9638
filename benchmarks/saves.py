"""Save a state of some size repeatedly: `python -m benchmarks.saves DIRECTORY MEGABYTES COUNT`."""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from mnist_jax.checkpoint.checkpointer import Checkpointer

LEAVES = 16


def main(folder: str, size_mb: str, count: str) -> None:
    """Print how long each call of `save` took, in ms, and when its checkpoint was committed, in s."""
    numbers = int(float(size_mb) * 1e6 / 4 / LEAVES)
    state = {f"leaf{index}": jax.random.normal(jax.random.key(index), (numbers,)) for index in range(LEAVES)}
    change = jax.jit(lambda tree: jax.tree.map(jnp.cos, tree), donate_argnums=0)
    checkpointer = Checkpointer(Path(folder) / "checkpoints", keep=1)
    waits_ms, commits_s = [], []
    for step in range(1 + int(count)):  # The first save compiles the copy.
        state = jax.block_until_ready(change(state))
        start_s = time.perf_counter()
        checkpointer.save(step, state)
        waits_ms.append(1000 * (time.perf_counter() - start_s))
        checkpointer.wait()
        commits_s.append(time.perf_counter() - start_s)
    checkpointer.close()
    for name, values in (("ms", waits_ms), ("s", commits_s)):
        print(f"{name}={','.join(f'{value:.4g}' for value in values[1:])}", end=" ")


if __name__ == "__main__":
    main(*sys.argv[1:])
