import ast
import subprocess
import sys
from functools import cache
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

# What each package or module may import of ours, besides itself; a package stands for all of its modules.
RULES: dict[str, set[str]] = {
    "runtime": set(),
    "checkpoint": set(),
    "config": set(),
    "console": set(),
    "records": {"config", "console"},
    "training": {"config", "console", "runtime", "checkpoint", "records"},
    "inference": {"config", "console", "runtime", "checkpoint", "records", "training"},
    "cli": {"config", "console", "runtime", "checkpoint", "training"},
}
COMMANDS = {module for module, path in FILES.items() if "\ndef main(" in path.read_text()}

OWNERS = {
    "array_record": {"training.tfds_records"},
    "fcntl": {"runtime.lock"},
    "filelock": {"runtime.lock"},
    "flask": {"demo.__main__"},
    "flax": {"training.model", "training.train_state"},
    "jinja2": {"report.__main__"},
    "matplotlib": {"report.figures"},
    "obstore": {"checkpoint.object_store"},
    "orbax": {"checkpoint.orbax_io"},
    "PIL": {"inference.images", "inference.preprocessing"},
    "safetensors": {"export"},
    "scipy": {"inference.foreground", "inference.parts", "inference.preprocessing"},
    "signal": {"runtime.preemption"},
    "tensorboard": {"records.tensorboard"},
    "tensorstore": {"checkpoint.orbax_io"},
    "tyro": {"cli", "config", "status", "replay", "evaluate", "predict", "export", "demo.__main__", "report.__main__"},
    "waitress": {"demo.__main__"},
}


def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text())


@cache
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
    """Return the modules and packages of ours that a module imports: `training.loop`, `config`."""
    found = {name.removeprefix("mnist_jax.") for name in imports(module) if name.startswith("mnist_jax.")}
    known = {*FILES, *(name.rpartition(".")[0] for name in FILES)}
    return {next((end for end in (name, name.rpartition(".")[0]) if end in known), "") for name in found} - {""}


def part(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_rules(module):
    imported = imports_of_ours(module)
    assert not imported & COMMANDS
    if part(module) in RULES:
        assert {part(name) for name in imported} <= RULES[part(module)] | {part(module)}
    if part(module) in ("inference", "cli"):
        assert "training.loop" not in imported


def test_imports_have_no_circle():
    """Print the drawing of imports, from the ground up: `pytest -s -k circle`."""
    below = {module: {name for name in imports_of_ours(module) if name in FILES} for module in MODULES}
    placed: list[str] = []
    while rest := sorted(set(MODULES) - set(placed)):
        level = [module for module in rest if below[module] <= {*placed, module}]
        assert level, f"a circle among {rest}"
        for module in level:
            print(f"{module:28} {' '.join(sorted(below[module] - {module}))}")
        placed += level


@pytest.mark.parametrize("package", OWNERS)
def test_each_package_has_one_owner(package):
    users = {module for module in MODULES if package in {name.split(".")[0] for name in imports(module)}}
    assert users == OWNERS[package]


def test_steps_touch_no_file_no_clock_and_no_signal():
    third = {name.split(".")[0] for name in imports("training.train_step")}
    assert third == {"collections", "functools", "typing", "jax", "numpy", "optax", "mnist_jax"}
    assert not {
        name
        for name in imports("training.train_step")
        if name.startswith(("jax.experimental", "jax.debug", "jax.monitoring"))
    }
    names = {node.id for node in ast.walk(tree("training.train_step")) if isinstance(node, ast.Name)}
    assert not names & {"open", "print", "input", "exec", "eval", "__import__"}


def test_the_first_step_does_not_wait_for_what_serves_only_some_runs_or_only_later():
    script = "import sys, mnist_jax.training.loop; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "orbax" in loaded
    assert not {"obstore", "sklearn", "tensorboard", "tensorflow_datasets"} & {*loaded}


def test_train_reads_as_a_table_of_contents():
    (train,) = [
        node for node in tree("training.loop").body if isinstance(node, ast.FunctionDef) and node.name == "train"
    ]
    assert train.end_lineno - train.lineno + 1 < 60
