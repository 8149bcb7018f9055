"""Every kernel of a folder against its twin, on the device it stands on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np

from device_runtime.backends.cuda.array_launch import ArrayLaunch
from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.kernel_set import KernelSet, find_cubins
from device_runtime.backends.cuda.selftest_attention import check_attention
from device_runtime.backends.cuda.selftest_linear import (
    Check,
    check_half,
    check_norm_and_head,
    check_quantized,
)
from device_runtime.backends.cuda.selftest_sampling import (
    check_embedding,
    check_probes,
    check_sampling,
)
from device_runtime.errors import DeviceError
from device_runtime.kernels.cubins import GROUP_SIZES, SOURCES, has_group_size

__all__ = ["Check", "run_checks"]


def run_checks(driver: CudaDriver, folders: tuple[Path, ...], seed: int = 0) -> Iterator[Check]:
    """Yield a check for each entry point that the folders have for this device.

    Args:
        driver: open.
        folders: of cubins, see `kernel_folders`.
        seed: of the random inputs.

    Raises:
        DeviceError: there are no kernels for this device, or a launch failed.
    """
    rng = np.random.default_rng(seed)
    shared = [source for source in SOURCES if not has_group_size(source)]
    with closing(driver.new_stream()) as stream:
        with closing(KernelSet(driver, find_cubins(folders, shared, 0, driver))) as kernels:
            run = ArrayLaunch(driver, kernels, stream)
            yield from check_embedding(run, rng)
            yield from check_norm_and_head(run, rng)
            yield from check_half(run, rng)
            yield from check_attention(run, rng)
            yield from check_sampling(run, rng)
            yield from check_probes(run)
        quantized = [source for source in SOURCES if has_group_size(source)]
        num_groups = 0
        for group_size in GROUP_SIZES:
            try:
                files = find_cubins(folders, quantized, group_size, driver)
            except DeviceError:
                continue  # a package brings the kernels of its own group size alone
            num_groups += 1
            with closing(KernelSet(driver, files)) as kernels:
                yield from check_quantized(ArrayLaunch(driver, kernels, stream), group_size, rng)
        if not num_groups:
            find_cubins(folders, quantized, GROUP_SIZES[0], driver)
