import errno
import os
import re
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnist_jax import checkpoint
from mnist_jax.checkpoint import (
    Checkpoint,
    CheckpointStore,
    InvalidState,
    Mismatch,
    NoReadableCheckpoint,
    Notice,
    Saved,
    SaveFailed,
    list_checkpoints,
)


def make_tree(seed: int = 0) -> dict:
    """A train state in small: parameters, a counter, a typed random key, nesting, several types, an odd size, none."""
    rng = np.random.default_rng(seed)
    return {
        "params": {"dense": {"kernel": jnp.asarray(rng.standard_normal((30, 20)), jnp.float32)}},
        "opt_state": (jnp.asarray(rng.standard_normal(7), jnp.bfloat16), {"count": jnp.int32(seed)}),
        "rng": jax.random.key(seed),
        "mask": jnp.asarray([True, False, bool(seed % 2)]),
        "none": jnp.zeros((0, 3)),
    }


def bits(tree) -> list[bytes]:
    raw = jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf, tree
    )
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(raw)]


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=3)
    yield store
    store.close()


def test_what_is_saved_is_restored_bit_for_bit_by_another_store(store, tmp_path):
    tree = make_tree()
    digest = store.save_and_wait(5, tree, about={"reason": "test"})
    again = CheckpointStore(tmp_path / "checkpoints")
    restored = again.restore(like=jax.eval_shape(make_tree))
    again.close()
    assert restored.step == 5
    assert bits(restored.tree) == bits(tree)
    assert jax.tree.structure(restored.tree) == jax.tree.structure(tree)
    assert restored.tree["rng"].dtype == tree["rng"].dtype
    assert restored.manifest["about"] == {"reason": "test"}
    assert again.sha256(5) == digest == restored.manifest["sha256"]
    assert restored.set_aside == ()


def test_a_checkpoint_is_read_by_a_relative_path_too(store, tmp_path, monkeypatch):
    store.save_and_wait(5, make_tree())
    monkeypatch.chdir(tmp_path)
    [found] = list_checkpoints(Path("checkpoints"))
    tree, manifest = found.read(make_tree())
    assert bits(tree) == bits(make_tree())
    assert manifest == found.verify()


def test_without_checkpoints_there_is_nothing_to_restore(store):
    assert store.restore(like=make_tree()) is None
    assert store.steps == []
    assert store.newest_step == 0


def test_two_leaves_of_one_name_are_refused_for_one_would_be_lost(store):
    with pytest.raises(ValueError, match="the same name"):
        store.save(1, {"a": {"b": jnp.zeros(1)}, "a.b": jnp.ones(1)})
    assert store.steps == []


def test_the_digest_tells_trees_apart_by_value_name_shape_and_type(store):
    trees = [
        {"a": jnp.zeros(4)},
        {"a": jnp.zeros(4).at[2].set(1e-30)},
        {"b": jnp.zeros(4)},
        {"a": jnp.zeros((2, 2))},
        {"a": jnp.zeros(4, jnp.int32)},
    ]
    digests = [store.save_and_wait(step, tree) for step, tree in enumerate(trees)]
    assert len(set(digests)) == len(trees)


def test_save_returns_before_anything_is_written_and_results_tell_when_it_is(store, monkeypatch):
    may_write = hold_back_writing(store, monkeypatch)
    store.save(1, make_tree())
    assert store.is_saving
    assert store.results() == []
    assert store.steps == []
    may_write.set()
    store.wait()
    [saved] = store.results()
    assert isinstance(saved, Saved)
    assert (saved.step, saved.sha256) == (1, store.sha256(1))
    assert store.results() == []
    assert store.steps == [1]


def test_buffers_donated_while_a_save_still_reads_them_do_not_change_what_is_saved(store, monkeypatch):
    may_write = hold_back_writing(store, monkeypatch)
    tree = {"w": jnp.arange(100_000, dtype=jnp.float32)}
    expected = bits(tree)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    store.save(1, tree)
    for _ in range(3):
        tree = jax.block_until_ready(overwrite(tree))
    may_write.set()
    store.wait()
    assert [type(result) for result in store.results()] == [Saved]
    assert bits(store.restore(like=tree).tree) == expected


