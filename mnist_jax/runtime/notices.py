"""Preemption notices: a cloud announces that it takes a spot machine back, 30 s to some minutes before it does.

A daemon thread asks the cloud's metadata server once per second, and requests a stop as a signal does. Only notices
after which the machine is gone count. A machine that is to be rebooted or maintained comes back, and its shutdown
sends SIGTERM: a run that stopped at the notice, up to an hour before, would be started again on the same machine, and
find the same notice.

This file needs only `preemption.py`.
"""

import json
import queue
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mnist_jax.runtime.preemption import Notice, StopSignal

ADDRESS = "169.254.169.254"  # the metadata server, on all three clouds
# Azure recommends once per second, because 30 s may be all that is left; AWS gives 120 s, GCP 30 s or 120 s.
POLL_S = 1.0
TIMEOUT_S = 2.0  # for each read of an answer
MAX_BYTES = 2**20  # read of an answer; that of Azure has about 400 bytes for each machine of the group with an event
DMI = Path("/sys/class/dmi/id")  # what the firmware says about the machine

WATCHED, UNAVAILABLE = "notices_watched", "notices_unavailable"  # events


class Reply(NamedTuple):
    """What a server answered."""

    status: int
    headers: Any
    body: bytes


class MetadataServer:
    """Asks the metadata server directly: without a proxy, and without following redirects."""

    def __init__(self, address: str, timeout_s: float) -> None:
        """Name the server, "HOST" or "HOST:PORT". Without an answer for `timeout_s` a request fails."""
        self.address, self.timeout_s = address, timeout_s
        self.token = ""  # of AWS, "" if it must be asked for

    def ask(
        self, path: str, headers: dict[str, str], *, method: str = "GET", expected: tuple[int, ...] = (200,)
    ) -> Reply:
        """Return what the server answers, its first `MAX_BYTES` at most.

        Raises:
            OSError, HTTPException: it does not answer, or not in HTTP.
            ValueError: the status is not one that is expected.
        """
        from http.client import HTTPConnection  # It takes 0.01 s to import, and few runs are in a cloud.

        connection = HTTPConnection(self.address, timeout=self.timeout_s)
        try:
            connection.request(method, path, headers=headers)
            response = connection.getresponse()
            reply = Reply(response.status, response.headers, response.read(MAX_BYTES))
        finally:
            connection.close()
        if reply.status not in expected:
            raise unexpected(reply)
        return reply


def unexpected(reply: Reply) -> ValueError:
    """Return the error of an answer that is not that of the cloud."""
    return ValueError(f"unexpected answer: status {reply.status}, {reply.body[:40]!r}")


def ask_gcp(server: MetadataServer) -> bool:
    """Return whether Compute Engine preempts the machine; with `preemptionNoticeDuration` this comes 120 s before.

    https://cloud.google.com/compute/docs/instances/create-use-spot. `maintenance-event` is not asked: hosts of GPUs
    announce there an hour before that the machine is restarted.
    """
    reply = server.ask("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    text = reply.body.strip()
    if reply.headers["Metadata-Flavor"] != "Google" or text not in (b"TRUE", b"FALSE"):
        raise unexpected(reply)
    return text == b"TRUE"


def ask_aws(server: MetadataServer) -> bool:
    """Return whether EC2 interrupts the spot instance, through IMDSv2.

    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html. A rebalance
    recommendation, `events/recommendations/rebalance`, is not asked: the instance may run for hours after it.
    """
    token, server.token = server.token, ""
    if not token:
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}  # the longest
        token = server.ask("/latest/api/token", lifetime, method="PUT").body.decode()
    headers = {"X-aws-ec2-metadata-token": token}
    reply = server.ask("/latest/meta-data/spot/instance-action", headers, expected=(200, 404))
    server.token = token  # It is good. The status of one that has expired is 401.
    if reply.status == 404:
        return False
    if json.loads(reply.body)["action"] not in ("stop", "terminate", "hibernate"):
        raise unexpected(reply)
    return True


