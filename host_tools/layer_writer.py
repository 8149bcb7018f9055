"""Stores finished layers, in a thread where the device leaves the processor time for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

from host_tools.phase_times import WAITING, PhaseTimes

Content = TypeVar("Content")


class LayerWriter(Generic[Content]):
    """Stores one thing after another; while one is stored the next may be made, no more."""

    def __init__(
        self, store: Callable[[Content], None], times: PhaseTimes, *, is_threaded: bool
    ) -> None:
        """Start the thread.

        Args:
            store: called once for everything, in order.
            times: hears how long the caller waited.
            is_threaded: whether ``store`` runs beside the caller.
        """
        self._store = store
        self._times = times
        self._pool = ThreadPoolExecutor(1, "layer-writer") if is_threaded else None
        self._pending: Future[None] | None = None

    def __enter__(self) -> LayerWriter[Content]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def put(self, content: Content) -> None:
        """Have something stored; raises what storing the one before raised."""
        if self._pool is None:
            self._store(content)
            return
        self.drain()
        self._pending = self._pool.submit(self._store, content)

    def drain(self) -> None:
        """Wait until everything is stored; raises what storing raised."""
        if self._pending is not None:
            with self._times.phase(WAITING):
                pending, self._pending = self._pending, None
                pending.result()
