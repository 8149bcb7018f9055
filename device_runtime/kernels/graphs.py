"""Kernel launches with attributes, and CUDA graphs, through libcuda.py."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, addressof, byref, c_int, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

from device_runtime.errors import DeviceError
from device_runtime.kernels.libcuda import Driver, Stream

_CAPTURE_MODE_THREAD_LOCAL = 1
_LAUNCH_CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
_LAUNCH_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


_ONE = c_uint(1)


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: an id, padding to 8 bytes, a 64-byte value (cuda.h)."""

    _fields_ = (("id", c_int), ("pad", c_int), ("value", c_int * 16))


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig (cuda.h)."""

    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(_LaunchAttribute)),
        ("num_attributes", c_uint),
    )


@dataclass(frozen=True)
class LaunchShape:
    """Grid and block of a launch, its dynamic shared memory, and how it is scheduled.

    ``cluster``: consecutive blocks that run together and share memory (sm_90 and newer).
    ``is_programmatic``: the kernel may begin while its predecessor in the stream drains; it waits
    by itself (griddepcontrol.wait) before it touches what that one writes.
    """

    grid: tuple[int, int, int]
    block: int
    shared_bytes: int = 0
    is_programmatic: bool = False
    cluster: int = 1


Argument: TypeAlias = "ctypes._SimpleCData[int] | ctypes._SimpleCData[float]"
"""A ctypes value, of the type of the kernel's parameter."""


class Launch:
    """A kernel, its shape and its arguments, laid out once for any number of launches.

    The driver copies the arguments in `enqueue`, so `resize` may change them between two launches.

    Attributes:
        name: of the entry point, where whoever made the launch gave it.
    """

    def __init__(
        self,
        driver: Driver,
        function: c_void_p,
        shape: LaunchShape,
        arguments: Sequence[Argument],
        name: str = "",
    ) -> None:
        self.name = name
        self._driver = driver
        self._function = function
        self._arguments = tuple(arguments)
        self._pointers = (c_void_p * len(arguments))(*map(addressof, arguments))
        self._grid = tuple(c_uint(size) for size in shape.grid)
        self._block = c_uint(shape.block)
        self._shared_bytes = c_uint(shape.shared_bytes)
        attributes = _attributes(shape)
        self._config: _LaunchConfig | None = None
        if attributes:
            self._config = _LaunchConfig(
                (c_uint * 3)(*shape.grid),
                (c_uint * 3)(shape.block, 1, 1),
                shape.shared_bytes,
                None,
                (_LaunchAttribute * len(attributes))(*attributes),
                len(attributes),
            )

    def resize(self, grid: tuple[int, int, int], values: Mapping[int, int]) -> None:
        """Change the blocks and some whole-number arguments, by their place, of later launches."""
        for place, value in values.items():
            self._arguments[place].value = value
        for size, wanted in zip(self._grid, grid, strict=True):
            size.value = wanted
        if self._config is not None:
            self._config.grid[0:3] = grid

    def enqueue(self, stream: Stream) -> None:
        """Launch it once."""
        if self._config is None:
            self._driver.call(
                "cuLaunchKernel",
                self._function,
                *self._grid,
                self._block,
                _ONE,
                _ONE,
                self._shared_bytes,
                stream.pointer,
                self._pointers,
                None,
            )
            return
        self._config.stream = stream.pointer
        self._driver.call(
            "cuLaunchKernelEx", byref(self._config), self._function, self._pointers, None
        )


def launch(
    driver: Driver,
    function: c_void_p,
    shape: LaunchShape,
    stream: Stream,
    arguments: Sequence[Argument],
) -> None:
    """Enqueue a kernel; the arguments are ctypes values in the order of its parameters."""
    Launch(driver, function, shape, arguments).enqueue(stream)


def _attributes(shape: LaunchShape) -> list[_LaunchAttribute]:
    attributes = []
    if shape.is_programmatic:
        attribute = _LaunchAttribute(id=_LAUNCH_PROGRAMMATIC_SERIALIZATION)
        attribute.value[0] = 1
        attributes.append(attribute)
    if shape.cluster > 1:
        attribute = _LaunchAttribute(id=_LAUNCH_CLUSTER_DIMENSION)
        attribute.value[0:3] = (shape.cluster, 1, 1)
        attributes.append(attribute)
    return attributes


class Graph:
    """Launches captured from a stream, replayed as one."""

    def __init__(self, driver: Driver, executable: c_void_p) -> None:
        self._driver = driver
        self._executable: c_void_p | None = executable

    def launch(self, stream: Stream) -> None:
        """Enqueue the whole graph."""
        self._driver.call("cuGraphLaunch", self._executable, stream.pointer)

    def upload(self, stream: Stream) -> None:
        """Place the graph on the device before its first launch."""
        self._driver.call("cuGraphUpload", self._executable, stream.pointer)

    def close(self) -> None:
        """Destroy the graph; a second call does nothing."""
        if self._executable is not None:
            executable, self._executable = self._executable, None
            self._driver.call("cuGraphExecDestroy", executable)


class Capture:
    """Records launches on a stream: `with Capture(driver, stream) as capture`, then `graph`.

    An exception inside ends the capture and leaves the stream usable.
    """

    def __init__(self, driver: Driver, stream: Stream) -> None:
        self._driver = driver
        self._stream = stream
        self._graph: Graph | None = None

    def __enter__(self) -> Capture:
        self._driver.call(
            "cuStreamBeginCapture_v2", self._stream.pointer, c_int(_CAPTURE_MODE_THREAD_LOCAL)
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        graph = c_void_p()
        try:
            self._driver.call("cuStreamEndCapture", self._stream.pointer, byref(graph))
        except DeviceError:
            if kind is None:
                raise
            return
        if kind is None:
            executable = c_void_p()
            try:
                self._driver.call(
                    "cuGraphInstantiateWithFlags", byref(executable), graph, c_ulonglong(0)
                )
                self._graph = Graph(self._driver, executable)
            finally:
                self._driver.call("cuGraphDestroy", graph)
        elif graph:
            self._driver.call("cuGraphDestroy", graph)

    @property
    def graph(self) -> Graph:
        """The captured graph.

        Raises:
            DeviceError: the capture did not end well.
        """
        if self._graph is None:
            raise DeviceError("no graph was captured")
        return self._graph
