"""The command `python -m mnist_jax.train`: which run is meant, and the signals that may end it.

The training is in `loop.py`, imported when the signals are already caught: it brings JAX, a second of imports in which
a Ctrl-C would otherwise end in a traceback.
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mnist_jax import config as configs
from mnist_jax import data
from mnist_jax.config import Config, ConfigError
from mnist_jax.preemption import Stopped, StopSignal

RUNS = Path("runs")


def main(args: Sequence[str]) -> int:
    """Start a run or carry it on, and return the exit code.

    0: finished, or stopped and saved (the latter is `--preempted-exit-code`). 1: the loss is not finite. 2: bad usage,
    bad data, or a flag that contradicts the run. 65: no checkpoint is good. 74: the last save failed, or the disk
    takes no more. A second signal n ends the process with 128+n.
    """
    _mend_standard_streams()
    asked = configs.parse(args)
    with StopSignal() as stop:
        try:
            config, workdir = find_run(args, asked, stop)
        except Stopped:
            assert stop.received is not None
            print(f"stopped step=0 signal={stop.received.name} state_sha256=none")
            return asked.preempted_exit_code
        except (ConfigError, data.DataError, OSError) as error:
            _notice(f"error: {error}")
            return 2
        from mnist_jax import loop

        return loop.run(config, workdir, stop)


def find_run(args: Sequence[str], asked: Config, stop: StopSignal) -> tuple[Config, Path]:
    """Return the settings and the directory of the run that the arguments mean, an old one or a new one.

    Raises:
        ConfigError: the arguments contradict the run in the directory, or its config cannot be read.
        Stopped: a signal came while the network was asked for the data.
    """
    old = None if asked.fresh else _directory_of_old_run(asked)
    if old is not None:
        run = configs.load(old / "config.json")
        config = configs.parse(args, run)
        dataset = run.dataset if config.dataset == "auto" else config.dataset
        differences = list(configs.contradictions(run, config))
        if differences and any((old / "checkpoints").glob("[0-9]*")):
            raise ConfigError(configs.describe_contradictions(old, differences))
        if (config.model, dataset) != (run.model, run.dataset):  # Nothing has begun: the old settings are no guide.
            config = configs.parse(args, Config.of_recipe(config.model, dataset))
        return dataclasses.replace(config, dataset=dataset), old
    name = stop.run(lambda: data.resolve(asked.dataset, asked.data_dir, say=_notice))
    config = configs.parse(args, Config.of_recipe(asked.model, name))
    workdir = asked.workdir or RUNS / name
    if asked.fresh and any((workdir / file).exists() for file in ("config.json", "events.jsonl", "checkpoints")):
        workdir = workdir.resolve()  # "." would move along with its directory, and of a link only the link.
        aside = next(
            path for n in range(1, 10**6) if not (path := workdir.with_name(f"{workdir.name}.old-{n}")).exists()
        )
        workdir.rename(aside)
        print(f"the old run is now in {aside}; the same command without --fresh carries the new one on")
    return dataclasses.replace(config, dataset=name), workdir


def _directory_of_old_run(asked: Config) -> Path | None:
    """Return the directory of the run that is to be carried on, or None where there is none yet.

    Without --workdir and --dataset it is the run that was last at work, for the same command carries on, also when
    the network that was missing at its start is there now.
    """
    if asked.workdir is not None:
        candidates = [asked.workdir]
    elif asked.dataset != "auto":
        candidates = [RUNS / asked.dataset]
    else:
        candidates = [RUNS / "mnist"] if asked.data_dir is not None else [RUNS / "mnist", RUNS / "digits"]
    runs = [directory for directory in candidates if (directory / "config.json").exists()]
    return max(runs, key=lambda run: (run / "config.json").stat().st_mtime, default=None)


def _notice(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _mend_standard_streams() -> None:
    """Open what the caller closed, as cron and daemons do, and let no letter be an error that a stream cannot write."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - it stays open to the end
        getattr(sys, name).reconfigure(errors="backslashreplace")


def leave(code: int) -> None:
    """End the process with everything written, and without waiting for the interpreter to be taken down.

    A download or a compilation that a signal made us leave still runs in its thread; it would hold up the orderly end,
    or crash in it.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
