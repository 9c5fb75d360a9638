"""What the commands that use a run have in common: they read it, say what went wrong in a line, and heed signals."""

import traceback
from collections.abc import Callable

from mnist_jax.command import mend_standard_streams
from mnist_jax.config import ConfigError
from mnist_jax.data import DataError
from mnist_jax.journal import Terminal
from mnist_jax.preemption import Stopped, StopSignal


def run(work: Callable[[StopSignal, Terminal], int]) -> int:
    """Return the exit code of some work on a run, or of what kept it from being done.

    2: bad usage, or no such run, checkpoint or data. 65: a checkpoint is damaged. 74: it cannot be
    read here and now. 128+n: signal n. An error that nobody
    foresaw is 70, and told in full.
    """
    mend_standard_streams()
    terminal = Terminal()
    with StopSignal() as stop:
        # JAX comes with them: a second, in which signals are handled.
        from mnist_jax.checkpoint.integrity import CheckpointError, CorruptCheckpointError, ReadError

        try:
            return work(stop, terminal)
        except Stopped:
            assert stop.received is not None
            terminal.warn(f"{stop.received.name}: left before the end")
            return 128 + stop.received
        except CorruptCheckpointError as error:
            terminal.warn(f"error: a checkpoint is damaged, {error}")
            return 65
        except ReadError as error:
            terminal.warn(f"error: {error}")
            return 74
        except (CheckpointError, ConfigError, DataError, OSError) as error:
            terminal.warn(f"error: {error}")
            return 2
        except Exception:  # Python would leave with 1, by which some commands mean something.
            traceback.print_exc()
            return 70
