"""What the command tells of a run directory: of real runs, beside a run at work, and of what nobody ever wrote."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import Run, end, snapshot, stop
from tampering import change_manifest, read_metadata, write_format_3, write_metadata

from mnist_jax import config as configs
from mnist_jax import status, train
from mnist_jax.checkpoint import integrity
from mnist_jax.config import Config
from mnist_jax.report import run_status
from mnist_jax.runtime.preemption import StopSignal

pytestmark = pytest.mark.usefixtures("in_this_process")

DIGITS = ("--dataset", "digits", "--steps", "40", "--log-every-steps", "10", "--eval-every-steps", "40")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that nothing disturbed, with checkpoints 22, 30 and 40."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    settings = {"dataset": "digits", "steps": 40, "log_every_steps": 10, "checkpoint_every_steps": 10, "batch_size": 64}
    with StopSignal() as stop:
        assert train.run(Config(**settings), workdir, stop) == 0
    return workdir


@pytest.fixture
def run_in(finished, tmp_path):
    """A copy of that run, to be changed."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def eventful(tmp_path_factory, environment) -> Run:
    """A run that was stopped, carried on and killed."""
    run = Run(tmp_path_factory.mktemp("eventful") / "run", environment)
    process = run.start(*DIGITS, "--checkpoint-every-steps", "4", "--keep", "2")  # The saves make the run last.
    assert run.wait_for(lambda: len(run.events("save")) > 3, process)
    assert stop(process, signal.SIGTERM).last_line.startswith("stopped ")
    process = run.start()
    assert run.wait_for(lambda: len(run.events("resume")) > 0, process)
    assert run.wait_for(lambda: len(run.events("evaluation")) > 0, process)
    process.kill()
    assert end(process).code == -signal.SIGKILL
    return run


def examine(*args: object, capsys) -> tuple[int, str, str]:
    code = status.main([*map(str, args)])
    return code, *capsys.readouterr()


