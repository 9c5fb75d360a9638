"""Several processes that train together: stopped, killed and carried on, they end as they would have undisturbed."""

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import DEADLINE_S, Run, end
from several import Several, free_port, start

from mnist_jax import peers
from mnist_jax.preemption import STOP_SIGNALS

ARGS = ("--dataset", "digits", "--steps", "60", "--log-every-steps", "5", "--eval-every-steps", "25")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, environment):
    """The run of so many processes that nothing disturbs."""
    runs: dict[int, Run] = {}

    def of(count: int) -> Run:
        if count not in runs:
            run = Run(tmp_path_factory.mktemp("several") / "run", environment)
            several = start(run, count, *ARGS)
            check_codes(several, 0)
            runs[count] = run
        return runs[count]

    return of


def check_codes(several: Several, code: int, timeout_s: float = DEADLINE_S):
    """Wait for the end of all processes, which all leave with one code, and return how process 0 ended."""
    ended = several.end(timeout_s)
    assert [one.code for one in ended] == [code] * len(ended), "".join(one.err for one in ended)
    assert [one.err for one in ended[1:]] == [""] * (len(ended) - 1) or code not in (0, 75)
    return ended[0]


def lines(run: Run) -> int:
    path = run.workdir / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def wait_for(several: Several, is_so) -> None:
    """Wait until something is so, or say how process 0 ended before."""
    assert several.run.wait_for(is_so, several.processes[0]), several.end()


def wait_for_another_line(several: Several) -> None:
    before = lines(several.run)
    wait_for(several, lambda: several.run.events("phase")[-1:] and lines(several.run) > before)


def check_ended_like(run: Run, undisturbed: Run) -> None:
    assert run.metrics() == undisturbed.metrics()
    ends = [one.events("exit")[-1] for one in (run, undisturbed)]
    assert [one["outcome"] for one in ends] == ["finished", "finished"]
    assert ends[0]["state_sha256"] == ends[1]["state_sha256"]


@pytest.mark.parametrize(("count", "signals"), [(2, STOP_SIGNALS), (4, STOP_SIGNALS[:4])])
def test_a_signal_to_any_one_process_stops_all_and_they_end_as_if_undisturbed(count, signals, new_run, undisturbed):
    run = new_run()
    victims = itertools.cycle(reversed(range(count)))
    for number, victim in zip(signals, victims, strict=False):
        several = start(run, count, *ARGS)
        wait_for_another_line(several)
        several.signal(number, victim)
        stopped = check_codes(several, 75)
        assert stopped.last_line.startswith("stopped ")
        assert stopped.fields["signal"] == number.name
    check_codes(start(run, count, *ARGS), 0)
    resumes = run.events("resume")
    assert len(resumes) == len(signals)
    assert all(resume["exact"] and not resume["lost_steps"] for resume in resumes)
    check_ended_like(run, undisturbed(count))


def test_a_killed_process_takes_the_others_along_and_all_are_carried_on(new_run, undisturbed):
    run = new_run()
    for victim in (1, 0):
        several = start(run, 2, *ARGS, "--checkpoint-every-steps", "10")
        saves = len(run.events("save"))
        wait_for(several, lambda saves=saves: len(run.events("save")) > saves)
        several.signal(signal.SIGKILL, victim)
        ended = several.end(timeout_s=60)
        left = ended[1 - victim]
        # Process 0 serves the others, and JAX's own client may notice that it is gone, and abort, before we do.
        assert left.code in ((69,) if victim else (69, -signal.SIGABRT)), left.err
        assert "another process is lost" in left.err or (left.code != 69 and "another task died" in left.err)
        assert ended[victim].code == -signal.SIGKILL
    check_codes(start(run, 2, *ARGS), 0)
    assert all(resume["exact"] for resume in run.events("resume"))
    check_ended_like(run, undisturbed(2))


@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_gives_no_sign_is_not_waited_for_longer_than_asked(silent, new_run):
    several = start(new_run(), 2, *ARGS, "--steps", "100000", "--peer-timeout-s", "3")
    wait_for_another_line(several)
    several.signal(signal.SIGSTOP, silent)
    began_s = time.monotonic()
    left = end(several.processes[1 - silent], timeout_s=60)
    assert left.code in (69, -signal.SIGABRT)
    assert "another process is lost" in left.err or "another task died" in left.err
    assert time.monotonic() - began_s < 30  # Three seconds, and what a busy machine adds.
    several.signal(signal.SIGKILL, silent)
    several.end()


@pytest.mark.parametrize(("phase", "victim"), [("data", 0), ("compile", 1)])
def test_a_signal_before_the_training_is_passed_on_and_nothing_is_begun(phase, victim, new_run, tmp_path):
    run = new_run(XDG_CACHE_HOME=str(tmp_path / "cold"))  # To compile takes seconds.
    several = start(run, 2, *ARGS)
    assert run.wait_for_phase(phase, several.processes[0])
    several.signal(signal.SIGTERM, victim)
    stopped = check_codes(several, 75)
    assert stopped.last_line == "stopped step=0 signal=SIGTERM state_sha256=none"
    assert [event["phase"] for event in run.events("phase")] in (["data"], ["data", "compile"])


def test_a_save_signal_to_any_process_saves_and_goes_on(new_run, undisturbed):
    run = new_run()
    several = start(run, 2, *ARGS)
    wait_for_another_line(several)
    for victim in (1, 0):
        several.signal(signal.SIGUSR2, victim)
        wait_for(several, lambda wanted=2 - victim: reasons(run).count("signal SIGUSR2") == wanted)
    check_codes(several, 0)
    check_ended_like(run, undisturbed(2))


