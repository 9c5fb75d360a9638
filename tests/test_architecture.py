import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mnist_jax

SOURCE = Path(mnist_jax.__file__).parent
FILES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path.stem != "__init__"
}
MODULES = list(FILES)

# The house, from the ground up: each module, and those below it that it may import.
ROOMS = {
    "config": set(),
    "data": {"config"},
    "model": set(),
    "augment": set(),
    "train_state": {"config", "model"},
    "steps": {"train_state", "model", "augment"},
    "checkpoint": set(),  # a folder, whose files import nothing but each other
    "preemption": set(),
    "distributed": set(),
    "lock": set(),
    "mirror": {"checkpoint"},
    "command": set(),
    "journal": {"command"},
    "peers": {"preemption"},
    "council": {"preemption"},
    "programs": {"config", "model", "augment", "train_state", "steps", "distributed", "council"},
    "updates": {"data", "distributed", "programs", "steps", "train_state"},
    "training": {"data", "distributed", "peers", "council", "preemption", "programs", "train_state", "updates"},
    "keeper": {
        *("config", "checkpoint", "distributed", "journal", "mirror", "preemption", "programs", "training"),
    },
    "provenance": {"config", "data", "distributed", "checkpoint", "train_state"},
    "loop": {
        *("command", "config", "data", "programs", "training", "keeper", "provenance"),
        *("checkpoint", "peers", "preemption", "distributed", "journal", "mirror"),
    },
    "train": {"command", "config", "data", "lock", "mirror", "peers", "preemption", "loop"},
    "status": {"command", "provenance", "config", "checkpoint", "journal", "lock"},
    "errand": {"command", "config", "data", "journal", "preemption", "checkpoint"},
    "replay": {
        *("command", "config", "council", "data", "updates", "provenance", "loop"),
        *("checkpoint", "preemption", "journal", "errand"),
    },
    "trained": {
        *("config", "data", "distributed", "provenance", "checkpoint", "council", "preemption", "programs", "training"),
    },
    "handwriting": set(),
    "evaluate": {"command", "config", "data", "errand", "journal", "preemption", "trained"},
    "predict": {"command", "config", "errand", "journal", "preemption", "trained", "handwriting"},
    "demo": {"command", "config", "errand", "journal", "preemption", "checkpoint", "trained", "handwriting"},
    "history": {"journal"},
    "promises": {"config", "history", "status"},
    "pictures": {"history"},
    "report": {
        *("command", "config", "data", "errand", "evaluate", "history", "journal", "lock", "checkpoint", "pictures"),
        *("preemption", "promises", "provenance", "status", "trained"),
    },
    "export": {"command", "config", "errand", "journal", "preemption", "trained", "checkpoint", "model"},
}

OWNERS = {
    "fcntl": {"lock"},
    "filelock": {"lock"},
    "flask": {"demo"},
    "flax": {"model", "train_state"},
    "jinja2": {"report"},
    "matplotlib": {"pictures"},
    "orbax": {"checkpoint.orbax_io"},
    "PIL": {"handwriting"},
    "rich": {"journal"},
    "safetensors": {"export"},
    "scipy": {"handwriting"},
    "signal": {"preemption"},
    "tensorboard": {"journal"},
    "tensorflow_datasets": {"data"},
    "tensorstore": {"checkpoint.orbax_io", "mirror"},
    "tyro": {"config", "status", "replay", "evaluate", "predict", "export", "demo", "report"},
    "waitress": {"demo"},
    "werkzeug": {"demo"},
}


def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


def imports(module: str) -> set[str]:
    """Return the dotted names that a module imports anywhere, those of the names that it takes from modules too."""
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}.py imports relatively; this test would not see it"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def imports_of_ours(module: str) -> set[str]:
    parts = [name.split(".") for name in imports(module)]
    return {part[1] for part in parts if part[0] == "mnist_jax" and len(part) > 1} - {module.split(".")[0]}


@pytest.mark.parametrize("module", MODULES)
def test_each_module_imports_only_those_that_the_house_lets_it(module):
    room = module.split(".")[0]
    assert room in ROOMS, "give it a place in the house"
    assert imports_of_ours(module) <= ROOMS[room]


def test_imports_go_one_way():
    floors = list(ROOMS)
    for module, below in ROOMS.items():
        assert below <= set(floors[: floors.index(module)])


@pytest.mark.parametrize(
    "module",
    ["checkpoint.checkpointer", "checkpoint.integrity", "checkpoint.orbax_io", "preemption", "distributed", "lock"],
)
def test_what_people_lift_into_their_own_projects_stands_alone(module):
    assert not imports_of_ours(module)
    assert not {name for name in imports(module) if name.startswith("mnist") and "mnist_jax.checkpoint" not in name}


@pytest.mark.parametrize("package", OWNERS)
def test_each_package_has_one_owner(package):
    users = {module for module in MODULES if package in {name.split(".")[0] for name in imports(module)}}
    assert users == OWNERS[package]


def test_steps_touch_no_file_no_clock_and_no_signal():
    third = {name.split(".")[0] for name in imports("steps")}
    assert third == {"collections", "typing", "jax", "optax", "mnist_jax"}
    assert not {
        name for name in imports("steps") if name.startswith(("jax.experimental", "jax.debug", "jax.monitoring"))
    }
    names = {node.id for node in ast.walk(tree("steps")) if isinstance(node, ast.Name)}
    assert not names & {"open", "print", "input", "exec", "eval", "__import__"}


def loaded_with(module: str) -> set[str]:
    """Return the packages that a process has loaded after the import of one of our modules."""
    script = f"import sys, mnist_jax.{module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(ended.stdout.split())


@pytest.mark.parametrize("module", ["config", "train"])
def test_a_usage_error_does_not_wait_for_jax(module):
    loaded = loaded_with(module)
    assert "mnist_jax" in loaded
    assert not {"jax", "jaxlib", "flax", "optax", "orbax", "tensorflow_datasets", "sklearn"} & loaded


def test_the_first_step_does_not_wait_for_what_serves_only_some_runs_or_only_later():
    loaded = loaded_with("loop")
    assert "orbax" in loaded
    assert not {"sklearn", "tensorboard", "tensorflow_datasets"} & loaded


def test_train_reads_as_a_table_of_contents():
    (train,) = [node for node in tree("loop").body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    assert train.end_lineno - train.lineno + 1 < 60
