import base64
import errno
import hashlib
import itertools
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tampering import read_manifest, write_manifest

from mnist_jax.checkpoint import integrity


def state_sha256(tree) -> str:
    return integrity.json_sha256(integrity.digest_leaves(tree))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# ---- Digests --------------------------------------------------------------------------------------------------------


def test_digest_is_the_documented_formula():
    small, large = np.arange(6, dtype=np.int32).reshape(2, 3), np.arange(80_000, dtype=np.float32).reshape(4, 20_000)

    def leaf(name, array, counts, chunks):
        digests = [sha256(np.ascontiguousarray(chunk).tobytes()) for chunk in chunks]
        content = json.dumps([name, str(array.dtype), list(array.shape), counts, digests], sort_keys=True)
        return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": sha256(content.encode())}

    # 320,000 bytes: rows, columns and rows again are halved, until a chunk has at most 65,536 bytes.
    halves = [half for row in large for half in np.split(row[None], 2, axis=1)]
    table = {"a.0": leaf("a.0", small, [1, 1], [small]), "b": leaf("b", large, [4, 2], halves)}
    assert integrity.digest_leaves({"b": large, "a": (small,)}) == table
    digest = state_sha256({"b": large, "a": (small,)})
    assert digest == sha256(json.dumps(table, sort_keys=True).encode())
    assert digest == "0280a45d310ed8549986a212617dbf53c665d4f2e8ee7ad76ac419af3c108cf3"


TREES = (
    {"a": np.zeros(4, np.float32)},
    {"a": np.asarray([0, 0, 1e-30, 0], np.float32)},
    {"a": np.asarray([0, 0, -0.0, 0], np.float32)},
    {"b": np.zeros(4, np.float32)},
    {"a": {"a": np.zeros(4, np.float32)}},
    {"a": np.zeros((2, 2), np.float32)},
    {"a": np.zeros(4, np.int32)},
    {"a": np.zeros(4)},
    {"a": np.zeros(4, np.float32), "b": np.zeros(0)},
    {"a": np.zeros(4, np.float32), "b": np.zeros((0, 1))},
    {"a": jax.random.PRNGKey(0)},
    {"a": jax.random.key(0)},
    {"a": jax.random.key(0, impl="rbg")},
    {"a": jax.random.key(0, impl="unsafe_rbg")},
)


def test_digest_depends_on_name_shape_type_and_bits():
    assert len({state_sha256(tree) for tree in TREES}) == len(TREES)


def test_digest_does_not_depend_on_memory_layout():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    trees = [
        {"a": array},
        {"a": jnp.asarray(array)},
        {"a": np.asfortranarray(array)},
        {"a": array.repeat(2, 1)[:, ::2]},
    ]
    assert len({state_sha256(tree) for tree in trees}) == 1


SHAPES = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 5000)), max_size=4)


@given(shape=SHAPES, itemsize=st.sampled_from([1, 2, 4, 8, 16]))
def test_chunks_cover_a_leaf_exactly(shape, itemsize):
    counts = integrity.chunk_counts(shape, itemsize)
    boxes = integrity.chunk_boxes(shape, counts)
    assert len(boxes) == math.prod(counts) <= integrity.MAX_CHUNKS
    assert all(count & (count - 1) == 0 for count in counts)
    edges = [sorted({(box[axis].start, box[axis].stop) for box in boxes}) for axis in range(len(shape))]
    for size, intervals in zip(shape, edges, strict=True):  # On each axis they touch, from end to end.
        assert [start for start, _ in intervals] == [0, *(stop for _, stop in intervals[:-1])]
        assert intervals[-1][1] == size
    corners = [tuple((part.start, part.stop) for part in box) for box in boxes]
    assert corners == list(itertools.product(*edges))  # each once, in C order
    size = math.prod(shape) * itemsize
    largest = max(math.prod(part.stop - part.start for part in box) for box in boxes) * itemsize
    if size <= integrity.MIN_CHUNK_BYTES:
        assert len(boxes) == 1
    elif all(axis >= 2 * count for axis, count in zip(shape, counts, strict=True)):
        assert largest <= 4 * max(integrity.MIN_CHUNK_BYTES, size / integrity.MAX_CHUNKS)


def found_by_two_processes() -> list[dict]:
    """Return the parts of two processes: of a leaf of eight chunks, and of one chunk of which each holds a half."""
    [whole] = integrity.hash_shards({"large": np.arange(80_000, dtype=np.float32)}).values()
    digests = list(whole["chunks"].items())
    small = np.arange(6, dtype=np.int32)
    row = {"shape": [6], "dtype": "int32", "raw_shape": [6], "itemsize": 4, "counts": [1], "chunks": {}}
    parts = []
    for process in (0, 1):
        piece = {
            "chunk": 0,
            "box": [[3 * process, 3 * process + 3]],
            "bytes": base64.b64encode(small[3 * process :][:3]).decode(),
        }
        parts.append({"large": {**whole, "chunks": dict(digests[process::2])}, "small": {**row, "pieces": [piece]}})
    return parts


def test_parts_of_all_processes_combine():
    combined = integrity.leaf_table(integrity.combine(found_by_two_processes()))
    tree = {"large": np.arange(80_000, dtype=np.float32), "small": np.arange(6, dtype=np.int32)}
    assert combined == integrity.digest_leaves(tree)


@pytest.mark.parametrize(("leaf", "field", "empty"), [("large", "chunks", {}), ("small", "pieces", [])])
def test_missing_part_is_refused(leaf, field, empty):
    for process in (0, 1):
        parts = found_by_two_processes()
        parts[process][leaf][field] = empty
        with pytest.raises(ValueError, match=f"chunk . of leaf {leaf}"):
            integrity.combine(parts)


