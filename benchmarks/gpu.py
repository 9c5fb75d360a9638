"""Whether the program is right on a GPU, and how fast: `scripts/gpu-check`; the same on a CPU with `--platform cpu`."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import report
from benchmarks.bench import ENDLESS, Bench, wait_for_phase
from benchmarks.processes import Completed, Process, Worker, run
from benchmarks.report import Row
from benchmarks.speed import compare, race
from mnist_jax.records.metrics import read_events

TESTS = ("test_agreement", "test_augment", "test_model", "test_train_state", "test_train_step")
SAVE_MB = (0.7, 20, 1000)
DESCRIBE = """
import jax
device = jax.devices()[0]
print(jax.device_count(), device.device_kind, *device.client.platform_version.split())
"""


@cache
def has_gpu() -> bool:
    """Return whether JAX has an accelerator. Uses another process, because this one must not initialize JAX."""
    script = "import jax; print(jax.default_backend())"
    backend = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True).stdout
    return backend.strip() != "cpu"


def devices(bench: Bench) -> Iterator[Row]:
    """Describe the devices and what runs on them."""
    variables = {**os.environ, **bench.environment}
    command = [sys.executable, "-c", DESCRIBE]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    count, _, name = done.stdout.strip().partition(" ")
    yield Row(what="devices", ours=[float(count)], note=name)


def tests(bench: Bench) -> Iterator[Row]:
    """Run the tests of the pure functions on the device."""
    root = Path(__file__).parents[1]
    paths = [f"tests/{name}.py" for name in TESTS[: bench.plan.rounds]]
    # pytest-benchmark, if it is installed, warns that it does not work beside xdist, and warnings are errors.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", *paths]
    if find_spec("xdist") is not None:
        command += ["-n", str(min(len(paths), bench.threads))]
    # They share the device, and most of them do not prepare JAX as a run does.
    variables = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **bench.environment}
    done = subprocess.run(command, cwd=root, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    note = "; ".join([*failed, lines[-1] if lines else "no output"])
    yield Row(what="fast tests fail", ours=[float(max(len(failed), done.returncode))], goals=("ours ≤ 0",), note=note)


def trainings(bench: Bench) -> Iterator[Row]:
    """Train with the default preset: twice undisturbed, and with a stop at each of three moments."""
    with TemporaryDirectory(dir=bench.folder) as folder:
        whole = [Path(folder, name) for name in ("cold", "first", "second")]
        results = [train(bench, workdir) for workdir in whole]
        stops_s = []
        for phase, after_s in (("compile", 0.0), ("train", 0.0), ("train", 0.2)):
            workdir = Path(folder, f"stopped-{phase}-{after_s}")
            with bench.start(workdir, *bench.length_flags, environment=bench.environment) as process:
                wait_for_phase(phase, workdir, process)
                time.sleep(after_s)  # The last stop comes in the middle of the updates.
                signal_s = process.stop()
                stops_s.append(process.wait().end_s - signal_s)
            results.append(train(bench, workdir))
        seconds = [training_s(workdir) for workdir in whole[1:]]
    accuracy = f"test accuracy {results[0].fields['test_accuracy']}"
    yield Row(what="start to exit, first run", unit="s", ours=[results[0].seconds], note=accuracy)
    yield Row(what="start to exit, later runs", unit="s", ours=[result.seconds for result in results[1:3]])
    yield Row(what="first update to last evaluation", unit="s", ours=seconds, goals=("ours ≤ 0.3",))
    yield Row(what="SIGTERM to exit: compiling, first updates, later", unit="s", ours=stops_s, goals=("ours ≤ 0.6",))
    same = [float(result.fields["state_sha256"] == results[0].fields["state_sha256"]) for result in results[1:]]
    yield Row(
        what="share of runs with the bits of the first; three were stopped",
        ours=same,
        of="mean",
        goals=("ours ≥ 1",),
    )


def train(bench: Bench, workdir: Path, **variables: str) -> Completed:
    """Train to the end, with additional environment variables."""
    with bench.start(workdir, *bench.length_flags, environment={**bench.environment, **variables}) as process:
        return process.wait()


def training_s(workdir: Path) -> float:
    """Return the duration of an uninterrupted training, from its first update to its last evaluation."""
    events = read_events(workdir / "events.jsonl")
    start_s = next(event["time"] for event in events if event.get("phase") == "train")
    return max(event["time"] for event in events if event["event"] == "evaluation") - start_s


def throughput(bench: Bench) -> Iterator[Row]:
    """Train models side by side with PyTorch's, or alone where PyTorch is not installed."""
    for model, batch_size in (("cnn", 256), ("cnn", 2048), ("original-dropout", 256)):
        if find_spec("torch") is not None:
            device = "cpu" if bench.platform == "cpu" else "cuda"
            yield from race(briefly(bench), model, batch_size, device=device, goal="ratio ≥ 1")
            continue
        sizes = ("--model", model, "--batch-size", str(batch_size))
        with Worker("benchmarks.ours", *bench.images.flags, *sizes, *ENDLESS, environment=bench.environment) as worker:
            rates = compare(briefly(bench), {"ours": (worker, "train")})["ours"]
        yield Row(what=f"{model}, batch {batch_size}", unit="images/s", ours=[batch_size * rate for rate in rates])


