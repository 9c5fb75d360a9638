"""What there is to measure where JAX finds a GPU."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import report
from benchmarks.bench import ENDLESS, Bench, wait_for_phase
from benchmarks.processes import Ended, Worker
from benchmarks.report import Row
from benchmarks.speed import compare, race
from mnist_jax.records.metrics import read_events


def is_there() -> bool:
    """Tell whether JAX computes on something else than a CPU. Asked in another process: here JAX is never begun."""
    script = "import jax; print(jax.default_backend())"
    answer = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True).stdout
    return answer.strip() != "cpu"


def gpu(bench: Bench) -> Iterator[Row]:
    """Measure time to 99 %, whether the bits are the same, throughput, and what determinism costs."""
    yield from trainings(bench)
    yield from race(bench, "cnn", 256, device="cuda", goal="ratio ≥ 5")
    yield determinism(bench)


def trainings(bench: Bench) -> Iterator[Row]:
    """Train by the default preset_values, twice undisturbed and once with a stop on the way."""
    with TemporaryDirectory(dir=bench.folder) as folder:
        warm, first, second, cut = (Path(folder, name) for name in ("warm", "first", "second", "cut"))
        ends = [train(bench, workdir) for workdir in (warm, first, second)]
        with bench.start(cut, *bench.to_the_end, environment={}) as process:
            wait_for_phase("train", cut, process)
            process.stop()
            process.wait()
        ends.append(train(bench, cut))
        seconds = [training_s(workdir) for workdir in (first, second)]
    accuracy = f"test accuracy {ends[0].fields['test_accuracy']}"
    yield Row(
        what="first update to last evaluation on gpu", unit="s", ours=seconds, goals=("ours ≤ 0.3",), note=accuracy
    )
    same = [float(end.fields["state_sha256"] == ends[0].fields["state_sha256"]) for end in ends[1:]]
    yield Row(
        what="runs on gpu with the bits of the first, one of them stopped", ours=same, of="mean", goals=("ours ≥ 1",)
    )


def train(bench: Bench, workdir: Path) -> Ended:
    """Train to the end."""
    with bench.start(workdir, *bench.to_the_end, environment={}) as process:
        return process.wait()


def training_s(workdir: Path) -> float:
    """Return how long an undisturbed training took from its first update to the end of its last evaluation."""
    events = read_events(workdir / "events.jsonl")
    begin_s = next(event["time"] for event in events if event.get("phase") == "train")
    return max(event["time"] for event in events if event["event"] == "evaluation") - begin_s


def determinism(bench: Bench) -> Row:
    """Train with the kernels that give the same bits each time, and with whichever are quickest."""
    flags = ("benchmarks.ours", *bench.images.flags, "--batch-size", "256", *ENDLESS)
    on, off = ({"XLA_FLAGS": f"--xla_gpu_deterministic_ops={word}"} for word in ("true", "false"))
    with Worker(*flags, environment=on) as exact, Worker(*flags, environment=off) as free:
        rates = compare(bench, {"exact": (exact, "train"), "free": (free, "train")})
    return Row(
        what="cnn on gpu, batch 256, deterministic kernels against any",
        unit="steps/s",
        ours=rates["exact"],
        theirs=rates["free"],
        ratio=report.ratio(rates["exact"], rates["free"]),
    )
