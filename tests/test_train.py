import contextlib
import json
import os
import pty
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
from object_store import closed_port, s3_environment, s3_server
from runs import Ended, Run, end, stop
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist_jax import config as configs
from mnist_jax import train
from mnist_jax.checkpoint import remote as mirror_module
from mnist_jax.config import Config, ConfigError
from mnist_jax.runtime.preemption import StopSignal

PHASES = ("data", "compile", "train", "evaluate")


def assert_ended_like(reference, run: Run, ended: Ended) -> None:
    assert ended.code == 0, ended.err
    assert ended.last_line.startswith("finished ")
    assert ended.fields["state_sha256"] == reference.sha256
    assert run.metrics() == reference.metrics


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_again_and_again_ends_bit_for_bit_like_an_uninterrupted_one(reference, new_run, number):
    # The other signals have the same handler; test_preemption.py sends each of them.
    stop_again_and_again(reference, new_run(), number, 2)


def test_a_run_of_the_preset_accurate_stopped_again_and_again_ends_like_an_uninterrupted_one(
    accurate_reference, new_run
):
    stop_again_and_again(accurate_reference, new_run(), signal.SIGTERM, 1)


def stop_again_and_again(reference, run: Run, number: signal.Signals, wanted: int) -> None:
    """Stop a run at arbitrary moments, carry it on each time, and compare its end with that of the undisturbed one."""
    moments = random.Random(number.name)
    args, stops = reference.args, 0
    while stops < wanted:
        process = run.start(*args)
        args = ()  # From now on the bare command, as soon as there is something to carry on.
        run.wait_for_phase(moments.choice(PHASES[1:3]), process)
        time.sleep(moments.uniform(0, 0.2))
        ended = stop(process, number)
        assert ended.code == 0, ended.err
        if ended.last_line.startswith("finished"):
            break
        stops += 1
        assert ended.fields["signal"] == number.name
        assert 0 < run.events("signal")[-1]["seconds"] < 60
        last = run.events()[-1]
        assert last["event"] == "exit"
        assert {name: str(last[name]) for name in ended.fields} == ended.fields
    assert stops >= max(1, wanted - 1)
    assert_ended_like(reference, run, run.finish())


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_any_phase_stops_the_run_and_loses_nothing(reference, new_run, phase):
    if phase == "evaluate" and "digits" in reference.args:
        pytest.skip("the evaluation of 359 digits is over before a signal can meet it")
    # An empty cache makes the compilation last for seconds: it is left, not waited for.
    run = new_run(XDG_CACHE_HOME=str(new_run("cache").workdir)) if phase == "compile" else new_run()
    process = run.start(*reference.args)
    assert run.wait_for_phase(phase, process)
    if phase == "compile":
        time.sleep(0.5)
    sent_s = time.monotonic()
    ended = stop(process, signal.SIGTERM)
    took_s = time.monotonic() - sent_s
    assert ended.code == 0, ended.err
    assert ended.last_line.startswith("stopped ")
    if phase in ("data", "compile"):
        assert ended.fields == {"step": "0", "signal": "SIGTERM", "state_sha256": "none"}
        assert "train" not in [event.get("phase") for event in run.events()]
    if phase == "evaluate":
        assert ended.fields["step"] == "100"
        assert run.events("evaluation") == []
        assert run.steps()[-1] == 100
    assert took_s < 30  # Generous, for the machine may be busy: it was the compilation that was not waited for.
    assert_ended_like(reference, run, run.finish(*(reference.args if phase == "data" else ())))


def test_ctrl_c_twice_in_a_terminal_leaves_at_once_with_130_and_the_rerun_resumes(reference, new_run):
    run = new_run()
    command = [sys.executable, "-m", "mnist_jax.train", "--workdir", str(run.workdir), *reference.args]
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
    assert b"\x1b[?25l" not in output  # A cursor that is hidden would stay so.
    assert run.events()[-1]["event"] != "exit"
    assert_ended_like(reference, run, run.finish(*reference.args))


def test_sigusr2_saves_and_training_goes_on(reference, new_run):
    run = new_run()
    process = run.start(*reference.args, "--checkpoint-every-s", "1000")
    assert run.wait_for_phase("train", process)
    process.send_signal(signal.SIGUSR2)
    assert_ended_like(reference, run, end(process))
    assert run.events("save")[0]["reason"] == "signal SIGUSR2"
    assert 0 <= run.events("save")[0]["step"] < 100


