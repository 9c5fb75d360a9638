"""The command `python -m mnist_jax.train`: find the run, lock its directory, and train.

The training is in `training/loop.py`. It imports JAX, which takes a second, so it is imported after the signal handlers
are installed: a Ctrl-C during the import does not end in a traceback.
"""

from mnist_jax.runtime.preemption import StoppedError, StopSignal, block_signals

if __name__ == "__main__":
    block_signals()  # A signal during the imports, 0.4 s, is handled after them.

import contextlib
import dataclasses
import gc
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_jax import config as configs
from mnist_jax.cli import exit_code, parse_config, report
from mnist_jax.config import Config, ConfigError
from mnist_jax.console import exit_process, print_line, print_stderr
from mnist_jax.runtime.lock import LockHeldError, exclusive_lock
from mnist_jax.runtime.multihost import ProcessGroup, initialize
from mnist_jax.training import data

if TYPE_CHECKING:
    from mnist_jax.checkpoint.remote import RemoteStore

RUNS = Path("runs")


def main(args: Sequence[str]) -> int:
    """Start or resume a run, and return the exit code.

    It is 0 if the run is finished, `--preempted-exit-code` if it is stopped and saved, or another `cli.ExitCode`. A
    second signal n ends the process with 128+n; then this does not return.
    """
    asked = parse_config(args, Config())  # The defaults of a preset depend on the dataset, see `find_run`.
    with StopSignal() as stop:
        return stop.supervise(lambda: start_or_resume(args, asked, stop))


def start_or_resume(args: Sequence[str], asked: Config, stop: StopSignal) -> int:
    """Join the process group, find the run, train, and return the exit code."""
    group = ProcessGroup(stop)
    with contextlib.ExitStack() as locks:
        try:
            group = initialize(
                stop,
                asked.coordinator,
                count=asked.num_processes,
                index=asked.process_id,
                timeout_s=asked.peer_timeout_s,
                notify=print_stderr,
            )
            config = workdir = loading = None
            if group.is_primary:
                config, workdir = find_run(args, asked, stop, locks)
                loading = data.begin_to_load(config.dataset, config.data_dir)
            loop = _import_loop()
            outcome = loop.run(config, workdir, stop=stop, group=group, loading=loading, exit_code=exit_code)
            return int(outcome.exit_code)
        except StoppedError as error:
            group.report_failure(error, asked.preempted_exit_code)
            if group.is_primary:
                is_new = asked.fresh or not find_workdir(asked)
                step, sha256 = (0, "none") if is_new else ("unknown", "unknown")
                print_line(f"stopped step={step} signal={stop.reason} state_sha256={sha256}")
            return asked.preempted_exit_code
        except Exception as error:
            code = exit_code(error)
            group.report_failure(error, code)  # The other processes must not wait for this one.
            who = "" if group.is_primary else f"process {group.index} of {group.count}: "
            report(error, print_stderr, who=who, is_training=True)
            return code
        finally:
            group.shutdown()


def _import_loop() -> Any:
    """Import `loop`, and with it JAX, and exclude their objects from garbage collection.

    Collections among these hundreds of thousands of permanent objects took 0.12 s during the imports, 0.07 s during
    the compilation, and 0.1 s occasionally during the training.
    """
    gc.disable()
    try:
        from mnist_jax.training import loop
    except ValueError as error:
        raise ConfigError(f"JAX refuses an environment variable: {error}") from error
    gc.freeze()
    gc.enable()
    return loop


