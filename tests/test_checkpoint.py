import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_jax.checkpoint import (
    CheckpointStore,
    InvalidState,
    Mismatch,
    NoReadableCheckpoint,
    Saved,
    SaveFailed,
)


def make_tree(seed: int = 0) -> dict:
    """A train state in small: parameters, a counter, a typed random key, nesting, several types."""
    rng = np.random.default_rng(seed)
    return {
        "params": {"dense": {"kernel": jnp.asarray(rng.standard_normal((30, 20)), jnp.float32)}},
        "opt_state": (jnp.asarray(rng.standard_normal(7), jnp.bfloat16), {"count": jnp.int32(seed)}),
        "rng": jax.random.key(seed),
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


def test_without_checkpoints_there_is_nothing_to_restore(store):
    assert store.restore(like=make_tree()) is None
    assert store.steps == []
    assert store.newest_step == 0


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
        patch.setattr(store._manager, "save", fail_with(OSError(28, "No space left on device")))
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


def test_a_save_that_broke_off_half_way_can_be_tried_again(store, monkeypatch):
    calls = []

    def break_off(*args, **kwargs):
        calls.append(args)
        raise OSError(5, "Input/output error")

    import orbax.checkpoint as ocp

    with monkeypatch.context() as patch:
        patch.setattr(ocp.JsonCheckpointHandler, "save", break_off)
        patch.setattr(ocp.JsonCheckpointHandler, "async_save", break_off)
        with pytest.raises(SaveFailed, match="Input/output error"):
            store.save_and_wait(2, make_tree(2))
    assert calls
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


def test_an_unfinished_save_is_not_counted(store, tmp_path):
    store.save_and_wait(1, make_tree(1))
    whole = store.directory / "1"
    torn = store.directory / "2.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "state").mkdir()
    again = CheckpointStore(store.directory)
    assert again.steps == [1]
    assert again.restore(like=make_tree()).step == 1
    again.close()
    assert whole.exists()


@pytest.mark.parametrize("damage", ["flipped bit in the leaves", "flipped bit in the manifest", "truncated", "deleted"])
def test_a_damaged_checkpoint_is_set_aside_and_the_next_older_one_is_used(store, damage):
    store.save_and_wait(1, make_tree(1))
    store.save_and_wait(2, make_tree(2))
    files = sorted(
        (path for path in (store.directory / "2").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    largest = files[-1]
    if damage == "flipped bit in the leaves":
        flip_bit(largest, largest.stat().st_size // 2)
    elif damage == "flipped bit in the manifest":
        manifest = store.directory / "2" / "manifest" / "metadata"
        flip_bit(manifest, manifest.read_bytes().index(b"sha256") + 20)
    elif damage == "truncated":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    else:
        largest.unlink()
    again = CheckpointStore(store.directory)
    restored = again.restore(like=make_tree())
    assert restored.step == 1
    assert bits(restored.tree) == bits(make_tree(1))
    [reason] = restored.set_aside
    assert reason.startswith("step 2: ")
    if damage == "flipped bit in the leaves":
        assert "leaf params.dense.kernel is" in reason
    assert [path.name for path in (store.directory / "quarantine").iterdir()] == ["2-0"]
    assert again.steps == [1]
    again.save_and_wait(2, make_tree(22))  # The step can be saved anew.
    assert bits(again.restore(like=make_tree()).tree) == bits(make_tree(22))
    again.close()


def test_if_no_checkpoint_is_good_each_start_says_so_and_names_each_and_none_is_moved(store):
    for step in (1, 2):
        store.save_and_wait(step, make_tree(step))
        (store.directory / str(step) / "manifest" / "metadata").write_text("{")
    for _ in range(2):
        again = CheckpointStore(store.directory)
        with pytest.raises(NoReadableCheckpoint, match=r"(?s)step 2: .*step 1: "):
            again.restore(like=make_tree())
        again.close()
    assert sorted(path.name for path in store.directory.iterdir()) == ["1", "2"]


def test_a_checkpoint_of_another_format_is_refused_and_stays(store):
    store.save_and_wait(1, make_tree(1))
    store.save_and_wait(2, make_tree(2))
    manifest = store.directory / "2" / "manifest" / "metadata"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2').replace('"format":1', '"format":2'))
    with pytest.raises(Mismatch, match="step 2 has format 2; this program reads 1"):
        store.restore(like=make_tree())
    assert store.steps == [1, 2]


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


def flip_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
