"""The command `python -m mnist_jax.export`: a trained classifier as a file that others can read.

The format is safetensors (https://github.com/huggingface/safetensors): a header in JSON, then the numbers as they are.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import mnist_jax
from mnist_jax import cli
from mnist_jax import config as configs
from mnist_jax.config import ConfigError
from mnist_jax.console import Terminal, exit_process
from mnist_jax.runtime.preemption import StopSignal

if TYPE_CHECKING:
    from mnist_jax.inference.classifier import Classifier


@dataclass(frozen=True)
class Options:
    """Write the weights of a run's classifier to a safetensors file."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Directory of the run. Nothing is written there."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT.safetensors")]
    """File to write. One that is there already stays, and is an error."""
    step: configs.WhichStep = "latest"


def main(args: Sequence[str]) -> int:
    """Write the file, and return the exit code; see `cli.run`."""
    options = configs.cli(Options, "export", args)

    def work(stop: StopSignal, terminal: Terminal) -> int:
        export(options, stop, terminal)
        return 0

    return cli.run(work)


def export(options: Options, stop: StopSignal, terminal: Terminal) -> None:
    """Write the variables of a classifier, whole or not at all.

    Raises:
        CheckpointError, OSError: it cannot be read, or the file cannot be written.
        ConfigError: there is no such classifier, or the file is there already.
        StoppedError: a signal came; nothing was written.
    """
    from mnist_jax.inference import classifier

    for path in (options.out, options.out.with_name(options.out.name + ".partial")):
        if os.path.lexists(path):
            raise ConfigError(f"{path} is there already; name another file, or remove it")
    if not options.out.parent.is_dir():
        raise ConfigError(f"{options.out.parent} is no directory; make it, or name another file")
    model = stop.run(lambda: classifier.load(options.workdir, options.step))
    content = pack(model.variables, model.config.model, where_from(model))
    stop.check()
    configs.write_whole(options.out, content)
    terminal.info(
        f"wrote the weights of step {model.step} to {options.out}, {len(content) / 1e6:.2f} MB; "
        "its metadata say how to compute with them"
    )


def where_from(model: "Classifier") -> dict[str, str]:
    """Return which run and which step weights are of, as safetensors' metadata: only strings."""
    return {
        "dataset": model.data.name,
        "class_names": json.dumps(model.class_names),
        "step": str(model.step),
        "test_accuracy": "unknown" if model.test_accuracy is None else str(model.test_accuracy),
        "state_sha256": model.sha256,
    }


def pack(variables: dict[str, Any], name: str, metadata: dict[str, str]) -> bytes:
    """Return the variables of the model with a name as a safetensors file, which says what is computed with them.

    The arrays are named by their paths: `params.conv1.kernel`, `batch_stats.conv1_norm.mean`.
    """
    from safetensors.numpy import save

    from mnist_jax.checkpoint.integrity import host_leaves
    from mnist_jax.training.model import MODELS, describe

    how = {"mnist_jax": mnist_jax.__version__, "model": name, "architecture": json.dumps(describe(MODELS[name]))}
    return save(host_leaves(variables), metadata={**how, **metadata})


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
