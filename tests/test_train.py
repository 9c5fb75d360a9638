"""The command `train`: most of it in this process, and once for each claim as a real process with real signals."""

import contextlib
import errno
import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from object_store import closed_port, s3_environment, s3_server
from runs import ALL_THREADS, DIGITS, REFERENCE, Ended, Run, end, signal_here, stop
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist_jax import cli, train
from mnist_jax import config as configs
from mnist_jax.checkpoint import object_store
from mnist_jax.checkpoint import remote as remote_module
from mnist_jax.config import Config, ConfigError
from mnist_jax.inference import classifier
from mnist_jax.report import run_status
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import data
from mnist_jax.training.model import MODELS, Network
from mnist_jax.training.recorder import Recorder

CADENCE = ("--log-every-steps", "10", "--eval-every-steps", "20", "--checkpoint-every-steps", "10")
FLAGS = (*DIGITS, "--steps", "40", *CADENCE)
ACCURATE = (
    *(*FLAGS, "--preset", "accurate", "--model", "cnn-large", "--schedule", "cosine"),
    *("--steps", "4", "--log-every-steps", "2", "--eval-every-steps", "3"),
)


def start(workdir: Path, *args: str) -> int:
    """Run the command in this process."""
    return train.main(["--workdir", str(workdir), *args])


def result(workdir: Path) -> tuple[str, bytes]:
    """Return state digest and metrics of a finished run."""
    exited = Run(workdir).events("exit")[-1]
    assert exited["outcome"] == "finished"
    return exited["state_sha256"], Run(workdir).metrics()


def signal_in_phase(monkeypatch, phase: str, number: signal.Signals = signal.SIGTERM, *, first_step: int = 0) -> None:
    """Send this process a signal when a run reaches a phase, at a step or after it."""
    log_phase = Recorder.log_phase

    def log_and_signal(self, name, step):
        log_phase(self, name, step)
        if name == phase and step >= first_step:
            monkeypatch.setattr(Recorder, "log_phase", log_phase)
            signal_here(number)

    monkeypatch.setattr(Recorder, "log_phase", log_and_signal)


