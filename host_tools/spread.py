"""Spreads the searches of one layer over devices; each one's result does not depend on where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import TypeVar

import torch

Key = TypeVar("Key")
Result = TypeVar("Result")


class Spread:
    """Devices that take one job after another, each whenever it has nothing to do.

    One device does everything in the caller's thread. Several have a thread each.

    Attributes:
        devices: that compute; the caller's tensors lie on the first.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        """Start the threads.

        Args:
            devices: that compute; one that comes twice takes two jobs at once.
        """
        self.devices = tuple(devices)
        self._idle: SimpleQueue[torch.device] = SimpleQueue()
        for device in self.devices:
            self._idle.put(device)
        is_alone = len(self.devices) == 1
        self._pool = None if is_alone else ThreadPoolExecutor(len(self.devices), "search")

    def __enter__(self) -> Spread:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, jobs: Mapping[Key, Callable[[torch.device], Result]]) -> dict[Key, Result]:
        """Run every job, begun in order, and return the results in the jobs' order.

        Raises what a job raised, when no other runs any more.
        """
        if self._pool is None:
            return {key: job(self.devices[0]) for key, job in jobs.items()}
        futures = {key: self._pool.submit(self._run, job) for key, job in jobs.items()}
        failed = [error for future in futures.values() if (error := future.exception())]
        if failed:
            raise failed[0]
        return {key: future.result() for key, future in futures.items()}

    # Threads do not inherit the caller's mode.
    @torch.no_grad()
    def _run(self, job: Callable[[torch.device], Result]) -> Result:
        device = self._idle.get()
        try:
            result = job(device)
            if device.type == "cuda":
                # Whoever takes the result up may do so on another stream.
                torch.cuda.synchronize(device)
            return result
        finally:
            self._idle.put(device)