def examine_json(workdir: Path, *args: str, capsys) -> dict:
    _, out, err = examine(workdir, "--json", *args, capsys=capsys)
    assert err == ""
    return json.loads(out)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest_file(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


# What it tells


def test_each_checkpoint_is_told_with_step_reason_size_time_and_accuracy(finished, capsys):
    found = examine_json(finished, capsys=capsys)["checkpoints"]
    accuracies = {e["step"]: e["accuracy"] for e in Run(finished).events("evaluation")}
    assert [checkpoint["step"] for checkpoint in found] == [22, 30, 40]
    for checkpoint in found:
        directory = finished / "checkpoints" / str(checkpoint["step"])
        about = read_metadata(directory)
        assert checkpoint == {
            "step": checkpoint["step"],
            "time": about["time"],
            "bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
            "reason": "steps" if checkpoint["step"] == 30 else "best test accuracy so far",
            "test_accuracy": accuracies.get(checkpoint["step"]),
            "good": None,  # Nobody asked.
            "problem": None,
        }


def test_with_verify_each_byte_is_looked_at(run_in, capsys):
    changed = largest_file(run_in / "checkpoints" / "30")
    flip_bit(changed)
    asked = examine_json(run_in, "--verify", capsys=capsys)["checkpoints"]
    assert [checkpoint["good"] for checkpoint in asked] == [True, False, True]
    assert f"file {changed.relative_to(run_in / 'checkpoints' / '30')} is " in asked[1]["problem"]
    unasked = examine_json(run_in, capsys=capsys)["checkpoints"]
    assert [(checkpoint["good"], checkpoint["problem"]) for checkpoint in unasked] == 3 * [(None, None)]


def test_the_history_tells_starts_signals_kills_and_what_was_lost(eventful, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(eventful.workdir, workdir)
    events = eventful.events()
    stopped_at = next(event["step"] for event in events if event["event"] == "exit")
    killed_at = max(event["step"] for event in events)
    history = examine_json(workdir, capsys=capsys)["history"]
    assert [(event["event"], event["step"]) for event in history] == [
        ("start", 0),
        ("signal", stopped_at),
        ("exit", stopped_at),
        ("start", stopped_at),
        ("resume", stopped_at),
        ("killed", killed_at),
    ]
    assert history[1]["signal"] == "SIGTERM"
    assert (history[2]["outcome"], history[2]["code"]) == ("stopped", 0)
    assert (history[4]["exact"], history[4]["changed"], history[4]["lost_steps"]) == (True, [], 0)
    foreseen = examine_json(workdir, capsys=capsys)["next_start"]
    newest = max(Run(workdir).steps())
    assert (foreseen["action"], foreseen["step"], foreseen["exit_code"]) == ("resume", newest, 0)

    assert train.main(["--workdir", str(workdir)]) == 0
    capsys.readouterr()
    history = examine_json(workdir, capsys=capsys)["history"][5:]
    # The kill may have come in the middle of a save.
    history = [event for event in history if event["event"] != "unfinished_removed"]
    assert [event["event"] for event in history] == ["killed", "start", "resume", "exit"]
    resume = history[2]
    assert (resume["step"], resume["exact"]) == (newest, True)
    assert resume["lost_steps"] == killed_at - newest
    _, text, _ = examine(workdir, capsys=capsys)
    assert re.search(rf"killed +step {killed_at}\b", text)
    if resume["lost_steps"]:
        assert f"exact, {resume['lost_steps']} steps or more were lost and recomputed" in text


def test_the_text_shows_what_the_json_tells(run_in, capsys):
    flip_bit(run_in / "checkpoints" / "30" / "manifest.json")
    (run_in / "checkpoints" / "quarantine" / "20-bad-manifest").mkdir(parents=True)
    for args in ([], ["--verify"]):
        found = examine_json(run_in, *args, capsys=capsys)
        code, text, err = examine(run_in, *args, capsys=capsys)
        lines = text.splitlines()
        assert (code, err) == (0, "")
        for checkpoint in found["checkpoints"]:
            [line] = [line for line in lines if line.startswith(f"  {checkpoint['step']} ")]
            assert f"{checkpoint['bytes'] / 1e6:.2f}" in line
            assert (checkpoint["reason"] or "manifest.json") in line
            if checkpoint["test_accuracy"] is not None:
                assert f"{checkpoint['test_accuracy']:.4f}" in line
            state = checkpoint["problem"] or ("good" if args else "")
            assert line.endswith(state)
        assert found["quarantine"] == ["20-bad-manifest"]
        assert "  20-bad-manifest" in lines
        for event in found["history"]:
            assert any(f"{event['event']}  " in line and f"step {event['step']}" in line for line in lines)
        assert f"the next start {found['next_start']['text']}" in lines
        assert text.startswith(f"run in {run_in}\n")


def test_the_exit_code_says_whether_there_is_a_run_and_whether_anything_of_it_is_usable(run_in, tmp_path, capsys):
    assert examine(run_in, "--verify", capsys=capsys)[0] == 0
    code, out, err = examine(tmp_path / "nowhere", capsys=capsys)
    assert (code, out) == (2, "")
    assert err == f"error: there is no run in {tmp_path / 'nowhere'}\n"
    for step in (22, 30, 40):
        flip_bit(largest_file(run_in / "checkpoints" / str(step)))
    assert examine(run_in, capsys=capsys)[0] == 0  # It was not asked to look at each byte.
    assert examine(run_in, "--verify", capsys=capsys)[0] == 65
    assert examine(run_in, "--verify", "--json", capsys=capsys)[0] == 65


# That what it says of the next start is what the next start does


def leave_as_it_is(workdir: Path) -> None:
    pass


def leave_only_the_config(workdir: Path) -> None:
    shutil.rmtree(workdir)
    workdir.mkdir()
    configs.save(Config(dataset="digits", steps=40, log_every_steps=10), workdir / "config.json")


def take_the_end_back(workdir: Path) -> None:
    shutil.rmtree(workdir / "checkpoints" / "40")


def damage_the_newest_manifest(workdir: Path) -> None:
    flip_bit(workdir / "checkpoints" / "40" / "manifest.json")


def damage_the_newest_leaves(workdir: Path) -> None:
    flip_bit(largest_file(workdir / "checkpoints" / "40"))


def damage_all(workdir: Path) -> None:
    for path in (workdir / "checkpoints").glob("*/manifest.json"):
        path.write_text("{")


def remove_all_checkpoints(workdir: Path) -> None:
    shutil.rmtree(workdir / "checkpoints")


def break_the_config(workdir: Path) -> None:
    (workdir / "config.json").write_text("{")


def contradict_the_config(workdir: Path) -> None:
    path = workdir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 1}))


