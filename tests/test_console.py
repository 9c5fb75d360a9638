import io
import os
import pty
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TextIO

import pytest

from mnist_jax import console
from mnist_jax.console import Terminal, print_line, print_stderr, repair_standard_streams


class TtyOutput(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch, name: str = "xterm") -> TtyOutput:
    """Make standard output and standard error the same terminal, 40 columns wide."""
    screen = TtyOutput()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", name)
    monkeypatch.setenv("COLUMNS", "40")
    return screen


def write_all_kinds(terminal: Terminal) -> None:
    terminal.info("info")
    if terminal.is_refresh_due:
        terminal.progress("progress" + "x" * 300)
    assert not terminal.is_refresh_due
    terminal.interval("interval")
    terminal.info("y" * 300)


def test_a_pipe_gets_plain_lines_at_once():
    program = "import time; from mnist_jax.console import Terminal; Terminal().interval('step 1'); time.sleep(60)"
    environment = {**os.environ, "FORCE_COLOR": "1"}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"step 1\n"
        process.kill()


def test_a_file_gets_no_live_line(capsys):
    write_all_kinds(Terminal())
    assert capsys.readouterr() == ("info\ninterval\n" + "y" * 300 + "\n", "")


def test_a_dumb_terminal_gets_no_live_line(monkeypatch):
    screen = use_terminal(monkeypatch, "dumb")
    write_all_kinds(Terminal())
    assert screen.getvalue() == "info\ninterval\n" + "y" * 300 + "\n"


def test_a_terminal_gets_one_live_line_that_fits(monkeypatch):
    screen = use_terminal(monkeypatch)
    write_all_kinds(Terminal())
    live = "progress" + "x" * 31  # 39 characters: in the last column a terminal would wrap
    assert screen.getvalue() == f"info\n{live}\x1b[2K\r" + "y" * 300 + "\n"


def test_a_warning_replaces_the_live_line(monkeypatch):
    screen, terminal = use_terminal(monkeypatch), Terminal()
    terminal.progress("progress")
    terminal.warn("warning")
    terminal.info("info")
    assert screen.getvalue() == "progress\x1b[2K\rwarning\ninfo\n"


def test_lines_are_written_verbatim_but_control_characters_escaped(capsys):
    terminal = Terminal()
    text = "runs/:fire:/[bold]é[/bold] 'a' 1.5 \x1b[2Jb\x07c\x9bd\nf\x7f"
    for write in (terminal.info, terminal.interval, terminal.warn, print_stderr):
        write(text)
    escaped = "runs/:fire:/[bold]é[/bold] 'a' 1.5 \\x1b[2Jb\\x07c\\x9bd\nf\\x7f\n"
    assert capsys.readouterr() == (2 * escaped, 2 * escaped)


def test_a_disabled_terminal_writes_nothing(capsys):
    write_all_kinds(Terminal(enabled=False))
    Terminal(enabled=False).warn("warning")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
@pytest.mark.parametrize("method", ["info", "interval", "progress", "warn"])
def test_a_reader_that_is_gone_is_no_error(method, kind, monkeypatch):
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        terminal = Terminal()
        assert terminal.is_live == (kind == "terminal")
        os.close(reader)
        for name in (method, "info", "warn"):
            for text in ("x", "x" * 100_000, "x"):  # less than the buffers hold, and more
                getattr(terminal, name)(text)
        monkeypatch.undo()


def test_closed_streams_are_opened_and_unknown_characters_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", None)
    repair_standard_streams()
    print("é", flush=True)
    print_stderr("lost")
    assert written.getvalue() == b"\\xe9\n"
    sys.stderr.close()


def full_pipe(monkeypatch, *, is_blocking: bool) -> tuple[int, TextIO]:
    """Make standard output a pipe that nothing reads, and return the reading end."""
    reader, writer = os.pipe()
    os.set_blocking(writer, is_blocking)
    stream = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    return reader, stream


def read_later(reader: int) -> str:
    time.sleep(0.2)
    with os.fdopen(reader) as file:
        return file.read()


@pytest.mark.parametrize("is_blocking", [True, False])
def test_an_unread_pipe_blocks_nothing_and_the_last_line_comes(monkeypatch, is_blocking):
    reader, stream = full_pipe(monkeypatch, is_blocking=is_blocking)
    terminal, line = Terminal(blocking=False), "x" * 99
    for _ in range(10_000):  # 1 MB, more than a pipe holds
        terminal.interval(line)
    with ThreadPoolExecutor() as executor:
        text = executor.submit(read_later, reader)
        terminal.last("finished")
        stream.close()
    *lines, missing, last = text.result().splitlines(keepends=True)
    assert last == "finished\n"
    assert set(lines) == {line + "\n"}
    assert missing == f"({10_000 - len(lines)} lines are missing here: nothing read them in time)\n"


def test_the_last_line_waits_briefly(monkeypatch):
    monkeypatch.setattr(console, "LAST_LINE_TIMEOUT_S", 0.1)
    reader, stream = full_pipe(monkeypatch, is_blocking=True)
    terminal = Terminal(blocking=False)
    for _ in range(2000):
        terminal.info("x" * 99)
    terminal.last("finished")
    print_line("finished")
    os.close(reader)
    monkeypatch.undo()
    stream.close()


def test_a_command_waits_for_a_slow_reader(monkeypatch):
    reader, stream = full_pipe(monkeypatch, is_blocking=False)
    with ThreadPoolExecutor() as executor:
        text = executor.submit(read_later, reader)
        Terminal().info("x" * 1_000_000)
        stream.close()
    assert text.result() == "x" * 1_000_000 + "\n"