def test_a_stop_has_the_exit_code_that_was_asked_for_and_the_end_has_0(reference, new_run):
    run = new_run()
    process = run.start(*reference.args, "--preempted-exit-code", "75")
    assert run.wait_for_phase("train", process)
    assert stop(process, signal.SIGTERM).code == 75
    assert run.events()[-1]["code"] == 75
    assert_ended_like(reference, run, run.finish())


def test_stopped_where_a_checkpoint_is_no_second_one_is_written(reference, new_run):
    run = new_run()
    run.finish(*reference.args, "--keep", "100")
    saves = run.events("save")
    assert len({save["step"] for save in saves}) == len(saves)
    assert run.steps()[-1] == 200


def test_a_finished_run_says_so_and_trains_nothing(reference, new_run):
    run = new_run()
    first = run.finish(*reference.args)
    began = len(run.events())
    again = run.finish()
    assert again.code == 0
    assert "is finished" in again.out
    assert "resumed" not in again.out
    assert again.last_line == first.last_line
    assert {"train", "compile"}.isdisjoint(event.get("phase") for event in run.events()[began:])
    assert run.metrics() == reference.metrics


def test_a_flag_that_contradicts_the_run_is_refused_with_a_table_and_changes_nothing(reference, new_run):
    run = new_run()
    process = run.start(*reference.args)
    run.wait_for_phase("train", process)
    stop(process, signal.SIGTERM)
    config = (run.workdir / "config.json").read_bytes()
    refused = run.finish("--seed", "5", "--batch-size", "32")
    assert refused.code == 2
    assert refused.out == ""
    assert "seed        0    5" in refused.err
    assert "batch_size  128  32" in refused.err
    assert "--fresh" in refused.err
    assert (run.workdir / "config.json").read_bytes() == config
    # Cadence and housekeeping are free, and kept for the next start.
    ended = run.finish("--keep", "2", "--checkpoint-every-s", "7")
    assert_ended_like(reference, run, ended)
    assert json.loads((run.workdir / "config.json").read_text())["checkpoint_every_s"] == 7


def test_fresh_moves_the_old_run_aside_and_begins_anew(reference, new_run):
    run = new_run()
    run.finish(*reference.args)
    ended = run.finish(*reference.args, "--fresh", "--seed", "1")
    assert ended.code == 0
    assert ended.fields["state_sha256"] != reference.sha256
    old = Run(run.workdir.with_name("run.old-1"))
    assert old.metrics() == reference.metrics
    assert old.steps()[-1] == 200


def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(new_run):
    run = new_run()
    args = ("--dataset", "digits", "--learning-rate", "1e30", "--steps", "60", "--checkpoint-every-steps", "3")
    ended = run.finish(*args)
    assert ended.code == 1
    assert "error: the " in ended.err
    assert "--learning-rate" in ended.err
    assert "Traceback" not in ended.err
    assert run.events()[-1]["outcome"] == "failed"
    assert all(json.loads(line)["loss"] < float("inf") for line in run.metrics().splitlines())
    assert [save["step"] for save in run.events("save")] == run.steps()
    assert run.finish().code == 1  # It says the same again, and has not begun anew.
    assert run.events("resume") or not run.steps()


def test_several_devices_train_and_resume_a_run_saved_on_one_as_numerically_equivalent(new_run):
    several = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    args = ("--dataset", "digits", "--steps", "60", "--log-every-steps", "20")
    plain, alone = new_run("one"), new_run("several", **several)
    whole = plain.finish(*args)
    assert alone.finish(*args).code == 0
    accuracy = float(whole.fields["test_accuracy"])
    assert float(alone.events()[-1]["test_accuracy"]) == pytest.approx(accuracy, abs=0.05)

    moved = new_run("moved")
    process = moved.start(*args, "--steps", "5000", "--checkpoint-every-s", "0.2")
    assert moved.wait_for_phase("train", process)
    stopped = stop(process, signal.SIGTERM)
    moved.environment |= several
    saves = len(moved.events("save"))
    process = moved.start()
    # Otherwise it might stop where it began, and leave no checkpoint of its own.
    assert moved.wait_for(lambda: len(moved.events("save")) > saves, process)
    again = stop(process, signal.SIGTERM)
    [resume] = moved.events("resume")
    assert resume["step"] == int(stopped.fields["step"])
    assert resume["exact"] is False
    assert "devices count 1 -> 4" in resume["changed"]
    assert "numerically equivalent" in again.out
    process = moved.start()
    assert moved.wait_for_phase("train", process)
    stop(process, signal.SIGTERM)
    assert moved.events("resume")[-1]["exact"] is True


