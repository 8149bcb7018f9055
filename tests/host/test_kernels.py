"""Compiling CUDA sources with NVRTC: what is built for whom, and what is said when it fails."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from device_runtime.errors import DeviceError, InternalError, PackageError, UsageError
from device_runtime.kernels.cubins import SOURCES, has_group_size
from device_runtime.package_format.boards import BOARDS
from host_tools import kernels
from host_tools.cubin_resources import cubin_resources
from host_tools.kernels import (
    BUILDS,
    Build,
    KernelCache,
    Unit,
    builds_for,
    builds_for_boards,
    cached_unit,
    units_of,
)
from host_tools.nvrtc import WHEELS, Nvrtc, extract_libraries, fetch_compiler

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = ROOT / ".cache" / "nvrtc"
needs_compilers = pytest.mark.skipif(
    not all((COMPILERS / release).is_dir() for release in WHEELS),
    reason="scripts/fetch-compilers gets the compilers; scripts/test runs it",
)
ORIN = Build(87, "12.6")


def test_an_unknown_sm_is_refused() -> None:
    with pytest.raises(UsageError, match=r"sm 86 has no build, there are \[72, 87, 90, 110\]"):
        builds_for([87, 86])
    assert {build.cuda for build in builds_for([87])} == {"11.8", "12.6", "13.0"}


def test_a_board_gets_the_builds_of_every_jetpack_that_runs_on_it() -> None:
    def names(*boards: str) -> list[str]:
        return [build.name for build in builds_for_boards(BOARDS[board] for board in boards)]

    orin = ["sm_87 by CUDA 11.8", "sm_87 by CUDA 12.6", "sm_87 by CUDA 13.0"]
    assert names("orin-nano-8gb", "agx-orin-64gb") == orin
    assert names("thor") == ["sm_110 by CUDA 13.0"]
    assert names("xavier-nx-8gb") == ["sm_72 by CUDA 11.8, plain"]
    assert names(*BOARDS) == ["sm_72 by CUDA 11.8, plain", *orin, "sm_110 by CUDA 13.0"]


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TURBOJET_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert KernelCache.default().compilers == Path("/caches/turbojet/nvrtc")
    monkeypatch.setenv("TURBOJET_CACHE_DIR", "/mine")
    assert KernelCache.default() == KernelCache(Path("/mine/nvrtc"), Path("/mine/cubins"))


@needs_compilers
def test_a_cubin_is_compiled_once_for_the_same_sources_and_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = KernelCache(COMPILERS, tmp_path / "cubins")
    unit = Unit("embedding", ORIN, 0)
    cubin = cached_unit(unit, cache)
    assert cubin.startswith(b"\x7fELF")
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "compile_unit", None)
        assert cached_unit(unit, cache) == cubin
    text = dict(kernels.source_files("embedding"))
    text["embedding.cu"] += "// changed\n"
    monkeypatch.setattr(kernels, "source_files", lambda source: text)
    assert cached_unit(unit, cache).startswith(b"\x7fELF")
    assert len(list((tmp_path / "cubins").iterdir())) == 2


def test_every_source_is_built_for_every_group_size_it_depends_on() -> None:
    units = units_of((ORIN,))
    assert {unit.source for unit in units} == set(SOURCES)
    for source in SOURCES:
        sizes = {unit.group_size for unit in units if unit.source == source}
        assert sizes == ({128, 64, 32} if has_group_size(source) else {0})
    assert Unit("w4a16_gemv_1", BUILDS[0], 64).flags == (
        "-std=c++17",
        "-arch=sm_72",
        "-DTURBOJET_PLAIN=1",
        "-DTURBOJET_GROUP_SIZE=64",
    )
    halves = Unit("w4a16_gemv_8", Build(110, "13.0"), 64).flags
    assert halves[-2:] == ("-DTURBOJET_GROUP_SIZE=64", "-DTURBOJET_GEMV_PARTS=2")


def test_the_hash_of_a_source_covers_its_headers() -> None:
    files = kernels.source_files("w4a16_gemv_1")
    assert {"w4a16_gemv_1.cu", "w4a16_gemv.cuh", "w4a16.cuh", "common.cuh", "ptx.cuh"} <= set(files)
    assert kernels.sources_sha256("w4a16_gemv_1") != kernels.sources_sha256("w4a16_gemv_4")


@needs_compilers
def test_a_source_that_does_not_compile_comes_with_the_log() -> None:
    compiler = Nvrtc(COMPILERS / "12.6")
    assert compiler.release == (12, 6)
    with pytest.raises(
        InternalError, match=r"(?s)bad.cu does not compile with NVRTC 12.6.*nonsense"
    ):
        compiler.compile("bad.cu", "nonsense", {}, ("-arch=sm_87",))


def test_a_folder_without_a_compiler_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="has no NVRTC; delete it"):
        Nvrtc(tmp_path)


def test_a_compiler_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    for name in ("libnvrtc.so.12", "libnvrtc-builtins.so.12.6"):
        (tmp_path / name).write_bytes(b"no library")
    with pytest.raises(DeviceError, match="cannot be loaded"):
        Nvrtc(tmp_path)


def test_a_wheel_that_pip_cannot_fetch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WHEELS, "12.6", "there is no such package==1")
    with pytest.raises(DeviceError, match="pip could not fetch there is no such package==1"):
        fetch_compiler("12.6", tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_libraries_come_out_of_a_wheel_and_nothing_else(tmp_path: Path) -> None:
    wheel = tmp_path / "compiler.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nvidia/cuda_nvrtc/lib/libnvrtc.so.12", b"one")
        archive.writestr("nvidia/cuda_nvrtc/lib/libnvrtc.alt.so.12", b"other")
        archive.writestr("../../libnvrtc-builtins.so.12.6", b"two")
        archive.writestr("nvidia/cuda_nvrtc/include/nvrtc.h", b"three")
    folder = tmp_path / "libraries"
    folder.mkdir()
    extract_libraries(wheel, folder)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert found == {"libnvrtc.so.12": b"one", "libnvrtc-builtins.so.12.6": b"two"}


def test_a_wheel_without_libraries_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "empty.whl"
    with zipfile.ZipFile(wheel, "w"):
        pass
    with pytest.raises(PackageError, match=r"empty\.whl has no NVRTC libraries"):
        extract_libraries(wheel, tmp_path)


def test_a_damaged_cubin_is_refused() -> None:
    with pytest.raises(InternalError, match="a cubin of 4 bytes cannot be read: it is no"):
        cubin_resources(b"text")
    with pytest.raises(InternalError, match="a cubin of 20 bytes cannot be read"):
        cubin_resources(b"\x7fELF\x02" + bytes(15))