def ask_azure(server: MetadataServer) -> bool:
    """Return whether Azure evicts or deletes the machine.

    https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events. The events of a scale set are shown to
    all its machines. After Freeze, Reboot and Redeploy the machine comes back.
    """
    headers = {"Metadata": "true"}
    reply = server.ask("/metadata/scheduledevents?api-version=2020-07-01", headers)
    ends = [event for event in json.loads(reply.body)["Events"] if event["EventType"] in ("Preempt", "Terminate")]
    if not ends:
        return False
    reply = server.ask("/metadata/instance/compute/name?api-version=2021-02-01&format=text", headers)
    return any(reply.body.decode().strip() in event["Resources"] for event in ends)


class Cloud(NamedTuple):
    """How to find out that a machine is in a cloud, and that the cloud takes it back."""

    notice: Notice
    ask: Callable[[MetadataServer], bool]
    first_answer_s: float  # how long the first answer may take
    marks: tuple[tuple[str, str], ...]  # a file of `DMI`, and a pattern that its text matches


CLOUDS = {
    "gcp": Cloud(Notice.GCP, ask_gcp, 10.0, (("product_name", "Google( Compute Engine)?"),)),
    # Instances on Xen have only the version of the BIOS.
    "aws": Cloud(Notice.AWS, ask_aws, 10.0, (("sys_vendor", "Amazon EC2"), ("bios_version", r".*\.amazon"))),
    # The first request enables the service for the machine, which takes up to two minutes. The vendor is that of each
    # machine on Hyper-V, so the tag counts.
    "azure": Cloud(Notice.AZURE, ask_azure, 130.0, (("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77"),)),
}


def find_cloud() -> str | None:
    """Return the name of the cloud that this machine is in, None if it is in none. It asks no network."""
    for name, cloud in CLOUDS.items():
        for file, pattern in cloud.marks:
            try:
                text = (DMI / file).read_text(errors="replace").strip()
            except OSError:  # no firmware tables, as in some containers
                continue
            if re.fullmatch(pattern, text):
                return name
    return None


class NoticePoller:
    """Asks for notices in a daemon thread, and requests a stop when there is one. Nothing that a server does raises."""

    def __init__(self, stop: StopSignal, cloud: str) -> None:
        """Start the thread.

        Args:
            stop: receives the request.
            cloud: a key of `CLOUDS`, "auto" to find out, or "none" for no thread.
        """
        self._stop, self._cloud = stop, cloud
        self._events = queue.SimpleQueue[tuple[str, str]]()
        self._is_closed = threading.Event()
        if cloud != "none":
            try:
                threading.Thread(target=self._poll, daemon=True, name="preemption notices").start()
            except RuntimeError as error:  # A limit on threads: a run needs no notices.
                text = f"preemption notices are not seen ({error}); signals still stop the run"
                self._events.put((UNAVAILABLE, text))

    def pop_events(self) -> list[tuple[str, str]]:
        """Return what happened since the last call, each as an event and a text.

        `WATCHED` when the server first answers; `UNAVAILABLE`, once, when a server that should answer does not: its
        cloud was named, or it answered before.
        """
        return [self._events.get() for _ in range(self._events.qsize())]

    def close(self) -> None:
        """Stop to ask. A request in progress is not awaited, and its answer is ignored."""
        self._is_closed.set()

    def _poll(self) -> None:
        name = find_cloud() if self._cloud == "auto" else self._cloud
        if name is None:
            return
        cloud = CLOUDS[name]
        server = MetadataServer(ADDRESS, cloud.first_answer_s)
        has_answered = is_reported = False
        answered_s = time.monotonic()
        while not self._is_closed.is_set() and self._stop.received is None:
            try:
                is_preempted = cloud.ask(server)
            except Exception as error:  # A server that is another one than expected can send anything.
                silent_s = time.monotonic() - answered_s
                is_expected = has_answered or self._cloud != "auto"
                if is_expected and not is_reported and silent_s >= cloud.first_answer_s:
                    is_reported = True
                    text = (
                        f"the metadata server of {name} gives no answer ({error!r:.200}). "
                        "Its preemption notices are not seen; signals still stop the run."
                    )
                    self._events.put((UNAVAILABLE, text))
            else:
                if not has_answered:
                    has_answered, server.timeout_s = True, TIMEOUT_S
                    self._events.put((WATCHED, name))
                answered_s = time.monotonic()
                if is_preempted and not self._is_closed.is_set():
                    self._stop.request(cloud.notice)
            self._is_closed.wait(POLL_S)
