"""The remote copy of a run: on servers with the APIs of S3, GCS and Azure, and on a disk where there are many cases."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from object_store import (
    CREDENTIALS,
    NEARBY,
    answering_server,
    azure_environment,
    azure_server,
    closed_port,
    gcs_environment,
    moto_server,
    s3_environment,
)
from obstore.exceptions import GenericError
from obstore.store import LocalStore
from runs import snapshot
from tampering import NOT_IN_THE_TABLE

from mnist_jax.checkpoint import integrity, object_store
from mnist_jax.checkpoint import remote as module
from mnist_jax.checkpoint.checkpoint import list_checkpoints
from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.checkpoint.object_store import ObjectStore, RemoteError
from mnist_jax.checkpoint.orbax_io import UNFINISHED
from mnist_jax.checkpoint.remote import Downloaded, RemoteStore, Uploaded

STEPS = (10, 20, 30)
EMPTY_CONTAINER = b"<EnumerationResults><Blobs/><NextMarker/></EnumerationResults>"
FILES = ("config.json", "metrics.jsonl", "events.jsonl")
ENDPOINTS = {"s3": s3_environment, "gs": gcs_environment, "az": azure_environment}
SERVERS = {"s3": moto_server, "gs": moto_server, "az": azure_server}


def lines_to(step: int) -> str:
    return "".join(f'{{"step": {logged}}}\n' for logged in range(10, step + 1, 10))


def save(run: Path, *steps: int, content: str = "state", more_files: int = 0) -> None:
    """Write small checkpoints with real manifests, and the metrics that lead to them."""
    for step in steps:
        checkpoint = run / "checkpoints" / str(step)
        contents = {"state/a": f"{content} {step}", "state/d/b": "b" * 99, "run/metadata": "{}", "state/empty": ""}
        contents |= {f"state/{number}": "" for number in range(more_files)}
        for name, text in contents.items():
            (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
            (checkpoint / name).write_text(text)
        files = {name: integrity.describe_file(checkpoint / name) for name in contents}
        integrity.write_manifest(checkpoint, step, {}, files)
        (run / "metrics.jsonl").write_text(lines_to(step))


@pytest.fixture
def run(tmp_path) -> Path:
    save(tmp_path / "run", *STEPS)
    (tmp_path / "run" / "config.json").write_text("{}")
    return tmp_path / "run"


@pytest.fixture
def bucket(tmp_path) -> Path:
    """A directory used as a bucket."""
    return tmp_path / "bucket"


@pytest.fixture
def remote(bucket) -> RemoteStore:
    return RemoteStore(bucket.as_uri())


@pytest.fixture
def other(tmp_path) -> Path:
    """The run directory on another machine."""
    return tmp_path / "other" / "run"


def names(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def copied(run: Path, *steps: int) -> set[str]:
    """Return what the bucket should hold of a run. Two of the files that Orbax writes are not needed."""
    small_files = {name for name in FILES if (run / name).exists()}
    return small_files.union(
        *({f"checkpoints/{s}/{name}" for name in names(run / f"checkpoints/{s}") - NOT_IN_THE_TABLE} for s in steps),
        {f"checkpoints/{step}/manifest.json" for step in steps},
    )


def upload(remote: RemoteStore, run: Path, *steps: int) -> None:
    for step in steps:
        (run / "metrics.jsonl").write_text(lines_to(step))
        assert remote.upload(run, step, keep=STEPS, files=FILES).step == step


def check_run(run: Path) -> list[int]:
    """Return the steps of a run's checkpoints, after a check that each is intact and has its metrics."""
    steps = [checkpoint.step for checkpoint in list_checkpoints(run / "checkpoints")]
    for step in steps:
        checkpoint = run / "checkpoints" / str(step)
        for name, entry in json.loads((checkpoint / "manifest.json").read_text())["files"].items():
            assert integrity.describe_file(checkpoint / name) == entry
        assert f'{{"step": {step}}}\n' in (run / "metrics.jsonl").read_text()
    return steps