def test_a_batch_that_does_not_divide_over_the_devices_is_refused_with_a_way_out(new_run):
    run = new_run(XLA_FLAGS="--xla_force_host_platform_device_count=8")
    ended = run.finish("--dataset", "digits", "--batch-size", "100")
    assert ended.code == 2
    assert "batch_size=100 does not divide over 8 devices; use 96 or 104" in ended.err
    assert "Traceback" not in ended.err


def test_data_that_cannot_be_used_is_an_error_that_a_better_call_mends(new_run, tmp_path):
    run = new_run()
    ended = run.finish("--data-dir", str(tmp_path))
    assert ended.code == 2
    assert "train-images-idx3-ubyte.gz" in ended.err
    assert "Traceback" not in ended.err
    assert run.finish("--dataset", "digits", "--steps", "3").code == 0


def test_another_model_in_the_checkpoint_is_refused_by_the_name_of_a_leaf(new_run):
    run = new_run()
    run.finish("--dataset", "digits", "--steps", "3")
    path = run.workdir / "config.json"
    path.write_text(path.read_text().replace('"cnn"', '"original"'))
    ended = run.finish()
    assert ended.code == 2
    assert "leaf opt_state.0.mu.conv1.bias should be [16] float32 and is [8] float32" in ended.err


def test_scalars_in_tensorboard_are_single_valued_after_stops_and_kills(reference, new_run):
    run = new_run()
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = run.start(*reference.args, "--checkpoint-every-steps", "40")
        run.wait_for_phase("train", process)
        time.sleep(0.3)
        stop(process, number)
    run.finish()
    accumulator = EventAccumulator(str(run.workdir / "tensorboard")).Reload()
    records = [json.loads(line) for line in reference.metrics.splitlines()]
    for split in ("train", "test"):
        for name in ("loss", "accuracy", "learning_rate"):
            shown = [(scalar.step, scalar.value) for scalar in accumulator.Scalars(f"{name}/{split}")]
            expected = [(record["step"], pytest.approx(record[name])) for record in records if record["split"] == split]
            assert shown == expected


def test_the_bare_command_carries_on_the_run_that_was_begun_elsewhere_it_begins_with_the_digits(environment, tmp_path):
    def command(*args: str) -> Ended:
        process = subprocess.Popen(
            [sys.executable, "-m", "mnist_jax.train", *args],
            cwd=tmp_path,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return end(process)

    first = command("--steps", "4")
    assert first.code == 0
    assert first.err.count("notice: ") == 1
    assert "built-in digits" in first.err
    assert (tmp_path / "runs" / "digits" / "config.json").exists()
    assert command().last_line == first.last_line


def test_a_run_over_many_epochs_stopped_and_killed_ends_bit_for_bit_like_an_uninterrupted_one(new_run):
    args = ("--dataset", "digits", "--steps", "250", "--log-every-steps", "30", "--eval-every-steps", "100")
    args = (*args, "--checkpoint-every-s", "0.5")
    whole, run, moments = new_run("whole"), new_run(), random.Random("epochs")
    expected = whole.finish(*args)
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = run.start(*args)
        run.wait_for_phase("train", process)
        time.sleep(moments.uniform(0.2, 0.8))  # any moment will do, in whichever epoch
        stop(process, number)
    assert run.finish().last_line == expected.last_line
    assert run.metrics() == whole.metrics()


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


def test_a_signal_while_jax_is_imported_stops_the_run(environment, tmp_path):
    command = [sys.executable, "-c", IN_IMPORT, "--dataset", "digits", "--workdir", str(tmp_path / "run")]
    ended = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "stopped step=0 signal=SIGTERM state_sha256=none\n"


IN_RESOLVE = """
import sys, time
from mnist_jax import train
from mnist_jax.training import data
data.resolve = lambda *args, **kwargs: (print("asking", file=sys.stderr, flush=True), time.sleep(60))  # It is left.
train.exit_process(train.main(sys.argv[1:]))
"""


def test_a_signal_while_the_network_is_asked_is_told_in_the_last_line(environment, tmp_path):
    command = [sys.executable, "-c", IN_RESOLVE, "--workdir", str(tmp_path / "run"), "--preempted-exit-code", "75"]
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr.readline() == "asking\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 75
    assert out == "stopped step=0 signal=SIGTERM state_sha256=none\n"


def test_a_contradiction_is_refused_before_anything_begins(new_run):
    run = new_run()
    assert run.finish("--dataset", "digits", "--steps", "3").code == 0
    before = run.events()
    assert run.finish("--seed", "5").code == 2
    assert run.events() == before


def test_a_disk_that_takes_no_more_ends_the_run_with_74_and_the_rerun_resumes(reference, new_run):
    run = new_run()
    process = run.start(*reference.args, "--checkpoint-every-steps", "50")
    assert run.wait_for(lambda: len(run.events("save")) > 0, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, 1))
    ended = end(process)
    assert ended.code == 74
    assert "error: " in ended.err
    assert "File too large" in ended.err
    assert "Traceback" not in ended.err
    assert_ended_like(reference, run, run.finish())