def find_run(args: Sequence[str], asked: Config, stop: StopSignal, locks: contextlib.ExitStack) -> tuple[Config, Path]:
    """Lock the run directory that the arguments select, and return the settings and the directory of the run.

    Args:
        args: the command line.
        asked: its values, with general defaults where it sets none.
        stop: receives the signals of this process.
        locks: holds the lock of the directory until it is closed.

    Raises:
        ConfigError: the arguments contradict the run in the directory or in the remote copy, a config is unreadable, or
            --init-from names no checkpoint.
        LockHeldError: another process works in the directory.
        RemoteError: the object store does not answer; it may hold a run to resume.
        StoppedError: a signal came while this process waited for the network or for another process.
    """
    check_current_directory()
    workdir = None if asked.fresh else find_workdir(asked)
    remote = stop.run(partial(open_remote, asked.mirror)) if asked.mirror else None
    copied = stop.run(partial(read_remote_config, remote, asked)) if remote else None
    dataset = copied.dataset if copied else None
    if workdir is None:
        dataset = dataset or resolve_dataset(asked, stop)
        workdir = asked.workdir or RUNS / dataset
    lock_workdir(workdir, asked, stop, locks)

    if remote:
        check_is_elsewhere(remote, workdir)
    if remote and copied:
        stop.run(partial(download_newer, remote, copied, args, workdir))
    moved: tuple[Path, Path] | None = None
    if asked.fresh and configs.holds_a_run(workdir):
        check_init_from(configs.absolute_init_from(asked), stop)  # before the run is moved aside for nothing
        moved = move_run_aside(workdir)
        workdir = moved[0]
        lock_workdir(workdir, asked, stop, locks)  # This is a new directory; the old one stays locked as well.
    if (workdir / "config.json").exists():
        config = config_of_resumed_run(args, asked, workdir)
    else:
        dataset = dataset or resolve_dataset(asked, stop)
        config = apply_flags(args, Config.of_preset(asked.preset, asked.model, dataset))
    if moved:
        config = follow_move(config, *moved)
    if not has_checkpoints(workdir):
        check_init_from(config, stop)
    return config, workdir


def check_current_directory() -> None:
    """Raise ConfigError if the current directory was deleted: relative paths would fail with other reasons."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the current directory was deleted; change to one that exists") from error


def check_is_elsewhere(remote: "RemoteStore", workdir: Path) -> None:
    """Raise ConfigError if a remote copy would be written into the run directory, or over it."""
    if remote.folder is not None:
        run = workdir.resolve()
        if remote.folder.is_relative_to(run) or run.is_relative_to(remote.folder):
            raise ConfigError(f"mirror={remote.url} overlaps the run directory {workdir}; use a folder elsewhere")


def find_workdir(asked: Config) -> Path | None:
    """Return the directory of the run to resume, or None if there is no run yet.

    Without --workdir and --dataset it is the run that was started last. So the same command resumes a run that began
    with the built-in digits because the network was down, even if the network is up now.
    """
    if asked.workdir is not None:
        candidates = [asked.workdir]
    elif asked.dataset != "auto":
        candidates = [RUNS / asked.dataset]
    else:
        candidates = [RUNS / "mnist"] if asked.data_dir is not None else [RUNS / "mnist", RUNS / "digits"]
    runs = [directory for directory in candidates if (directory / "config.json").exists()]
    return max(runs, key=lambda run: (run / "config.json").stat().st_mtime, default=None)


def resolve_dataset(asked: Config, stop: StopSignal) -> configs.DatasetName:
    """Return the dataset to train on; "auto" means MNIST, or the built-in digits if MNIST cannot be downloaded."""
    return stop.run(lambda: data.resolve(asked.dataset, asked.data_dir, notify=print_stderr))


def lock_workdir(workdir: Path, asked: Config, stop: StopSignal, locks: contextlib.ExitStack) -> None:
    """Lock a run directory, which is created if it does not exist; wait for another process for `--lock-wait-s`."""
    configs.check_directory(workdir)
    lock = exclusive_lock(
        workdir, wait_s=asked.lock_wait_s, notify=print_stderr, should_stop=lambda: stop.received is not None
    )
    try:
        locks.enter_context(lock)
    except LockHeldError:
        stop.check()
        raise
    except OSError as error:
        raise configs.directory_error(workdir, error) from error


def open_remote(url: str) -> "RemoteStore":
    """Return the object store that --mirror names; ConfigError if it names none."""
    from mnist_jax.checkpoint.remote import RemoteStore  # It imports JAX.

    try:
        return RemoteStore(url)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def read_remote_config(remote: "RemoteStore", asked: Config) -> Config | None:
    """Return the config of the run in the remote copy, None if the copy holds no checkpoint.

    Raises:
        ConfigError: what the object store holds cannot be resumed.
        RemoteError: it does not answer.
    """
    if remote.newest_step() is None:
        return None
    if asked.fresh:
        raise ConfigError(f"{remote.url} holds the copy of a run; with --fresh use another --mirror, or empty it")
    content = remote.read("config.json")
    if content is None:
        raise ConfigError(f"{remote.url} holds checkpoints of a run without its config.json; use another --mirror")
    return configs.from_bytes(content, f"{remote.url}/config.json")


def download_newer(remote: "RemoteStore", copied: Config, args: Sequence[str], workdir: Path) -> None:
    """Download what the remote copy has that is newer than the run directory; all of it if the directory is empty.

    Raises:
        ConfigError: it is the copy of another run.
        RemoteError: the object store does not answer.
    """
    path = workdir / "config.json"
    if any(configs.contradictions(copied, apply_flags(args, configs.load(path) if path.exists() else copied))):
        raise ConfigError(f"{remote.url} holds the copy of a run with other settings; use another --mirror")
    downloaded = remote.download(workdir, files=configs.RECORDS)
    for step, reason in downloaded.refused.items():
        print_stderr(f"warning: the remote copy of step {step} in {remote.url} is not used: {reason}")
    if downloaded.steps:
        print_stderr(f"downloaded from {remote.url}: the checkpoints of steps {', '.join(map(str, downloaded.steps))}")


def check_init_from(config: Config, stop: StopSignal) -> None:
    """Check that the checkpoint exists whose weights a new run is to begin with, if the config names one.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    if config.init_from is not None:
        _import_loop()
        from mnist_jax.checkpoint.checkpoint import Checkpoint
        from mnist_jax.training import initial_weights

        stop.run(partial(initial_weights.select, config.init_from, Checkpoint.manifest))