def test_a_step_that_is_saved_or_being_saved_is_not_saved_again(store, monkeypatch):
    may_write = hold_back_writing(store, monkeypatch)
    store.save(1, make_tree(1))
    store.save(1, make_tree(2))
    may_write.set()
    digest = store.save_and_wait(1, make_tree(3))
    assert bits(store.restore(like=make_tree()).tree) == bits(make_tree(1))
    assert digest == store.sha256(1)
    assert len(store.results()) == 1


def test_the_newest_and_the_pinned_checkpoint_are_kept(store):
    for step in (10, 20, 30, 40, 50, 60):
        if step == 20:
            store.pinned = {20}
        store.save_and_wait(step, make_tree(step))
    assert store.steps == [20, 40, 50, 60]
    assert sorted(int(path.name) for path in store.directory.iterdir()) == [20, 40, 50, 60]
    store.pinned = {50}
    store.save_and_wait(70, make_tree(70))
    assert store.steps == [50, 60, 70]


def test_a_failed_save_is_told_changes_nothing_and_can_be_tried_again(store, monkeypatch):
    store.save_and_wait(1, make_tree(1))
    store.results()
    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "save", fail_with(OSError(28, "No space left on device")))
        store.save(2, make_tree(2))
        store.wait()
        [failure] = store.results()
        assert isinstance(failure, SaveFailed)
        assert "step 2" in str(failure)
        assert "No space left on device" in str(failure)
        assert store.steps == [1]
        with pytest.raises(SaveFailed, match="No space left"):
            store.save_and_wait(2, make_tree(2))
    store.save_and_wait(2, make_tree(2))
    assert store.steps == [1, 2]


@pytest.mark.parametrize("name", ["_write_manifest", "bring_to_disk"])
def test_a_save_that_broke_off_half_way_can_be_tried_again(store, monkeypatch, name):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, name, fail_with(OSError(5, "Input/output error")))
        with pytest.raises(SaveFailed, match="Input/output error"):
            store.save_and_wait(2, make_tree(2))
    assert [path.name for path in store.directory.iterdir()] == ["2.unfinished"]
    assert store.steps == []
    assert store.restore(like=make_tree()) is None
    store.save_and_wait(2, make_tree(2))
    assert bits(store.restore(like=make_tree()).tree) == bits(make_tree(2))


def test_a_tree_that_is_not_valid_is_not_saved(store):
    store.save(1, make_tree(), valid=jnp.bool_(False))
    store.wait()
    [failure] = store.results()
    assert isinstance(failure, InvalidState)
    with pytest.raises(InvalidState):
        store.save_and_wait(1, make_tree(), valid=False)
    assert store.steps == []


def test_leftovers_of_a_killed_process_never_count_and_are_removed_and_nothing_else_is(store, tmp_path):
    store.save_and_wait(1, make_tree(1))
    for name in ("2.unfinished", "3.removed", "4.backup", "quarantine", "x"):
        shutil.copytree(store.directory / "1", store.directory / name)
    outside = tmp_path / "outside"
    shutil.copytree(store.directory / "1", outside)
    (store.directory / "5.unfinished").symlink_to(outside)
    assert [found.step for found in list_checkpoints(store.directory)] == [1]
    again = CheckpointStore(store.directory)
    assert again.removed == ("2.unfinished", "3.removed", "5.unfinished")
    assert again.steps == [1]
    assert again.restore(like=make_tree()).step == 1
    again.close()
    assert sorted(path.name for path in store.directory.iterdir()) == ["1", "4.backup", "quarantine", "x"]
    assert (outside / "manifest.json").exists()


def test_checkpoints_are_listed_by_their_numbers_oldest_first(store):
    for step in (9, 10, 100):
        store.save_and_wait(step, make_tree())
    assert [found.step for found in list_checkpoints(store.directory)] == [9, 10, 100]
    assert list_checkpoints(store.directory / "nowhere") == []


def flip_a_bit_in_the_leaves(path: Path) -> None:
    flip_bit(largest_file(path), largest_file(path).stat().st_size // 2)


def flip_a_bit_in_the_manifest(path: Path) -> None:
    flip_bit(path / "manifest.json", (path / "manifest.json").read_bytes().index(b"sha256") + 20)


def flip_a_bit_in_what_is_remembered(path: Path) -> None:
    flip_bit(path / "manifest.json", (path / "manifest.json").read_bytes().index(b"remembered"))


def truncate(path: Path) -> None:
    os.truncate(largest_file(path), 100)


def delete(path: Path) -> None:
    largest_file(path).unlink()


def delete_the_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def replace_by_an_older_one(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("1"), path)


def replace_by_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.touch()


def replace_by_a_link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path.with_name("1"))


