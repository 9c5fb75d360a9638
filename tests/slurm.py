"""A real Slurm cluster of one node: its daemons run in a directory, on loopback, and go when the test is over."""

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

# No cgroups, no accounting, and perhaps more processors than there are.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides

# A requeued job starts again when the credential of its last start has expired: 2 minutes, or 5 s, the least to set.
AuthInfo=socket={directory}/munge.socket,cred_expire=5
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=1

# A job in `high` takes the place of one in `low`, whose processes get SIGTERM, and after KillWait seconds SIGKILL.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30

NodeName=localhost CPUs=4
PartitionName=low Nodes=localhost PriorityTier=1 Default=YES
PartitionName=high Nodes=localhost PriorityTier=2
"""


def why_not() -> str:
    """Say why there can be no cluster here, or nothing if there can."""
    if sys.platform != "linux":
        return "Slurm runs on Linux"
    if missing := [name for name in (*DAEMONS, "sbatch") if not shutil.which(name)]:
        return f"not installed: {', '.join(missing)}"
    return "" if os.geteuid() == 0 else "only root starts the daemons of Slurm"


@dataclass(frozen=True)
class Cluster:
    """A cluster at work: 4 processors, which two partitions share, `low`, the default, and `high`."""

    directory: Path
    environment: dict[str, str]

    def run(self, *command: str, **variables: str) -> str:
        """Return what a command prints."""
        environment = {**self.environment, **variables}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, f"{command}: {ended.stderr}"
        return ended.stdout

    def submit(self, *arguments: str | Path, **variables: str) -> str:
        """Submit a batch script, with the arguments and the environment of `sbatch`, and return the job's number."""
        return self.run("sbatch", "--parsable", *map(str, arguments), **variables).strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm says of a job: its `JobState`, `Reason`, `Restarts`, `ExitCode` and more."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", number)))

    def wait_for(self, number: str, is_so: Callable[[dict[str, str]], bool], timeout_s: float = 60) -> dict[str, str]:
        """Wait until something is so of a job, and return what Slurm says of it then."""
        deadline = time.monotonic() + timeout_s
        while not is_so(job := self.job(number)):
            assert time.monotonic() < deadline, f"it did not come about in time: {job}"
            time.sleep(0.05)
        return job


@contextlib.contextmanager
def one_node_cluster(directory: Path) -> Iterator[Cluster]:
    """Run a cluster in a new directory.

    Args:
        directory: its absolute path; 90 characters at the most, since it becomes part of a socket's.
    """
    for name in ("state", "spool"):
        (directory / name).mkdir(parents=True)
    # Without what an outer Slurm may have set. By SLURM_CONF all that belongs to this cluster is found in the end.
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
            is_hopeless = started[-1].poll() is not None or time.monotonic() > deadline
            assert not is_hopeless, (directory / f"{daemon}.log").read_text()
            time.sleep(0.02)

    def says(expected: str, *command: str) -> bool:
        asked = subprocess.run(command, env=environment, capture_output=True, text=True)
        return expected in asked.stdout

    try:
        paths = (f"--{option}={directory}/munge.{end}" for option, end in munge_files.items())
        start("munged", "--foreground", "--force", *paths, is_up=(directory / "munge.socket").exists)
        start("slurmctld", "-D", is_up=lambda: says("UP", "scontrol", "ping"))
        start("slurmd", "-D", is_up=lambda: says("idle", "sinfo", "--noheader", "--format=%T"))
        yield cluster
    finally:
        while processes := _processes_of(cluster):
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            for daemon in started:
                daemon.wait()


def _processes_of(cluster: Cluster) -> list[int]:
    """Return the processes of a cluster and of its jobs: they work in its directory, or know its configuration."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # It has ended meanwhile.
            variables = (process / "environ").read_bytes().split(b"\0")
            named = f"SLURM_CONF={cluster.environment['SLURM_CONF']}".encode() in variables
            if named or (process / "cwd").resolve() == cluster.directory.resolve():
                found.append(int(process.name))
    return found
