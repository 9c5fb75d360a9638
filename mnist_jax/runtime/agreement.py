"""Agreement of all processes of a run: at which call to stop or to save, and how many steps a call makes.

Each process fills in a row of integers, its requests. With every training or evaluation call the processes also
dispatch a small jitted sum of these requests, and read it with the result of the call, one call later. All processes
read the same sum at the same point, so all decide the same. A single process dispatches no sum.

This file needs only `preemption.py`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mnist_jax.runtime.preemption import StopSignal

STOP, SIGNAL, SAVE, STEPS = range(4)  # columns of the requests, which have a row per process
SAVE_REASONS = ("", "time", "signal SIGUSR2")  # meaning of the column SAVE; the largest request wins


class Agreement:
    """The requests of this process, and the requests that all processes agree on.

    All processes make the same calls in the same order:

        result, total = train_steps(...), agreement.send(steps)  # any number of times
        ...
        agreement.update(total)  # in the order of the calls of `send`
        if agreement.should_stop: ...
    """

    def __init__(self, mesh: Mesh, stop: StopSignal) -> None:
        """Compile the sum, unless there is one process. `stop` receives the signals of this process."""
        self._stop = stop
        self._index = jax.process_index()
        process_of_device = [device.process_index for device in mesh.devices.flat]
        self._first_device = process_of_device.index(self._index)
        processes = len({*process_of_device})
        self._is_alone = processes == 1
        self._requests = np.zeros((processes, 4), np.int32)
        self._own_stop = self._agreed_stop = False
        self._own_save = self._agreed_save = 0  # indices of SAVE_REASONS
        self._agreed_steps = 1
        if not self._is_alone:
            split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            self._abstract = jax.ShapeDtypeStruct((mesh.size, processes, 4), jnp.int32, sharding=split)
            add = jax.jit(partial(jnp.sum, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))
            self._sum = add.lower(self._abstract).compile()
            self._on_devices = self._put()

    @property
    def should_stop(self) -> bool:
        """Whether all processes stop now, because one of them received a signal or a state is not finite."""
        return self._requests_stop if self._is_alone else self._agreed_stop

    def request_stop(self) -> None:
        """Request that all processes stop without a signal, because this one failed."""
        self._own_stop = True

    @property
    def _requests_stop(self) -> bool:
        return self._own_stop or self._stop.received is not None

    def steps_per_call(self, proposed: int) -> int:
        """Return the steps of the next call. With several processes, process 0 proposed them a few calls ago."""
        return proposed if self._is_alone else self._agreed_steps

    def request_save(self) -> None:
        """Request that all processes save, because it is time."""
        self._own_save = max(self._own_save, SAVE_REASONS.index("time"))

    def pop_save_request(self) -> str:
        """Return why a process requested a save since this method was last called, "" if none did."""
        if self._is_alone:
            self._agreed_save = self._pop_own_save()
        agreed, self._agreed_save = self._agreed_save, 0
        return SAVE_REASONS[agreed]

    def _pop_own_save(self) -> int:
        own, self._own_save = self._own_save, 0
        return SAVE_REASONS.index("signal SIGUSR2") if self._stop.pop_save_request() else own

    def send(self, steps: int) -> jax.Array | None:
        """Dispatch the sum of the requests of all processes, and return it for `update`.

        `steps` are the proposed steps per call; only the proposal of process 0 counts.
        """
        if self._is_alone:
            return None
        requests = np.zeros_like(self._requests)
        own = requests[self._index]
        own[STOP], own[SIGNAL] = self._requests_stop, self._stop.received or 0
        own[SAVE], own[STEPS] = self._pop_own_save(), steps
        if (requests != self._requests).any():  # A comparison is cheaper than a transfer to the devices.
            self._requests = requests
            self._on_devices = self._put()
        total: jax.Array = self._sum(self._on_devices)
        return total

    def update(self, total: jax.Array | None) -> None:
        """Read a sum of requests. Its computation has finished."""
        if total is None:
            return
        requests = np.asarray(total)
        self._agreed_stop |= bool(requests[:, STOP].any())
        if requests[:, SIGNAL].any():
            self._stop.record_signal(int(requests[:, SIGNAL].max()))
        self._agreed_save = max(self._agreed_save, int(requests[:, SAVE].max()))
        self._agreed_steps = int(requests[0, STEPS])

    def _put(self) -> jax.Array:
        """Return [devices, processes, 4]: the requests of this process on its first device, zeros on its others."""

        def part(index: Any) -> np.ndarray:
            devices = range(self._abstract.shape[0])[index[0]]
            return np.stack([self._requests * (device == self._first_device) for device in devices])

        return jax.make_array_from_callback(self._abstract.shape, self._abstract.sharding, part)
