"""The copy of a run in an object store: on servers like S3 and GCS, and where there are many cases on a disk."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st
from object_store import (
    CREDENTIALS,
    answering_server,
    closed_port,
    gcs_environment,
    gcs_server,
    s3_environment,
    s3_server,
)
from runs import snapshot
from tampering import NOT_IN_THE_TABLE, update_files

from mnist_jax.checkpoint import integrity
from mnist_jax.checkpoint import remote as module
from mnist_jax.checkpoint.checkpoint import list_checkpoints
from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.checkpoint.remote import Downloaded, RemoteError, RemoteStore, Uploaded

STEPS = (10, 20, 30)
FILES = ("config.json", "metrics.jsonl", "events.jsonl")
ENDPOINTS = {"s3": s3_environment, "gs": gcs_environment}


def tree(step: int, shift: float = 0.0) -> dict:
    return {"w": jnp.arange(1000.0) + step + shift, "step": jnp.int32(step)}


def metrics_to(step: int) -> str:
    return "".join(f'{{"step": {logged}}}\n' for logged in range(10, step + 1, 10))


def save(run: Path, *steps: int, shift: float = 0.0) -> None:
    """Save checkpoints in a run, and before each the line that leads to it."""
    store = Checkpointer(run / "checkpoints", keep=9)
    for step in steps:
        (run / "metrics.jsonl").write_text(metrics_to(step))
        store.save(step, tree(step, shift), metadata={"saved at": step}, wait=True)
    store.close()


LENGTHS = itertools.count(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run with three checkpoints, to be copied."""
    run = tmp_path_factory.mktemp("saved") / "run"
    save(run, *STEPS)
    (run / "config.json").write_text('{"seed": 1}')
    return run


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture
def bucket(tmp_path) -> Path:
    """A directory that plays the bucket."""
    return tmp_path / "bucket"


@pytest.fixture
def mirror(bucket) -> RemoteStore:
    """A mirror that does not wait for the disk: it is about what is written, and there are many cases."""
    mirror = RemoteStore(bucket.as_uri())
    mirror._spec["file_io_sync"] = False
    return mirror


def fsync_with(monkeypatch, fsync_path) -> None:
    for imported in (module, integrity):
        monkeypatch.setattr(imported, "fsync_path", fsync_path)


@pytest.fixture
def impatient(monkeypatch) -> None:
    """The other side does not wait for the disk either."""
    fsync_with(monkeypatch, lambda path: None)


@pytest.fixture(scope="module")
def servers():
    """The object stores that have been started, by the name of the scheme."""
    with contextlib.ExitStack() as stack:
        started = {}

        def start(scheme: str) -> tuple[str, dict[str, str]]:
            if scheme not in started:
                started[scheme] = stack.enter_context({"s3": s3_server, "gs": gcs_server}[scheme]())
            return started[scheme]

        yield start


@pytest.fixture(params=["s3", "gs", "file"])
def url(request, servers, tmp_path, monkeypatch) -> str:
    """A place of its own in each kind of store."""
    if request.param == "file":
        return (tmp_path / "bucket" / "a run").as_uri()
    bucket, environment = servers(request.param)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # The emulator of Google's lists what comes after a prefix too; of names of other lengths nothing is left to see.
    return f"{bucket}/{'r' * next(LENGTHS)}/a run"


def names(bucket: Path) -> set[str]:
    return {path.relative_to(bucket).as_posix() for path in bucket.rglob("*") if path.is_file()}


def names_of(run: Path, *steps: int) -> set[str]:
    """Return what the bucket should hold of a run: the small files and the files of these checkpoints that count."""
    checkpoints = (f"checkpoints/{step}/{name}" for step in steps for name in counting(run / "checkpoints" / str(step)))
    return {*checkpoints, *(name for name in names(run) if name in FILES)}


def counting(checkpoint: Path) -> set[str]:
    """Return the manifest of a checkpoint and what it lists; Orbax writes two more files, and needs neither."""
    return names(checkpoint) - NOT_IN_THE_TABLE | {"manifest.json"}


def push_all(mirror: RemoteStore, run: Path, *steps: int) -> None:
    for step in steps:
        (run / "metrics.jsonl").write_text(metrics_to(step))
        assert mirror.upload(run, step, keep=STEPS, files=FILES).step == step


def check_whole(run: Path) -> list[int]:
    """Return the steps of a run's checkpoints, each of which is whole and has the line that leads to it."""
    checkpoints = list_checkpoints(run / "checkpoints")
    for checkpoint in checkpoints:
        checkpoint.verify()
        assert f'{{"step": {checkpoint.step}}}\n' in (run / "metrics.jsonl").read_text()
    return [checkpoint.step for checkpoint in checkpoints]


# The way there and back


