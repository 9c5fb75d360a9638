"""What comes before the first step: open and check a run, restore its newest checkpoint."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from mnist_jax import config as configs
from mnist_jax.checkpoint.checkpoint import list_checkpoints
from mnist_jax.checkpoint.checkpointer import Checkpointer, Restored
from mnist_jax.checkpoint.integrity import NoGoodCheckpointError
from mnist_jax.config import Config, ConfigError
from mnist_jax.runtime import devices
from mnist_jax.runtime.multihost import ProcessGroup
from mnist_jax.runtime.preemption import StopSignal
from mnist_jax.training import compatibility, initial_weights
from mnist_jax.training.data import Dataset
from mnist_jax.training.recorder import Recorder
from mnist_jax.training.trainer import Trainer


def open_run(config: Config, workdir: Path, *, stop: StopSignal, enabled: bool) -> tuple[Checkpointer, Recorder]:
    """Open the checkpoints and the records of a run; the directory is created if it does not exist.

    Raises:
        ConfigError: the directory cannot hold a run.
        OSError: the same start may succeed later, see `config.directory_error`.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        checkpointer = Checkpointer(workdir / "checkpoints", keep=config.keep, is_primary=enabled)
        return checkpointer, Recorder(config, workdir, checkpointer, stop=stop, enabled=enabled)
    except OSError as error:
        raise configs.directory_error(workdir, error) from error


def share_run(
    config: Config | None, workdir: Path | None, *, stop: StopSignal, group: ProcessGroup
) -> tuple[Config, Path]:
    """Broadcast config and directory from process 0, configure JAX, and initialize its backend.

    Args: as `loop.run`.

    Raises:
        ConfigError: this process does not see the directory of process 0.
        ProcessLostError: another process is lost, or does not see the directory.
        StoppedError: a signal came.
    """
    if config is not None and workdir is not None:
        compatibility.prepare_jax(compatibility.cpu_threads_of(list_checkpoints(workdir / "checkpoints")))
        if group.is_alone:
            stop.run(compatibility.initialize_devices)
            return config, workdir
        cpu_threads = devices.cpu_threads()  # The bits depend on it, so it is the same on all processes.
        lock, notice = (workdir / "lock").read_text(), config.preemption_notice
        group.broadcast([config.to_json(), str(workdir.absolute()), lock, cpu_threads, notice])
    else:
        settings, directory, lock, cpu_threads, notice = group.broadcast(None)
        config, workdir = configs.from_json(settings, Path(directory) / "config.json"), Path(directory)
        config = dataclasses.replace(config, preemption_notice=notice)
        check_is_shared(workdir, lock, stop, group)
        compatibility.prepare_jax(cpu_threads)
    group.gather(None)
    stop.run(compatibility.initialize_devices)  # It waits for all processes.
    return config, workdir


