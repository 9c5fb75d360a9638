from mnist_jax.config import Config
from mnist_jax.report import history, promises
from mnist_jax.report.run_status import CheckpointStatus, NextStart, Status

START = {"event": "start", "step": 0, "time": 1.0}
TRAIN = {"event": "phase", "phase": "train", "step": 0, "time": 2.0}


def verdicts(*events: dict, config: Config | None = None, checkpoints=(), quarantine=()) -> dict[str, tuple[str, str]]:
    """Return verdict and evidence by the first word of each promise."""
    found = Status("", None, list(checkpoints), list(quarantine), [], NextStart("begin", 0, 0, ""))
    turns = list(history.read_turns(events, is_running=False, now_s=0.0))
    made = promises.check(turns, events, found, config)
    return {promise.promise.split(":")[0]: promise[1:] for promise in made}


def test_what_was_not_put_to_the_test_is_not_claimed():
    finished = {"event": "exit", "step": 9, "time": 3.0, "outcome": "finished"}
    assert {verdict for verdict, _ in verdicts(START, TRAIN, finished).values()} == {"not put to the test"}
    assert verdicts(START, TRAIN)["Nothing lost"][0] == "not known"  # It was killed.


def test_a_resume_on_another_machine_is_not_called_exact():
    resume = {"event": "resume", "step": 5, "exact": True}
    verdict, evidence = verdicts(START, {**resume, "exact": False, "changed": ["jax 1 → 2"]}, START, resume)["Exact"]
    assert verdict == "not held"
    assert "2 resumes, 1 of them numerically equivalent only. Changed: jax 1 → 2" in evidence
    assert verdicts(START, resume)["Exact"][0] == "held"


def test_how_long_stops_took_is_told_where_it_was_written_down():
    def stopped(seconds: object) -> tuple[dict, ...]:
        return (
            START,
            {"event": "signal", "step": 9, "signal": "SIGTERM", "seconds": seconds},
            {
                "event": "exit",
                "step": 9,
                "outcome": "stopped",
            },
        )

    assert verdicts(*stopped(None))["Prompt"][0] == "not known"
    verdict, evidence = verdicts(*stopped(0.25), *stopped(1.5), *stopped("soon"))["Prompt"]
    assert verdict == "held"
    assert "3 stops" in evidence
    assert "0.25, 1.50 s; the longest 1.50 s; of 1 it was not written down." in evidence
    assert verdicts(*stopped(31))["Prompt"][0] == "not held"


def test_checkpoints_count_as_whole_only_if_every_byte_is_good():
    good = CheckpointStatus(5, 1.0, 10, "time", None, good=True, problem=None)
    bad = CheckpointStatus(6, 1.0, 10, "time", None, good=False, problem="step 6: bad")
    assert verdicts(START, checkpoints=[good])["Whole"][0] == "held"
    assert verdicts(START, checkpoints=[good, bad])["Whole"][0] == "not held"
    assert verdicts(START, checkpoints=[good], quarantine=["7-bad"])["Whole"][0] == "not held"


def test_where_the_history_is_gone_nothing_is_claimed_of_it():
    good = CheckpointStatus(5, 1.0, 10, "time", None, good=True, problem=None)
    told = verdicts(checkpoints=[good])
    assert {name: verdict for name, (verdict, _) in told.items()} == {
        **dict.fromkeys(("Exact", "Prompt", "Nothing lost"), "not known"),
        "Whole": "held",
    }
    assert told["Exact"][1] == "There are checkpoints, but no history."


def test_what_a_kill_cost_is_held_against_the_cadence():
    config = Config(dataset="digits", checkpoint_every_s=10.0)
    exit_event = {"event": "exit", "step": 200, "time": 32.0, "outcome": "finished"}

    def lost(steps: int, config: Config = config) -> tuple[str, str]:
        again = {"event": "resume", "step": 100, "exact": True, "lost_steps": steps, "time": 12.0}
        train = {**TRAIN, "step": 100, "time": 12.0}  # 100 steps in 20 s follow
        return verdicts(START, TRAIN, {**START, "time": 11.0}, again, train, exit_event, config=config)["Nothing lost"]

    assert lost(50) == (
        "held",
        "1 kill; 50 steps lost and recomputed, at most 50 at once: about 10.0 s of training at this run's pace. "
        "A checkpoint was due every 10 s.",
    )
    assert lost(60)[0] == "not held"
    often = Config(dataset="digits", checkpoint_every_s=10.0, checkpoint_every_steps=10)
    assert lost(20, often)[0] == "held"  # ten, and as many again during the save
    assert lost(21, often)[0] == "not held"
