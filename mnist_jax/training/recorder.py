"""What a run writes and prints: metrics, events, terminal lines, the clock of the saves. Enabled on process 0 only."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mnist_jax import config as configs
from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.checkpoint.directory import StorageWarning
from mnist_jax.checkpoint.integrity import CheckpointError, InvalidStateError, ReadError, SaveError
from mnist_jax.checkpoint.object_store import RemoteError
from mnist_jax.config import Config
from mnist_jax.console import Terminal
from mnist_jax.records.metrics import EventLog, MetricWriter
from mnist_jax.runtime.lock import LockHeldError
from mnist_jax.runtime.multihost import ProcessLostError
from mnist_jax.runtime.notices import UNAVAILABLE, NoticePoller
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training.dispatch import Dispatcher, DivergedError, Metrics, means
from mnist_jax.training.remote_copies import RemoteCopies

RETRY_SAVE_S = 5.0


class Outcome(NamedTuple):
    """How an attempt ended: the last line on standard output, and the fields of the last event."""

    word: str  # finished or stopped
    fields: dict[str, Any]
    exit_code: int = 0

    @property
    def is_stopped(self) -> bool:
        """Whether a signal or a notice stopped the run before its end."""
        return self.word == "stopped"

    def __str__(self) -> str:
        """Return the line. It has four digits of an accuracy; `fields` has all. Programs split it at spaces."""
        values = ((name, f"{value:.4f}" if isinstance(value, float) else value) for name, value in self.fields.items())
        return " ".join([self.word, *(f"{name}={value}".replace(" ", "-") for name, value in values)])


class Recorder:
    """Writes the records of a run, and requests a save when one is due.

    All processes call it alike. If it is not enabled, it writes and prints nothing.
    """

    def __init__(
        self, config: Config, workdir: Path, checkpointer: Checkpointer, *, stop: StopSignal, enabled: bool
    ) -> None:
        """Open the files in `workdir`, which exists, and start to ask for notices.

        Raises:
            OSError: they cannot be opened.
        """
        self.config, self.workdir, self.checkpointer, self.enabled = config, workdir, checkpointer, enabled
        self._stop = stop
        self.terminal = Terminal(enabled=enabled, blocking=False)
        self.metrics, self.events = MetricWriter(workdir, enabled=enabled), EventLog(workdir, enabled=enabled)
        self.copies = RemoteCopies(config.mirror if enabled else None, workdir, checkpointer, self.events)
        self._identities = _identity(workdir), _identity(workdir / "lock")
        self._next_save_s = math.inf
        self._has_warned_of_writes = False
        self._has_diverged = False
        self._best_steps: set[int] = set()
        self.parent: dict[str, Any] | None = None  # the checkpoint whose weights the run began with: `initial_weights`
        self._notices = NoticePoller(stop, config.preemption_notice)

    # ---- Before the training

    def log_start(self, environment: dict[str, Any]) -> None:
        """Log that an attempt starts, with its config and environment."""
        step = self.checkpointer.newest_step
        self.events.write("start", step=step, config=self.config.to_json(), **environment)
        if self.checkpointer.removed:
            self.events.write("unfinished_removed", step=step, names=self.checkpointer.removed)

    def save_config(self) -> None:
        """Write config.json, which holds the defaults of all flags for the next start."""
        if self.enabled:
            configs.save(self.config, self.workdir / "config.json")

    def log_phase(self, name: str, step: int) -> None:
        """Log that a phase of the run starts."""
        self.events.write("phase", step=step, phase=name)

    def start_training(self, dispatcher: Dispatcher, metadata: dict[str, Any]) -> None:
        """Record a training. `metadata` is what each checkpoint stores besides the config and the parent."""
        self.dispatcher = dispatcher
        self.metadata = {"config": self.config.to_json(), "parent": self.parent, **metadata}
        self._next_save_s = time.monotonic() + self.config.checkpoint_every_s
        self._pin_best()
        self.log_phase("train", dispatcher.step)
        self._training_since = dispatcher.step, time.monotonic()

    # ---- Metrics

    def show_progress(self) -> None:
        """Update the live line on a terminal."""
        if self.dispatcher.latest is not None and self.terminal.is_refresh_due:
            step, sums = self.dispatcher.latest
            self.terminal.progress(self._describe(step, *means(sums)))

    def write_train_metrics(self, metrics: Metrics | None) -> None:
        """Write the metrics of a log interval, if one ended."""
        if metrics is not None:
            (since_step, since_s), now_s = self._training_since, time.monotonic()
            images_per_s = (metrics.step - since_step) * self.config.batch_size / max(now_s - since_s, 1e-9)
            self._training_since = metrics.step, now_s
            self.events.write("throughput", step=metrics.step, images_per_s=round(images_per_s, 1))
            self._write("train", metrics, images_per_s)
            self.terminal.interval(self._describe(*metrics))

    def write_test_metrics(self, metrics: Metrics | None) -> None:
        """Write the metrics of an evaluation; None if a signal interrupted it."""
        if metrics is None:
            return
        step, loss, accuracy = metrics
        self._write("test", metrics)
        self.events.write("evaluation", step=step, loss=loss, accuracy=accuracy)
        self._training_since = step, time.monotonic()
        self.terminal.info(f"step {step}: test loss {loss:.4f}, test accuracy {accuracy:.4f}")
        self._pin_best()

    def _write(self, split: str, metrics: Metrics, images_per_s: float | None = None) -> None:
        step, loss, accuracy = metrics
        # The rate of the update that led to this step, in the shortest decimal form of the float32.
        rate = float(str(np.float32(self.dispatcher.trainer.learning_rate(np.int32(step - 1)))))
        self.metrics.write(step, split, loss=loss, accuracy=accuracy, learning_rate=rate, images_per_s=images_per_s)

    def _describe(self, step: int, loss: float, accuracy: float) -> str:
        """Return the progress line, up to 79 characters long in a run of usual size."""
        trainer, seconds_per_step = self.dispatcher.trainer, self.dispatcher.queue.seconds_per_step
        return (
            f"step {step}/{trainer.total_steps} epoch {step / trainer.steps_per_epoch:.2f} loss {loss:.4f} "
            f"acc {accuracy:.4f} {self.config.batch_size / seconds_per_step:,.0f} img/s "
            f"{_format_duration((trainer.total_steps - step) * seconds_per_step)} left "
            f"saved {self.checkpointer.newest_step if self.checkpointer.steps else 'none'}"
        )

    def metrics_changed(self, step: int, what: str) -> None:
        """Report that metrics.jsonl is not what this run wrote."""
        self.events.write("metrics_changed", step=step, text=what)
        self.terminal.warn(f"warning: {what}")

    # ---- Saves

    def request_save_if_due(self) -> None:
        """Request a save on all processes when the interval has elapsed and no result must be awaited."""
        is_due = self.enabled and time.monotonic() >= self._next_save_s
        if is_due and not self.checkpointer.is_saving and not self.dispatcher.has_sums_in_flight:
            self.dispatcher.agreement.request_save()
            self._next_save_s = math.inf  # until all processes have received the request

    def prepare_save(self, reason: str) -> dict[str, Any]:
        """Fsync the metrics up to this step: a checkpoint must not be committed before them.

        Returns the arguments of `Checkpointer.save`: `metadata`, or `refuse` if the metrics cannot be written.

        Raises:
            LockHeldError: the lock file was removed or replaced, so another process may write in the directory.
        """
        directory, lock = self._identities
        if _identity(self.workdir) == directory and _identity(self.workdir / "lock") != lock:
            raise LockHeldError(
                f"the lock file in {self.workdir} was removed or replaced, so another process may write there; "
                "this one stops without saving"
            )
        self._next_save_s = time.monotonic() + self.config.checkpoint_every_s
        self.write_train_metrics(self.dispatcher.pop_train_metrics())
        try:
            self.metrics.sync()
        except OSError as error:
            return {"refuse": f"metrics.jsonl cannot be written: {error}"}
        accuracy, metrics = self.metrics.accuracy_at(self.dispatcher.step), {"lines": self.metrics.lines}
        saved = {"reason": reason, "time": time.time(), "test_accuracy": accuracy, "metrics": metrics}
        return {"metadata": {**self.metadata, **saved}}

    def report_saves(self, *, is_last: bool = False) -> None:
        """Log and print the results of the saves that ended since the last call.

        A state that is not finite is not saved. Then all processes are asked to stop, and `raise_if_diverged` raises.
        """
        self._report_write_errors()
        self._report_notices()
        saved = None
        for result in self.checkpointer.results():
            if isinstance(result, InvalidStateError):
                self._has_diverged = True
                self.dispatcher.agreement.request_stop()
            elif isinstance(result, SaveError):
                self._next_save_s = time.monotonic() + min(RETRY_SAVE_S, self.config.checkpoint_every_s)
                self.events.write("save_failed", step=result.step, error=str(result))
                if not is_last:
                    self.terminal.warn(f"warning: {result}. Training continues, and the save is retried.")
            elif isinstance(result, StorageWarning):
                self.events.write(result.event, step=self.dispatcher.step, text=result.text)
                self.terminal.warn(f"warning: {result}")
            else:
                self._pin_best()
                # A crash just before the next commit loses the interval between the saves and the time of the save.
                self._next_save_s -= result.seconds
                reason, sha256 = result.metadata["reason"], result.state_sha256
                self.events.write("save", step=result.step, reason=reason, seconds=result.seconds, sha256=sha256)
                saved = result.step
        if saved in self.checkpointer.steps:
            self.copies.begin(saved)
        if not is_last:
            for failure in self.copies.pop_failures():
                self.terminal.warn(f"warning: {failure}. Training continues, and the next checkpoint is uploaded.")
        self._pin()

    def raise_if_diverged(self) -> None:
        """Raise DivergedError if a state was not saved because it is not finite."""
        if self._has_diverged:
            raise DivergedError("the state has values that are not finite")

    def _report_notices(self) -> None:
        for event, text in self._notices.pop_events():
            self.events.write(event, step=self.dispatcher.step, text=text)
            if event == UNAVAILABLE:
                self.terminal.warn(f"warning: {text}")

    def _report_write_errors(self) -> None:
        for moved_to in self.metrics.pop_replaced():
            what = f"replaced by another file, which is moved to {moved_to}" if moved_to else "removed"
            text = f"metrics.jsonl was {what}; it is written again with all lines"
            self.metrics_changed(self.dispatcher.step, text)
        error = self.metrics.write_error or self.events.write_error
        if error and not self._has_warned_of_writes:
            self.terminal.warn(f"warning: metrics and events cannot be written and are kept in memory: {error}")
        elif self._has_warned_of_writes and not error:
            self.terminal.warn("the metrics and events that were kept in memory have now been written")
        self._has_warned_of_writes = error is not None

    def _pin_best(self) -> None:
        """Keep the best checkpoint, and the one that was best before until the new one is committed."""
        best = self.metrics.best()
        if best is not None:
            before = set() if best["step"] in self.checkpointer.steps else self._best_steps
            self._best_steps = before | {best["step"]}
        self._pin()

    def _pin(self) -> None:
        self.checkpointer.pinned = self._best_steps | self.copies.uploading_steps

    # ---- The end

    def finished(self, step: int) -> Outcome:
        """Return the outcome of a run that is at its end and saved."""
        accuracy, sha256 = self.metrics.accuracy_at(step), self.checkpointer.state_sha256(step)
        return Outcome("finished", {"step": step, "test_accuracy": accuracy, "state_sha256": sha256})

    def stopped(self) -> Outcome:
        """Return the outcome of a run that was asked to stop, at its newest checkpoint, and log what asked for it."""
        step, stop = self.checkpointer.newest_step, self._stop
        self.events.write("signal", step=step, signal=stop.reason, seconds=stop.seconds_since)
        try:
            sha256 = self.checkpointer.state_sha256(step) if self.checkpointer.steps else "none"
        except CheckpointError:  # Stopped before the checkpoints were verified; the next start reports this one.
            sha256 = "unknown"
        return Outcome("stopped", {"step": step, "signal": stop.reason, "state_sha256": sha256})

    def log_outcome(self, outcome: Outcome) -> None:
        """Log the outcome of a run whose final state is saved. Its exit is logged when the last upload is done."""
        self.events.write("outcome", step=outcome.fields["step"], outcome=outcome.word)

    def exit(self, outcome: Outcome) -> None:
        """Log and print how the run ended."""
        self.events.write("exit", outcome=outcome.word, code=outcome.exit_code, **outcome.fields)
        self.terminal.last(str(outcome))

    def fail(self, error: Exception, code: int) -> None:
        """Log that the run failed, and add the newest checkpoint to the error as a note."""
        if isinstance(error, ProcessLostError | SaveError | RemoteError | ReadError | OSError):
            newest = f"of step {self.checkpointer.newest_step}" if self.checkpointer.steps else "none"
            error.add_note(f"The newest checkpoint is {newest}.")
        self.events.write("exit", outcome="failed", code=code, step=self.checkpointer.newest_step, error=str(error))
        # Committed checkpoints are still uploaded, and the event log with this error. After the loss of a process there
        # is no time: JAX may abort this process at any moment. Without the lock the files may be those of another run.
        if not isinstance(error, RemoteError | ProcessLostError):
            with contextlib.suppress(RemoteError):
                self.copies.finish(self._stop)
                if self.checkpointer.steps and not isinstance(error, LockHeldError):
                    self.copies.begin(self.checkpointer.newest_step)
                    self.copies.finish(self._stop)

    def close(self) -> None:
        """Close the files, and stop to ask for notices."""
        self._notices.close()
        self.metrics.close()
        self.events.close()


def _identity(path: Path) -> tuple[int, int] | None:
    """Return device and inode of a file, None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _format_duration(seconds: float) -> str:
    """Return a duration in its two largest units: 12s, 3m05s, 2h07m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
