"""The loop: the order of events of a run, the same on every process. Process 0 differs only in what it writes."""

import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mnist_jax import config as configs
from mnist_jax.checkpoint.checkpoint import Checkpoint, list_checkpoints
from mnist_jax.checkpoint.checkpointer import Checkpointer, Restored
from mnist_jax.checkpoint.integrity import SHORTAGES, NoGoodCheckpointError
from mnist_jax.config import Config, ConfigError
from mnist_jax.records.metrics import Journal
from mnist_jax.runtime import devices
from mnist_jax.runtime.multihost import ProcessGroup
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import compatibility, data
from mnist_jax.training.data import Dataset
from mnist_jax.training.dispatch import Dispatcher
from mnist_jax.training.recorder import Outcome, Recorder, finished
from mnist_jax.training.trainer import Trainer


def train_and_evaluate(
    config: Config,
    checkpointer: Checkpointer,
    recorder: Recorder,
    *,
    stop: StopSignal,
    group: ProcessGroup,
    loading: "Future[Dataset] | None" = None,
) -> Outcome:
    """Resume a run from its newest good checkpoint, or begin it, and train until its end or until a signal.

    Args:
        config: what the run is.
        checkpointer: the checkpoints in the run directory.
        recorder: the records in the run directory.
        stop: receives the signals of this process.
        group: the processes that train together; `share_run` was called.
        loading: the data, if the caller has begun to load them.

    Raises:
        ConfigError: the config does not fit the devices, or the data is not what the run began with.
        DataError, CheckpointError: what the run begins with is not there, or cannot be used.
        DivergedError: the loss is not finite; that state is not saved.
        OSError: a file of the records cannot be written.
        ProcessLostError: another process is gone.
        SaveError: the last save failed.
        StoppedError: a signal came before the training began; everything that was made is saved.
    """
    environment = compatibility.merge_environments(group.gather(compatibility.describe_environment()))
    recorder.start(environment)
    recorder.phase("data", checkpointer.newest_step)
    dataset = stop.run(loading.result if loading else lambda: load_data(config, recorder))
    check_same_data(dataset, group)
    trainer = make_trainer(config, dataset)
    restored = restore(trainer, dataset, environment, checkpointer, recorder) if group.is_primary else None
    step, is_over, known = group.broadcast(describe_start(restored, trainer, recorder) if group.is_primary else None)
    if is_over:
        return finished(step, recorder.journal, checkpointer)
    recorder.phase("compile", step or 0)
    stop.run(trainer.compile)
    if restored is not None:
        state = restored.state
    elif step is not None:
        state = Checkpoint(checkpointer.directory / str(step)).read(trainer.abstract_state)[0]
    else:
        state = stop.run(trainer.init_state)
    stop.run(lambda: checkpointer.prepare(state))
    group.start_training()
    dispatcher = Dispatcher(trainer, dataset, state, stop=stop, group=group, **known)
    recorder.begin_training(dispatcher, {"data": compatibility.describe_data(dataset), **environment})
    train(dispatcher, checkpointer, recorder)
    return recorder.end(stop)


def train(dispatcher: Dispatcher, checkpointer: Checkpointer, recorder: Recorder) -> None:
    """Train until the end or until a signal.

    Raises:
        DivergedError, OSError, ProcessLostError: as `train_and_evaluate`.
    """
    evaluate_if_due(dispatcher, checkpointer, recorder)  # A stop may have interrupted this very evaluation.
    while not dispatcher.is_over and not dispatcher.agreement.should_stop:
        recorder.interval(dispatcher.advance())
        recorder.progress()
        evaluate_if_due(dispatcher, checkpointer, recorder)
        recorder.ask_to_save_if_due()
        if reason := dispatcher.pop_save_reason():
            save(dispatcher, checkpointer, recorder, reason)
        recorder.report_saves()
    dispatcher.block_until_ready()


def save(dispatcher: Dispatcher, checkpointer: Checkpointer, recorder: Recorder, reason: str) -> None:
    """Begin to save the state in the background."""
    request = recorder.prepare_save(reason)
    checkpointer.save(dispatcher.step, dispatcher.state, valid=dispatcher.is_finite(), **request)