def test_a_run_comes_back_on_another_machine_and_restores_to_the_same_digest(url, run, tmp_path):
    there, back = RemoteStore(url), RemoteStore(url)
    assert back.newest_step() is None
    assert back.download(tmp_path / "early", files=FILES) == Downloaded([], {})
    assert not (tmp_path / "early").exists()
    for step in STEPS:
        assert str(there.upload(run, step, keep=STEPS[-2:], files=FILES)).startswith(
            f"the checkpoint of step {step} was"
        )
    assert back.newest_step() == 30
    other = tmp_path / "other" / "run"
    assert back.download(other, files=FILES) == Downloaded([20, 30], {})
    assert names(other) == names_of(run, 20, 30)
    for name in names(other):
        assert (other / name).read_bytes() == (run / name).read_bytes()
    store = Checkpointer(other / "checkpoints")
    restored = store.restore(tree(0))
    assert (restored.step, restored.state_sha256) == (
        30,
        list_checkpoints(run / "checkpoints")[-1].manifest()["state_sha256"],
    )
    assert restored.state["w"][7] == 37.0
    assert restored.metadata == {"saved at": 30}
    assert store.removed == ()
    store.close()


def test_files_larger_than_a_piece_and_empty_ones_come_back(mirror, run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    checkpoint = run / "checkpoints" / "10"
    (checkpoint / "state" / "empty").touch()
    update_files(checkpoint)
    mirror.upload(run, 10, keep=[], files=[])
    mirror.download(tmp_path / "other", files=[])
    assert names(tmp_path / "other") == names_of(run, 10) - {*FILES}
    for name in names(tmp_path / "other"):
        assert (tmp_path / "other" / name).read_bytes() == (run / name).read_bytes()


def test_a_path_is_a_directory_with_and_without_the_last_slash(bucket, run):
    RemoteStore(bucket.as_uri()).upload(run, 10, keep=[], files=[])
    assert (bucket / "checkpoints").is_dir()
    assert RemoteStore(bucket.as_uri() + "/").newest_step() == 10


@pytest.mark.parametrize(
    "url",
    [
        "",
        "runs/1",
        "/tmp/run",
        "http://host/path",
        "memory://x",
        "file:x",
        "file://host/x",
        "s3://",
        "gs://b",
        "s3://B!",
        "s3://bucket/x?versionId=1",
        "gs://bucket/x#y",
        "s3://bucket/\nx",
        "s3://[x/y",
    ],
)
def test_a_url_that_is_no_place_is_refused_with_those_that_are(url):
    with pytest.raises(ValueError, match=r"is no place .* use s3://bucket/path, gs://bucket/path or file:///path$"):
        RemoteStore(url)


@pytest.mark.parametrize("url", ["s3://me:hunter2@bucket/x", "gs://bucket/x?token=hunter2", "s3://bucket/#hunter2"])
def test_a_password_in_a_url_is_not_repeated(url):
    with pytest.raises(ValueError, match="nothing else") as refusal:
        RemoteStore(url)
    assert "hunter2" not in str(refusal.value)


def test_the_usual_variables_name_another_server_and_its_credential(monkeypatch):
    def spec(**variables: str) -> dict:
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            for name, value in variables.items():
                patch.setenv(name, value)
            full = RemoteStore("s3://bucket/x")._spec
            return {name: full[name] for name in ("endpoint", "aws_region", "aws_credentials") if name in full}

    assert spec() == spec(AWS_REGION="eu-west-1") == {}
    near = {"endpoint": "http://near:1", "aws_region": "eu-west-1"}
    assert spec(AWS_ENDPOINT_URL="http://near:1/", AWS_DEFAULT_REGION="eu-west-1") == near
    assert spec(AWS_ENDPOINT_URL="http://far", AWS_ENDPOINT_URL_S3="http://near:1", AWS_REGION="eu-west-1") == near
    assert spec(**CREDENTIALS) == {"aws_credentials": {"type": "environment"}}
    assert spec(AWS_ACCESS_KEY_ID="only half") == {}


# What breaks off


class Store:
    """A store that does as `meddle` says with each operation, which is told its number, its kind and its name."""

    def __init__(self, monkeypatch, meddle) -> None:
        self.count, self.log = 0, []
        kvstore = tensorstore.KvStore
        fake = SimpleNamespace(Spec=kvstore.Spec, KeyRange=kvstore.KeyRange, open=self._open)
        monkeypatch.setattr(module, "ts", SimpleNamespace(KvStore=fake))
        self._meddle = meddle

    def _open(self, spec):
        self._real = tensorstore.KvStore.open(spec).result()
        return SimpleNamespace(result=lambda timeout: self)

    def _do(self, kind, name, work):
        self.count += 1
        self.log.append((kind, name))
        try:
            self._meddle(self.count, kind, name)
        except ValueError as error:
            return SimpleNamespace(result=lambda timeout, error=error: self._fail(error), cancel=lambda: None)
        return work()

    @staticmethod
    def _fail(error):
        raise error

    def list(self, within):
        return self._do("list", "", lambda: self._real.list(within))

    def read(self, name, **options):
        return self._do("read", name, lambda: self._real.read(name, **options))

    def write(self, name, data):
        kind = "delete" if data is None else "write"
        return self._do(kind, name, lambda: self._real.write(name, data))


class Killed(BaseException):
    """The process is no more."""


def first_push(mirror, run):
    push_all(mirror, run, 10)
    (run / "metrics.jsonl").write_text(metrics_to(20))
    return 20, [20], {10}


def same_step_anew(mirror, run):
    push_all(mirror, run, 10, 20)
    shutil.rmtree(run / "checkpoints" / "20")
    save(run, 20, shift=0.5)
    return 20, [10, 20], {10, 20}


def remains(mirror, run):
    """Others broke off before: one of this step, one of an earlier, one of a later."""
    push_all(mirror, run, *STEPS)
    for step in STEPS:
        os.remove(Path(mirror.url.removeprefix("file://")) / "checkpoints" / str(step) / "manifest.json")
    shutil.rmtree(run / "checkpoints" / "30")
    (Path(mirror.url.removeprefix("file://")) / "checkpoints" / "20" / "state" / "of another layout").touch()
    return 20, [10, 20, 30], set()


@pytest.mark.parametrize("how", ["failed", "killed"])
@pytest.mark.parametrize("before", [first_push, same_step_anew, remains])
@pytest.mark.usefixtures("impatient")
def test_wherever_a_push_breaks_off_what_counts_is_whole_and_the_next_push_repairs(
    bucket, mirror, run, tmp_path, monkeypatch, before, how
):
    step, keep, could_count = before(mirror, run)
    template = tmp_path / "template"
    shutil.copytree(bucket, template)
    for breaks_at in range(1, 100):
        shutil.rmtree(bucket)
        shutil.copytree(template, bucket)

        def meddle(number, kind, name, breaks_at=breaks_at):
            if number == breaks_at:
                raise Killed if how == "killed" else ValueError("UNAVAILABLE: the line is dead")

        with monkeypatch.context() as patch:
            store = Store(patch, meddle)
            try:
                mirror.upload(run, step, keep=keep, files=FILES)
                ended = True
            except (RemoteError, Killed):
                ended = False
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        fetched = mirror.download(tmp_path / "other", files=FILES)
        assert fetched.refused == {}
        assert check_whole(tmp_path / "other") == fetched.steps
        assert set(fetched.steps) <= could_count | {step}
        assert set(fetched.steps) >= (could_count & set(keep)) - {step}
        mirror.upload(run, step, keep=keep, files=FILES)
        there = sorted((could_count & set(keep)) | {step})
        assert names(bucket) == names_of(run, *there)
        if ended and store.count < breaks_at:
            break
    assert 8 < breaks_at < 99


def test_a_manifest_is_written_when_all_else_is_and_deleted_before_all_else(mirror, run, monkeypatch):
    mirror.upload(run, 10, keep=[], files=FILES)
    store = Store(monkeypatch, lambda *operation: None)
    mirror.upload(run, 20, keep=[], files=FILES)
    changes = [operation for operation in store.log if operation[0] in ("write", "delete")]
    written = [name for kind, name in changes if kind == "write"]
    deleted = [name for kind, name in changes if kind == "delete"]
    assert [kind for kind, _ in changes] == ["write"] * len(written) + ["delete"] * len(deleted)
    assert written[:2] == ["config.json", "metrics.jsonl"]
    assert [name.endswith("manifest.json") for name in written] == [False] * (len(written) - 1) + [True]
    assert [name.endswith("manifest.json") for name in deleted] == [True] + [False] * (len(deleted) - 1)
    assert set(written) == names_of(run, 20)


def test_no_more_than_a_few_files_are_on_their_way_at_once(mirror, run, monkeypatch):
    for number in range(20):
        (run / "checkpoints" / "10" / "state" / f"{number}").write_text("x" * number)
    update_files(run / "checkpoints" / "10")
    on_their_way, most = set(), []

    class Slow(Store):
        def write(self, name, data):
            future = super().write(name, data)
            on_their_way.add(name)
            most.append(len(on_their_way))

            def result(timeout):
                on_their_way.discard(name)
                return future.result(timeout)

            return SimpleNamespace(result=result, cancel=future.cancel)

    Slow(monkeypatch, lambda *operation: None)
    mirror.upload(run, 10, keep=[], files=FILES)
    assert max(most) == module.CONCURRENCY


@pytest.mark.usefixtures("impatient")
def test_a_fetch_that_breaks_off_leaves_nothing_that_counts_and_another_brings_all(mirror, run, tmp_path, monkeypatch):
    push_all(mirror, run, *STEPS)
    other = tmp_path / "other"
    for breaks_at in range(1, 100):
        shutil.rmtree(other, ignore_errors=True)

        def meddle(number, kind, name, breaks_at=breaks_at):
            if number >= breaks_at:
                raise ValueError("UNAVAILABLE: the line is dead")

        with monkeypatch.context() as patch:
            Store(patch, meddle)
            with contextlib.suppress(RemoteError):
                mirror.download(other, files=FILES)
                break
        assert list_checkpoints(other / "checkpoints") == []
        assert mirror.download(other, files=FILES) == Downloaded([10, 20, 30], {})
    assert breaks_at > 15
    assert check_whole(other) == [10, 20, 30]


def test_the_disk_has_all_that_leads_to_a_checkpoint_before_it_appears(mirror, run, tmp_path, monkeypatch):
    push_all(mirror, run, 10)
    other, on_disk = tmp_path / "other", []
    fsync_with(monkeypatch, lambda path: on_disk.append((path, names(other))))
    mirror.download(other, files=FILES)
    unfinished = other / "checkpoints" / "10.unfinished"
    before = [path for path, there in on_disk if "checkpoints/10/manifest.json" not in there]
    files = {unfinished / name for name in counting(run / "checkpoints" / "10")}
    directories = {directory for file in files for directory in file.parents if directory.is_relative_to(unfinished)}
    assert files | directories | {other, other / "metrics.jsonl.partial"} <= set(before)
    assert on_disk[-1] == (other / "checkpoints", names(other))


# What stays and what goes


def test_copies_that_are_not_to_be_kept_go(mirror, bucket, run):
    push_all(mirror, run, *STEPS)
    assert names(bucket) == names_of(run, *STEPS)
    mirror.upload(run, 30, keep=[10], files=FILES)
    assert names(bucket) == names_of(run, 10, 30)


def test_a_copy_that_knows_more_is_never_given_up_for_one_that_knows_less(mirror, bucket, run, tmp_path):
    """As where a checkpoint was damaged on the disk, and the run goes on from the one before; its copy is good."""
    push_all(mirror, run, *STEPS)
    before = snapshot(bucket)
    (run / "metrics.jsonl").write_text(metrics_to(20))
    with pytest.raises(RemoteError, match="the checkpoint of step 20 was not copied: the copy of step 30 is newer"):
        mirror.upload(run, 20, keep=[20], files=FILES)
    assert snapshot(bucket) == before
    save(tmp_path / "behind", 10)
    assert mirror.download(tmp_path / "behind", files=FILES) == Downloaded([20, 30], {})
    assert check_whole(tmp_path / "behind") == [*STEPS]


def test_what_is_not_of_a_copy_is_left_alone(mirror, bucket, run):
    foreign = {
        "README",
        "checkpoints/README",
        "checkpoints/040/manifest.json",
        "checkpoints/10/state/a\\b",
        "checkpoints/10/x",
        "checkpoints/x/manifest.json",
    }
    for name in foreign:
        (bucket / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / name).touch()
    mirror.upload(run, 20, keep=[], files=FILES)
    assert names(bucket) == names_of(run, 20) | foreign
    assert mirror.newest_step() == 20


def test_a_second_push_of_a_step_writes_only_the_small_files(mirror, run, monkeypatch):
    mirror.upload(run, 10, keep=[], files=FILES)
    store = Store(monkeypatch, lambda *operation: None)
    assert isinstance(mirror.upload(run, 10, keep=[], files=FILES), Uploaded)
    assert [name for kind, name in store.log if kind == "write"] == ["config.json", "metrics.jsonl"]


def test_a_copy_that_lost_a_file_is_written_anew(mirror, bucket, run):
    mirror.upload(run, 10, keep=[], files=FILES)
    (bucket / "checkpoints" / "10" / "state" / "_METADATA").unlink()
    mirror.upload(run, 10, keep=[], files=FILES)
    assert names(bucket) == names_of(run, 10)


def test_small_files_that_are_not_there_are_left_out_on_either_way(mirror, bucket, run, tmp_path):
    mirror.upload(run, 10, keep=[], files=["nothing", "config.json"])
    assert names(bucket) == {"config.json"} | {name for name in names_of(run, 10) if "/" in name}
    mirror.download(tmp_path / "other", files=["nothing", "config.json"])
    assert names(tmp_path / "other") == names(bucket)


# The checkpoint on this machine


def test_a_push_of_a_checkpoint_that_is_not_there_is_a_failure(mirror, bucket, run):
    with pytest.raises(RemoteError, match="the checkpoint of step 11 was not copied: it is not there any more"):
        mirror.upload(run, 11, keep=[], files=FILES)
    assert not names(bucket)


def test_a_checkpoint_that_goes_while_it_is_copied_leaves_nothing_that_counts(mirror, bucket, run, monkeypatch):
    spare = run.parent / "spare"
    shutil.copytree(run / "checkpoints" / "10", spare)
    outcomes = set()
    (run / "checkpoints" / "removed").mkdir()
    for goes_at in range(1, 40):
        shutil.rmtree(bucket, ignore_errors=True)
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints" / "removed").mkdir(parents=True)
        shutil.copytree(spare, run / "checkpoints" / "10")

        def meddle(number, kind, name, goes_at=goes_at):
            if number == goes_at:
                (run / "checkpoints" / "10").rename(run / "checkpoints" / "removed" / "10")

        with monkeypatch.context() as patch:
            Store(patch, meddle)
            try:
                pushed = mirror.upload(run, 10, keep=[], files=FILES)
            except RemoteError:
                pushed = None
        outcomes.add(bool(pushed))
        assert mirror.newest_step() == (10 if pushed else None)
        if pushed:
            assert names(bucket) == {f"checkpoints/10/{name}" for name in counting(spare)} | {*FILES[:2]}
    assert outcomes == {True, False}


def largest_file(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def blank(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda state: (state / "_METADATA").unlink(), "state/_METADATA is missing"),
        (lambda state: (state / "_METADATA").write_bytes(b"x"), "state/_METADATA has other bytes"),
        (lambda state: blank(largest_file(state)), "state/ocdbt.process_0/d/[0-9a-f]+ has other bytes"),
        (lambda state: blank(state.parent / "run" / "metadata"), "run/metadata has other bytes"),
        (lambda state: (state / "_METADATA").write_bytes(b"x" * 99_999), "_METADATA has more than"),
        (lambda state: (state.parent / "manifest.json").write_bytes(b"[]"), "cannot be understood"),
    ],
    ids=["missing", "shorter", "changed", "changed metadata", "longer", "no manifest"],
)
def test_a_checkpoint_that_is_damaged_is_not_copied(mirror, bucket, run, spoil, said):
    push_all(mirror, run, 10)
    spoil(run / "checkpoints" / "20" / "state")
    with pytest.raises(RemoteError, match=f"the checkpoint of step 20 was not copied: .*{said}"):
        mirror.upload(run, 20, keep=[], files=FILES)
    assert mirror.newest_step() == 10