class Store:
    """Log the operations of obstore on a local disk, with a hook that gets number, kind and name, and may raise."""

    def __init__(self, monkeypatch, hook=lambda *operation: None) -> None:
        self.log, self.in_flight, self.max_in_flight = [], 0, 0
        self._hook, self._lock = hook, threading.Lock()
        for method, kind in (("list", "list"), ("get", "read"), ("put", "write"), ("delete", "delete")):
            monkeypatch.setattr(LocalStore, method, self._logged(kind, getattr(LocalStore, method)))
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def _logged(self, kind, method):
        def call(store, path, *args, **options):
            name = path.rsplit("bucket/", 1)[-1] if kind != "list" else ""
            with self._lock:
                self.log.append((kind, name))
                number = len(self.log)
                self.in_flight += 1
                self.max_in_flight = max(self.max_in_flight, self.in_flight)
            try:
                self._hook(number, kind, name)
                return method(store, path, *args, **options)
            finally:
                with self._lock:
                    self.in_flight -= 1

        return call


class KilledError(BaseException):
    """The process is killed."""


@contextlib.contextmanager
def interrupted(monkeypatch, at: int, how: str):
    """Fail or kill the process at an operation of the store. Yield a list that holds whether that happened."""

    def hook(number, kind, name):
        if number == at:
            happened.append(True)
            raise KilledError if how == "killed" else GenericError("connection lost")

    happened = []
    with monkeypatch.context() as patch:
        Store(patch, hook)
        with contextlib.suppress(RemoteError, KilledError):
            yield happened


# Upload and download


@pytest.fixture(scope="module")
def servers():
    """Start a server on demand; return the URL of a bucket with a scheme, and the environment that leads there."""
    with contextlib.ExitStack() as stack:
        started = {}

        def start(scheme: str) -> tuple[str, dict[str, str]]:
            server = SERVERS[scheme]
            if server not in started:
                started[server] = stack.enter_context(server())
            return f"{scheme}://bucket", ENDPOINTS[scheme](started[server])

        yield start


@pytest.mark.parametrize("scheme", ["s3", "gs", "az", "file"])
def test_run_moves_to_another_machine(scheme, servers, tmp_path, monkeypatch, other):
    run, url = tmp_path / "run", (tmp_path / "bucket" / "a run").as_uri()
    if scheme != "file":
        bucket, environment = servers(scheme)
        url = f"{bucket}/a run of {scheme}"
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
    checkpointer = Checkpointer(run / "checkpoints", keep=9)
    for step in STEPS:
        (run / "metrics.jsonl").write_text(lines_to(step))
        checkpointer.save(step, {"w": jnp.arange(1000.0) + step}, metadata={"saved at": step}, wait=True)
    checkpointer.close()
    here, there = RemoteStore(url), RemoteStore(f"{url}/")
    assert there.newest_step() is None
    assert there.download(other, files=FILES) == Downloaded([], {})
    assert not other.exists()
    for step in STEPS:
        here.upload(run, step, keep=STEPS[-2:], files=FILES)
    assert there.newest_step() == 30
    assert there.download(other, files=FILES) == Downloaded([20, 30], {})
    assert names(other) == copied(run, 20, 30)
    for name in names(other):
        assert (other / name).read_bytes() == (run / name).read_bytes()
    checkpointer = Checkpointer(other / "checkpoints")
    restored = checkpointer.restore({"w": jnp.zeros(1000)})
    assert (restored.step, restored.state["w"][7], restored.metadata) == (30, 37.0, {"saved at": 30})
    checkpointer.close()
    ObjectStore(url, 60.0).write("checkpoints/30/state/_METADATA", b"x")
    shutil.rmtree(other)
    downloaded = there.download(other, files=FILES)
    assert downloaded.steps == check_run(other) == [20]
    assert "state/_METADATA" in downloaded.refused[30]


@pytest.mark.parametrize(
    "url",
    [
        *("", "/tmp/run", "http://host/path", "file://host/x", "file:///", "s3://", "s3://B!"),
        *("gs://bucket/x#y", "az://bucket/x?y", "s3://bucket/\nx", "s3://bucket/x//y", "s3://bucket/..", "az:///x"),
    ],
)
def test_unsupported_url_is_refused(url):
    with pytest.raises(
        ValueError, match=r"use s3://bucket/path, gs://bucket/path, az://container/path or file:///path$"
    ):
        RemoteStore(url)


@pytest.mark.parametrize("url", ["s3://me:hunter2@bucket/x", "gs://bucket/x?token=hunter2", "s3://bucket/#hunter2"])
def test_password_in_url_is_not_printed(url):
    with pytest.raises(ValueError, match="s3://bucket/path") as refusal:
        RemoteStore(url)
    assert "hunter2" not in str(refusal.value)


