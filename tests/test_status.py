"""Status shows the content of a run directory and what the next start does, and changes nothing."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import DIGITS, Run, end, snapshot
from tampering import HOSTILE_EVENTS, flip_bit, largest_file, read_metadata, write_metadata

from mnist_jax import status, train
from mnist_jax.checkpoint import integrity
from mnist_jax.report import run_status

pytestmark = pytest.mark.usefixtures("in_this_process")


def run(*args: object, capsys) -> tuple[int, str, str]:
    return status.main([*map(str, args)]), *capsys.readouterr()


def run_json(workdir: Path, *args: str, capsys) -> dict:
    _, out, err = run(workdir, "--json", *args, capsys=capsys)
    assert err == ""
    return json.loads(out)


# Content


def test_status_lists_checkpoints(small_run, capsys):
    found = run_json(small_run.workdir, capsys=capsys)["checkpoints"]
    accuracies = {event["step"]: event["accuracy"] for event in small_run.events("evaluation")}
    assert [checkpoint["step"] for checkpoint in found] == [10, 20, 30, 40]
    for checkpoint in found:
        directory = small_run.workdir / "checkpoints" / str(checkpoint["step"])
        metadata = read_metadata(directory)
        assert checkpoint == {
            "step": checkpoint["step"],
            "time": metadata["time"],
            "bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
            "reason": metadata["reason"],
            "test_accuracy": accuracies.get(checkpoint["step"]),
            "good": None,
            "problem": None,
        }


def test_verify_reads_every_byte(small_copy, capsys):
    changed = largest_file(small_copy / "checkpoints" / "30")
    flip_bit(changed)
    verified = run_json(small_copy, "--verify", capsys=capsys)["checkpoints"]
    assert [checkpoint["good"] for checkpoint in verified] == [True, True, False, True]
    assert str(changed.relative_to(small_copy / "checkpoints" / "30")) in verified[2]["problem"]
    unverified = run_json(small_copy, capsys=capsys)["checkpoints"]
    assert [(checkpoint["good"], checkpoint["problem"]) for checkpoint in unverified] == 4 * [(None, None)]


def test_text_has_the_content_of_json(small_copy, capsys):
    (small_copy / "checkpoints" / "30" / "manifest.json").write_text("{")
    (small_copy / "checkpoints" / "quarantine" / "15-bad-manifest").mkdir(parents=True)
    found = run_json(small_copy, "--verify", capsys=capsys)
    lines = run(small_copy, "--verify", capsys=capsys)[1].splitlines()
    for checkpoint in found["checkpoints"]:
        [line] = [line for line in lines if line.startswith(f"  {checkpoint['step']} ")]
        assert line.endswith(checkpoint["problem"] or "good")
        assert (checkpoint["reason"] or "manifest.json") in line
    assert found["quarantine"] == ["15-bad-manifest"]
    assert "  15-bad-manifest" in lines
    for event in found["history"]:
        assert any(f"{event['event']}  " in line and f"step {event['step']}" in line for line in lines)
    assert found["next_start"]["text"] in lines[-1]


def test_exit_codes(small_copy, tmp_path, capsys):
    code, out, err = run(tmp_path / "nowhere", capsys=capsys)
    assert (code, out) == (2, "")
    assert str(tmp_path / "nowhere") in err
    for step in (10, 20, 30, 40):
        flip_bit(largest_file(small_copy / "checkpoints" / str(step)))
    assert run(small_copy, capsys=capsys)[0] == 0
    assert run(small_copy, "--verify", "--json", capsys=capsys)[0] == 65


# The next start does what status says


def leave_only_the_config(workdir: Path) -> None:
    for path in workdir.iterdir():
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def corrupt_all(workdir: Path) -> None:
    for path in (workdir / "checkpoints").glob("*/manifest.json"):
        path.write_text("{")


def contradict_the_config(workdir: Path) -> None:
    path = workdir / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "seed": 1}))


def forget_the_devices(workdir: Path) -> None:
    checkpoint = workdir / "checkpoints" / "40"
    write_metadata(checkpoint, {name: value for name, value in read_metadata(checkpoint).items() if name != "devices"})


@pytest.mark.parametrize(
    ("change", "action", "step", "code"),
    [
        (leave_only_the_config, "begin", 0, 0),
        (lambda workdir: shutil.rmtree(workdir / "checkpoints" / "40"), "resume", 30, 0),
        (lambda workdir: None, "nothing", 40, 0),
        (lambda workdir: flip_bit(workdir / "checkpoints" / "40" / "manifest.json"), "resume", 30, 0),
        (lambda workdir: flip_bit(largest_file(workdir / "checkpoints" / "40")), "resume", 30, 0),
        (corrupt_all, "refuse", None, 65),
        (lambda workdir: shutil.rmtree(workdir / "checkpoints"), "refuse", None, 65),
        (lambda workdir: (workdir / "config.json").write_text("{"), "refuse", None, 2),
        (contradict_the_config, "refuse", None, 2),
        (forget_the_devices, "refuse", None, 2),
        (lambda workdir: (workdir / "metrics.jsonl").unlink(), "nothing", 40, 0),
    ],
)
def test_next_start_does_what_status_says(small_copy, capsys, change, action, step, code):
    change(small_copy)
    planned = run_json(small_copy, "--verify", capsys=capsys)["next_start"]
    before = len(Run(small_copy).events())
    found = train.main(["--workdir", str(small_copy)])
    events = Run(small_copy).events()[before:]
    phases = [event["phase"] for event in events if event["event"] == "phase"]
    resumed = [event["step"] for event in events if event["event"] == "resume"]
    if found:
        does = ("refuse", None, found)
    elif "train" not in phases:
        does = ("nothing", resumed[0], found)
    else:
        does = ("resume", resumed[0], found) if resumed else ("begin", 0, found)
    assert does == (action, step, code)
    assert (planned["action"], planned["step"], planned["exit_code"]) == does
    quarantined = [event["step"] for event in events if event["event"] == "quarantine"]
    assert len(quarantined) == planned["text"].count("sets aside: ")


def test_shortage_is_foretold(small_copy, capsys, monkeypatch):
    def be_short(path):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(integrity, "read_manifest", be_short)
    planned = run_json(small_copy, capsys=capsys)["next_start"]
    assert (planned["action"], planned["exit_code"]) == ("refuse", 74)
    assert train.main(["--workdir", str(small_copy)]) == 74


# Read-only, and robust


def test_status_writes_nothing(small_copy, tmp_path, capsys):
    flip_bit(small_copy / "checkpoints" / "30" / "manifest.json")
    (small_copy / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir()
    small_copy.chmod(0o555)
    before = snapshot(tmp_path)
    assert run(small_copy, "--verify", capsys=capsys)[0] == 0
    assert snapshot(tmp_path) == before


def test_status_beside_a_running_training(new_run):
    run, found = new_run(), []
    process = run.start(*DIGITS, "--steps", "80", "--checkpoint-every-steps", "5", "--keep", "2")
    assert run.wait_for(lambda: len(run.events("save")) > 0, process)
    while process.poll() is None:
        found.append(run_status.examine(run.workdir, verify=len(found) % 4 == 0))
        status.describe(found[-1])
        time.sleep(0.02)  # Leave the CPU to the training.
    assert end(process).code == 0
    assert len(found) >= 10
    running = [each for each in found if each.in_use_by]
    assert {each.in_use_by["pid"] for each in running} == {process.pid}
    assert all("killed" not in [event["event"] for event in each.history] for each in running)
    assert [checkpoint for each in found for checkpoint in each.checkpoints if checkpoint.problem] == []
    assert {each.next_start.action for each in found} <= {"resume", "nothing"}


def test_checkpoint_removed_meanwhile_is_no_error(small_copy, monkeypatch):
    walk = os.walk

    def walk_and_remove(directory):
        found = list(walk(directory))
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(small_copy / "checkpoints" / "20")
        return found

    monkeypatch.setattr(integrity.os, "walk", walk_and_remove)
    assert [found.step for found in run_status.examine(small_copy, verify=False).checkpoints] == [10, 30, 40]


def test_characters_that_the_output_lacks_are_escaped(small_copy, tmp_path, monkeypatch):
    workdir = small_copy.rename(small_copy.with_name("é"))
    with (workdir / "events.jsonl").open("a") as events:
        events.write('{"event": "start", "step": 0, "reason": "\\ud800"}\n')
    with (tmp_path / "out").open("w", encoding="ascii") as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert status.main([str(workdir)]) == 0
    text = (tmp_path / "out").read_text()
    assert "\\xe9" in text
    assert "\\ud800" in text


def test_closed_output_is_no_error(small_run):
    command = [sys.executable, "-m", "mnist_jax.status", str(small_run.workdir)]
    reader, closed = os.pipe()
    os.close(reader)
    environment = {**os.environ, **small_run.environment}
    ended = subprocess.run(command, env=environment, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(closed)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_signal_stops_status(small_run, monkeypatch, capsys):
    monkeypatch.setattr(status, "examine", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM) or signal.pause())
    assert run(small_run.workdir, "--verify", capsys=capsys)[0] == 143


def test_torn_lines_are_skipped(small_copy, capsys):
    whole = run_json(small_copy, capsys=capsys)["history"]
    path = small_copy / "events.jsonl"
    lines = path.read_bytes()
    path.write_bytes(b'{"event": "sta\n' + lines + b'\xff\xfe\x00\n[1]\n7\n{"event": "exit"}\n{"event": "st')
    assert run_json(small_copy, capsys=capsys)["history"] == whole


def test_numbers_that_json_lacks_are_null(small_copy, capsys):
    with (small_copy / "events.jsonl").open("a") as events:
        events.write('{"time": 1.0, "event": "signal", "step": 5, "signal": "SIGTERM", "seconds": NaN}\n')
        events.write('{"time": 1.0, "event": "signal", "step": 6, "signal": "SIGTERM", "seconds": 1e999}\n')
    *_, nan, infinite = run_json(small_copy, capsys=capsys)["history"]
    assert nan["seconds"] is None
    assert infinite["seconds"] is None


@pytest.mark.parametrize("args", [[], ["--json"]])
def test_any_history_is_shown(tmp_path, capsys, args):
    nested = ['{"event": "start", "step": 0, "x": ' + n * "[" + n * "]" + "}" for n in (300, 900, 10**5)]
    for lines, codes in ((map(json.dumps, HOSTILE_EVENTS), (65,)), (nested, (0, 2))):
        (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
        assert run(tmp_path, *args, capsys=capsys)[0] in codes
