"""A CUDA driver made of host memory: addresses are real, copies happen, launches are recorded.

`install(monkeypatch)` puts it in place of libcuda. Streams run at once. Of the kernels only the
sampler does something: it chooses the token that `FakeCuda.choose` says, as sampling.cuh does.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from device_runtime.backends.cuda import survey
from device_runtime.engine import run_ahead
from device_runtime.kernels import libcuda
from device_runtime.kernels.cubins import (
    SOURCES,
    Cubin,
    cubin_file,
    has_group_size,
    interface_of,
    write_record,
)
from device_runtime.kernels.table import KERNELS

OUT_OF_MEMORY = 2
INVALID_VALUE = 1
LOST = 700
NEEDS_NO_CONTEXT = ("cuGetErrorString", "cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2")
ATTRIBUTES = {16: 132, 18: 0, 13: 1980000, 38: 50 << 20, 75: 9, 76: 0, 81: 228 << 10, 97: 227 << 10}


@dataclass
class Launched:
    """A kernel launch: arguments as Python numbers in the table's order; the function's handle."""

    name: str
    grid: tuple[int, int, int]
    block: int
    shared_bytes: int
    arguments: list[int | float]
    is_programmatic: bool = False
    function: int = field(default=0, compare=False)


@dataclass
class FakeCuda:
    """Stands for the library object that ctypes makes.

    Attributes:
        largest_block: bytes of the largest cuMemAlloc that succeeds.
        capacity: bytes of all allocations together.
        version: CUDA release times 1000, as cuDriverGetVersion has it.
        missing: functions that this driver does not export.
        failing: error codes by function.
        is_lost: every call that needs the context fails, as after a kernel that faulted.
        calls: names in order.
        launches: enqueued outside graphs, and by graphs when they are launched.
        choose: the token for (slot, position).
        milliseconds: between any two events.
    """

    largest_block: int = 1 << 40
    capacity: int = 1 << 40
    version: int = 13000
    missing: set[str] = field(default_factory=set)
    failing: dict[str, int] = field(default_factory=dict)
    is_lost: bool = False
    attributes: dict[int, int] = field(default_factory=lambda: dict(ATTRIBUTES))
    calls: list[str] = field(default_factory=list)
    launches: list[Launched] = field(default_factory=list)
    choose: Callable[[int, int], int] = lambda slot, position: 3 + (7 * slot + position) % 300
    milliseconds: float = 0.5

    def __post_init__(self) -> None:
        self.device: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.pinned: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.mapped: dict[int, int] = {}
        self.contexts = 0
        self._names: list[bytes] = []
        self._graphs: list[list[Launched]] = []
        self._capturing: list[Launched] | None = None

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu") or name in self.missing:
            raise AttributeError(name)
        action = getattr(type(self), f"do_{name}", None)

        def call(*arguments: object) -> int:
            self.calls.append(name)
            if name in self.failing:
                return self.failing[name]
            if self.is_lost and name not in NEEDS_NO_CONTEXT:
                return LOST
            return (action(self, *arguments) or 0) if action else 0

        return call

    @property
    def num_bytes(self) -> int:
        """Bytes of device memory in use."""
        return sum(len(block) for block in self.device.values()) + sum(self.mapped.values())

    def do_cuGetErrorString(self, code, text):
        text._obj.value = b"out of memory" if code.value == OUT_OF_MEMORY else b"some failure"

    def do_cuDevicePrimaryCtxRetain(self, context, device):
        self.contexts += 1
        context._obj.value = 1

    def do_cuDevicePrimaryCtxRelease_v2(self, device):
        self.contexts -= 1

    def do_cuDriverGetVersion(self, number):
        number._obj.value = self.version

    def do_cuDeviceGetName(self, text, size, device):
        text.value = b"Fake GPU"

    def do_cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.attributes[attribute.value]

    def do_cuMemGetInfo_v2(self, free, total):
        total._obj.value = min(self.capacity, 1 << 33)
        free._obj.value = total._obj.value - self.num_bytes

    def do_cuMemAlloc_v2(self, address, size):
        if size.value > self.largest_block or self.num_bytes + size.value > self.capacity:
            return OUT_OF_MEMORY
        block = ctypes.create_string_buffer(size.value + 256)
        place = (ctypes.addressof(block) + 255) // 256 * 256
        self.device[place] = block
        address._obj.value = place
        return 0

    def do_cuMemFree_v2(self, address):
        return 0 if self.device.pop(address.value, None) is not None else INVALID_VALUE

    def do_cuMemHostAlloc(self, pointer, size, flags):
        block = ctypes.create_string_buffer(size.value)
        self.pinned[ctypes.addressof(block)] = block
        pointer._obj.value = ctypes.addressof(block)

    def do_cuMemHostGetDevicePointer_v2(self, device, pointer, flags):
        device._obj.value = pointer.value

    def do_cuMemFreeHost(self, pointer):
        return 0 if self.pinned.pop(pointer.value, None) is not None else INVALID_VALUE

    def do_cuMemGetAllocationGranularity(self, granularity, properties, option):
        granularity._obj.value = 2 << 20

    def do_cuMemAddressReserve(self, base, size, alignment, wish, flags):
        base._obj.value = 1 << 44

    def do_cuMemCreate(self, handle, size, properties, flags):
        if self.num_bytes + size.value > self.capacity:
            return OUT_OF_MEMORY
        handle._obj.value = size.value
        return 0

    def do_cuMemMap(self, address, size, offset, handle, flags):
        self.mapped[address.value] = size.value

    def do_cuMemUnmap(self, address, size):
        del self.mapped[address.value]

    def do_cuMemcpyHtoDAsync_v2(self, target, source, size, stream):
        ctypes.memmove(target.value, source.value, size.value)

    def do_cuMemcpyHtoD_v2(self, target, source, size):
        ctypes.memmove(target.value, source.value, size.value)

    def do_cuMemcpyDtoH_v2(self, target, source, size):
        ctypes.memmove(target.value, source.value, size.value)

    def do_cuMemcpyDtoDAsync_v2(self, target, source, size, stream):
        ctypes.memmove(target.value, source.value, size.value)

    def do_cuMemcpy2DAsync_v2(self, copy, stream):
        c = copy._obj
        for row in range(c.height):
            ctypes.memmove(
                c.target_device + row * c.target_pitch,
                c.source_host + row * c.source_pitch,
                c.width,
            )

    def do_cuMemsetD32Async(self, address, word, count, stream):
        words = (ctypes.c_uint32 * count.value).from_address(address.value)
        np.frombuffer(words, np.uint32)[:] = word.value

    def do_cuModuleGetFunction(self, handle, module, name):
        self._names.append(name.value)
        handle._obj.value = len(self._names)

    def do_cuLaunchKernel(self, function, gx, gy, gz, block, _y, _z, shared, stream, values, extra):
        grid = (gx.value, gy.value, gz.value)
        self._launch(function, grid, block.value, shared.value, values, False)

    def do_cuLaunchKernelEx(self, config, function, values, extra):
        c = config._obj
        self._launch(function, tuple(c.grid), c.block[0], c.shared_bytes, values, True)

    def do_cuStreamBeginCapture_v2(self, stream, mode):
        self._capturing = []

    def do_cuStreamEndCapture(self, stream, graph):
        self._graphs.append(self._capturing or [])
        self._capturing = None
        graph._obj.value = len(self._graphs)

    def do_cuGraphInstantiateWithFlags(self, executable, graph, flags):
        executable._obj.value = graph.value

    def do_cuEventElapsedTime(self, milliseconds, earlier, later):
        milliseconds._obj.value = self.milliseconds

    def do_cuGraphLaunch(self, executable, stream):
        for launched in self._graphs[executable.value - 1]:
            self._run(launched)

    def _launch(self, function, grid, block, shared_bytes, values, is_programmatic) -> None:
        name = self._names[function.value - 1].decode()
        row = next(row for row in KERNELS if row.name == name)
        types = {"P": ctypes.c_uint64, "i": ctypes.c_int32, "f": ctypes.c_float}
        arguments = [
            types[letter].from_address(values[i]).value for i, letter in enumerate(row.arguments)
        ]
        handle = function.value
        launched = Launched(name, grid, block, shared_bytes, arguments, is_programmatic, handle)
        if self._capturing is not None:
            self._capturing.append(launched)
        else:
            self._run(launched)

    def _run(self, launched: Launched) -> None:
        self.launches.append(launched)
        if launched.name == "sample_top_f32":
            self._sample(launched)

    def _sample(self, launched: Launched) -> None:
        a = launched.arguments
        tokens, positions, ring, row_ids, ring_size = a[3], a[4], a[6], a[11], a[15]
        for row in range(launched.grid[1]):
            slot = row if not row_ids else ctypes.c_int32.from_address(row_ids + 4 * row).value
            place = ctypes.c_int32.from_address(positions + 4 * slot)
            if place.value < 0:
                continue
            token = self.choose(slot, place.value + 1)
            place.value += 1
            ctypes.c_int32.from_address(tokens + 4 * slot).value = token
            entry = ring + 8 * (slot * ring_size + place.value % ring_size)
            word = place.value << 32 | (token & 0xFFFFFFFF)
            ctypes.c_uint64.from_address(entry).value = word


def install(monkeypatch: pytest.MonkeyPatch, fake: FakeCuda | None = None) -> FakeCuda:
    """Put a fake in place of libcuda; nothing of pycuda or NVML is asked.

    An engine queues as many steps as it may, however long a fake takes for one.
    """
    fake = fake or FakeCuda()
    monkeypatch.setattr(run_ahead, "COVERED_S", 1e6)
    monkeypatch.setattr(libcuda, "_load", lambda: fake)
    monkeypatch.setattr(survey, "device_used_bytes", lambda: 0)
    monkeypatch.setitem(__import__("sys").modules, "pycuda.driver", None)
    return fake


def put_cubin(
    folder: Path,
    source: str,
    group_size: int,
    content: str,
    *,
    sm: int = 90,
    cuda: str = "13.0",
    is_plain: bool = False,
    sources_sha256: str = "",
    flags: tuple[str, ...] = ("-O3",),
) -> Cubin:
    """Write what stands for a cubin; return its row of the record."""
    name = cubin_file(source, sm, cuda, group_size, is_plain)
    (folder / name).write_text(content, encoding="ascii")
    interface = interface_of(source)
    return Cubin(name, source, sm, cuda, group_size, is_plain, "", sources_sha256, interface, flags)


def write_cubins(folder: Path, sm: int = 90, cuda: str = "13.0", group_size: int = 32) -> Path:
    """Write a set of cubins that hold nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    cubins = []
    for source in SOURCES:
        group = group_size if has_group_size(source) else 0
        cubins.append(put_cubin(folder, source, group, "cubin", sm=sm, cuda=cuda))
    write_record(folder, cubins)
    return folder
