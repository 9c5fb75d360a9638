"""The loop: where the pure functions, the checkpoints, the journal, the signals and the other processes meet."""

import contextlib
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mnist_jax import config as configs
from mnist_jax import data, distributed, provenance
from mnist_jax.checkpoint.checkpointer import Checkpoint, Checkpointer, Restored, list_checkpoints
from mnist_jax.checkpoint.integrity import (
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    NoGoodCheckpointError,
    ReadError,
    SaveError,
)
from mnist_jax.checkpoint.orbax_io import SHORTAGES
from mnist_jax.command import notice
from mnist_jax.config import Config, ConfigError
from mnist_jax.data import DataError, Dataset
from mnist_jax.journal import Journal, Terminal
from mnist_jax.keeper import Copies, Keeper, Outcome, finished, stopped
from mnist_jax.mirror import MirrorFailed
from mnist_jax.peers import PeerLost, Peers
from mnist_jax.preemption import Stopped, StopSignal
from mnist_jax.programs import Blueprint
from mnist_jax.training import Diverged, Training

EXIT_CODES: dict[type[Exception], int] = {
    Diverged: 1,
    ConfigError: 2,
    DataError: 2,
    IncompatibleCheckpointError: 2,
    CorruptCheckpointError: 65,
    NoGoodCheckpointError: 65,
    PeerLost: 69,
    MirrorFailed: 74,
    ReadError: 74,
    SaveError: 74,
    OSError: 74,
}


def run(
    config: Config,
    workdir: Path,
    stop: StopSignal,
    loading: "Future[Dataset] | None" = None,
    peers: Peers | None = None,
) -> int:
    """Train in `workdir` to the end or to a signal, tell how it went, and return the exit code.

    The caller sees to it that no other process writes there meanwhile, and may have begun to load the data. Where
    several processes train together, this is for process 0, and `follow` for the others.
    """
    peers = peers or Peers(stop)
    terminal = Terminal()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        journal, store = Journal(workdir), Checkpointer(workdir / "checkpoints", keep=config.keep, is_primary=True)
        copies = Copies(config.mirror, workdir, store, journal)
    except OSError as error:
        code, way_out = 2, "choose another --workdir"
        if error.errno in SHORTAGES:
            code, way_out = 74, "make room, or raise the limits of this process, and start again"
        terminal.warn(f"error: {workdir} cannot hold a run ({error}); {way_out}")
        peers.give_up(error, code)
        return code
    is_lost = False
    try:
        outcome = train(config, workdir, stop, peers, store, copies, journal, terminal, loading)
        copies.finish(stop)
        code = config.preempted_exit_code if outcome.word == "stopped" else 0
        journal.event("exit", outcome=outcome.word, code=code, **outcome.fields)
        terminal.say(str(outcome))
        peers.tell(code)
    except tuple(EXIT_CODES) as error:
        code = exit_code(error)
        peers.give_up(error, code)
        terminal.warn(f"error: {error}")
        if code in (69, 74):
            terminal.warn(f"The newest checkpoint is {f'of step {store.newest_step}' if store.steps else 'none'}.")
        elif isinstance(error, IncompatibleCheckpointError):
            terminal.warn(
                "If another version of this program wrote it, carry on with that, or begin anew with --fresh."
            )
        # What was saved before is to be copied all the same, but without a peer JAX may end this process any moment.
        if not isinstance(error, MirrorFailed | PeerLost):
            with contextlib.suppress(MirrorFailed):
                copies.finish(stop)
        journal.event("exit", outcome="failed", code=code, step=store.newest_step, error=str(error))
        is_lost = isinstance(error, PeerLost)
    finally:
        store.close(wait=not is_lost)  # A save waits for a lost process in vain.
        journal.close()
    return code


