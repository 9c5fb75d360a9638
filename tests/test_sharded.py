"""Save and restore a sharded state in several processes and on several devices."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
import sharded
from sharded import EndedError, Group, HungError

from mnist_jax.checkpoint.checkpoint import list_checkpoints
from mnist_jax.checkpoint.remote import RemoteStore

HANG_S = 40  # A save takes a quarter of a second, more on a busy machine. What hangs does so for a minute or more.

_pair: list[Group] = []


@pytest.fixture
def pair() -> Iterator[Group]:
    """Two processes with a device each, shared by the tests unless one breaks them."""
    if not _pair:
        _pair.append(Group(2, 1))
    yield _pair[0]
    if _pair[0].is_broken:
        _pair.pop().close()


@pytest.fixture(scope="module", autouse=True)
def _end_pair() -> Iterator[None]:
    yield
    while _pair:
        _pair.pop().close()


@pytest.fixture(scope="module")
def groups() -> Iterator[dict[str, Group]]:
    """Groups of 1 process with 8 devices and of 4 processes with 2."""
    started = [Group(1, 8), Group(4, 2)]
    yield {group.name: group for group in started}
    for group in started:
        group.close()


@pytest.fixture(scope="module")
def written(groups, tmp_path_factory) -> dict[Path, str]:
    """The checkpoints that each group and this process saved, one for each mesh and spec, with their digests."""
    directory = tmp_path_factory.mktemp("layouts")
    for name, group in groups.items():
        group.send("write", directory=str(directory / name))
    found = {directory / "1x1" / step: digest for step, digest in sharded.write(str(directory / "1x1")).items()}
    for name, group in groups.items():
        answers = [group.answer(index) for index in range(group.size)]
        assert all(answer == answers[0] for answer in answers), name
        found |= {directory / name / step: digest for step, digest in answers[0].items()}
    return found


def test_digest_is_the_same_in_every_layout(written):
    assert set(written.values()) == {sharded.expected_digest()}
    assert len(written) == 2 + 4 + 3


def test_every_layout_restores_every_other(groups, written):
    paths = list(map(str, written))
    for group in groups.values():
        group.send("read", paths=paths)
    answers = [group.answer(index) for group in groups.values() for index in range(group.size)]
    for answer in (sharded.read(paths), *answers):
        assert answer == [[[], {"step": int(path.name)}] for path in written]


@pytest.mark.parametrize("step", [1, 2], ids=["split", "replicated"])
def test_each_process_hashes_and_writes_its_share(written, step):
    state = next(path for path in written if path.parts[-2:] == ("4x2", str(step))) / "state"
    hashed, sizes = [], []
    for process in range(4):
        leaves = json.loads((state / f"hashes.{process}.json").read_text())["leaves"]
        hashed.append(sharded.hashed_bytes(leaves))
        files = (state / f"ocdbt.process_{process}").rglob("*")
        sizes.append(sum(path.stat().st_size for path in files))
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(sharded.host_state()) if hasattr(leaf, "nbytes"))
    assert sum(hashed) == pytest.approx(total, rel=0.01)  # nothing twice
    assert max(hashed) < 1.5 * total / 4
    if step == 1:  # Of replicated arrays one device writes.
        assert max(sizes) < 1.6 * sum(sizes) / 4


def test_remote_copy_of_a_sharded_checkpoint_is_whole(written, tmp_path):
    """One process uploads, from the shared directory, what all have written."""
    checkpoint = next(path for path in written if path.parts[-2:] == ("4x2", "1"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(checkpoint.parent)
    remote = RemoteStore((tmp_path / "bucket").as_uri())
    remote.upload(tmp_path / "run", 1, keep=[], files=[])
    assert remote.download(tmp_path / "other", files=[]).steps == [1]
    assert sharded.read([str(tmp_path / "other" / "checkpoints" / "1")]) == [[[], {"step": 1}]]


def test_leaves_on_different_devices_are_restored(groups, tmp_path):
    assert groups["1x8"].call("mixed", directory=str(tmp_path / "checkpoints")) == [8 * [[]]]


def test_first_save_of_replicated_leaves_compiles_nothing(groups, tmp_path):
    assert groups["1x8"].call("compiled_by_a_save", directory=str(tmp_path / "checkpoints")) == [[]]


def save(pair: Group, step: int, *, wait: bool = False, **fault: object) -> list[list[str]]:
    """Save with both processes, and return the types of the results of each."""
    return pair.call("save", step=step, wait=wait, timeout_s=HANG_S, **fault)


def open_pair(pair: Group, directory: Path) -> None:
    pair.call("open_checkpointer", directory=str(directory))


def test_changes_in_a_file_of_one_process_are_found_by_all(pair, tmp_path):
    open_pair(pair, tmp_path)
    for step in (1, 2, 3):
        assert save(pair, step) == [["Saved"], []]
    largest = max((tmp_path / "3/state/ocdbt.process_1/d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    hashes = tmp_path / "2/state/hashes.1.json"
    hashes.write_text(hashes.read_text().replace("0", "1", 1))
    for step, found in {1: "intact", 2: "changed-file", 3: "changed-file"}.items():
        assert pair.call("try_read", path=str(tmp_path / str(step))) == [found] * 2
    assert pair.call_one(0, "restore") == [1, [], ["3 changed-file", "2 changed-file"]]  # alone
    # Process 1 knew steps 2 and 3; they can be saved again nevertheless.
    assert save(pair, 2, wait=True) == [["Saved"], []]
    assert pair.call("digest", step=2) == 2 * [pair.call_one(0, "expected_digest")]


@pytest.mark.parametrize(
    ("fault", "process"),
    [("prepare", 0), ("create", 0), ("hash", 1), ("write", 0), ("write", 1), ("fsync", 1), ("rename", 0)],
)
def test_failed_save_hangs_nobody_and_is_retried(pair, tmp_path, fault, process):
    open_pair(pair, tmp_path)
    assert save(pair, 1, fault=fault, processes=[process]) == [["SaveError"], ["SaveError"]]
    assert os.listdir(tmp_path) == []  # It takes no space.
    assert save(pair, 1, wait=True) == [["Saved"], []]
    assert save(pair, 2) == [["Saved"], []]
    assert [checkpoint.verify()["step"] for checkpoint in list_checkpoints(tmp_path)] == [1, 2]
    pair.call("close_checkpointer", timeout_s=HANG_S)


def test_lock_file_of_the_other_process_may_vanish(pair, tmp_path):
    open_pair(pair, tmp_path)
    assert save(pair, 1, fault="vanishing lock file", processes=[1]) == [["Saved"], []]


def test_training_with_collectives_continues_during_saves(pair, tmp_path):
    for saved, wrong, updates_during_saves in pair.call("train", directory=str(tmp_path), saves=8, steps_per_save=150):
        assert saved == list(range(1, 9))
        assert wrong == []  # Their buffers were donated at once.
        assert updates_during_saves > 8 * 40


@pytest.mark.parametrize(("who", "where"), [(1, "describe_file"), (0, "write_manifest")])
def test_kill_during_a_save_leaves_the_one_before(pair, tmp_path, who, where):
    group = Group(2, 1)
    try:
        group.send("stop_in_save", directory=str(tmp_path), where=where, who=who)
        assert {group.answer(who), group.answer(who)} == {None, where}
        group.answer(1 - who)
        group.kill(who)
        try:
            assert group.call_one(1 - who, "wait_for_save", timeout_s=HANG_S) == ["SaveError"]
        except EndedError:
            pass  # JAX ends a process whose coordinator is gone.
        except HungError:
            pytest.fail(f"process {1 - who} waits for ever for the one that was killed")
    finally:
        group.close()
    assert [checkpoint.verify()["step"] for checkpoint in list_checkpoints(tmp_path)] == [1]
    open_pair(pair, tmp_path)
    assert pair.call_one(0, "restore") == [1, [], []]
    assert os.listdir(tmp_path) == ["1"]
    assert save(pair, 2) == [["Saved"], []]
