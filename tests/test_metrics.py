"""What a run leaves for people: the same metrics however often it was cut, a history that only grows, and lines."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from mnist_jax.records.metrics import Journal

Record = tuple[int, str, float, float]  # step, split, loss, accuracy
FINITE = st.floats(allow_nan=False, allow_infinity=False)
RECORDS = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from(["train", "test"]), FINITE, st.sampled_from([0.25, 0.5, 0.75])),
    max_size=12,
).map(lambda records: sorted(records, key=lambda record: record[0]))
STEPS = st.integers(-1, 31)


# metrics.jsonl


@settings(deadline=None, max_examples=50)
@given(records=RECORDS, step=STEPS, torn=st.binary(max_size=30))
def test_rewind_leaves_the_lines_up_to_the_step_byte_for_byte(
    records: list[Record], step: int, torn: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    workdir = tmp_path_factory.mktemp("run")
    with journal(workdir) as written:
        write(written, records)
    whole = metrics(workdir)
    assert len(lines(whole)) == len(records)
    expected = b"".join(line for line in lines(whole) if json.loads(line)["step"] <= step)
    assert whole.startswith(expected)

    (workdir / "metrics.jsonl").write_bytes(whole + torn)
    for _ in range(2):  # A second time changes nothing.
        with journal(workdir) as rewound:
            rewound.rewind(step)
            assert metrics(workdir) == expected
            rewound.rewind(step)
            assert metrics(workdir) == expected


def test_rewind_keeps_no_line_behind_one_that_is_cut(tmp_path: Path) -> None:
    with journal(tmp_path) as written:
        write(written, [(step, "train", 1.0, 0.5) for step in (10, 50, 20)])
    first = lines(metrics(tmp_path))[0]
    with journal(tmp_path) as rewound:
        rewound.rewind(30)
        assert metrics(tmp_path) == first
        assert rewound.metrics_fingerprint()["bytes"] == len(first)


def test_rewind_tells_how_far_the_run_had_come_by_its_lines_and_by_its_history(tmp_path: Path) -> None:
    assert rewound_from(tmp_path, step=0) == 0
    with journal(tmp_path) as written:
        written.event("start", step=0)
        write(written, [(10, "train", 1.0, 0.5), (20, "train", 1.0, 0.5)])
    assert rewound_from(tmp_path, step=10) == 20
    assert rewound_from(tmp_path, step=10) == 10  # The lines are cut, and are not counted twice.
    with journal(tmp_path) as written:
        written.event("save", step=35)
    assert rewound_from(tmp_path, step=10) == 35
    with journal(tmp_path) as written:
        written.event("start", step=10)
        written.event("phase", step=12, phase="train")
    assert rewound_from(tmp_path, step=10) == 12  # What was lost before this start was told of at this start.


def rewound_from(workdir: Path, *, step: int) -> int:
    with journal(workdir) as rewound:
        return rewound.rewind(step)


WHOLE_LINE = b'{"step": 0, "split": "test", "loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1}'
TORN_TAILS = [
    WHOLE_LINE,
    WHOLE_LINE[:40],
    b"\n" + WHOLE_LINE + b"\n",
    b"[0]\n",
    b"3\n",
    b'{"loss": 1.0}\n',
    b"\0" * 99 + b"\n",
]


@pytest.mark.parametrize("torn", TORN_TAILS)
def test_a_line_that_a_crash_tore_is_cut_off(torn: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(WHOLE_LINE + b"\n" + torn)
    with journal(tmp_path) as rewound:
        rewound.rewind(100)
        assert metrics(tmp_path) == WHOLE_LINE + b"\n"
        rewound.record(1, "train", loss=1.0, accuracy=0.5, learning_rate=0.1)
    assert [json.loads(line)["step"] for line in lines(metrics(tmp_path))] == [0, 1]


@settings(deadline=None, max_examples=25)
@given(records=RECORDS, step=STEPS)
def test_a_run_that_was_cut_and_carried_on_has_the_bytes_of_one_that_was_not(
    records: list[Record], step: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    workdir = tmp_path_factory.mktemp("run")
    with journal(workdir) as first:
        write(first, records)
    uninterrupted = metrics(workdir)
    with journal(workdir) as second:
        second.rewind(step)
        write(second, [record for record in records if record[0] > step])
        assert metrics(workdir) == uninterrupted


def test_a_line_says_step_split_loss_accuracy_and_learning_rate(tmp_path: Path) -> None:
    with journal(tmp_path) as written:
        written.record(100, "train", loss=0.5, accuracy=0.75, learning_rate=0.001)
    assert metrics(tmp_path) == (
        b'{"step": 100, "split": "train", "loss": 0.5, "accuracy": 0.75, "learning_rate": 0.001}\n'
    )


@settings(deadline=None, max_examples=25)
@given(records=RECORDS, step=STEPS)
def test_the_best_is_the_first_of_the_greatest_test_accuracies_up_to_the_step(
    records: list[Record], step: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    workdir = tmp_path_factory.mktemp("run")
    with journal(workdir) as first:
        write(first, records)
        check_best(first, records)
    with journal(workdir) as second:
        second.rewind(step)
        check_best(second, [record for record in records if record[0] <= step])


def check_best(written: Journal, records: list[Record]) -> None:
    tests = [(step, loss, accuracy) for step, split, loss, accuracy in records if split == "test"]
    best = written.best()
    if not tests:
        assert best is None
    else:
        assert best is not None
        greatest = max(accuracy for _, _, accuracy in tests)
        assert (best["step"], best["loss"], best["accuracy"]) == next(row for row in tests if row[2] == greatest)


def test_the_accuracy_at_a_step_is_that_of_the_test_and_not_of_the_training(tmp_path: Path) -> None:
    with journal(tmp_path) as written:
        write(written, [(100, "train", 1.0, 0.25), (200, "train", 1.0, 0.25), (200, "test", 1.0, 0.75)])
        assert written.accuracy_at(200) == 0.75
        assert written.accuracy_at(100) is None
    with journal(tmp_path) as carried_on:
        carried_on.rewind(200)
        assert carried_on.accuracy_at(200) == 0.75
        carried_on.rewind(199)
        assert carried_on.accuracy_at(200) is None


def test_an_accuracy_of_nothing_is_an_accuracy(tmp_path: Path) -> None:
    with journal(tmp_path) as written:
        write(written, [(100, "test", 1.0, 0.0)])
        assert written.accuracy_at(100) == 0.0
        assert written.best() == {"step": 100, "split": "test", "loss": 1.0, "accuracy": 0.0, "learning_rate": 0.1}


# events.jsonl


def test_the_history_only_grows_and_each_line_says_when_what_and_where(tmp_path: Path) -> None:
    began = time.time()
    before = b""
    for start in range(3):
        with journal(tmp_path) as written:
            written.event("start", step=start, config={"seed": 0})
            written.rewind(0)
            write(written, [(1, "train", 1.0, 0.5)])
            now = (tmp_path / "events.jsonl").read_bytes()  # Written at once: who looks at a run at work sees it.
            written.event("exit", step=1, code=0)
        after = (tmp_path / "events.jsonl").read_bytes()
        assert after.startswith(now)
        assert now.startswith(before)
        assert (len(lines(now)), len(lines(after))) == (2 * start + 1, 2 * start + 2)
        before = after
    events = [json.loads(line) for line in lines(before)]
    assert [(event["event"], event["step"]) for event in events] == [
        ("start", 0),
        ("exit", 1),
        ("start", 1),
        ("exit", 1),
        ("start", 2),
        ("exit", 1),
    ]
    assert events[0]["config"] == {"seed": 0}
    times = [began, *(event["time"] for event in events), time.time()]
    assert times == sorted(times)


# What a crash leaves


def test_what_was_synced_survives_a_kill(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from mnist_jax.records.metrics import Journal\n"
        "journal = Journal(Path(sys.argv[1])); journal.rewind(0); journal.event('start', step=0)\n"
        "for step in range(1, 101):\n"
        "    journal.record(step, 'train', loss=1 / step, accuracy=step / 100, learning_rate=0.1)\n"
        "journal.sync()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)]).returncode == -signal.SIGKILL
    assert [json.loads(line)["step"] for line in lines(metrics(tmp_path))] == list(range(1, 101))
    assert len(lines((tmp_path / "events.jsonl").read_bytes())) == 1
    check_scalars(tmp_path)


def test_sync_waits_for_the_disk_with_every_line_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, int]] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))

    with journal(tmp_path) as written:
        write(written, [(step, "train", 1.0, 0.5) for step in range(100)])
        monkeypatch.setattr(os, "fsync", watched)
        written.sync()
    status = (tmp_path / "metrics.jsonl").stat()
    assert (status.st_ino, status.st_size) in synced
    assert status.st_size > 0


# TensorBoard


@pytest.mark.parametrize("seconds_between", [10.0, -10.0])  # The next machine's clock may be behind.
def test_tensorboard_shows_each_step_once_after_restarts_that_lost_a_stretch(
    seconds_between: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [time.time()]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    stretches = [(0, range(1, 9)), (5, range(6, 12)), (5, range(6, 8)), (7, range(8, 15))]
    for start, (step, steps) in enumerate(stretches):
        clock[0] += seconds_between
        with journal(tmp_path) as written:
            written.rewind(step)
            # A lost stretch finds other values than the one that is there in the end: only so does it show.
            write(written, [(step, split, start + 1 / step, 0.5) for step in steps for split in ("train", "test")])
    assert sorted({json.loads(line)["step"] for line in lines(metrics(tmp_path))}) == list(range(1, 15))
    check_scalars(tmp_path)


@pytest.mark.parametrize("seconds_between", [10.0, -10.0])
def test_tensorboard_shows_each_step_once_after_a_restart_that_lost_all(
    seconds_between: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [time.time()]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    for start in range(2):
        clock[0] += seconds_between
        with journal(tmp_path) as written:
            written.rewind(0)
            write(written, [(step, "train", start + step, 0.5) for step in (1, 2)])
    check_scalars(tmp_path)


def check_scalars(workdir: Path) -> None:
    """Check that TensorBoard shows the values of metrics.jsonl, each once and in order."""
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in lines(metrics(workdir)):
        record = json.loads(line)
        for name in ("loss", "accuracy", "learning_rate"):
            value = float(np.float32(record[name]))  # TensorBoard's own precision
            expected.setdefault(f"{name}/{record['split']}", []).append((record["step"], value))
    assert expected
    accumulator = EventAccumulator(str(workdir / "tensorboard"), size_guidance={SCALARS: 0})
    accumulator.Reload()
    found = {tag: [(row.step, row.value) for row in accumulator.Scalars(tag)] for tag in accumulator.Tags()[SCALARS]}
    assert found == expected


# The tools of these tests


@contextmanager
def journal(workdir: Path) -> Iterator[Journal]:
    opened = Journal(workdir)
    try:
        yield opened
    finally:
        opened.close()


def write(journal: Journal, records: list[Record]) -> None:
    for step, split, loss, accuracy in records:
        journal.record(step, split, loss=loss, accuracy=accuracy, learning_rate=0.1)


def metrics(workdir: Path) -> bytes:
    return (workdir / "metrics.jsonl").read_bytes()


def lines(content: bytes) -> list[bytes]:
    return content.splitlines(keepends=True)
