"""Python processes whose lives are measured, and workers that wait for a word before they train."""

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


class Failed(Exception):
    """A process did not do what it was started for; the message holds its last words."""


class Ended(NamedTuple):
    """A process that has ended well."""

    out: str
    seconds: float  # from its start
    end_s: float  # by time.time(), as in events.jsonl
    peak_mb: float  # most memory that it had, in 10^6 bytes; no less than its parent had when it was started

    @property
    def fields(self) -> dict[str, str]:
        """The fields `name=value` of the last line on standard output."""
        words = self.out.splitlines()[-1].split()
        return dict(word.split("=", 1) for word in words if "=" in word)


class Process:
    """A Python module at work in a process of its own, which does not outlive the `with` block."""

    def __init__(self, module: str, *args: str, environment: Mapping[str, str] = ON_CPU, **pipes: Any) -> None:
        """Start it; `pipes` go to `Popen`."""
        self._module = module
        # Files and not pipes: nobody has to empty them, so that the parent can sleep while a process is measured.
        # They live as long as the process, and `__exit__` closes them.
        self._out, self._err = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        split_keys = {"stdin": subprocess.DEVNULL, "stdout": self._out, "stderr": self._err, **pipes}
        self.start_s = time.time()
        self.popen = subprocess.Popen(
            [sys.executable, "-m", module, *args], env={**os.environ, **environment}, text=True, **split_keys
        )

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it, if it is still there."""
        self.popen.kill()
        self.popen.wait()
        for file in (self._out, self._err, self.popen.stdin, self.popen.stdout):
            if file is not None:
                file.close()

    @property
    def has_ended(self) -> bool:
        """Whether it has. After `Popen.poll` nobody could ask for its memory any more."""
        return os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def stop(self) -> float:
        """Send SIGTERM, and return when that was."""
        os.kill(self.popen.pid, signal.SIGTERM)
        return time.time()

    def wait(self) -> Ended:
        """Return when the process has ended.

        Raises:
            Failed: its exit code is not 0.
        """
        _, status, usage = os.wait4(self.popen.pid, 0)
        end_s = time.time()
        self.popen.returncode = os.waitstatus_to_exitcode(status)
        if self.popen.returncode:
            raise self.failed(f"ended with code {self.popen.returncode}")
        self._out.seek(0)
        unit_bytes = 1 if sys.platform == "darwin" else 1024
        return Ended(self._out.read(), end_s - self.start_s, end_s, usage.ru_maxrss * unit_bytes / 1e6)

    def failed(self, what: str) -> Failed:
        """Return the error that it did something, with the end of what it wrote on standard error."""
        self._err.seek(0)
        return Failed(f"{self._module} {what}:\n{self._err.read()[-4000:]}")


def run(module: str, *args: str) -> Ended:
    """Run a module to its end.

    Raises:
        Failed: its exit code is not 0.
    """
    with Process(module, *args) as process:
        return process.wait()


class Worker(Process):
    """A process in which `serve` runs: it does nothing until it is asked to."""

    def __init__(self, module: str, *args: str, environment: Mapping[str, str] = ON_CPU) -> None:
        """Start it."""
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        super().__init__(module, *args, environment=environment, **pipes)

    def __enter__(self) -> Self:
        """Return it when it is ready."""
        try:
            self.about = self._answer()  # what it says of itself
        except BaseException:
            self.__exit__()
            raise
        return self

    def ask(self, command: str, number: float) -> dict[str, Any]:
        """Have a command carried out, and return the answer.

        Raises:
            Failed: the worker ended, or it was not idle before.
        """
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(f"{command} {number}\n")
            self.popen.stdin.flush()
        except BrokenPipeError:
            raise self.failed("ended") from None
        answer = self._answer()
        if answer["idle_cpu_s"] > 0.1 + 0.1 * answer["idle_s"]:
            raise self.failed(f"worked for {answer['idle_cpu_s']:.2f} s while it was another's turn")
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            if line.startswith("{"):  # Others are for people.
                return json.loads(line)
        raise self.failed("ended")


def serve(about: Mapping[str, Any], commands: Mapping[str, Callable[[float], Mapping[str, Any]]]) -> None:
    """Carry out commands from standard input, a line `NAME NUMBER` each, and answer each with a line of JSON."""
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
    """Call the contestants in turn, each with the number of the round; from round to round the order is reversed.

    Machines are shared and drift: only what was measured side by side may be compared.
    """
    results: dict[str, list[T]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in list(contestants)[:: 1 if number % 2 == 0 else -1]:
            results[name].append(contestants[name](number))
    return results
