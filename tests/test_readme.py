import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_jax.__main__ import COMMANDS
from mnist_jax.cli import ExitCode

README = Path(__file__).parents[1] / "README.md"
PAGES = [README, *sorted((README.parent / "docs").glob("*.md"))]


def the_loop() -> str:
    return programs()[0]


def programs() -> list[str]:
    """Return the loop of the README, and the lines that read a checkpoint with Orbax alone."""
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def run(directory, program: str) -> subprocess.Popen[str]:
    directory.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "error", "-u", "-c", program]
    return subprocess.Popen(command, cwd=directory, stdout=subprocess.PIPE, text=True)


def test_the_loop_of_the_readme_is_short():
    assert len([line for line in the_loop().splitlines() if line]) <= 25


def test_the_loop_of_the_readme_ends_alike_with_and_without_a_stop(tmp_path):
    whole, _ = run(tmp_path / "whole", the_loop()).communicate()
    # A stop after 1,700 steps, sent from within, where no timing can miss it.
    line = "        if step % 500 == 0:\n"
    assert line in the_loop()
    stop_itself = "        if step == 1700: import os, signal; os.kill(os.getpid(), signal.SIGTERM)\n"
    stopping = the_loop().replace(line, stop_itself + line)
    stopped, _ = run(tmp_path / "cut", stopping).communicate()
    assert stopped.splitlines()[-1].split()[0] == "1700"
    resumed, _ = run(tmp_path / "cut", the_loop()).communicate()
    assert stopped.splitlines()[0].startswith("the checkpoint of step 500 was saved")
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]
    step, sha256 = resumed.splitlines()[-1].split()
    assert (step, len(sha256)) == ("3000", 64)


def test_orbax_alone_reads_a_run_as_the_readme_says(trained_run):
    read = programs()[1]
    assert "mnist_jax" not in read
    head = f"from pathlib import Path\nimport sys\ncheckpoints = Path({str(trained_run.workdir / 'checkpoints')!r})\n"
    lines = [f"print(sorted({line}))" if line.startswith(("ocp.", "v1.")) else line for line in read.splitlines()]
    program = head + "\n".join(lines) + "\nassert 'mnist_jax' not in sys.modules"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    state, items, loaded = ended.stdout.splitlines()
    assert "'params'" in state
    assert items == "['state']"
    assert "'params'" in loaded


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What --help says of each command, in a terminal of 80 columns."""
    modules = {name: f"mnist_jax.{name}" for name in COMMANDS} | {"benchmark": "benchmarks"}

    def ask(module: str) -> str:
        command = [sys.executable, "-m", module, "--help"]
        environment = {**os.environ, "COLUMNS": "80"}
        return subprocess.run(
            command, cwd=README.parent, env=environment, capture_output=True, text=True, check=True
        ).stdout

    return {name: ask(module) for name, module in modules.items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_flag_that_is_named_exists(page, helps):
    flags = set(re.findall(r"^│ (?:-h, )?(--[a-z0-9-]+)", "".join(helps.values()), re.MULTILINE))
    assert set(re.findall(r"--[a-z][a-z0-9-]+", page.read_text())) <= flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_file_that_is_named_is_there(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^):]+)\)|(?:src|srcset)=\"([^\":]+)\"", text)
    assert all((page.parent / path).is_file() for link in links for path in link if path)
    modules = re.findall(r"`([a-z_/]+\.py)`", text)
    roots = README.parent, README.parent / "mnist_jax"
    assert all(any((root / module).is_file() for root in roots) for module in modules)
    scripts = re.findall(r"scripts/[a-z.]+[a-z]", text)
    assert all((README.parent / script).is_file() for script in scripts)


def test_each_command_is_in_the_table_and_its_help_fits_a_terminal(helps):
    table = README.read_text().partition("## What to do with a run")[2].partition("##")[0]
    assert set(re.findall(r"^\| `([a-z]+) ", table, re.MULTILINE)) == {*COMMANDS} - {"train"}
    for name in COMMANDS:
        assert max(map(len, helps[name].splitlines()[1:])) <= 80, name


def test_each_exit_code_is_in_the_table():
    table = README.read_text().partition("## When something goes wrong")[2].partition("##")[0]
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert codes == set(ExitCode)


def test_each_digest_is_one():
    digests = re.findall(r"state_sha256=(\S*)", README.read_text())
    assert len(digests) >= 2
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)


def test_the_readme_is_read_in_five_minutes():
    prose = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL)
    assert len(prose.split()) <= 5 * 260
