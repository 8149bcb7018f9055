"""Gives each layer's search to a device and stores what comes back; the order does not matter."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from types import TracebackType

import torch

from host_tools.awq.gram import CONSUMERS, InputMoments, Tap
from host_tools.awq.layer_solver import QuantizedLayer
from host_tools.checkpoint.linear_weights import LayerWeights
from host_tools.decoder.prefetch import moved_weights
from host_tools.layer_records import LayerSeconds
from host_tools.phase_times import SEARCH, WAITING, PhaseTimes

TakeMoments = Callable[[Tap], InputMoments]
Solve = Callable[[LayerWeights, TakeMoments | None], QuantizedLayer]


@dataclass(frozen=True)
class SearchJob:
    """One layer to be quantized.

    Attributes:
        index: number of the layer.
        weights: dense, fp32, on the device that ran the layer.
        take_moments: gives the inputs' moments of each tap once; None when nothing was run.
        seconds: what the layer took so far.
    """

    index: int
    weights: LayerWeights
    take_moments: TakeMoments | None
    seconds: LayerSeconds


@dataclass(frozen=True)
class SolvedLayer:
    """A layer that waits to be stored.

    Attributes:
        index: number of the layer.
        quantized: what the search gave.
        seconds: what the layer took so far.
    """

    index: int
    quantized: QuantizedLayer
    seconds: LayerSeconds


class LayerSearches:
    """Searches of layers under way.

    One CPU searches and stores in the caller's thread. One GPU searches in the caller's thread;
    packing and the disk have a thread of their own. Several devices search each in a thread, while
    the caller goes on with the next layer's forward pass.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        solve: Solve,
        store: Callable[[SolvedLayer], None],
        times: PhaseTimes,
    ) -> None:
        """Start the threads.

        Args:
            devices: that search; the first also runs the forward pass, so it is given work last.
            solve: quantizes a layer on the device where its tensors lie.
            store: packs a layer and writes it.
            times: hears of searches and of waiting.
        """
        self._solve = solve
        self._store = store
        self._times = times
        self._is_spread = len(devices) > 1
        self._idle: queue.LifoQueue[torch.device] = queue.LifoQueue()
        for device in devices:
            self._idle.put(device)
        is_threaded = self._is_spread or devices[0].type == "cuda"
        self._searchers = ThreadPoolExecutor(len(devices)) if self._is_spread else None
        self._writers = ThreadPoolExecutor(len(devices)) if is_threaded else None
        self._writing: list[Future[None]] = []
        self._searching: list[Future[None]] = []

    def __enter__(self) -> LayerSearches:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for pool in (self._searchers, self._writers):
            if pool is not None:
                pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, job: SearchJob) -> None:
        """Search a layer; returns when its search is over or another device has it.

        Raises what an earlier layer's search or storage raised.
        """
        if self._searchers is None:
            self._write(self._solved(job, job.weights.attention_norm.device))
            return
        with self._times.phase(WAITING):
            device = self._idle.get()
            self._searching = _unfinished(self._searching)
            moved = _on(job, device)
        self._searching.append(self._searchers.submit(self._search, moved, device))

    def drain(self) -> None:
        """Wait until everything is stored; raises what a search or the disk raised."""
        with self._times.phase(WAITING):
            for future in self._searching:
                future.result()
            for future in self._writing:
                future.result()
        self._searching, self._writing = [], []

    def _search(self, job: SearchJob, device: torch.device) -> None:
        try:
            solved = self._solved(job, device)
        finally:
            self._idle.put(device)
        self._write(solved)

    # Threads do not inherit the caller's mode.
    @torch.no_grad()
    def _solved(self, job: SearchJob, device: torch.device) -> SolvedLayer:
        with self._times.phase(SEARCH, device) as search:
            quantized = self._solve(job.weights, job.take_moments)
        seconds = replace(job.seconds, search_s=search.seconds_s)
        return SolvedLayer(job.index, quantized, seconds)

    def _write(self, solved: SolvedLayer) -> None:
        """Store a layer, or have it stored; no more layers wait than there are devices."""
        if self._writers is None:
            self._store(solved)
            return
        if not self._is_spread and self._writing:
            with self._times.phase(WAITING):
                self._writing.pop().result()
        self._writing.append(self._writers.submit(self._store, solved))


def _unfinished(futures: list[Future[None]]) -> list[Future[None]]:
    """Return those that go on; raises what one of the others raised."""
    for future in futures:
        if future.done():
            future.result()
    return [future for future in futures if not future.done()]


def _on(job: SearchJob, device: torch.device) -> SearchJob:
    take = job.take_moments
    moments = {} if take is None else {tap: _moved(take(tap), device) for tap in CONSUMERS}
    weights = moved_weights(job.weights, lambda tensor: tensor.to(device))
    return replace(job, weights=weights, take_moments=None if take is None else moments.pop)


def _moved(moments: InputMoments, device: torch.device) -> InputMoments:
    changes = {
        field.name: value.to(device)
        for field in fields(moments)
        if isinstance(value := getattr(moments, field.name), torch.Tensor)
    }
    return replace(moments, **changes)