def evaluate_if_due(dispatcher: Dispatcher, checkpointer: Checkpointer, recorder: Recorder) -> None:
    """Evaluate if it is time to, record the metrics, and save the best state so far."""
    if dispatcher.is_evaluation_due:
        recorder.begin_evaluation(dispatcher.pop_train_metrics())
        metrics, is_best = dispatcher.evaluate()
        recorder.evaluation(metrics)
        if is_best:
            save(dispatcher, checkpointer, recorder, "best test accuracy so far")


def load_data(config: Config, recorder: Recorder) -> Dataset:
    """Return the data set of a run."""
    return data.load(config.dataset, config.data_dir, notify=recorder.terminal.info)


def check_same_data(dataset: Dataset, group: ProcessGroup) -> None:
    """Check that this process has the data of process 0.

    Raises:
        ConfigError: it has other data.
    """
    if dataset.fingerprint != group.broadcast(dataset.fingerprint):
        raise ConfigError(f"process {group.index} has other data than process 0, of another SHA-256")


def share_run(
    config: Config | None, workdir: Path | None, *, stop: StopSignal, group: ProcessGroup
) -> tuple[Config, Path]:
    """Prepare JAX for a run, and return config and directory, which process 0 knows and broadcasts.

    Args:
        config: what the run is; None on the other processes.
        workdir: its directory, whose lock process 0 holds; None on the other processes.
        stop: receives the signals of this process.
        group: the processes that train together.

    Raises:
        ConfigError: this process does not see the directory of process 0.
        ProcessLostError: one of them is gone, or does not see the directory.
        StoppedError: a signal came.
    """
    if config is not None and workdir is not None:
        compatibility.prepare_jax(compatibility.cpu_threads_of(list_checkpoints(workdir / "checkpoints")))
        if group.is_alone:
            return config, workdir
        cpu_threads = devices.cpu_threads()  # as many on all, whatever the cores of each
        group.broadcast([config.to_json(), str(workdir.absolute()), (workdir / "lock").read_text(), cpu_threads])
    else:
        settings, directory, lock, cpu_threads = group.broadcast(None)
        config, workdir = configs.from_json(settings, Path(directory) / "config.json"), Path(directory)
        check_is_shared(workdir, lock, stop, group)
        compatibility.prepare_jax(cpu_threads)
    group.gather(None)
    stop.run(jax.devices)  # It waits for all processes.
    return config, workdir