def test_for_a_checkpoint_that_is_damaged_no_good_copy_of_its_step_is_given_up(mirror, bucket, run):
    push_all(mirror, run, 10)
    before = snapshot(bucket)
    shutil.rmtree(run / "checkpoints" / "10")
    save(run, 10, shift=0.5)
    blank(run / "checkpoints" / "10" / "state" / "_METADATA")
    with pytest.raises(RemoteError, match="has other bytes than were saved"):
        mirror.upload(run, 10, keep=[10], files=FILES)
    assert snapshot(bucket) == before


@pytest.mark.parametrize(
    "what",
    [
        "checkpoints/10/state/ocdbt.process_0",
        "checkpoints/10/run",
        "checkpoints/10",
        "checkpoints/10/state/_METADATA",
        "checkpoints/10/run/metadata",
    ],
)
def test_no_symbolic_link_is_followed_to_what_is_copied(mirror, bucket, run, tmp_path, what):
    (run / what).rename(tmp_path / "secret")
    (run / what).symlink_to(tmp_path / "secret")
    with pytest.raises(RemoteError, match="is missing, or no file"):
        mirror.upload(run, 10, keep=[], files=FILES)
    assert mirror.newest_step() is None


def test_a_small_file_that_is_a_link_is_not_copied(mirror, bucket, run, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (run / "events.jsonl").symlink_to(tmp_path / "secret")
    with pytest.raises(RemoteError, match=r"events\.jsonl"):
        mirror.upload(run, 10, keep=[], files=FILES)
    assert "events.jsonl" not in names(bucket)


# In the background


class Held(RemoteStore):
    """A mirror whose pushes begin and then wait for a word."""

    def __init__(self, url):
        super().__init__(url)
        self.began, self.go_on = threading.Event(), threading.Event()

    def upload(self, run, step, **options):
        self.began.set()
        assert self.go_on.wait(60)
        return super().upload(run, step, **options)


def test_only_the_latest_of_the_pushes_that_wait_is_made(bucket, run):
    mirror = Held(bucket.as_uri())
    assert mirror.wait(0)
    assert mirror.uploading_steps == set()
    mirror.begin_upload(run, 10, keep=STEPS, files=FILES)
    assert mirror.began.wait(60)
    mirror.begin_upload(run, 20, keep=STEPS, files=FILES)
    assert mirror.uploading_steps == {10, 20}
    mirror.begin_upload(run, 30, keep=STEPS, files=FILES)
    assert mirror.uploading_steps == {10, 30}
    assert not mirror.wait(0.01)
    assert mirror.results() == []
    mirror.go_on.set()
    assert mirror.wait(60)
    assert [pushed.step for pushed in mirror.results()] == [10, 30]
    assert mirror.results() == []
    assert mirror.uploading_steps == set()
    mirror.begin_upload(run, 30, keep=STEPS, files=FILES)
    assert mirror.wait(60)
    assert [pushed.step for pushed in mirror.results()] == [30]
    assert names(bucket) == names_of(run, 10, 30)


def test_a_push_that_is_being_made_is_not_made_twice(bucket, run):
    mirror = Held(bucket.as_uri())
    for step in (10, 20, 10):  # The last one has the one before it forgotten.
        mirror.begin_upload(run, step, keep=STEPS, files=FILES)
        assert mirror.began.wait(60)
    mirror.go_on.set()
    assert mirror.wait(60)
    assert [pushed.step for pushed in mirror.results()] == [10]


def test_what_goes_wrong_in_the_background_is_told_and_the_next_push_is_made(mirror, bucket, run, monkeypatch):
    bucket.write_text("no directory")
    mirror.begin_upload(run, 10, keep=STEPS, files=FILES)
    assert mirror.wait(60)
    bucket.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_table", lambda manifest: 1 / 0)
        mirror.begin_upload(run, 10, keep=STEPS, files=FILES)
        assert mirror.wait(60)
    mirror.begin_upload(run, 20, keep=STEPS, files=FILES)
    assert mirror.wait(60)
    failed, strange, pushed = mirror.results()
    assert isinstance(failed, RemoteError)
    assert str(failed).startswith(f"{bucket.as_uri()}: ")
    assert "RemoteError" not in str(failed)
    assert str(strange) == f"{bucket.as_uri()}: ZeroDivisionError: division by zero"
    assert pushed.step == 20


# A directory that has something already


def test_checkpoints_that_are_here_stay_and_only_newer_ones_come(mirror, run, tmp_path):
    push_all(mirror, run, *STEPS)
    other = tmp_path / "other"
    save(other, 20, shift=0.5)
    (other / "metrics.jsonl").write_text("")
    mine = snapshot(other / "checkpoints" / "20")
    assert mirror.download(other, files=FILES) == Downloaded([30], {})
    assert snapshot(other / "checkpoints" / "20") == mine
    assert check_whole(other) == [20, 30]
    assert (other / "metrics.jsonl").read_text() == metrics_to(30)
    (other / "metrics.jsonl").write_text("of later steps")
    assert mirror.download(other, files=FILES) == Downloaded([], {})
    assert (other / "metrics.jsonl").read_text() == "of later steps"


def test_a_copy_with_other_bytes_is_refused_before_anything_here_gives_way_to_it(mirror, bucket, run, tmp_path):
    push_all(mirror, run, *STEPS)
    file = bucket / "checkpoints" / "30" / "state" / "_METADATA"
    file.write_bytes(bytes(file.stat().st_size))
    other = tmp_path / "other"
    save(other, 25)
    (other / "metrics.jsonl").write_text("mine")
    assert mirror.download(other, files=FILES) == Downloaded(
        [], {30: "state/_METADATA has other bytes than were saved"}
    )
    assert (other / "metrics.jsonl").read_text() == "mine"
    assert mirror.download(tmp_path / "empty", files=FILES).steps == [10, 20]


def test_no_checkpoint_appears_before_the_lines_that_lead_to_it(mirror, run, tmp_path):
    push_all(mirror, run, *STEPS)
    (tmp_path / "other" / "metrics.jsonl").mkdir(parents=True)  # It cannot be replaced.
    with pytest.raises(RemoteError, match=r"metrics\.jsonl"):
        mirror.download(tmp_path / "other", files=FILES)
    assert list_checkpoints(tmp_path / "other" / "checkpoints") == []


# Nothing of a copy is believed


def put(bucket: Path, step: int, files: object) -> None:
    """Lay a copy of which only the manifest is there."""
    (bucket / "checkpoints" / str(step) / "state").mkdir(parents=True, exist_ok=True)
    (bucket / "checkpoints" / str(step) / "manifest.json").write_text(json.dumps({"files": files}))


HOSTILE = ["", ".", "..", "/etc/passwd", "../../config.json", "state/../../../x", "state/./x", "state//x", "state/x/"]
HOSTILE += [
    "state/..",
    "state",
    "run/..",
    "run/../x",
    "run",
    "runs/x",
    "x",
    "manifest.json",
    "state\\..\\x",
    "state/a\\b",
    "state/a\0b",
    "state/\nx",
    "C:/x",
    "/",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_no_checkpoint_has_is_refused_and_nothing_is_written(mirror, bucket, tmp_path, name):
    put(bucket, 10, {name: {"bytes": 0, "sha256": ""}})
    with pytest.raises(RemoteError, match="step 10: a checkpoint has no file"):
        mirror.download(tmp_path / "other" / "run", files=FILES)
    assert names(tmp_path) == {"bucket/checkpoints/10/manifest.json"}
    with pytest.raises(module._Refused):
        module._table(json.dumps({"files": {f"state/{name}/../x": {"bytes": 0, "sha256": ""}}}).encode())


parts = st.sampled_from(["", ".", "..", "a", "state", "\\", "\0", "manifest.json", "é", "\u202e", "~", "C:"]) | st.text(
    max_size=3
)


@given(item=st.sampled_from(["state", "run"]), parts=st.lists(parts, max_size=6), step=parts)
@settings(deadline=None, max_examples=300)
def test_a_name_that_passes_leads_into_an_item_of_the_checkpoint_and_nowhere_else(item, parts, step):
    name = "/".join([item, *parts])
    with contextlib.suppress(module._Refused):
        module._table(json.dumps({"files": {name: {"bytes": 0, "sha256": ""}}}).encode())
        assert os.path.normpath(name) == name
        assert name.isprintable()
        assert name.startswith(f"{item}/")
    if match := module._IN_A_COPY.fullmatch(f"checkpoints/{step}/manifest.json"):
        assert str(int(step)) == step == match[1]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)
tables = st.dictionaries(
    st.just("state/a") | st.lists(parts, max_size=5).map("/".join),
    st.fixed_dictionaries({"bytes": st.integers(0, 5) | json_values, "sha256": st.just("") | json_values}),
    max_size=3,
)


@given(content=(tables | json_values).map(lambda files: json.dumps({"files": files}).encode()) | st.binary(max_size=20))
@settings(deadline=None, max_examples=60)
def test_whatever_a_manifest_says_a_fetch_takes_it_or_says_no_and_writes_nowhere_else(tmp_path_factory, content):
    base = tmp_path_factory.mktemp("whatever")
    (base / "bucket/checkpoints/10/state").mkdir(parents=True)
    (base / "bucket/checkpoints/10/state/a").write_text("12345")
    (base / "bucket/checkpoints/10/manifest.json").write_bytes(content)
    before = names(base)
    with contextlib.suppress(RemoteError):
        assert RemoteStore((base / "bucket").as_uri()).download(base / "run", files=FILES) == Downloaded([10], {})
        assert (base / "run/checkpoints/10/manifest.json").read_bytes() == content
    assert {name for name in names(base) - before if not name.startswith("run/checkpoints/10/")} == set()
    shutil.rmtree(base)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"{}", b'{"files": []}', b'{"files": {"state/a": 3}}', b"\xff", b"[" * 100_000]
)
def test_a_manifest_that_is_none_is_refused(mirror, bucket, tmp_path, content):
    put(bucket, 10, {})
    (bucket / "checkpoints/10/manifest.json").write_bytes(content)
    with pytest.raises(RemoteError, match=r"step 10: manifest\.json cannot be understood"):
        mirror.download(tmp_path / "other", files=FILES)


