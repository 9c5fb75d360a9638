"""Cost of checkpoints, and the time that a stop, a resume and a first start take."""

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import report
from benchmarks.bench import ENDLESS, Bench, wait_for_phase
from benchmarks.processes import ON_CPU, BenchmarkError, Completed, Worker, alternate
from benchmarks.report import Row


def safety(bench: Bench) -> Iterator[Row]:
    """Train in windows, with and without a save at the start."""
    window_s = bench.plan.save_window_s
    with Worker("benchmarks.ours", *bench.images.flags, *ENDLESS) as worker:

        def ms_per_step(command: str) -> float:
            reply = worker.ask(command, window_s)
            return 1000 * reply["seconds"] / reply["steps"]

        ms_per_step("train_and_save")  # The first calls adapt the number of steps per call and compile the copy.
        contestants = {name: lambda _, name=name: ms_per_step(name) for name in ("train_and_save", "train")}
        saving, not_saving = alternate(contestants, bench.plan.save_rounds).values()
    yield Row(
        what=f"training with a checkpoint every {window_s:g} s, against none",
        unit="ms/step",
        ours=saving,
        theirs=not_saving,
        ratio=report.ratio(saving, not_saving),
        goals=("ratio ≤ 1.15",),  # that is 1.005 with a checkpoint every 30 s
    )


def save(bench: Bench) -> Iterator[Row]:
    """Measure how long a save blocks training."""
    with Worker("benchmarks.ours", *bench.images.flags, *ENDLESS) as worker:
        worker.ask("train_and_save", bench.plan.save_window_s)
        waits_ms = [1000 * wait_s for wait_s in worker.ask("save", bench.plan.saves)["waits_s"]]
    yield Row(what="a save blocks training", unit="ms", ours=waits_ms, goals=("ours ≤ 12",))
    yield Row(what="a save blocks training", unit="ms", ours=waits_ms, of="p99", goals=("ours ≤ 40",))


def stop(bench: Bench) -> Iterator[Row]:
    """Stop and resume one run repeatedly, and measure each stop."""
    rng = random.Random(0)
    with TemporaryDirectory(dir=bench.folder) as folder:
        seconds = [stop_once(bench, Path(folder), rng.uniform(0.5, 1))[0] for _ in range(bench.plan.stops)]
    yield Row(what="SIGTERM to exit", unit="s", ours=seconds, goals=("ours ≤ 0.3",))
    yield Row(what="SIGTERM to exit", unit="s", ours=seconds, of="p99", goals=("ours ≤ 0.6",))


def stop_once(bench: Bench, workdir: Path, after_s: float) -> tuple[float, Completed]:
    """Start or resume the run in `workdir`, stop it, and return the duration of the stop and the result."""
    with bench.start(workdir, *ENDLESS) as process:
        wait_for_phase("train", workdir, process)
        time.sleep(after_s)  # until it trains steadily; random, to hit any moment of a call
        signal_s = process.stop()
        completed = process.wait()
    if "\nstopped step=" not in completed.out:
        raise BenchmarkError(f"the run did not stop at a signal; its output:\n{completed.out}")
    return completed.end_s - signal_s, completed


def resume(bench: Bench) -> Iterator[Row]:
    """Resume copies of a stopped run, each until its first update is made."""
    with TemporaryDirectory(dir=bench.folder) as folder:
        origin, copy = Path(folder, "origin"), Path(folder, "copy")
        _, completed = stop_once(bench, origin, 0.5)
        seconds = []
        for _ in range(1 + bench.plan.resumes):
            shutil.copytree(origin, copy)
            seconds.append(first_update_s(bench, copy, step=int(completed.fields["step"]) + 1))
            shutil.rmtree(copy)
    # The first one warms up the caches.
    yield Row(what="start to first resumed update", unit="s", ours=seconds[1:], goals=("ours ≤ 1.5",))


def cold(bench: Bench) -> Iterator[Row]:
    """Start runs without a compilation cache, each until its first update is made."""
    seconds = []
    for _ in range(bench.plan.cold_starts):
        with TemporaryDirectory(dir=bench.folder) as folder:
            no_cache = {"XDG_CACHE_HOME": folder, "JAX_COMPILATION_CACHE_DIR": ""}
            seconds.append(first_update_s(bench, Path(folder, "run"), step=1, **no_cache))
    yield Row(what="start to first update, empty compilation cache", unit="s", ours=seconds, goals=("ours ≤ 5",))


def first_update_s(bench: Bench, workdir: Path, *, step: int, **variables: str) -> float:
    """Return the time from a start until update `step`, the first after the checkpoint in `workdir`, is made.

    An evaluation is due right after it, and events.jsonl has its start time. A log line is due as well, so the loop
    waits until the update is computed.
    """
    due = ("--eval-every-steps", str(step), "--log-every-steps", str(step))
    with bench.start(workdir, *ENDLESS[:2], *due, environment={**ON_CPU, **variables}) as process:
        return wait_for_phase("evaluate", workdir, process) - process.start_s
