"""A run at work: calls of updates and of the evaluation, the same ones on all processes. It writes nothing."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np

from mnist_jax import distributed
from mnist_jax.council import Council
from mnist_jax.data import Dataset
from mnist_jax.peers import Peers
from mnist_jax.preemption import StopSignal
from mnist_jax.programs import Blueprint, Programs
from mnist_jax.train_state import MetricSums, TrainState
from mnist_jax.updates import Updates

T = TypeVar("T")

CALL_S = 0.06  # What a call should take. Two may be in flight, so a signal is seen within twice that.


class Diverged(Exception):
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


class Training:
    """The state on the devices, and the step that the calls in flight lead to."""

    def __init__(
        self,
        blueprint: Blueprint,
        programs: Programs,
        dataset: Dataset,
        state: TrainState,
        stop: StopSignal,
        peers: Peers,
        *,
        is_evaluated: bool,
        best_accuracy: float | None = None,
    ) -> None:
        """Put the data and the state on the devices.

        Args:
            blueprint: what the programs were made from.
            programs: the compiled programs.
            dataset: the images.
            state: the point of the training to go on from.
            stop: listens for signals.
            peers: the processes that train together.
            is_evaluated: whether the state was evaluated before it was saved.
            best_accuracy: the highest test accuracy so far, None where there was no evaluation.
        """
        self.config = blueprint.config
        self.updates = Updates(blueprint, programs, dataset, state)
        self.pace: Pace[tuple[MetricSums, jax.Array]] = Pace(CALL_S)
        self.latest: tuple[int, MetricSums] | None = None  # the newest call that is done: its last step, its sums
        self._eval_every_steps = self.config.eval_every_steps or self.updates.steps_per_epoch
        self.programs, self._peers = programs, peers
        self.council = Council(blueprint.mesh, stop)  # what all processes have agreed on
        self._test_images, self._test_labels = (
            distributed.put(array, distributed.replicated(blueprint.mesh))
            for array in (dataset.test_images, dataset.test_labels)
        )
        self._interval: tuple[int, MetricSums] | None = None
        self._evaluated_step = self.step if is_evaluated else None
        self._best_accuracy = best_accuracy

    @property
    def step(self) -> int:
        """The number of updates made, those in flight included."""
        return self.updates.step

    @property
    def is_over(self) -> bool:
        """Whether all updates are made."""
        return self.step >= self.updates.total_steps

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do but to save."""
        return self.is_over and self._evaluated_step == self.step

    def advance(self) -> Metrics | None:
        """Dispatch one call of updates, and return the metrics of the interval that the call before it ended, if any.

        Raises:
            Diverged: the loss is not finite.
            PeerLost: another process is gone.
        """
        n = min(self.council.steps(self.pace.steps_per_call), self._next_boundary() - self.step)
        call = self.updates.advance(n, self.council.wishes(self.pace.steps_per_call))
        with self._peers.mind():
            done = self.pace.dispatched(n, call)
        if done is not None:
            self._hear(self.step - n, *done)
        ended = self.take_interval()
        if self.step % self.config.log_every_steps == 0:
            self._interval = self.step, call[0]
        return ended

    def _hear(self, step: int, sums: MetricSums, heard: jax.Array) -> None:
        self.latest = step, sums
        self.council.hear(heard)

    def _next_boundary(self) -> int:
        """Return the step at which a call has to end at the latest: something is due there."""
        cadences = self._eval_every_steps, self.config.checkpoint_every_steps or self.updates.total_steps
        return min(self.updates.next_boundary, *(self.step - self.step % every + every for every in cadences))

    def take_interval(self) -> Metrics | None:
        """Return the metrics of the interval that ended, if one did. They are on their way from the device.

        Raises:
            Diverged: the loss is not finite.
        """
        if self._interval is None:
            return None
        (step, sums), self._interval = self._interval, None
        with self._peers.mind():
            metrics = Metrics(step, *averages(sums))
        if not np.isfinite(metrics.loss):
            raise Diverged(f"the loss of the updates up to step {step} is {metrics.loss}")
        return metrics

    def take_save_reason(self) -> str:
        """Return why all processes are to save now, "" if they are not."""
        every_steps = self.config.checkpoint_every_steps
        requested = self.council.take_save_request()
        if requested != "signal SIGUSR2" and every_steps is not None and self.step % every_steps == 0:
            return "steps"
        return requested

    def is_finite(self) -> jax.Array:
        """Return whether the state is finite. [] bool, still being computed; the same in all processes."""
        return self.programs.is_finite(distributed.one_copy(self.updates.state))

    @property
    def has_sums_in_flight(self) -> bool:
        """Whether to take the interval now is to wait for its sums, and after the next call is not."""
        return self._interval is not None and self.config.log_every_steps > self.pace.steps_per_call

    @property
    def is_evaluation_due(self) -> bool:
        """Whether it is time to evaluate and was not done; the last stop may have cut this very evaluation short."""
        due = self.is_over or (self.step > 0 and self.step % self._eval_every_steps == 0)
        return due and self._evaluated_step != self.step

    def evaluate(self) -> tuple[Metrics | None, bool]:
        """Return the metrics over all test images and whether the accuracy is the best so far.

        As soon as a signal asks to stop there are no metrics, but None.

        Raises:
            Diverged: the loss is not finite.
            PeerLost: another process is gone.
        """
        with self._peers.mind():
            calls_in_flight = self.pace.drain()
        for call in calls_in_flight:
            self._hear(self.step, *call)
        sums = self._evaluate()
        if sums is None:
            return None, False
        metrics = Metrics(self.step, *averages(sums))
        if not np.isfinite(metrics.loss):
            raise Diverged(f"the test loss at step {self.step} is {metrics.loss}")
        self._evaluated_step = self.step
        is_best = self._best_accuracy is None or metrics.accuracy > self._best_accuracy
        self._best_accuracy = metrics.accuracy if is_best else self._best_accuracy
        return metrics, is_best

    def settle(self) -> None:
        """Wait until all calls are done: what comes then is of this process alone, and no other can break it.

        Raises:
            PeerLost: another process is gone.
        """
        with self._peers.mind():
            self.pace.drain()

    def _evaluate(self) -> MetricSums | None:
        pace: Pace[tuple[MetricSums, jax.Array, jax.Array]] = Pace(CALL_S)
        parts: list[MetricSums] = []

        def take(sums: MetricSums, _: jax.Array, heard: jax.Array) -> None:
            parts.append(sums)
            self.council.hear(heard)

        for first in range(0, len(self._test_labels), self.programs.eval_call_images):
            call = self.programs.evaluate(
                self.updates.state.variables_to_use,
                self._test_images,
                self._test_labels,
                np.int32(first),
                self.council.wishes(self.pace.steps_per_call),
            )
            with self._peers.mind():
                done = pace.dispatched(1, call)
            if done is not None:
                take(*done)
            if self.council.is_to_stop:
                return None
        with self._peers.mind():
            calls_in_flight = pace.drain()
        for call in calls_in_flight:
            take(*call)
        return total(parts)


def total(parts: Sequence[MetricSums]) -> MetricSums:
    """Return the metric sums over all calls of an evaluation."""
    return jax.tree.map(lambda *values: np.sum(np.asarray(values)), *parts)


def averages(sums: MetricSums) -> tuple[float, float]:
    """Return mean loss and accuracy of metric sums, in the shortest digits that mean the float32."""
    loss = np.float32(sums.loss) / np.float32(sums.images)
    return float(str(loss)), int(sums.correct) / int(sums.images)


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

    def drain(self) -> list[T]:
        """Wait for all calls, return what they gave, and forget them: what comes now is no part of their time."""
        results = [jax.block_until_ready(result) for _, result, _ in self._in_flight]
        self._in_flight.clear()
        return results
