"""The emulated device under the race checker: a whole stream of launches, copies and graphs."""

from __future__ import annotations

from dataclasses import dataclass

from emulated_cuda import EmulatedCuda
from emulator import races
from fake_cuda import Launched

from device_runtime.kernels.table import kernel

_AFTER_ALL = (
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyHtoD_v2",
    "cuMemcpyDtoH_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpy2DAsync_v2",
    "cuMemsetD32Async",
    "cuStreamSynchronize",
    "cuCtxSynchronize",
)
"""What begins when all before it is done, and is done when what comes next begins."""


@dataclass
class RaceCheckedCuda(EmulatedCuda):
    """Tells the checker of memory, and of the order in which things happen to it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.flags = (*self.flags, races.RACE_FLAG)
        races.collect()

    def __getattr__(self, name: str):
        call = super().__getattr__(name)
        if name not in _AFTER_ALL:
            return call

        def call_after_all(*arguments: object) -> int:
            races.full_edge()
            return call(*arguments)

        return call_after_all

    def do_cuMemAlloc_v2(self, address, size):
        code = super().do_cuMemAlloc_v2(address, size)
        if not code:
            races.add_global(address._obj.value, size.value, "device memory")
        return code

    def do_cuMemFree_v2(self, address):
        races.drop_global(address.value)
        return super().do_cuMemFree_v2(address)

    def do_cuMemHostAlloc(self, pointer, size, flags):
        super().do_cuMemHostAlloc(pointer, size, flags)
        races.add_global(pointer._obj.value, size.value, "pinned memory")

    def do_cuMemFreeHost(self, pointer):
        races.drop_global(pointer.value)
        return super().do_cuMemFreeHost(pointer)

    def do_cuGraphLaunch(self, executable, stream):
        races.full_edge()
        super().do_cuGraphLaunch(executable, stream)
        races.full_edge()

    def _run(self, launched: Launched) -> None:
        letters = kernel(launched.name).arguments
        for letter, value in zip(letters, launched.arguments, strict=True):
            if letter == "P" and value and not self._is_watched(int(value)):
                raise RuntimeError(f"{launched.name} is given memory that was never allocated")
        with races.watch(launched.name, is_programmatic=launched.is_programmatic):
            super()._run(launched)

    def _is_watched(self, address: int) -> bool:
        blocks = {**self.device, **self.pinned}
        return any(place <= address < place + len(block) for place, block in blocks.items())