def train(
    config: Config,
    workdir: Path,
    stop: StopSignal,
    peers: Peers,
    store: Checkpointer,
    copies: Copies,
    journal: Journal,
    terminal: Terminal,
    loading: "Future[Dataset] | None" = None,
) -> Outcome:
    """Carry a run on from its newest good checkpoint, or begin it, until its end or until a signal stops it.

    Raises:
        ConfigError: the config does not fit the devices, or the data is not what the run began with.
        DataError, CheckpointError: what the run begins with is not there, or cannot be used.
        Diverged: the loss is not finite; that state is not saved.
        OSError: a file of the journal cannot be written.
        PeerLost: another process is gone.
        SaveError: the last save failed.
    """
    try:
        environment = introduce(config, workdir, stop, peers)
        note_start(config, workdir, environment, store, journal)
        journal.event("phase", step=store.newest_step, phase="data")
        load = loading.result if loading else lambda: data.load(config.dataset, config.data_dir, say=terminal.say)
        dataset = stop.run(load)
        peers.tell(dataset.fingerprint)
        blueprint = make_blueprint(config, dataset)
        restored = restore(blueprint, dataset, environment, store, journal, terminal)
        if restored is not None:  # Only now is it known that the config does not contradict the checkpoint.
            configs.save(config, workdir / "config.json")
            copies.begin(restored.step)  # The last start may have ended before that was done.
        step = restored.step if restored else 0
        is_over, known = is_finished(step, blueprint, journal), evaluated(journal, step)
        peers.tell([step if restored else None, is_over, known])
        if is_over:
            terminal.say(f"{workdir} is finished: --fresh starts it anew, --workdir DIR begins another run")
            return finished(step, journal, store)
        if restored is None:
            terminal.say(
                f"training {config.model} on {dataset.name}: {blueprint.total_steps} steps in {workdir}\n"
                "Ctrl-C saves and leaves; the same command carries on."
            )
        journal.event("phase", step=step, phase="compile")
        programs = stop.run(blueprint.compile)
        state = restored.state if restored else stop.run(blueprint.create)
        stop.run(lambda: store.prepare(state))
        peers.start()
    except Stopped as error:
        peers.give_up(error, config.preempted_exit_code)
        return stopped(store.newest_step, stop, journal, store)
    training = Training(blueprint, programs, dataset, state, stop, peers, **known)
    about = {"data": provenance.describe_data(dataset), **environment}
    keeper = Keeper(training, store, journal, terminal, copies, about)
    carry_out(training, store, keeper)
    return keeper.end(stop)


def evaluated(journal: Journal, step: int) -> dict[str, Any]:
    """Return what `Training` has to know of the evaluations up to a step."""
    best = journal.best() or {}
    return {"is_evaluated": journal.accuracy_at(step) is not None, "best_accuracy": best.get("accuracy")}


def note_start(
    config: Config, workdir: Path, environment: dict[str, Any], store: Checkpointer, journal: Journal
) -> None:
    """Write down that the run is started, and with which settings, where nothing was saved with others yet."""
    journal.event("start", step=store.newest_step, config=config.to_json(), **environment)
    if store.removed:
        journal.event("unfinished_removed", step=store.newest_step, names=store.removed)
    if not store.steps:  # From the first moment the bare command knows what it is to carry on.
        configs.save(config, workdir / "config.json")


def carry_out(training: Training, store: Checkpointer, keeper: Keeper | None) -> None:
    """Train until the end or until a signal. All processes make the same calls here; process 0 has a keeper.

    Raises:
        Diverged, OSError, PeerLost: as `train` does.
    """
    if keeper is not None:
        keeper.journal.event("phase", step=training.step, phase="train")
    evaluate_if_due(training, store, keeper)  # The last stop may have cut this very evaluation short.
    while not training.is_over and not training.council.is_to_stop:
        ended = training.advance()
        if keeper is not None:
            keeper.interval(ended)
            keeper.progress()
        evaluate_if_due(training, store, keeper)
        if keeper is not None:
            keeper.ask_to_save_if_due()
        if reason := training.take_save_reason():
            save(training, store, keeper, reason)
        if keeper is not None:
            keeper.report_saves()
    training.settle()