@pytest.mark.parametrize(("field", "value"), [("dtype", "float32"), ("counts", [2])])
def test_parts_of_different_states_are_refused(field, value):
    parts = found_by_two_processes()
    parts[1]["small"][field] = value
    with pytest.raises(ValueError, match="disagree about leaf small"):
        integrity.combine(parts)


def test_leaf_names_are_those_of_orbax():
    names = integrity.named_leaves({"params": {"conv1": {"kernel": 1}}, "opt_state": ({"mu": 2}, [3]), "none": None})
    assert names == {"opt_state.0.mu": 2, "opt_state.1.0": 3, "params.conv1.kernel": 1}


# ---- Files ----------------------------------------------------------------------------------------------------------


def test_symbolic_links_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("content")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "own").write_text("content")
    (inside / "file").symlink_to(outside / "file")
    (inside / "directory").symlink_to(outside)
    os.mkfifo(inside / "fifo")
    assert integrity.regular_files(inside).keys() == {"own"}
    integrity.remove(inside / "directory")
    integrity.remove(inside)
    integrity.remove(inside)  # It need not exist.
    assert not inside.exists()
    assert (outside / "file").read_text() == "content"


def test_fsync_tree_fsyncs_files_before_directories(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x", "a/y", "a/b/z"):
        (tmp_path / name).write_text("content")
    order = []
    monkeypatch.setattr(os, "fsync", lambda file: order.append(os.readlink(f"/proc/self/fd/{file}")))
    integrity.fsync_tree(tmp_path)
    names = [os.path.relpath(path, tmp_path) for path in order]
    assert sorted(names) == [".", "a", "a/b", "a/b/z", "a/y", "x"]
    assert all(names.index(inner) < names.index(os.path.dirname(inner) or ".") for inner in set(names) - {"."})


@pytest.mark.parametrize(("number", "is_raised"), [(errno.EINVAL, False), (errno.ENOTSUP, False), (errno.EIO, True)])
def test_fsync_errors_are_raised_if_fsync_is_supported(tmp_path, monkeypatch, number, is_raised):
    def fail(file):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    open_before = len(os.listdir("/proc/self/fd"))
    if is_raised:
        with pytest.raises(OSError, match=os.strerror(number)):
            integrity.fsync_path(tmp_path)
    else:
        integrity.fsync_path(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == open_before


# ---- The manifest ---------------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path) -> dict:
    """The content of a manifest in `tmp_path`."""
    leaves = integrity.digest_leaves({"w": jnp.ones(3)})
    (tmp_path / "file").write_text("content")
    integrity.write_manifest(tmp_path, 7, leaves, {"file": integrity.describe_file(tmp_path / "file")})
    return json.loads((tmp_path / integrity.MANIFEST).read_text())


def test_manifest_is_read_as_it_was_written(tmp_path, manifest):
    read = integrity.read_manifest(tmp_path / integrity.MANIFEST)
    assert read == {
        "format": 4,
        "step": 7,
        "state_sha256": state_sha256({"w": jnp.ones(3)}),
        "leaves": integrity.digest_leaves({"w": jnp.ones(3)}),
        "files": {"file": {"bytes": 7, "sha256": sha256(b"content")}},
    }
    assert manifest == {**read, "seal": integrity.json_sha256(read)}


def test_changed_field_breaks_the_seal(tmp_path, manifest):
    for field in manifest:
        (tmp_path / integrity.MANIFEST).write_text(json.dumps({**manifest, field: 8}))
        with pytest.raises(ValueError, match="seal"):
            integrity.read_manifest(tmp_path / integrity.MANIFEST)
    # The order of the keys is not sealed.
    (tmp_path / integrity.MANIFEST).write_text(json.dumps(dict(reversed(manifest.items()))))
    assert integrity.read_manifest(tmp_path / integrity.MANIFEST)["step"] == 7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", None),
        ("state_sha256", 1),
        ("leaves", {"w": {"shape": [3], "dtype": "float32"}}),
        ("files", {"file": {"bytes": True, "sha256": "0"}}),
    ],
)
def test_incomplete_manifest_with_a_correct_seal_is_refused(tmp_path, manifest, field, value):
    write_manifest(tmp_path, {**read_manifest(tmp_path), field: value})
    with pytest.raises(ValueError, match="does not describe a checkpoint"):
        integrity.read_manifest(tmp_path / integrity.MANIFEST)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 4}', "\xff", '{"seal": "x"}', 200_000 * "["])
def test_other_content_is_no_manifest(tmp_path, content):
    (tmp_path / integrity.MANIFEST).write_text(content, "latin-1")
    with pytest.raises((ValueError, RecursionError)):
        integrity.read_manifest(tmp_path / integrity.MANIFEST)


def test_huge_manifest_is_not_read(tmp_path):
    with (tmp_path / integrity.MANIFEST).open("wb") as file:
        file.truncate(integrity.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ValueError, match=f"more than {integrity.MAX_MANIFEST_BYTES} bytes"):
        integrity.read_manifest(tmp_path / integrity.MANIFEST)


def test_only_a_regular_file_is_a_manifest(tmp_path, manifest):
    (tmp_path / "link").symlink_to(tmp_path / integrity.MANIFEST)
    os.mkfifo(tmp_path / "fifo")  # To open one would wait forever.
    for name in ("link", "fifo", "."):
        with pytest.raises(ValueError, match="not a file"):
            integrity.read_manifest(tmp_path / name)