def write_another_format(workdir: Path) -> None:
    change_manifest(workdir / "checkpoints" / "40", format=2)


def put_the_format_before_there(workdir: Path) -> None:
    shutil.rmtree(workdir / "checkpoints" / "40")
    write_format_3(workdir / "checkpoints", 40)


def forget_the_devices(workdir: Path) -> None:
    checkpoint = workdir / "checkpoints" / "40"
    write_metadata(checkpoint, {name: value for name, value in read_metadata(checkpoint).items() if name != "devices"})


def say_nothing_of_the_run(workdir: Path) -> None:
    write_metadata(workdir / "checkpoints" / "40", ["digits", 40])


def lose_the_metrics(workdir: Path) -> None:
    (workdir / "metrics.jsonl").unlink()


@pytest.mark.parametrize(
    ("change", "action", "step", "code"),
    [
        (leave_only_the_config, "begin", 0, 0),
        (take_the_end_back, "resume", 30, 0),
        (leave_as_it_is, "nothing", 40, 0),
        (damage_the_newest_manifest, "resume", 30, 0),
        (damage_the_newest_leaves, "resume", 30, 0),
        (damage_all, "refuse", None, 65),
        (remove_all_checkpoints, "refuse", None, 65),
        (break_the_config, "refuse", None, 2),
        (contradict_the_config, "refuse", None, 2),
        (write_another_format, "refuse", None, 2),
        (put_the_format_before_there, "refuse", None, 2),
        (say_nothing_of_the_run, "refuse", None, 2),
        (forget_the_devices, "refuse", None, 2),
        (lose_the_metrics, "resume", 40, 0),
    ],
)
def test_the_next_start_does_what_is_foretold(run_in, capsys, change, action, step, code):
    change(run_in)
    foretold = examine_json(run_in, "--verify", capsys=capsys)["next_start"]
    before = len(Run(run_in).events())
    found = train.main(["--workdir", str(run_in)])
    events = Run(run_in).events()[before:]
    phases = [event["phase"] for event in events if event["event"] == "phase"]
    resumed = [event["step"] for event in events if event["event"] == "resume"]
    if found:
        does = ("refuse", None, found)
    elif "train" not in phases:
        does = ("nothing", resumed[0], found)
    else:
        does = ("resume", resumed[0], found) if resumed else ("begin", 0, found)
    assert does == (action, step, code)
    assert (foretold["action"], foretold["step"], foretold["exit_code"]) == does
    quarantined = [event["step"] for event in events if event["event"] == "quarantine"]
    assert len(quarantined) == foretold["text"].count("sets aside: ")


# That it harms nothing and fails at nothing


