"""Several processes that train together: stopped, killed and carried on, they end as they would have undisturbed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from filelock import FileLock
from runs import Run, end
from several import Several, free_port, start

from mnist_jax.checkpoint.checkpoint import list_checkpoints
from mnist_jax.config import ConfigError
from mnist_jax.runtime import multihost
from mnist_jax.runtime.multihost import ProcessGroup, ProcessLostError
from mnist_jax.runtime.preemption import StoppedError, StopSignal
from mnist_jax.training import setup
from mnist_jax.training.dispatch import Dispatcher

ARGS = ("--dataset", "digits", "--steps", "60", "--log-every-steps", "5", "--eval-every-steps", "25")


@pytest.fixture(scope="module")
def undisturbed(shared_folder, environment):
    """The run of so many processes that nothing disturbs, made once for all workers of the tests."""

    def of(count: int) -> Run:
        run = Run(shared_folder / f"undisturbed-{count}", environment)
        with FileLock(shared_folder / f"undisturbed-{count}.lock"):
            if not run.events("exit"):
                check_codes(start(run, count, *ARGS), 0)
        return run

    return of


def check_codes(several: Several, code: int):
    """Wait for the end of all processes, which all leave with one code, and return how process 0 ended."""
    ended = several.end()
    assert [one.code for one in ended] == [code] * len(ended), "".join(one.err for one in ended)
    assert [one.err for one in ended[1:]] == [""] * (len(ended) - 1) or code not in (0, 75)
    return ended[0]


def wait_for(several: Several, is_so) -> None:
    """Wait until something is so, or say how process 0 ended before."""
    assert several.run.wait_for(is_so, several.processes[0]), several.end()


def wait_for_another_line(several: Several) -> None:
    before = several.run.lines()
    wait_for(several, lambda: several.run.events("phase")[-1:] and several.run.lines() > before)


def check_ended_like(run: Run, undisturbed: Run) -> None:
    assert run.metrics() == undisturbed.metrics()
    ends = [one.events("exit")[-1] for one in (run, undisturbed)]
    assert [one["outcome"] for one in ends] == ["finished", "finished"]
    assert ends[0]["state_sha256"] == ends[1]["state_sha256"]


def test_a_signal_to_any_one_process_stops_all_and_they_end_as_if_undisturbed(new_run, undisturbed):
    run = new_run()
    for number, victim in ((signal.SIGTERM, 1), (signal.SIGUSR1, 0)):
        several = start(run, 2, *ARGS)
        wait_for_another_line(several)
        several.signal(number, victim)
        stopped = check_codes(several, 75)
        assert stopped.last_line.startswith("stopped ")
        assert stopped.fields["signal"] == number.name
    check_codes(start(run, 2, *ARGS), 0)
    resumes = run.events("resume")
    assert len(resumes) == 2
    assert all(resume["exact"] and not resume["lost_steps"] for resume in resumes)
    check_ended_like(run, undisturbed(2))


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


def test_a_save_signal_to_any_process_saves_and_the_training_goes_on(new_run):
    flags = (*ARGS, "--steps", "100000", "--eval-every-steps", "100000")
    several = start(new_run(), 2, *flags, variables={1: {"PJRT_NPROC": "7"}})
    for victim in (1, 0):
        wait_for_another_line(several)
        before = len(several.run.events("save"))
        several.signal(signal.SIGUSR2, victim)
        wait_for(several, lambda before=before: len(several.run.events("save")) > before)
    wait_for_another_line(several)
    several.signal(signal.SIGTERM, 1)
    check_codes(several, 75)
    reasons = [event["reason"] for event in several.run.events("save")]
    assert reasons == ["signal SIGUSR2", "signal SIGUSR2", "signal SIGTERM"]
    # The bits depend on the threads of each process, so a checkpoint tells of all.
    [checkpoint, *_] = list_checkpoints(several.run.workdir / "checkpoints")
    assert checkpoint.metadata()["devices"]["cpu_threads of process 1"] == 7


def test_a_state_that_is_not_finite_ends_all_processes_alike_though_only_process_0_looks_at_it(new_run):
    cadence = ("--log-every-steps", "100000", "--eval-every-steps", "100000", "--checkpoint-every-steps", "3")
    several = start(new_run(), 2, "--dataset", "digits", "--steps", "100000", "--learning-rate", "1e30", *cadence)
    first = check_codes(several, 1)
    assert "the state has values that are not finite. Nothing of that was saved" in first.err
    assert not several.run.events("save")


def test_flags_that_contradict_the_run_end_all_processes_with_the_code_of_process_0(new_run, undisturbed, tmp_path):
    shutil.copytree(undisturbed(2).workdir, tmp_path / "run")
    several = start(new_run(), 2, *ARGS, "--seed", "1")
    first, second = several.end()
    assert (first.code, second.code) == (2, 2)
    assert "would change its mathematics" in first.err
    assert "process 1 of 2: process 0 gave up: " in second.err


def with_mounts(*mounts: str) -> list[str]:
    """Return the beginning of a command that sees other files, or skip the test where the user may not mount."""
    prefix = ["unshare", "--mount", "sh", "-c", f'{" && ".join(mounts)} && exec "$0" "$@"']
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    return prefix


def start_two_apart(run: Run, second_sees: list[str], *args: str) -> Several:
    """Start two processes, of which the second sees other files."""
    named = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
    command = [sys.executable, "-m", "mnist_jax.train", "--workdir", str(run.workdir), *named, "1", *args]
    second = subprocess.Popen([*second_sees, *command], env={**os.environ, **run.environment}, **PIPES)
    return Several(run, [run.start(*named, "0", *args), second])


def test_other_data_on_one_process_ends_all(new_run, mnist_dir, tmp_path):
    """Each process has a disk of its own for the data, and there other files have the same names."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        shutil.copytree(mnist_dir, folder)
    shutil.copy(there / "t10k-labels-idx1-ubyte.gz", there / "train-labels-idx1-ubyte.gz")
    run = new_run()
    apart = with_mounts(f'mount --bind "{there}" "{here}"')
    ended = start_two_apart(run, apart, "--data-dir", str(here), "--steps", "10").end()
    assert {one.code for one in ended} == {2}
    assert "process 1 gave up" in ended[0].err
    assert not run.events("save")