def test_delete_is_done_if_the_file_is_gone(bucket):
    """The answer to an earlier try may be lost."""
    ObjectStore(bucket.as_uri(), 60.0).delete("checkpoints/10/manifest.json")


# Interruptions


def first_upload(remote, run, bucket):
    upload(remote, run, 10)
    return {10}


def same_step_with_other_bits(remote, run, bucket):
    upload(remote, run, 10, 20)
    save(run, 20, content="other state")
    return {10, 20}


def leftovers(remote, run, bucket):
    upload(remote, run, *STEPS)
    for step in STEPS:
        (bucket / f"checkpoints/{step}/manifest.json").unlink()
    (bucket / "checkpoints/20/state/of another layout").touch()
    return set()


@pytest.mark.parametrize("how", ["failed", "killed"])
@pytest.mark.parametrize("before", [first_upload, same_step_with_other_bits, leftovers])
def test_interrupted_upload_never_counts(remote, run, bucket, other, tmp_path, monkeypatch, before, how):
    committed = before(remote, run, bucket)
    (run / "metrics.jsonl").write_text(lines_to(20))
    shutil.copytree(bucket, tmp_path / "template")
    for at in itertools.count(1):
        for path in (bucket, other):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(tmp_path / "template", bucket)
        with interrupted(monkeypatch, at, how) as happened:
            remote.upload(run, 20, keep=[10, 20], files=FILES)
        downloaded = remote.download(other, files=FILES)
        assert downloaded.refused == {}
        assert check_run(other) == downloaded.steps
        assert committed - {20} <= set(downloaded.steps) <= committed | {20}
        remote.upload(run, 20, keep=[10, 20], files=FILES)
        assert names(bucket) == copied(run, *(committed | {20}))
        if not happened:
            break
    assert at > 8


def test_interrupted_download_is_repaired(remote, run, other, monkeypatch):
    upload(remote, run, *STEPS)
    for at in itertools.count(1):
        shutil.rmtree(other, ignore_errors=True)
        with interrupted(monkeypatch, at, "killed") as happened:
            remote.download(other, files=FILES)
        assert bool(list_checkpoints(other / "checkpoints")) != bool(happened)
        remote.download(other, files=FILES)
        assert check_run(other) == [10, 20, 30]
        if not happened:
            break
    assert at > 15


def test_manifest_is_written_last_and_deleted_first(remote, run, monkeypatch):
    upload(remote, run, 10)
    save(run, 20, more_files=9)

    def wait_for_others(number, kind, name):
        deadline_s = time.monotonic() + 9
        while name.startswith("checkpoints/20/state/") and store.max_in_flight < object_store.CONCURRENCY:
            assert time.monotonic() < deadline_s
            time.sleep(0.001)

    store = Store(monkeypatch, wait_for_others)
    remote.upload(run, 20, keep=[], files=FILES)
    changes = [operation for operation in store.log if operation[0] in ("write", "delete")]
    written = [name for kind, name in changes if kind == "write"]
    deleted = [name for kind, name in changes if kind == "delete"]
    assert [kind for kind, _ in changes] == ["write"] * len(written) + ["delete"] * len(deleted)
    assert written[:2] == ["config.json", "metrics.jsonl"]
    assert [name.endswith("manifest.json") for name in written] == [False] * (len(written) - 1) + [True]
    assert [name.endswith("manifest.json") for name in deleted] == [True] + [False] * (len(deleted) - 1)
    assert store.max_in_flight == object_store.CONCURRENCY


def test_checkpoint_removed_during_upload_never_counts(remote, run, bucket, tmp_path, monkeypatch):
    ends = set()
    for at in itertools.count(1):
        shutil.rmtree(bucket, ignore_errors=True)
        save(run, 10)

        def hook(number, kind, name, at=at):
            if number == at:
                shutil.rmtree(run / "checkpoints" / "10")

        with monkeypatch.context() as patch, contextlib.suppress(RemoteError):
            store = Store(patch, hook)
            remote.upload(run, 10, keep=[], files=FILES)
        ends.add(remote.newest_step())
        if len(store.log) < at:
            break
        remote.download(tmp_path / f"other {at}", files=FILES)
        check_run(tmp_path / f"other {at}")
    assert ends == {None, 10}