def test_a_manifest_that_is_too_large_is_refused_unread(mirror, bucket, tmp_path, monkeypatch):
    put(bucket, 10, {})
    os.truncate(bucket / "checkpoints/10/manifest.json", module.MAX_MANIFEST_BYTES + 1)
    store = Store(monkeypatch, lambda *operation: None)
    with pytest.raises(RemoteError, match="has more than 67,108,864 bytes"):
        mirror.download(tmp_path / "other", files=FILES)
    assert store.log == [("list", ""), ("read", "checkpoints/10/manifest.json")]


@pytest.mark.parametrize("tells", [True, False])
def test_a_small_file_that_is_too_large_is_refused_whether_or_not_a_store_can_tell_before(
    mirror, run, tmp_path, monkeypatch, tells
):
    push_all(mirror, run, 10)
    monkeypatch.setattr(module, "MAX_SMALL_FILE_BYTES", 10)

    class Simple(Store):
        def read(self, name, byte_range=None):
            if byte_range and byte_range.start == 10 and not tells:
                return SimpleNamespace(result=lambda timeout: self._fail(ValueError("UNIMPLEMENTED: ranges")))
            return super().read(name, byte_range=byte_range)

    Simple(monkeypatch, lambda *operation: None)
    with pytest.raises(RemoteError, match=r"config\.json has more than 10 bytes"):
        mirror.download(tmp_path / "other", files=FILES)
    assert list_checkpoints(tmp_path / "other" / "checkpoints") == []