@pytest.fixture(scope="module")
def finished(in_this_process, tmp_path_factory) -> Path:
    """The run directory of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished")
    assert start(workdir, *FLAGS) == 0
    return workdir


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the uninterrupted run."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


# Stops and restarts in this process


@pytest.mark.parametrize("phase", ["data", "compile", "train", "evaluate"])
def test_a_signal_in_any_phase_loses_nothing(finished, tmp_path, monkeypatch, capsys, phase):
    signal_in_phase(monkeypatch, phase)
    assert start(tmp_path, *FLAGS, "--preempted-exit-code", "75") == 75
    fields = dict(pair.split("=") for pair in capsys.readouterr().out.splitlines()[-1].split()[1:])
    exited = Run(tmp_path).events("exit")[-1]
    assert (exited["outcome"], exited["code"]) == ("stopped", 75)
    assert {name: str(exited[name]) for name in fields} == fields
    assert fields["signal"] == "SIGTERM"
    if phase in ("data", "compile"):
        assert (fields["step"], fields["state_sha256"]) == ("0", "none")
    if phase == "evaluate":
        assert (fields["step"], Run(tmp_path).steps()[-1], Run(tmp_path).events("evaluation")) == ("20", 20, [])
    assert start(tmp_path) == 0
    assert result(tmp_path) == result(finished)


def test_a_last_evaluation_that_is_interrupted_is_made_once(finished, tmp_path, monkeypatch, capsys):
    """Its checkpoint is committed before, so only the metrics have its accuracy."""
    signal_in_phase(monkeypatch, "evaluate", first_step=40)
    assert start(tmp_path / "run", *FLAGS) == 0
    run = Run(tmp_path / "run")
    assert (run.events("exit")[-1]["outcome"], run.steps()[-1]) == ("stopped", 40)
    assert run_status.examine(run.workdir, verify=True).next_start.action == "resume"
    assert start(run.workdir) == 0
    assert result(run.workdir) == result(finished)
    attempts = len(run.events("start"))
    planned = run_status.examine(run.workdir, verify=True)
    assert (planned.next_start.action, planned.checkpoints[-1].test_accuracy) == ("nothing", accuracy_of(finished))
    capsys.readouterr()
    assert start(run.workdir) == 0
    assert "is finished" in capsys.readouterr().out
    assert [event["phase"] for event in run.events("phase")][-1] == "data"
    assert (len(run.events("start")), len(run.events("evaluation"))) == (attempts + 1, 2)
    assert result(run.workdir) == result(finished)
    assert classifier.load(run.workdir, "best").step == classifier.load(finished, "best").step == 40
    assert classifier.load(run.workdir).test_accuracy == accuracy_of(finished)
    changed = Path(shutil.copytree(run.workdir, tmp_path / "changed"))
    (changed / "metrics.jsonl").write_bytes(run.metrics().replace(b'"train"', b'"other"', 1))
    assert run_status.examine(changed, verify=True).next_start.action == "resume"  # It evaluates again.
    assert start(tmp_path / "child", *FLAGS, "--init-from", f"{run.workdir}@best") == 0
    assert "those of step 40" in capsys.readouterr().out


def accuracy_of(workdir: Path) -> float:
    """Return the test accuracy of a finished run."""
    return Run(workdir).events("exit")[-1]["test_accuracy"]


def test_the_preset_accurate_resumes_exactly(in_this_process, tmp_path, monkeypatch):
    """Its state has normalization statistics and averaged weights, and its images are augmented."""
    small = Network(features=(2, 3), kernel_sizes=(5, 3), unpooled=(2,), hidden=8, batch_norm=True, dropout=0.5)
    monkeypatch.setitem(MODELS, "cnn-large", small)  # of the same kind
    assert start(tmp_path / "whole", *ACCURATE) == 0
    signal_in_phase(monkeypatch, "evaluate")
    assert start(tmp_path / "run", *ACCURATE) == 0
    assert Run(tmp_path / "run").events("exit")[-1]["step"] == 3
    assert start(tmp_path / "run") == 0
    assert result(tmp_path / "run") == result(tmp_path / "whole")


def test_sigusr2_saves_and_the_training_goes_on(finished, tmp_path, monkeypatch):
    signal_in_phase(monkeypatch, "train", signal.SIGUSR2)
    assert start(tmp_path, *FLAGS[:-2], "--checkpoint-every-s", "1000") == 0
    assert "SIGUSR2" in Run(tmp_path).events("save")[0]["reason"]
    assert result(tmp_path) == result(finished)


def test_each_step_is_saved_once(finished):
    steps = [save["step"] for save in Run(finished).events("save")]
    assert len(set(steps)) == len(steps)
    assert steps[-1] == 40


def test_a_finished_run_trains_nothing(copied, finished):
    events = len(Run(copied).events())
    assert start(copied) == 0
    assert result(copied) == result(finished)
    assert not {"train", "compile"} & {event.get("phase") for event in Run(copied).events()[events:]}


def test_flags_must_not_contradict_the_run(copied, capsys):
    before = (copied / "config.json").read_bytes(), Run(copied).events()
    assert start(copied, "--seed", "5", "--batch-size", "32") == 2
    refused = capsys.readouterr()
    assert refused.out == ""
    assert all(word in refused.err for word in ("seed", "batch_size", "64", "32", "--fresh"))
    assert ((copied / "config.json").read_bytes(), Run(copied).events()) == before
    assert start(copied, "--keep", "2") == 0  # This does not change the mathematics.
    assert json.loads((copied / "config.json").read_text())["keep"] == 2


def test_a_length_below_what_is_done_is_refused(in_this_process, tmp_path, capsys):
    assert start(tmp_path, *DIGITS, "--epochs", "0.3") == 0
    before = (tmp_path / "config.json").read_bytes()
    capsys.readouterr()
    for asked, words in (("--steps=5", "steps=5 is below the 7 steps"), ("--epochs=0.2", "makes 4 steps, below the 7")):
        assert start(tmp_path, asked) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert words in err
        assert (tmp_path / "config.json").read_bytes() == before
    assert start(tmp_path, "--epochs", "0.4") == 0
    assert Run(tmp_path).events("exit")[-1]["step"] == 9


def test_the_last_line_has_four_digits_of_the_accuracy(finished, copied, capsys):
    assert start(copied) == 0
    accuracy = Run(finished).events("exit")[-1]["test_accuracy"]
    assert f"test_accuracy={accuracy:.4f} " in capsys.readouterr().out.splitlines()[-1]
    assert len(str(accuracy)) > 6


def test_fresh_moves_the_old_run_aside(copied, finished):
    copied.with_name("copied.old-1").symlink_to("nowhere")
    assert start(copied, *FLAGS, "--fresh", "--keep", "2") == 0
    assert Run(copied).events("phase")[-1]["step"] == 40
    assert not Run(copied).events("resume")
    old = copied.with_name("copied.old-2")
    assert (result(old), Run(old).steps()) == (result(finished), Run(finished).steps())


def test_unusable_data_are_refused(tmp_path, in_this_process, capsys):
    (tmp_path / "empty").mkdir()
    assert start(tmp_path / "run", "--data-dir", str(tmp_path / "empty")) == 2
    assert "train-images-idx3-ubyte.gz" in capsys.readouterr().err
    assert start(tmp_path / "run", *FLAGS) == 0


@pytest.mark.parametrize("directory", ["run", "checkpoints"])
def test_an_error_that_may_not_come_again_exits_with_74(directory, tmp_path, in_this_process, monkeypatch, capsys):
    mkdir = Path.mkdir
    for number, code in ((errno.EIO, 74), (errno.ENOSPC, 74), (errno.EROFS, 2)):
        error = OSError(number, os.strerror(number))

        def fail(self, *args, error=error, **options):
            if self.name == directory:
                raise error
            mkdir(self, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", fail)
            assert start(tmp_path / "run", *FLAGS) == code
        assert str(error) in capsys.readouterr().err


def test_without_network_the_same_command_trains_the_digits(
    tmp_path, environment, in_this_process, monkeypatch, capsys
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    assert train.main(FLAGS[2:]) == 0
    first = capsys.readouterr()
    assert "digits" in first.err
    assert train.main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == first.out.splitlines()[-1]
    assert (tmp_path / "runs" / "digits" / "config.json").exists()


def test_a_signal_while_the_network_is_probed_is_reported(tmp_path, monkeypatch, capsys):
    def probe(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # It is abandoned.

    monkeypatch.setattr(data, "resolve", probe)
    started_s = time.monotonic()
    assert start(tmp_path, "--preempted-exit-code", "75") == 75
    assert time.monotonic() - started_s < 4
    assert capsys.readouterr().out == "stopped step=0 signal=SIGTERM state_sha256=none\n"


# Real processes


def assert_ends_like(reference: Run, run: Run, ended: Ended) -> None:
    assert ended.code == 0, ended.err
    assert ended.fields["state_sha256"] == result(run.workdir)[0]
    assert result(run.workdir) == result(reference.workdir)


def test_a_stopped_and_killed_run_ends_exactly_like_an_undisturbed_one(reference, new_run):
    run, moments, args = new_run(**ALL_THREADS), random.Random(0), REFERENCE
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        process = run.start(*args)
        args = ()  # The run knows its flags.
        run.wait_for_phase("train", process)
        time.sleep(moments.uniform(0, 0.2))
        ended = stop(process, number)
        assert ended.code in (0, -signal.SIGKILL), ended.err
    assert {event["signal"] for event in run.events("signal")} >= {"SIGTERM"}
    assert_ends_like(reference, run, run.finish())
    records = [json.loads(line) for line in reference.metrics().splitlines()]
    for split in ("train", "test"):
        expected = [(record["step"], pytest.approx(record["loss"])) for record in records if record["split"] == split]
        accumulator = EventAccumulator(str(run.workdir / "tensorboard" / split)).Reload()
        assert [(scalar.step, scalar.value) for scalar in accumulator.Scalars("loss")] == expected


def test_sigterm_during_compile_does_not_wait_for_it(new_run):
    run = new_run(XDG_CACHE_HOME=str(new_run("cache").workdir))  # An empty cache: compiling takes seconds.
    process = run.start(*FLAGS)
    assert run.wait_for_phase("compile", process)
    time.sleep(0.5)
    ended = stop(process, signal.SIGTERM)
    assert ended.code == 0, ended.err
    assert ended.fields == {"step": "0", "signal": "SIGTERM", "state_sha256": "none"}
    assert run.events("signal")[-1]["seconds"] < 5
    assert not [event for event in run.events("phase") if event["phase"] == "train"]


IN_IMPORT = """
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "jax":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Interrupt())
from mnist_jax import train
train.exit_process(train.main(sys.argv[1:]))
"""


def test_sigterm_while_jax_is_imported_stops_the_run(environment, tmp_path):
    command = [sys.executable, "-c", IN_IMPORT, "--dataset", "digits", "--workdir", str(tmp_path / "run")]
    ended = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "stopped step=0 signal=SIGTERM state_sha256=none\n"


def test_ctrl_c_twice_in_a_terminal_exits_at_once_with_130(new_run):
    run = new_run()
    slow = str(Path(__file__).with_name("faults.py")), "drive", '[["slow_saves"]]'  # The second comes in the last save.
    command = [sys.executable, *slow, "--workdir", str(run.workdir), *DIGITS, "--steps", "100000"]
    # Ctrl-C is a signal to those whose controlling terminal it is typed on.
    in_terminal = (
        "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY); os.execv(sys.argv[1], sys.argv[1:])"
    )
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", in_terminal, *command],
        env={**os.environ, **run.environment, "TERM": "xterm"},
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    )
    os.close(inside)
    output = b""
    while b" saved " not in output:  # the live line
        output += os.read(terminal, 4096)
    while process.poll() is None:
        os.write(terminal, b"\x03")
        time.sleep(0.01)
    os.close(terminal)
    assert process.returncode == 130
    assert b"Traceback" not in output
    assert b"\x1b[?25l" not in output  # A hidden cursor would stay hidden.
    assert not run.events("exit")


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs 2 cores, and to choose"
)
def test_a_run_resumed_on_one_core_keeps_its_bits(reference, new_run):
    run, cores = new_run(**ALL_THREADS), os.sched_getaffinity(0)
    process = run.start(*REFERENCE)
    assert run.wait_for(lambda: run.lines() > 0, process)
    stopped = stop(process, signal.SIGTERM)
    os.sched_setaffinity(0, sorted(cores)[:1])
    try:
        process = run.start()
    finally:
        os.sched_setaffinity(0, cores)
    assert_ends_like(reference, run, end(process))
    [resume] = run.events("resume")
    assert (resume["step"], resume["exact"]) == (int(stopped.fields["step"]), True)
    assert [event["devices"]["cpu_threads"] for event in run.events("start")] == [len(cores)] * 2


def test_output_that_cannot_be_written_is_no_error(new_run):
    run = new_run()
    args = f"--workdir '{run.workdir}' {' '.join(DIGITS)} --steps 3 --log-every-steps 1"
    script = f"{sys.executable} -m mnist_jax.train {args} >/dev/full 2>&-"
    ended = subprocess.run(["bash", "-c", script], env={**os.environ, **run.environment}, timeout=120, check=False)
    assert ended.returncode == 0
    assert (run.events()[-1]["outcome"], run.events()[-1]["code"]) == ("finished", 0)


# The remote copy


def test_a_run_whose_disk_is_lost_resumes_from_an_object_store(finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with s3_server() as (bucket, variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        signal_in_phase(monkeypatch, "evaluate")
        assert start(run, *FLAGS, "--mirror", f"{bucket}/run") == 0
        assert Run(run).events("copy")[-1]["step"] == Run(run).events("exit")[-1]["step"] == 20
        shutil.rmtree(run)
        assert start(run, *FLAGS, "--mirror", f"{bucket}/run") == 0
    assert result(run) == result(finished)
    [resume] = Run(run).events("resume")
    assert (resume["exact"], resume["lost_steps"]) == (True, 0)


@pytest.fixture
def remote(tmp_path) -> Path:
    """A remote copy with the checkpoints 20 and 30 of a run."""
    directory = tmp_path / "remote"
    for step in (20, 30):
        manifest = directory / "checkpoints" / str(step) / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text('{"files": {}}')
    configs.save(Config(dataset="digits", preset="fast", epochs=15.0), directory / "config.json")
    return directory


@pytest.fixture
def find(remote, tmp_path) -> Callable[..., list[int]]:
    """Return the steps of the checkpoints that a start finds."""

    def find_run(*flags: str) -> list[int]:
        args = ["--dataset", "digits", "--workdir", str(tmp_path / "run"), "--mirror", f"file://{remote}", *flags]
        with StopSignal() as stop_signal, contextlib.ExitStack() as locks:
            train.find_run(args, cli.parse_config(args, Config()), stop_signal, locks)
        return Run(tmp_path / "run").steps()

    return find_run


def test_newer_checkpoints_are_downloaded_once(find, tmp_path, capfd):
    (tmp_path / "run" / "checkpoints" / "25").mkdir(parents=True)
    assert find() == [25, 30]
    assert "30" in capfd.readouterr().err
    assert find() == [25, 30]
    assert capfd.readouterr().err == ""


def test_an_interrupted_download_is_repeated(find, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        take = remote_module._download_small_files

        def fail(*args):
            take(*args)
            raise remote_module.RemoteError("connection lost")

        patch.setattr(remote_module, "_download_small_files", fail)
        with pytest.raises(remote_module.RemoteError, match="connection lost"):
            find()
    assert (tmp_path / "run" / "config.json").exists()
    assert find() == [20, 30]


def test_a_corrupt_remote_checkpoint_is_not_used(find, remote, capfd):
    (remote / "checkpoints" / "30" / "manifest.json").write_text("torn")
    assert find() == [20]
    assert "step 30" in capfd.readouterr().err


def test_fresh_needs_an_empty_remote_copy(find, tmp_path):
    find()
    with pytest.raises(ConfigError, match="--mirror"):
        find("--fresh")
    assert not (tmp_path / "run.old-1").exists()


def test_the_remote_copy_of_another_run_is_not_used(find, remote, tmp_path):
    for flags in (["--seed", "1"], ["--dataset", "mnist"]):
        with pytest.raises(ConfigError, match="other settings"):
            find(*flags)
    saved = configs.load(remote / "config.json")
    configs.save(Config(dataset="mnist"), remote / "config.json")
    configs.save(saved, tmp_path / "run" / "config.json")
    with pytest.raises(ConfigError, match="other settings"):
        find("--dataset", "auto")
    (remote / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"without its config.json"):
        find()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_unreachable_object_store_exits_with_74(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(object_store, "TRIES", 0)
    with closed_port() as port:
        for name, value in s3_environment(port).items():
            monkeypatch.setenv(name, value)
        assert start(tmp_path, "--dataset", "digits", "--mirror", "s3://bucket/run") == 74
    err = capfd.readouterr().err
    assert "s3://bucket/run" in err
    assert "--mirror" in err
    assert start(tmp_path, "--dataset", "digits", "--mirror", "s3://no such bucket") == 2
    assert "no such bucket" in capfd.readouterr().err
    assert not (tmp_path / "config.json").exists()
