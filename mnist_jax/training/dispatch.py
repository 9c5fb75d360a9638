"""Dispatch: two calls in flight, and the result of each call read one call later. The same on all processes."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from mnist_jax.runtime.agreement import Agreement
from mnist_jax.runtime.multihost import ProcessGroup
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training.data import Dataset
from mnist_jax.training.train_state import MetricSums, TrainState
from mnist_jax.training.trainer import Trainer

# Target duration of a call; one update is the minimum. A signal is acted on when the calls in flight have ended: two,
# three where an evaluation begins, four with several processes.
CALL_S = 0.06


class DivergedError(Exception):
    """The loss or the state is not finite."""

    def __init__(self, problem: str) -> None:
        """Create the message from what is not finite."""
        super().__init__(
            f"{problem}. That state is not saved, and a rerun would reach it again. "
            "Start over with --fresh and a lower --learning-rate."
        )


class Metrics(NamedTuple):
    """Mean loss in nats and accuracy: over the training images of the interval that ended at a step, or in a test."""

    step: int
    loss: float
    accuracy: float


class Dispatcher:
    """Dispatches training and evaluation calls. It keeps two in flight, and does not write files.

    All processes dispatch the same calls in the same order.
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
        """Copy the data to the devices. The buffers of `state` are donated.

        Args:
            trainer: the compiled functions.
            dataset: the images.
            state: the state to start from.
            stop: receives the signals of this process.
            group: the processes that train together.
            is_evaluated: whether the test metrics of `state` are recorded.
            best_accuracy: the highest test accuracy so far, None before the first evaluation.
        """
        self.trainer, self.config, self.state = trainer, trainer.config, state
        self.step = int(state.step)  # number of updates dispatched
        self.queue = DispatchQueue()
        self.latest: tuple[int, MetricSums] | None = None  # the newest finished call: its last step and its sums
        self.agreement = Agreement(trainer.mesh, stop)
        self._group, self._data = group, trainer.put(dataset)
        self._interval: tuple[int, MetricSums] | None = None
        self._evaluated_step = self.step if is_evaluated else None
        self._best_accuracy = best_accuracy

    @property
    def is_over(self) -> bool:
        """Whether all updates are dispatched."""
        return self.step >= self.trainer.total_steps

    @property
    def is_finished(self) -> bool:
        """Whether all updates are made and the result is evaluated."""
        return self.is_over and self._evaluated_step == self.step

    def advance(self) -> Metrics | None:
        """Dispatch one training call. Return the metrics of the log interval that ended with the call before, if any.

        Raises:
            DivergedError: the loss is not finite.
            ProcessLostError: another process is lost.
        """
        n = min(self.agreement.steps_per_call(self.queue.steps_per_call), self._next_boundary() - self.step)
        with self._group.watch():
            self.state, sums = self.trainer.advance(self.state, self._data, step=self.step, n=n)
        for finished in self._put(self.queue, n, sums):
            self.latest = self.step, finished
        self.step += n
        ended = self.pop_train_metrics()
        if self.step % self.config.log_every_steps == 0:
            self._interval = self.step, sums
        return ended

    def _next_boundary(self) -> int:
        """Return the step where the next call must end, because something is due there."""
        cadences = self.trainer.eval_every_steps, self.config.checkpoint_every_steps or self.trainer.total_steps
        boundary = self.trainer.next_boundary(self.step)
        return min(boundary, *(self.step - self.step % every + every for every in cadences))

    def pop_train_metrics(self) -> Metrics | None:
        """Return the metrics of the log interval that ended, if any. Waits for them.

        Raises:
            DivergedError: the loss is not finite.
            ProcessLostError: another process is lost.
        """
        if self._interval is None:
            return None
        (step, sums), self._interval = self._interval, None
        with self._group.watch():
            metrics = Metrics(step, *means(sums))
        if not np.isfinite(metrics.loss):
            raise DivergedError(f"the loss of the updates up to step {step} is {metrics.loss}")
        return metrics

    @property
    def has_sums_in_flight(self) -> bool:
        """Whether `pop_train_metrics` would wait now, but not after the next call."""
        return self._interval is not None and self.config.log_every_steps > self.queue.steps_per_call

    def pop_save_reason(self) -> str:
        """Return why all processes save now, "" if they do not."""
        every_steps = self.config.checkpoint_every_steps
        requested = self.agreement.pop_save_request()
        if requested != "signal SIGUSR2" and every_steps is not None and self.step % every_steps == 0:
            return "steps"
        return requested

    def is_finite(self) -> jax.Array:
        """Return whether the state is finite, [] bool, without waiting for it. The same in all processes."""
        with self._group.watch():
            return self.trainer.is_finite(self.state)

    @property
    def is_evaluation_due(self) -> bool:
        """Whether this step is to be evaluated and has not been; a stop may have interrupted the evaluation."""
        due = self.is_over or (self.step > 0 and self.step % self.trainer.eval_every_steps == 0)
        return due and self._evaluated_step != self.step

    def evaluate(self) -> tuple[Metrics | None, bool]:
        """Return the metrics on the test images, and whether the accuracy is the best so far.

        A signal interrupts the evaluation; then the metrics are None.

        Raises:
            DivergedError: the loss is not finite.
            ProcessLostError: another process is lost.
        """
        for finished in self._drain(self.queue):
            self.latest = self.step, finished
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

    def _evaluate(self) -> MetricSums | None:
        queue = DispatchQueue()
        parts: list[MetricSums] = []
        images, labels = self._data.test_images, self._data.test_labels
        for first in range(0, len(labels), self.trainer.eval_call_images):
            with self._group.watch():
                sums, _ = self.trainer.evaluate(self.state.eval_variables, images, labels, np.int32(first))
            parts += self._put(queue, 1, sums)
            if self.agreement.should_stop:
                self._drain(queue)
                return None
        return add_sums(parts + self._drain(queue))

    def _put(self, queue: "DispatchQueue", n: int, sums: MetricSums) -> list[MetricSums]:
        """Queue a call with the requests of this process. Return the sums of the call before, if there is one."""
        with self._group.watch():
            finished = queue.put(n, (sums, self.agreement.send(self.queue.steps_per_call)))
        return self._read([] if finished is None else [finished])

    def _drain(self, queue: "DispatchQueue") -> list[MetricSums]:
        """Wait for the calls in flight, and return their sums."""
        with self._group.watch():
            finished = queue.drain()
        return self._read(finished)

    def _read(self, finished: list[tuple[MetricSums, jax.Array | None]]) -> list[MetricSums]:
        for _, requests in finished:
            self.agreement.update(requests)
        return [sums for sums, _ in finished]

    def block_until_ready(self) -> None:
        """Wait for all calls. After this, the loss of another process breaks no update.

        Raises:
            ProcessLostError: another process is lost.
        """
        with self._group.watch():
            self.queue.drain()


