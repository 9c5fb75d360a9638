"""The loop: where the pure functions, the checkpoints, the journal and the signals meet."""

import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mnist_jax import config as configs
from mnist_jax import data, distributed, provenance
from mnist_jax.checkpoint import (
    CheckpointError,
    CheckpointStore,
    InvalidState,
    Mismatch,
    NoReadableCheckpoint,
    Notice,
    Restored,
    SaveFailed,
    list_checkpoints,
)
from mnist_jax.config import Config, ConfigError
from mnist_jax.data import DataError, Dataset
from mnist_jax.journal import Journal, Terminal
from mnist_jax.preemption import Stopped, StopSignal
from mnist_jax.programs import Blueprint, Programs
from mnist_jax.train_state import MetricSums, TrainState
from mnist_jax.updates import Updates

T = TypeVar("T")

CALL_S = 0.06  # What a call should take. Two may be in flight, so a signal is seen within twice that.
RETRY_SAVE_S = 5.0


class Diverged(Exception):
    """The loss or the state is not finite any more."""


class Outcome(NamedTuple):
    """How a run ended: the last line on standard output, and the fields of the last event."""

    word: str
    fields: dict[str, Any]

    def __str__(self) -> str:
        """Return the line."""
        return " ".join([self.word, *(f"{name}={value}" for name, value in self.fields.items())])


EXIT_CODES: dict[type[Exception], int] = {
    Diverged: 1,
    ConfigError: 2,
    DataError: 2,
    Mismatch: 2,
    NoReadableCheckpoint: 65,
    SaveFailed: 74,
    OSError: 74,
}


def run(config: Config, workdir: Path, stop: StopSignal, loading: "Future[Dataset] | None" = None) -> int:
    """Train in `workdir` to the end or to a signal, tell how it went, and return the exit code.

    The caller sees to it that no other process writes there meanwhile, and may have begun to load the data.
    """
    provenance.prepare_jax(list_checkpoints(workdir / "checkpoints"))
    terminal = Terminal()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        journal, store = Journal(workdir), CheckpointStore(workdir / "checkpoints", keep=config.keep)
    except OSError as error:
        terminal.warn(f"error: {workdir} cannot hold a run ({error}); choose another --workdir")
        return 2
    try:
        outcome = train(config, workdir, stop, store, journal, terminal, loading)
        code = config.preempted_exit_code if outcome.word == "stopped" else 0
        journal.event("exit", outcome=outcome.word, code=code, **outcome.fields)
        terminal.say(str(outcome))
    except tuple(EXIT_CODES) as error:
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        terminal.warn(f"error: {error}")
        if code == 74:
            terminal.warn(f"The newest checkpoint is {f'of step {store.newest_step}' if store.steps else 'none'}.")
        elif isinstance(error, Mismatch):
            terminal.warn(
                "If another version of this program wrote it, carry on with that, or begin anew with --fresh."
            )
        journal.event("exit", outcome="failed", code=code, step=store.newest_step, error=str(error))
    finally:
        store.close()
        journal.close()
    return code


