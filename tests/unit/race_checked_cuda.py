"""The emulated device under the race checker: a whole stream of launches, copies and graphs."""

from __future__ import annotations

from dataclasses import dataclass

from emulated_cuda import EmulatedCuda
from emulator import races
from fake_cuda import Launched

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

    def do_cuGraphLaunch(self, executable, stream):
        races.full_edge()
        super().do_cuGraphLaunch(executable, stream)
        races.full_edge()

    def _run(self, launched: Launched) -> None:
        with races.watch(launched.name, is_programmatic=launched.is_programmatic):
            super()._run(launched)
