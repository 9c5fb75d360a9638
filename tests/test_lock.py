"""The lock on a run directory, between small processes and as the command uses it."""

import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from runs import DIGITS, end, snapshot, stop

from mnist_jax.runtime import lock
from mnist_jax.runtime.lock import LockHeldError, exclusive_lock, holder

HOLD = """
import sys
from pathlib import Path
from mnist_jax.runtime.lock import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), wait_s=60, notify=print):
    print("locked", flush=True)
    sys.stdin.read()
"""
ARGS = (*DIGITS, "--steps", "40", "--log-every-steps", "10", "--eval-every-steps", "40")


@contextlib.contextmanager
def locked_by_another(directory: Path):
    """Have another process hold the lock of a directory. It exits when its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(60)


def lock_now(directory: Path):
    return exclusive_lock(directory, wait_s=0, notify=pytest.fail)


def test_second_process_is_refused(tmp_path):
    with locked_by_another(tmp_path) as first:
        with pytest.raises(LockHeldError) as refusal, lock_now(tmp_path):
            pytest.fail("two writers")
        since = time.localtime(json.loads((tmp_path / "lock").read_text())["since"])
        who = f"process {first.pid} on host {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S', since)}"
        assert f"{tmp_path} is in use by {who}" in str(refusal.value)
        first.kill()
        first.wait(60)
        assert holder(tmp_path) is None  # The kernel released the lock, though the file still names its holder.
        assert json.loads((tmp_path / "lock").read_text())["pid"] == first.pid
        with lock_now(tmp_path):
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_wait_ends_when_the_first_exits(tmp_path):
    with locked_by_another(tmp_path) as first:
        messages = []

        def end_the_first(text: str) -> None:
            messages.append(text)
            first.stdin.close()

        with exclusive_lock(tmp_path, wait_s=1000, notify=end_the_first):
            pass
    [message] = messages
    assert f"process {first.pid} on host " in message


def test_wait_can_be_stopped(tmp_path):
    polls = iter([False, False, True])
    with (
        locked_by_another(tmp_path),
        pytest.raises(LockHeldError),
        exclusive_lock(tmp_path, wait_s=10_000, notify=lambda text: None, should_stop=lambda: next(polls)),
    ):
        pytest.fail("two writers")
    assert list(polls) == []


def test_error_in_the_block_releases_the_lock(tmp_path):
    with pytest.raises(KeyError), lock_now(tmp_path):
        raise KeyError
    with lock_now(tmp_path):
        pass


def test_holder_is_read_only(tmp_path):
    assert holder(tmp_path) is None
    assert holder(tmp_path / "missing") is None
    assert list(tmp_path.iterdir()) == []
    with locked_by_another(tmp_path) as first:
        before = snapshot(tmp_path)
        assert (holder(tmp_path).host, holder(tmp_path).pid) == (socket.gethostname(), first.pid)
        assert snapshot(tmp_path) == before
        with pytest.raises(LockHeldError), lock_now(tmp_path):
            pytest.fail("a look released the lock")


def test_holder_hinders_no_writer(tmp_path, monkeypatch):
    began, flock = threading.Event(), fcntl.flock

    def slow_flock(file: int, operation: int) -> None:
        flock(file, operation)
        if operation & fcntl.LOCK_SH:
            began.set()
            time.sleep(0.05)

    monkeypatch.setattr(fcntl, "flock", slow_flock)
    monkeypatch.setattr(lock, "PROBE_S", 60)  # The machine may be busy.
    (tmp_path / "lock").touch()
    looker = threading.Thread(target=holder, args=(tmp_path,))
    looker.start()
    assert began.wait(60)
    with lock_now(tmp_path):
        pass
    looker.join()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"\xff", b"[" * 9000, b'{"host": "a"}', b'{"host": "a", "pid": null, "since": 1}'),
        *(f'{{"host": "a", "pid": 7, "since": {since}}}'.encode() for since in ("1e300", "-1e300", "NaN", "Infinity")),
    ],
)
def test_any_lock_file_has_a_holder(tmp_path, content):
    (tmp_path / "lock").write_bytes(content)
    with (tmp_path / "lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert str(holder(tmp_path)) == "an unknown process"
        with pytest.raises(LockHeldError, match="in use by"), lock_now(tmp_path):
            pytest.fail("two writers")


def test_longer_content_is_replaced(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"host": "h" * 300, "pid": 7, "since": 1.5}) + "\n")
    with lock_now(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["host"] == socket.gethostname()


@pytest.mark.parametrize("exists", [True, False])
def test_symbolic_link_is_refused(tmp_path, exists):
    for name in ("outside", "run"):
        (tmp_path / name).mkdir()
    if exists:
        (tmp_path / "outside" / "file").write_text("precious")
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "outside" / "file")
    before = snapshot(tmp_path / "outside")
    with pytest.raises(OSError, match="lock"), lock_now(tmp_path / "run"):
        pytest.fail("the lock is elsewhere")
    with pytest.raises(OSError, match="lock"):
        holder(tmp_path / "run")
    assert snapshot(tmp_path / "outside") == before


COUNT = """
import sys
from pathlib import Path
from mnist_jax.runtime.lock import exclusive_lock
directory, counter = Path(sys.argv[1]), Path(sys.argv[1], "counter")
for _ in range(10):
    with exclusive_lock(directory, wait_s=1000, notify=lambda text: None):
        number = int(counter.read_text())
        counter.write_text("torn")
        counter.write_text(str(number + 1))