def train(
    config: Config,
    workdir: Path,
    stop: StopSignal,
    store: CheckpointStore,
    journal: Journal,
    terminal: Terminal,
    loading: "Future[Dataset] | None" = None,
) -> Outcome:
    """Carry a run on from its newest good checkpoint, or begin it, until its end or until a signal stops it.

    Raises:
        ConfigError: the config does not fit the devices, or the data is not what the run began with.
        DataError, Mismatch, NoReadableCheckpoint: what the run begins with is not there or not good.
        Diverged: the loss is not finite; that state is not saved.
        OSError: a file of the journal cannot be written.
        SaveFailed: the last save failed.
    """
    environment = provenance.describe_environment()
    journal.event("start", step=store.newest_step, config=config.to_json(), **environment)
    if store.removed:
        journal.event("unfinished_removed", step=store.newest_step, names=store.removed)
    if not store.steps:  # From the first moment the bare command knows what it is to carry on.
        configs.save(config, workdir / "config.json")
    try:
        journal.event("phase", step=store.newest_step, phase="data")
        load = loading.result if loading else lambda: data.load(config.dataset, config.data_dir, say=terminal.say)
        dataset = stop.run(load)
        blueprint = make_blueprint(config, dataset)
        restored = restore(blueprint, dataset, environment, store, journal, terminal)
        if restored is not None:  # Only now is it known that the config does not contradict the checkpoint.
            configs.save(config, workdir / "config.json")
        step = restored.step if restored else 0
        if step >= blueprint.total_steps and journal.accuracy_at(step) is not None:
            terminal.say(f"{workdir} is finished: --fresh starts it anew, --workdir DIR begins another run")
            return finished(step, journal, store)
        if restored is None:
            terminal.say(
                f"training {config.model} on {dataset.name}: {blueprint.total_steps} steps in {workdir}. "
                "Ctrl-C saves and leaves; the same command carries on."
            )
        journal.event("phase", step=step, phase="compile")
        programs = stop.run(blueprint.compile)
        state = restored.tree if restored else stop.run(blueprint.create)
    except Stopped:
        return stopped(store.newest_step, stop, journal, store)
    training = Training(blueprint, programs, dataset, state, stop, store, journal, terminal, environment)
    journal.event("phase", step=step, phase="train")
    training.evaluate_if_due()  # The last stop may have cut this very evaluation short.
    while not training.is_over and stop.received is None:
        training.advance()
        training.evaluate_if_due()
        training.save_if_due()
        training.report_saves()
    return training.end()