def reasons(run: Run) -> list[str]:
    return [event["reason"] for event in run.events("save")]


def test_flags_that_contradict_the_run_end_all_processes_with_the_code_of_process_0(new_run, undisturbed, tmp_path):
    shutil.copytree(undisturbed(2).workdir, tmp_path / "run")
    several = start(new_run(), 2, *ARGS, "--seed", "1")
    first, second = several.end()
    assert (first.code, second.code) == (2, 2)
    assert "would change its mathematics" in first.err
    assert "process 1 of 2: process 0 gave up: " in second.err


def test_other_data_on_one_process_ends_all(new_run, mnist_dir, tmp_path):
    """Each process has a disk of its own for the data, and there other files have the same names."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        shutil.copytree(mnist_dir, folder)
    for name in ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"):
        (there / name).unlink()
    link = tmp_path / "data"
    link.symlink_to(here)
    run = new_run()
    several = start(run, 2, "--data-dir", str(link), "--steps", "10")
    assert run.wait_for_phase("data", several.processes[0])
    link.unlink()
    link.symlink_to(there)
    ended = several.end()
    if {one.code for one in ended} == {0}:
        pytest.skip("process 1 was quick, and read the data before it was changed")
    assert {one.code for one in ended} == {2}
    assert "process 1 gave up" in ended[0].err
    assert not run.events("save")


def in_a_file_system_of_its_own(hidden: Path) -> list[str]:
    """Return the beginning of a command that sees an empty directory in the place of one."""
    return ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none "{hidden}" && exec "$0" "$@"']


def test_a_run_directory_that_process_1_does_not_share_is_a_clear_error(new_run, tmp_path):
    run = new_run()
    run.workdir.mkdir()
    alone = in_a_file_system_of_its_own(run.workdir)
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    address = f"127.0.0.1:{free_port()}"
    named = ["--coordinator", address, "--num-processes", "2", "--process-id"]
    first = run.start(*named, "0", *ARGS)
    second = subprocess.Popen(
        [*alone, sys.executable, "-m", "mnist_jax.train", "--workdir", str(run.workdir), *named, "1", *ARGS],
        env={**os.environ, **run.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ended = [end(process) for process in (first, second)]
    assert [one.code for one in ended] == [2, 2]
    for one in ended:
        assert "on a file system that they share" in one.err
    assert not run.events("phase")


LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (1, 4), (1, 8)]  # processes, devices of each


def devices(number: int) -> dict[str, str]:
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={number}"} if number > 1 else {}


def seen_by(layout: tuple[int, int], checkpoints: list[Path], environment: dict[str, str]) -> list[dict]:
    """Return what each process of a layout sees of some checkpoints."""
    count, number = layout
    address = f"127.0.0.1:{free_port()}" if count > 1 else ""
    processes = [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name("layouts.py"), address, str(count), str(index), *checkpoints],
            env={**os.environ, **environment, **devices(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    ended = [end(process) for process in processes]
    assert [one.code for one in ended] == [0] * count, ended[0].err
    return [json.loads(one.last_line) for one in ended]


def test_what_any_layout_saved_any_other_resumes_with_the_same_bits(new_run, undisturbed, environment):
    """Of all pairs of layouts. What follows is exact where the layout is the same, as the tests above show."""
    saved = []
    for count, number in LAYOUTS:
        run = undisturbed(count) if count > 1 else new_run(f"{number}-devices", **devices(number))
        if count == 1:
            ended = run.finish(*ARGS, "--steps", "5")
            assert ended.code == 0, ended.err
        saved.append(run.workdir / "checkpoints" / str(run.steps()[-1]))
    assert len({json.loads((path / "manifest.json").read_text())["sha256"] for path in saved[:3]}) == 3
    for count, number in LAYOUTS:
        for seen in seen_by((count, number), saved, environment):
            assert (seen["processes"], seen["devices"]) == (count, count * number)
            assert seen["same"] == [[True] * number] * len(LAYOUTS)


def test_a_run_that_changes_its_layout_says_so_and_reaches_its_end(new_run):
    run = new_run()
    several = start(run, 2, *ARGS)
    wait_for_another_line(several)
    several.signal(signal.SIGTERM, 0)
    check_codes(several, 75)
    ended = run.finish(*ARGS)
    assert ended.code == 0, ended.err
    assert (
        "numerically equivalent, not bit for bit, for this changed: devices count 2 -> 1; devices processes 2 -> 1"
        in (ended.out)
    )
    assert float(ended.fields["test_accuracy"]) > 0.9


@pytest.mark.parametrize(
    ("variables", "hint"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),  # a batch script, not under srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_a_launcher_of_several_processes_is_known_by_what_it_sets(variables, hint, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION", "JAX_COORD", "TPU_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert peers.may_have_peers() is hint


def test_one_process_is_alone_whatever_a_scheduler_says_and_where_jax_finds_no_launcher(new_run):
    finished = new_run("a", SLURM_STEP_NUM_TASKS="2").finish(*ARGS, "--num-processes", "1", "--steps", "5")
    assert finished.code == 0, finished.err
    finished = new_run("b", SLURM_STEP_NUM_TASKS="2").finish(*ARGS, "--steps", "5")
    assert finished.code == 0, finished.err


def test_an_address_that_process_0_cannot_have_is_an_error(new_run):
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = f"127.0.0.1:{server.getsockname()[1]}"
        ended = new_run().finish("--coordinator", taken, "--num-processes", "2", "--process-id", "0", *ARGS)
    assert ended.code == 69
    assert f"process 0 cannot listen on port {taken.partition(':')[2]}" in ended.err
