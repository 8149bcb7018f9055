"""Kernels of the folder TURBOJET_KERNELS on numpy arrays, launched as the emulator's are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from device_runtime.backends.cuda.array_launch import ArrayLaunch
from device_runtime.backends.cuda.driver import open_driver
from device_runtime.backends.cuda.kernel_set import KernelSet, find_cubins

__all__ = ["ArrayLaunch", "device_launch"]


@contextmanager
def device_launch(*sources: str, group_size: int = 0) -> Iterator[ArrayLaunch]:
    """Open the device with the kernels of some sources, and leave it clean."""
    folders = (Path(os.environ["TURBOJET_KERNELS"]),)
    with open_driver() as driver:
        files = find_cubins(folders, sources, group_size, driver)
        with closing(KernelSet(driver, files)) as kernels, closing(driver.new_stream()) as stream:
            yield ArrayLaunch(driver, kernels, stream)
