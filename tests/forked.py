"""Processes of the training command that begin with all imports made, which on two cores saves seconds a start.

They are real processes, each forked from a server that has imported JAX and never started it. What they share with a
start of the interpreter ends where `mnist_jax.train.main` begins; claims about what comes before need the real one.
"""

import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from subprocess import TimeoutExpired

# What may differ from the environment of the server: nothing reads these before `main`.
READ_LATE = {"HOME", "XDG_CACHE_HOME", "http_proxy", "https_proxy", "XLA_FLAGS", "PJRT_NPROC", "NPROC", "TMPDIR"}
# All that the command may come to need.
PRELOADED = [
    *("mnist_jax.train", "mnist_jax.training.loop", "sklearn.datasets", "tensorflow_datasets"),
    *("tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.record_writer"),
]

_server_environment: dict[str, str] | None = None


def can_fork(environment: dict[str, str]) -> bool:
    """Tell whether a process with this environment may be forked from the server."""
    global _server_environment
    if sys.platform != "linux":
        return False
    if _server_environment is None:
        _server_environment = dict(os.environ)
    wanted = {**os.environ, **environment}
    names = wanted.keys() | _server_environment.keys()
    return all(
        name in READ_LATE or name.startswith("PYTEST") or wanted.get(name) == _server_environment.get(name)
        for name in names
    )


class ForkedProcess:
    """A process of the training command, with the part of `subprocess.Popen[str]` that the tests use."""

    def __init__(self, arguments: list[str], environment: dict[str, str], faults: str | None = None) -> None:
        """Start it with these arguments and environment, and with faults as `faults.py` has them."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        ends = [context.Pipe(duplex=False) for _ in range(2)]
        self._process: ForkServerProcess = context.Process(
            target=_be_the_command,
            args=(arguments, environment, faults, os.sched_getaffinity(0), *(theirs for _, theirs in ends)),
            daemon=True,
        )
        self._process.start()
        for _, theirs in ends:
            theirs.close()
        self.stdout, self.stderr = (os.fdopen(os.dup(ours.fileno())) for ours, _ in ends)
        for ours, _ in ends:
            ours.close()
        self.args = arguments
        self._written: tuple[str, str] | None = None

    @property
    def pid(self) -> int:
        """Its number."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, or minus the number of the signal that ended it; None while it is at work."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Return its exit code, None while it is at work."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return its exit code."""
        self._process.join(timeout)
        code = self.returncode
        if code is None:
            raise TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end, and return what it wrote."""
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
                    self.kill()  # Otherwise nobody would get past the pool.
        self._close()
        self._written = out, err
        return out, err

    def _close(self) -> None:
        for stream in (self.stdout, self.stderr):
            stream.close()

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it as the kernel does."""
        self.send_signal(signal.SIGKILL)


def _be_the_command(
    arguments: list[str],
    environment: dict[str, str],
    faults: str | None,
    cores: set[int],
    out: Connection,
    err: Connection,
) -> None:
    """Be what `python -m mnist_jax.train` is once it has imported what it needs."""
    os.sched_setaffinity(0, cores)  # Otherwise it would have those of the server.
    os.environ.clear()
    os.environ.update(environment)
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
