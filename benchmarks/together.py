"""What it costs that several processes agree on their steps, and what a second device gains."""

import contextlib
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from benchmarks import report
from benchmarks.bench import ENDLESS, Bench
from benchmarks.processes import ON_CPU, Worker, alternate
from benchmarks.report import Row

BATCH_SIZE = 128  # of each device
ONE_THREAD = {**ON_CPU, "PJRT_NPROC": "1"}  # for each process, of which there are as many as cores


def together(bench: Bench) -> Iterator[Row]:
    """Train with two processes that agree, with two that do not, and with one."""
    with contextlib.ExitStack() as stack:
        agreeing, silent, alone = (
            stack.enter_context(group(bench, processes, *words)) for processes, *words in ((2,), (2, "silent"), (1,))
        )
        contestants = {"silent": silent, "agreeing": agreeing, "alone": alone}
        for steps_per_s in contestants.values():
            steps_per_s(0)  # The first calls connect the processes.
        rates = alternate(contestants, bench.plan.together_rounds)
    yield Row(
        what=f"cnn, two processes that agree, against two that do not, batch 2 × {BATCH_SIZE}",
        unit="steps/s",
        ours=rates["agreeing"],
        theirs=rates["silent"],
        ratio=report.ratio(rates["agreeing"], rates["silent"]),
        goals=("ratio ≥ 0.99",),
    )
    yield Row(
        what=f"cnn, two processes of a thread each, against one, batch {BATCH_SIZE} for each",
        unit="steps/s",
        ours=rates["agreeing"],
        theirs=rates["alone"],
        ratio=report.ratio(rates["agreeing"], rates["alone"]),
        note="weak scaling: 1 would be two devices that train twice the images in the time of one",
    )


@contextlib.contextmanager
def group(bench: Bench, processes: int, *words: str) -> Iterator[Callable[[int], float]]:
    """Start processes that train together, and yield what makes them train for a while and tells their steps/s."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    flags = (*bench.images.flags, "--batch-size", str(processes * BATCH_SIZE), *ENDLESS)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(processes) as threads:
        workers = [
            Worker(
                "benchmarks.ours_together",
                *words,
                *flags,
                *("--coordinator", address, "--num-processes", str(processes), "--process-id", str(index)),
                environment=ONE_THREAD,
            )
            for index in range(processes)
        ]
        list(threads.map(stack.enter_context, workers))  # None is ready before all have met.

        def steps_per_s(_: int) -> float:
            answers = list(threads.map(lambda worker: worker.ask("train", bench.plan.together_calls), workers))
            return answers[0]["steps"] / max(answer["seconds"] for answer in answers)

        yield steps_per_s
