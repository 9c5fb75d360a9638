"""What a run records: metrics, history, checkpoints that are due, and what a person sees. Enabled on process 0 only."""

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
from mnist_jax.checkpoint.remote import RemoteError, RemoteStore
from mnist_jax.config import RECORDS, Config
from mnist_jax.console import Terminal
from mnist_jax.records.metrics import Journal
from mnist_jax.runtime.multihost import ProcessLostError
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training.dispatch import Dispatcher, DivergedError, Metrics, means

RETRY_SAVE_S = 5.0
LAST_COPY_S = 20.0  # Between their signal and the kill schedulers leave 30 s, if nobody asks for more.


class Outcome(NamedTuple):
    """How a run ended: the last line on standard output, and the fields of the last event."""

    word: str
    fields: dict[str, Any]

    @property
    def is_stopped(self) -> bool:
        """Whether a signal stopped it before its end."""
        return self.word == "stopped"

    def __str__(self) -> str:
        """Return the line."""
        return " ".join([self.word, *(f"{name}={value}" for name, value in self.fields.items())])


class RemoteCopies:
    """The copies of a run's checkpoints in an object store, or nothing where no mirror was asked for."""

    def __init__(self, url: str | None, workdir: Path, store: Checkpointer, journal: Journal) -> None:
        """Copy what `store` commits in `workdir`."""
        self._mirror = RemoteStore(url) if url else None
        self._workdir, self._store, self._journal = workdir, store, journal
        self._last_failure: RemoteError | None = None

    @property
    def uploading_steps(self) -> set[int]:
        """The steps whose checkpoints are being copied, and so have to stay."""
        return self._mirror.uploading_steps if self._mirror is not None else set()

    def begin(self, step: int) -> None:
        """Begin to copy the checkpoint of a step; one that waits for its turn gives way to it."""
        if self._mirror is not None:
            self._mirror.begin_upload(self._workdir, step, keep=self._store.steps, files=RECORDS)

    def failures(self) -> list[RemoteError]:
        """Return what was not copied since the last call, and write down what was."""
        failures = []
        for result in self._mirror.results() if self._mirror is not None else ():
            if isinstance(result, RemoteError):
                self._journal.event("copy_failed", step=self._store.newest_step, error=str(result))
                failures.append(result)
                self._last_failure = result
            else:
                self._journal.event("copy", step=result.step, seconds=result.seconds)
                self._last_failure = None
        return failures

    def finish(self, stop: StopSignal) -> None:
        """Wait until the copies under way are made; where a signal came, not for longer than schedulers have patience.

        Raises:
            RemoteError: the last one was not.
        """
        if self._mirror is None:
            return
        signal_s = None
        while not self._mirror.wait(0.05):
            if stop.received is None:
                continue
            signal_s = signal_s or time.monotonic()
            if time.monotonic() > signal_s + LAST_COPY_S:
                raise RemoteError(f"{self._mirror.url}: the last copy was not made in {LAST_COPY_S:g} s")
        self.failures()
        if self._last_failure is not None:
            raise self._last_failure


