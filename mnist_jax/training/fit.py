"""Training from Python, in a notebook or in a thread: `fit` resumes or begins a run and returns its result."""

import contextlib
import dataclasses
import threading
from pathlib import Path
from typing import Any, NamedTuple

from mnist_jax.config import Config
from mnist_jax.console import print_stderr
from mnist_jax.records.metrics import read_metrics
from mnist_jax.runtime.lock import exclusive_lock
from mnist_jax.runtime.multihost import ProcessGroup
from mnist_jax.runtime.preemption import StoppedError, StopSignal
from mnist_jax.training import data, loop
from mnist_jax.training.recorder import Outcome


class Result(NamedTuple):
    """What a call of `fit` came to."""

    step: int  # number of updates made
    is_stopped: bool  # whether a signal or a request stopped it before its end; the same call resumes
    test_accuracy: float | None  # at `step`, None where it was not evaluated
    state_sha256: str  # of the train state; "none" where nothing is saved
    metrics: list[dict[str, Any]]  # the lines of metrics.jsonl


def fit(config: Config, *, workdir: Path | str, stop: StopSignal | None = None) -> Result:
    """Train the run in a directory to its end or to a stop. A run that is there is resumed, bit for bit.

    In the main thread an interrupt (Ctrl-C, or the stop button of a notebook) and the other stop signals save the
    state and return; the process goes on. In other threads `stop.request()` does so.

        result = mnist_jax.fit(mnist_jax.Config(dataset="digits", steps=200), workdir="runs/notebook")

    Args:
        config: what the run is; only cadence and housekeeping may differ from a run that is there.
        workdir: the run directory.
        stop: receives the request to stop; made here if it is None.

    Raises:
        CheckpointError: checkpoints are there and cannot be used, or the last save failed.
        ConfigError: the config does not fit the run that is there, the data or the devices.
        DataError: the data is not there.
        DivergedError: the loss is not finite; that state is not saved.
        LockHeldError: another process or thread trains in the directory.
        OSError: the directory cannot be written.
        RemoteError: the copy of the last checkpoint failed.
    """
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        if stop is None:
            stop = StopSignal(exit_at_second=False)
            if threading.current_thread() is threading.main_thread():
                stack.enter_context(stop)
        stack.enter_context(exclusive_lock(workdir, wait_s=config.lock_wait_s, notify=print_stderr))
        name = data.resolve(config.dataset, config.data_dir, notify=print_stderr)
        config = dataclasses.replace(config, dataset=name)
        outcome = _train(config, workdir, stop)
    records = [record for record, _ in read_metrics(workdir / "metrics.jsonl")]
    fields = outcome.fields
    accuracy = fields.get("test_accuracy")
    return Result(fields["step"], outcome.is_stopped, accuracy, fields["state_sha256"], records)


def _train(config: Config, workdir: Path, stop: StopSignal) -> Outcome:
    group = ProcessGroup(stop)
    checkpointer, recorder = loop.open_run(config, workdir, enabled=True)
    try:
        loop.share_run(config, workdir, stop=stop, group=group)
        try:
            outcome = loop.train_and_evaluate(config, checkpointer, recorder, stop=stop, group=group)
            recorder.copies.finish(stop)
        except StoppedError:  # before the training began
            outcome = recorder.stopped(stop)
        recorder.exit(outcome, 0)
        return outcome
    except Exception as error:
        recorder.fail(error, None, stop)
        raise
    finally:
        checkpointer.close()
        recorder.close()
