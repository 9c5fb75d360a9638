"""Training in JAX that can be stopped at any moment: `Config`, `fit` and `load`.

Importing this package does not import JAX; the first use of a name does what it needs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnist_jax.config import Config as Config
    from mnist_jax.inference.classifier import load as load
    from mnist_jax.training.fit import fit as fit

__version__ = "0.6.0"  # Raise it with each change after which a run would end with different bits.
__all__ = ["Config", "__version__", "fit", "load"]
_MODULES = {"Config": "mnist_jax.config", "fit": "mnist_jax.training.fit", "load": "mnist_jax.inference.classifier"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