def follow_move(config: Config, moved_from: Path, moved_to: Path) -> Config:
    """Return a config whose `init_from` has the new path, if it names a run in a directory that was moved."""
    if config.init_from is None:
        return config
    run, _ = configs.split_init_from(config.init_from)
    if not run.resolve().is_relative_to(moved_from):
        return config
    which = str(config.init_from).removeprefix(str(run))
    return dataclasses.replace(config, init_from=Path(f"{moved_to / run.resolve().relative_to(moved_from)}{which}"))


def move_run_aside(workdir: Path) -> tuple[Path, Path]:
    """Rename the directory of an old run, and return its absolute path, which is free now, and its new path."""
    workdir = workdir.resolve()  # "." would move with its directory, and renaming a link would move the link only.
    try:
        aside = configs.move_aside(workdir)
    except OSError as error:  # such as a mount point
        raise ConfigError(f"{workdir} cannot be renamed ({error}); use another --workdir") from error
    print_line(f"moved the old run to {aside}; omit --fresh to resume the new run")
    return workdir, aside


def config_of_resumed_run(args: Sequence[str], asked: Config, workdir: Path) -> Config:
    """Return the saved config of a run, changed by the flags, which must not contradict its checkpoints."""
    saved = configs.load(workdir / "config.json")
    config = apply_flags(args, saved)
    if has_checkpoints(workdir):
        configs.check_same_mathematics(saved, config, where=workdir)
    if (config.preset, config.model, config.dataset) != (saved.preset, saved.model, saved.dataset):
        # There is no checkpoint yet. The defaults are those of what is asked for, not the saved ones.
        preset = asked.preset or (saved.preset if config.model == saved.model else None)
        config = apply_flags(args, Config.of_preset(preset, config.model, config.dataset))
    return config


def has_checkpoints(workdir: Path) -> bool:
    """Return whether a run has saved a checkpoint."""
    return any(path.name.isdecimal() for path in (workdir / "checkpoints").glob("*"))


def apply_flags(args: Sequence[str], defaults: Config) -> Config:
    """Return a config changed by the flags; "--dataset auto" does not change the dataset."""
    config = configs.absolute_init_from(parse_config(args, defaults))
    return dataclasses.replace(config, dataset=defaults.dataset) if config.dataset == "auto" else config


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
