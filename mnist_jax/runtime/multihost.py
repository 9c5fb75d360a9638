"""The processes that train together: initialization, messages before and after the training, and shutdown.

Whoever starts them, a scheduler as a rule, tells each how many they are and which of them it is. Process 0 does what
one has to do for all, and gives its word to the others through the key-value store of JAX's coordination service, which
it serves. While they train they need no such messages, see `agreement.py`.

This file stands alone but for `preemption.py`.
"""

import contextlib
import importlib.util
import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from mnist_jax.runtime.preemption import StoppedError, StopSignal

# Where launchers say how many processes they started, and which of them this is.
COUNTS = {
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
}

SLICE_MS = 100  # How long Python may be inside of a wait, and can call no handler.
LOOK_EVERY_S = 0.1
LEAVE_S = 10.0


class ProcessLostError(Exception):
    """Another process of the run is gone, or has given up, with the exit code `exit_code`."""

    def __init__(self, what: str, code: int = 69) -> None:
        """Say what is known of it."""
        super().__init__(what)
        self.exit_code = code


class ProcessGroupError(Exception):
    """What was said of the processes is wrong or not enough."""


def may_be_distributed() -> bool:
    """Tell whether the environment hints that a launcher started several processes of which this is one.

    It is cheap, and JAX's own detection, which needs JAX, has the last word.
    """
    found = os.environ.get
    return (
        _launched() is not None
        or any(found(name) for name in ("JAX_COORDINATOR_ADDRESS", "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES"))
        or importlib.util.find_spec("libtpu") is not None
    )


def _launched() -> str | None:
    """Return the variable by which a launcher says that it started more than one process, if one does."""
    return next((name for name in COUNTS if os.environ.get(name, "1") not in ("", "1")), None)


def initialize(
    stop: StopSignal, coordinator: str | None, count: int | None, index: int | None, timeout_s: float
) -> "ProcessGroup":
    """Return the processes of this run when all of them are there, or this one alone.

    Args:
        stop: listens for signals, before and afterwards: JAX's own handler of SIGTERM is not installed.
        coordinator: where process 0 is reached, HOST:PORT; None where a scheduler tells it.
        count: how many processes there are; None where a scheduler tells it.
        index: which of them this is; None where a scheduler tells it.
        timeout_s: after so long a silence of a process the others give up.

    Raises:
        ProcessGroupError: the address cannot be used, or is not known.
        ProcessLostError: not all came.
        StoppedError: a signal came.
    """
    if count == 1 or not (coordinator or may_be_distributed()):
        return ProcessGroup(stop)
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # It would take SIGTERM away from us.
    # The processes are to reach each other directly, and not by way of a proxy for the web, where they would hang.
    os.environ.setdefault("grpc_proxy", "")
    jax.config.update("jax_check_proxy_envs", False)
    options: dict[str, Any] = {"heartbeat_timeout_seconds": math.ceil(timeout_s)}
    if coordinator:
        options["cluster_detection_method"] = "deactivate"
        if coordinator.startswith(("127.", "localhost:", "[::1]:")):
            options["coordinator_bind_address"] = coordinator  # and not all addresses of the machine, JAX's default
        if index == 0:
            _check_is_free(options.get("coordinator_bind_address"), coordinator)
    try:
        stop.run(lambda: jax.distributed.initialize(coordinator, count, index, **options))
    except ValueError as error:
        if coordinator is None:
            _check_is_alone()
            return ProcessGroup(stop)  # JAX found that no launcher is at work.
        raise ProcessGroupError(f"the processes cannot meet at {coordinator}: {error}") from error
    except RuntimeError as error:
        raise ProcessLostError(f"the processes did not meet: {_first_line(error)}") from error
    return ProcessGroup(stop, timeout_s)


