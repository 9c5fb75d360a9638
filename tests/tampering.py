"""Change checkpoints as someone who can compute digests: the manifest and its seal are correct afterwards."""

import hashlib
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np

from mnist_jax.checkpoint import integrity
from mnist_jax.checkpoint.checkpoint import Checkpoint

METADATA = "run/metadata"
HASHES = "state/hashes.0.json"
NOT_IN_THE_TABLE = {integrity.MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt"}  # of a step directory

HOSTILE_TEXTS = ("<b x=\"1\" onload='y'>&amp;{{ 7 * 7 }}$\\frac{", "\ud800\x00\x1b[31m[red]")
_KINDS = ("start", "phase", "resume", "lost", "signal", "save", "save_failed", "evaluation", "quarantine", "exit", "?")
_FIELDS = (
    *("time", "seconds", "phase", "exact", "changed", "lost_steps", "signal", "outcome"),
    *("error", "code", "names", "state_sha256"),
)
_VALUES = (None, True, -1, 7, 2**40, 1e300, float("nan"), [], [[1], "a", None], {"a": []}, "train", *HOSTILE_TEXTS)
# Every event with every value in all fields.
HOSTILE_EVENTS = [{**dict.fromkeys(_FIELDS, value), "event": kind, "step": 5} for kind in _KINDS for value in _VALUES]


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return a manifest without its seal."""
    content = json.loads((checkpoint / integrity.MANIFEST).read_text())
    del content["seal"]
    return content


def write_manifest(checkpoint: Path, content: dict[str, Any]) -> None:
    """Write a manifest with any content and a correct seal."""
    sealed = {**content, "seal": integrity.json_sha256(content)}
    (checkpoint / integrity.MANIFEST).write_text(json.dumps(sealed, indent=1) + "\n")


def change_manifest(checkpoint: Path, **changes: object) -> None:
    """Change fields of a manifest, and correct its seal."""
    write_manifest(checkpoint, {**read_manifest(checkpoint), **changes})


def update_files(checkpoint: Path) -> None:
    """Correct the digests of all files in the manifest."""
    found = integrity.regular_files(checkpoint)
    files = {name: integrity.describe_file(found[name]) for name in sorted(found.keys() - NOT_IN_THE_TABLE)}
    change_manifest(checkpoint, files=files)


def largest_file(checkpoint: Path) -> Path:
    """Return the largest file of the leaves; how Orbax divides them differs."""
    return max((checkpoint / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def flip_bit(path: Path) -> None:
    """Change one bit in the middle of a file, as a disk does; no digest is corrected."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def write_file(checkpoint: Path, name: str, content: bytes | str) -> None:
    """Write a file of a checkpoint, and correct its digest in the manifest."""
    content = content.encode() if isinstance(content, str) else content
    path = checkpoint / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    row = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change_manifest(checkpoint, files={**read_manifest(checkpoint)["files"], name: row})


def read_metadata(checkpoint: Path) -> Any:
    """Return the metadata of a checkpoint."""
    return json.loads((checkpoint / METADATA).read_text())


def write_metadata(checkpoint: Path, values: object) -> None:
    """Replace the metadata of a checkpoint."""
    write_file(checkpoint, METADATA, json.dumps(values))


def change_metadata(checkpoint: Path, **changes: object) -> None:
    """Change fields of the metadata of a checkpoint."""
    write_metadata(checkpoint, {**read_metadata(checkpoint), **changes})


def read_hashes(checkpoint: Path) -> dict[str, Any]:
    """Return the hashes that process 0 wrote."""
    return json.loads((checkpoint / HASHES).read_text())


def write_hashes(checkpoint: Path, hashes: dict[str, Any], leaves: dict[str, Any] | None = None) -> None:
    """Write the hashes of process 0 and correct the manifest; `leaves` is its table, by default computed."""
    write_file(checkpoint, HASHES, json.dumps(hashes))
    if leaves is None:
        leaves = integrity.leaf_table(integrity.combine([hashes["leaves"]]))
    change_manifest(checkpoint, leaves=leaves, state_sha256=integrity.json_sha256(leaves))


def read_ones(paths: list[str], max_bytes: int) -> list[str]:
    """Read checkpoints of five ones in a process with limited memory, and return the values or the error of each."""
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    found = []
    for path in paths:
        try:
            values, _ = Checkpoint(Path(path)).read({"w": np.ones(5, np.float32)})
            found.append(" ".join(map(str, ["fine", *values["w"]])))
        except integrity.CheckpointError as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def write_format_3(directory: Path, step: int) -> Path:
    """Write a checkpoint of format 3, which had one array for all leaves."""
    checkpoint = directory / str(step)
    (checkpoint / "state" / "leaves").mkdir(parents=True)
    zarray = {"zarr_format": 2, "shape": [4], "chunks": [4], "dtype": "|u1", "compressor": None, "fill_value": None}
    (checkpoint / "state" / "leaves" / ".zarray").write_text(json.dumps({**zarray, "filters": None, "order": "C"}))
    (checkpoint / "state" / "leaves" / "0").write_bytes(b"\1\2\3\4")
    (checkpoint / "state" / "_METADATA").write_text("{}")
    leaves = {"step": {"shape": [], "dtype": "int32", "sha256": hashlib.sha256(b"\1\2\3\4").hexdigest()}}
    found = integrity.regular_files(checkpoint)
    manifest = {
        "format": 3,
        "step": step,
        "sha256": integrity.json_sha256(leaves),
        "leaves": leaves,
        "files": {name: integrity.describe_file(path) for name, path in sorted(found.items())},
        "about": {"reason": "steps"},
    }
    write_manifest(checkpoint, manifest)
    return checkpoint