# What is uploaded and what is deleted


def test_only_copies_that_are_not_kept_are_deleted(remote, bucket, run):
    foreign = {
        *("README", "checkpoints/README", "checkpoints/040/manifest.json", "checkpoints/x/manifest.json"),
        *("checkpoints/20/state/a\\b", "checkpoints/20/x"),
    }
    for name in foreign:
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).touch()
    upload(remote, run, *STEPS)
    assert names(bucket) == copied(run, *STEPS) | foreign
    remote.upload(run, 30, keep=[10], files=FILES)
    assert names(bucket) == copied(run, 10, 30) | foreign
    assert remote.newest_step() == 30


def test_copy_on_a_disk_is_durable_before_its_manifest(remote, bucket, run, monkeypatch):
    synced = []
    fsync_with(monkeypatch, lambda path: synced.append((path, (bucket / "checkpoints/10/manifest.json").exists())))
    upload(remote, run, 10)
    files = {bucket / name for name in copied(run, 10)}
    manifest = bucket / "checkpoints/10/manifest.json"
    assert {path for file in files - {manifest} for path in (file, file.parent)} <= {
        path for path, is_committed in synced if not is_committed
    }
    assert synced[-2:] == [(manifest, True), (manifest.parent, True)]


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_large_file_is_uploaded_in_parts(servers, tmp_path, monkeypatch, scheme):
    """The servers that implement S3 number the parts in the ETag."""
    bucket, environment = servers(scheme)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "PART_BYTES", 6 * 2**20)  # S3 accepts 5 and more.
    content = os.urandom(26 * 2**20)
    store = ObjectStore(f"{bucket}/large", 60.0)
    for size in (len(content), 0):
        store.write(f"state/{size}", content[:size])
        assert store.read(f"state/{size}", size) == content[:size]
    [endpoint] = [value for value in environment.values() if value.startswith("http://127")]
    with build_opener(ProxyHandler({})).open(f"{endpoint}/bucket/large/state/{len(content)}") as answer:
        assert answer.headers["ETag"].strip('"').endswith("-5")


def test_newer_copy_is_never_replaced(remote, bucket, run, other):
    """The local checkpoint was corrupt and the run resumed from the one before, but the copy is intact."""
    upload(remote, run, *STEPS)
    before = snapshot(bucket)
    with pytest.raises(RemoteError, match="step 30 is newer"):
        remote.upload(run, 20, keep=[20], files=FILES)
    assert snapshot(bucket) == before
    save(other, 10)
    assert remote.download(other, files=FILES) == Downloaded([20, 30], {})


def test_identical_copy_is_written_only_if_incomplete(remote, bucket, run, monkeypatch):
    upload(remote, run, 10)
    store = Store(monkeypatch)
    upload(remote, run, 10)
    assert [name for kind, name in store.log if kind == "write"] == ["config.json", "metrics.jsonl"]
    (bucket / "checkpoints/10/state/a").unlink()
    upload(remote, run, 10)
    assert names(bucket) == copied(run, 10)


@pytest.mark.parametrize(
    ("name", "content"), [("state/a", None), ("state/a", b"x"), ("state/d/b", bytes(99)), ("manifest.json", b"[]")]
)
def test_corrupt_checkpoint_replaces_no_copy(remote, bucket, run, name, content):
    upload(remote, run, 10, 20)
    save(run, 20, content="other state")
    before = {path: path.read_bytes() for path in bucket.rglob("*") if path.is_file()}
    file = run / "checkpoints" / "20" / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(RemoteError, match=rf"step 20 was not uploaded: .*{name}"):
        upload(remote, run, 20)
    assert {path: path.read_bytes() for path in bucket.rglob("*") if path.is_file()} == before


