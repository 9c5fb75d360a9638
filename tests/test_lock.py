"""The lock on a run directory: between threads and processes of a few lines, and as the command uses it."""

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
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import Ended, end, snapshot, stop

from mnist_jax.runtime import lock
from mnist_jax.runtime.lock import Holder, LockHeldError, exclusive_lock, holder

HOLD = """
import sys
from pathlib import Path
from mnist_jax.runtime.lock import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), wait_s=60, notify=print):
    print("has it", flush=True)
    sys.stdin.read()
"""
DIGITS = ("--dataset", "digits", "--steps", "40", "--log-every-steps", "10", "--eval-every-steps", "40")


@contextlib.contextmanager
def held_by_another(directory: Path):
    """Have another process hold the lock of a directory; it ends when its input does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "has it\n"
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(60)


@contextlib.contextmanager
def held_here(directory: Path):
    """Have this process hold the lock of a directory, without a word of it in the file."""
    directory.mkdir(exist_ok=True)
    file = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield directory / "lock"
    finally:
        os.close(file)


def test_a_second_process_is_refused_and_told_host_process_and_time_of_the_first(tmp_path):
    with held_by_another(tmp_path) as first:
        said = []
        with (
            pytest.raises(LockHeldError) as refusal,
            exclusive_lock(tmp_path, wait_s=0, notify=said.append),
        ):
            pytest.fail("two writers")
        written = json.loads((tmp_path / "lock").read_text())
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written["since"]))
    words = f"{tmp_path} is in use by process {first.pid} on host {socket.gethostname()}, since {since}"
    assert words in str(refusal.value)
    assert said == []  # Nobody is told of a wait that there is none of.


def test_the_wait_ends_when_the_first_ends(tmp_path):
    with held_by_another(tmp_path) as first:
        said = []

        def end_the_first(text: str) -> None:
            said.append(text)
            first.stdin.close()

        with exclusive_lock(tmp_path, wait_s=1000, notify=end_the_first):
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    [text] = said
    assert text.startswith(f"{tmp_path} is in use by process {first.pid} on host ")
    assert "waiting up to 1000 s" in text


def test_the_lock_of_a_holder_that_was_killed_is_free_at_once(tmp_path):
    with held_by_another(tmp_path) as first:
        first.kill()
        first.wait(60)
        assert json.loads((tmp_path / "lock").read_text())["pid"] == first.pid
        assert holder(tmp_path) is None
        with exclusive_lock(tmp_path, wait_s=0, notify=pytest.fail):
            pass


def test_the_lock_is_free_again_after_an_error_in_the_block(tmp_path):
    with pytest.raises(KeyError), exclusive_lock(tmp_path, wait_s=0, notify=pytest.fail):
        raise KeyError
    with exclusive_lock(tmp_path, wait_s=0, notify=pytest.fail):
        pass


def test_who_waits_can_be_told_to_give_up(tmp_path):
    asked = []

    def should_stop() -> bool:
        asked.append(1)
        return len(asked) == 3

    with (
        held_by_another(tmp_path) as first,
        pytest.raises(LockHeldError, match=f"process {first.pid} "),
        exclusive_lock(tmp_path, wait_s=10_000, notify=lambda text: None, should_stop=should_stop),
    ):
        pytest.fail("two writers")
    assert len(asked) == 3


def test_one_who_does_not_want_to_wait_is_not_refused_for_a_look(tmp_path, monkeypatch):
    """`holder` has the lock for an instant."""
    look_began, flock = threading.Event(), fcntl.flock

    def dwell(file: int, operation: int) -> None:
        flock(file, operation)
        if operation & fcntl.LOCK_SH:
            look_began.set()
            time.sleep(0.05)  # The other asks for it meanwhile.

    monkeypatch.setattr(lock.fcntl, "flock", dwell)
    monkeypatch.setattr(lock, "INSTANT_S", 60)  # The machine may be busy: the order of events is meant, not the time.
    (tmp_path / "lock").touch()
    looker = threading.Thread(target=holder, args=(tmp_path,))
    looker.start()
    assert look_began.wait(60)
    with exclusive_lock(tmp_path, wait_s=0, notify=pytest.fail):
        pass
    looker.join()


def test_a_directory_that_nobody_ever_locked_has_no_holder(tmp_path):
    assert holder(tmp_path) is None
    assert holder(tmp_path / "not there") is None
    assert list(tmp_path.iterdir()) == []


def test_a_look_tells_the_holder_and_writes_nothing(tmp_path):
    with held_by_another(tmp_path) as first:
        before = snapshot(tmp_path)
        for _ in range(3):
            found = holder(tmp_path)
            assert (found.host, found.pid) == (socket.gethostname(), first.pid)
        assert snapshot(tmp_path) == before
        with pytest.raises(LockHeldError), exclusive_lock(tmp_path, wait_s=0, notify=pytest.fail):
            pytest.fail("the looks let another in")
    assert holder(tmp_path) is None  # Its name still stands in the file.
    assert snapshot(tmp_path) == before


@given(
    content=st.binary() | st.from_regex(rb'\{"host": ("a"|1|null), "pid": [-0-9e]+, "since": -?([0-9e]+|NaN|null)\}')
)
@settings(deadline=None)
def test_whatever_stands_in_the_file_a_look_tells_that_there_is_a_holder(tmp_path_factory, content):
    with held_here(tmp_path_factory.getbasetemp() / "garbage") as path:
        path.write_bytes(content)
        assert isinstance(holder(path.parent), Holder)
        assert isinstance(str(holder(path.parent)), str)


@pytest.mark.parametrize("since", ["1e300", "-1e300", "NaN", "Infinity", "1e18"])
def test_a_time_that_no_clock_shows_does_not_hinder_the_message(tmp_path, since):
    with held_here(tmp_path) as path:
        path.write_text(f'{{"host": "a", "pid": 7, "since": {since}}}')
        with (
            pytest.raises(LockHeldError, match="in use by"),
            exclusive_lock(tmp_path, wait_s=0, notify=print),
        ):
            pytest.fail("two writers")


def test_an_earlier_longer_name_leaves_nothing_behind(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({"host": "h" * 300, "pid": 7, "since": 1.5}) + "\n")
    with exclusive_lock(tmp_path, wait_s=0, notify=pytest.fail):
        content = (tmp_path / "lock").read_text()
    assert content.endswith("}\n")
    assert {**json.loads(content), "since": None} == {"host": socket.gethostname(), "pid": os.getpid(), "since": None}


@pytest.mark.parametrize("target", ["a file", "nothing"])
def test_a_lock_that_is_a_symbolic_link_is_refused_and_its_target_untouched(tmp_path, target):
    (tmp_path / "outside").mkdir()
    if target == "a file":
        (tmp_path / "outside" / "file").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "outside" / "file")
    before = snapshot(tmp_path / "outside")
    with (
        pytest.raises(OSError, match="lock"),
        exclusive_lock(tmp_path / "run", wait_s=0, notify=print),
    ):
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


def test_of_the_increments_of_ten_processes_none_is_lost(tmp_path):
    (tmp_path / "counter").write_text("0")
    processes = [
        subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for _ in range(10)
    ]
    assert [(process.communicate(timeout=240)[1], process.returncode) for process in processes] == 10 * [("", 0)]
    assert (tmp_path / "counter").read_text() == "100"


# As the command uses it


def test_the_command_refuses_a_directory_in_use_with_73_and_says_who_is_there(new_run):
    run = new_run()
    with held_by_another(run.workdir) as first:
        ended = run.finish(*DIGITS, "--lock-wait-s", "0")
        assert list(run.workdir.iterdir()) == [run.workdir / "lock"]
    assert ended.code == 73
    assert f"in use by process {first.pid} on host {socket.gethostname()}, since 2" in ended.err
    assert "--workdir DIR" in ended.err
    assert ended.out == ""


def test_fresh_does_not_move_a_directory_that_is_in_use(new_run):
    run = new_run()
    run.workdir.mkdir()
    (run.workdir / "config.json").write_text("{}")
    with held_by_another(run.workdir):
        before = snapshot(run.workdir)
        ended = run.finish(*DIGITS, "--fresh", "--lock-wait-s", "0")
        assert snapshot(run.workdir.parent) == {**snapshot(run.workdir.parent), **before}
        assert sorted(path.name for path in run.workdir.parent.iterdir()) == ["run"]
    assert ended.code == 73


def test_a_signal_while_another_process_is_waited_for_is_told_in_the_last_line(new_run):
    run = new_run()
    with held_by_another(run.workdir) as first:
        process = run.start(*DIGITS, "--lock-wait-s", "1000", "--preempted-exit-code", "75")
        assert f"in use by process {first.pid} on host " in process.stderr.readline()
        ended = stop(process, signal.SIGTERM)
        assert list(run.workdir.iterdir()) == [run.workdir / "lock"]
    assert (ended.code, ended.err) == (75, "")
    assert ended.out == "stopped step=0 signal=SIGTERM state_sha256=none\n"


def test_a_second_start_waits_for_the_end_of_the_first_and_carries_its_run_on(new_run):
    undisturbed, run = new_run("undisturbed"), new_run()
    whole = undisturbed.finish(*DIGITS)
    first = run.start(*DIGITS, "--checkpoint-every-steps", "4")  # The saves make the run last.
    assert run.wait_for(lambda: len(run.events("save")) > 0, first)
    first.send_signal(signal.SIGSTOP)  # However busy the machine is, the second comes before the first ends.
    second = run.start(*DIGITS)
    words = second.stderr.readline()
    first.send_signal(signal.SIGTERM)
    first.send_signal(signal.SIGCONT)
    stopped, finished = end(first), end(second)
    assert f"in use by process {first.pid} on host " in words
    assert_stopped_in_the_middle(stopped)
    assert finished.code == 0, finished.err
    assert f"resumed cnn on digits from step {stopped.fields['step']} of 40" in finished.out
    assert finished.last_line == whole.last_line
    assert run.metrics() == undisturbed.metrics()
    assert [event["event"] for event in run.events() if event["event"] in ("start", "exit")] == 2 * ["start", "exit"]


def assert_stopped_in_the_middle(ended: Ended) -> None:
    assert ended.code == 0, ended.err
    assert ended.last_line.startswith("stopped ")
    assert 0 < int(ended.fields["step"]) < 40