@pytest.mark.parametrize("redirection", [">&- 2>&-", "2>&1 | true", ">/dev/full"])
def test_output_that_nobody_takes_does_not_stop_the_training(new_run, redirection):
    run = new_run()
    args = f"--workdir '{run.workdir}' --dataset digits --steps 20 --log-every-steps 1"
    script = f"set -o pipefail; {sys.executable} -m mnist_jax.train {args} {redirection}"
    ended = subprocess.run(["bash", "-c", script], env={**os.environ, **run.environment}, timeout=120, check=False)
    assert ended.returncode == 0
    assert run.events()[-1]["outcome"] == "finished"
    assert run.events()[-1]["code"] == 0


def test_a_name_that_the_output_cannot_write_does_not_stop_the_training(new_run):
    run = new_run("é", PYTHONIOENCODING="ascii")
    ended = run.finish("--dataset", "digits", "--steps", "3")
    assert ended.code == 0, ended.err
    assert "\\xe9" in ended.out


# The copy in an object store


def test_a_run_whose_disk_is_gone_is_brought_back_from_its_mirror_and_ends_alike(new_run, tmp_path):
    args = ("--dataset", "digits", "--steps", "140", "--log-every-steps", "10", "--checkpoint-every-steps", "10")
    args = (*args, "--eval-every-steps", "100")
    whole, run, mirror = new_run("whole"), new_run(), ("--mirror", f"file://{tmp_path}/mirror")
    expected = whole.finish(*args)

    def is_copied(turn: int) -> bool:
        """Tell whether the so-many-th start has copied something that it made itself."""
        starts = [place for place, event in enumerate(run.events()) if event["event"] == "start"]
        since = [event["event"] for event in run.events()[starts[-1] :]] if len(starts) == turn else []
        return "save" in since and since.count("copy") > 1

    for turn, number in enumerate((signal.SIGKILL, signal.SIGTERM), start=1):
        process = run.start(*args, *mirror)
        assert run.wait_for(lambda turn=turn: is_copied(turn), process)
        assert stop(process, number).code == (0 if number == signal.SIGTERM else -number)
        shutil.rmtree(run.workdir)
    ended = run.finish(*args, *mirror)
    assert f"brought back from file://{tmp_path}/mirror: the checkpoints of steps " in ended.err
    assert ended.last_line == expected.last_line
    assert run.metrics() == whole.metrics()
    resumes = run.events("resume")
    assert [resume["exact"] for resume in resumes] == [True, True]  # The history came back as well.
    assert resumes[-1]["lost_steps"] == 0


def test_a_run_is_carried_on_from_an_object_store(new_run):
    digits = (
        "--dataset",
        "digits",
        "--steps",
        "60",
        "--log-every-steps",
        "10",
        "--eval-every-steps",
        "30",
        "--keep",
        "1",
    )
    whole = new_run("whole").finish(*digits)
    with s3_server() as (bucket, variables):
        run = new_run(**variables)
        process = run.start(*digits, "--checkpoint-every-steps", "3", "--mirror", f"{bucket}/run")
        assert run.wait_for(lambda: run.events("copy"), process)
        stopped = stop(process, signal.SIGTERM)
        assert run.events("copy")[-1]["step"] == int(stopped.fields["step"])
        shutil.rmtree(run.workdir)
        ended = run.finish(*digits, "--mirror", f"{bucket}/run")
    assert ended.code == 0, ended.err
    assert ended.last_line == whole.last_line


