import os
import signal

import pytest

from mnist_jax import cli
from mnist_jax.checkpoint.integrity import CorruptCheckpointError, IncompatibleCheckpointError, ReadError
from mnist_jax.config import ConfigError
from mnist_jax.training.data import DataError


def failing(error: Exception):
    def work(stop, terminal):
        raise error

    return work


@pytest.mark.parametrize("code", [0, 1])
def test_the_work_says_how_the_command_ends(code, capfd):
    assert cli.run(lambda stop, terminal: code) == code
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            CorruptCheckpointError(7, "bad-manifest", "it is torn"),
            65,
            "error: a checkpoint is damaged, step 7: it is torn",
        ),
        (IncompatibleCheckpointError("another tree"), 2, "error: another tree"),
        (ReadError(7, "no threads"), 74, f"error: {ReadError(7, 'no threads')}"),
        (ConfigError("no run there"), 2, "error: no run there"),
        (DataError("no images"), 2, "error: no images"),
        (OSError("no disk"), 2, "error: no disk"),
    ],
)
def test_what_goes_wrong_is_said_in_a_line_and_has_its_exit_code(error, code, line, capfd):
    assert cli.run(failing(error)) == code
    assert capfd.readouterr() == ("", f"{line}\n")


def test_an_error_that_nobody_foresaw_is_70_and_told_in_full(capfd):
    assert cli.run(failing(ZeroDivisionError("by nothing"))) == 70
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("Traceback")
    assert err.endswith("ZeroDivisionError: by nothing\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_work_with_128_plus_its_number(number, capfd):
    def work(stop, terminal):
        os.kill(os.getpid(), number)
        return stop.run(lambda: 0)

    assert cli.run(work) == 128 + number
    assert capfd.readouterr() == ("", f"{number.name}: stopped before the end\n")
