"""A run of several real processes on this machine, started as a scheduler or a user starts them."""

import contextlib
import random
import signal
import socket
import time
from dataclasses import dataclass, replace
from typing import Any

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


def start(run: Run, *args: str, **others: Any) -> Several:
    """Start two processes. `others` are fields of `Run` that process 1 has in another form."""
    address, processes = f"127.0.0.1:{free_port()}", []
    for index, own in enumerate((replace(run), replace(run, **others))):
        group = ("--coordinator", address, "--num-processes", "2", "--process-id", str(index))
        processes.append(own.start(*group, "--preempted-exit-code", SAVED, *args))
    return Several(run, processes)
