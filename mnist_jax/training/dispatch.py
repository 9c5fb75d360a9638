"""The calls of a training: dispatched two at a time, their results read one call later. The same on all processes."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np

from mnist_jax.runtime import devices
from mnist_jax.runtime.agreement import Agreement
from mnist_jax.runtime.multihost import ProcessGroup
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training.data import Dataset
from mnist_jax.training.train_state import MetricSums, TrainState
from mnist_jax.training.trainer import Trainer

T = TypeVar("T")

CALL_S = 0.06  # Target duration of a call. Two may be in flight, so a signal is acted on within twice that.


class DivergedError(Exception):
    """The loss or the state is not finite any more."""

    def __init__(self, what: str) -> None:
        """Say what is not finite."""
        super().__init__(
            f"{what}. Nothing of that was saved, and a rerun would come to the same point. "
            "Start anew with --fresh and a lower --learning-rate."
        )


class Metrics(NamedTuple):
    """Mean loss in nats and share of right answers, of the images that led to a step or of the test images there."""

    step: int
    loss: float
    accuracy: float


class Dispatcher:
    """Dispatches the calls of a training and of its evaluation, and reads the result of each one call later.

    All processes dispatch the same calls. It writes nothing.
    """

    def __init__(
        self,
        trainer: Trainer,
        dataset: Dataset,
        state: TrainState,
        *,
        stop: StopSignal,
        group: ProcessGroup,
        is_evaluated: bool,
        best_accuracy: float | None = None,
    ) -> None:
        """Put the data on the devices.

        Args:
            trainer: the compiled functions.
            dataset: the images.
            state: where the training begins or resumes; its buffers are donated.
            stop: receives the signals of this process.
            group: the processes that train together.
            is_evaluated: whether the state was evaluated before it was saved.
            best_accuracy: the highest test accuracy so far, None where there was no evaluation.
        """
        self.trainer, self.config, self.state = trainer, trainer.config, state
        self.step = int(state.step)  # the number of updates made, those in flight included
        self.queue: DispatchQueue[tuple[MetricSums, jax.Array | None]] = DispatchQueue(CALL_S)
        self.latest: tuple[int, MetricSums] | None = None  # the newest call that is done: its last step, its sums
        self.agreement = Agreement(trainer.mesh, stop)
        self._group, self._data = group, trainer.put(dataset)
        self._interval: tuple[int, MetricSums] | None = None
        self._evaluated_step = self.step if is_evaluated else None
        self._best_accuracy = best_accuracy

    @property
    def is_over(self) -> bool:
        """Whether all updates are made."""
        return self.step >= self.trainer.total_steps

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do but to save."""
        return self.is_over and self._evaluated_step == self.step

    def advance(self) -> Metrics | None:
        """Dispatch one call of updates, and return the metrics of the interval that the call before it ended, if any.

        Raises:
            DivergedError: the loss is not finite.
            ProcessLostError: another process is gone.
        """
        steps = self.queue.steps_per_call
        n = min(self.agreement.steps_per_call(steps), self._next_boundary() - self.step)
        self.state, sums = self.trainer.advance(self.state, self._data, step=self.step, n=n)
        with self._group.watch():
            done = self.queue.put(n, (sums, self.agreement.send(steps)))
        if done is not None:
            self._read(self.step, *done)
        self.step += n
        ended = self.pop_train_metrics()
        if self.step % self.config.log_every_steps == 0:
            self._interval = self.step, sums
        return ended

    def _read(self, step: int, sums: MetricSums, total: jax.Array | None) -> None:
        self.latest = step, sums
        self.agreement.update(total)

    def _next_boundary(self) -> int:
        """Return the step at which a call has to end at the latest: something is due there."""
        cadences = self.trainer.eval_every_steps, self.config.checkpoint_every_steps or self.trainer.total_steps
        boundary = self.trainer.next_boundary(self.step)
        return min(boundary, *(self.step - self.step % every + every for every in cadences))

    def pop_train_metrics(self) -> Metrics | None:
        """Return the metrics of the interval that ended, if one did. They are on their way from the device.

        Raises:
            DivergedError: the loss is not finite.
        """
        if self._interval is None:
            return None
        (step, sums), self._interval = self._interval, None
        with self._group.watch():
            metrics = Metrics(step, *means(sums))
        if not np.isfinite(metrics.loss):
            raise DivergedError(f"the loss of the updates up to step {step} is {metrics.loss}")
        return metrics

    def pop_save_reason(self) -> str:
        """Return why all processes are to save now, "" if they are not."""
        every_steps = self.config.checkpoint_every_steps
        requested = self.agreement.pop_save_request()
        if requested != "signal SIGUSR2" and every_steps is not None and self.step % every_steps == 0:
            return "steps"
        return requested

    def is_finite(self) -> jax.Array:
        """Return whether the state is finite. [] bool, still being computed; the same in all processes."""
        return self.trainer.is_finite(devices.local_replica(self.state))

    @property
    def has_sums_in_flight(self) -> bool:
        """Whether to take the interval now is to wait for its sums, and after the next call is not."""
        return self._interval is not None and self.config.log_every_steps > self.queue.steps_per_call

    @property
    def is_evaluation_due(self) -> bool:
        """Whether it is time to evaluate and was not done; the last stop may have cut this very evaluation short."""
        due = self.is_over or (self.step > 0 and self.step % self.trainer.eval_every_steps == 0)
        return due and self._evaluated_step != self.step

    def evaluate(self) -> tuple[Metrics | None, bool]:
        """Return the metrics over all test images and whether the accuracy is the best so far.

        As soon as a signal asks to stop there are no metrics, but None.

        Raises:
            DivergedError: the loss is not finite.
            ProcessLostError: another process is gone.
        """
        with self._group.watch():
            calls_in_flight = self.queue.drain()
        for call in calls_in_flight:
            self._read(self.step, *call)
        sums = self._evaluate()
        if sums is None:
            return None, False
        metrics = Metrics(self.step, *means(sums))
        if not np.isfinite(metrics.loss):
            raise DivergedError(f"the test loss at step {self.step} is {metrics.loss}")
        self._evaluated_step = self.step
        is_best = self._best_accuracy is None or metrics.accuracy > self._best_accuracy
        self._best_accuracy = metrics.accuracy if is_best else self._best_accuracy
        return metrics, is_best

    def block_until_ready(self) -> None:
        """Wait until all calls are done: what comes then is of this process alone, and no other can break it.

        Raises:
            ProcessLostError: another process is gone.
        """
        with self._group.watch():
            self.queue.drain()

    def _evaluate(self) -> MetricSums | None:
        queue: DispatchQueue[tuple[MetricSums, jax.Array | None]] = DispatchQueue(CALL_S)
        parts: list[MetricSums] = []
        images, labels = self._data.test_images, self._data.test_labels
        for first in range(0, len(labels), self.trainer.eval_call_images):
            sums, _ = self.trainer.evaluate(self.state.eval_variables, images, labels, np.int32(first))
            with self._group.watch():
                done = queue.put(1, (sums, self.agreement.send(self.queue.steps_per_call)))
            if done is not None:
                self._take(parts, *done)
            if self.agreement.should_stop:
                return None
        with self._group.watch():
            calls_in_flight = queue.drain()
        for call in calls_in_flight:
            self._take(parts, *call)
        return add_sums(parts)

    def _take(self, parts: list[MetricSums], sums: MetricSums, total: jax.Array | None) -> None:
        parts.append(sums)
        self.agreement.update(total)


def add_sums(parts: Sequence[MetricSums]) -> MetricSums:
    """Return the metric sums over all calls of an evaluation."""
    return jax.tree.map(lambda *values: np.sum(np.asarray(values)), *parts)


def means(sums: MetricSums) -> tuple[float, float]:
    """Return mean loss and accuracy of metric sums, in the shortest decimal form of the float32."""
    loss = np.float32(sums.loss) / np.float32(sums.images)
    return float(str(loss)), int(sums.correct) / int(sums.images)


class DispatchQueue(Generic[T]):
    """Keep two calls in flight at most, and choose how many steps one makes so that it takes `call_s`."""

    def __init__(self, call_s: float) -> None:
        """Begin with calls of one step."""
        self.steps_per_call = 1
        self.seconds_per_step = call_s
        self._call_s = call_s
        self._in_flight: deque[tuple[int, T, float]] = deque()
        self._last_end_s = 0.0

    def put(self, n: int, result: T) -> T | None:
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

    def drain(self) -> list[T]:
        """Wait for all calls, return what they gave, and forget them: what comes now is no part of their time."""
        results = [jax.block_until_ready(result) for _, result, _ in self._in_flight]
        self._in_flight.clear()
        return results