class Recorder:
    """The records of a run, and the clock that says when to save.

    All processes call it alike. Where it is not enabled it writes and prints nothing.
    """

    def __init__(self, config: Config, workdir: Path, checkpointer: Checkpointer, *, enabled: bool) -> None:
        """Open the files in `workdir`, which exists.

        Raises:
            OSError: they cannot be opened.
        """
        self.config, self.workdir, self.checkpointer, self.enabled = config, workdir, checkpointer, enabled
        self.terminal, self.journal = Terminal(enabled=enabled), Journal(workdir, enabled=enabled)
        self.copies = RemoteCopies(config.mirror if enabled else None, workdir, checkpointer, self.journal)
        self._next_save_s = math.inf
        self._trouble_told = False
        self._failure: DivergedError | None = None
        self._best: set[int] = set()

    def start(self, environment: dict[str, Any]) -> None:
        """Write that the run is started, with which settings and where."""
        step = self.checkpointer.newest_step
        self.journal.event("start", step=step, config=self.config.to_json(), **environment)
        if self.checkpointer.removed:
            self.journal.event("unfinished_removed", step=step, names=self.checkpointer.removed)
        if not self.checkpointer.steps:  # From the first moment on the command without flags knows what to resume.
            self.save_config()

    def save_config(self) -> None:
        """Write the config, which is the default of all flags at the next start."""
        if self.enabled:
            configs.save(self.config, self.workdir / "config.json")

    def phase(self, name: str, step: int) -> None:
        """Write that a phase of the run begins."""
        self.journal.event("phase", step=step, phase=name)

    def begin_training(self, dispatcher: Dispatcher, metadata: dict[str, Any]) -> None:
        """Record a training; `metadata` is what each checkpoint says of the run besides its config."""
        self.dispatcher = dispatcher
        self.metadata = {"config": self.config.to_json(), **metadata}
        self._next_save_s = time.monotonic() + self.config.checkpoint_every_s
        self._pin_best()
        self.phase("train", self.step)

    @property
    def step(self) -> int:
        """The number of updates made, those in flight included."""
        return self.dispatcher.step

    def progress(self) -> None:
        """Show where the training is, if somebody watches."""
        if self.dispatcher.latest is not None and self.terminal.is_refresh_due:
            step, sums = self.dispatcher.latest
            self.terminal.progress(self._describe(step, *means(sums)))

    def interval(self, metrics: Metrics | None) -> None:
        """Write the metrics of an interval that ended, if one did."""
        if metrics is not None:
            self._record("train", metrics)
            self.terminal.interval(self._describe(*metrics))

    def begin_evaluation(self, metrics: Metrics | None) -> None:
        """Write what comes before an evaluation: the metrics of the interval that ended there, if one did."""
        self.interval(metrics)
        self.phase("evaluate", self.step)

    def evaluation(self, metrics: Metrics | None) -> None:
        """Write the metrics of an evaluation that was not cut short."""
        if metrics is None:
            return
        step, loss, accuracy = metrics
        self._record("test", metrics)
        self.journal.event("evaluation", step=step, loss=loss, accuracy=accuracy)
        self.terminal.info(f"step {step}: test loss {loss:.4f}, test accuracy {accuracy:.4f}")
        self._pin_best()

    def _record(self, split: str, metrics: Metrics) -> None:
        step, loss, accuracy = metrics
        self.journal.record(step, split, loss=loss, accuracy=accuracy, learning_rate=self._learning_rate(step))

    def ask_to_save_if_due(self) -> None:
        """Request a save of all processes where the clock says so. Nobody waits for the sums of a call in flight."""
        is_due = self.enabled and time.monotonic() >= self._next_save_s
        if is_due and not self.checkpointer.is_saving and not self.dispatcher.has_sums_in_flight:
            self.dispatcher.agreement.request_save()
            self._next_save_s = math.inf  # until all processes have heard of it

    def prepare_save(self, reason: str) -> dict[str, Any]:
        """Write the lines that lead to this step, for a checkpoint must not be there before them.

        Returns what `Checkpointer.save` takes besides the state: `metadata`, and `refuse` where that failed.
        """
        self._next_save_s = time.monotonic() + self.config.checkpoint_every_s
        self.interval(self.dispatcher.pop_train_metrics())
        try:
            self.journal.sync()
        except OSError as error:
            return {"refuse": f"metrics.jsonl cannot be written: {error}"}
        accuracy = self.journal.accuracy_at(self.step)
        metrics = self.journal.metrics_fingerprint()
        saved = {"reason": reason, "time": time.time(), "test_accuracy": accuracy, "metrics": metrics}
        return {"metadata": {**self.metadata, **saved}}

    def report_saves(self, *, another_follows: bool = True) -> None:
        """Tell how the saves went that ended, and of lines that the disk does not take.

        A state that is not finite was not saved: all processes are asked to stop, and then `end` fails.
        """
        trouble = self.journal.trouble
        if trouble and not self._trouble_told:
            self.terminal.warn(f"warning: lines of the journal cannot be written and are kept for later: {trouble}")
        elif self._trouble_told and not trouble:
            self.terminal.warn("the lines of the journal that could not be written are written now")
        self._trouble_told = trouble is not None
        saved = None
        for result in self.checkpointer.results():
            if isinstance(result, InvalidStateError):
                self._failure = DivergedError("the state has values that are not finite")
                self.dispatcher.agreement.request_stop()
            elif isinstance(result, SaveError):
                self._report_failure(result, another_follows=another_follows)
            elif isinstance(result, StorageWarning):
                self.journal.event(result.event, step=result.step, text=result.text)
                self.terminal.warn(f"warning: {result}")
            else:
                self._pin_best()
                # A crash just before the next one is committed costs what lies between the two, and the time it takes.
                self._next_save_s -= result.seconds
                reason, sha256 = result.metadata["reason"], result.state_sha256
                self.journal.event("save", step=result.step, reason=reason, seconds=result.seconds, sha256=sha256)
                saved = result.step
        if saved in self.checkpointer.steps:
            self.copies.begin(saved)
        if another_follows:
            for failure in self.copies.failures():
                self.terminal.warn(f"warning: {failure}. Training goes on, and the next checkpoint is copied again.")
        self._pin()

    def _report_failure(self, failure: SaveError, *, another_follows: bool = True) -> None:
        self._next_save_s = time.monotonic() + min(RETRY_SAVE_S, self.config.checkpoint_every_s)
        self.journal.event("save_failed", step=failure.step, error=str(failure))
        if another_follows:
            self.terminal.warn(f"warning: {failure}. Training goes on, and it is tried again.")

    def end(self, stop: StopSignal) -> Outcome:
        """Save the state, unless it is saved already, and return the outcome.

        Raises:
            DivergedError: it is not finite, or one before it was not.
            SaveError: it could not be saved.
        """
        self._check()
        dispatcher, reason = self.dispatcher, "end"
        if not dispatcher.is_finished:
            assert stop.received is not None
            reason = f"signal {stop.received.name}"
            self.terminal.info(f"{stop.received.name}: saving step {self.step} and exiting; the same command resumes")
        request = self.prepare_save(reason)
        try:
            with contextlib.suppress(InvalidStateError):
                self.checkpointer.save(self.step, dispatcher.state, valid=dispatcher.is_finite(), **request, wait=True)
        finally:
            self.report_saves(another_follows=False)
        self._check()
        self.copies.begin(self.step)
        if dispatcher.is_finished:
            return finished(self.step, self.journal, self.checkpointer)
        return stopped(self.step, stop, self.journal, self.checkpointer)

    def stopped(self, stop: StopSignal) -> Outcome:
        """Return the outcome of a run that a signal stopped before its training began."""
        return stopped(self.checkpointer.newest_step, stop, self.journal, self.checkpointer)

    def exit(self, outcome: Outcome, code: int) -> None:
        """Write how the run ended."""
        self.journal.event("exit", outcome=outcome.word, code=code, **outcome.fields)
        self.terminal.info(str(outcome))

    def fail(self, error: Exception, code: int | None, stop: StopSignal) -> None:
        """Write that the run failed, and which checkpoint is left."""
        newest = f"of step {self.checkpointer.newest_step}" if self.checkpointer.steps else "none"
        if isinstance(error, ProcessLostError | SaveError | RemoteError | ReadError | OSError):
            self.terminal.warn(f"The newest checkpoint is {newest}.")
        # What was saved before is to be copied all the same, but without a peer JAX may end this process any moment.
        if not isinstance(error, RemoteError | ProcessLostError):
            with contextlib.suppress(RemoteError):
                self.copies.finish(stop)
        step = self.checkpointer.newest_step
        self.journal.event("exit", outcome="failed", code=code, step=step, error=str(error))

    def close(self) -> None:
        """Close the files."""
        self.journal.close()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _pin_best(self) -> None:
        """Have the best checkpoint kept; until it is committed, the one that was the best before it as well."""
        best = self.journal.best()
        if best is not None:
            before = set() if best["step"] in self.checkpointer.steps else self._best
            self._best = before | {best["step"]}
        self._pin()

    def _pin(self) -> None:
        """Have those checkpoints kept that have to stay, however old they are."""
        self.checkpointer.pinned = self._best | self.copies.uploading_steps

    def _learning_rate(self, step: int) -> float:
        """Return the learning rate of the update that led to a step, in the shortest digits that mean it."""
        return float(str(np.float32(self.dispatcher.trainer.learning_rate(np.int32(step - 1)))))

    def _describe(self, step: int, loss: float, accuracy: float) -> str:
        """Return the line that tells where the training is, of at most 79 characters in a run of ordinary size."""
        trainer, seconds_per_step = self.dispatcher.trainer, self.dispatcher.queue.seconds_per_step
        return (
            f"step {step}/{trainer.total_steps} epoch {step / trainer.steps_per_epoch:.2f} loss {loss:.4f} "
            f"acc {accuracy:.4f} {self.config.batch_size / seconds_per_step:,.0f} img/s "
            f"{_duration((trainer.total_steps - step) * seconds_per_step)} left "
            f"saved {self.checkpointer.newest_step if self.checkpointer.steps else 'none'}"
        )


def finished(step: int, journal: Journal, store: Checkpointer) -> Outcome:
    """Return the outcome of a run that is at its end."""
    return Outcome(
        "finished", {"step": step, "test_accuracy": journal.accuracy_at(step), "state_sha256": store.state_sha256(step)}
    )


def stopped(step: int, stop: StopSignal, journal: Journal, store: Checkpointer) -> Outcome:
    """Return the outcome of a run that a signal stopped, and that is saved; "none" where there is nothing to save."""
    assert stop.received is not None
    # None where another process caught it.
    journal.event("signal", step=step, signal=stop.received.name, seconds=stop.seconds_since)
    try:
        sha256 = store.state_sha256(step) if store.steps else "none"
    except CheckpointError:  # It was left before anybody looked at the checkpoints; the next start does.
        sha256 = "unknown"
    return Outcome("stopped", {"step": step, "signal": stop.received.name, "state_sha256": sha256})


def _duration(seconds: float) -> str:
    """Return a length of time in its two largest units: 12s, 3m05s, 2h07m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
