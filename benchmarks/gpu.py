"""Measurements on a GPU."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import report
from benchmarks.bench import ENDLESS, Bench, wait_for_phase
from benchmarks.processes import Completed, Worker
from benchmarks.report import Row
from benchmarks.speed import compare, race
from mnist_jax.records.metrics import read_events


def has_gpu() -> bool:
    """Return whether JAX has an accelerator. Uses another process, because this one must not initialize JAX."""
    script = "import jax; print(jax.default_backend())"
    backend = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True).stdout
    return backend.strip() != "cpu"


def gpu(bench: Bench) -> Iterator[Row]:
    """Measure time to 99 %, equality of the bits, throughput, and the cost of determinism."""
    yield from trainings(bench)
    yield from race(bench, "cnn", 256, device="cuda", goal="ratio ≥ 5")
    yield determinism(bench)


def trainings(bench: Bench) -> Iterator[Row]:
    """Train with the default preset: one warm-up, two uninterrupted runs, and one with a stop."""
    with TemporaryDirectory(dir=bench.folder) as folder:
        warm, first, second, cut = (Path(folder, name) for name in ("warm", "first", "second", "cut"))
        results = [train(bench, workdir) for workdir in (warm, first, second)]
        with bench.start(cut, *bench.length_flags, environment={}) as process:
            wait_for_phase("train", cut, process)
            process.stop()
            process.wait()
        results.append(train(bench, cut))
        seconds = [training_s(workdir) for workdir in (first, second)]
    accuracy = f"test accuracy {results[0].fields['test_accuracy']}"
    yield Row(
        what="first update to last evaluation on gpu", unit="s", ours=seconds, goals=("ours ≤ 0.3",), note=accuracy
    )
    same = [float(result.fields["state_sha256"] == results[0].fields["state_sha256"]) for result in results[1:]]
    yield Row(
        what="share of runs on gpu with the bits of the first, one of them stopped",
        ours=same,
        of="mean",
        goals=("ours ≥ 1",),
    )


def train(bench: Bench, workdir: Path) -> Completed:
    """Train to the end."""
    with bench.start(workdir, *bench.length_flags, environment={}) as process:
        return process.wait()


def training_s(workdir: Path) -> float:
    """Return the duration of an uninterrupted training, from its first update to its last evaluation."""
    events = read_events(workdir / "events.jsonl")
    start_s = next(event["time"] for event in events if event.get("phase") == "train")
    return max(event["time"] for event in events if event["event"] == "evaluation") - start_s


def determinism(bench: Bench) -> Row:
    """Compare deterministic kernels with the fastest ones."""
    flags = ("benchmarks.ours", *bench.images.flags, "--batch-size", "256", *ENDLESS)
    on, off = ({"XLA_FLAGS": f"--xla_gpu_deterministic_ops={value}"} for value in ("true", "false"))
    with Worker(*flags, environment=on) as exact, Worker(*flags, environment=off) as free:
        rates = compare(bench, {"exact": (exact, "train"), "free": (free, "train")})
    return Row(
        what="cnn on gpu, batch 256, deterministic kernels against the fastest",
        unit="steps/s",
        ours=rates["exact"],
        theirs=rates["free"],
        ratio=report.ratio(rates["exact"], rates["free"]),
    )