def test_an_empty_file_that_is_missing_is_missed(mirror, bucket, tmp_path):
    put(bucket, 10, {"state/a": {"bytes": 0, "sha256": ""}})
    with pytest.raises(RemoteError, match="state/a is missing"):
        mirror.download(tmp_path / "other", files=FILES)


def test_a_copy_that_the_disk_does_not_take_is_refused_and_the_others_come(mirror, run, tmp_path, monkeypatch):
    push_all(mirror, run, *STEPS)

    def fsync(path: Path) -> None:
        if "20.unfinished" in path.parts:
            raise OSError(28, "No space left on device", str(path))

    fsync_with(monkeypatch, fsync)
    fetched = mirror.download(tmp_path / "other", files=FILES)
    assert fetched.steps == check_whole(tmp_path / "other") == [10, 30]
    assert "No space left" in fetched.refused[20]
    assert not list((tmp_path / "other" / "checkpoints").glob("*unfinished"))


def test_where_there_is_room_for_one_only_the_newest_comes(mirror, run, tmp_path, monkeypatch):
    push_all(mirror, run, *STEPS)
    free = [10**9]
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=free.pop() if free else 5))
    fetched = mirror.download(tmp_path / "other", files=FILES)
    assert fetched.steps == [30]
    assert fetched.refused.keys() == {10, 20}
    assert "and 5 are free in" in fetched.refused[10]


