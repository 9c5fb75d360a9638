"""A run of several real processes on this machine, started as a scheduler or a user starts them."""

import contextlib
import random
import signal
import socket
import time
from dataclasses import dataclass

from runs import DEADLINE_S, Ended, Process, Run, end

SAVED = "75"  # exit code of a run that was stopped and saved


@dataclass
class Several:
    """Processes that train together in one run directory."""

    run: Run
    processes: list[Process]

    def signal(self, number: signal.Signals, *indices: int) -> None:
        """Send a signal to some of them."""
        for index in indices:
            self.processes[index].send_signal(number)

    def end(self, timeout_s: float = DEADLINE_S) -> list[Ended]:
        """Wait until all have exited."""
        deadline = time.monotonic() + timeout_s
        try:
            return [end(process, max(0.1, deadline - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()


def free_port() -> int:
    """Return a port that is free and that the kernel does not give to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def start(run: Run, count: int, *args: str, variables: dict[int, dict[str, str]] | None = None) -> Several:
    """Start `count` processes, with additional environment variables by index."""
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for index in range(count):
        group = ("--coordinator", address, "--num-processes", str(count), "--process-id", str(index))
        own = Run(run.workdir, {**run.environment, **(variables or {}).get(index, {})})
        processes.append(own.start(*group, "--preempted-exit-code", SAVED, *args))
    return Several(run, processes)