def open_run(config: Config, workdir: Path, *, enabled: bool) -> tuple[Checkpointer, Recorder]:
    """Open the checkpoints and the records of a run, whose directory is made if it is not there.

    Raises:
        ConfigError: the directory cannot hold a run.
        OSError: something is short, which may pass.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        checkpointer = Checkpointer(workdir / "checkpoints", keep=config.keep, is_primary=enabled)
        return checkpointer, Recorder(config, workdir, checkpointer, enabled=enabled)
    except OSError as error:
        what = f"{workdir} cannot hold a run ({error})"
        if error.errno in SHORTAGES:
            raise OSError(f"{what}; make room, or raise the limits of this process, and start again") from error
        raise ConfigError(f"{what}; choose another --workdir") from error


def check_is_shared(workdir: Path, lock: str, stop: StopSignal, group: ProcessGroup) -> None:
    """Check that this process sees the run directory of process 0, and not another one of the same name.

    A network's file system may show a new file half a minute late.

    Raises:
        ConfigError: it does not see it in time, or what is there is no run directory.
        StoppedError: a signal came.
    """
    path = workdir / "lock"
    deadline_s = time.monotonic() + group.timeout_s
    while True:
        configs.check_directory(workdir)
        if path.exists() and path.read_text() == lock:
            return
        stop.check()
        if time.monotonic() > deadline_s:
            raise ConfigError(
                f"process {group.index} does not find in {workdir} what process 0 wrote there; all processes need the "
                "same directory, on a file system that they share: --workdir DIR"
            )
        time.sleep(0.05)


def make_trainer(config: Config, dataset: Dataset) -> Trainer:
    """Return the trainer of a run on the devices at hand, with the config checked against data and devices.

    Raises:
        ConfigError: the batch does not fit.
    """
    if jnp.result_type(float) != jnp.float32:
        raise ConfigError("JAX_ENABLE_X64 is set, and the training computes in 32 bits; unset it")
    mesh = devices.data_mesh()
    try:
        devices.check_batch_divides(config.batch_size, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Trainer(config, mesh, train_size=len(dataset.train_labels), test_size=len(dataset.test_labels))


def is_finished(step: int, trainer: Trainer, journal: Journal) -> bool:
    """Tell whether nothing is left to do at a step: all updates are made, and the result is evaluated."""
    return step >= trainer.total_steps and journal.accuracy_at(step) is not None


def describe_start(restored: Restored | None, trainer: Trainer, recorder: Recorder) -> list[Any]:
    """Return what the other processes need to begin alike, as JSON values.

    That is the step to resume from, None for a new run; whether the run is finished; and the arguments of `Dispatcher`
    about evaluations.
    """
    step = restored.step if restored else 0
    best = recorder.journal.best() or {}
    known = {"is_evaluated": recorder.journal.accuracy_at(step) is not None, "best_accuracy": best.get("accuracy")}
    return [step if restored else None, is_finished(step, trainer, recorder.journal), known]


def restore(
    trainer: Trainer,
    dataset: Dataset,
    environment: dict[str, Any],
    checkpointer: Checkpointer,
    recorder: Recorder,
) -> Restored | None:
    """Return the newest good checkpoint, None where there is none, and cut the records back to it.

    It reports where the run resumes and whether bit for bit. Process 0 only.

    Raises:
        CheckpointError: there are checkpoints, and none can be used.
        ConfigError: the config or the data are not those of the checkpoint.
        OSError: the records cannot be cut back.
    """
    journal, terminal = recorder.journal, recorder.terminal
    restored = checkpointer.restore(like=trainer.abstract_state)
    if restored is None:
        if journal.tells_of_saves():
            raise NoGoodCheckpointError(
                f"the checkpoints of this run are gone from {checkpointer.directory}; "
                "bring them back, or begin anew with --fresh"
            )
        if lost_steps := journal.rewind(0):
            journal.event("lost", step=0, lost_steps=lost_steps)
            terminal.info(f"nothing had been saved yet: {lost_steps} steps or more are recomputed")
        terminal.info(
            f"training {trainer.config.model} on {dataset.name}: {trainer.total_steps} steps in {recorder.workdir}\n"
            "Ctrl-C saves and exits; the same command resumes."
        )
        return None
    for corrupt, place in restored.quarantined:
        journal.event("quarantine", step=corrupt.step, reason=str(corrupt), moved_to=str(place))
        moved = f"It was moved to {place}, and an older one is used."
        terminal.warn(f"warning: a checkpoint is not good, {corrupt}. {moved}")
    compatibility.check_step(restored.step, restored.state)
    metadata = compatibility.check_metadata(restored.metadata, restored.step)
    compatibility.check_same_run(metadata, trainer.config, dataset, where=checkpointer.directory)
    # Only now is it known that the config does not contradict the checkpoint.
    recorder.save_config()
    recorder.copies.begin(restored.step)  # The last start may have ended before that was done.
    changed = compatibility.diff_environment(metadata, environment)
    lost_steps = journal.rewind(restored.step) - restored.step
    if not journal.still_begins_with(metadata["metrics"]):
        journal.event("metrics_changed", step=restored.step)
        terminal.warn("warning: metrics.jsonl is not what it was: lines before this step are missing or changed")
    journal.event(
        "resume",
        step=restored.step,
        exact=not changed,
        changed=changed,
        lost_steps=lost_steps,
        saved_because=metadata["reason"],
    )
    if is_finished(restored.step, trainer, journal):
        terminal.info(f"{recorder.workdir} is finished: --fresh starts it anew, --workdir DIR begins another run")
        return restored
    lost = f"; {lost_steps} steps or more after it are recomputed" if lost_steps else ""
    manner = f"numerically equivalent, not bit for bit, for this changed: {'; '.join(changed)}" if changed else "exact"
    terminal.info(
        f"resumed {trainer.config.model} on {dataset.name} from step {restored.step} of {trainer.total_steps} "
        f"(saved because: {metadata['reason']}{lost}): {manner}"
    )
    return restored