def add_sums(parts: Sequence[MetricSums]) -> MetricSums:
    """Return the metric sums over all calls of an evaluation."""
    return jax.tree.map(lambda *values: np.sum(np.asarray(values)), *parts)


def means(sums: MetricSums) -> tuple[float, float]:
    """Return mean loss, as the shortest decimal number that is the same float32, and accuracy."""
    loss = np.float32(sums.loss) / np.float32(sums.images)
    return float(str(loss)), int(sums.correct) / int(sums.images)


class DispatchQueue:
    """Keeps at most two calls in flight, and adapts the steps per call so that a call takes `CALL_S`."""

    def __init__(self) -> None:
        """Start with one step per call."""
        self.steps_per_call = 1
        self._mean_s, self._mean_steps = CALL_S, 1.0  # of a call: exponential moving averages
        self._in_flight: deque[tuple[int, Any, float]] = deque()
        self._last_end_s = 0.0

    @property
    def seconds_per_step(self) -> float:
        """The duration of a step in the recent calls."""
        return self._mean_s / self._mean_steps

    def put(self, n: int, result: Any) -> Any:
        """Add a call of `n` steps. Wait for the call before it and return its result; None if there is no such call."""
        self._in_flight.append((n, result, time.monotonic()))
        if len(self._in_flight) == 1:
            return None
        n, result, dispatched_s = self._in_flight.popleft()
        jax.block_until_ready(result)
        end_s = time.monotonic()
        call_s = end_s - max(dispatched_s, self._last_end_s)
        self._last_end_s = end_s
        # Not the mean of the ratios: the few steps of a call that ends an epoch would count as much as the others.
        self._mean_s += 0.3 * (call_s - self._mean_s)
        self._mean_steps += 0.3 * (n - self._mean_steps)
        fitting = max(1, round(CALL_S / self.seconds_per_step))
        self.steps_per_call = min(2 * self.steps_per_call, fitting)
        return result

    def drain(self) -> list[Any]:
        """Wait for all calls, and return their results. They do not count for the steps per call."""
        results = [jax.block_until_ready(result) for _, result, _ in self._in_flight]
        self._in_flight.clear()
        return results
