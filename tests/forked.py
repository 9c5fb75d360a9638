"""Processes that start with all modules imported, which saves seconds on two cores.

They are real processes, forked from a server that has imported JAX but not initialized it. Claims about what happens
before `mnist_jax.train.main` need a new interpreter.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from subprocess import TimeoutExpired
from typing import Any

# Variables that may differ from the environment of the server, because nothing reads them before `main`. Those that
# begin with KMP_ are set by scikit-learn in the process of the tests.
READ_LATE = {
    *("HOME", "XDG_CACHE_HOME", "http_proxy", "https_proxy", "grpc_proxy", "TMPDIR", "MPLBACKEND"),
    *("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "PJRT_NPROC", "NPROC"),
}
# Modules that the command and the tests may need.
PRELOADED = [
    *("mnist_jax.train", "mnist_jax.training.loop", "pytest"),
    *("tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.record_writer"),
]

_server_environment: dict[str, str] | None = None


def server() -> ForkServerContext:
    """Return the server. It starts with the first process, in the environment of this moment."""
    global _server_environment
    context = multiprocessing.get_context("forkserver")
    if _server_environment is None:
        _server_environment = dict(os.environ)
        context.set_forkserver_preload(PRELOADED)
    return context


def can_fork(environment: dict[str, str]) -> bool:
    """Return whether a process of the command with this environment can be forked from the server."""
    if sys.platform != "linux":
        return False
    server()
    assert _server_environment is not None
    wanted = {**os.environ, **environment}
    names = wanted.keys() | _server_environment.keys()
    return all(
        name in READ_LATE or name.startswith(("PYTEST", "KMP_")) or wanted.get(name) == _server_environment.get(name)
        for name in names
    )


class ForkedProcess:
    """A process of the training command, with the methods of `subprocess.Popen[str]` that the tests use."""

    def __init__(self, arguments: list[str], environment: dict[str, str], faults: str | None = None) -> None:
        """Start the command; `faults` is an argument of `faults.drive`."""
        context = server()
        ends = [context.Pipe(duplex=False) for _ in range(2)]
        self._process: ForkServerProcess = context.Process(
            target=_run_command,
            args=(arguments, environment, faults, _cores(), *(writer for _, writer in ends)),
            daemon=True,
        )
        self._process.start()
        for _, writer in ends:
            writer.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(reader.fileno())) for reader, _ in ends)
        for reader, _ in ends:
            reader.close()
        self.args = arguments
        self._written: tuple[str, str] | None = None

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the number of the signal that ended the process; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end, and return the exit code."""
        self._process.join(timeout)
        code = self.returncode
        if code is None:
            raise TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end, and return the output."""
        if self._written is not None:
            return self._written
        deadline_s = time.monotonic() + (timeout if timeout is not None else 1e6)
        with ThreadPoolExecutor(2) as pool:
            texts = [pool.submit(stream.read) for stream in (self.stdout, self.stderr)]
            try:
                self.wait(timeout)
                out, err = (text.result(max(0.1, deadline_s - time.monotonic())) for text in texts)
            except TimeoutError as error:
                raise TimeoutExpired(self.args, timeout or 0) from error
            finally:
                if any(not text.done() for text in texts):
                    self.kill()  # Otherwise the pool would wait for it.
        self._close()
        self._written = out, err
        return out, err

    def _close(self) -> None:
        for stream in (self.stdout, self.stderr):
            stream.close()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # It ended meanwhile, and the server has waited for it.
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _run_command(
    arguments: list[str],
    environment: dict[str, str],
    faults: str | None,
    cores: set[int],
    out: Connection,
    err: Connection,
) -> None:
    """Run as `python -m mnist_jax.train` does after its imports."""
    _become(environment, cores)
    for number, end in ((1, out), (2, err)):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    from mnist_jax import train

    if faults is not None:
        from faults import drive

        train.exit_process(drive(faults, arguments))
    train.exit_process(train.main(arguments))


def call(function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str]) -> Any:
    """Call a function of a test file in a process with this environment, and return its result.

    JAX has read its own variables before: the function must set those that differ.
    """
    receiver, sender = server().Pipe(duplex=False)
    details = function, arguments, environment, _cores()
    process = server().Process(target=_call, args=(sender, *details), daemon=True)
    process.start()
    sender.close()
    try:
        assert receiver.poll(120), f"{function.__name__} does not end"
        result, error = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process of {function.__name__} ended with {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    assert not error, error
    return result


def _call(sender: Connection, function: Any, arguments: Any, environment: dict[str, str], cores: set[int]) -> None:
    _become(environment, cores)
    try:
        sender.send((function(*arguments), ""))
    except BaseException:
        sender.send((None, traceback.format_exc()))


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if sys.platform == "linux" else set()


def _become(environment: dict[str, str], cores: set[int]) -> None:
    if sys.platform == "linux":
        os.sched_setaffinity(0, cores)  # The server may have others.
    os.environ.clear()
    os.environ.update(environment)