@pytest.mark.parametrize("size", [10**30, 2**59, -1, 1.5, True, None, "5"])
def test_a_size_that_cannot_be_is_refused(mirror, bucket, tmp_path, size):
    put(bucket, 10, {"state/a": {"bytes": size, "sha256": ""}})
    (bucket / "checkpoints/10/state/a").write_text("12345")
    with pytest.raises(RemoteError, match=r"no file is as|and \S+ are free in"):
        mirror.download(tmp_path / "other", files=FILES)
    assert names(tmp_path / "other") == set()


def test_of_a_file_no_more_is_read_than_the_manifest_says(mirror, bucket, tmp_path):
    put(bucket, 10, {"state/a": {"bytes": 3, "sha256": hashlib.sha256(b"123").hexdigest()}})
    (bucket / "checkpoints/10/state/a").write_text("12345")
    mirror.download(tmp_path / "other", files=FILES)
    assert (tmp_path / "other/checkpoints/10/state/a").read_text() == "123"


@pytest.mark.parametrize("lack", ["shorter", "missing"])
def test_a_copy_that_lacks_something_is_refused_and_an_older_one_comes(url, run, tmp_path, lack):
    mirror = RemoteStore(url)
    push_all(mirror, run, *STEPS)
    store = mirror._open()._store
    store.write("checkpoints/30/state/_METADATA", b"x" if lack == "shorter" else None).result()
    fetched = mirror.download(tmp_path / "other", files=FILES)
    assert fetched.steps == [10, 20]
    assert "state/_METADATA" in fetched.refused.pop(30)
    assert fetched.refused == {}
    assert check_whole(tmp_path / "other") == [10, 20]
    assert not list((tmp_path / "other" / "checkpoints").glob("*unfinished"))


