"""Decode steps as CUDA graphs: one for each width, once greedy and once with the sampler."""

from __future__ import annotations

import os

from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.programs import Programs
from device_runtime.backends.cuda.sizes import decode_widths
from device_runtime.kernels.graphs import Capture, Graph, Launch
from device_runtime.kernels.libcuda import Stream

EAGER_VARIABLE = "TURBOJET_EAGER"
"""When set, the kernels of a step are launched one by one: to compare, and for tools that cannot
look into graphs."""


class GraphSet:
    """Captured when made, so that no step waits for it; every position replays the same graph."""

    def __init__(
        self, driver: CudaDriver, stream: Stream, programs: Programs, max_batch_size: int
    ) -> None:
        self._stream = stream
        self._graphs: dict[tuple[int, bool], Graph] = {}
        self._eager: dict[tuple[int, bool], list[Launch]] = {}
        self._widths = decode_widths(max_batch_size)
        try:
            for width in self._widths:
                for is_greedy in (True, False):
                    launches = programs.decode(width, is_greedy=is_greedy)
                    if os.environ.get(EAGER_VARIABLE):
                        self._eager[width, is_greedy] = launches
                        continue
                    with Capture(driver, stream) as capture:
                        for launch in launches:
                            launch.enqueue(stream)
                    self._graphs[width, is_greedy] = capture.graph
                    capture.graph.upload(stream)
        except BaseException:
            self.close()
            raise

    def width(self, num_slots: int) -> int:
        """Return the narrowest width for so many sequences."""
        return next(width for width in self._widths if width >= num_slots)

    def launch(self, width: int, *, is_greedy: bool) -> None:
        """Enqueue one step of the first ``width`` slots."""
        if self._eager:
            for launch in self._eager[width, is_greedy]:
                launch.enqueue(self._stream)
            return
        self._graphs[width, is_greedy].launch(self._stream)

    def close(self) -> None:
        """Destroy the graphs; a second call does nothing."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