"""


def test_processes_lose_no_increment(tmp_path):
    (tmp_path / "counter").write_text("0")
    command = [sys.executable, "-c", COUNT, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    assert [(process.communicate(timeout=240)[1], process.returncode) for process in processes] == 4 * [("", 0)]
    assert (tmp_path / "counter").read_text() == "40"


# As the command uses it


def test_command_refuses_a_directory_in_use(new_run):
    run = new_run()
    with locked_by_another(run.workdir) as first:
        ended = run.finish(*ARGS, "--lock-wait-s", "0")
        assert list(run.workdir.iterdir()) == [run.workdir / "lock"]
        assert ended.code == 73
        assert f"process {first.pid} on host {socket.gethostname()}, since 2" in ended.err
        assert "--workdir DIR" in ended.err
        (run.workdir / "config.json").write_text("{}")
        assert run.finish(*ARGS, "--fresh", "--lock-wait-s", "0").code == 73
        assert sorted(path.name for path in run.workdir.parent.iterdir()) == ["run"]  # --fresh moved nothing.


def test_signal_ends_the_wait(new_run):
    run = new_run()
    with locked_by_another(run.workdir) as first:
        process = run.start(*ARGS, "--lock-wait-s", "1000", "--preempted-exit-code", "75")
        assert f"process {first.pid} on host " in process.stderr.readline()
        ended = stop(process, signal.SIGTERM)
        assert list(run.workdir.iterdir()) == [run.workdir / "lock"]
    assert (ended.code, ended.err) == (75, "")
    assert ended.last_line == "stopped step=0 signal=SIGTERM state_sha256=none"


def test_second_start_waits_and_resumes(new_run):
    run = new_run()
    first = run.start(*ARGS, "--steps", "100000", "--checkpoint-every-steps", "4")
    assert run.wait_for(lambda: bool(run.events("save")), first)
    second = run.start(*ARGS, "--steps", "100000", "--log-every-steps", "10")
    assert f"process {first.pid} on host " in second.stderr.readline()
    first.send_signal(signal.SIGTERM)
    stopped = end(first)
    assert run.wait_for_phase("train", second)
    second.send_signal(signal.SIGTERM)
    resumed = end(second)
    assert (stopped.code, resumed.code) == (0, 0), resumed.err
    [resume] = run.events("resume")
    assert (resume["step"], resume["exact"], resume["lost_steps"]) == (int(stopped.fields["step"]), True, 0)
    assert [event["event"] for event in run.events() if event["event"] in ("start", "exit")] == 2 * ["start", "exit"]
