"""The launch scripts, with stand-ins for Python, pip and Slurm: `.ci/run` and the test of Slurm use the real ones."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Creates an environment whose pip logs how it is called, and whose python prints from which folder it runs.
PYTHON = """#!/bin/sh
case "$*" in
    -c*) exit 0 ;;
    "-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/pip ;;
    "-m pip "*) sleep 0.2; echo "${PIP_USER:-}${PIP_TARGET:-}${*##*--editable .}" >>pip.log ;;
    *) echo "$(dirname "$(dirname "$(dirname "$0")")"): $*" ;;
esac
"""


def write_program(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout under a path with a space, with the stand-in as `python3` beside it."""
    folder = tmp_path / "the project"
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    write_program(tmp_path / "bin" / "python3", PYTHON)
    return folder


def call(checkout: Path, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Call a command that finds the stand-in first."""
    path = f"{checkout.parent / 'bin'}:/usr/bin:/bin"
    environment = {"PATH": path, "HOME": str(checkout.parent), **variables}
    return subprocess.run(list(map(str, command)), env=environment, cwd=checkout.parent, capture_output=True, text=True)


def installs(checkout: Path) -> list[str]:
    """Return the variables that each call of pip saw."""
    log = checkout / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def test_train_installs_once_and_runs_however_it_is_called(checkout):
    link = checkout.parent / "link"
    link.symlink_to(checkout / "scripts" / "train")
    script, elsewhere = checkout / "scripts" / "train", str(checkout.parent / "bin")
    for command, variables in (
        ((script,), {}),
        (("sh", script), {}),
        ((link,), {}),
        (("sh", "-c", "cd 'the project' && scripts/train --seed 3"), {"CDPATH": f"{elsewhere}:{checkout}"}),
    ):
        arguments = () if "-c" in command else ("--seed", "3")
        done = call(checkout, *command, *arguments, **variables)
        assert done.stdout == f"{checkout}: -m mnist_jax.train --seed 3\n", done
    assert installs(checkout) == [""]


def test_variables_of_pip_do_not_move_the_installation(checkout):
    done = call(checkout, checkout / "scripts" / "train", PIP_USER="1", PIP_TARGET="/elsewhere")
    assert done.returncode == 0, done
    assert installs(checkout) == [""]


@pytest.mark.parametrize(("driver", "extra"), [("575.57", "[cuda12]"), ("580.65", "[cuda13]"), ("1000.1", "[cuda13]")])
def test_driver_of_a_gpu_decides_for_cuda_12_or_13(driver, extra, checkout):
    write_program(checkout.parent / "bin" / "nvidia-smi", f"#!/bin/sh\necho {driver}\necho {driver}\n")
    assert call(checkout, checkout / "scripts" / "train").returncode == 0
    assert installs(checkout) == [extra]


def test_copied_folder_runs_its_own_code(checkout):
    call(checkout, checkout / "scripts" / "train")
    copy = shutil.copytree(checkout, checkout.parent / "copy")
    assert call(copy, copy / "scripts" / "train").stdout.startswith(f"{copy}: ")
    assert len(installs(copy)) == 2


def test_two_first_calls_install_once(checkout):
    both = "the' 'project/scripts/train & the' 'project/scripts/train & wait"
    assert call(checkout, "sh", "-c", both).stdout.count("mnist_jax.train") == 2
    assert installs(checkout) == [""]


def test_unusable_python_is_replaced_or_named(checkout):
    script = checkout / "scripts" / "train"
    bad = write_program(checkout.parent / "old-python", "#!/bin/sh\nexit 1\n")
    done = call(checkout, script, PYTHON=str(bad))
    assert "mnist_jax.train" in done.stdout
    assert f"PYTHON={bad}" in done.stderr
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        write_program(checkout.parent / "bin" / name, "#!/bin/sh\nexit 1\n")
    shutil.rmtree(checkout / ".venv")
    done = call(checkout, script)
    assert done.returncode == 2
    assert "Python 3.11" in done.stderr


def test_checkout_on_windows_keeps_line_endings(tmp_path):
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "scripts", source / "scripts")
    shutil.copy(ROOT / ".gitattributes", source)
    identity = ("-c", "user.name=test", "-c", "user.email=test")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "all")):
        subprocess.run(["git", *command], cwd=source, check=True)
    clone = ["git", "clone", "-q", "-c", "core.autocrlf=true", source, tmp_path / "clone"]
    subprocess.run(clone, check=True)
    for path in (tmp_path / "clone" / "scripts").iterdir():
        assert b"\r" not in path.read_bytes(), path


@pytest.mark.parametrize(("code", "is_requeued"), [(0, False), (75, True), (73, False), (69, True), (2, False)])
def test_task_of_an_array_has_its_own_directory_and_requeues_itself(code, is_requeued, tmp_path):
    log = tmp_path / "log"
    write_program(tmp_path / "srun", f'#!/bin/sh\necho "$@" >>"{log}"\nexit {code}\n')
    write_program(tmp_path / "scontrol", f'#!/bin/sh\necho "$@" >>"{log}"\n')
    variables = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2"}
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_CPUS_PER_TASK": "1", **variables}
    script = ROOT / "scripts" / "slurm.sbatch"
    assert subprocess.run(["bash", script, "--seed", "1"], env=environment).returncode == code
    lines = log.read_text().splitlines()
    assert "--workdir runs/10_2 --seed 1" in lines[0]
    assert lines[1:] == ["requeue 10_2"] * is_requeued
