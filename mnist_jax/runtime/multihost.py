"""The process group of a run: initialization, messages before and after training, heartbeats, shutdown.

A launcher, usually a scheduler, gives each process its index and the number of processes. Messages go through the
key-value store of JAX's coordination service, which process 0 serves. Training sends only heartbeats; its requests are
in `agreement.py`.

This file needs only `preemption.py`.
"""

import contextlib
import importlib.util
import itertools
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

from mnist_jax.runtime.preemption import StoppedError, StopSignal, start_in_thread

# Environment variables of launchers: the number of processes, and the index of this one.
LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
}
CLUSTER_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES")

POLL_S = 0.1
CONNECT_TIMEOUT_S, CONNECT_NOTICE_S = 300, 5
SHUTDOWN_TIMEOUT_S = 10.0
EXIT_TIMEOUT_S = 5.0  # from the discovery of a lost process to the exit of this one


class ProcessLostError(Exception):
    """Another process was lost, or exited with the exit code `exit_code`."""

    def __init__(self, message: str, exit_code: int = 69) -> None:
        """Keep message and exit code."""
        super().__init__(message)
        self.exit_code = exit_code


class ProcessGroupError(Exception):
    """The description of the process group is wrong or incomplete."""


def may_be_distributed() -> bool:
    """Return whether a launcher may have started several processes. Cheap, without JAX, whose detection decides."""
    return (
        _launcher() is not None
        or any(map(os.environ.get, CLUSTER_VARIABLES))
        or importlib.util.find_spec("libtpu") is not None
    )


def _launcher() -> str | None:
    """Return the variable of a launcher that started several processes, None if there is none."""
    return next((name for name in LAUNCHERS if os.environ.get(name, "1") not in ("", "1")), None)


def initialize(
    stop: StopSignal,
    coordinator: str | None,
    *,
    count: int | None,
    index: int | None,
    timeout_s: float,
    notify: Callable[[str], None],
) -> "ProcessGroup":
    """Return the process group when all processes are connected, or this process alone.

    Args:
        stop: receives signals, also afterwards: JAX's own handler of SIGTERM is not installed.
        coordinator: address of process 0, HOST:PORT; None if a scheduler knows it.
        count: number of processes; None if a scheduler knows it.
        index: index of this process; None if a scheduler knows it.
        timeout_s: a process that is silent for this long is lost.
        notify: receives a line if the other processes are late.

    Raises:
        ProcessGroupError: the address is wrong or unknown.
        ProcessLostError: not all processes connected within `CONNECT_TIMEOUT_S`.
        StoppedError: a signal was received.
    """
    if count == 1 or not (coordinator or may_be_distributed()):
        return ProcessGroup(stop)
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # It would replace our handler of SIGTERM.
    # Processes connect directly. Through a web proxy they would hang.
    os.environ.setdefault("grpc_proxy", "")
    jax.config.update("jax_check_proxy_envs", False)
    # JAX's own heartbeats end a process with SIGABRT. They are the last resort, after those of `ProcessGroup`. JAX
    # sends one per half of its timeout, so it may miss them after half of it.
    options: dict[str, Any] = {"heartbeat_timeout_seconds": math.ceil(3 * timeout_s + 4 * EXIT_TIMEOUT_S)}
    options["initialization_timeout"] = CONNECT_TIMEOUT_S + 60  # It would end this process with SIGABRT as well.
    if coordinator:
        options["cluster_detection_method"] = "deactivate"
        if coordinator.startswith(("127.", "localhost:", "[::1]:")):
            options["coordinator_bind_address"] = coordinator  # JAX's default is all addresses of the machine.
        if index == 0:
            _check_port_is_free(options.get("coordinator_bind_address"), coordinator)
    try:
        connecting = start_in_thread(lambda: jax.distributed.initialize(coordinator, count, index, **options))
        _wait_until_connected(connecting, stop, count=count, notify=notify)
    except ValueError as error:
        if coordinator is None:
            _check_no_launcher()
            return ProcessGroup(stop)  # JAX found no launcher either.
        raise ProcessGroupError(f"the processes cannot connect to {coordinator}: {error}") from error
    except RuntimeError as error:
        raise ProcessLostError(f"the processes did not connect: {_first_line(error)}") from error
    return ProcessGroup(stop, timeout_s)