@pytest.mark.parametrize(
    ("damage", "kind", "named"),
    [
        (flip_a_bit_in_the_leaves, "changed-file", "file state/"),
        (flip_a_bit_in_the_manifest, "bad-manifest", "manifest.json"),
        (flip_a_bit_in_what_is_remembered, "bad-manifest", "manifest.json"),
        (truncate, "changed-file", "has 100 bytes"),
        (delete, "missing-file", "file state/"),
        (delete_the_manifest, "bad-manifest", "manifest.json cannot be read (No such file"),
        (replace_by_an_older_one, "other-step", "is that of step 1"),
        (replace_by_a_file, "bad-manifest", "Not a directory"),
        (replace_by_a_link, "symbolic-link", "symbolic link"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_next_older_one_is_used(store, damage, kind, named):
    store.save_and_wait(1, make_tree(1))
    store.save_and_wait(2, make_tree(2), about={"note": "remembered"})
    damage(store.directory / "2")
    again = CheckpointStore(store.directory)
    restored = again.restore(like=make_tree())
    assert restored.step == 1
    assert bits(restored.tree) == bits(make_tree(1))
    [(damaged, refuge)] = restored.set_aside
    assert str(damaged).startswith("step 2: ")
    assert named in str(damaged)
    assert refuge == store.directory / "quarantine" / f"2-{kind}"
    assert os.path.lexists(refuge)
    assert again.steps == [1]
    # The step can be saved anew, and be damaged in the same way again.
    again.save_and_wait(2, make_tree(22), about={"note": "remembered"})
    assert bits(again.restore(like=make_tree()).tree) == bits(make_tree(22))
    damage(store.directory / "2")
    [(_, second)] = again.restore(like=make_tree()).set_aside
    assert second.name == f"2-{kind}-2"
    again.close()


def test_a_leaf_that_is_read_otherwise_than_it_was_saved_is_named(store, monkeypatch):
    """Its files are whole: what is wrong is the memory, or what reads them."""
    store.save_and_wait(1, make_tree(1))
    store.save_and_wait(2, make_tree(2))
    restore = ocp.PyTreeCheckpointHandler.restore

    def restore_wrongly(self, path, **kwargs):
        leaves = restore(self, path, **kwargs)
        if "2" in path.parts:
            leaves["leaves"][123] ^= 1
        return leaves

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", restore_wrongly)
    restored = store.restore(like=make_tree())
    assert restored.step == 1
    [(damaged, refuge)] = restored.set_aside
    assert "leaf params.dense.kernel is" in str(damaged)
    assert refuge.name == "2-changed-leaf"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_a_checkpoint_that_cannot_be_read_here_and_now_is_not_taken_for_a_bad_one(store, monkeypatch, number):
    store.save_and_wait(1, make_tree(1))
    store.save_and_wait(2, make_tree(2))
    monkeypatch.setattr(checkpoint, "_sha256", fail_with(OSError(number, os.strerror(number), "a file")))
    with pytest.raises(OSError, match=os.strerror(number)):
        store.restore(like=make_tree())
    assert store.steps == [1, 2]


def test_a_checkpoint_on_a_failing_disk_is_set_aside(store, monkeypatch):
    store.save_and_wait(1, make_tree(1))
    store.save_and_wait(2, make_tree(2))
    sha256 = checkpoint._sha256

    def fail_in_2(path):
        if "2" in path.parts:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return sha256(path)

    monkeypatch.setattr(checkpoint, "_sha256", fail_in_2)
    restored = store.restore(like=make_tree())
    assert restored.step == 1
    [(damaged, refuge)] = restored.set_aside
    assert "cannot be read (Input/output error)" in str(damaged)
    assert refuge.name == "2-unreadable-file"


def test_if_no_checkpoint_is_good_each_start_says_so_and_names_each_and_none_is_moved(store):
    for step in (1, 2):
        store.save_and_wait(step, make_tree(step))
        (store.directory / str(step) / "manifest.json").write_text("{")
    for _ in range(2):
        again = CheckpointStore(store.directory)
        with pytest.raises(NoReadableCheckpoint, match=r"(?s)step 2: .*step 1: "):
            again.restore(like=make_tree())
        again.close()
    assert sorted(path.name for path in store.directory.iterdir()) == ["1", "2"]


@given(damaged=st.sets(st.integers(1, 4)))
@settings(deadline=None, max_examples=16, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_of_the_checkpoints_the_newest_good_one_is_restored_and_only_bad_ones_that_are_newer_are_moved(
    store, tmp_path_factory, damaged
):
    if not store.steps:
        for step in (1, 2, 3, 4):
            store.keep = 4
            store.save_and_wait(step, make_tree(step))
    directory = tmp_path_factory.mktemp("copy") / "checkpoints"
    shutil.copytree(store.directory, directory)
    for step in damaged:
        truncate(directory / str(step))
    copy = CheckpointStore(directory)
    good = {1, 2, 3, 4} - damaged
    if good:
        restored = copy.restore(like=make_tree())
        assert restored.step == max(good)
        assert bits(restored.tree) == bits(make_tree(max(good)))
        moved = {error.step for error, _ in restored.set_aside}
        assert moved == {step for step in damaged if step > max(good)}
        assert copy.steps == sorted({1, 2, 3, 4} - moved)
    else:
        with pytest.raises(NoReadableCheckpoint):
            copy.restore(like=make_tree())
        assert copy.steps == [1, 2, 3, 4]
    copy.close()


def test_a_checkpoint_of_another_format_is_refused_and_stays(store):
    store.save_and_wait(1, make_tree(1))
    store.save_and_wait(2, make_tree(2))
    path = store.directory / "2" / "manifest.json"
    checkpoint._write_manifest(path, {**Checkpoint(path.parent).manifest(), "format": 2})
    with pytest.raises(Mismatch, match="step 2 has format 2, and not 3"):
        store.restore(like=make_tree())
    assert store.steps == [1, 2]


def test_a_checkpoint_counts_when_the_disk_has_it_and_only_then_do_old_ones_go(tmp_path, monkeypatch):
    """Follow what is brought to the disk, and with which bytes; nothing may change after that and before the rename."""
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=1)
    store.save_and_wait(1, make_tree(1))
    happened, on_disk = [], {}
    fsync, rename, remove = os.fsync, os.rename, shutil.rmtree

    def record_fsync(file):
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        on_disk[path] = sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()
        fsync(file)
        if path == store.directory:
            happened.append(f"names on disk: {' '.join(sorted(os.listdir(path)))}")

    def record_rename(self, target):
        if self.name.endswith(".unfinished"):
            for path in (self, *self.rglob("*")):
                now = sorted(os.listdir(path)) if path.is_dir() else path.read_bytes()
                assert on_disk.get(path) == now, f"{path} is not on the disk"
        happened.append(f"{self.name} -> {target.name}, counted: {store.steps}")
        return rename(self, target)

    def record_remove(path, *args, **kwargs):
        happened.append(f"remove {path.name}, counted: {store.steps}")
        return remove(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    monkeypatch.setattr(shutil, "rmtree", record_remove)
    store.save_and_wait(2, make_tree(2))
    assert happened == [
        "2.unfinished -> 2, counted: [1]",
        "names on disk: 1 2",
        "1 -> 1.removed, counted: [1, 2]",
        "remove 1.removed, counted: [2]",
    ]
    assert any(path.name == "manifest.json" for path in on_disk)
    store.close()


def test_a_save_whose_name_did_not_come_to_the_disk_does_not_count_and_can_be_tried_again(store, monkeypatch):
    bring_to_disk = checkpoint.bring_to_disk

    def fail_for_the_name(path):
        if path == store.directory:
            raise OSError(errno.EIO, "Input/output error")
        bring_to_disk(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "bring_to_disk", fail_for_the_name)
        with pytest.raises(SaveFailed, match="Input/output error"):
            store.save_and_wait(1, make_tree(1))
    assert store.steps == []
    store.save_and_wait(1, make_tree(2))
    assert store.steps == [1]
    assert bits(store.restore(like=make_tree()).tree) == bits(make_tree(2))
    assert [path.name for path in (store.directory / "quarantine").iterdir()] == ["1-not-committed"]


def test_the_names_that_lead_to_the_checkpoints_are_brought_to_the_disk(tmp_path, monkeypatch):
    brought = []
    monkeypatch.setattr(os, "fsync", lambda file: brought.append(os.readlink(f"/proc/self/fd/{file}")))
    CheckpointStore(tmp_path / "runs" / "one" / "checkpoints").close()
    directories = [tmp_path / "runs" / "one" / "checkpoints", tmp_path / "runs" / "one", tmp_path / "runs", tmp_path]
    assert brought[:4] == [str(path) for path in directories]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere priorities are of processes")
def test_a_save_in_the_background_yields_to_others_and_one_that_is_waited_for_does_not(store, monkeypatch):
    priorities, commit = [], store._commit

    def commit_and_look(*args):
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return commit(*args)

    monkeypatch.setattr(store, "_commit", commit_and_look)
    store.save(1, make_tree())
    store.save_and_wait(2, make_tree())
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    assert priorities == [10, mine]


def test_the_system_calls_of_a_save_bring_all_to_the_disk_before_the_rename(tmp_path):
    """The same, seen from outside: what TensorStore writes in C++ is in it."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    trace = tmp_path / "trace"
    script = (
        "import sys, numpy as np; from mnist_jax.checkpoint import CheckpointStore\n"
        "store = CheckpointStore(sys.argv[1], keep=1)\n"
        "for step in (1, 2): store.save_and_wait(step, {'w': np.arange(100_000) * step})\n"
        "store.close()"
    )
    calls = "trace=openat,write,pwrite64,writev,pwritev,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat"
    command = ["strace", "-f", "-y", "-s", "0", "-e", calls, "-o", str(trace), sys.executable, "-c", script]
    traced = subprocess.run([*command, str(tmp_path / "run")], capture_output=True, text=True, timeout=240)
    if "ptrace" in traced.stderr and traced.returncode:
        pytest.skip("this system lets nobody trace")
    assert traced.returncode == 0, traced.stderr
    synced, dirty, renamed, order = set(), set(), [], []
    for line in trace.read_text().splitlines():
        call = re.match(r"\d+ +(\w+)\(", line)
        if not call or " = -1 " in line:
            continue
        if call[1] in ("fsync", "fdatasync"):
            [path] = re.findall(r"<([^>]*)>", line)[:1]
            synced.add(path)
            dirty.discard(path)
            order.append(("fsync", path))
        elif call[1] in ("write", "pwrite64", "writev", "pwritev"):
            dirty.update(path for path in re.findall(r"<(/[^>]*)>", line)[:1] if str(tmp_path / "run") in path)
        elif call[1].startswith("rename"):
            source, target = re.findall(r'"([^"]*)"', line)[:2]
            order.append(("rename", Path(source).name, Path(target).name))
            dirty = {target + path[len(source) :] if path.startswith(source + "/") else path for path in dirty}
            if source.endswith(".unfinished"):
                renamed.append(target)
                assert not {path for path in dirty if path.startswith(target + "/")}, "written and not on the disk"
                assert any(path.startswith(source + "/state/") for path in synced)
                assert {source, f"{source}/state", f"{source}/manifest.json"} <= synced
        elif call[1].startswith("unlink"):
            order.append(("unlink",))
    assert [Path(target).name for target in renamed] == ["1", "2"]
    committed = order.index(("rename", "2.unfinished", "2"))
    gone = order.index(("rename", "1", "1.removed"))
    assert ("fsync", str(tmp_path / "run")) in order[committed:gone]


def test_a_disk_that_will_soon_be_full_is_told_of_once_until_there_is_room_again(store, monkeypatch):
    free = 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    told = []
    for step, room in enumerate((10**9, 10**4, 10**4, 10**9, 10**4)):
        free = room
        store.save_and_wait(step, make_tree(step))
        told += [(result.step, result.event) for result in store.results() if isinstance(result, Notice)]
    assert told == [(1, "low_space"), (4, "low_space")]


def test_checkpoints_that_vanish_are_told_of_and_the_next_save_is_made_all_the_same(store):
    for step in (1, 2):
        store.save_and_wait(step, make_tree(step))
    store.results()
    shutil.rmtree(store.directory)
    store.save_and_wait(3, make_tree(3))
    notice, saved = store.results()
    assert (notice.event, saved.step) == ("checkpoints_vanished", 3)
    assert "1, 2" in str(notice)
    assert store.steps == [3]
    assert bits(store.restore(like=make_tree()).tree) == bits(make_tree(3))


@pytest.mark.parametrize("in_its_place", ["nothing", "another run"])
def test_nothing_is_written_where_the_run_was_moved_away(tmp_path, in_its_place):
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.save_and_wait(1, make_tree(1))
    (tmp_path / "run").rename(tmp_path / "moved")
    if in_its_place == "another run":
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(SaveFailed, match="run was"):
        store.save_and_wait(2, make_tree(2))
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name != "checkpoints"]
    (tmp_path / "moved" / "checkpoints" / "1").rename(tmp_path / "moved" / "1")
    store.close()


def test_an_old_checkpoint_that_cannot_be_removed_is_told_of_and_the_new_one_is_saved(store, monkeypatch):
    store.keep = 1
    store.save_and_wait(1, make_tree(1))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail_with(OSError(errno.EACCES, "Permission denied")))
        store.save_and_wait(2, make_tree(2))
    assert [getattr(result, "event", "saved") for result in store.results()] == ["saved", "saved", "removal_failed"]
    assert store.steps == [2]
    again = CheckpointStore(store.directory)
    assert (again.removed, again.steps) == (("1.removed",), [2])
    again.close()


@pytest.mark.parametrize("name", ["a[b]", "*", "lr=0.1,seed=[0]", "ü b"])
def test_any_path_can_hold_checkpoints(tmp_path, name):
    store = CheckpointStore(tmp_path / name / "checkpoints")
    store.save_and_wait(1, make_tree(1))
    store.close()
    for place in (name, "moved", name):  # A run may be moved to a path of the other kind, and back.
        again = CheckpointStore(tmp_path / place / "checkpoints")
        assert bits(again.restore(like=make_tree()).tree) == bits(make_tree(1))
        again.save_and_wait(2, make_tree(2))
        assert bits(again.restore(like=make_tree()).tree) == bits(make_tree(2))
        again.close()
        shutil.rmtree(tmp_path / place / "checkpoints" / "2")
        (tmp_path / place).rename(tmp_path / ("moved" if place == name else name))


def test_a_path_under_which_nothing_is_found_again_is_refused_at_once(tmp_path):
    with pytest.raises(OSError, match="backslash"):
        CheckpointStore(tmp_path / "a\\b")


def test_a_file_in_the_place_of_the_directory_is_an_error_at_once(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(FileExistsError):
        CheckpointStore(tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.zeros((3, 4))}, r"leaf w should be \[3, 4\] float32 and is \[2, 4\] float32"),
        ({"w": jnp.zeros((2, 4), jnp.int32)}, r"leaf w should be \[2, 4\] int32 and is \[2, 4\] float32"),
        ({"w": jnp.zeros((2, 4)), "b": jnp.zeros(1)}, r"leaf b should be \[1\] float32 and is absent"),
        ({}, r"leaf w should be absent and is \[2, 4\] float32"),
    ],
)
def test_a_checkpoint_of_another_tree_is_refused_with_the_leaf_and_stays(store, like, message):
    store.save_and_wait(7, {"w": jnp.zeros((2, 4))})
    with pytest.raises(Mismatch, match=r"step 7 is of another tree: " + message):
        store.restore(like=like)
    assert store.steps == [7]


def test_restored_leaves_lie_where_the_like_tree_says(store):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    store.save_and_wait(1, {"w": np.arange(4, dtype=np.float32)})
    like = {"w": jax.ShapeDtypeStruct((4,), np.float32, sharding=sharding)}
    assert store.restore(like=like).tree["w"].sharding == sharding


def hold_back_writing(store: CheckpointStore, monkeypatch) -> threading.Event:
    """Keep the background thread from reading or writing anything until the event is set."""
    may_write, write = threading.Event(), store._write

    def wait_and_write(*args):
        assert may_write.wait(60)
        write(*args)

    monkeypatch.setattr(store, "_write", wait_and_write)
    return may_write


def fail_with(error: Exception):
    def fail(*args, **kwargs):
        raise error

    return fail


def largest_file(path: Path) -> Path:
    """Return the largest file of the leaves: how Orbax divides them differs, and the manifest may be larger still."""
    return max((file for file in (path / "state").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