def briefly(bench: Bench) -> Bench:
    """Return a bench whose windows fit into the time of the whole check."""
    plan = bench.plan
    return bench._replace(plan=plan._replace(rounds=min(plan.rounds, 4), window_s=min(plan.window_s, 0.8)))


def memory(bench: Bench) -> Iterator[Row]:
    """Measure the memory of a training, and of each command beside it. On a CPU the commands only have to succeed."""
    with TemporaryDirectory(dir=bench.folder) as folder:
        workdir, before_mb = Path(folder, "run"), used_mb(bench)
        with bench.start(
            workdir, *ENDLESS, "--checkpoint-every-steps", "20", environment=bench.environment
        ) as training:
            wait_for_phase("train", workdir, training)
            while not any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")):
                if training.has_exited:
                    raise training.error("exited before its first checkpoint")
                time.sleep(0.05)  # Polling faster would slow down what is measured.
            training_mb = used_mb(bench)
            yield Row(what="memory of the device: train", unit="MB", ours=[training_mb - before_mb])
            for command in ("evaluate", "status", "report"):
                with Process(f"mnist_jax.{command}", str(workdir), environment=bench.environment) as process:
                    most_mb = training_mb
                    while not process.has_exited:
                        most_mb = max(most_mb, used_mb(bench))
                        time.sleep(0.05)  # Sampling faster would slow down what is measured.
                    process.wait()
                yield Row(what=f"more of it beside the training: {command}", unit="MB", ours=[most_mb - training_mb])
            training.stop()
            training.wait()


def used_mb(bench: Bench) -> float:
    """Return the memory in use on the first GPU, in 10^6 bytes; 0 on a CPU."""
    if bench.platform == "cpu":
        return 0.0
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    used_mib = subprocess.run(query, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[0]
    return float(used_mib) * 2**20 / 1e6


def saves(bench: Bench) -> Iterator[Row]:
    """Save states of three sizes: how long the training thread waits, and when the save is committed."""
    for size_mb in SAVE_MB[: 2 if bench.platform == "cpu" else 3]:
        with TemporaryDirectory(dir=bench.folder) as folder:
            flags = (folder, str(size_mb), str(min(bench.plan.saves, 5)))
            done = run("benchmarks.saves", *flags, environment=bench.environment)
        waits_ms, commits_s = ([float(part) for part in done.fields[name].split(",")] for name in ("ms", "s"))
        yield Row(what=f"a save of {size_mb:g} MB blocks training", unit="ms", ours=waits_ms)
        yield Row(what=f"a save of {size_mb:g} MB is committed after", unit="s", ours=commits_s)


def determinism(bench: Bench) -> Iterator[Row]:
    """Measure what deterministic kernels cost: against the kernels that XLA chooses without that flag."""
    fastest = {**bench.environment, "XLA_FLAGS": "--xla_gpu_deterministic_ops=false"}
    for batch_size in ("256", "2048"):
        flags = ("benchmarks.ours", *bench.images.flags, "--batch-size", batch_size, *ENDLESS)
        with (
            Worker(*flags, environment=bench.environment) as exact,
            Worker(*flags, environment=fastest) as other,
        ):
            rates = compare(briefly(bench), {"exact": (exact, "train"), "other": (other, "train")})
        what = f"cnn, batch {batch_size}, deterministic kernels against the fastest"
        yield report.steps_per_s(what, rates["exact"], rates["other"])


ROWS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "gpu-devices": devices,
    "gpu-training": trainings,
    "gpu-save": saves,
    "gpu-memory": memory,
    "gpu-throughput": throughput,
    "gpu-determinism": determinism,
    "gpu-tests": tests,
}
