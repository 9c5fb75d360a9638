"""Two processes that train together: interrupted and resumed, they end like an undisturbed run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import faults
import jax
import pytest
from runs import ALL_THREADS, DIGITS, Ended, Run, end, in_new_process
from several import Several, free_port, start

from mnist_jax import cli
from mnist_jax.checkpoint.checkpoint import list_checkpoints
from mnist_jax.config import ConfigError
from mnist_jax.runtime import multihost
from mnist_jax.runtime.multihost import ProcessGroup, ProcessLostError
from mnist_jax.runtime.preemption import StoppedError, StopSignal
from mnist_jax.training import setup
from mnist_jax.training.dispatch import Dispatcher

ARGS = (*DIGITS, "--steps", "200", "--log-every-steps", "5", "--eval-every-steps", "75")


@pytest.fixture(scope="module")
def undisturbed(finished_once) -> Run:
    """A run of two processes."""
    return finished_once("undisturbed", *ARGS, start=start, **ALL_THREADS)


def check_codes(several: Several, code: int):
    """Wait until all processes exit, all with one code, and return how process 0 ended."""
    ended = several.end()
    assert [one.code for one in ended] == [code] * len(ended), "".join(one.err for one in ended)
    return ended[0]


def check_lost(ended: Ended, *codes: int) -> None:
    """Check that a process exited because another one is lost."""
    assert ended.code in (69, *codes), ended.err
    assert "is lost" in ended.err or "another task died" in ended.err


def wait_for(several: Several, condition) -> None:
    assert several.run.wait_for(condition, several.processes[0]), several.end()


def wait_for_another_line(several: Several) -> None:
    before = several.run.lines()
    wait_for(several, lambda: several.run.events("phase")[-1:] and several.run.lines() > before)


# Training


def test_interrupted_run_ends_like_an_undisturbed_one(new_run, undisturbed, tmp_path):
    """The state of this run is split over the processes, which changes no bit on CPUs."""
    run, mirror = new_run(**ALL_THREADS), ("--mirror", (tmp_path / "copy").as_uri())
    several = start(run, *ARGS, *mirror, "--fsdp", "2")
    wait_for_another_line(several)
    several.signal(signal.SIGTERM, 1)
    stopped = check_codes(several, 75)
    assert stopped.fields["signal"] == "SIGTERM"
    saves = len(run.events("save"))
    shutil.rmtree(run.workdir)  # It resumes from the remote copy.
    several = start(run, *ARGS, *mirror, "--checkpoint-every-steps", "10")
    wait_for(several, lambda: len(run.events("save")) > saves)
    several.signal(signal.SIGKILL, 0)
    check_lost(several.end(timeout_s=60)[1], -signal.SIGABRT)  # JAX's client may notice first that its server is gone.
    several = start(run, *ARGS, faults=((faults.log_programs,),))
    first, second = several.end()
    assert (first.code, second.code) == (0, 0), second.err
    # Process 1 finds the programs that process 0 compiled in the start before.
    for program in ("train_steps", "evaluate", "is_finite"):
        assert f"cache hit for 'jit_{program}'" in second.err
    resumes = run.events("resume")
    assert [resume["exact"] for resume in resumes] == [True, True]
    assert resumes[0]["lost_steps"] == 0
    assert run.metrics() == undisturbed.metrics()
    ends = [one.events("exit")[-1] for one in (run, undisturbed)]
    assert [one["outcome"] for one in ends] == ["finished", "finished"]
    assert ends[0]["state_sha256"] == ends[1]["state_sha256"]


def test_save_signal_saves_and_silent_process_is_lost(new_run):
    run = new_run()
    flags = (*ARGS, "--steps", "100000", "--eval-every-steps", "100000", "--peer-timeout-s", "3")
    several = start(run, *flags, environment={**run.environment, "PJRT_NPROC": "7"})
    for count, victim in enumerate((1, 0)):
        wait_for_another_line(several)
        several.signal(signal.SIGUSR2, victim)
        wait_for(several, lambda count=count: len(several.run.events("save")) > count)
    wait_for_another_line(several)
    assert [event["reason"] for event in several.run.events("save")] == ["signal SIGUSR2"] * 2
    several.signal(signal.SIGSTOP, 1)
    began_s = time.monotonic()
    try:
        left = end(several.processes[0], timeout_s=60)
    finally:
        several.signal(signal.SIGKILL, 1)
    check_lost(left)
    assert time.monotonic() - began_s < 30  # 3 s, and what a busy machine adds
    several.end()
    # The bits depend on the threads of each process, so a checkpoint describes them all.
    checkpoint = list_checkpoints(several.run.workdir / "checkpoints")[-1]
    assert checkpoint.metadata()["devices"]["cpu_threads of process 1"] == 7


def test_diverged_run_fails_on_all_processes(new_run):
    cadence = ("--log-every-steps", "100000", "--eval-every-steps", "100000", "--checkpoint-every-steps", "3")
    run = new_run()
    run.faults = ((faults.not_finite,),)
    several = start(run, *DIGITS, "--steps", "100000", *cadence)
    assert "not finite" in check_codes(several, 1).err
    assert not several.run.events("save")


def test_run_of_two_resumes_on_one(new_run, undisturbed):
    run = new_run(**ALL_THREADS)
    shutil.copytree(undisturbed.workdir, run.workdir)
    shutil.rmtree(run.workdir / "checkpoints" / "200")
    ended = run.finish(*ARGS)
    assert ended.code == 0, ended.err
    assert run.events("resume")[-1]["exact"] is False
    assert "devices count 2 -> 1; devices processes 2 -> 1" in ended.out
    theirs, ours = (json.loads(one.metrics().splitlines()[-1]) for one in (undisturbed, run))
    assert abs(theirs["loss"] - ours["loss"]) < 0.01


# Before training


@pytest.mark.parametrize(("phase", "victim"), [("data", 0), ("compile", 1)])
def test_signal_before_training_stops_all(phase, victim, new_run, tmp_path):
    run = new_run(XDG_CACHE_HOME=str(tmp_path / "cold"))  # Compilation takes seconds.
    several = start(run, *ARGS)
    assert run.wait_for_phase(phase, several.processes[0])
    several.signal(signal.SIGTERM, victim)
    stopped = check_codes(several, 75)
    assert stopped.last_line == "stopped step=0 signal=SIGTERM state_sha256=none"
    assert "train" not in [event["phase"] for event in run.events("phase")]


@pytest.mark.parametrize("phase", ["data", "compile"])
def test_process_killed_before_training_ends_the_other(phase, new_run, tmp_path):
    run = new_run(XDG_CACHE_HOME=str(tmp_path / "cold"))
    several = start(run, *ARGS, "--peer-timeout-s", "2")
    assert run.wait_for_phase(phase, several.processes[0])
    several.signal(signal.SIGKILL, 1)
    check_lost(several.end()[0])
    assert run.events("exit")[-1]["code"] == 69


def test_usage_error_of_process_0_ends_all(new_run, undisturbed):
    run = new_run()
    shutil.copytree(undisturbed.workdir, run.workdir)
    first, second = start(run, *ARGS, "--seed", "1").end()
    assert (first.code, second.code) == (2, 2)
    assert "would change its mathematics" in first.err
    assert "process 1 of 2: process 0 failed: " in second.err


def with_mount(mount: str) -> tuple[str, ...]:
    """Return the beginning of a command that sees other files, or skip the test if the user may not mount."""
    prefix = ("unshare", "--mount", "sh", "-c", f'{mount} && exec "$0" "$@"')
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    return prefix


def test_different_data_end_all(new_run):
    run = new_run()
    ended = start(run, *ARGS, faults=((faults.other_pixel,),)).end()
    assert [one.code for one in ended] == [2, 2]
    assert "the dataset of process 1 differs" in ended[0].err
    assert not run.events("save")


def test_run_directory_must_be_shared(new_run):
    run = new_run()
    run.workdir.mkdir()
    prefix = with_mount(f'mount -t tmpfs none "{run.workdir}"')
    ended = start(run, *ARGS, "--peer-timeout-s", "3", prefix=prefix).end()
    assert [one.code for one in ended] == [2, 2]
    assert all("--workdir" in one.err for one in ended)
    assert not run.events("phase")


# Initialization


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),  # a batch script, not under srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_launcher_is_detected(variables, expected, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "KUBERNETES_", "JOB_COMPLETION", "JAX_COORD", "TPU_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert multihost.may_be_distributed() is expected


def test_one_process_needs_no_jax(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setitem(sys.modules, "jax", None)
    with StopSignal() as stop:
        assert multihost.initialize(stop, None, count=1, index=None, timeout_s=60, notify=print).is_alone


def connect(coordinator: str | None, count: int | None, index: int | None) -> list:
    """Return the number of processes that connect, or exit code and message. Runs in a new process."""
    with StopSignal() as stop:
        try:
            group = multihost.initialize(stop, coordinator, count=count, index=index, timeout_s=60, notify=str)
        except (multihost.ProcessGroupError, ProcessLostError) as error:
            return [cli.exit_code(error), str(error)]
        group.shutdown()
        return [group.count, ""]


def connect_alone(timeout_s: int, count: int | None) -> list:
    """Return the lines, exit code and message of a process whose others never come. In a new process."""
    multihost.CONNECT_NOTICE_S, multihost.CONNECT_TIMEOUT_S, lines = timeout_s / 2, timeout_s, []
    address, index = (f"127.0.0.1:{free_port()}", 0) if count else (None, None)
    if count is None:  # as if JAX detected a cluster
        jax.distributed.initialize = lambda *_, **__: time.sleep(60)
    with StopSignal() as stop, pytest.raises(ProcessLostError) as error:
        multihost.initialize(stop, address, count=count, index=index, timeout_s=60, notify=lines.append)
    return [lines, cli.exit_code(error.value), str(error.value)]


def test_wait_for_processes_that_never_come_is_explained_and_ends():
    for count, variables in ((2, {}), (None, {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1"})):
        lines, code, message = in_new_process(connect_alone, 1, count, **variables)
        assert len(lines) == 1
        assert code == 69
        assert all("--num-processes 1" in line for line in (*lines, message))
        assert all(("--num-processes 2" in line) is bool(count) for line in (*lines, message))
        assert not any("None" in line for line in (*lines, message))


def test_process_is_alone_without_a_launcher():
    assert in_new_process(connect, None, None, None, JOB_COMPLETION_INDEX="0") == [1, ""]


def test_unknown_launcher_is_refused():
    """Open MPI 5 no longer sets what JAX looks for."""
    variables = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1"}
    code, message = in_new_process(connect, None, None, None, **variables)
    assert code == 2
    assert "--num-processes $OMPI_COMM_WORLD_SIZE --process-id $OMPI_COMM_WORLD_RANK" in message


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_port_in_use_is_reported(host, environment):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        server = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip("this machine has no such address")
    with server:
        port = server.getsockname()[1]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        code, message = in_new_process(connect, address, 2, 0)
    assert code == 69
    assert f"port {port}" in message
    if ":" in host:  # All other tests connect with IPv4.
        with ThreadPoolExecutor() as pool:
            connected = [pool.submit(in_new_process, connect, address, 2, index, **environment) for index in range(2)]
            assert [one.result() for one in connected] == [[2, ""]] * 2


# Errors


@pytest.fixture
def stop():
    with StopSignal() as stop:
        yield stop


@pytest.fixture
def group(stop):
    """The group of a process that is not alone, but is not connected."""
    group = ProcessGroup(stop)
    group.is_alone = False
    return group


def test_error_of_a_common_computation_is_a_lost_process(group):
    with pytest.raises(ProcessLostError, match=r"Gloo broke$"), group.watch():
        raise RuntimeError("Gloo broke\nmany lines follow")
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"), group.watch():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")


def test_process_lost_in_the_last_call_is_not_a_failed_save(group):
    class Broken:
        def drain(self):
            raise RuntimeError("Gloo broke")

    dispatcher = Dispatcher.__new__(Dispatcher)
    dispatcher._group, dispatcher.queue = group, Broken()
    with pytest.raises(ProcessLostError):
        dispatcher.block_until_ready()


def test_wait_for_the_shared_directory_is_safe(group, stop, tmp_path):
    (tmp_path / "elsewhere").write_text("the lock of process 0")
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="link"):
        setup.check_is_shared(tmp_path, "the lock of process 0", stop, group)
    (tmp_path / "lock").unlink()
    group.timeout_s = 60.0
    stop.request()
    with pytest.raises(StoppedError):
        setup.check_is_shared(tmp_path, "the lock of process 0", stop, group)