def test_a_run_directory_that_process_1_does_not_share_is_a_clear_error(new_run):
    run = new_run()
    run.workdir.mkdir()
    apart = with_mounts(f'mount -t tmpfs none "{run.workdir}"')
    ended = start_two_apart(run, apart, "--peer-timeout-s", "3", *ARGS).end()
    assert [one.code for one in ended] == [2, 2]
    for one in ended:
        assert "on a file system that they share" in one.err
    assert not run.events("phase")


def test_a_run_that_changes_its_layout_says_so_and_reaches_its_end(new_run, undisturbed):
    run = new_run()
    shutil.copytree(undisturbed(2).workdir, run.workdir)
    shutil.rmtree(run.workdir / "checkpoints" / "60")
    ended = run.finish(*ARGS)
    assert ended.code == 0, ended.err
    changed = "devices count 2 -> 1; devices processes 2 -> 1"
    assert "from step 50 of 60 (saved because: best test accuracy so far; 10 steps" in ended.out
    assert f"numerically equivalent, not bit for bit, for this changed: {changed}" in ended.out
    theirs, ours = (json.loads(one.metrics().splitlines()[-1]) for one in (undisturbed(2), run))
    assert abs(theirs["loss"] - ours["loss"]) < 0.01


@pytest.mark.parametrize(
    ("variables", "hint"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),  # a batch script, not under srun
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"PMI_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_a_launcher_of_several_processes_is_known_by_what_it_sets(variables, hint, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "KUBERNETES_", "JOB_COMPLETION", "JAX_COORD", "TPU_")):
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert multihost.may_be_distributed() is hint


def test_one_process_is_alone_whatever_a_scheduler_says(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setitem(sys.modules, "jax", None)  # It is not even imported.
    with StopSignal() as stop:
        assert multihost.initialize(stop, None, 1, None, timeout_s=60).is_alone


def test_a_process_is_alone_where_jax_finds_no_launcher(new_run):
    finished = new_run(JOB_COMPLETION_INDEX="0").finish(*ARGS, "--steps", "5")
    assert finished.code == 0, finished.err


def test_processes_that_do_not_find_out_how_they_meet_do_not_train_each_alone(new_run):
    """As Open MPI 5 starts them, which no longer sets what JAX looks for."""
    run = new_run(OMPI_COMM_WORLD_SIZE="3", OMPI_COMM_WORLD_RANK="1")
    ended = run.finish(*ARGS)
    assert ended.code == 2
    assert "3 processes were started (OMPI_COMM_WORLD_SIZE)" in ended.err
    assert "--num-processes $OMPI_COMM_WORLD_SIZE --process-id $OMPI_COMM_WORLD_RANK" in ended.err
    assert not run.workdir.exists()


def test_an_address_that_process_0_cannot_have_is_an_error(new_run):
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = f"127.0.0.1:{server.getsockname()[1]}"
        ended = new_run().finish("--coordinator", taken, "--num-processes", "2", "--process-id", "0", *ARGS)
    assert ended.code == 69
    assert f"process 0 cannot listen on port {taken.partition(':')[2]}" in ended.err


def test_processes_meet_at_an_address_of_the_newer_kind_too(environment):
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no such addresses")
    with server:
        address = f"[::1]:{server.getsockname()[1]}"
        with pytest.raises(ProcessLostError, match=r"process 0 cannot listen on port \d+ of \[::1\]"):
            multihost._check_is_free(address, address)
    meet = [sys.executable, "-c", MEET, address]
    processes = [subprocess.Popen([*meet, index], env={**os.environ, **environment}, **PIPES) for index in "01"]
    ended = [end(process) for process in processes]
    assert [one.code for one in ended] == [0, 0], ended[0].err
    assert [one.last_line for one in ended] == ["2", "2"]


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
MEET = """
import sys
from mnist_jax.console import exit_process
from mnist_jax.runtime.multihost import initialize
from mnist_jax.runtime.preemption import StopSignal

with StopSignal() as stop:
    group = initialize(stop, sys.argv[1], 2, int(sys.argv[2]), timeout_s=60)
    import jax

    print(jax.device_count())
    group.shutdown()
exit_process(0)  # as the command does: threads of JAX may still be at work
"""


# What an error means


@pytest.fixture
def of_two():
    """A process that is not alone, and has met nobody yet."""
    with StopSignal() as stop:
        process = ProcessGroup(stop)
        process.is_alone = False
        yield process


def test_an_error_in_a_common_computation_is_the_loss_of_a_peer(of_two):
    with pytest.raises(ProcessLostError, match="the connection to another process is lost: Gloo broke"), of_two.watch():
        raise RuntimeError("Gloo broke\nmany lines follow")


def test_a_full_memory_is_no_loss_of_a_peer(of_two):
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"), of_two.watch():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")


def test_a_peer_that_is_lost_in_the_last_call_is_found_before_the_last_save(of_two):
    """For the save would fail, and the exit code be that of a disk."""

    class Broken:
        def drain(self):
            raise RuntimeError("Gloo broke")

    dispatcher = Dispatcher.__new__(Dispatcher)
    dispatcher._group, dispatcher.queue = of_two, Broken()
    with pytest.raises(ProcessLostError):
        dispatcher.block_until_ready()


# The directory that all share


def test_a_signal_ends_the_wait_for_the_shared_directory(of_two, tmp_path):
    of_two.timeout_s = 60.0
    of_two._stop.record_signal(signal.SIGTERM)
    with pytest.raises(StoppedError):
        setup.check_is_shared(tmp_path, "the lock of process 0", of_two._stop, of_two)


def test_a_link_in_the_place_of_the_lock_is_not_followed(of_two, tmp_path):
    (tmp_path / "elsewhere").write_text("the lock of process 0")
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no link"):
        setup.check_is_shared(tmp_path, "the lock of process 0", of_two._stop, of_two)
