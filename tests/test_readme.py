import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


def the_loop() -> str:
    [loop] = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return loop


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


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """The flags of all commands, as their --help has them."""
    modules = ("mnist_jax.train", "mnist_jax.status", "mnist_jax.replay", "benchmarks")
    commands = [[sys.executable, "-m", module, "--help"] for module in modules]
    helps = [
        subprocess.run(command, cwd=README.parent, capture_output=True, text=True, check=True).stdout
        for command in commands
    ]
    return set(re.findall(r"^│ (?:-h, )?(--[a-z0-9-]+)", "".join(helps), re.MULTILINE))


@pytest.mark.parametrize("flag", re.findall(r"--[a-z][a-z0-9-]+", README.read_text()))
def test_each_flag_that_the_readme_names_exists(flag, flags):
    assert flag in flags