def _check_is_alone() -> None:
    """Check that no launcher whose word JAX does not understand started several processes: each would train alone.

    Raises:
        ProcessGroupError: one did.
    """
    if count := _launched():
        raise ProcessGroupError(
            f"{os.environ[count]} processes were started ({count}), and JAX does not find out how they meet; say "
            f"--coordinator HOST:PORT --num-processes ${count} --process-id ${COUNTS[count]}, or --num-processes 1 "
            "where each is to train alone"
        )


def _check_is_free(bound: str | None, coordinator: str) -> None:
    """Check that process 0 can listen at its address, for where it cannot, JAX's service ends the process.

    Raises:
        ProcessLostError: it cannot, perhaps because an earlier turn of this run has not ended yet.
    """
    host, _, port = (bound or coordinator).rpartition(":")
    family = socket.AF_INET6 if bound and bound.startswith("[") else socket.AF_INET
    try:
        socket.create_server((host.strip("[]") if bound else "", int(port)), family=family).close()
    except OSError as error:
        raise ProcessLostError(f"process 0 cannot listen on port {port} of {host} ({error.strerror})") from error


class ProcessGroup:
    """The processes of a run, of which this is one. A process that is alone sends and waits for nothing.

    All processes make the same calls of `broadcast` and `gather` in the same order, then `start_training`, and at the
    end `shutdown`.
    """

    def __init__(self, stop: StopSignal, timeout_s: float | None = None) -> None:
        """Speak for this process, which is alone unless `jax.distributed` has been started."""
        self._stop, self.timeout_s = stop, timeout_s or 0.0
        self.is_alone = timeout_s is None
        self.index, self.count = 0, 1
        self._store: Any = None
        self._words = 0
        self._has_started = self._is_broken = self._has_failed = False
        if not self.is_alone:
            # JAX has no public name for its key-value store.
            from jax._src.distributed import global_state

            self.index, self.count = global_state.process_id, global_state.num_processes
            self._store = global_state.client
            threading.Thread(target=self._pass_signals_on, daemon=True, name="signals of other processes").start()

    @property
    def is_primary(self) -> bool:
        """Whether this is process 0."""
        return self.index == 0

    def broadcast(self, value: Any, *, ignore_signals: bool = False) -> Any:
        """Return the JSON value that process 0 calls this with. The argument of the others is ignored.

        Args:
            value: what process 0 sends.
            ignore_signals: whether the others go on waiting after a signal.

        Raises:
            ProcessLostError: process 0 is gone, or has given up.
            StoppedError: a signal came, to whichever process.
        """
        if not self.is_primary:
            return self.receive(ignore_signals=ignore_signals)
        self._say({"value": value})
        return value

    def receive(self, *, ignore_signals: bool = False) -> Any:
        """Wait for the next value from process 0, and return it.

        Args:
            ignore_signals: whether to wait on where a signal asks to stop.

        Raises:
            ProcessLostError: process 0 is gone, or has given up.
            StoppedError: a signal came, to whichever process.
        """
        key, self._words = f"word/{self._words}", self._words + 1
        word = json.loads(self._wait_for(key, ignore_signals=ignore_signals))
        if "stopped" in word:
            self._stop.record_signal(word["stopped"])
            raise StoppedError
        if "failed" in word:
            raise _left("0", word)
        return word["value"]

    def report_failure(self, error: Exception, code: int) -> None:
        """Tell the others, who are waiting for this process before or after the training, why it leaves.

        They leave with its exit code, for by that a scheduler tells whether to start them again.
        """
        if self.is_alone or self._has_failed:
            return
        self._has_failed = True
        with contextlib.suppress(Exception):  # Who cannot hear it finds that this process is gone.
            if self.is_primary:
                received = self._stop.received
                self._say(
                    {"stopped": received.value}
                    if received and isinstance(error, StoppedError)
                    else {"failed": str(error), "code": code}
                )
            elif isinstance(error, StoppedError):
                self._pass_on()
            else:
                self._put(f"gave_up/{self.index}", json.dumps({"failed": str(error), "code": code}))

    def gather(self, brought: Any = None) -> list[Any]:
        """Wait until all processes have come to this point, and return what they brought, by their index.

        Process 0 gets that of all, a JSON value each, and the others their own.

        Raises:
            ProcessLostError: one is gone, or has given up.
            StoppedError: a signal came to one of them before all were there.
        """
        if self.is_alone:
            return [brought]
        if self._stop.received is not None:
            raise StoppedError
        place = f"there/{self._words}/"
        if self.is_primary:
            others = [
                json.loads(self._wait_for(f"{place}{index}", ignore_signals=False)) for index in range(1, self.count)
            ]
            self.broadcast("go")
            return [brought, *others]
        self._put(f"{place}{self.index}", json.dumps(brought))
        self.receive(ignore_signals=True)  # It said that it is there, so it comes along if process 0 says so.
        return [brought]

    def start_training(self) -> None:
        """Wait until all processes are ready to train. From then on each signal is a matter of the agreement.

        Raises:
            ProcessLostError: one is gone, or could not get ready.
            StoppedError: a signal came to one of them before all were ready.
        """
        self.gather()
        self._has_started = True

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Say of an error in a wait for what all processes compute together that it is the loss of one of them.

        Raises:
            ProcessLostError: there was an error, not that the memory is full, and this process is not alone.
        """
        try:
            yield
        except (ValueError, RuntimeError) as error:  # JAX raises both for a broken connection.
            if self.is_alone or "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise self._lost(f"the connection to another process is lost: {_first_line(error)}") from error

    def shutdown(self) -> None:
        """Wait until all processes are about to leave, for `LEAVE_S` at most: process 0 serves the others."""
        if self.is_alone or self._is_broken:
            return
        import jax

        shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True, name="shutdown")
        shutdown.start()
        shutdown.join(LEAVE_S)

    def _lost(self, what: str) -> ProcessLostError:
        self._is_broken = True
        return ProcessLostError(what)

    def _say(self, word: dict[str, Any]) -> None:
        if not self.is_alone:
            self._put(f"word/{self._words}", json.dumps(word))
            self._words += 1

    def _wait_for(self, key: str, *, ignore_signals: bool) -> str:
        """Return what is put under a key as soon as it is there; process 0 looks for those who gave up meanwhile."""
        import jax

        while True:
            if self._stop.received is not None and not ignore_signals:
                raise StoppedError
            for name, word in self._get_all("gave_up/") if self.is_primary else ():
                raise _left(name.rpartition("/")[2], json.loads(word))
            try:
                return str(self._store.blocking_key_value_get(key, SLICE_MS))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise self._lost(f"process 0 is gone: {_first_line(error)}") from error

    def _pass_signals_on(self) -> None:
        """Pass a signal to this process on, and receive those to others, until the training starts."""
        with contextlib.suppress(Exception):  # Process 0 is gone: whoever waits for it says so.
            while not self._has_started:
                if self._stop.received is None:
                    for _, number in self._get_all("signal/"):
                        self._stop.record_signal(int(number))
                else:
                    self._pass_on()
                    return
                time.sleep(LOOK_EVERY_S)

    def _pass_on(self) -> None:
        assert self._stop.received is not None
        self._put(f"signal/{self.index}", str(self._stop.received.value))

    def _put(self, key: str, value: str) -> None:
        self._store.key_value_set(key, value, allow_overwrite=True)

    def _get_all(self, folder: str) -> list[tuple[str, str]]:
        return self._store.key_value_dir_get(folder)


def _left(index: str, word: dict[str, Any]) -> ProcessLostError:
    return ProcessLostError(f"process {index} gave up: {word['failed']}", word["code"])


def _first_line(error: BaseException) -> str:
    """Return the first line of an error's text; those of gRPC have many."""
    return str(error).partition("\n")[0]
