"""A training of two processes as a job of a real Slurm, which preempts it, requeues it and ends its time."""

import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest
import slurm
from runs import Run
from several import start

pytestmark = pytest.mark.skipif(bool(slurm.why_not()), reason=slurm.why_not())

SCRIPT = Path(__file__).parent.parent / "scripts" / "slurm.sbatch"
ARGS = ("--dataset", "digits", "--steps", "150", "--log-every-steps", "5", "--eval-every-steps", "100")


def exits(run: Run) -> list[tuple[str, int]]:
    return [(event["outcome"], event["code"]) for event in run.events("exit")]


def pause(run: Run) -> None:
    """Have the processes of a run wait for SIGCONT, which Slurm sends with each signal."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # It has ended meanwhile.
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"mnist_jax.train" in words and str(run.workdir).encode() in words and b"srun" not in words[0]:
                os.kill(int(process.name), signal.SIGSTOP)


def test_a_job_is_preempted_requeued_and_cut_by_its_time_limit_and_ends_like_an_undisturbed_one(
    tmp_path, environment, new_run
):
    run = new_run()
    # The PATH finds the python that has this package, as an activated environment does.
    variables = {**run.environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = tmp_path / "job.log"
    (tmp_path / "high.sh").write_text("#!/bin/sh\nsleep 1\n")
    with slurm.one_node_cluster(tmp_path / "slurm") as cluster:

        def wait_for_turn(turn: int) -> None:
            """Wait until the job has trained for a moment in its so-many-th turn."""

            def has_trained(_: dict[str, str]) -> bool:
                phases = [event["phase"] for event in run.events("phase")]
                return phases.count("train") == turn and run.lines() > before

            before = run.lines()
            cluster.wait_for(job, has_trained, timeout_s=120)

        flags = ("--output", log, "--cpus-per-task=1", "--time=30", "--signal=TERM@50", SCRIPT)
        # --fresh stays in the command, and must not begin anew in the later turns.
        job = cluster.submit(*flags, "--fresh", "--workdir", run.workdir, *ARGS, **variables)
        wait_for_turn(1)
        high = cluster.submit("--partition=high", "--ntasks=4", "--output=/dev/null", tmp_path / "high.sh")
        cluster.wait_for(high, lambda job: job["JobState"] == "COMPLETED")
        wait_for_turn(2)
        cluster.run("scontrol", "requeue", job)
        wait_for_turn(3)
        # Of its new limit, a minute, fewer than 50 s are left. Slurm looks at that every 30 s.
        pause(run)
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
        cluster.wait_for(job, lambda job: job["Restarts"] == "3", timeout_s=120)
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
        ended = cluster.wait_for(job, lambda job: job["JobState"] in ("COMPLETED", "FAILED"), timeout_s=120)
    assert ended["JobState"] == "COMPLETED", log.read_text()
    assert exits(run) == [*[("stopped", 75)] * 3, ("finished", 0)]
    resumes = [(event["saved_because"], event["exact"], event["lost_steps"]) for event in run.events("resume")]
    assert resumes == [("signal SIGTERM", True, 0)] * 3

    undisturbed = new_run("undisturbed")
    first, second = start(undisturbed, 2, *ARGS).end()
    assert (first.code, second.code) == (0, 0), first.err
    assert first.fields["state_sha256"] == run.events("exit")[-1]["state_sha256"]
    assert run.metrics() == undisturbed.metrics()
