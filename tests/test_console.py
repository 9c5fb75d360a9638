import io
import os
import pty
import subprocess
import sys

import pytest

from mnist_jax.console import Terminal, print_stderr, repair_standard_streams


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
