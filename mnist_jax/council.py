"""What the processes of a run do next: each says what it wishes, and all come to the same decision at the same step.

The wishes are a few whole numbers. They are an input of a call that all processes make together, are added up in it
along with something that is added up there anyway, and come back as its output. So agreement takes no message and no
wait of its own. Who reads the output of the same call before the same later call decides the same.

This file stands alone but for `preemption.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mnist_jax.preemption import StopSignal

STOP, SIGNAL, SAVE, STEPS = range(4)  # The columns of the wishes; there is a row for each process.
SAVE_REASONS = ("", "time", "signal SIGUSR2")  # what a number in the column SAVE means; the highest counts


def abstract_wishes(mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Return the shape of the wishes, as a call gets them from the devices: [devices, W] int32, split by the device.

    W is four times the number of processes, and 0 for a process that is alone: it knows what it wishes.
    """
    processes = len({device.process_index for device in mesh.devices.flat})
    width = 4 * processes if processes > 1 else 0
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    return jax.ShapeDtypeStruct((mesh.size, width), jnp.int32, sharding=sharding)


class Council:
    """The wishes of this process, and what all have agreed on.

    The same calls in the same order, on all processes:

        result, heard = call(..., council.wishes(steps))  # any number of times
        ...
        council.hear(heard)  # of the calls in their order
        if council.is_to_stop: ...
    """

    def __init__(self, mesh: Mesh, stop: StopSignal) -> None:
        """Speak for the process that listens for signals with `stop`."""
        self._stop = stop
        self._shape = abstract_wishes(mesh)
        self._is_alone = not self._shape.shape[1]
        self._row = next(n for n, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index())
        self._said = np.zeros(self._shape.shape[1], np.int32)
        self._on_devices = self._put(self._said)
        self._index = jax.process_index()
        self._wants_to_stop = self._is_to_stop = False
        self._save_wanted = self._save_asked = 0  # by this process, and by any
        self._steps = 1

    @property
    def is_to_stop(self) -> bool:
        """Whether all processes are to stop now, for a signal to any of them or for a failure."""
        return self._wishes_to_stop if self._is_alone else self._is_to_stop

    def ask_to_stop(self) -> None:
        """Wish that all processes stop without a signal: this one failed, and will say so when all have stopped."""
        self._wants_to_stop = True

    @property
    def _wishes_to_stop(self) -> bool:
        return self._wants_to_stop or self._stop.received is not None

    def steps(self, wished: int) -> int:
        """Return how many steps the next call is to make: what process 0 wishes, if only it says so some calls ago."""
        return wished if self._is_alone else self._steps

    def ask_to_save(self) -> None:
        """Request that all processes save, for it is time."""
        self._save_wanted = max(self._save_wanted, SAVE_REASONS.index("time"))

    def take_save_request(self) -> str:
        """Return why a save was requested by any process since the last call, "" if none was."""
        if self._is_alone:
            self._save_asked = self._take_own_request()
        asked, self._save_asked = self._save_asked, 0
        return SAVE_REASONS[asked]

    def _take_own_request(self) -> int:
        wanted, self._save_wanted = self._save_wanted, 0
        return SAVE_REASONS.index("signal SIGUSR2") if self._stop.take_save_request() else wanted

    def wishes(self, steps: int) -> jax.Array:
        """Return the input of the next call.

        Args:
            steps: how many steps a call should make; only that of process 0 counts.
        """
        if self._is_alone:
            return self._on_devices
        wishes = np.zeros((self._shape.shape[1] // 4, 4), np.int32)
        mine = wishes[self._index]
        mine[STOP], mine[SIGNAL] = self._wishes_to_stop, self._stop.received or 0
        mine[SAVE], mine[STEPS] = self._take_own_request(), steps
        if (wishes.ravel() != self._said).any():  # To bring them to the devices takes longer than to look.
            self._said = wishes.ravel()
            self._on_devices = self._put(self._said)
        return self._on_devices

    def hear(self, heard: jax.Array) -> None:
        """Take note of what all processes wished with a call that is done."""
        if self._is_alone:
            return
        wishes = np.asarray(heard).reshape(-1, 4)
        self._is_to_stop |= bool(wishes[:, STOP].any())
        if wishes[:, SIGNAL].any():
            self._stop.hear_of(int(wishes[:, SIGNAL].max()))
        self._save_asked = max(self._save_asked, int(wishes[:, SAVE].max()))
        self._steps = int(wishes[0, STEPS])

    def _put(self, wishes: np.ndarray) -> jax.Array:
        """Lay what this process wishes on its first device, and nothing on its others."""

        def part(index: Any) -> np.ndarray:
            rows = range(self._shape.shape[0])[index[0]]
            return np.stack([wishes if row == self._row else np.zeros_like(wishes) for row in rows])

        return jax.make_array_from_callback(self._shape.shape, self._shape.sharding, part)
