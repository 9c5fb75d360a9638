"""The command `python -m mnist_jax.train`: which run is meant, and the signals that may end it.

The training is in `loop.py`, imported when the signals are already caught: it brings JAX, a second of imports in which
a Ctrl-C would otherwise end in a traceback.
"""

import contextlib
import dataclasses
import gc
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from mnist_jax import config as configs
from mnist_jax.cli import ExitCode, exit_code, report
from mnist_jax.config import Config, ConfigError
from mnist_jax.console import exit_process, print_stderr, repair_standard_streams
from mnist_jax.runtime.lock import LockHeldError, exclusive_lock
from mnist_jax.runtime.multihost import ProcessGroup, ProcessLostError, initialize
from mnist_jax.runtime.preemption import StoppedError, StopSignal
from mnist_jax.training import data

RUNS = Path("runs")


class RemoteUnavailableError(Exception):
    """The object store does not tell what it holds of the run."""


def main(args: Sequence[str]) -> int:
    """Start or resume a run, and return the exit code.

    0: finished, or stopped and saved (the latter is `--preempted-exit-code`). 128+n: a second signal n. The others
    are in `cli.ExitCode`.
    """
    repair_standard_streams()
    asked = configs.parse(args, Config())  # The defaults of a preset depend on the data: they come with it.
    with StopSignal() as stop, contextlib.ExitStack() as locks:
        group = ProcessGroup(stop)
        try:
            group = initialize(
                stop,
                asked.coordinator,
                count=asked.num_processes,
                index=asked.process_id,
                timeout_s=asked.peer_timeout_s,
            )
            if not group.is_primary:
                return run(None, None, stop, group=group)
            config, workdir = find_run(args, asked, stop, locks)
            loading = data.begin_to_load(config.dataset, config.data_dir)
            return run(config, workdir, stop, loading, group)
        except StoppedError as error:
            assert stop.received is not None
            group.report_failure(error, asked.preempted_exit_code)
            if group.is_primary:
                print(f"stopped step=0 signal={stop.received.name} state_sha256=none")
            return asked.preempted_exit_code
        except Exception as error:  # Whatever it is, the other processes do not wait for this one.
            code = ExitCode.USAGE if isinstance(error, OSError) else exit_code(error)
            group.report_failure(error, code)
            report(error, print_stderr, is_training=True)
            return code
        finally:
            group.shutdown()


def run(
    config: Config | None,
    workdir: Path | None,
    stop: StopSignal,
    loading: "Future[data.Dataset] | None" = None,
    group: ProcessGroup | None = None,
) -> int:
    """Train in `workdir` to the end or to a signal, report how it went, and return the exit code.

    All processes call it alike. Process 0 holds the lock of the directory, and may have begun to load the data; on the
    others config and workdir are None.
    """
    loop = _import_loop()
    group = group or ProcessGroup(stop)
    opened, is_lost = None, False
    try:
        if config is not None and workdir is not None:
            opened = loop.open_run(config, workdir, enabled=True)
        config, workdir = loop.share_run(config, workdir, stop=stop, group=group)
        opened = opened or loop.open_run(config, workdir, enabled=False)
        checkpointer, recorder = opened
        outcome = loop.train_and_evaluate(config, checkpointer, recorder, stop=stop, group=group, loading=loading)
        recorder.copies.finish(stop)
        code = config.preempted_exit_code if outcome.is_stopped else ExitCode.OK
        code = group.broadcast(code, ignore_signals=True)
        recorder.exit(outcome, code)
        return code
    except StoppedError as error:  # before the training began
        if config is None or opened is None:
            raise  # Nothing is open yet, and the caller knows the exit code.
        group.report_failure(error, config.preempted_exit_code)
        opened[1].exit(opened[1].stopped(stop), config.preempted_exit_code)
        return config.preempted_exit_code
    except Exception as error:
        if exit_code(error) == ExitCode.UNEXPECTED:
            raise
        code = _fail(error, group)
        if opened is not None:
            opened[1].fail(error, code, stop)
        is_lost = isinstance(error, ProcessLostError)
        return code
    finally:
        if opened is not None:
            checkpointer, recorder = opened
            checkpointer.close(wait=not is_lost)  # A save waits for a lost process in vain.
            recorder.close()


def _fail(error: Exception, group: ProcessGroup) -> int:
    """Report an error to the user and to the other processes, and return its exit code."""
    code = exit_code(error)
    group.report_failure(error, code)
    who = "" if group.is_primary else f"process {group.index} of {group.count}: "
    report(error, print_stderr, who=who, is_training=True)
    return code


def _import_loop() -> Any:
    """Return the module `loop`, and with it JAX.

    They make objects by the hundred thousand, all to stay. To look among them for garbage took 0.12 s of the imports,
    0.07 s of the compilation, and 0.1 s now and then in the training.
    """
    gc.disable()
    from mnist_jax.training import loop

    gc.freeze()
    gc.enable()
    return loop


