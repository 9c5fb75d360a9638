"""The command `python -m mnist_jax`: list the commands, or run one by its name."""

import difflib
import importlib
import sys
from collections.abc import Sequence

import mnist_jax
from mnist_jax.console import exit_process, repair_standard_streams

COMMANDS = {
    "train": "Train a classifier, or resume a run.",
    "status": "List a run's checkpoints and history, and what the next start would do.",
    "evaluate": "Evaluate a run's classifier on all test images.",
    "predict": "Predict the digits in pictures.",
    "demo": "Serve a local page to draw digits on.",
    "report": "Write a run's report as one HTML page.",
    "export": "Write a run's weights as safetensors, or its program as StableHLO.",
    "replay": "Recompute the steps between two checkpoints, and compare the states.",
}


def run(args: Sequence[str]) -> int:
    """Run the command that the first argument names, and return its exit code. Without a name, list the commands."""
    repair_standard_streams()
    name, *rest = args or ["--help"]
    if name in COMMANDS:
        package = ".__main__" if name in ("demo", "report") else ""
        return int(importlib.import_module(f"mnist_jax.{name}{package}").main(rest))
    lines = [f"  {command:9} {about}" for command, about in COMMANDS.items()]
    end = "COMMAND --help lists its flags; --version prints the version."
    listing = "\n".join(["usage: python -m mnist_jax COMMAND ...", "", *lines, "", end])
    if name in ("-h", "--help", "--version"):
        print(f"mnist_jax {mnist_jax.__version__}" if name == "--version" else listing)
        return 0
    near = "".join(f"; did you mean {command}?" for command in difflib.get_close_matches(name, COMMANDS, n=1))
    print(f"error: there is no command {name}{near}\n\n{listing}", file=sys.stderr)
    return 2


def console_script() -> None:
    """Run as the installed command `mnist-jax`."""
    exit_process(run(sys.argv[1:]))


if __name__ == "__main__":
    console_script()
