"""What safety costs, and how quick a stop, a resumption and a first start are."""

import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import report
from benchmarks.bench import ENDLESS, Bench, wait_for_phase
from benchmarks.processes import ON_CPU, Ended, Failed, Worker, alternate
from benchmarks.report import Row


def safety(bench: Bench) -> Iterator[Row]:
    """Train in windows with and without a save at their beginning."""
    window_s = bench.plan.save_window_s
    with Worker("benchmarks.ours", *bench.images.flags, *ENDLESS) as worker:

        def ms_per_step(command: str) -> float:
            answer = worker.ask(command, window_s)
            return 1000 * answer["seconds"] / answer["steps"]

        ms_per_step("train_and_save")  # The first calls find out how long a call should be, and compile the copy.
        contestants = {name: lambda _, name=name: ms_per_step(name) for name in ("train_and_save", "train")}
        saving, not_saving = alternate(contestants, bench.plan.save_rounds).values()
    yield Row(
        what=f"training with a checkpoint every {window_s:g} s, against none",
        unit="ms/step",
        ours=saving,
        theirs=not_saving,
        ratio=report.ratio(saving, not_saving),
        goals=("ratio ≤ 1.15",),  # and so, with a checkpoint every 30 s, 1.005
    )


def save(bench: Bench) -> Iterator[Row]:
    """Save amid the training, and see how long that has to wait."""
    with Worker("benchmarks.ours", *bench.images.flags, *ENDLESS) as worker:
        worker.ask("train_and_save", bench.plan.save_window_s)
        waits_ms = [1000 * wait_s for wait_s in worker.ask("save", bench.plan.saves)["waits_s"]]
    yield Row(what="training waits for a save", unit="ms", ours=waits_ms, goals=("ours ≤ 12",))
    yield Row(what="training waits for a save", unit="ms", ours=waits_ms, of="p99", goals=("ours ≤ 40",))


def stop(bench: Bench) -> Iterator[Row]:
    """Stop a training again and again, each time where the last start carried it on."""
    chance = random.Random(0)
    with TemporaryDirectory(dir=bench.folder) as folder:
        seconds = [stop_once(bench, Path(folder), chance.uniform(0.5, 1))[0] for _ in range(bench.plan.stops)]
    yield Row(what="SIGTERM to exit", unit="s", ours=seconds, goals=("ours ≤ 0.3",))
    yield Row(what="SIGTERM to exit", unit="s", ours=seconds, of="p99", goals=("ours ≤ 0.6",))


def stop_once(bench: Bench, workdir: Path, after_s: float) -> tuple[float, Ended]:
    """Begin the run in `workdir` or carry it on, and return how long it took to stop, and its end."""
    with bench.start(workdir, *ENDLESS) as process:
        wait_for_phase("train", workdir, process)
        time.sleep(after_s)  # Until it trains steadily; at random, so that no moment of a call is preferred.
        signal_s = process.stop()
        ended = process.wait()
    if "\nstopped step=" not in ended.out:
        raise Failed(f"the training did not stop at a signal, but said:\n{ended.out}")
    return ended.end_s - signal_s, ended


def resume(bench: Bench) -> Iterator[Row]:
    """Carry copies of a stopped run on, each until its first update is made."""
    with TemporaryDirectory(dir=bench.folder) as folder:
        origin, copy = Path(folder, "origin"), Path(folder, "copy")
        _, ended = stop_once(bench, origin, 0.5)
        seconds = []
        for _ in range(1 + bench.plan.resumes):
            shutil.copytree(origin, copy)
            seconds.append(first_update_s(bench, copy, step=int(ended.fields["step"]) + 1))
            shutil.rmtree(copy)
    # The first one warmed the caches up.
    yield Row(what="start to first resumed update", unit="s", ours=seconds[1:], goals=("ours ≤ 1.5",))


def cold(bench: Bench) -> Iterator[Row]:
    """Begin runs where nothing was ever compiled, each until its first update is made."""
    seconds = []
    for _ in range(bench.plan.cold_starts):
        with TemporaryDirectory(dir=bench.folder) as folder:
            no_cache = {"XDG_CACHE_HOME": folder, "JAX_COMPILATION_CACHE_DIR": ""}
            seconds.append(first_update_s(bench, Path(folder, "run"), step=1, **no_cache))
    yield Row(what="start to first update, nothing compiled yet", unit="s", ours=seconds, goals=("ours ≤ 5",))


def first_update_s(bench: Bench, workdir: Path, *, step: int, **variables: str) -> float:
    """Return how long a start takes until update number `step` is made, the first after what `workdir` holds.

    An evaluation is due right after it, whose beginning the history tells. A line of the log is due as well, so that
    the training waits until the update is made.
    """
    due = ("--eval-every-steps", str(step), "--log-every-steps", str(step))
    with bench.start(workdir, *ENDLESS[:2], *due, environment={**ON_CPU, **variables}) as process:
        return wait_for_phase("evaluate", workdir, process) - process.start_s