def find_run(args: Sequence[str], asked: Config, stop: StopSignal, locks: contextlib.ExitStack) -> tuple[Config, Path]:
    """Return the settings and the directory of the run that the arguments mean, an old one or a new one.

    From then on, and until `locks` is closed, this process alone writes in that directory.

    Raises:
        ConfigError: the arguments contradict the run in the directory, or its config cannot be read.
        LockHeldError: another process is at work in the directory.
        RemoteUnavailableError: the object store does not answer, so it may hold a run to download.
        StoppedError: a signal came while the network was asked for the data, or while another process was waited for.
    """

    def lock(directory: Path) -> None:
        configs.check_directory(directory)
        waiting = exclusive_lock(
            directory, wait_s=asked.lock_wait_s, notify=print_stderr, should_stop=lambda: stop.received is not None
        )
        try:
            locks.enter_context(waiting)
        except LockHeldError:
            if stop.received is not None:
                raise StoppedError from None
            raise
        except OSError as error:
            raise ConfigError(f"{directory} cannot hold a run ({error}); choose another --workdir") from error

    def resolve() -> configs.DatasetName:
        return stop.run(lambda: data.resolve(asked.dataset, asked.data_dir, notify=print_stderr))

    name = None
    workdir = None if asked.fresh else _directory_of_old_run(asked)
    if workdir is None:
        name = resolve()
        workdir = asked.workdir or RUNS / name
    lock(workdir)
    copied = stop.run(lambda: remote_config(str(asked.mirror))) if asked.mirror else None
    if asked.fresh and copied:
        raise ConfigError(f"{asked.mirror} holds the copy of a run; to begin anew name another --mirror, or empty it")
    if asked.fresh and configs.holds_a_run(workdir):
        workdir = workdir.resolve()  # "." would move along with its directory, and of a link only the link.
        _move_aside(workdir)
        lock(workdir)  # It is another directory now. The lock on the old one is kept.
    settings = workdir / "config.json"
    if copied:
        wanted = _asked_of(args, configs.load(settings) if settings.exists() else copied)
        if any(configs.contradictions(copied, wanted)):
            raise ConfigError(f"{asked.mirror} holds the copy of a run with other settings; name another --mirror")
        stop.run(lambda: download_run(str(asked.mirror), workdir))
    if settings.exists():
        return _settings_of_old_run(args, asked, workdir), workdir
    name = name or resolve()
    config = configs.parse(args, Config.of_preset(asked.preset, asked.model, name))
    return dataclasses.replace(config, dataset=name), workdir


def remote_config(url: str) -> Config | None:
    """Return the settings of the run that is copied under a URL, or None where none is.

    Raises:
        ConfigError: the URL is no place for a copy, or the copy there does not say of which run it is.
        RemoteUnavailableError: the object store does not say.
    """
    with _mirror(url) as mirror:
        if mirror.newest_step() is None:
            return None
        settings = mirror.read("config.json", configs.MAX_CONFIG_BYTES)
    if settings is None:
        raise ConfigError(f"{url} holds checkpoints of a run without its config.json; name another --mirror")
    return configs.from_bytes(settings, f"{url}/config.json")


def download_run(url: str, workdir: Path) -> None:
    """Bring what a mirror knows more of a run than its directory, be it all of it because the disk is gone.

    Raises:
        RemoteUnavailableError: there is more, and it cannot be had.
    """
    with _mirror(url) as mirror:
        fetched = mirror.download(workdir, files=configs.RECORDS)
    for step, reason in fetched.refused.items():
        print_stderr(f"warning: the copy of step {step} in {url} was not taken: {reason}")
    if fetched.steps:
        print_stderr(f"brought back from {url}: the checkpoints of steps {', '.join(map(str, fetched.steps))}")


@contextlib.contextmanager
def _mirror(url: str) -> Iterator[Any]:
    """Yield the mirror under a URL, and say of what goes wrong with it what to do.

    Raises:
        ConfigError: it is no place for a copy.
        RemoteUnavailableError: it did not do what it was asked for.
    """
    from mnist_jax.checkpoint.remote import RemoteError, RemoteStore  # TensorStore is for those who have a mirror.

    try:
        mirror = RemoteStore(url)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        yield mirror
    except RemoteError as error:
        raise RemoteUnavailableError(f"{error}. Try again, or go without --mirror") from error


def _settings_of_old_run(args: Sequence[str], asked: Config, workdir: Path) -> Config:
    """Return the settings with which a run is carried on.

    Raises:
        ConfigError: the arguments contradict them, or they cannot be read.
    """
    run = configs.load(workdir / "config.json")
    config = _asked_of(args, run)
    if any((workdir / "checkpoints").glob("[0-9]*")):
        configs.check_same_mathematics(run, config, where=workdir)
    if (config.preset, config.model, config.dataset) != (run.preset, run.model, run.dataset):
        # Nothing has begun: the old settings are no guide.
        preset = asked.preset or (run.preset if config.model == run.model else None)
        config = _asked_of(args, Config.of_preset(preset, config.model, config.dataset))
    return config


def _asked_of(args: Sequence[str], run: Config) -> Config:
    """Return the settings that the arguments ask of a run: where they are silent, or leave the data open, its own."""
    config = configs.parse(args, run)
    return dataclasses.replace(config, dataset=run.dataset) if config.dataset == "auto" else config


def _move_aside(workdir: Path) -> None:
    aside = next(path for n in range(1, 10**6) if not (path := workdir.with_name(f"{workdir.name}.old-{n}")).exists())
    workdir.rename(aside)
    print(f"the old run is now in {aside}; the same command without --fresh carries the new one on")


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


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
