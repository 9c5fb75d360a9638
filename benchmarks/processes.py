"""Python processes with measured duration and memory, and workers that train on request."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self, TypeVar

T = TypeVar("T")

ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


class BenchmarkError(Exception):
    """A process failed; the message has the end of its standard error."""


class Completed(NamedTuple):
    """A process that exited with code 0."""

    out: str
    seconds: float  # from its start
    end_s: float  # by time.time(), as in events.jsonl
    peak_mb: float  # peak memory in 10^6 bytes; at least that of its parent at the start

    @property
    def fields(self) -> dict[str, str]:
        """The fields `name=value` of the last line on standard output."""
        items = self.out.splitlines()[-1].split()
        return dict(item.split("=", 1) for item in items if "=" in item)


class Process:
    """A Python module in a process of its own. The end of the `with` block kills it."""

    def __init__(self, module: str, *args: str, environment: Mapping[str, str] = ON_CPU, **pipes: Any) -> None:
        """Start it; `pipes` go to `Popen`."""
        self._module = module
        # Files, not pipes: the parent can sleep instead of reading them. `__exit__` closes them.
        self._out, self._err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        streams = {"stdin": subprocess.DEVNULL, "stdout": self._out, "stderr": self._err, **pipes}
        self.start_s = time.time()
        self.popen = subprocess.Popen(
            [sys.executable, "-m", module, *args], env={**os.environ, **environment}, text=True, **streams
        )

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill it, if it still runs."""
        self.popen.kill()
        self.popen.wait()
        for file in (self._out, self._err, self.popen.stdin, self.popen.stdout):
            if file is not None:
                file.close()

    @property
    def has_exited(self) -> bool:
        """Whether it has exited. `Popen.poll` would reap it, and `wait` could not read its memory."""
        return os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def stop(self) -> float:
        """Send SIGTERM, and return the time."""
        os.kill(self.popen.pid, signal.SIGTERM)
        return time.time()

    def wait(self) -> Completed:
        """Wait until the process exits.

        Raises:
            BenchmarkError: its exit code is not 0.
        """
        _, status, usage = os.wait4(self.popen.pid, 0)
        end_s = time.time()
        self.popen.returncode = os.waitstatus_to_exitcode(status)
        if self.popen.returncode:
            raise self.error(f"exited with code {self.popen.returncode}")
        self._out.seek(0)
        unit_bytes = 1 if sys.platform == "darwin" else 1024
        return Completed(self._out.read(), end_s - self.start_s, end_s, usage.ru_maxrss * unit_bytes / 1e6)

    def error(self, what: str) -> BenchmarkError:
        """Return an error with the end of the process's standard error."""
        self._err.seek(0)
        return BenchmarkError(f"{self._module} {what}:\n{self._err.read()[-4000:]}")


def run(module: str, *args: str, environment: Mapping[str, str] = ON_CPU) -> Completed:
    """Run a module until it exits.

    Raises:
        BenchmarkError: its exit code is not 0.
    """
    with Process(module, *args, environment=environment) as process:
        return process.wait()


class Worker(Process):
    """A process that runs `serve`: it is idle between commands."""

    def __init__(self, module: str, *args: str, environment: Mapping[str, str] = ON_CPU) -> None:
        """Start it."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        super().__init__(module, *args, environment=environment, **pipes)

    def __enter__(self) -> Self:
        """Return it when it is ready."""
        try:
            self.about = self._read_reply()
        except BaseException:
            self.__exit__()
            raise
        return self

    def ask(self, command: str, number: float) -> dict[str, Any]:
        """Run a command, and return its reply.

        Raises:
            BenchmarkError: the worker exited, or it was not idle before.
        """
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(f"{command} {number}\n")
            self.popen.stdin.flush()
        except BrokenPipeError:
            raise self.error("exited") from None
        reply = self._read_reply()
        if reply["idle_cpu_s"] > 0.1 + 0.1 * reply["idle_s"]:
            raise self.error(f"used {reply['idle_cpu_s']:.2f} s of CPU while it should be idle")
        return reply

    def _read_reply(self) -> dict[str, Any]:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            if line.startswith("{"):  # Other lines are messages.
                return json.loads(line)
        raise self.error("exited")


def serve(about: Mapping[str, Any], commands: Mapping[str, Callable[[float], Mapping[str, Any]]]) -> None:
    """Run commands from standard input, a line `NAME NUMBER` each, and reply with a line of JSON each."""
    print(json.dumps(about), flush=True)
    while True:
        end_s, end_cpu_s = time.monotonic(), time.process_time()
        line = sys.stdin.readline()
        if not line:
            return
        idle = {"idle_s": time.monotonic() - end_s, "idle_cpu_s": time.process_time() - end_cpu_s}
        name, number = line.split()
        print(json.dumps({**commands[name](float(number)), **idle}), flush=True)


def alternate(contestants: Mapping[str, Callable[[int], T]], rounds: int) -> dict[str, list[T]]:
    """Call the contestants in turn, each with the number of the round. Each round reverses the order.

    The speed of a shared machine drifts, so only neighbouring measurements are compared.
    """
    results: dict[str, list[T]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in list(contestants)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(contestants[name](number))
    return results