def check_is_shared(workdir: Path, lock: str, stop: StopSignal, group: ProcessGroup) -> None:
    """Check that this process sees the run directory of process 0: its lock file has the same content.

    Network file systems may show a new file up to half a minute late.

    Raises:
        ConfigError: the file does not appear in time, or the directory is not a run directory.
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
                f"process {group.index} does not see in {workdir} what process 0 wrote there; use a --workdir DIR on a "
                "file system that all processes share"
            )
        time.sleep(0.05)


def check_same_data(dataset: Dataset, group: ProcessGroup) -> None:
    """Check that this process has the dataset of process 0.

    Raises:
        ConfigError: it has another one.
    """
    if dataset.fingerprint != group.broadcast(dataset.fingerprint):
        raise ConfigError(
            f"the dataset of process {group.index} differs from that of process 0 (SHA-256); use the same files"
        )


def make_trainer(config: Config, dataset: Dataset) -> Trainer:
    """Return the trainer of a run on all devices.

    Raises:
        ConfigError: the batch or the state does not divide over the devices, or the batch or the model does not fit the
            dataset.
    """
    try:
        mesh = devices.make_mesh(fsdp=config.fsdp)
        devices.check_batch_divides(config.batch_size, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Trainer(
        config,
        mesh,
        train_size=len(dataset.train_labels),
        test_size=len(dataset.test_labels),
        image_shape=dataset.image_shape,
        classes=len(dataset.class_names),
    )


def describe_start(restored: Restored | None, trainer: Trainer, recorder: Recorder) -> dict[str, Any]:
    """Return what the other processes need to start as process 0 does, as JSON values.

    `step` to resume from, None for a new run; `is_finished`; `parent`, whose weights a new run begins with; and
    `evaluation`, arguments of `Dispatcher`.
    """
    step = restored.step if restored else 0
    accuracy, best = recorder.metrics.accuracy_at(step), recorder.metrics.best() or {}
    return {
        "step": step if restored else None,
        "is_finished": step >= trainer.total_steps and accuracy is not None,
        "parent": recorder.parent,
        "evaluation": {"is_evaluated": accuracy is not None, "best_accuracy": best.get("accuracy")},
    }


def restore(
    trainer: Trainer,
    dataset: Dataset,
    environment: dict[str, Any],
    checkpointer: Checkpointer,
    recorder: Recorder,
) -> Restored | None:
    """Restore the newest checkpoint whose digests are right, None if there is none, and the metrics up to its step.

    It reports the step and whether the run resumes bit for bit. Process 0 only.

    Raises:
        CheckpointError: there are checkpoints, and none can be used.
        ConfigError: the config or the dataset differs from that of the checkpoint, the run is asked to end before it,
            or a new run cannot begin with the weights of `init_from`.
        OSError: the metrics cannot be restored.
    """
    events, terminal = recorder.events, recorder.terminal
    restored = checkpointer.restore(like=trainer.abstract_state)
    if restored is None:
        start_from_step_0(trainer, dataset, checkpointer, recorder)
        return None
    for corrupt, path in restored.quarantined:
        events.write("quarantine", step=corrupt.step, reason=str(corrupt), moved_to=str(path))
        terminal.warn(f"warning: {corrupt}. It is moved to {path}, and an older checkpoint is used.")
    compatibility.check_step(restored.step, restored.state)
    metadata = compatibility.check_metadata(restored.metadata, restored.step)
    compatibility.check_same_run(metadata, trainer.config, dataset, where=recorder.workdir)
    compatibility.check_length(restored.step, trainer.config, trainer.train_size)
    recorder.parent = metadata.get("parent")
    recorder.save_config()  # Not before these checks: a config that contradicts the checkpoint is not written.
    recorder.copies.begin(restored.step)  # The previous attempt may have ended before this upload.
    changed = compatibility.diff_environment(metadata, environment)  # software, JAX settings, devices
    lost_steps = restore_metrics(metadata["metrics"]["lines"], restored.step, recorder)
    reason = metadata["reason"]
    events.write(
        "resume", step=restored.step, exact=not changed, changed=changed, lost_steps=lost_steps, saved_because=reason
    )
    if describe_start(restored, trainer, recorder)["is_finished"]:
        terminal.info(f"{recorder.workdir} is finished; --fresh starts over, --workdir DIR starts another run")
        return restored
    lost = f"; {lost_steps} steps or more after it are recomputed" if lost_steps else ""
    exactness = f"not bit for bit, because of {'; '.join(changed)}" if changed else "exact"
    terminal.info(
        f"resumed {trainer.config.model} on {dataset.name} from step {restored.step} of {trainer.total_steps} "
        f"(saved because: {reason}{lost}): {exactness}"
    )
    return restored


def start_from_step_0(trainer: Trainer, dataset: Dataset, checkpointer: Checkpointer, recorder: Recorder) -> None:
    """Report that there is no checkpoint to resume from, and remove metrics that were written before the first one.

    Raises:
        ConfigError: the run cannot begin with the weights of `init_from`.
        NoGoodCheckpointError: there were checkpoints before.
        OSError: the metrics cannot be restored.
    """
    if recorder.events.has_saves():
        raise NoGoodCheckpointError(
            f"the checkpoints of this run are gone from {checkpointer.directory}; "
            "copy them back, or start over with --fresh"
        )
    if lost_steps := restore_metrics("", 0, recorder):
        recorder.events.write("lost", step=0, lost_steps=lost_steps)
        recorder.terminal.info(f"no checkpoint was saved yet: {lost_steps} steps or more are recomputed")
    recorder.parent = initial_weights.find_parent(trainer)
    recorder.save_config()  # Not before all inputs are read: the next start must not find a wrong --data-dir.
    recorder.terminal.info(
        f"training {trainer.config.model} on {dataset.name}: {trainer.total_steps} steps in {recorder.workdir}\n"
        "Ctrl-C saves and exits; the same command resumes."
    )
    if parent := recorder.parent:
        recorder.terminal.info(f"the initial weights are those of step {parent['step']} of {parent['run']}")


def restore_metrics(lines: str, step: int, recorder: Recorder) -> int:
    """Make metrics.jsonl hold the lines of a checkpoint, and return how many steps after it are known to be lost."""
    restored = recorder.metrics.restore(lines.encode(), step)
    if restored.is_rebuilt:
        moved = f" The file that was there is {restored.moved_to}." if restored.moved_to else ""
        recorder.metrics_changed(
            step, f"lines of metrics.jsonl were missing or changed; it is rebuilt from the checkpoint.{moved}"
        )
    return max(restored.furthest_step, recorder.events.last_step) - step
