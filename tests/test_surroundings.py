"""A training in the surroundings of real machines: it works, or it is refused with one line that names the cause."""

import ctypes
import os
import pwd
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from faults import set_in_jax
from runs import DIGITS, Run, end, stop

from mnist_jax.config import ConfigError
from mnist_jax.training import compatibility, data

ARGS = (*DIGITS, "--steps", "3")


@pytest.mark.parametrize("variable", ["JAX_PLATFORMS=foo", "JAX_ENABLE_X64=maybe", "NPROC=all"])
def test_unusable_variable_is_refused_in_one_line(variable, new_run):
    name, _, value = variable.partition("=")
    run = new_run(PJRT_NPROC="")  # which overrides NPROC
    if name == "JAX_PLATFORMS":  # JAX only keeps the value at its import, so it can come later.
        run.faults = ((set_in_jax, name, value),)
    else:
        run.environment[name] = value
    ended = run.finish(*ARGS)
    assert ended.code == 2, ended
    [line] = ended.err.splitlines()
    assert name in line
    assert value in line


@pytest.mark.parametrize(
    ("context", "name"),
    [
        (lambda: jax.disable_jit(), "JAX_DISABLE_JIT"),
        (lambda: jax.enable_x64(True), "JAX_ENABLE_X64"),
        (lambda: jax.numpy_rank_promotion("raise"), "JAX_NUMPY_RANK_PROMOTION"),
        (lambda: jax.numpy_dtype_promotion("strict"), "JAX_NUMPY_DTYPE_PROMOTION"),
        (lambda: jax.transfer_guard_device_to_host("disallow"), "JAX_TRANSFER_GUARD_DEVICE_TO_HOST"),
    ],
)
def test_setting_of_jax_that_breaks_training_is_refused(context, name):
    with context(), pytest.raises(ConfigError, match=f"{name}="):
        compatibility.prepare_jax(None)


def test_every_setting_that_may_change_numbers_is_recorded():
    settings = compatibility.describe_environment()["settings"]
    assert {"jax_random_seed_offset", "jax_threefry_partitionable", "jax_default_matmul_precision"} <= settings.keys()
    assert not {name for name in settings if "cache" in name or "log" in name}


def test_user_without_home_trains_without_a_cache(monkeypatch, capsys):
    """As in a container with a user id that no passwd entry has."""
    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
    compatibility.prepare_jax(None)
    assert "XDG_CACHE_HOME" in capsys.readouterr().err
    notices = []
    assert data.resolve("auto", None, notify=notices.append) == "digits"
    assert "home" in notices[0]


ROUGH = {
    "COLUMNS": "0",
    "LINES": "0",
    "LANG": "C",
    "LC_ALL": "C",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "JAX_DEBUG_NANS": "1",
    "JAX_LEGACY_PRNG_KEY": "error",
    "PYTHONWARNINGS": "error",
    "TERM": "unknown",
}


SURROUND = """
import os, signal, sys
os.umask(0o077)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.close(0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def test_rough_surroundings(environment, tmp_path):
    """Odd variables, blocked signals, ignored SIGINT, no standard input, a full pipe: it trains, stops and saves."""
    run = Run(tmp_path / "run")
    flags = (*DIGITS, "--steps", "1000000", "--log-every-steps", "1", "--checkpoint-every-s", "0.5")
    command = [sys.executable, "-c", SURROUND, "-m", "mnist_jax.train", "--workdir", str(run.workdir), *flags]
    process = subprocess.Popen(
        command, env={**os.environ, **environment, **ROUGH}, stdout=subprocess.PIPE, pipesize=4096
    )
    assert run.wait_for(lambda: run.lines() > 150, process)  # 80 lines fill the pipe, which nothing reads.
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert run.wait_for(lambda: run.events("signal"), process)  # After the save, which needs no reader either.
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    *_, missing, last = out.decode().splitlines()
    assert "are missing here" in missing
    assert last.startswith("stopped step=")
    assert run.events("exit")[-1]["outcome"] == "stopped"


def test_signals_to_threads_are_harmless_and_an_escalation_loses_one_interval(new_run):
    """Signals to threads of jaxlib corrupt its memory. A notebook's or an editor's stop button escalates to SIGKILL."""
    flags = (*DIGITS, "--steps", "1000000", "--log-every-steps", "1", "--checkpoint-every-steps", "20")
    run = new_run()
    process = run.start(*flags)
    assert run.wait_for(lambda: len(run.events("save")) > 1, process)
    threads = [int(task.name) for task in Path(f"/proc/{process.pid}/task").iterdir()]
    for thread in threads:
        if thread != process.pid:
            ctypes.CDLL(None).tgkill(process.pid, thread, signal.SIGTERM)
    before = run.lines()
    assert run.wait_for(lambda: run.lines() > before + 20, process)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGINT, signal.SIGKILL):
        process.send_signal(number)
        time.sleep(0.2)  # as Jupyter and editors wait before the next signal
    end(process)
    process = run.start(*flags)
    assert run.wait_for(lambda: run.events("resume"), process)
    assert stop(process, signal.SIGTERM).code == 0
    [resume] = run.events("resume")
    assert resume["lost_steps"] <= 40  # those of an interval, and those of a save in progress


def test_deleted_current_directory_is_refused(tmp_path, environment):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); import mnist_jax.train as t; t.main([])"
    root = str(Path(__file__).parent.parent)
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, **environment, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert "current directory" in ended.stderr
