"""Saving and restoring a sharded state, in several processes and on several devices."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sharded import EndedError, Group, HungError

from mnist_jax.checkpoint.checkpointer import list_checkpoints

LAYOUTS = ((1, 1), (1, 8), (2, 1), (2, 4), (4, 1), (4, 2))
HANG_S = 40  # A save takes a quarter of a second, on a busy machine some. What hangs does so for a minute or more.

_pair: list[Group] = []


@pytest.fixture
def pair() -> Iterator[Group]:
    """Two processes with a device each, the same in all tests unless one of them breaks them."""
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
def layouts(tmp_path_factory) -> Iterator[dict[str, Group]]:
    """A group of each layout, and what each has saved: `directory/<layout>/<step>`."""
    groups = {}
    try:
        for layout in LAYOUTS:
            group = Group(*layout)
            groups[group.name] = group
        yield groups
    finally:
        for group in groups.values():
            group.close()


@pytest.fixture(scope="module")
def written(layouts, tmp_path_factory) -> dict[str, dict[Path, str]]:
    """The checkpoints of each layout, one for each mesh and spec, with their digests."""
    directory = tmp_path_factory.mktemp("layouts")
    for name, group in layouts.items():
        group.send("write", directory=str(directory / name))
    found = {}
    for name, group in layouts.items():
        answers = [group.answer(index) for index in range(len(group.pids))]
        digests = [answer["digests"] for answer in answers]
        assert all(digest == digests[0] for digest in digests), name
        found[name] = {directory / name / step: digest for step, digest in digests[0].items()}
    return found


def test_digest_is_the_same_in_every_layout(layouts, written):
    digests = {digest for checkpoints in written.values() for digest in checkpoints.values()}
    assert digests == {layouts["1x1"].call_one(0, "expected_digest")}
    assert sum(map(len, written.values())) == 2 + 4 + 4 * 3


def test_every_layout_restores_every_other(layouts, written):
    # Of each layout each reads another mesh and spec; all of them together read all.
    chosen = {
        reader: [
            list(checkpoints)[(number + turn) % len(checkpoints)] for turn, checkpoints in enumerate(written.values())
        ]
        for number, reader in enumerate(layouts)
    }
    for name, group in layouts.items():
        group.send("read", paths=list(map(str, chosen[name])))
    for name, group in layouts.items():
        for index in range(len(group.pids)):
            for path, (differences, metadata) in zip(chosen[name], group.answer(index), strict=True):
                assert not differences, f"{path} in {name}, process {index}"
                assert metadata == {"step": int(path.name)}
    assert {path for paths in chosen.values() for path in paths} == {path for row in written.values() for path in row}


@pytest.mark.parametrize("layout", ["2x1", "4x2"])
@pytest.mark.parametrize("step", [1, 2], ids=["split", "replicated"])
def test_each_process_hashes_its_share(written, layout, step):
    checkpoint = next(path for path in written[layout] if path.name == str(step))
    processes = int(layout[0])
    shares = []
    for process in range(processes):
        part = json.loads((checkpoint / "state" / f"hashes.{process}.json").read_text())
        bytes_hashed = 0
        for row in part["leaves"].values():
            chunk = row["itemsize"] * math.prod(row["raw_shape"]) / math.prod(row["counts"])
            bytes_hashed += chunk * len(row["chunks"]) + sum(len(piece["bytes"]) * 3 / 4 for piece in row["pieces"])
        shares.append(bytes_hashed)
    assert sum(shares) == pytest.approx(sum(row.nbytes for row in _host_leaves()), rel=0.01)  # nothing twice
    assert max(shares) < 1.5 * sum(shares) / processes


def _host_leaves():
    import jax
    from sharded import host_state

    return [leaf for leaf in jax.tree.leaves(host_state(7)) if hasattr(leaf, "nbytes")]


@pytest.mark.parametrize("layout", ["2x1", "4x2"])
def test_each_process_writes_its_share(written, layout):
    checkpoint = next(path for path in written[layout] if path.name == "1")
    processes = int(layout[0])
    sizes = [
        sum(path.stat().st_size for path in (checkpoint / "state" / f"ocdbt.process_{process}").rglob("*"))
        for process in range(processes)
    ]
    assert max(sizes) < 1.6 * sum(sizes) / processes


def test_leaves_without_elements_are_kept(layouts, tmp_path):
    for name in ("1x8", "2x4"):
        assert layouts[name].call("empties", directory=str(tmp_path / name), timeout_s=HANG_S) == [
            [] for _ in layouts[name].pids
        ]


def test_first_save_of_replicated_leaves_compiles_no_program_per_device(layouts, tmp_path):
    (compiled,) = layouts["1x8"].call("programs_of_a_save", directory=str(tmp_path / "checkpoints"))
    assert compiled == []


def open_pair(pair: Group, directory: Path) -> None:
    pair.call("open_checkpointer", directory=str(directory), timeout_s=HANG_S, options={"timeout_s": 60})


def names(answers) -> list[list[str]]:
    """Return the kinds of results of each process."""
    return [[kind for kind, _ in answer["results"]] for answer in answers]


def test_flipped_byte_in_a_shard_of_one_process_is_caught(pair, tmp_path):
    open_pair(pair, tmp_path)
    assert names(pair.call("save", step=1)) == [["Saved"], []]
    assert names(pair.call("save", step=2)) == [["Saved"], []]
    largest = max((tmp_path / "2/state/ocdbt.process_1/d").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)
    assert pair.call("try_read", path=str(tmp_path / "2")) == ["corrupt changed-file"] * 2
    assert pair.call("try_read", path=str(tmp_path / "1")) == ["good"] * 2
    restored = pair.call_one(0, "restore")  # alone
    assert restored == {"step": 1, "differences": [], "quarantined": ["2 changed-file"]}
    assert [path.name for path in (tmp_path / "quarantine").iterdir()] == ["2-changed-file"]
    # Process 1 saw step 2 when it started; it saves it again nevertheless.
    first, second = pair.call("save_and_wait", step=2, timeout_s=HANG_S)
    assert first == second == pair.call_one(0, "expected_digest")


def test_other_bits_in_a_chunk_file_are_caught_by_all_readers(pair, tmp_path):
    open_pair(pair, tmp_path)
    pair.call("save", step=1)
    hashes = tmp_path / "1/state/hashes.1.json"
    hashes.write_text(hashes.read_text().replace("0", "1", 1))
    assert pair.call("try_read", path=str(tmp_path / "1")) == ["corrupt changed-file"] * 2


FAILURES = [
    ("prepare", 0),
    ("create", 0),
    ("hash", 0),
    ("hash", 1),
    ("data", 0),
    ("data", 1),
    ("describe", 0),
    ("describe", 1),
    ("fsync", 0),
    ("fsync", 1),
    ("seal", 0),
    ("rename", 0),
]


@pytest.mark.parametrize(("fault", "process"), FAILURES, ids=[f"{fault}-{process}" for fault, process in FAILURES])
def test_failed_save(pair, tmp_path, fault, process):
    open_pair(pair, tmp_path)
    assert names(pair.call("save", step=1, timeout_s=HANG_S)) == [["Saved"], []]
    failed = pair.call("save", step=2, fault=fault, processes=[process], timeout_s=HANG_S)
    assert names(failed) == [["SaveError"], ["SaveError"]]
    assert os.listdir(tmp_path) == ["1"]  # It takes no room.
    # The same step again, in the thread of `save_and_wait`, and a later one
    first, second = pair.call("save_and_wait", step=2, timeout_s=HANG_S)
    assert first == second == pair.call_one(0, "expected_digest")
    assert names(pair.call("save", step=3, timeout_s=HANG_S)) == [["Saved", "Saved"], []]
    assert [checkpoint.verify()["step"] for checkpoint in list_checkpoints(tmp_path)] == [1, 2, 3]
    pair.call("close_checkpointer", timeout_s=HANG_S)


def test_failed_preparation_after_a_failed_save_of_the_same_step(pair, tmp_path):
    # What is left of the first must not tell process 1 that process 0 is ready.
    open_pair(pair, tmp_path)
    for fault in ("seal", "prepare"):
        failed = pair.call("save_and_wait", step=1, fault=fault, processes=[0], timeout_s=HANG_S)
        assert [answer.startswith("SaveError") for answer in failed] == [True, True]
    assert names(pair.call("save", step=2, timeout_s=HANG_S))[0][-1] == "Saved"


def test_lock_file_of_the_other_process_that_goes_away(pair, tmp_path):
    open_pair(pair, tmp_path)
    answers = pair.call("save", step=1, fault="lock", processes=[1], timeout_s=HANG_S)
    assert names(answers) == [["Saved"], []], answers


def test_training_with_collectives_goes_on_during_saves(pair, tmp_path):
    answers = pair.call("train", directory=str(tmp_path), saves=15, steps_per_save=200)
    assert [answer["results"] for answer in answers] == [["Saved"], []]
    assert [answer["saved"] for answer in answers] == [15, 15]
    assert [answer["wrong"] for answer in answers] == [[], []]  # Their buffers were donated at once.
    assert min(answer["updates_during_saves"] for answer in answers) > 15 * 50


def test_orbax_has_as_many_barriers_as_a_failed_process_makes_up_for(pair, tmp_path):
    open_pair(pair, tmp_path)
    for keys, wanted in pair.call("count_barriers", step=1):
        assert all(keys), keys
        assert len(keys) == wanted, keys


@pytest.mark.parametrize(("who", "where"), [(1, "hashed"), (0, "sealing")])
def test_kill_in_a_save_leaves_the_one_before(pair, tmp_path, who, where):
    group = Group(2, 1)
    try:
        group.send("stop_in_save", directory=str(tmp_path), where=where, who=who)
        assert {group.answer(who), group.answer(who)} == {None, where}
        group.answer(1 - who)
        group.kill(who)
        try:
            results = group.call_one(1 - who, "wait_for_save", timeout_s=HANG_S)
            assert results == ["SaveError"]
        except EndedError:
            pass  # JAX ends a process that its coordinator left.
        except HungError:
            pytest.fail(f"process {1 - who} waits for ever for the one that was killed")
    finally:
        group.close()
    assert [checkpoint.verify()["step"] for checkpoint in list_checkpoints(tmp_path)] == [1]
    open_pair(pair, tmp_path)
    assert pair.call_one(0, "restore") == {"step": 1, "differences": [], "quarantined": []}
    assert os.listdir(tmp_path) == ["1"]
    assert names(pair.call("save", step=2, timeout_s=HANG_S)) == [["Saved"], []]
