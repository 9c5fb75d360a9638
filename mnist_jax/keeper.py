"""What process 0 keeps of a run while it trains: metrics, checkpoints, history, and what a person sees of it."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mnist_jax.checkpoint.checkpointer import Checkpointer, Notice
from mnist_jax.checkpoint.integrity import CheckpointError, InvalidStateError, SaveError
from mnist_jax.config import RECORDS
from mnist_jax.journal import Journal, Terminal
from mnist_jax.mirror import Mirror, MirrorFailed
from mnist_jax.preemption import StopSignal
from mnist_jax.training import Diverged, Metrics, Training, averages

RETRY_SAVE_S = 5.0
LAST_COPY_S = 20.0  # Between their signal and the kill schedulers leave 30 s, if nobody asks for more.


class Outcome(NamedTuple):
    """How a run ended: the last line on standard output, and the fields of the last event."""

    word: str
    fields: dict[str, Any]

    def __str__(self) -> str:
        """Return the line."""
        return " ".join([self.word, *(f"{name}={value}" for name, value in self.fields.items())])


class Copies:
    """The copies of a run's checkpoints in an object store, or nothing where no mirror was asked for."""

    def __init__(self, url: str | None, workdir: Path, store: Checkpointer, journal: Journal) -> None:
        """Copy what `store` commits in `workdir`."""
        self._mirror = Mirror(url) if url else None
        self._workdir, self._store, self._journal = workdir, store, journal
        self._last_failure: MirrorFailed | None = None

    @property
    def steps_under_way(self) -> set[int]:
        """The steps whose checkpoints are being copied, and so have to stay."""
        return self._mirror.steps_under_way if self._mirror is not None else set()

    def begin(self, step: int) -> None:
        """Begin to copy the checkpoint of a step; one that waits for its turn gives way to it."""
        if self._mirror is not None:
            self._mirror.begin_push(self._workdir, step, keep=self._store.steps, files=RECORDS)

    def failures(self) -> list[MirrorFailed]:
        """Return what was not copied since the last call, and write down what was."""
        failures = []
        for result in self._mirror.results() if self._mirror is not None else ():
            if isinstance(result, MirrorFailed):
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
            MirrorFailed: the last one was not.
        """
        if self._mirror is None:
            return
        signal_s = None
        while not self._mirror.wait(0.05):
            if stop.received is None:
                continue
            signal_s = signal_s or time.monotonic()
            if time.monotonic() > signal_s + LAST_COPY_S:
                raise MirrorFailed(f"{self._mirror.url}: the last copy was not made in {LAST_COPY_S:g} s")
        self.failures()
        if self._last_failure is not None:
            raise self._last_failure


class Keeper:
    """The records of a training, and the clock that says when to save."""

    def __init__(
        self,
        training: Training,
        store: Checkpointer,
        journal: Journal,
        terminal: Terminal,
        copies: Copies,
        about: dict[str, Any],
    ) -> None:
        """Watch a training; `about` is what each checkpoint says of the run besides its config."""
        self.training, self.programs = training, training.programs
        self.store, self.journal, self.terminal, self.copies = store, journal, terminal, copies
        self.config = training.config
        self.about = {"config": self.config.to_json(), **about}
        self._next_save_s = time.monotonic() + self.config.checkpoint_every_s
        self._trouble_told = False
        self._failure: Diverged | None = None
        self._best: set[int] = set()
        self._pin_best()

    @property
    def step(self) -> int:
        """The number of updates made, those in flight included."""
        return self.training.step

    def progress(self) -> None:
        """Show where the training is, if somebody watches."""
        if self.training.latest is not None and self.terminal.is_refresh_due:
            step, sums = self.training.latest
            self.terminal.progress(self._describe(step, *averages(sums)))

    def interval(self, metrics: Metrics | None) -> None:
        """Write the metrics of an interval that ended, if one did."""
        if metrics is not None:
            self._record("train", metrics)
            self.terminal.interval(self._describe(*metrics))

    def begin_evaluation(self, metrics: Metrics | None) -> None:
        """Write what comes before an evaluation: the metrics of the interval that ended there, if one did."""
        self.interval(metrics)
        self.journal.event("phase", step=self.step, phase="evaluate")

    def evaluation(self, metrics: Metrics | None) -> None:
        """Write the metrics of an evaluation that was not cut short."""
        if metrics is None:
            return
        step, loss, accuracy = metrics
        self._record("test", metrics)
        self.journal.event("evaluation", step=step, loss=loss, accuracy=accuracy)
        self.terminal.say(f"step {step}: test loss {loss:.4f}, test accuracy {accuracy:.4f}")
        self._pin_best()

    def _record(self, split: str, metrics: Metrics) -> None:
        step, loss, accuracy = metrics
        self.journal.record(step, split, loss=loss, accuracy=accuracy, learning_rate=self._learning_rate(step))

    def ask_to_save_if_due(self) -> None:
        """Request a save of all processes where the clock says so. Nobody waits for the sums of a call in flight."""
        is_due = time.monotonic() >= self._next_save_s
        if is_due and not self.store.is_saving and not self.training.has_sums_in_flight:
            self.training.council.ask_to_save()
            self._next_save_s = math.inf  # until all processes have heard of it

    def prepare_save(self, reason: str) -> dict[str, Any]:
        """Write the lines that lead to this step, for a checkpoint must not be there before them.

        Returns what `Checkpointer.save` takes besides the state: `metadata`, and `refuse` where that failed.
        """
        self._next_save_s = time.monotonic() + self.config.checkpoint_every_s
        self.interval(self.training.take_interval())
        try:
            self.journal.sync()
        except OSError as error:
            return {"refuse": f"metrics.jsonl cannot be written: {error}"}
        accuracy = self.journal.accuracy_at(self.step)
        metrics = self.journal.metrics_fingerprint()
        saved = {"reason": reason, "time": time.time(), "test_accuracy": accuracy, "metrics": metrics}
        return {"metadata": {**self.about, **saved}}

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
        for result in self.store.results():
            if isinstance(result, InvalidStateError):
                self._failure = Diverged("the state has values that are not finite")
                self.training.council.ask_to_stop()
            elif isinstance(result, SaveError):
                self._report_failure(result, another_follows=another_follows)
            elif isinstance(result, Notice):
                self.journal.event(result.event, step=result.step, text=result.text)
                self.terminal.warn(f"warning: {result}")
            else:
                self._pin_best()
                # A crash just before the next one is committed costs what lies between the two, and the time it takes.
                self._next_save_s -= result.seconds
                reason, sha256 = result.metadata["reason"], result.state_sha256
                self.journal.event("save", step=result.step, reason=reason, seconds=result.seconds, sha256=sha256)
                saved = result.step
        if saved in self.store.steps:
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
            Diverged: it is not finite, or one before it was not.
            SaveError: it could not be saved.
        """
        self._check()
        training, reason = self.training, "end"
        if not training.is_finished:
            assert stop.received is not None
            reason = f"signal {stop.received.name}"
            self.terminal.say(f"{stop.received.name}: saving step {self.step} and leaving; the same command carries on")
        request = self.prepare_save(reason)
        try:
            with contextlib.suppress(InvalidStateError):
                self.store.save_and_wait(self.step, training.updates.state, valid=training.is_finite(), **request)
        finally:
            self.report_saves(another_follows=False)
        self._check()
        self.copies.begin(self.step)
        if training.is_finished:
            return finished(self.step, self.journal, self.store)
        return stopped(self.step, stop, self.journal, self.store)

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _pin_best(self) -> None:
        """Have the best checkpoint kept; until it is committed, the one that was the best before it as well."""
        best = self.journal.best()
        if best is not None:
            before = set() if best["step"] in self.store.steps else self._best
            self._best = before | {best["step"]}
        self._pin()

    def _pin(self) -> None:
        """Have those checkpoints kept that have to stay, however old they are."""
        self.store.pinned = self._best | self.copies.steps_under_way

    def _learning_rate(self, step: int) -> float:
        """Return the learning rate of the update that led to a step, in the shortest digits that mean it."""
        return float(str(np.float32(self.programs.learning_rate(np.int32(step - 1)))))

    def _describe(self, step: int, loss: float, accuracy: float) -> str:
        """Return the line that tells where the training is, of at most 79 characters in a run of ordinary size."""
        updates, seconds_per_step = self.training.updates, self.training.pace.seconds_per_step
        return (
            f"step {step}/{updates.total_steps} epoch {step / updates.steps_per_epoch:.2f} loss {loss:.4f} "
            f"acc {accuracy:.4f} {self.config.batch_size / seconds_per_step:,.0f} img/s "
            f"{_duration((updates.total_steps - step) * seconds_per_step)} left "
            f"saved {self.store.newest_step if self.store.steps else 'none'}"
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
