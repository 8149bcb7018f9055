"""Loaded cubins: an entry point by its name, its arguments checked against the table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int32, c_uint64, c_void_p
from pathlib import Path

from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.errors import DeviceError, InternalError, PackageError
from device_runtime.kernels.cubins import (
    Cubin,
    choose_cubins,
    has_group_size,
    interface_of,
    read_record,
)
from device_runtime.kernels.graphs import Argument, Launch, LaunchShape
from device_runtime.kernels.libcuda import Module
from device_runtime.kernels.shared_memory import share_of
from device_runtime.kernels.table import Kernel, kernel

VARIABLE = "TURBOJET_KERNELS"
"""Folder of cubins that takes the place of the package's."""
PLAIN_VARIABLE = "TURBOJET_PLAIN_KERNELS"
"""When set, the plain variant of the kernels runs: what sm_72 gets, on a newer GPU."""
_CARVEOUT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, per cent


def kernel_folders(package_folder: Path) -> tuple[Path, ...]:
    """Return where cubins may be, the first that has some wins."""
    override = os.environ.get(VARIABLE)
    if override:
        return (Path(override),)
    return (package_folder, Path(__file__).parents[2] / "kernels" / "cubins")


def find_cubins(
    folders: Sequence[Path], sources: Sequence[str], group_size: int, driver: CudaDriver
) -> dict[str, Path]:
    """Return the file of each source for this device.

    Args:
        folders: see `kernel_folders`.
        sources: that are needed.
        group_size: of the package's 4-bit matrices, or 0.
        driver: of the device.

    Raises:
        DeviceError: no folder has what this device needs.
        PackageError: a record is damaged.
    """
    sm, version = driver.sm, driver.version
    is_plain = bool(os.environ.get(PLAIN_VARIABLE))
    found: tuple[Cubin, ...] = ()
    for folder in folders:
        found = read_record(folder)
        if found:
            break
    chosen = choose_cubins(found, sm, version, is_plain)
    wanted = {source: group_size if has_group_size(source) else 0 for source in sources}
    known = {key: cubin for key, cubin in chosen.items() if cubin.interface == interface_of(key[0])}
    missing = [item for item in wanted.items() if item not in known]
    if missing:
        built = sorted({cubin.build for cubin in found})
        remedy = f"pack for this board, set {VARIABLE} to a folder of them"
        if not driver.attribute("integrated"):
            remedy = (
                f"packages hold those of Jetsons, so set {VARIABLE} to a folder that "
                f"`turbojet-host kernels --sm {sm}` made, if it can,"
            )
        source = missing[0][0]
        kind = has_group_size(source)
        others = [item for item in wanted.items() if has_group_size(item[0]) == kind]
        is_of_another = any(item in chosen for item in others)
        if is_of_another:
            remedy = "they are another turbojet's, so pack again with this one"
        raise DeviceError(
            f"{'not all' if is_of_another else 'no'} kernels for sm_{sm} and a driver of CUDA "
            f"{version[0]}.{version[1]} in "
            f"{' or '.join(str(folder) for folder in folders)} (missing {source}"
            f"{f', group size {group_size}' if group_size else ''}; there are "
            f"{', '.join(built) or 'none'}); {remedy} or use the reference backend"
        )
    return {source: folder / chosen[source, group].file for source, group in wanted.items()}


class KernelSet:
    """Modules of one device; close it, or what it loaded stays."""

    def __init__(self, driver: CudaDriver, files: dict[str, Path]) -> None:
        """Load cubins.

        Raises:
            DeviceError: the driver refuses one.
            PackageError: a file cannot be read.
        """
        self._driver = driver
        self._functions: dict[str, c_void_p] = {}
        self._shared_bytes: dict[str, int] = {}
        self._modules: dict[str, Module] = {}
        self.is_programmatic = driver.sm >= 90 and driver.has("cuLaunchKernelEx")
        self.num_sms = driver.attribute("multiprocessor_count")
        self.max_shared_bytes = driver.attribute("max_shared_memory_per_block")
        try:
            for source, path in files.items():
                self._modules[source] = Module(driver, path.read_bytes())
        except OSError as error:
            self.close()
            raise PackageError(f"kernels cannot be read: {error}; install again") from error
        except DeviceError:
            self.close()
            raise

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        arguments: Sequence[int | float | None],
        *,
        shared_bytes: int = 0,
        is_first: bool = False,
    ) -> Launch:
        """Return a launch of an entry point, ready to be enqueued.

        Args:
            name: as in the table.
            grid: blocks, each at least 1.
            arguments: addresses (None is null), whole numbers and floats, as the table's letters.
            shared_bytes: dynamic shared memory.
            is_first: of a step: it begins when all before it is done, so that the kernels after it
                may read what no kernel of their own step writes before they wait.

        Raises:
            InternalError: the arguments do not fit the table's row.
            DeviceError: the device has too little shared memory.
        """
        row = kernel(name)
        if shared_bytes > self.max_shared_bytes:
            raise DeviceError(
                f"{name} needs {shared_bytes} bytes of shared memory, the device gives a block "
                f"{self.max_shared_bytes}; use the reference backend"
            )
        if min(grid) < 1:
            raise InternalError(f"{name} is launched with the grid {grid}")
        is_programmatic = self.is_programmatic and not is_first
        shape = LaunchShape(grid, row.block, shared_bytes, is_programmatic)
        function, values = self._function(row, shared_bytes), to_arguments(row, arguments)
        return Launch(self._driver, function, shape, values, name)

    def close(self) -> None:
        """Unload everything; a second call does nothing."""
        self._functions.clear()
        for module in self._modules.values():
            module.close()
        self._modules.clear()

    def _function(self, row: Kernel, shared_bytes: int) -> c_void_p:
        known = self._functions.get(row.name)
        if known is not None and shared_bytes <= self._shared_bytes[row.name]:
            return known
        if row.source not in self._modules:
            raise InternalError(f"{row.name} was not among the kernels that were asked for")
        function = self._modules[row.source].function(row.name, shared_bytes)
        share = self._carveout(row, shared_bytes)
        self._driver.call("cuFuncSetAttribute", function, c_int(_CARVEOUT), c_int(share))
        self._functions[row.name] = function
        self._shared_bytes[row.name] = shared_bytes
        return function

    def _carveout(self, row: Kernel, shared_bytes: int) -> int:
        """Return how much of an SM's L1 is to be shared memory, in per cent.

        Where kernels ask for different shares an SM must be empty before the next one may start.
        """
        if row.blocks_per_sm == 0:
            return 100
        whole = self._driver.attribute("max_shared_memory_per_multiprocessor")
        return share_of(row.blocks_per_sm, shared_bytes, whole)


def to_arguments(row: Kernel, values: Sequence[int | float | None]) -> list[Argument]:
    """Return ctypes values in the types of a table row.

    Raises:
        InternalError: their number or a type does not fit.
    """
    if len(values) != len(row.arguments):
        raise InternalError(
            f"{row.name} takes {len(row.arguments)} arguments, {len(values)} are given"
        )
    arguments: list[Argument] = []
    for index, (letter, value) in enumerate(zip(row.arguments, values, strict=True)):
        if letter == "f" and isinstance(value, float):
            arguments.append(c_float(value))
        elif letter == "i" and isinstance(value, int) and -(1 << 31) <= value < 1 << 31:
            arguments.append(c_int32(value))
        elif letter == "P" and (value is None or isinstance(value, int)):
            arguments.append(c_uint64(value or 0))
        else:
            raise InternalError(f"argument {index} of {row.name} is {value!r}, expected {letter!r}")
    return arguments
