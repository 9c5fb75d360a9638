"""Notices of clouds: a run stops, saves and resumes as after a signal, whatever a metadata server does."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import faults
import metadata_server
import pytest
from metadata_server import MetadataServer, event
from runs import DIGITS, SMALL, Run, act_at
from several import start as start_several

from mnist_jax import status, train
from mnist_jax.config import PreemptionNotice
from mnist_jax.runtime import notices
from mnist_jax.runtime.notices import CLOUDS, UNAVAILABLE, WATCHED, NoticePoller
from mnist_jax.runtime.preemption import Notice, StopSignal

DMI_OF = {
    "gcp": {"product_name": "Google Compute Engine\n", "sys_vendor": "Google\n"},
    "aws": {"product_name": "g5.xlarge\n", "sys_vendor": "Amazon EC2\n"},
    "azure": {"sys_vendor": "Microsoft Corporation\n", "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77\n"},
    None: {"sys_vendor": "Microsoft Corporation\n", "product_name": "Virtual Machine\n", "bios_version": "4.2\n"},
}


@pytest.fixture
def server() -> Iterator[MetadataServer]:
    with metadata_server.serve() as server:
        yield server


@pytest.fixture
def stop() -> StopSignal:
    return StopSignal()


def ask_here(server: MetadataServer, patch: pytest.MonkeyPatch, *, first_answer_s: float) -> None:
    """Let pollers ask the loopback server."""
    patch.setattr(notices, "ADDRESS", server.address)
    patch.setattr(notices, "POLL_S", 0.005)
    for name, cloud in CLOUDS.items():
        patch.setitem(CLOUDS, name, cloud._replace(first_answer_s=first_answer_s))


@pytest.fixture
def poll(server, stop, tmp_path, monkeypatch) -> Iterator[Callable[..., NoticePoller]]:
    """Return a function that starts a poller on a machine without firmware tables."""
    pollers = []
    monkeypatch.setattr(notices, "DMI", tmp_path)

    def start(cloud: str, *, first_answer_s: float = 20) -> NoticePoller:
        ask_here(server, monkeypatch, first_answer_s=first_answer_s)
        pollers.append(NoticePoller(stop, cloud))
        return pollers[-1]

    yield start
    for poller in pollers:
        poller.close()


def wait_for(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not hold in time"
        time.sleep(0.002)


def wait_for_requests(server: MetadataServer, more: int) -> None:
    """Wait until a poller has made some more requests, so it has acted on what the server answered before."""
    count = len(server.requested) + more
    wait_for(lambda: len(server.requested) >= count)


def polling() -> list[threading.Thread]:
    """Return the threads that ask for notices."""
    return [thread for thread in threading.enumerate() if "notices" in thread.name]


def write_dmi(folder: Path, cloud: str | None) -> None:
    for name, text in DMI_OF[cloud].items():
        (folder / name).write_text(text)


# ---- Clouds


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize("is_detected", [False, True])
def test_notice_requests_a_stop(cloud, is_detected, poll, server, stop, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    write_dmi(tmp_path, cloud)
    poller = poll("auto" if is_detected else cloud)
    wait_for_requests(server, 3)
    assert stop.received is None
    assert poller.pop_events() == [(WATCHED, cloud)]
    server.announce(cloud)
    wait_for(lambda: stop.received)
    assert stop.received is Notice[cloud.upper()]
    assert stop.reason == f"{cloud} notice"
    assert not poller.pop_events()
    wait_for(lambda: not polling())


@pytest.mark.parametrize("action", ["stop", "terminate", "hibernate"])
def test_all_interruptions_of_aws_stop(action, poll, server, stop):
    server.action = action
    poll("aws")
    wait_for(lambda: stop.received)


@pytest.mark.parametrize(
    ("events", "is_end"),
    [
        ([event("Terminate", "machine_7")], True),
        ([event(kind, "machine_7") for kind in ("Freeze", "Reboot", "Redeploy")], False),
        ([event("Preempt", "machine_8"), event("Terminate", "machine_70")], False),
    ],
)
def test_only_the_end_of_this_machine_stops_on_azure(events, is_end, poll, server, stop):
    server.events = events
    poll("azure")
    wait_for(lambda: stop.received) if is_end else wait_for_requests(server, 6)
    assert bool(stop.received) is is_end


def test_rebalance_and_maintenance_are_not_asked_for(poll, server, stop):
    for cloud in CLOUDS:
        poll(cloud)
    wait_for_requests(server, 20)
    paths = {metadata_server.GCP, metadata_server.AWS, metadata_server.AZURE}
    assert set(server.requested) == {f"GET {path}" for path in paths} | {"PUT /latest/api/token"}


def test_token_of_aws_is_reused_until_it_expires(poll, server, stop):
    poller = poll("aws")
    wait_for_requests(server, 5)
    assert server.requested.count("PUT /latest/api/token") == 1
    server.tokens.clear()
    wait_for(lambda: server.tokens)
    server.announce("aws")
    wait_for(lambda: stop.received)
    assert poller.pop_events() == [(WATCHED, "aws")]


@pytest.mark.parametrize("cloud", DMI_OF)
def test_cloud_is_found_without_the_network(cloud, tmp_path, monkeypatch):
    monkeypatch.setattr(notices, "DMI", tmp_path)
    assert notices.find_cloud() is None
    write_dmi(tmp_path, cloud)
    assert notices.find_cloud() == cloud


def test_instances_of_aws_on_xen_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(notices, "DMI", tmp_path)
    (tmp_path / "sys_vendor").write_text("Xen\n")
    (tmp_path / "bios_version").write_text("4.11.amazon\n")
    assert notices.find_cloud() == "aws"


def test_limit_on_threads_ends_no_run(monkeypatch):
    def fail(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    [(event_name, text)] = NoticePoller(StopSignal(), "gcp").pop_events()
    assert event_name == UNAVAILABLE
    assert "thread" in text


def test_flag_names_the_clouds():
    assert {*CLOUDS, "auto", "none"} == set(get_args(PreemptionNotice))


@pytest.mark.parametrize("cloud", ["auto", "none"])
def test_nobody_asks_outside_the_clouds(cloud, poll, server, tmp_path):
    if cloud == "auto":
        write_dmi(tmp_path, None)
    before = polling()
    poll(cloud)
    started = [thread for thread in polling() if thread not in before]
    assert cloud == "auto" or not started
    for thread in started:
        thread.join(20)
        assert not thread.is_alive()
    assert not server.requested


# ---- Servers that hang, lie or die


@pytest.mark.parametrize(
    ("fault", "cloud"),
    [*((fault, "azure" if "JSON" in fault else "gcp") for fault in metadata_server.FAULTS), ("fails", "azure")],
)
def test_faulty_server_is_reported_once_and_asked_again(fault, cloud, poll, server, stop):
    server.fault = fault
    if fault == "fails":  # What it sends with the error would be a notice.
        server.announce(cloud)
    poller, events = poll(cloud, first_answer_s=0.1), []
    wait_for(lambda: events.extend(poller.pop_events()) or events)
    [(name, text)] = events
    assert name == UNAVAILABLE
    assert len(text) < 500
    wait_for_requests(server, 1 if fault == "hangs" else 5)
    assert not poller.pop_events()
    assert stop.received is None
    assert "GET /elsewhere" not in server.requested
    assert server.sent < 1 << 25  # what the buffers of a connection hold
    server.fault = ""
    server.announce(cloud)
    wait_for(lambda: stop.received)


def test_auto_reports_only_a_server_that_answered_before(poll, server, stop, tmp_path):
    write_dmi(tmp_path, "gcp")
    server.fault = "dies"
    poller = poll("auto", first_answer_s=0.2)
    time.sleep(0.3)
    wait_for_requests(server, 2)
    assert not poller.pop_events()
    server.fault, events = "", []
    wait_for(lambda: events.extend(poller.pop_events()) or events)
    time.sleep(0.3)
    wait_for_requests(server, 1)
    server.fault, failed_s = "dies", time.monotonic()
    wait_for(lambda: events.extend(poller.pop_events()) or len(events) > 1)
    assert [name for name, _ in events] == [WATCHED, UNAVAILABLE]
    assert time.monotonic() - failed_s > 0.1  # A single failure is not reported.


def test_closed_poller_awaits_no_answer_and_ignores_it(poll, server, stop):
    server.fault = "hangs"
    server.announce("gcp")
    poller = poll("gcp")
    wait_for(lambda: server.requested)
    thread = polling()[-1]
    began_s = time.monotonic()
    poller.close()
    assert time.monotonic() - began_s < 1
    server.fault = ""
    server.may_go_on.set()
    thread.join(20)
    assert not thread.is_alive()
    assert stop.received is None


# ---- Runs


@pytest.fixture
def poll_here(server, monkeypatch) -> None:
    """Let runs in this process ask the loopback server."""
    ask_here(server, monkeypatch, first_answer_s=0.2)


def start(workdir: Path, *flags: str) -> int:
    return train.main(["--workdir", str(workdir), *SMALL, "--preemption-notice", "gcp", *flags])


def test_run_stops_at_a_notice_and_resumes_exactly(
    in_this_process, small_run, server, poll_here, tmp_path, monkeypatch, capsys
):
    def announce():
        server.announce("gcp")
        wait_for(lambda: not polling())

    run = Run(tmp_path / "run")
    with monkeypatch.context() as patch:
        act_at(patch, 25, announce)
        assert start(run.workdir, "--preempted-exit-code", "75") == 75
    out = capsys.readouterr().out.splitlines()
    assert out[-1].startswith("stopped step=25 signal=gcp-notice state_sha256=")
    assert "gcp notice: saving step 25" in out[-2]
    [stopped] = run.events("signal")
    assert stopped["signal"] == "gcp notice"
    assert 0 < stopped["seconds"] < 20
    assert run.events("notices_watched")
    assert run.events("save")[-1]["reason"] == "gcp notice"
    assert status.main([str(run.workdir)]) == 0
    assert "signal gcp notice" in capsys.readouterr().out

    server.preempted, server.fault = False, "dies"
    assert start(run.workdir) == 0
    assert run.events("resume")[-1]["saved_because"] == "gcp notice"
    assert run.events("resume")[-1]["exact"]
    assert run.events("exit")[-1]["state_sha256"] == small_run.events("exit")[-1]["state_sha256"]
    assert run.metrics() == small_run.metrics()
    [unavailable] = run.events("notices_unavailable")
    assert capsys.readouterr().err.splitlines() == [f"warning: {unavailable['text']}"]
    assert status.main([str(run.workdir)]) == 0
    assert unavailable["text"] in capsys.readouterr().out


def test_notice_of_one_process_stops_all(new_run):
    run = new_run()
    flags = (*DIGITS, "--steps", "100000", "--eval-every-steps", "100000", "--preemption-notice", "gcp")
    ended = start_several(run, *flags, faults=((faults.preempted_at, "gcp", 20),)).end()
    assert [one.code for one in ended] == [75, 75], ended
    assert ended[0].fields["signal"] == "gcp-notice"
    assert int(ended[0].fields["step"]) >= 20
    assert run.events("save")[-1]["reason"] == "gcp notice"


def test_notice_before_the_first_step_stops(in_this_process, server, poll_here, tmp_path, capsys):
    server.announce("gcp")
    assert start(tmp_path, "--preempted-exit-code", "75") == 75
    assert capsys.readouterr().out.splitlines()[-1] == "stopped step=0 signal=gcp-notice state_sha256=none"


def test_signal_after_a_notice_is_not_a_second_request(monkeypatch):
    exits = []
    monkeypatch.setattr("os._exit", exits.append)
    monkeypatch.setattr("mnist_jax.runtime.preemption.REQUEST_S", 0.01)
    with StopSignal() as stop:
        stop.request(Notice.GCP)
        time.sleep(0.02)
        signal.raise_signal(signal.SIGTERM)
        assert stop.reason == "gcp notice"
        assert stop.seconds_since >= 0.02
        assert not exits
        time.sleep(0.02)
        signal.raise_signal(signal.SIGTERM)
        assert exits == [128 + signal.SIGTERM]