def make_blueprint(config: Config, dataset: Dataset) -> Blueprint:
    """Return what the programs are made from, the config checked against the data and the devices.

    Raises:
        ConfigError: the batch does not fit.
    """
    if jnp.result_type(float) != jnp.float32:
        raise ConfigError("JAX_ENABLE_X64 is set, and the training computes in 32 bits; unset it")
    train_size = len(dataset.train_labels)
    mesh = distributed.data_mesh()
    try:
        distributed.check_batch_divides(config.batch_size, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Blueprint(config, config.total_steps(train_size), train_size, len(dataset.test_labels), mesh)


def restore(
    blueprint: Blueprint,
    dataset: Dataset,
    environment: dict[str, Any],
    store: CheckpointStore,
    journal: Journal,
    terminal: Terminal,
) -> Restored | None:
    """Return the newest good checkpoint, if there is one, and cut the journal back to it.

    It says from where and how exactly the run is carried on.

    Raises:
        ConfigError: the run began with other data, or with other settings than a config that was changed since.
        NoReadableCheckpoint: none is good, or all are gone.
    """
    restored = store.restore(like=blueprint.abstract_state)
    if restored is None:
        if journal.tells_of_saves():
            raise NoReadableCheckpoint(
                f"the checkpoints of this run are gone from {store.directory}; "
                "bring them back, or begin anew with --fresh"
            )
        if lost_steps := journal.rewind(0):
            journal.event("lost", step=0, lost_steps=lost_steps)
            terminal.say(f"nothing had been saved yet: {lost_steps} steps or more are made again")
        return None
    for damaged, refuge in restored.set_aside:
        journal.event("quarantine", step=damaged.step, reason=str(damaged), moved_to=str(refuge))
        terminal.warn(
            f"warning: a checkpoint is not good, {damaged}. It was moved to {refuge}, and an older one is used."
        )
    provenance.check_step(restored.step, restored.tree)
    about = provenance.check_about(restored.manifest)
    provenance.check_same_run(about, blueprint.config, dataset, where=store.directory)
    changed = provenance.changes(about, environment)
    lost_steps = journal.rewind(restored.step) - restored.step
    if not journal.still_begins_with(about["metrics"]):
        journal.event("metrics_changed", step=restored.step)
        terminal.warn("warning: metrics.jsonl is not what it was: lines before this step are missing or changed")
    journal.event(
        "resume",
        step=restored.step,
        exact=not changed,
        changed=changed,
        lost_steps=lost_steps,
        saved_because=about["reason"],
    )
    lost = f"; {lost_steps} steps or more after it are made again" if lost_steps else ""
    manner = f"numerically equivalent, not bit for bit, for this changed: {'; '.join(changed)}" if changed else "exact"
    terminal.say(
        f"resumed {blueprint.config.model} on {dataset.name} from step {restored.step} of {blueprint.total_steps} "
        f"(saved because: {about['reason']}{lost}): {manner}"
    )
    return restored


def finished(step: int, journal: Journal, store: CheckpointStore) -> Outcome:
    """Return the outcome of a run that is at its end."""
    return Outcome(
        "finished", {"step": step, "test_accuracy": journal.accuracy_at(step), "state_sha256": store.sha256(step)}
    )


def stopped(step: int, stop: StopSignal, journal: Journal, store: CheckpointStore) -> Outcome:
    """Return the outcome of a run that a signal stopped, and that is saved; "none" where there is nothing to save."""
    assert stop.received is not None
    journal.event("signal", step=step, signal=stop.received.name)
    try:
        sha256 = store.sha256(step) if store.steps else "none"
    except CheckpointError:  # It was left before anybody looked at the checkpoints; the next start does.
        sha256 = "unknown"
    return Outcome("stopped", {"step": step, "signal": stop.received.name, "state_sha256": sha256})


class Training:
    """A run at work: its state on the device, and the step that the calls in flight lead to."""

    def __init__(
        self,
        blueprint: Blueprint,
        programs: Programs,
        dataset: Dataset,
        state: TrainState,
        stop: StopSignal,
        store: CheckpointStore,
        journal: Journal,
        terminal: Terminal,
        environment: dict[str, Any],
    ) -> None:
        """Put the data and the state on the device."""
        self.config = blueprint.config
        self.updates = Updates(blueprint, programs, dataset, state)
        self.eval_every_steps = self.config.eval_every_steps or self.updates.steps_per_epoch
        self.programs, self.stop, self.store, self.journal, self.terminal = programs, stop, store, journal, terminal
        self.about = {"config": self.config.to_json(), "data": provenance.describe_data(dataset), **environment}
        self._test_images, self._test_labels = (
            jax.device_put(array, distributed.replicated(blueprint.mesh))
            for array in (dataset.test_images, dataset.test_labels)
        )
        self._pace: Pace[MetricSums] = Pace(CALL_S)
        self._interval: tuple[int, MetricSums] | None = None
        self._next_save_s = time.monotonic() + self.config.checkpoint_every_s
        self._trouble_told = False
        self._pin_best()

    @property
    def step(self) -> int:
        """The number of updates made, those in flight included."""
        return self.updates.step

    @property
    def is_over(self) -> bool:
        """Whether all updates are made."""
        return self.step >= self.updates.total_steps

    def advance(self) -> None:
        """Dispatch one call of updates, and journal the interval that the call before it ended."""
        n = min(self._pace.steps_per_call, self._next_boundary() - self.step)
        sums = self.updates.advance(n)
        done = self._pace.dispatched(n, sums)
        if done is not None and self.terminal.is_refresh_due:
            self.terminal.progress(self._describe(self.step - n, *_averages(done)))
        self._journal_interval()
        if self.step % self.config.log_every_steps == 0:
            self._interval = self.step, sums

    def _next_boundary(self) -> int:
        """Return the step at which a call has to end at the latest: something is due there."""
        cadences = self.eval_every_steps, self.config.checkpoint_every_steps or self.updates.total_steps
        return min(self.updates.next_boundary, *(self.step - self.step % every + every for every in cadences))

    def _journal_interval(self) -> None:
        """Write the metrics of the interval that ended, if one did. They are on their way from the device."""
        if self._interval is None:
            return
        (step, sums), self._interval = self._interval, None
        loss, accuracy = _averages(sums)
        if not np.isfinite(loss):
            raise self._diverged(f"the loss of the updates up to step {step} is {loss}")
        self.journal.record(step, "train", loss=loss, accuracy=accuracy, learning_rate=self._learning_rate(step))
        self.terminal.interval(self._describe(step, loss, accuracy))

    def evaluate_if_due(self) -> None:
        """Evaluate where it is time to and was not done; a signal cuts it short, and the next start does it again."""
        due = self.is_over or (self.step > 0 and self.step % self.eval_every_steps == 0)
        if not due or self.journal.accuracy_at(self.step) is not None:
            return
        self._journal_interval()
        self.journal.event("phase", step=self.step, phase="evaluate")
        self._pace.drain()
        sums = self._evaluate()
        if sums is None:
            return
        loss, accuracy = _averages(sums)
        if not np.isfinite(loss):
            raise self._diverged(f"the test loss at step {self.step} is {loss}")
        self.journal.record(
            self.step, "test", loss=loss, accuracy=accuracy, learning_rate=self._learning_rate(self.step)
        )
        self.journal.event("evaluation", step=self.step, loss=loss, accuracy=accuracy)
        self.terminal.say(f"step {self.step}: test loss {loss:.4f}, test accuracy {accuracy:.4f}")
        self._pin_best()
        if self.step in self.store.pinned:
            self.save("best test accuracy so far")

    def _evaluate(self) -> MetricSums | None:
        """Return the metric sums over all test images, or None as soon as a signal asks to stop."""
        calls: list[MetricSums] = []
        for first in range(0, len(self._test_labels), self.programs.eval_call_images):
            calls.append(
                self.programs.evaluate(
                    self.updates.state.variables_to_use, self._test_images, self._test_labels, np.int32(first)
                )
            )
            jax.block_until_ready(calls[-2:][0])
            if self.stop.received is not None:
                return None
        return jax.tree.map(lambda *parts: np.sum(np.asarray(parts)), *calls)

    def save_if_due(self) -> None:
        """Save where the steps, the clock or a signal say so."""
        every_steps = self.config.checkpoint_every_steps
        if self.stop.take_save_request():
            self.save("signal SIGUSR2")
        elif every_steps is not None and self.step % every_steps == 0:
            self.save("steps")
        elif time.monotonic() >= self._next_save_s and not self.store.is_saving and not self._has_sums_in_flight:
            self.save("time")

    @property
    def _has_sums_in_flight(self) -> bool:
        """Whether a save would wait for the sums of an interval, and one after the next call would not."""
        return self._interval is not None and self.config.log_every_steps > self._pace.steps_per_call

    def save(self, reason: str) -> None:
        """Begin to save the state."""
        self._next_save_s = time.monotonic() + self.config.checkpoint_every_s
        try:
            about = self._prepare_save(reason)
        except SaveFailed as failure:
            self._report_failure(failure)
            return
        self.store.save(self.step, self.updates.state, about=about, valid=self.programs.is_finite(self.updates.state))

    def _prepare_save(self, reason: str) -> dict[str, Any]:
        """Bring the journal up to this step, for a checkpoint must not be there before the lines that lead to it."""
        self._journal_interval()
        try:
            self.journal.sync()
        except OSError as error:
            raise SaveFailed(self.step, f"metrics.jsonl cannot be written: {error}") from error
        accuracy = self.journal.accuracy_at(self.step)
        metrics = self.journal.metrics_fingerprint()
        return {**self.about, "reason": reason, "time": time.time(), "test_accuracy": accuracy, "metrics": metrics}

    def report_saves(self, *, another_follows: bool = True) -> None:
        """Tell how the saves went that ended, and of lines that the disk does not take."""
        trouble = self.journal.trouble
        if trouble and not self._trouble_told:
            self.terminal.warn(f"warning: lines of the journal cannot be written and are kept for later: {trouble}")
        elif self._trouble_told and not trouble:
            self.terminal.warn("the lines of the journal that could not be written are written now")
        self._trouble_told = trouble is not None
        for result in self.store.results():
            if isinstance(result, InvalidState):
                raise self._diverged("the state has values that are not finite")
            if isinstance(result, SaveFailed):
                self._report_failure(result, another_follows=another_follows)
            elif isinstance(result, Notice):
                self.journal.event(result.event, step=result.step, text=result.text)
                self.terminal.warn(f"warning: {result}")
            else:
                self._pin_best()
                # A crash just before the next one is committed costs what lies between the two, and the time it takes.
                self._next_save_s -= result.seconds
                reason = result.manifest["about"]["reason"]
                self.journal.event(
                    "save", step=result.step, reason=reason, seconds=result.seconds, sha256=result.sha256
                )

    def _report_failure(self, failure: SaveFailed, *, another_follows: bool = True) -> None:
        self._next_save_s = time.monotonic() + min(RETRY_SAVE_S, self.config.checkpoint_every_s)
        self.journal.event("save_failed", step=failure.step, error=str(failure))
        if another_follows:
            self.terminal.warn(f"warning: {failure}. Training goes on, and it is tried again.")

    def end(self) -> Outcome:
        """Save the state, unless it is saved already, and return the outcome.

        Raises:
            SaveFailed: it could not be saved.
        """
        is_finished = self.is_over and self.journal.accuracy_at(self.step) is not None
        reason = "end"
        if not is_finished:
            assert self.stop.received is not None
            reason = f"signal {self.stop.received.name}"
            self.terminal.say(f"{self.stop.received.name}: saving step {self.step} and leaving")
        about = self._prepare_save(reason)
        try:
            self.store.save_and_wait(
                self.step, self.updates.state, about=about, valid=self.programs.is_finite(self.updates.state)
            )
        finally:
            self.report_saves(another_follows=False)
        if is_finished:
            return finished(self.step, self.journal, self.store)
        return stopped(self.step, self.stop, self.journal, self.store)

    def _pin_best(self) -> None:
        """Have the best checkpoint kept; until it is committed, the one that was the best before it as well."""
        best = self.journal.best()
        if best is not None:
            before = set() if best["step"] in self.store.steps else self.store.pinned
            self.store.pinned = before | {best["step"]}

    def _learning_rate(self, step: int) -> float:
        """Return the learning rate of the update that led to a step, in the shortest digits that mean it."""
        return float(str(np.float32(self.programs.learning_rate(np.int32(step - 1)))))

    def _describe(self, step: int, loss: float, accuracy: float) -> str:
        """Return the line that tells where the training is, of at most 79 characters in a run of ordinary size."""
        images_per_s = self.config.batch_size / self._pace.seconds_per_step
        seconds_left = (self.updates.total_steps - step) * self._pace.seconds_per_step
        return (
            f"step {step}/{self.updates.total_steps} epoch {step / self.updates.steps_per_epoch:.2f} loss {loss:.4f} "
            f"acc {accuracy:.4f} {images_per_s:,.0f} img/s {_duration(seconds_left)} left "
            f"saved {self.store.newest_step if self.store.steps else 'none'}"
        )

    def _diverged(self, what: str) -> Diverged:
        return Diverged(
            f"{what}. Nothing of that was saved, and a rerun would come to the same point. "
            "Start anew with --fresh and a lower --learning-rate."
        )


def _averages(sums: MetricSums) -> tuple[float, float]:
    """Return mean loss and accuracy of metric sums, in the shortest digits that mean the float32."""
    loss = np.float32(sums.loss) / np.float32(sums.images)
    return float(str(loss)), int(sums.correct) / int(sums.images)


def _duration(seconds: float) -> str:
    """Return a length of time in its two largest units: 12s, 3m05s, 2h07m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


class Pace(Generic[T]):
    """Keep two calls in flight at most, and choose how many steps one makes so that it takes `call_s`."""

    def __init__(self, call_s: float) -> None:
        """Begin with calls of one step."""
        self.steps_per_call = 1
        self.seconds_per_step = call_s
        self._call_s = call_s
        self._in_flight: deque[tuple[int, T, float]] = deque()
        self._last_end_s = 0.0

    def dispatched(self, n: int, result: T) -> T | None:
        """Take note of a call of `n` steps, wait until the one before it is done, and return what that one gave."""
        self._in_flight.append((n, result, time.monotonic()))
        if len(self._in_flight) == 1:
            return None
        n, result, dispatched_s = self._in_flight.popleft()
        jax.block_until_ready(result)
        end_s = time.monotonic()
        took_s = (end_s - max(dispatched_s, self._last_end_s)) / n
        self._last_end_s = end_s
        self.seconds_per_step += 0.3 * (took_s - self.seconds_per_step)
        fitting = max(1, round(self._call_s / self.seconds_per_step))
        self.steps_per_call = min(2 * self.steps_per_call, fitting)
        return result

    def drain(self) -> None:
        """Wait for all calls, and forget them: what comes now is no part of their time."""
        for _, result, _ in self._in_flight:
            jax.block_until_ready(result)
        self._in_flight.clear()