def _wait_until_connected(
    connecting: "Future[None]", stop: StopSignal, *, count: int | None, notify: Callable[[str], None]
) -> None:
    """Wait until all processes are connected; JAX does not say how many are.

    In an interactive shell of several tasks, such as that of `srun --pty`, the others never come.
    """
    began_s, is_notified = time.monotonic(), False
    launcher, expected = _launcher(), ""  # If JAX detects a cluster, only JAX knows the number.
    if count is not None:
        expected = f" (--num-processes {count})"
    elif launcher is not None:
        expected = f" ({launcher}={os.environ[launcher]})"
    alone = "if this process is to train alone, add --num-processes 1"
    while not wait([connecting], timeout=POLL_S).done:
        stop.check()
        waited_s = time.monotonic() - began_s
        if waited_s > CONNECT_TIMEOUT_S:
            raise ProcessLostError(
                f"not all processes{expected} connected within {CONNECT_TIMEOUT_S} s; start all of them, or {alone}"
            )
        if waited_s > CONNECT_NOTICE_S and not is_notified:
            is_notified = True
            left_s = CONNECT_TIMEOUT_S - waited_s
            notify(f"waiting for the other processes{expected}, {left_s:.0f} s at most; {alone}")
    connecting.result()


def _check_no_launcher() -> None:
    """Raise ProcessGroupError if a launcher that JAX does not know started several processes.

    Otherwise each of them would train alone.
    """
    if count := _launcher():
        raise ProcessGroupError(
            f"{count}={os.environ[count]}: several processes were started, but JAX finds no coordinator. Add "
            f"--coordinator HOST:PORT --num-processes ${count} --process-id ${LAUNCHERS[count]}, or --num-processes 1 "
            "if each is to train alone"
        )


def _check_port_is_free(bind_address: str | None, coordinator: str) -> None:
    """Raise ProcessLostError unless process 0 can listen at its address, where JAX's service would abort.

    An earlier attempt that has not exited yet may still use the port.
    """
    host, _, port = (bind_address or coordinator).rpartition(":")
    family = socket.AF_INET6 if bind_address and bind_address.startswith("[") else socket.AF_INET
    try:
        socket.create_server((host.strip("[]") if bind_address else "", int(port)), family=family).close()
    except OSError as error:
        raise ProcessLostError(f"process 0 cannot listen on port {port} of {host} ({error.strerror})") from error