def save(training: Training, store: Checkpointer, keeper: Keeper | None, reason: str) -> None:
    """Begin to save the state; all processes do so at the same step."""
    request = keeper.prepare_save(reason) if keeper is not None else {}
    store.save(training.step, training.updates.state, valid=training.is_finite(), **request)


def evaluate_if_due(training: Training, store: Checkpointer, keeper: Keeper | None) -> None:
    """Evaluate where it is time to, keep what comes out, and save the best state so far."""
    if training.is_evaluation_due:
        ended = training.take_interval()
        if keeper is not None:
            keeper.begin_evaluation(ended)
        metrics, is_best = training.evaluate()
        if keeper is not None:
            keeper.evaluation(metrics)
        if is_best:
            save(training, store, keeper, "best test accuracy so far")


def introduce(config: Config, workdir: Path, stop: StopSignal, peers: Peers) -> dict[str, dict[str, Any]]:
    """Prepare JAX for this run, tell the other processes which one it is, and wait until they have all found it.

    Returns what the bits depend on besides the run: software, settings and devices of all processes.

    Raises:
        PeerLost: one of them is gone, or does not see the same directory.
        Stopped: a signal came.
    """
    cpu_threads = provenance.cpu_threads_of(list_checkpoints(workdir / "checkpoints"))
    provenance.prepare_jax(cpu_threads)
    if not peers.is_alone:  # Alone, nothing may come before the first words of the journal and the settings.
        threads = distributed.cpu_threads()  # as many on all, whatever the cores of each
        peers.tell([config.to_json(), str(workdir.absolute()), (workdir / "lock").read_text(), threads])
        peers.assemble()
        stop.run(jax.devices)  # It waits for all processes.
    return provenance.join(peers.assemble(provenance.describe_environment()))


def follow(stop: StopSignal, peers: Peers) -> int:
    """Train along with process 0, writing nothing, and return the exit code with which it leaves.

    Raises:
        Stopped: a signal came before the training.
    """
    try:
        settings, workdir, lock, cpu_threads = peers.hear()
        config = configs.from_json(settings, Path(workdir) / "config.json")
        check_is_shared(Path(workdir), lock, stop, peers)
        peers.assemble()
        provenance.prepare_jax(cpu_threads)
        stop.run(jax.devices)
        peers.assemble(provenance.describe_environment())
        fingerprint = peers.hear()
        dataset = stop.run(lambda: data.load(config.dataset, config.data_dir, say=notice))
        if dataset.fingerprint != fingerprint:
            raise ConfigError(f"process {peers.index} has other data than process 0, of another SHA-256")
        blueprint = make_blueprint(config, dataset)
        step, is_over, known = peers.hear()
        if not is_over:
            programs = stop.run(blueprint.compile)
            store = Checkpointer(Path(workdir) / "checkpoints", keep=config.keep, is_primary=False)
            checkpoint = Checkpoint(store.directory / str(step))
            state = stop.run(blueprint.create) if step is None else checkpoint.read(blueprint.abstract_state)[0]
            stop.run(lambda: store.prepare(state))
            peers.start()
            training = Training(blueprint, programs, dataset, state, stop, peers, **known)
            carry_out(training, store, keeper=None)
            with contextlib.suppress(SaveError):  # Process 0 says what that means.
                store.save_and_wait(training.step, training.updates.state, valid=training.is_finite())
        return int(peers.hear(heedless=True))
    except tuple(EXIT_CODES) as error:
        code = exit_code(error)
        peers.give_up(error, code)
        notice(f"error: process {peers.index} of {peers.count}: {error}")
        return code


def exit_code(error: Exception) -> int:
    """Return the exit code for an error whose kind is in `EXIT_CODES`; where another process had it, that one's."""
    if isinstance(error, PeerLost):
        return error.code
    return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