def test_symbolic_links_are_not_uploaded(remote, bucket, run, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (run / "events.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(RemoteError, match=r"events\.jsonl"):
        upload(remote, run, 10)
    (run / "events.jsonl").unlink()
    (run / "checkpoints/10/state/a").rename(tmp_path / "a")
    (run / "checkpoints/10/state/a").symlink_to(tmp_path / "a")
    with pytest.raises(RemoteError, match="state/a"):
        upload(remote, run, 10)
    assert names(bucket) == {"config.json", "metrics.jsonl"}


# Background uploads


@pytest.fixture
def held(bucket, monkeypatch):
    """A remote store whose uploads start, and wait until `go_on` is set."""
    remote, began, go_on = RemoteStore(bucket.as_uri()), threading.Event(), threading.Event()
    upload = RemoteStore.upload

    def wait_and_upload(self, run, step, **options):
        began.set()
        assert go_on.wait(60)
        return upload(self, run, step, **options)

    monkeypatch.setattr(RemoteStore, "upload", wait_and_upload)
    return remote, began, go_on


def test_upload_replaces_one_that_has_not_started(held, bucket, run):
    remote, began, go_on = held
    assert remote.wait(0)
    remote.begin_upload(run, 10, keep=STEPS, files=FILES)
    assert began.wait(60)
    for step in (20, 10, 20, 30):
        remote.begin_upload(run, step, keep=STEPS, files=FILES)
        assert remote.uploading_steps == {10, step}
    assert not remote.wait(0.01)
    assert remote.results() == []
    go_on.set()
    assert remote.wait(60)
    assert [result.step for result in remote.results()] == [10, 30]
    assert remote.results() == []
    assert remote.uploading_steps == set()
    assert names(bucket) == copied(run, 10, 30)


def test_background_errors_are_returned_and_uploads_continue(remote, bucket, run, monkeypatch):
    def begin(step):
        remote.begin_upload(run, step, keep=STEPS, files=FILES)
        assert remote.wait(60)

    bucket.write_text("not a directory")
    begin(10)
    bucket.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(module.json, "loads", lambda text: 1 / 0)
        begin(10)
    begin(20)
    failed, unexpected, uploaded = remote.results()
    assert isinstance(failed, RemoteError)
    assert str(unexpected) == f"{bucket.as_uri()}: ZeroDivisionError: division by zero"
    assert isinstance(uploaded, Uploaded)


# Download into a directory that is not empty


def test_only_newer_copies_are_downloaded(remote, run, other):
    upload(remote, run, *STEPS)
    save(other, 20, content="my state")
    mine = snapshot(other / "checkpoints" / "20")
    assert remote.download(other, files=FILES) == Downloaded([30], {})
    assert snapshot(other / "checkpoints" / "20") == mine
    assert check_run(other) == [20, 30]
    (other / "metrics.jsonl").write_text("of later steps")
    assert remote.download(other, files=FILES) == Downloaded([], {})
    assert (other / "metrics.jsonl").read_text() == "of later steps"


def test_corrupt_copy_is_refused_before_anything_changes(remote, bucket, run, other, tmp_path):
    upload(remote, run, *STEPS)
    (bucket / "checkpoints/30/state/d/b").write_bytes(bytes(99))
    save(other, 25)
    before = snapshot(other)
    assert [*remote.download(other, files=FILES).refused] == [30]
    assert {path: kept for path, kept in snapshot(other).items() if path in before}.keys() == before.keys()
    assert (other / "metrics.jsonl").read_text() == lines_to(25)
    assert remote.download(tmp_path / "empty", files=FILES).steps == check_run(tmp_path / "empty") == [10, 20]


def test_metrics_are_downloaded_before_checkpoints(remote, run, other):
    upload(remote, run, *STEPS)
    (other / "metrics.jsonl").mkdir(parents=True)  # It cannot be replaced.
    with pytest.raises(RemoteError, match=r"metrics\.jsonl"):
        remote.download(other, files=FILES)
    assert list_checkpoints(other / "checkpoints") == []


def fsync_with(monkeypatch, hook) -> None:
    """Call a hook with the path that `os.fsync` gets."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: hook(Path(os.readlink(f"/proc/self/fd/{descriptor}"))))


def test_download_is_durable_before_it_appears(remote, run, other, monkeypatch):
    upload(remote, run, 10)
    synced = []
    fsync_with(monkeypatch, lambda path: synced.append((path, (other / "checkpoints" / "10").exists())))
    remote.download(other, files=FILES)
    unfinished = other / "checkpoints" / f"10{UNFINISHED}"
    files = {unfinished / name for name in names(run / "checkpoints" / "10")}
    directories = {directory for file in files for directory in file.parents if directory.is_relative_to(unfinished)}
    before = {path for path, has_appeared in synced if not has_appeared}
    assert files | directories | {other, other / "metrics.jsonl.partial"} <= before
    assert synced[-1] == (other / "checkpoints", True)


def test_full_disk_refuses_only_the_copy_that_does_not_fit(remote, run, other, monkeypatch):
    upload(remote, run, *STEPS)

    def hook(path: Path) -> None:
        if f"20{UNFINISHED}" in path.parts:
            raise OSError(28, "No space left on device", str(path))

    fsync_with(monkeypatch, hook)
    downloaded = remote.download(other, files=FILES)
    assert downloaded.steps == check_run(other) == [10, 30]
    assert "No space left" in downloaded.refused[20]
    assert not list((other / "checkpoints").glob(f"*{UNFINISHED}"))


# Copies are untrusted


def put_manifest(bucket: Path, step: int, files: object) -> None:
    """Put a copy in the bucket, of which only the manifest and a file of 5 bytes exist."""
    state = bucket / "checkpoints" / str(step) / "state"
    state.mkdir(parents=True, exist_ok=True)
    (state / "a").write_text("12345")
    (state.parent / "manifest.json").write_text(json.dumps({"files": files}))


@pytest.mark.parametrize(
    "name",
    ["", "..", "/etc/passwd", "state/../../../x", "state/./x", "state//x", "state", "x", "manifest.json", "state/\nx"],
)
def test_name_outside_the_checkpoint_is_refused(remote, bucket, other, tmp_path, name):
    put_manifest(bucket, 10, {name: {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}})
    with pytest.raises(RemoteError, match=r"step 10: manifest\.json lists"):
        remote.download(other, files=FILES)
    assert names(tmp_path) - names(tmp_path / "run") == {
        f"bucket/checkpoints/10/{name}" for name in ("manifest.json", "state/a")
    }


parts = st.sampled_from(["", ".", "..", "a", "state", "\\", "\0", "manifest.json", "\u202e", "C:"]) | st.text(
    max_size=3
)
values = st.none() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.integers(), max_size=2)
rows = st.fixed_dictionaries({"bytes": st.integers(0, 5) | values, "sha256": st.just("") | values})
tables = st.dictionaries(st.just("state/a") | st.lists(parts, max_size=5).map("/".join), rows | values, max_size=3)


@given(manifest=(tables | values).map(lambda files: json.dumps({"files": files}).encode()) | st.binary(max_size=20))
@settings(max_examples=50)
def test_any_manifest_is_accepted_or_refused(tmp_path_factory, manifest):
    base = tmp_path_factory.mktemp("any")
    put_manifest(base / "bucket", 10, {})
    (base / "bucket/checkpoints/10/manifest.json").write_bytes(manifest)
    before = names(base)
    with contextlib.suppress(RemoteError):
        assert RemoteStore((base / "bucket").as_uri()).download(base / "run", files=FILES) == Downloaded([10], {})
    assert all(name.startswith("run/checkpoints/10/") for name in names(base) - before)
    shutil.rmtree(base)


@pytest.mark.parametrize("size", [10**30, 2**31, 6, 3, -1, 1.5, True, None, "5"])
def test_wrong_size_is_refused(remote, bucket, other, size):
    put_manifest(bucket, 10, {"state/a": {"bytes": size, "sha256": hashlib.sha256(b"12345").hexdigest()}})
    with pytest.raises(RemoteError, match="state/a"):
        remote.download(other, files=FILES)
    assert names(other) == set()


def test_oversized_file_is_not_read(remote, bucket, run, other, monkeypatch):
    upload(remote, run, 10)
    monkeypatch.setattr(module, "MAX_SMALL_FILE_BYTES", 10)
    with pytest.raises(RemoteError, match=r"metrics\.jsonl has more than 10 bytes"):
        remote.download(other, files=FILES)
    assert list_checkpoints(other / "checkpoints") == []
    os.truncate(bucket / "checkpoints/10/manifest.json", module.MAX_MANIFEST_BYTES + 1)
    store = Store(monkeypatch)
    with pytest.raises(RemoteError, match=r"manifest\.json has more than"):
        remote.download(other, files=FILES)
    assert [kind for kind, _ in store.log] == ["list", "read"]


def test_run_does_not_start_over_if_no_copy_is_valid(remote, bucket, other):
    put_manifest(bucket, 20, {"state/b": {"bytes": 3, "sha256": ""}})
    put_manifest(bucket, 30, {"x": {"bytes": 3, "sha256": ""}})
    with pytest.raises(RemoteError, match=r"step 20: state/b is missing.*; step 30: .* lists 'x'"):
        remote.download(other, files=FILES)
    save(other, 10)
    assert sorted(remote.download(other, files=FILES).refused) == [20, 30]


def test_links_in_the_run_directory_are_not_followed(remote, run, tmp_path, other):
    upload(remote, run, *STEPS)
    outside = tmp_path / "outside"
    (outside / "state").mkdir(parents=True)
    (outside / "file").write_text("mine")
    before = snapshot(outside)
    (other / "checkpoints").mkdir(parents=True)
    (other / "checkpoints" / f"30{UNFINISHED}").symlink_to(outside)
    for name in ("metrics.jsonl", "metrics.jsonl.partial"):
        (other / name).symlink_to(outside / "file")
    assert remote.download(other, files=FILES).steps == [*STEPS]
    assert not (other / "metrics.jsonl").is_symlink()
    shutil.rmtree(other)
    other.mkdir()
    (other / "checkpoints").symlink_to(outside)
    with pytest.raises(RemoteError, match="is a symbolic link"):
        remote.download(other, files=FILES)
    assert snapshot(outside) == before


# Servers that fail


def operations(remote: RemoteStore, run: Path):
    return (
        remote.newest_step,
        lambda: remote.upload(run, 10, keep=STEPS, files=FILES),
        lambda: remote.download(run.parent / "other", files=FILES),
    )


@pytest.mark.parametrize("scheme", ENDPOINTS)
def test_closed_port_is_reported_in_time(monkeypatch, scheme):
    with closed_port() as port:
        for name, value in ENDPOINTS[scheme](port).items():
            monkeypatch.setenv(name, value)
        remote = RemoteStore(f"{scheme}://bucket/run", timeout_s=2)
        started = time.monotonic()
        with pytest.raises(RemoteError, match=f"^{scheme}://bucket/run: .*could not connect: Connection refused$"):
            remote.newest_step()
        assert time.monotonic() - started < 30  # a second, and what a busy machine adds


@pytest.mark.parametrize("scheme", ENDPOINTS)
def test_silent_server_blocks_nothing(run, monkeypatch, scheme):
    with answering_server() as (port, answer):
        answer.silent = True
        for name, value in ENDPOINTS[scheme](port).items():
            monkeypatch.setenv(name, value)
        remote = RemoteStore(f"{scheme}://bucket/run", timeout_s=0.1)
        for operation in (*operations(remote, run), *[remote.newest_step] * 2 * object_store.CONCURRENCY):
            started = time.monotonic()
            with pytest.raises(RemoteError, match=rf"^{scheme}://bucket/run: .*no answer in 0\.1 s$"):
                operation()
            assert time.monotonic() - started < 2
        answer.silent, answer.body = False, b"<ListBucketResult/>" if scheme != "az" else EMPTY_CONTAINER
        deadline_s = time.monotonic() + 60
        while True:  # The lost requests take no place of later ones.
            try:
                assert remote.newest_step() is None
                break
            except RemoteError:  # 0.1 s is short on a busy machine.
                assert time.monotonic() < deadline_s


def test_server_that_stops_in_the_middle_is_reported_in_time(monkeypatch):
    with answering_server() as (port, answer):
        answer.stops, answer.body = True, b"half"
        for name, value in s3_environment(port).items():
            monkeypatch.setenv(name, value)
        started = time.monotonic()
        with pytest.raises(RemoteError, match=r"config\.json cannot be read: no answer in 0\.1 s$"):
            RemoteStore("s3://bucket/run", timeout_s=0.1).read("config.json")
        assert time.monotonic() - started < 2


def test_failed_requests_are_repeated(monkeypatch):
    with answering_server() as (port, answer):
        answer.status = 503
        for name, value in s3_environment(port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RemoteError, match="503"):
            RemoteStore("s3://bucket/run", timeout_s=1).newest_step()
        assert len(answer.requests) == 1 + object_store.TRIES


def test_secrets_are_not_printed(run, monkeypatch):
    key, secret = CREDENTIALS.values()
    with answering_server() as (port, answer):
        answer.status = 403
        answer.body = (
            f"<?xml version='1.0'?><Error><Code>SignatureDoesNotMatch</Code><Message>{key} is\nnot {secret}</Message>"
            f"<AWSAccessKeyId>{key}</AWSAccessKeyId><StringToSign>{secret}</StringToSign></Error>"
        ).encode()
        for name, value in s3_environment(port).items():
            monkeypatch.setenv(name, value)
        for operation in operations(RemoteStore("s3://bucket/run", timeout_s=60), run):
            with pytest.raises(RemoteError, match=r"^s3://bucket/run: .*credentials") as failure:
                operation()
            text = str(failure.value)
            assert "SignatureDoesNotMatch: (secret) is not (secret);" in text
            assert [part for part in (key, secret, "\n", "<") if part in text] == []


def test_signature_in_a_url_is_not_printed(monkeypatch):
    """obstore omits such a URL from its messages."""
    with answering_server() as (port, answer):
        answer.status = 400
        for name, value in azure_environment(port).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RemoteError, match="400 Bad Request") as failure:
            RemoteStore("az://bucket/run", timeout_s=60).newest_step()
        assert "sig" not in str(failure.value)


# Credentials and regions


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory without credentials, of a user whose environment has none."""
    for name in ("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / ".aws").mkdir(parents=True)
    return tmp_path / "home"


def use_server(monkeypatch, port: int) -> None:
    for name, value in s3_environment(port).items():
        if name not in CREDENTIALS:
            monkeypatch.setenv(name, value)


PROFILES = {
    "keys": "[work]\naws_access_key_id = AKIAWORK\naws_secret_access_key = a%b\naws_session_token = token\n",
    "process": "[work]\ncredential_process = echo "
    + json.dumps({"Version": 1, "AccessKeyId": "AKIAWORK", "SecretAccessKey": "b", "SessionToken": "token"}).replace(
        '"', '\\"'
    ),
}


@pytest.mark.parametrize("kind", PROFILES)
def test_credentials_of_a_profile_are_found(home, monkeypatch, kind):
    (home / ".aws" / "credentials").write_text(PROFILES[kind])
    (home / ".aws" / "config").write_text("[default]\naws_access_key_id = AKIADEFAULT\n[profile work]\nregion = x\n")
    monkeypatch.setenv("AWS_PROFILE", "work")
    with answering_server() as (port, answer):
        answer.body = b"<ListBucketResult/>"
        use_server(monkeypatch, port)
        assert RemoteStore("s3://bucket/run", timeout_s=60).newest_step() is None
    [(_, headers)] = answer.requests
    headers = {name.lower(): value for name, value in headers.items()}
    assert "Credential=AKIAWORK/" in headers["authorization"]
    assert headers["x-amz-security-token"] == "token"


def test_unusable_credentials_are_reported(home, monkeypatch):
    (home / ".aws" / "config").write_text("not a profile")
    with pytest.raises(RemoteError, match=r"s3://bucket/run: .*\.aws/config"):
        RemoteStore("s3://bucket/run", timeout_s=1).newest_step()
    (home / "gcloud.json").write_text('{"type": "external_account"}')
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(home / "gcloud.json"))
    monkeypatch.setitem(sys.modules, "google.auth", None)
    with pytest.raises(RemoteError, match=r"gcloud\.json has the type 'external_account'.*google-auth"):
        RemoteStore("gs://bucket/run", timeout_s=1).newest_step()


@pytest.mark.parametrize("status", [200, 301, 403])
def test_amazon_is_asked_for_the_region_of_a_bucket(monkeypatch, status):
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (CREDENTIALS | NEARBY | {"AWS_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)
    with answering_server() as (port, answer):
        answer.status, answer.headers = status, {"x-amz-bucket-region": "eu-north-1"}
        monkeypatch.setattr(object_store, "AMAZON", f"http://127.0.0.1:{port}")
        options = object_store.s3_options("bucket", 60.0)
    assert options["region"] == "eu-north-1"
    assert [method for method, _ in answer.requests] == ["HEAD"]


def test_missing_bucket_is_reported(servers, run, monkeypatch):
    _, environment = servers("s3")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for operation in operations(RemoteStore("s3://no-such-bucket/run", timeout_s=60), run):
        with pytest.raises(RemoteError, match="NoSuchBucket"):
            operation()
