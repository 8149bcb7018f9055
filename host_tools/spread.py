"""Spreads the searches of one layer over devices; each one's result does not depend on where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import torch

Key = TypeVar("Key")
Result = TypeVar("Result")


class Spread(Generic[Key]):
    """Devices, and what is done on which.

    One device does everything in the caller's thread. Several have a thread each.

    Attributes:
        devices: that compute; the caller's tensors lie on the first.
    """

    def __init__(self, devices: Sequence[torch.device], costs: Mapping[Key, float]) -> None:
        """Start the threads.

        Args:
            devices: that compute.
            costs: of everything that will be asked for, in any unit.
        """
        self.devices = tuple(devices)
        self._costs = dict(costs)
        self._pools = [
            ThreadPoolExecutor(1, thread_name_prefix=f"search-{device}")
            for device in (self.devices if len(self.devices) > 1 else ())
        ]

    def __enter__(self) -> Spread[Key]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)

    def places(self, keys: Iterable[Key]) -> dict[Key, int]:
        """Return the number of the device for each key: the dearest first, to the idlest device."""
        loads = [0.0] * len(self.devices)
        places = {}
        for key in sorted(keys, key=lambda key: -self._costs[key]):
            places[key] = loads.index(min(loads))
            loads[places[key]] += self._costs[key]
        return places

    def run(self, jobs: Mapping[Key, Callable[[torch.device], Result]]) -> dict[Key, Result]:
        """Run every job on its device and return the results in the jobs' order.

        Raises what a job raised, when no other runs any more.
        """
        if not self._pools:
            return {key: job(self.devices[0]) for key, job in jobs.items()}
        places = self.places(jobs)
        futures = {
            key: self._pools[places[key]].submit(_alone, job, self.devices[places[key]])
            for key, job in jobs.items()
        }
        failed = [error for future in futures.values() if (error := future.exception())]
        if failed:
            raise failed[0]
        return {key: future.result() for key, future in futures.items()}


# Threads do not inherit the caller's mode.
@torch.no_grad()
def _alone(job: Callable[[torch.device], Result], device: torch.device) -> Result:
    result = job(device)
    if device.type == "cuda":
        # Whoever takes the result up may do so on another stream.
        torch.cuda.synchronize(device)
    return result
