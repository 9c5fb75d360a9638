"""The metadata of a checkpoint, and whether a run resumes bit for bit."""

import os

import jax
import pytest
from runs import in_new_process

from mnist_jax.checkpoint.integrity import CorruptCheckpointError, IncompatibleCheckpointError
from mnist_jax.training import compatibility

METADATA = {
    "config": {"model": "cnn"},
    "data": {"name": "digits", "train_images": 1438, "test_images": 359},
    "software": {"jax": "0.10.2"},
    "settings": {"jax_threefry_partitionable": "True"},
    "devices": {"platform": "cpu", "count": 1},
    "metrics": {"lines": ""},
    "reason": "steps",
}


def test_every_changed_field_is_reported():
    environment = {"software": {"jax": "0.12", "numpy": "2"}, "settings": METADATA["settings"], "devices": {"count": 1}}
    assert compatibility.diff_environment(METADATA, environment) == [
        "software jax 0.10.2 -> 0.12",
        "software numpy None -> 2",
        "devices platform cpu -> None",
    ]


def test_an_environment_equals_itself():
    environment = compatibility.describe_environment()
    assert set(environment) == {"software", "settings", "devices"}
    assert {"mnist_jax", "jax", "jaxlib", "flax", "optax", "numpy"} == set(environment["software"])
    metadata = {**METADATA, **environment}
    assert compatibility.check_metadata(metadata, 3) == metadata
    assert compatibility.diff_environment(metadata, environment) == []


@pytest.mark.parametrize(
    ("platform", "flags", "count"),
    [
        ("gpu", "--xla_gpu_deterministic_ops=true", 0),
        ("gpu", "--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=False --xla_dump_to=x", 1),
        ("gpu", "--xla_gpu_deterministic_ops=false --xla_gpu_exclude_nondeterministic_ops=true", 0),
        ("cpu", "--xla_gpu_deterministic_ops=false", 0),
    ],
)
def test_kernels_that_are_not_deterministic_are_not_exact(platform, flags, count):
    environment = {"devices": {"platform": platform, "xla_flags": "", "xla_flags of process 1": flags}}
    assert len(compatibility.diff_environment(environment, environment)) == count


def test_the_environments_of_several_processes_are_compared():
    first = {"software": {"jax": "0.10.2"}, "settings": {}, "devices": {"cpu_threads": 2, "count": 3}}
    slower = {**first, "devices": {"cpu_threads": 1, "count": 3}}
    newer = {**first, "software": {"jax": "0.12.0"}}
    assert compatibility.merge_environments([first]) == compatibility.merge_environments([first, first, first]) == first
    merged = compatibility.merge_environments([first, slower, newer])
    assert merged["devices"] == {**first["devices"], "cpu_threads of process 1": 1}
    assert merged["software"] == {"jax": "0.10.2", "jax of process 2": "0.12.0"}
    now = compatibility.merge_environments([first, first, newer])
    found = compatibility.diff_environment({**METADATA, **merged}, now)
    assert found == ["devices cpu_threads of process 1 1 -> None"]


@pytest.mark.parametrize("name", METADATA)
def test_invalid_metadata_are_refused_by_name(name):
    wrong = [None, 7, ["x"], {} if name == "reason" else "text"]
    if name == "metrics":
        surrogate = '{"step": 1, "split": "test", "accuracy": 0.5, "\ud800": 1}\n'
        wrong += [{}, {"lines": 7}, {"lines": '{"step": 1}\n'}, {"lines": surrogate}]
    without = {part: value for part, value in METADATA.items() if part != name}
    for metadata in (without, *({**METADATA, name: value} for value in wrong)):
        with pytest.raises(IncompatibleCheckpointError, match=rf"the checkpoint of step 3 .*metadata: {name}$"):
            compatibility.check_metadata(metadata, 3)


def test_the_dataset_in_metadata_is_checked():
    assert compatibility.data_of(METADATA, 3) == ("digits", 1438, 359, 28, 28, 10)
    for value in ({"name": "imagenet"}, {"train_images": 0}, {"test_images": 10**400}, {"test_images": float("inf")}):
        with pytest.raises(IncompatibleCheckpointError, match="metadata: data"):
            compatibility.data_of({**METADATA, "data": {**METADATA["data"], **value}}, 3)
    for metadata in (None, [], "digits"):
        with pytest.raises(IncompatibleCheckpointError, match="step 3"):
            compatibility.data_of(metadata, 3)


@pytest.mark.parametrize(("given", "wanted"), [("", "false"), ("true", "true")])
def test_memory_of_an_accelerator_is_allocated_on_demand(monkeypatch, tmp_path, given, wanted):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", given)
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    compatibility.prepare_jax(None)
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == wanted


def prepare_and_multiply() -> list[str]:
    """Return the precision that is recorded, and a matrix product as XLA gets it. Runs in a new process."""
    compatibility.prepare_jax(None)
    settings = compatibility.describe_environment()["settings"]
    square = jax.ShapeDtypeStruct((2, 2), "float32")
    return [settings["jax_default_matmul_precision"], jax.jit(lambda x: x @ x).lower(square).as_text()]


def test_precision_of_matrix_products_is_explicit_and_recorded(environment, monkeypatch):
    recorded, program = in_new_process(prepare_and_multiply, **environment)
    assert recorded == "tensorfloat32"
    assert "precision = [HIGH, HIGH]" in program
    # Another one of the user is kept. The test process has it from here to the end of the block.
    monkeypatch.setenv("XDG_CACHE_HOME", environment["XDG_CACHE_HOME"])
    before = jax.config.values["jax_default_matmul_precision"]
    try:
        jax.config.update("jax_default_matmul_precision", "highest")
        assert prepare_and_multiply()[0] == "highest"
    finally:
        jax.config.update("jax_default_matmul_precision", before)


# The size of the thread pool


class FakeCheckpoint:
    """A checkpoint whose metadata have these devices, or cannot be read."""

    def __init__(self, devices: object) -> None:
        self.devices = devices

    def metadata(self) -> object:
        if isinstance(self.devices, Exception):
            raise self.devices
        return {"devices": self.devices}


def prepared(*devices: object, **variables: str) -> str | None:
    """Return the size of the thread pool that a run with these checkpoints asks for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")
        for name in ("PJRT_NPROC", "NPROC"):
            patch.setenv(name, variables.get(name, ""))
        compatibility.prepare_jax(compatibility.cpu_threads_of([FakeCheckpoint(found) for found in devices]))
        return os.environ["PJRT_NPROC"] or None


def test_the_newest_readable_checkpoint_sets_the_threads():
    corrupt = CorruptCheckpointError(30, "bad-manifest", "manifest.json is torn")
    assert prepared() is None
    assert prepared({"cpu_threads": 3}, {"cpu_threads": 5}) == "5"
    assert prepared({"cpu_threads": 3}, {"cpu_threads": 5}, corrupt) == "5"
    assert prepared({"cpu_threads": 3}, PermissionError(13, "Permission denied")) == "3"
    assert prepared({"cpu_threads": 3}, {"cpu_threads": None}) is None  # The newest was on an accelerator.
    assert prepared(corrupt) is None


def test_the_environment_overrides_the_threads():
    assert prepared({"cpu_threads": 3}, PJRT_NPROC="7") == "7"
    assert prepared({"cpu_threads": 3}, NPROC="7") is None


@pytest.mark.parametrize("devices", [*({"cpu_threads": n} for n in (0, -1, 10**9, 2.0, "2", True, [2])), [], "cpu", 7])
def test_invalid_numbers_of_threads_are_ignored(devices):
    assert prepared({"cpu_threads": 3}, devices) is None