def test_where_no_copy_is_good_nothing_begins_anew_unless_a_checkpoint_is_here(mirror, bucket, run, tmp_path):
    put(bucket, 20, {"state/a": {"bytes": 3, "sha256": ""}})
    put(bucket, 30, {"x": {"bytes": 3, "sha256": ""}})
    with pytest.raises(RemoteError, match="step 20: state/a is missing; step 30: a checkpoint has no file 'x'"):
        mirror.download(tmp_path / "other", files=FILES)
    save(tmp_path / "other", 10)
    assert sorted(mirror.download(tmp_path / "other", files=FILES).refused) == [20, 30]


def test_no_link_in_the_run_directory_is_followed(mirror, run, tmp_path):
    push_all(mirror, run, *STEPS)
    outside = tmp_path / "outside"
    (outside / "state").mkdir(parents=True)
    (outside / "file").write_text("mine")
    before = snapshot(outside)
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    for name in ("checkpoints/10.unfinished", "checkpoints/30.unfinished"):
        (other / name).symlink_to(outside)
    for name in ("metrics.jsonl", "metrics.jsonl.partial", "config.json.partial"):
        (other / name).symlink_to(outside / "file")
    assert mirror.download(other, files=FILES).steps == [*STEPS]
    assert snapshot(outside) == before
    assert not (other / "metrics.jsonl").is_symlink()
    shutil.rmtree(other)
    other.mkdir()
    (other / "checkpoints").symlink_to(outside)
    with pytest.raises(RemoteError, match="is a symbolic link"):
        mirror.download(other, files=FILES)
    assert snapshot(outside) == before


