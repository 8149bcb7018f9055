"""Every CUDA kernel compiled for every target: names, registers as the table says, no spills."""

from __future__ import annotations

from pathlib import Path

import pytest

from device_runtime.kernels.table import KERNELS
from host_tools.cubin_resources import cubin_resources
from host_tools.kernels import BUILDS, KernelCache, Unit, cached_unit, units_of
from host_tools.nvrtc import WHEELS

CACHE = Path(__file__).resolve().parents[2] / ".cache"
MAX_REGISTERS = {row.name: row.max_registers for row in KERNELS}


@pytest.mark.skipif(
    not all((CACHE / "nvrtc" / release).is_dir() for release in WHEELS),
    reason="scripts/fetch-compilers gets the compilers; scripts/test runs it",
)
@pytest.mark.parametrize("unit", units_of(BUILDS), ids=lambda unit: unit.file)
def test_no_kernel_spills_or_takes_more_registers_than_planned(unit: Unit) -> None:
    cubin = cached_unit(unit, KernelCache(CACHE / "nvrtc", CACHE / "cubins"))
    found = cubin_resources(cubin)
    assert set(found) == {row.name for row in KERNELS if row.source == unit.source}
    for name, resources in found.items():
        assert resources.stack_bytes == 0, f"{name} spills on {unit.build.name}"
        assert resources.registers <= MAX_REGISTERS[name], f"{name} on {unit.build.name}"
