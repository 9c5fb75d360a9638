"""Arrays of the tests: as a file, and as numbers that can be compared."""

from typing import Any

import jax
import numpy as np


def to_idx(array: np.ndarray) -> bytes:
    """Return an IDX file of an array of uint8 or of int32 in network order."""
    kind = {1: 8, 4: 12}[array.dtype.itemsize]
    return bytes([0, 0, kind, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def numbers(tree: Any) -> list[np.ndarray]:
    """Return the leaves; of random keys, their data."""
    leaves = jax.tree.leaves(tree)
    is_key = [jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    return [np.asarray(jax.random.key_data(leaf) if key else leaf) for leaf, key in zip(leaves, is_key, strict=True)]