def check_is_shared(workdir: Path, lock: str, stop: StopSignal, peers: Peers) -> None:
    """Check that this process sees the run directory of process 0, and not another one of the same name.

    A network's file system may show a new file half a minute late.

    Raises:
        ConfigError: it does not see it in time, or what is there is no run directory.
        Stopped: a signal came.
    """
    path = workdir / "lock"
    deadline_s = time.monotonic() + peers.timeout_s
    while True:
        configs.check_directory(workdir)
        if path.exists() and path.read_text() == lock:
            return
        stop.check()
        if time.monotonic() > deadline_s:
            raise ConfigError(
                f"process {peers.index} does not find in {workdir} what process 0 wrote there; all processes need the "
                "same directory, on a file system that they share: --workdir DIR"
            )
        time.sleep(0.05)


def make_blueprint(config: Config, dataset: Dataset) -> Blueprint:
    """Return what the programs are made from, the config checked against the data and the devices.

    Raises:
        ConfigError: the batch does not fit.
    """
    if jnp.result_type(float) != jnp.float32:
        raise ConfigError("JAX_ENABLE_X64 is set, and the training computes in 32 bits; unset it")
    train_size = len(dataset.train_labels)
    mesh = distributed.data_mesh()
    try:
        distributed.check_batch_divides(config.batch_size, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return Blueprint(config, config.total_steps(train_size), train_size, len(dataset.test_labels), mesh)


def is_finished(step: int, blueprint: Blueprint, journal: Journal) -> bool:
    """Tell whether at a step nothing is left to do: all updates are made, and what they led to is evaluated."""
    return step >= blueprint.total_steps and journal.accuracy_at(step) is not None


def restore(
    blueprint: Blueprint,
    dataset: Dataset,
    environment: dict[str, Any],
    store: Checkpointer,
    journal: Journal,
    terminal: Terminal,
) -> Restored | None:
    """Return the newest good checkpoint, if there is one, and cut the journal back to it.

    It says from where and how exactly the run is carried on.

    Raises:
        ConfigError: the run began with other data, or with other settings than a config that was changed since.
        NoGoodCheckpointError: none is good, or all are gone.
    """
    restored = store.restore(like=blueprint.abstract_state)
    if restored is None:
        if journal.tells_of_saves():
            raise NoGoodCheckpointError(
                f"the checkpoints of this run are gone from {store.directory}; "
                "bring them back, or begin anew with --fresh"
            )
        if lost_steps := journal.rewind(0):
            journal.event("lost", step=0, lost_steps=lost_steps)
            terminal.say(f"nothing had been saved yet: {lost_steps} steps or more are made again")
        return None
    for corrupt, place in restored.quarantined:
        journal.event("quarantine", step=corrupt.step, reason=str(corrupt), moved_to=str(place))
        moved = f"It was moved to {place}, and an older one is used."
        terminal.warn(f"warning: a checkpoint is not good, {corrupt}. {moved}")
    provenance.check_step(restored.step, restored.state)
    about = provenance.check_about(restored.metadata, restored.step)
    provenance.check_same_run(about, blueprint.config, dataset, where=store.directory)
    changed = provenance.changes(about, environment)
    lost_steps = journal.rewind(restored.step) - restored.step
    if not journal.still_begins_with(about["metrics"]):
        journal.event("metrics_changed", step=restored.step)
        terminal.warn("warning: metrics.jsonl is not what it was: lines before this step are missing or changed")
    journal.event(
        "resume",
        step=restored.step,
        exact=not changed,
        changed=changed,
        lost_steps=lost_steps,
        saved_because=about["reason"],
    )
    if is_finished(restored.step, blueprint, journal):
        return restored
    lost = f"; {lost_steps} steps or more after it are made again" if lost_steps else ""
    manner = f"numerically equivalent, not bit for bit, for this changed: {'; '.join(changed)}" if changed else "exact"
    terminal.say(
        f"resumed {blueprint.config.model} on {dataset.name} from step {restored.step} of {blueprint.total_steps} "
        f"(saved because: {about['reason']}{lost}): {manner}"
    )
    return restored
