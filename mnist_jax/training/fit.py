"""Training from Python, in a notebook or in a thread: `fit` starts or resumes a run and returns its result."""

import contextlib
import dataclasses
import threading
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mnist_jax import config as configs
from mnist_jax.config import Config
from mnist_jax.console import print_stderr
from mnist_jax.records.metrics import read_metrics
from mnist_jax.runtime.lock import exclusive_lock
from mnist_jax.runtime.multihost import ProcessGroup
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import data, loop


class Result(NamedTuple):
    """The result of a call of `fit`."""

    step: int  # number of updates made
    is_stopped: bool  # whether a signal or a request stopped it before its end; the same call resumes
    test_accuracy: float | None  # at `step`; None if it was not evaluated
    state_sha256: str  # of the train state; "none" if nothing is saved
    metrics: list[dict[str, Any]]  # the lines of metrics.jsonl


def fit(config: Config, *, workdir: Path | str, stop: StopSignal | None = None) -> Result:
    """Train until the end or until a stop. If the directory holds a run, resume it bit for bit.

    In the main thread, an interrupt (Ctrl-C, or the stop button of a notebook) and the other stop signals save the
    state and return; the process continues. In other threads use `stop.request()`.

        result = mnist_jax.fit(mnist_jax.Config(dataset="digits", steps=200), workdir="runs/notebook")

    Args:
        config: what the run is; `Config.of_preset` has the values of a preset. To resume, only settings that do not
            change the numbers may differ from the run's. The defaults of `Config` may differ between versions.
        workdir: the run directory.
        stop: receives stop requests; created if it is None.

    Raises:
        CheckpointError: the checkpoints cannot be used, or the final save failed.
        ConfigError: the config contradicts the run in the directory, or does not fit the dataset, the devices or the
            weights of `init_from`.
        DataError: the dataset cannot be loaded.
        DivergedError: the loss is not finite; that state is not saved.
        LockHeldError: another process or thread trains in the directory, also if a stop is requested meanwhile.
        OSError: the directory cannot be written.
        RemoteError: the upload of the last checkpoint failed.
        StoppedError: a stop is requested while the dataset is looked for.
    """
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        if stop is None:
            stop = StopSignal(exit_at_second=False)
            if threading.current_thread() is threading.main_thread():
                stack.enter_context(stop)
        configs.check_directory(workdir)
        lock = exclusive_lock(
            workdir, wait_s=config.lock_wait_s, notify=print_stderr, should_stop=lambda: stop.received is not None
        )
        stack.enter_context(lock)
        name = stop.run(lambda: data.resolve(config.dataset, config.data_dir, notify=print_stderr))
        config = configs.absolute_init_from(dataclasses.replace(config, dataset=name))
        outcome = stop.supervise(partial(loop.run, config, workdir, stop=stop, group=ProcessGroup(stop)))
    records = [record for record, _ in read_metrics(workdir / "metrics.jsonl")]
    fields = outcome.fields
    accuracy = fields.get("test_accuracy")
    return Result(fields["step"], outcome.is_stopped, accuracy, fields["state_sha256"], records)
