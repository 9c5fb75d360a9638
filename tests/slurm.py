"""A real Slurm cluster of one node. Its daemons run in a directory and on loopback, and are killed after the test."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")

CONFIGURATION = """
ClusterName=test
SlurmUser=root
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port_of_controller}
SlurmdPort={port_of_node}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid

# No cgroups, no accounting, and possibly more processors than the machine has.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides

# A requeued job starts again when the credential of its last start has expired: after 5 s, the minimum.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1

# A job in `high` preempts one in `low`, whose processes get SIGTERM, and SIGKILL after KillWait seconds.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30

NodeName=localhost CPUs=4
PartitionName=low Nodes=localhost PriorityTier=1 Default=YES
PartitionName=high Nodes=localhost PriorityTier=2
"""


def missing() -> str:
    """Return why a cluster cannot run here, "" if it can."""
    if sys.platform != "linux":
        return "Slurm runs on Linux"
    if names := [name for name in (*DAEMONS, "sbatch") if not shutil.which(name)]:
        return f"not installed: {', '.join(names)}"
    return "" if os.geteuid() == 0 else "only root starts the daemons of Slurm"


@dataclass(frozen=True)
class Cluster:
    """A running cluster: 4 processors shared by two partitions, `low` (the default) and `high`."""

    directory: Path
    environment: dict[str, str]

    def run(self, *command: str, **variables: str) -> str:
        """Return the standard output of a command."""
        environment = {**self.environment, **variables}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, f"{command}: {ended.stderr}"
        return ended.stdout

    def submit(self, *arguments: str | Path, **variables: str) -> str:
        """Submit a batch script with arguments and environment of `sbatch`, and return the job id."""
        return self.run("sbatch", "--parsable", *map(str, arguments), **variables).strip()

    def job(self, number: str) -> dict[str, str]:
        """Return `JobState`, `Restarts`, `ExitCode` and more of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", number)))

    def wait_for(
        self, number: str, condition: Callable[[dict[str, str]], bool], timeout_s: float = 60
    ) -> dict[str, str]:
        """Wait until a condition holds for a job, and return its description."""
        deadline = time.monotonic() + timeout_s
        while not condition(job := self.job(number)):
            assert time.monotonic() < deadline, f"timeout: {job}"
            time.sleep(0.05)
        return job


@contextlib.contextmanager
def one_node_cluster(directory: Path) -> Iterator[Cluster]:
    """Run a cluster in a new directory.

    Args:
        directory: absolute path, at most 90 characters, because the path of a socket contains it.
    """
    for name in ("state", "spool"):
        (directory / name).mkdir(parents=True)
    # Without the variables of an outer Slurm. SLURM_CONF identifies the processes of this cluster.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
    environment["SLURM_CONF"] = str(directory / "slurm.conf")
    cluster = Cluster(directory, environment)
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = {"port_of_controller": one.getsockname()[1], "port_of_node": other.getsockname()[1]}
    (directory / "slurm.conf").write_text(CONFIGURATION.format(directory=directory, **ports))
    (directory / "munge.key").touch(mode=0o600)
    (directory / "munge.key").write_bytes(os.urandom(128))
    munge_files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
    started: list[subprocess.Popen[bytes]] = []

    def start(daemon: str, *arguments: str, is_up: Callable[[], bool]) -> None:
        with (directory / f"{daemon}.log").open("w") as log:
            started.append(
                subprocess.Popen([daemon, *arguments], env=environment, cwd=directory, stdout=log, stderr=log)
            )
        deadline = time.monotonic() + 30
        while not is_up():
            has_failed = started[-1].poll() is not None or time.monotonic() > deadline
            assert not has_failed, (directory / f"{daemon}.log").read_text()
            time.sleep(0.02)

    def prints(expected: str, *command: str) -> bool:
        return expected in subprocess.run(command, env=environment, capture_output=True, text=True).stdout

    try:
        paths = (f"--{option}={directory}/munge.{end}" for option, end in munge_files.items())
        start("munged", "--foreground", "--force", *paths, is_up=(directory / "munge.socket").exists)
        start("slurmctld", "-D", is_up=lambda: prints("UP", "scontrol", "ping"))
        start("slurmd", "-D", is_up=lambda: prints("idle", "sinfo", "--noheader", "--format=%T"))
        yield cluster
    finally:
        while processes := _processes_of(cluster):
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            for daemon in started:
                daemon.wait()


def _processes_of(cluster: Cluster) -> list[int]:
    """Return the processes of a cluster and of its jobs, by their working directory or SLURM_CONF."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # It has exited.
            variables = (process / "environ").read_bytes().split(b"\0")
            is_ours = f"SLURM_CONF={cluster.environment['SLURM_CONF']}".encode() in variables
            if is_ours or (process / "cwd").resolve() == cluster.directory.resolve():
                found.append(int(process.name))
    return found
