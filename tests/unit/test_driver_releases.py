"""Which CUDA release brought each driver function in use: all but one are older than JetPack 5's.

The numbers are those of the PFN types in cudaTypedefs.h of CUDA 13.0, whose older ones are the same
in 11.7, 11.8 and 12.6: PFN_cuGraphUpload_v11010 is cuGraphUpload since 11.1.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
from fake_cuda import ATTRIBUTES, FakeCuda, install, write_cubins
from tiny_package import make_package, tiny_model

import device_runtime
from device_runtime.backends.cuda import arena
from device_runtime.backends.cuda import driver as cuda_driver
from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.engine.engine import Engine
from device_runtime.engine.generation import GenerationParams
from device_runtime.engine.options import EngineOptions
from device_runtime.errors import DeviceError
from device_runtime.kernels import graphs
from device_runtime.kernels.graphs import Launch, LaunchShape
from device_runtime.kernels.libcuda import Module

SINCE = {
    2000: (
        "cuInit cuDeviceGet cuDeviceGetName cuDeviceGetAttribute cuCtxSynchronize cuStreamCreate "
        "cuStreamSynchronize cuStreamQuery cuEventCreate cuEventRecord cuEventSynchronize "
        "cuEventElapsedTime cuModuleLoadData cuModuleGetFunction cuModuleUnload cuMemFreeHost"
    ),
    2020: "cuDriverGetVersion cuMemHostAlloc",
    3020: (
        "cuMemGetInfo_v2 cuMemAlloc_v2 cuMemFree_v2 cuMemcpyHtoD_v2 cuMemcpyDtoH_v2 "
        "cuMemcpyHtoDAsync_v2 cuMemcpyDtoHAsync_v2 cuMemcpyDtoDAsync_v2 cuMemcpy2DAsync_v2 "
        "cuMemsetD32Async cuMemHostGetDevicePointer_v2"
    ),
    4000: (
        "cuCtxPushCurrent_v2 cuCtxPopCurrent_v2 cuStreamDestroy_v2 cuEventDestroy_v2 cuLaunchKernel"
    ),
    6000: "cuGetErrorString",
    7000: "cuDevicePrimaryCtxRetain",
    9000: "cuFuncSetAttribute",
    10000: "cuStreamEndCapture cuGraphLaunch cuGraphDestroy cuGraphExecDestroy",
    10010: "cuStreamBeginCapture_v2",
    10020: (
        "cuMemGetAllocationGranularity cuMemAddressReserve cuMemAddressFree cuMemCreate cuMemMap "
        "cuMemUnmap cuMemRelease cuMemSetAccess"
    ),
    11000: "cuDevicePrimaryCtxRelease_v2",
    11010: "cuGraphUpload",
    11040: "cuGraphInstantiateWithFlags",
    11060: "cuLaunchKernelEx",
}
RELEASES = {name: release for release, names in SINCE.items() for name in names.split()}
JETPACKS = {
    "Xavier, JetPack 5": (11040, 72, "11.8"),
    "Orin, JetPack 5": (11040, 87, "11.8"),
    "Orin, JetPack 6": (12060, 87, "12.6"),
    "Orin, JetPack 7": (13020, 87, "13.0"),
    "Thor, JetPack 7": (13000, 110, "13.0"),
}


# Size and offset of each field, by sizeof and offsetof with cuda.h of 11.7 (which has no launch
# attributes yet), 11.8, 12.6 and 13.0; they agree.
LAYOUTS = {
    graphs._LaunchConfig: (56, (0, 12, 24, 32, 40, 48)),
    graphs._LaunchAttribute: (72, (0, 4, 8)),
    cuda_driver._Copy2D: (
        128,
        (0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120),
    ),
    arena._AllocationProperties: (32, (0, 4, 8, 16, 24)),
    arena._AccessDescription: (12, (0, 8)),
}


@pytest.mark.parametrize("structure", LAYOUTS, ids=lambda structure: structure.__name__)
def test_structures_are_laid_out_as_in_the_headers_of_every_release(structure) -> None:
    offsets = tuple(getattr(structure, field[0]).offset for field in structure._fields_)
    assert (ctypes.sizeof(structure), offsets) == LAYOUTS[structure]


def driver_of(version: int, sm: int) -> FakeCuda:
    """A board's driver, which exports what its release had and nothing that is not listed."""
    attributes = ATTRIBUTES | {16: 8, 18: 1, 75: sm // 10, 76: sm % 10}
    missing = {name for name, release in RELEASES.items() if release > version}
    return FakeCuda(version=version, attributes=attributes, missing=missing)


def test_every_driver_function_in_use_is_listed_with_its_release() -> None:
    root = Path(device_runtime.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in root.rglob("*.py")]
    named = {name for text in sources for name in re.findall(r'"(cu[A-Z]\w+)"', text)}
    attributes = {name for text in sources for name in re.findall(r"_lib\.(cu[A-Z]\w+)", text)}
    assert named | attributes == set(RELEASES)
    assert [name for name, release in RELEASES.items() if release > 11040] == ["cuLaunchKernelEx"]


@pytest.mark.parametrize("jetpack", JETPACKS)
def test_a_model_answers_on_the_driver_of_every_jetpack(jetpack, tmp_path, monkeypatch) -> None:
    version, sm, cuda = JETPACKS[jetpack]
    fake = install(monkeypatch, driver_of(version, sm))
    root = make_package(tmp_path / "model", tiny_model(head_dim=64)).root
    monkeypatch.setenv("TURBOJET_KERNELS", str(write_cubins(tmp_path / "kernels", sm, cuda)))
    with Engine.open(root, EngineOptions(backend="cuda")) as engine:
        outputs = list(engine.generate([3, 4, 5], GenerationParams(max_tokens=6, ignore_eos=True)))
    assert sum(len(output.token_ids) for output in outputs) == 6
    assert "cuGraphLaunch" in fake.calls
    assert set(fake.calls) <= set(RELEASES)
    assert not any(launched.is_programmatic for launched in fake.launches if sm < 90)


def test_a_function_that_the_driver_lacks_is_named_where_it_is_needed(monkeypatch) -> None:
    install(monkeypatch, driver_of(11040, 87))
    with CudaDriver() as driver:
        function = Module(driver, b"cubin").function("rms_norm_f16")
        shape = LaunchShape((1, 1, 1), 32, is_programmatic=True)
        with pytest.raises(
            DeviceError, match="the CUDA driver has no cuLaunchKernelEx; update JetPack"
        ):
            Launch(driver, function, shape, ()).enqueue(driver.new_stream())