@pytest.mark.parametrize("mode", [0o755, 0o555])
def test_it_writes_nothing_at_all(run_in, tmp_path, capsys, mode):
    flip_bit(run_in / "checkpoints" / "30" / "manifest.json")
    (run_in / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()
    run_in.chmod(mode)
    before = snapshot(tmp_path)
    for args in ([], ["--verify"], ["--json"], ["--verify", "--json"]):
        assert examine(run_in, *args, capsys=capsys)[0] == 0
    assert snapshot(tmp_path) == before


def test_beside_a_run_at_work_it_never_fails_and_never_calls_a_good_checkpoint_bad(new_run):
    run, looks = new_run(), []
    process = run.start(*DIGITS, "--checkpoint-every-steps", "5", "--keep", "2")
    assert run.wait_for(lambda: len(run.events("save")) > 0, process)
    while process.poll() is None:
        looks.append(run_status.examine(run.workdir, verify=len(looks) % 4 == 0))
        status.describe(looks[-1])
    assert end(process).code == 0
    assert len(looks) >= 10
    at_work = [look for look in looks if look.in_use_by]
    assert {look.in_use_by["pid"] for look in at_work} == {process.pid}
    assert all("killed" not in [event["event"] for event in look.history] for look in at_work)
    assert [found for look in looks for found in look.checkpoints if found.problem] == []
    assert {look.next_start.action for look in looks} <= {"resume", "nothing"}


def test_a_checkpoint_that_a_run_removes_while_it_is_looked_at_is_no_error(run_in, monkeypatch):
    walk = os.walk

    def walk_and_remove(directory):
        found = list(walk(directory))
        with contextlib.suppress(FileNotFoundError):
            (run_in / "checkpoints" / "removed").mkdir(exist_ok=True)
            (run_in / "checkpoints" / "22").rename(run_in / "checkpoints" / "removed" / "22")
        return found

    monkeypatch.setattr(integrity.os, "walk", walk_and_remove)
    assert [found.step for found in run_status.examine(run_in, verify=False).checkpoints] == [30, 40]


@pytest.mark.parametrize("args", [(), ("--json",)])
def test_a_reader_that_goes_away_is_no_error(run_in, environment, args):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "mnist_jax.status", str(run_in), *args]
    ended = subprocess.run(
        command, env={**os.environ, **environment}, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120
    )
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_name_that_the_output_cannot_write_is_no_error(run_in, environment):
    run_in.rename(run_in.with_name("é"))
    with (run_in.with_name("é") / "events.jsonl").open("a") as events:
        events.write('{"event": "start", "step": 0, "reason": "\\ud800"}\n')
    ended = subprocess.run(
        [sys.executable, "-m", "mnist_jax.status", str(run_in.with_name("é"))],
        env={**os.environ, **environment, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "run in " in ended.stdout
    assert "\\xe9" in ended.stdout
    assert "\\ud800" in ended.stdout


def test_a_torn_line_takes_no_other_with_it(run_in, capsys):
    whole = examine_json(run_in, capsys=capsys)["history"]
    path = run_in / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b'{"event": "sta\n' + b"".join(lines) + b'\xff\xfe\x00\n[1]\n7\n{"event": "exit"}\n{"event": "st')
    assert examine_json(run_in, capsys=capsys)["history"] == whole


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3)
)
event_lines = st.builds(
    lambda event, details: json.dumps({**details, **event}).encode(),
    st.fixed_dictionaries(
        {"event": st.sampled_from([*run_status.HISTORY, "save", "phase"]), "step": st.integers(0, 50)}
    ),
    st.dictionaries(
        st.sampled_from(["time", "exact", "changed", "lost_steps", "signal", "code", "error", "names", "text"]),
        json_values,
    ),
)


@given(lines=st.lists(event_lines | st.binary(max_size=50), max_size=6))
@settings(deadline=None, max_examples=60)
def test_whatever_the_history_says_it_is_told_without_an_error(tmp_path_factory, lines):
    workdir = tmp_path_factory.getbasetemp() / "history"
    workdir.mkdir(exist_ok=True)
    (workdir / "events.jsonl").write_bytes(b"\n".join(lines))
    for args in ([], ["--json"]):
        assert status.main([str(workdir), *args]) in (0, 65)


def test_a_history_nested_too_deep_is_an_error_and_no_traceback(run_in, capsys):
    with (run_in / "events.jsonl").open("a") as events:
        events.writelines('{"event": "start", "step": 0, "x": ' + n * "[" + n * "]" + "}\n" for n in (300, 900, 10**5))
    for args in ([], ["--json"]):
        assert examine(run_in, *args, capsys=capsys)[0] in (0, 2)
