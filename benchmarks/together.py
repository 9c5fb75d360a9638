"""Cost of the agreement of several processes, and gain of a second device."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from benchmarks import report
from benchmarks.bench import ENDLESS, Bench
from benchmarks.processes import ON_CPU, Worker, alternate
from benchmarks.report import Row

BATCH_SIZE = 128  # of each device
ONE_THREAD = {**ON_CPU, "PJRT_NPROC": "1"}  # of each process


def together(bench: Bench) -> Iterator[Row]:
    """Train with two processes with agreement, with two without, and with one."""
    with contextlib.ExitStack() as stack:
        agreeing, silent, alone = (
            stack.enter_context(group(bench, processes, *args)) for processes, *args in ((2,), (2, "silent"), (1,))
        )
        contestants = {"silent": silent, "agreeing": agreeing, "alone": alone}
        for steps_per_s in contestants.values():
            steps_per_s(0)  # The first calls connect the processes.
        rates = alternate(contestants, bench.plan.together_rounds)
    yield Row(
        what=f"cnn, two processes with agreement against two without, batch 2 × {BATCH_SIZE}",
        unit="steps/s",
        ours=rates["agreeing"],
        theirs=rates["silent"],
        ratio=report.ratio(rates["agreeing"], rates["silent"]),
        goals=("ratio ≥ 0.99",),
    )
    yield Row(
        what=f"cnn, two processes with one thread each against one process, batch {BATCH_SIZE} each",
        unit="steps/s",
        ours=rates["agreeing"],
        theirs=rates["alone"],
        ratio=report.ratio(rates["agreeing"], rates["alone"]),
        note="weak scaling: 1 means twice the images in the same time",
    )


@contextlib.contextmanager
def group(bench: Bench, processes: int, *args: str) -> Iterator[Callable[[int], float]]:
    """Start a process group, and yield a function that trains for some calls and returns steps/s."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    flags = (*bench.images.flags, "--batch-size", str(processes * BATCH_SIZE), *ENDLESS)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(processes) as threads:
        workers = [
            Worker(
                "benchmarks.ours_together",
                *args,
                *flags,
                *("--coordinator", address, "--num-processes", str(processes), "--process-id", str(index)),
                environment=ONE_THREAD,
            )
            for index in range(processes)
        ]
        list(threads.map(stack.enter_context, workers))  # No process is ready before all are connected.

        def steps_per_s(_: int) -> float:
            replies = list(threads.map(lambda worker: worker.ask("train", bench.plan.together_calls), workers))
            return replies[0]["steps"] / max(reply["seconds"] for reply in replies)

        yield steps_per_s
