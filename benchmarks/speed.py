"""Throughput and time to 99 %, against PyTorch and against the examples of others."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import report
from benchmarks.bench import ENDLESS, Bench, wait_for_phase
from benchmarks.processes import ON_CPU, Ended, Failed, Worker, alternate, run
from benchmarks.report import Row


def throughput(bench: Bench) -> Iterator[Row]:
    """Train the same model at the same batch size side by side, ours as it is and PyTorch in two precisions."""
    for model in ("original-dropout", "cnn"):
        yield from race(bench, model, 128, device="cpu", goal="ratio ≥ 1.2")


def race(bench: Bench, model: str, batch_size: int, *, device: str, goal: str) -> Iterator[Row]:
    """Yield the images that a second trains, ours against PyTorch's; the goal is that of float32."""
    environment = ON_CPU if device == "cpu" else {}
    sizes = ("--model", model, "--batch-size", str(batch_size))
    trial = ("--threads", str(bench.threads), "--device", device, "--try-s", str(bench.plan.window_s))
    theirs = ("benchmarks.torch_throughput", *sizes, *trial, "--data-dir", str(bench.images.folder))
    with (
        Worker("benchmarks.ours", *bench.images.flags, *sizes, *ENDLESS, environment=environment) as jax,
        Worker(*theirs, environment=environment) as torch,
    ):
        if jax.about["parameters"] != torch.about["parameters"]:
            raise Failed(f"{model} has {jax.about['parameters']} parameters, and {torch.about['parameters']} there")
        # In this order ours has both others as neighbours, also when it is reversed.
        rates = compare(bench, {"float32": (torch, "float32"), "ours": (jax, "train"), "bfloat16": (torch, "bfloat16")})
        trials = ", ".join(f"{name} {report.number(rate)}" for name, rate in torch.about["images_per_s"].items())
    images_per_s = {name: [batch_size * rate for rate in windows] for name, windows in rates.items()}
    for precision in ("float32", "bfloat16"):
        yield Row(
            what=f"{model} on {device}, batch {batch_size}, against PyTorch's {precision}",
            unit="images/s",
            ours=images_per_s["ours"],
            theirs=images_per_s[precision],
            ratio=report.ratio(rates["ours"], rates[precision]),
            goals=(goal,) if precision == "float32" else (),
            note=f"trial of PyTorch, of which the quicker format is used: {trials} images/s" * (precision == "float32"),
        )


def compare(bench: Bench, contestants: dict[str, tuple[Worker, str]]) -> dict[str, list[float]]:
    """Return the steps that a second makes in each window of workers with their commands, which alternate."""

    def steps_per_s(worker: Worker, command: str) -> float:
        answer = worker.ask(command, bench.plan.window_s)
        return answer["steps"] / answer["seconds"]

    def contestant(worker: Worker, command: str) -> Callable[[int], float]:
        steps_per_s(worker, command)  # The first calls find out how long a call should be.
        return lambda _: steps_per_s(worker, command)

    return alternate({name: contestant(*who) for name, who in contestants.items()}, bench.plan.rounds)


def time_to_99(bench: Bench) -> Iterator[Row]:
    """Train with each seed, whole processes, ours and the quickest PyTorch that we know of."""
    torch = ("benchmarks.torch_tuned", "--data-dir", str(bench.images.folder), "--threads", str(bench.threads))
    for seed in range(bench.plan.seeds):
        warm_up(bench, seed)
    run(*torch, "--steps", "1")
    contestants = {
        "ours": lambda seed: train(bench, seed),
        "theirs": lambda seed: run(*torch, "--seed", str(seed), *bench.to_the_end),
    }
    ours, theirs = alternate(contestants, bench.plan.seeds).values()
    seconds = [[ended.seconds for ended in side] for side in (ours, theirs)]
    accuracies = [[float(ended.fields["test_accuracy"]) for ended in side] for side in (ours, theirs)]
    memory = [[ended.peak_mb for ended in side] for side in (ours, theirs)]
    yield Row(
        what="start to exit, trained, against tuned PyTorch",
        unit="s",
        ours=seconds[0],
        theirs=seconds[1],
        ratio=report.ratio(seconds[1], seconds[0]),
        goals=("ours ≤ 8", "ratio ≥ 1"),
    )
    yield Row(
        what="test accuracy of these", ours=accuracies[0], theirs=accuracies[1], of="mean", goals=("ours ≥ 0.99",)
    )
    yield Row(what="peak memory of these", unit="MB", ours=memory[0], theirs=memory[1], goals=("ours ≤ 600",))


def accurate(bench: Bench) -> Iterator[Row]:
    """Train by the accurate preset_values with each seed."""
    ends = [train(bench, seed, "--preset", "accurate") for seed in range(bench.plan.accurate_seeds)]
    accuracies = [float(ended.fields["test_accuracy"]) for ended in ends]
    yield Row(
        what="start to exit of --preset accurate",
        unit="s",
        ours=[ended.seconds for ended in ends],
        goals=("ours ≤ 600",),
    )
    yield Row(what="test accuracy of these", ours=accuracies, of="mean", goals=("ours ≥ 0.996",))


def example(bench: Bench, module: str) -> Iterator[Row]:
    """Train the example of another until 99 % of the test images are right, once, between two trainings of ours."""
    warm_up(bench, 0)
    before = train(bench, 0)
    theirs = run(f"benchmarks.{module}", "--data-dir", str(bench.images.folder), *bench.to_the_end)
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


def train(bench: Bench, seed: int, *flags: str) -> Ended:
    """Train by the default preset_values, or as the flags say, in a process of its own."""
    with (
        TemporaryDirectory(dir=bench.folder) as folder,
        bench.start(Path(folder), "--seed", str(seed), *bench.to_the_end, *flags) as process,
    ):
        return process.wait()


@cache
def warm_up(bench: Bench, seed: int) -> None:
    """Have the programs of a training compiled: they depend on the seed and on the number of steps."""
    with (
        TemporaryDirectory(dir=bench.folder) as folder,
        bench.start(Path(folder), "--seed", str(seed), *bench.to_the_end) as process,
    ):
        wait_for_phase("train", Path(folder), process)
        process.stop()  # It saves, for which it has a program too.
        process.wait()