# Servers that are not there, or not as they should be


def each_operation(mirror: RemoteStore, run: Path):
    yield mirror.newest_step
    yield lambda: mirror.upload(run, 10, keep=STEPS, files=FILES)
    yield lambda: mirror.download(run.parent / "other", files=FILES)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_at_a_closed_port_everything_ends_in_time_with_the_reason(run, monkeypatch, scheme):
    with closed_port() as port:
        for name, value in ENDPOINTS[scheme](port).items():
            monkeypatch.setenv(name, value)
        mirror = RemoteStore(f"{scheme}://bucket/run", timeout_s=8)
        started = time.monotonic()
        with pytest.raises(RemoteError, match=f"^{scheme}://bucket/run: .*[Cc]ould not connect") as failure:
            mirror.newest_step()
        assert time.monotonic() - started < 60  # Four seconds, and what a busy machine adds.
        assert "\n" not in str(failure.value)


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_server_that_never_answers_is_waited_for_no_longer_than_allowed(run, monkeypatch, scheme):
    with answering_server() as (port, answer):
        answer.silent = True
        for name, value in ENDPOINTS[scheme](port).items():
            monkeypatch.setenv(name, value)
        mirror = RemoteStore(f"{scheme}://bucket/run", timeout_s=0.3)
        for operation in each_operation(mirror, run):
            started = time.monotonic()
            with pytest.raises(RemoteError, match=rf"^{scheme}://bucket/run: .*there was no answer in 0\.3 s$"):
                operation()
            assert time.monotonic() - started < 0.3 + 2


def test_a_server_that_was_silent_for_long_is_used_again_when_it_answers(monkeypatch):
    with answering_server() as (port, answer):
        for name, value in s3_environment(port).items():
            monkeypatch.setenv(name, value)
        mirror = RemoteStore("s3://bucket/run", timeout_s=0.1)
        answer.silent = True
        for _ in range(2 * module.CONCURRENCY):
            with pytest.raises(RemoteError):
                mirror.newest_step()
        answer.silent = False
        answer.body = b'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>'
        mirror.timeout_s = 60
        assert mirror.newest_step() is None


def test_a_refusal_is_told_in_a_line_without_a_credential(run, monkeypatch):
    key, secret = CREDENTIALS.values()
    with answering_server() as (port, answer):
        answer.status = 403
        answer.body = (
            f"<?xml version='1.0'?><Error><Code>SignatureDoesNotMatch</Code><Message>{key} is\nnot {secret}</Message>"
            f"<AWSAccessKeyId>{key}</AWSAccessKeyId><StringToSign>{secret}</StringToSign></Error>"
        ).encode()
        for name, value in s3_environment(port).items():
            monkeypatch.setenv(name, value)
        for operation in each_operation(RemoteStore("s3://bucket/run", timeout_s=60), run):
            with pytest.raises(RemoteError, match=r"^s3://bucket/run: .*is there a credential") as failure:
                operation()
            text = str(failure.value)
            assert "SignatureDoesNotMatch: (secret) is not (secret); is there" in text
            assert "[" not in text
            assert [part for part in (key, secret, "\n") if part in text] == []


def test_whatever_a_store_answers_to_a_look_is_told_in_a_line(mirror, monkeypatch):
    def meddle(number, kind, name):
        raise ValueError("OUT_OF_RANGE: 416 Range Not Satisfiable")

    Store(monkeypatch, meddle)
    with pytest.raises(RemoteError, match="it cannot be looked at: it cannot be listed: OUT_OF_RANGE"):
        mirror.newest_step()


def test_a_bucket_that_is_not_there_is_told(servers, run, monkeypatch):
    _, environment = servers("s3")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for operation in each_operation(RemoteStore("s3://no-such-bucket/run", timeout_s=60), run):
        with pytest.raises(RemoteError, match="NoSuchBucket"):
            operation()
