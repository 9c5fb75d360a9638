"""A run of two processes as a job of a real Slurm, which preempts it and later ends its time."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import slurm
from runs import DIGITS, Run

pytestmark = pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing())

SCRIPT = Path(__file__).parent.parent / "scripts" / "slurm.sbatch"
ARGS = (
    *(*DIGITS, "--steps", "1000", "--log-every-steps", "5", "--eval-every-steps", "1000"),
    *("--checkpoint-every-s", "1000"),  # A save is due after the pause otherwise, perhaps at the step of the final one.
)


def pause(run: Run) -> None:
    """Stop the processes of a run until SIGCONT, which Slurm sends with each signal."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # It has exited.
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"mnist_jax.train" in words and str(run.workdir).encode() in words and b"srun" not in words[0]:
                os.kill(int(process.name), signal.SIGSTOP)


def test_job_is_preempted_timed_out_and_finished(tmp_path, new_run):
    run = new_run()
    # PATH finds the python that has this package, as in an activated environment.
    variables = {**run.environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    log = tmp_path / "job.log"
    (tmp_path / "high.sh").write_text("#!/bin/sh\nsleep 1\n")
    with slurm.one_node_cluster(tmp_path / "slurm") as cluster:

        def wait_for_attempt(attempt: int) -> None:
            """Wait until the job trains in an attempt."""

            def is_training(_: dict[str, str]) -> bool:
                phases = [event["phase"] for event in run.events("phase")]
                return phases.count("train") == attempt and run.lines() > before

            before = run.lines()
            cluster.wait_for(job, is_training, timeout_s=120)

        # --fresh stays in the command, and must not start over in the later attempts.
        flags = ("--output", log, "--cpus-per-task=1", "--time=30", "--signal=TERM@50", SCRIPT, "--fresh")
        job = cluster.submit(*flags, "--workdir", run.workdir, *ARGS, **variables)
        wait_for_attempt(1)
        cluster.submit("--partition=high", "--ntasks=4", "--output=/dev/null", tmp_path / "high.sh")
        wait_for_attempt(2)
        pause(run)
        # Less than 50 s are left of the new limit of a minute. Slurm checks that every 30 s.
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
        cluster.wait_for(job, lambda job: job["Restarts"] == "2", timeout_s=120)
        cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
        ended = cluster.wait_for(job, lambda job: job["JobState"] in ("COMPLETED", "FAILED"), timeout_s=120)
    assert ended["JobState"] == "COMPLETED", log.read_text()
    exits = [(event["outcome"], event["code"]) for event in run.events("exit")]
    assert exits == [("stopped", 75), ("stopped", 75), ("finished", 0)]
    resumes = [(event["saved_because"], event["exact"], event["lost_steps"]) for event in run.events("resume")]
    assert resumes == [("signal SIGTERM", True, 0)] * 2
    lines = [json.loads(line) for line in run.metrics().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(5, 1001, 5))
