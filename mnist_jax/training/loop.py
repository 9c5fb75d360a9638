"""The training loop: the order of events of a run. The same on every process; only process 0 writes logs."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from mnist_jax.checkpoint.checkpoint import Checkpoint
from mnist_jax.checkpoint.checkpointer import Checkpointer
from mnist_jax.checkpoint.integrity import InvalidStateError
from mnist_jax.config import Config
from mnist_jax.runtime import compilation_cache
from mnist_jax.runtime.multihost import ProcessGroup, ProcessLostError
from mnist_jax.runtime.preemption import Notice, StoppedError, StopSignal
from mnist_jax.training import compatibility, data, initial_weights, setup
from mnist_jax.training.data import Dataset
from mnist_jax.training.dispatch import Dispatcher
from mnist_jax.training.recorder import Outcome, Recorder


def run(
    config: Config | None,
    workdir: Path | None,
    *,
    stop: StopSignal,
    group: ProcessGroup,
    loading: "Future[Dataset] | None" = None,
    exit_code: Callable[[Exception], int] = lambda _: 1,
) -> Outcome:
    """Make one attempt at a run: open its directory, train until the end or until a stop, and log how it ended.

    Args:
        config: what the run is; None except on process 0.
        workdir: the run directory, whose lock process 0 holds; None except on process 0.
        stop: receives the signals of this process.
        group: the processes that train together.
        loading: the dataset, if the caller has started to load it.
        exit_code: maps an error to the exit code that is logged, and sent to the other processes.

    Raises:
        StoppedError: a signal came before the run directory was open, so nothing is logged.
        Exception: as `train_and_evaluate`, or RemoteError. It is logged if the directory is open, and the other
            processes are notified.
    """
    opened, is_lost = None, False
    try:
        if config is not None and workdir is not None:
            opened = setup.open_run(config, workdir, stop=stop, enabled=True)
        config, workdir = setup.share_run(config, workdir, stop=stop, group=group)
        checkpointer, recorder = opened = opened or setup.open_run(config, workdir, stop=stop, enabled=False)
        outcome = train_and_evaluate(config, checkpointer, recorder, stop=stop, group=group, loading=loading)
        recorder.copies.finish(stop)  # It waits for the last upload; after a signal 20 s at most.
        # The other processes wait here for the uploads, and exit with the code of process 0.
        code = group.broadcast(config.preempted_exit_code if outcome.is_stopped else 0, ignore_signals=True)
        outcome = outcome._replace(exit_code=code)
        recorder.exit(outcome)
        return outcome
    except StoppedError as error:  # before the training started
        if config is None or opened is None:
            raise
        group.report_failure(error, config.preempted_exit_code)
        if not opened[0].steps:  # A new run: the next start without flags has to find its config.
            opened[1].save_config()
        outcome = opened[1].stopped()._replace(exit_code=config.preempted_exit_code)
        opened[1].exit(outcome)
        return outcome
    except Exception as error:
        is_lost = isinstance(error, ProcessLostError)
        group.report_failure(error, exit_code(error))
        if opened is not None:
            opened[1].fail(error, exit_code(error))
        raise
    finally:
        if opened is not None:
            checkpointer, recorder = opened
            checkpointer.close(wait=not is_lost)  # A save would wait for the lost process.
            recorder.close()


def train_and_evaluate(
    config: Config,
    checkpointer: Checkpointer,
    recorder: Recorder,
    *,
    stop: StopSignal,
    group: ProcessGroup,
    loading: "Future[Dataset] | None" = None,
) -> Outcome:
    """Restore the newest checkpoint or initialize the state, train until the end or until a stop, and save.

    Args: as `run`.

    Raises:
        ConfigError: the config does not fit the devices or the checkpoint, or the dataset differs from the run's.
        DataError, CheckpointError: the dataset or the checkpoints cannot be used.
        DivergedError: the loss is not finite; that state is not saved.
        LockHeldError: the lock file was removed or replaced.
        OSError: a file of the run directory cannot be written.
        ProcessLostError: another process is lost.
        SaveError: the final save failed, or that of the initial weights of `init_from`.
        StoppedError: a signal came before the training started.
    """
    environment = compatibility.merge_environments(group.gather(compatibility.describe_environment(fsdp=config.fsdp)))
    recorder.log_start(environment)
    recorder.log_phase("data", checkpointer.newest_step)
    # `stop.run` abandons the work when a signal comes, because loading and compiling cannot check the flag.
    load = partial(data.load, config.dataset, config.data_dir, notify=recorder.terminal.info)
    dataset = stop.run(loading.result if loading else load)
    setup.check_same_data(dataset, group)
    trainer = setup.make_trainer(config, dataset)
    restored = setup.restore(trainer, dataset, environment, checkpointer, recorder) if group.is_primary else None
    start = group.broadcast(setup.describe_start(restored, trainer, recorder) if group.is_primary else None)
    step = start["step"]
    if start["is_finished"]:
        return recorder.finished(step)
    recorder.log_phase("compile", step or 0)
    stop.run(trainer.compile)
    if restored is not None:
        state = restored.state
    elif step is not None:  # another process than process 0
        state = Checkpoint(checkpointer.directory / str(step)).read(trainer.abstract_state)[0]
    else:
        state = stop.run(lambda: initial_weights.make_state(trainer, start["parent"]))
    stop.run(lambda: checkpointer.prepare(state))
    group.start_training()  # From here on a signal raises no StoppedError; the processes agree when to stop.
    dispatcher = Dispatcher(trainer, dataset, state, stop=stop, group=group, **start["evaluation"])
    compilation_cache.write_digests()
    recorder.start_training(dispatcher, {"data": compatibility.describe_data(dataset), **environment})
    if step is None and start["parent"]:  # From here on the run does not need its parent.
        save_and_wait(dispatcher, checkpointer, recorder, initial_weights.REASON)
    train(dispatcher, checkpointer, recorder)
    return finish(dispatcher, checkpointer, recorder, stop)


def train(dispatcher: Dispatcher, checkpointer: Checkpointer, recorder: Recorder) -> None:
    """Train until the end, or until all processes agree to stop.

    Raises:
        DivergedError, LockHeldError, OSError, ProcessLostError: as `train_and_evaluate`.
    """
    evaluate_if_due(dispatcher, checkpointer, recorder)  # The previous attempt may have stopped in this evaluation.
    while not dispatcher.is_over and not dispatcher.agreement.should_stop:
        recorder.write_train_metrics(dispatcher.advance())
        recorder.show_progress()
        evaluate_if_due(dispatcher, checkpointer, recorder)
        recorder.request_save_if_due()
        if reason := dispatcher.pop_save_reason():
            save(dispatcher, checkpointer, recorder, reason)
        recorder.report_saves()
    dispatcher.block_until_ready()


def evaluate_if_due(dispatcher: Dispatcher, checkpointer: Checkpointer, recorder: Recorder) -> None:
    """Evaluate if an evaluation is due, and save the state if it is the best so far."""
    if dispatcher.is_evaluation_due:
        recorder.write_train_metrics(dispatcher.pop_train_metrics())
        recorder.log_phase("evaluate", dispatcher.step)
        metrics, is_best = dispatcher.evaluate()
        recorder.write_test_metrics(metrics)
        if is_best:
            save(dispatcher, checkpointer, recorder, "best test accuracy so far")


def save(dispatcher: Dispatcher, checkpointer: Checkpointer, recorder: Recorder, reason: str) -> None:
    """Start to save the state in the background."""
    request = recorder.prepare_save(reason)
    checkpointer.save(dispatcher.step, dispatcher.state, valid=dispatcher.is_finite(), **request)


def save_and_wait(dispatcher: Dispatcher, checkpointer: Checkpointer, recorder: Recorder, reason: str) -> None:
    """Fsync the metrics, save the state, and wait until it is committed.

    Raises:
        DivergedError: the state, or one before it, is not finite.
        LockHeldError: another process may train in the directory.
        SaveError: the state could not be saved.
    """
    request = recorder.prepare_save(reason)
    try:
        with contextlib.suppress(InvalidStateError):
            checkpointer.save(dispatcher.step, dispatcher.state, valid=dispatcher.is_finite(), wait=True, **request)
    finally:
        recorder.report_saves(is_last=True)
    recorder.raise_if_diverged()


def finish(dispatcher: Dispatcher, checkpointer: Checkpointer, recorder: Recorder, stop: StopSignal) -> Outcome:
    """Save the final state, wait until it is committed, log the outcome, and begin the last upload.

    Raises:
        DivergedError, LockHeldError, SaveError: as `save_and_wait`.
    """
    checkpointer.wait()  # If another process found a state that is not finite, so does this one, perhaps later.
    recorder.report_saves(is_last=True)
    recorder.raise_if_diverged()
    reason = "end"
    if not dispatcher.is_finished:
        reason = stop.reason if isinstance(stop.received, Notice) else f"signal {stop.reason}"
        step = dispatcher.step
        recorder.terminal.info(f"{stop.reason}: saving step {step} and exiting; the same command resumes")
    save_and_wait(dispatcher, checkpointer, recorder, reason)
    outcome = recorder.finished(dispatcher.step) if dispatcher.is_finished else recorder.stopped()
    recorder.log_outcome(outcome)  # before the upload, so that a remote copy shows how the run ended
    recorder.copies.begin(dispatcher.step)
    return outcome