@pytest.fixture
def mirrored(tmp_path):
    """A mirror that holds the copies of steps 20 and 30 of a run, and what finds that run in a directory."""
    mirror, config = tmp_path / "mirror", Config(dataset="digits", preset="fast", epochs=15.0)
    for step in (20, 30):
        manifest = mirror / "checkpoints" / str(step) / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.write_text('{"files": {}}')
    (mirror / "config.json").write_text(json.dumps(config.to_json()))

    def find(*flags: str) -> list[int]:
        """Return the steps of the checkpoints that a start finds."""
        args = ["--dataset", "digits", "--workdir", str(tmp_path / "run"), "--mirror", f"file://{mirror}", *flags]
        with StopSignal() as stop, contextlib.ExitStack() as locks:
            train.find_run(args, configs.parse(args, Config()), stop, locks)
        return Run(tmp_path / "run").steps()

    return mirror, find


def test_what_the_mirror_knows_more_is_brought_into_the_directory_whatever_is_there(mirrored, tmp_path, capfd):
    _, find = mirrored
    (tmp_path / "run" / "checkpoints" / "25").mkdir(parents=True)
    assert find() == [25, 30]
    assert "the checkpoints of steps 30\n" in capfd.readouterr().err
    assert find() == [25, 30]
    assert "brought back" not in capfd.readouterr().err


def test_where_to_bring_it_back_broke_off_the_next_start_does_it(mirrored, monkeypatch, tmp_path):
    _, find = mirrored
    take = mirror_module._download_small_files

    def break_off(*args):
        take(*args)
        raise mirror_module.RemoteError("the line is cut")

    monkeypatch.setattr(mirror_module, "_download_small_files", break_off)
    with pytest.raises(train.RemoteUnavailableError, match=r"the line is cut\. Try again, or go without --mirror"):
        find()
    assert (tmp_path / "run" / "config.json").exists()
    monkeypatch.setattr(mirror_module, "_download_small_files", take)
    assert find() == [20, 30]


def test_of_a_mirror_whose_newest_copy_is_bad_the_older_one_is_taken_at_each_start(mirrored, capfd):
    mirror, find = mirrored
    (mirror / "checkpoints" / "30" / "manifest.json").write_text("torn")
    for _ in range(2):
        assert find() == [20]
        assert "warning: the copy of step 30 in " in capfd.readouterr().err


def test_to_begin_anew_takes_a_mirror_that_holds_no_run_and_nothing_is_moved_before(mirrored, tmp_path):
    _, find = mirrored
    find()
    with pytest.raises(ConfigError, match="to begin anew name another --mirror"):
        find("--fresh")
    assert not (tmp_path / "run.old-1").exists()
    assert find() == [20, 30]


def test_the_copy_of_another_run_is_neither_taken_nor_written_over(mirrored, tmp_path):
    mirror, find = mirrored
    for flags in (["--seed", "1"], ["--dataset", "mnist"]):
        with pytest.raises(ConfigError, match="holds the copy of a run with other settings; name another --mirror"):
            find(*flags)
    settings = json.loads((mirror / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    (mirror / "config.json").write_text(json.dumps({**settings, "dataset": "mnist"}))
    with pytest.raises(ConfigError, match="holds the copy of a run with other settings"):
        find("--dataset", "auto")
    (tmp_path / "run" / "config.json").unlink()
    (mirror / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"of a run without its config.json; name another --mirror"):
        find()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock"}


def test_a_mirror_that_does_not_answer_or_cannot_exist_is_told_of_before_the_run_begins(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(mirror_module, "TRIES", 0)
    args = ["--dataset", "digits", "--workdir", str(tmp_path / "run"), "--mirror"]
    with closed_port() as port:
        for name, value in s3_environment(port).items():
            monkeypatch.setenv(name, value)
        assert train.main([*args, "s3://bucket/run"]) == 74
    assert "error: s3://bucket/run: " in capfd.readouterr().err
    assert train.main([*args, "s3://no such bucket"]) == 2
    assert "Invalid S3 bucket name" in capfd.readouterr().err
    assert not (tmp_path / "run" / "config.json").exists()
