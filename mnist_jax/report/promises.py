"""What a run promises, whether it held, and what in its records shows that: no more than they do."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mnist_jax.config import Config
from mnist_jax.report.history import Turn, count

if TYPE_CHECKING:
    from mnist_jax.report.run_status import Status

GRACE_S = 30  # that schedulers leave between their signal and the kill


class Promise(NamedTuple):
    """Something that was promised, whether it held, and what shows it."""

    promise: str
    verdict: Literal["held", "not held", "not put to the test", "not known"]
    evidence: str


def check(
    turns: Sequence[Turn], events: Sequence[dict[str, Any]], found: "Status", config: Config | None
) -> Iterator[Promise]:
    """Yield what a run promises, and what its records show of that, no more."""
    whole = _check_whole(events, found)
    told = [_check_exact(turns), _check_prompt(turns), whole, _check_lost(turns, config)]
    for promise in told:
        if not turns and found.checkpoints and promise is not whole:
            promise = promise._replace(verdict="not known", evidence="There are checkpoints, but no history.")
        yield promise


def _check_exact(turns: Sequence[Turn]) -> Promise:
    promise = "Exact: a run that is carried on ends, bit for bit, as if nothing had stopped it."
    resumes = [turn for turn in turns if turn.manner]
    others = [turn for turn in resumes if turn.manner != "exact"]
    if not resumes:
        return Promise(promise, "not put to the test", "It was never carried on from a checkpoint.")
    if not others:
        evidence = (
            f"{count(len(resumes), 'resume')}, each from the very bits that were saved, with the same software and "
            "devices. What came of them was not trained again here to compare; `mnist_jax.replay` does that."
        )
        return Promise(promise, "held", evidence)
    changed = "; ".join(dict.fromkeys(text for turn in others for text in turn.changed)) or "something unknown"
    evidence = f"{count(len(resumes), 'resume')}, {len(others)} of them numerically equivalent only. Changed: {changed}"
    return Promise(promise, "not held", evidence)


def _check_prompt(turns: Sequence[Turn]) -> Promise:
    promise = f"Prompt: at a signal it saves and leaves, before the {GRACE_S} s are over that schedulers give it."
    stopped = [turn for turn in turns if turn.end == "stopped"]
    if not stopped:
        return Promise(promise, "not put to the test", "No signal has stopped it.")
    evidence = f"{count(len(stopped), 'stop')} by a signal, after which all was saved that had been trained."
    times = [turn.saved_in_s for turn in stopped if turn.saved_in_s is not None]
    if not times:
        return Promise(promise, "not known", f"{evidence} How long that took was not written down.")
    each = ", ".join(f"{seconds:.2f}" for seconds in times[:10]) + (", …" if len(times) > 10 else "")
    evidence += f" From the signal until then {each} s; the longest {max(times):.2f} s"
    evidence += f"; of {len(stopped) - len(times)} it was not written down." if len(times) < len(stopped) else "."
    return Promise(promise, "held" if max(times) < GRACE_S else "not held", evidence)


def _check_whole(events: Sequence[dict[str, Any]], found: "Status") -> Promise:
    promise = "Whole: a checkpoint is all there, or is not there."
    if not found.checkpoints and not found.quarantine:
        return Promise(promise, "not put to the test", "There is no checkpoint.")
    good = sum(checkpoint.good is True for checkpoint in found.checkpoints)
    saved, failed = (sum(event["event"] == name for event in events) for name in ("save", "save_failed"))
    evidence = (
        f"{count(saved, 'save')}; {count(failed, 'save')} failed. {good} of the "
        f"{count(len(found.checkpoints), 'checkpoint')} that are kept have every byte that was saved. "
        f"{len(found.quarantine) or 'None'} in quarantine."
    )
    is_whole = good == len(found.checkpoints) and not found.quarantine
    return Promise(promise, "held" if is_whole else "not held", evidence)


def _check_lost(turns: Sequence[Turn], config: Config | None) -> Promise:
    promise = "Nothing lost: a signal costs no step, and a kill only those since the last checkpoint was due."
    kills = [index for index, turn in enumerate(turns) if turn.end == "killed"]
    lost = [turn.repeated_steps for turn in turns if turn.repeated_steps]
    if not lost:
        if kills and not any(turn.has_trained for turn in turns[kills[-1] + 1 :]):
            return Promise(promise, "not known", "It was killed; what that cost, the next start finds.")
        is_tested = kills or any(turn.end == "stopped" for turn in turns)
        return Promise(promise, "held" if is_tested else "not put to the test", "No step is known to be made twice.")
    evidence = f"{count(len(kills), 'kill')}; {count(sum(lost), 'step')} lost and recomputed"
    seconds_per_step = _seconds_per_step(turns)
    if config is None or seconds_per_step is None:
        return Promise(promise, "not known", f"{evidence}. How long these had taken is not known.")
    every_s, every_steps = config.checkpoint_every_s, config.checkpoint_every_steps
    worst_s = max(lost) * seconds_per_step
    saves_s = [span.end_s - span.begin_s for turn in turns for span in turn.spans if span.lane == "save"]
    # The pace is a mean, and a checkpoint waits for the end of the one before: a second more is no breach.
    is_within = worst_s <= every_s + max(saves_s, default=0.0) + 1
    if every_steps:
        is_within &= max(lost) <= 2 * every_steps  # those between two checkpoints, and those made during a save
    evidence += (
        f", at most {max(lost):,} at once: about {worst_s:.1f} s of training at this run's pace. "
        f"A checkpoint was due every {every_s:g} s{f' and every {every_steps:,} steps' if every_steps else ''}."
    )
    return Promise(promise, "held" if is_within else "not held", evidence)


def _seconds_per_step(turns: Sequence[Turn]) -> float | None:
    """Return the pace of those turns whose end is written down, or None."""
    known = [turn for turn in turns if turn.end in ("stopped", "finished") and turn.last_step > turn.first_step]
    steps = sum(turn.last_step - turn.first_step for turn in known)
    times_s = [span.end_s - span.begin_s for turn in known for span in turn.spans if span.lane in ("train", "evaluate")]
    return sum(times_s) / steps if steps else None
