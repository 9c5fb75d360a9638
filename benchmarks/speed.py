"""Throughput and time to 99 %, against PyTorch and against the examples of other libraries."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import report
from benchmarks.bench import ENDLESS, Bench, wait_for_phase
from benchmarks.processes import ON_CPU, BenchmarkError, Completed, Worker, alternate, run
from benchmarks.report import Row


def throughput(bench: Bench) -> Iterator[Row]:
    """Train the same model at the same batch size side by side: ours, and PyTorch in two precisions."""
    for model in ("original-dropout", "cnn"):
        yield from race(bench, model, 128, device="cpu", goal="ratio ≥ 1.2")


def race(bench: Bench, model: str, batch_size: int, *, device: str, goal: str) -> Iterator[Row]:
    """Yield images per second, ours against PyTorch's. The goal is for float32."""
    environment = ON_CPU if device == "cpu" else {}
    sizes = ("--model", model, "--batch-size", str(batch_size))
    run_flags = ("--threads", str(bench.threads), "--device", device, "--try-s", str(bench.plan.window_s))
    theirs = ("benchmarks.torch_throughput", *sizes, *run_flags, "--data-dir", str(bench.images.folder))
    with (
        Worker("benchmarks.ours", *bench.images.flags, *sizes, *ENDLESS, environment=environment) as jax,
        Worker(*theirs, environment=environment) as torch,
    ):
        if jax.about["parameters"] != torch.about["parameters"]:
            raise BenchmarkError(
                f"{model} has {jax.about['parameters']} parameters, and {torch.about['parameters']} in PyTorch"
            )
        others = ("bfloat16", "compiled") if device == "cuda" else ("bfloat16",)
        # In this order and its reverse, ours is next to two of the others.
        contestants = {"float32": (torch, "float32"), "ours": (jax, "train")}
        rates = compare(bench, contestants | {name: (torch, name) for name in others})
        trials = ", ".join(f"{name} {report.number(rate)}" for name, rate in torch.about["images_per_s"].items())
    images_per_s = {name: [batch_size * rate for rate in windows] for name, windows in rates.items()}
    for name in ("float32", *others):
        yield Row(
            what=f"{model} on {device}, batch {batch_size}, against PyTorch's {name}",
            unit="images/s",
            ours=images_per_s["ours"],
            theirs=images_per_s[name],
            ratio=report.ratio(rates["ours"], rates[name]),
            goals=(goal,) if name == "float32" else (),
            note=f"PyTorch uses the faster memory format: {trials} images/s" * (name == "float32"),
        )


def compare(bench: Bench, contestants: dict[str, tuple[Worker, str]]) -> dict[str, list[float]]:
    """Return steps per second in each window. Contestants are workers with their commands; they alternate."""

    def steps_per_s(worker: Worker, command: str) -> float:
        reply = worker.ask(command, bench.plan.window_s)
        return reply["steps"] / reply["seconds"]

    def contestant(worker: Worker, command: str) -> Callable[[int], float]:
        steps_per_s(worker, command)  # The first calls adapt the number of steps per call.
        return lambda _: steps_per_s(worker, command)

    return alternate({name: contestant(*pair) for name, pair in contestants.items()}, bench.plan.rounds)


def time_to_99(bench: Bench) -> Iterator[Row]:
    """Train with each seed in a new process: ours, and the fastest PyTorch recipe that we know."""
    torch = ("benchmarks.torch_tuned", "--data-dir", str(bench.images.folder), "--threads", str(bench.threads))
    for seed in range(bench.plan.seeds):
        warm_up(bench, seed)
    run(*torch, "--steps", "1")
    contestants = {
        "ours": lambda seed: train(bench, seed),
        "theirs": lambda seed: run(*torch, "--seed", str(seed), *bench.length_flags),
    }
    ours, theirs = alternate(contestants, bench.plan.seeds).values()
    seconds = [[completed.seconds for completed in side] for side in (ours, theirs)]
    accuracies = [[float(completed.fields["test_accuracy"]) for completed in side] for side in (ours, theirs)]
    memory = [[completed.peak_mb for completed in side] for side in (ours, theirs)]
    yield Row(
        what="start to exit, trained, against tuned PyTorch",
        unit="s",
        ours=seconds[0],
        theirs=seconds[1],
        ratio=report.ratio(seconds[1], seconds[0]),
        goals=("ours ≤ 8", "ratio ≥ 2"),
    )
    yield Row(
        what="test accuracy of these runs", ours=accuracies[0], theirs=accuracies[1], of="mean", goals=("ours ≥ 0.99",)
    )
    yield Row(what="peak memory of these runs", unit="MB", ours=memory[0], theirs=memory[1], goals=("ours ≤ 600",))


def accurate(bench: Bench) -> Iterator[Row]:
    """Train with --preset accurate and each seed."""
    results = [train(bench, seed, "--preset", "accurate") for seed in range(bench.plan.accurate_seeds)]
    accuracies = [float(completed.fields["test_accuracy"]) for completed in results]
    yield Row(
        what="start to exit of --preset accurate",
        unit="s",
        ours=[completed.seconds for completed in results],
        goals=("ours ≤ 600",),
    )
    yield Row(what="test accuracy of these runs", ours=accuracies, of="mean", goals=("ours ≥ 0.996",))


def example(bench: Bench, module: str) -> Iterator[Row]:
    """Train another library's example to 99 % test accuracy, once, between two runs of ours."""
    warm_up(bench, 0)
    before = train(bench, 0)
    theirs = run(f"benchmarks.{module}", "--data-dir", str(bench.images.folder), *bench.length_flags)
    after = train(bench, 0)
    yield Row(
        what=f"start to exit at 99 %, against {module}",
        unit="s",
        ours=[before.seconds, after.seconds],
        theirs=[theirs.seconds],
        ratio=[2 * theirs.seconds / (before.seconds + after.seconds)],
        goals=("ratio ≥ 20",),
        note=f"theirs ended with {theirs.out.splitlines()[-1]}, ours with {after.fields['test_accuracy']}",
    )


def train(bench: Bench, seed: int, *flags: str) -> Completed:
    """Train with the default preset and the flags, in a new process."""
    with (
        TemporaryDirectory(dir=bench.folder) as folder,
        bench.start(Path(folder), "--seed", str(seed), *bench.length_flags, *flags) as process,
    ):
        return process.wait()


@cache
def warm_up(bench: Bench, seed: int) -> None:
    """Fill the compilation cache: the programs depend on the seed and on the number of steps."""
    with (
        TemporaryDirectory(dir=bench.folder) as folder,
        bench.start(Path(folder), "--seed", str(seed), *bench.length_flags) as process,
    ):
        wait_for_phase("train", Path(folder), process)
        process.stop()  # It saves, which compiles a program too.
        process.wait()
