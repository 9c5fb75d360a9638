import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from runs import in_new_process

from benchmarks.__main__ import Options as BenchmarkOptions
from mnist_jax.__main__ import COMMANDS
from mnist_jax.cli import ExitCode

README = Path(__file__).parents[1] / "README.md"
PAGES = [README, *sorted((README.parent / "docs").glob("*.md"))]
LOOP, ORBAX = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def run(program: str, directory: Path) -> list[str]:
    """Run a program in a directory, and return its output."""
    directory.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "error", "-u", "-c", program]
    return subprocess.run(command, cwd=directory, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()


def run_forked(program: str, directory: str) -> list[str]:
    """Do the same in this process."""
    os.chdir(directory)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(program, {})
    return out.getvalue().splitlines()


def section(title: str) -> str:
    return README.read_text().partition(f"## {title}")[2].partition("##")[0]


def test_the_loop_resumes_exactly(tmp_path):
    assert len([line for line in LOOP.splitlines() if line]) <= 25
    line = "        if step % 500 == 0:\n"
    loop = LOOP.replace("step < 3000", "step < 2000")
    stopping = loop.replace(
        line, "        if step == 1700: import os, signal; os.kill(os.getpid(), signal.SIGTERM)\n" + line
    )
    assert LOOP != loop != stopping
    whole = run(loop, tmp_path / "whole")
    (tmp_path / "stopped").mkdir()
    stopped = in_new_process(run_forked, stopping, str(tmp_path / "stopped"))
    assert stopped[-1].split()[0] == "1700"
    assert any("500" in result for result in stopped[:-1])
    resumed = in_new_process(run_forked, loop, str(tmp_path / "stopped"))
    assert resumed[-1] == whole[-1]
    step, sha256 = resumed[-1].split()
    assert (step, len(sha256)) == ("2000", 64)


def test_orbax_alone_reads_a_checkpoint(small_run, tmp_path):
    checkpoints = small_run.workdir / "checkpoints"
    lines = [f"print(sorted({line}))" if line.startswith(("ocp.", "v1.")) else line for line in ORBAX.splitlines()]
    head = f"from pathlib import Path\nimport sys\ncheckpoints = Path({str(checkpoints)!r})\n"
    program = head + "\n".join(lines).replace("468", "40") + "\nassert 'mnist_jax' not in sys.modules"
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    state, items, loaded = ended.stdout.splitlines()
    assert "'params'" in state
    assert items == "['state']"
    assert "'params'" in loaded


def test_flags_and_commands_exist(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    helps = {}
    for name in COMMANDS:
        package = ".__main__" if name in ("demo", "report") else ""
        with pytest.raises(SystemExit):
            importlib.import_module(f"mnist_jax.{name}{package}").main(["--help"])
        helps[name] = capsys.readouterr().out
        assert max(map(len, helps[name].splitlines())) <= 80, name
    with pytest.raises(SystemExit):
        tyro.cli(BenchmarkOptions, args=["--help"])
    helps["benchmark"] = capsys.readouterr().out
    flags = set(re.findall(r"^\W*(?:-h, )?(--[a-z0-9-]+)", "".join(helps.values()), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"--[a-z][a-z0-9-]+", page.read_text())) <= flags, page
    listed = re.findall(r"^\| `([a-z]+) ", section("What to do with a run"), re.MULTILINE)
    assert set(listed) == {*COMMANDS} - {"train"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^):]+)\)|(?:src|srcset)=\"([^\":]+)\"", text)
    assert all((page.parent / path).is_file() for link in links for path in link if path)
    modules = re.findall(r"`([a-z_/]+\.py)`", text)
    roots = README.parent, README.parent / "mnist_jax"
    assert all(any((root / module).is_file() for root in roots) for module in modules)
    assert all((README.parent / script).is_file() for script in re.findall(r"scripts/[a-z.-]+[a-z]", text))


def test_exit_codes_are_in_the_table():
    codes = re.findall(r"^\| (\d+) \|", section("When something goes wrong"), re.MULTILINE)
    assert set(map(int, codes)) == set(ExitCode)


def test_the_readme_is_read_in_five_minutes():
    prose = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL)
    assert len(prose.split()) <= 5 * 260