class ProcessGroup:
    """The processes of a run, seen from one of them. A single process sends and waits for nothing.

    All processes make the same calls of `broadcast` and `gather` in the same order, then `start_training`, and
    `shutdown` at the end. Their messages, by key:

        broadcast/<n>        the n-th value of process 0
        gather/<n>/<index>   a value for process 0
        signal/<index>       a signal that a process received before training
        exit/<index>         why a process exits: a signal, or an error with its exit code
        alive/<index>        a counter that a process increments, its heartbeat
    """

    def __init__(self, stop: StopSignal, timeout_s: float | None = None) -> None:
        """Describe the processes that `initialize` connected, or this process alone if `timeout_s` is None."""
        self._stop, self.timeout_s = stop, timeout_s or 0.0
        self.is_alone = timeout_s is None
        self.index, self.count = 0, 1
        self._broadcasts = 0
        self._is_training = self._is_broken = self._has_failed = False
        self._has_ended = threading.Event()
        if not self.is_alone:
            # JAX has no public API for its key-value store.
            from jax._src.distributed import global_state

            self.index, self.count = global_state.process_id, global_state.num_processes
            self._store: Any = global_state.client
            works = self._exchange_signals, self._exchange_heartbeats
            self._threads = [threading.Thread(target=work, daemon=True, name=work.__name__) for work in works]
            for thread in self._threads:
                thread.start()

    @property
    def is_primary(self) -> bool:
        """Whether this is process 0."""
        return self.index == 0

    def broadcast(self, value: Any, *, ignore_signals: bool = False) -> Any:
        """Return the JSON value of process 0.

        Args:
            value: what process 0 sends; ignored on the others.
            ignore_signals: whether the others keep waiting after a signal.

        Raises:
            ProcessLostError: another process was lost or exited.
            StoppedError: a process received a signal.
        """
        if self.is_alone:
            return value
        key, self._broadcasts = f"broadcast/{self._broadcasts}", self._broadcasts + 1
        if self.is_primary:
            self._put(key, value)
            return value
        return self._wait_for(key, ignore_signals=ignore_signals)

    def gather(self, value: Any = None) -> list[Any]:
        """Wait for all processes, and return their JSON values by index; on processes other than 0 only their own.

        Raises:
            ProcessLostError: another process was lost or exited.
            StoppedError: a process received a signal before all arrived.
        """
        if self.is_alone:
            return [value]
        self._stop.check()
        keys = [f"gather/{self._broadcasts}/{index}" for index in range(self.count)]
        others = []
        if self.is_primary:
            others = [self._wait_for(key) for key in keys[1:]]
        else:
            self._put(keys[self.index], value)
        self.broadcast(None, ignore_signals=True)  # Process 0 alone decides whether a signal came before or after.
        return [value, *others]

    def start_training(self) -> None:
        """Wait until all processes are ready to train, as `gather` does. From then on the agreement handles signals."""
        self.gather()
        self._is_training = True

    def report_failure(self, error: Exception, code: int) -> None:
        """Report to the other processes why this one exits. They exit with the same code.

        By that code a scheduler decides whether to restart them.
        """
        if self.is_alone or self._has_failed:
            return
        self._has_failed = True
        reason: dict[str, Any] = {"error": str(error), "code": code}
        with contextlib.suppress(Exception):  # If process 0 is lost, the others notice that.
            if self._stop.received is not None and isinstance(error, StoppedError):
                self._send_signal()
                reason = {"signal": self._stop.received}
            self._put(f"exit/{self.index}", reason)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Raise ProcessLostError for errors of a computation of several processes, unless memory is exhausted."""
        try:
            yield
        except (ValueError, RuntimeError) as error:  # JAX raises both for a broken connection.
            if self.is_alone or "RESOURCE_EXHAUSTED" in str(error):
                raise
            raise self._lost(f"the connection to another process is lost: {_first_line(error)}") from error

    def shutdown(self) -> None:
        """Wait until all processes are about to exit, at most `SHUTDOWN_TIMEOUT_S`, because process 0 serves them."""
        if self.is_alone or self._is_broken:
            return
        import jax

        self._has_ended.set()
        for thread in self._threads:  # Inside of JAX's client they must not outlive it.
            thread.join(POLL_S)
        shutdown = threading.Thread(target=jax.distributed.shutdown, daemon=True, name="shutdown")
        shutdown.start()
        shutdown.join(SHUTDOWN_TIMEOUT_S)

    def _wait_for(self, key: str, *, ignore_signals: bool = False) -> Any:
        """Return the value of a key as soon as it exists, unless another process exits before."""
        import jax

        while True:
            if not ignore_signals:
                self._stop.check()
            elif self._stop.error is not None:
                raise self._stop.error
            try:
                # The wait is short, so that the flag is checked often.
                return json.loads(self._store.blocking_key_value_get(key, int(1000 * POLL_S)))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise self._lost(f"another process is lost: {_first_line(error)}") from error
            for index, reason in self._get_all("exit/").items():
                if "signal" in reason:
                    self._stop.record_signal(reason["signal"])
                    raise StoppedError
                raise ProcessLostError(f"process {index} failed: {reason['error']}", reason["code"])

    def _exchange_signals(self) -> None:
        """Send the signal of this process to the others and receive theirs, until training starts."""
        with contextlib.suppress(Exception):  # If process 0 is lost, `_wait_for` reports it.
            while not self._is_training and not self._has_ended.wait(POLL_S):
                if self._stop.received is not None:
                    self._send_signal()
                    return
                for number in self._get_all("signal/").values():
                    self._stop.record_signal(number)

    def _exchange_heartbeats(self) -> None:
        """Abort this process if another one is silent.

        JAX's own service would end it with SIGABRT and a C++ stack, so JAX's timeout is longer. The thread that trains
        may be in a computation that waits for the other process for ever, so it cannot be asked to exit.
        """
        beats, changed_s = dict[str, Any](), [time.monotonic()] * self.count
        try:
            for count in itertools.count():
                self._put(f"alive/{self.index}", count)
                before, beats, now_s = beats, self._get_all("alive/"), time.monotonic()
                for index in map(str, range(self.count)):
                    if beats.get(index) != before.get(index):
                        changed_s[int(index)] = now_s
                    elif now_s - changed_s[int(index)] > self.timeout_s:
                        raise self._lost(f"process {index} is lost: no heartbeat for {self.timeout_s:.0f} s")
                if self._has_ended.wait(self.timeout_s / 5):
                    return
        except ProcessLostError as error:
            self._stop.error = error
            if not self._has_ended.wait(EXIT_TIMEOUT_S):
                os.write(2, f"error: process {self.index} of {self.count}: {error}\n".encode())
                os._exit(error.exit_code)

    def _send_signal(self) -> None:
        self._put(f"signal/{self.index}", self._stop.received)

    def _put(self, key: str, value: Any) -> None:
        with self._store_errors():
            self._store.key_value_set(key, json.dumps(value), allow_overwrite=True)

    def _get_all(self, directory: str) -> dict[str, Any]:
        """Return the values under a directory by process index."""
        with self._store_errors():
            values = self._store.key_value_dir_get(directory)
        return {key.rpartition("/")[2]: json.loads(value) for key, value in values}

    @contextlib.contextmanager
    def _store_errors(self) -> Iterator[None]:
        """Raise ProcessLostError for an error of the key-value store, which process 0 serves."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost(f"another process is lost: {_first_line(error)}") from error

    def _lost(self, message: str) -> ProcessLostError:
        self._is_broken = True
        return ProcessLostError(message)


def _first_line(error: BaseException) -> str:
    """Return the first line of an error message. Those of gRPC have many."""
    return str(error).partition("\n")[0]
