import os
import signal
import subprocess
import sys

import pytest

import mnist_jax
from mnist_jax import __main__, cli
from mnist_jax.checkpoint.integrity import CorruptCheckpointError, IncompatibleCheckpointError, ReadError
from mnist_jax.config import ConfigError
from mnist_jax.training.data import DataError


def failing(error: Exception):
    def work(stop, terminal):
        raise error

    return work


def test_the_work_returns_the_exit_code(capfd):
    assert [cli.run(lambda stop, terminal, code=code: code) for code in (0, 1)] == [0, 1]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CorruptCheckpointError(7, "bad-manifest", "it is torn"), 65),
        (IncompatibleCheckpointError("another tree"), 2),
        (ReadError(7, "no threads"), 74),
        (ConfigError("no run there"), 2),
        (DataError("no images"), 2),
        (OSError("no disk"), 2),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(error, code, capfd):
    assert cli.run(failing(error)) == code
    out, err = capfd.readouterr()
    assert (out, err[:7], err[-len(str(error)) - 1 :]) == ("", "error: ", f"{error}\n")


def test_an_unexpected_error_is_70_with_its_traceback(capfd):
    assert cli.run(failing(ZeroDivisionError("by nothing"))) == 70
    err = capfd.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("ZeroDivisionError: by nothing\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_exits_with_128_plus_its_number(number, capfd):
    def work(stop, terminal):
        os.kill(os.getpid(), number)
        return stop.run(lambda: 0)

    assert cli.run(work) == 128 + number
    assert number.name in capfd.readouterr().err


def test_commands_are_listed_and_run_by_name(tmp_path, capfd):
    assert __main__.run([]) == 0
    listing = capfd.readouterr().out
    assert all(f"  {name} " in listing for name in __main__.COMMANDS)
    assert __main__.run(["status", str(tmp_path)]) == 2
    assert __main__.run(["unknown"]) == 2
    assert "unknown" in capfd.readouterr().err
    assert __main__.run(["trian"]) == 2
    assert "did you mean train?" in capfd.readouterr().err


@pytest.mark.parametrize(("args", "code"), [("", 0), ("unknown", 2), ("status --unknown", 2), ("train --unknown", 2)])
def test_closed_streams_change_no_exit_code(args, code):
    command = ["bash", "-c", f"{sys.executable} -m mnist_jax {args} >&-"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr


def test_each_command_prints_the_version(capfd):
    assert __main__.run(["--version"]) == 0
    for name in __main__.COMMANDS:
        with pytest.raises(SystemExit) as end:
            __main__.run([name, "--version"])
        assert end.value.code == 0
    count = len(__main__.COMMANDS) + 1
    assert capfd.readouterr() == (f"mnist_jax {mnist_jax.__version__}\n" * count, "")
