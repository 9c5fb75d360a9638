"""Cost of the agreement of several processes, and gain of a second device.

Each process is bound to a core of its own.
"""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from benchmarks import report
from benchmarks.bench import ENDLESS, Bench
from benchmarks.processes import ON_CPU, Worker, alternate
from benchmarks.report import Row

BATCH_SIZE, LARGE_BATCH_SIZE = 128, 1024  # of each device
ONE_THREAD = {**ON_CPU, "PJRT_NPROC": "1"}  # of each process


def together(bench: Bench) -> Iterator[Row]:
    """Train with two processes with agreement, with two without, and with one."""
    with contextlib.ExitStack() as stack:
        agreeing, silent, alone = (
            stack.enter_context(group(bench, processes, *args)) for processes, *args in ((2,), (2, "silent"), (1,))
        )
        contestants = {"silent": silent, "agreeing": agreeing, "alone": alone}
        rates = compare(contestants, bench.plan.together_rounds)
    what = f"cnn, two processes with agreement against two without, batch 2 × {BATCH_SIZE}"
    yield report.steps_per_s(what, rates["agreeing"], rates["silent"], "ratio ≥ 0.99")
    what = f"cnn, two processes with a core each against one process, batch {BATCH_SIZE} each"
    note = "weak scaling: 1 means twice the images in the same time"
    yield report.steps_per_s(what, rates["agreeing"], rates["alone"], "ratio ≥ 0.6", note=note)
    with group(bench, 2, batch_size=LARGE_BATCH_SIZE) as two, group(bench, 1, batch_size=LARGE_BATCH_SIZE) as one:
        rates = compare({"two": two, "one": one}, max(1, bench.plan.together_rounds // 16))  # Its calls are longer.
    yield report.steps_per_s(f"the same, batch {LARGE_BATCH_SIZE} each", rates["two"], rates["one"], "ratio ≥ 0.9")


def compare(contestants: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Return the steps per second of the contestants in each round. They alternate."""
    for steps_per_s in contestants.values():
        steps_per_s(0)  # The first calls connect the processes.
    return alternate(contestants, rounds)


@contextlib.contextmanager
def group(bench: Bench, processes: int, *args: str, batch_size: int = BATCH_SIZE) -> Iterator[Callable[[int], float]]:
    """Start a process group, and yield a function that trains for some calls and returns steps/s."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    flags = (*bench.images.flags, "--batch-size", str(processes * batch_size), *ENDLESS)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(processes) as threads:
        workers = []
        for index in range(processes):
            place = ("--coordinator", address, "--num-processes", str(processes), "--process-id", str(index))
            with bound_to_core(index):
                workers.append(Worker("benchmarks.ours_together", *args, *flags, *place, environment=ONE_THREAD))
        list(threads.map(stack.enter_context, workers))  # No process is ready before all are connected.

        def steps_per_s(_: int) -> float:
            replies = list(threads.map(lambda worker: worker.ask("train", bench.plan.together_calls), workers))
            return replies[0]["steps"] / max(reply["seconds"] for reply in replies)

        yield steps_per_s


@contextlib.contextmanager
def bound_to_core(index: int) -> Iterator[None]:
    """Bind processes that start in the block to one core, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [sorted(cores)[index % len(cores)]])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
