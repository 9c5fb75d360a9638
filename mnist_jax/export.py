"""The command `python -m mnist_jax.export`: write the weights of a classifier as safetensors.

Safetensors (https://github.com/huggingface/safetensors) is a JSON header and the raw arrays.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

import mnist_jax
from mnist_jax import cli
from mnist_jax import config as configs
from mnist_jax.config import ConfigError
from mnist_jax.console import Terminal, exit_process
from mnist_jax.runtime.preemption import StopSignal


@dataclass(frozen=True)
class Options:
    """Write the weights of a run's classifier to a safetensors file."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Directory of the run. Read-only."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT.safetensors")]
    """File to write. It must not exist."""
    step: configs.WhichStep = "latest"


def main(args: Sequence[str]) -> int:
    """Write the file, and return the exit code; see `cli.run`."""
    return cli.run(partial(export, configs.cli(Options, "export", args)))


def export(options: Options, stop: StopSignal, terminal: Terminal) -> int:
    """Write the variables of a classifier, completely or not at all."""
    from mnist_jax.inference import classifier

    for path in (options.out, options.out.with_name(options.out.name + ".partial")):
        if os.path.lexists(path):
            raise ConfigError(f"{path} exists; remove it, or use another file name")
    if not options.out.parent.is_dir():
        raise ConfigError(f"{options.out.parent} is not a directory; create it, or use another file name")
    model = stop.run(lambda: classifier.load(options.workdir, options.step))
    metadata = {
        "dataset": model.data.name,
        "class_names": json.dumps(model.class_names),
        "step": str(model.step),
        "test_accuracy": "unknown" if model.test_accuracy is None else str(model.test_accuracy),
        "state_sha256": model.sha256,
    }
    content = pack(model.variables, model.config.model, metadata, model.image_shape)
    stop.check()
    configs.write_whole(options.out, content)
    terminal.info(
        f"wrote the weights of step {model.step} to {options.out} ({len(content) / 1e6:.2f} MB); "
        "the metadata describe the architecture"
    )
    return 0


def pack(
    variables: dict[str, Any], name: str, metadata: dict[str, str], image_shape: tuple[int, int] = (28, 28)
) -> bytes:
    """Return the variables of a model as a safetensors file whose metadata describe the architecture.

    The arrays are named by their paths: `params.conv1.kernel`, `batch_stats.conv1_norm.mean`.
    """
    from safetensors.numpy import save

    from mnist_jax.checkpoint.integrity import host_leaves
    from mnist_jax.training.model import MODELS, describe

    architecture = json.dumps(describe(MODELS[name], image_shape))
    model = {"mnist_jax": mnist_jax.__version__, "model": name, "architecture": architecture}
    return save(host_leaves(variables), metadata={**model, **metadata})


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
