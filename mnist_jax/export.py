"""The command `python -m mnist_jax.export`: write a classifier for use without this package.

The suffix of the file decides about its format:

    .safetensors    the weights and a description of the architecture: a JSON header and the raw arrays
                    (https://github.com/huggingface/safetensors)
    .stablehlo      the whole program, weights included: what `jax.export` serializes, a StableHLO module
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

import mnist_jax
from mnist_jax import cli
from mnist_jax import config as configs
from mnist_jax.config import ConfigError
from mnist_jax.console import Terminal, exit_process
from mnist_jax.runtime.preemption import StopSignal

SUFFIXES = (".safetensors", ".stablehlo")
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclass(frozen=True)
class Options:
    """Write a run's classifier: OUT.safetensors has its weights, OUT.stablehlo runs."""

    workdir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="WORKDIR")]
    """Directory of the run. Read-only."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """File to write. Its suffix decides about the format: .safetensors or .stablehlo. It must not exist."""
    step: configs.WhichStep = "latest"


def main(args: Sequence[str]) -> int:
    """Write the file, and return the exit code; see `cli.run`."""
    return cli.run(partial(export, cli.parse(Options, "export", args)))


def export(options: Options, stop: StopSignal, terminal: Terminal) -> int:
    """Write a classifier, completely or not at all."""
    from mnist_jax.inference import classifier

    if options.out.suffix not in SUFFIXES:
        raise ConfigError(f"{options.out} has no known suffix; use {' or '.join(SUFFIXES)}")
    for path in (options.out, options.out.with_name(options.out.name + ".partial")):
        if os.path.lexists(path):
            raise ConfigError(f"{path} exists; remove it, or use another file name")
    if not options.out.parent.is_dir():
        raise ConfigError(f"{options.out.parent} is not a directory; create it, or use another file name")
    model = stop.run(lambda: classifier.load(options.workdir, options.step, on_cpu=True))
    if options.out.suffix == ".safetensors":
        metadata = {
            "dataset": model.data.name,
            "class_names": json.dumps(model.class_names),
            "step": str(model.step),
            "test_accuracy": "unknown" if model.test_accuracy is None else str(model.test_accuracy),
            "state_sha256": model.sha256,
        }
        content, what = pack(model.variables, model.config.model, metadata, model.image_shape), "weights"
        note = "the metadata describe the architecture"
    else:
        content, what = stop.run(lambda: serialize(model.variables, model.config.model, model.image_shape)), "program"
        note = "images [N, H, W, 1] uint8 -> logits [N, classes] float32, read by jax.export.deserialize"
    stop.check()
    configs.write_whole(options.out, content)
    terminal.info(f"wrote the {what} of step {model.step} to {options.out} ({len(content) / 1e6:.2f} MB); {note}")
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


def serialize(variables: dict[str, Any], name: str, image_shape: tuple[int, int] = (28, 28)) -> bytes:
    """Return the program of a model with its weights, as `jax.export` serializes it.

    It computes the logits [N, classes] float32 of images [N, H, W, 1] uint8, for any N of 1 or more, on `PLATFORMS`.
    """
    import jax
    import jax.numpy as jnp
    from jax import export as jax_export

    from mnist_jax.training.model import MODELS

    constants = jax.tree.map(np.asarray, variables)
    model = MODELS[name].clone(classes=constants["params"]["logits"]["bias"].size)

    def logits(images: jax.Array, *, for_cpu: bool) -> Any:
        return model.clone(for_cpu=for_cpu).apply(constants, images, train=False)

    @jax.jit
    def program(images: jax.Array) -> Any:
        forms = {"cpu": partial(logits, for_cpu=True), "default": partial(logits, for_cpu=False)}
        return jax.lax.platform_dependent(images, **forms)

    [batch] = jax_export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((batch, *image_shape, 1), jnp.uint8)
    return bytes(jax_export.export(program, platforms=PLATFORMS)(images).serialize())


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
