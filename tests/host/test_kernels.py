"""Compiling the CUDA kernels with NVRTC: registers, stack, names; what is said when it fails."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from device_runtime.errors import DeviceError, InternalError, PackageError, UsageError
from device_runtime.kernels.cubins import SOURCES, choose_cubins, has_group_size, read_record
from device_runtime.kernels.table import KERNELS
from host_tools import kernels
from host_tools.cubin_resources import cubin_resources
from host_tools.kernels import (
    BUILDS,
    Build,
    Unit,
    build_kernels,
    builds_for,
    compile_unit,
    units_of,
)
from host_tools.nvrtc import WHEELS, Nvrtc, extract_libraries, fetch_compiler
from host_tools.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = ROOT / ".cache" / "nvrtc"
needs_compilers = pytest.mark.skipif(
    not all((COMPILERS / release).is_dir() for release in WHEELS),
    reason="scripts/fetch-compilers gets the compilers; scripts/test runs it",
)
ORIN = Build(87, "12.6")
MAX_REGISTERS = {row.name: row.max_registers for row in KERNELS}


def check(unit: Unit) -> None:
    found = cubin_resources(compile_unit(unit, COMPILERS))
    assert set(found) == {row.name for row in KERNELS if row.source == unit.source}
    for name, resources in found.items():
        assert resources.stack_bytes == 0, f"{name} spills on {unit.build.name}"
        assert resources.registers <= MAX_REGISTERS[name], f"{name} on {unit.build.name}"


# One build and one group size a source here; what is left is slow.
QUICK = [unit for unit in units_of((ORIN,)) if unit.group_size in (0, 128)]
REST = [unit for unit in units_of(BUILDS) if unit not in QUICK]


def name_of(unit: Unit) -> str:
    return unit.file.removesuffix(".cubin")


@needs_compilers
@pytest.mark.parametrize("unit", QUICK, ids=name_of)
def test_no_kernel_spills_or_takes_more_registers_than_planned(unit: Unit) -> None:
    check(unit)


@needs_compilers
@pytest.mark.slow
@pytest.mark.parametrize("unit", REST, ids=name_of)
def test_no_kernel_spills_on_any_target(unit: Unit) -> None:
    check(unit)


@needs_compilers
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.name)
def test_every_compiler_builds_its_target(build: Build) -> None:
    check(Unit("embedding", build, 0))


@needs_compilers
def test_a_folder_of_cubins_has_a_record_that_a_device_chooses_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = [Unit("embedding", build, 0) for build in BUILDS if build.sm == 87]
    monkeypatch.setattr(kernels, "units_of", lambda builds: units)
    folder = build_kernels(tmp_path / "kernels", builds_for([87]), COMPILERS, Progress())
    record = read_record(folder)
    assert {cubin.file for cubin in record} == {unit.file for unit in units}
    for cubin in record:
        data = (folder / cubin.file).read_bytes()
        assert hashlib.sha256(data).hexdigest() == cubin.sha256
        assert cubin.sources_sha256 == kernels.sources_sha256("embedding")
        assert "-arch=sm_87" in cubin.flags
    chosen = choose_cubins(record, 87, (12, 2))
    assert chosen["embedding", 0].cuda == "12.6"
    build_kernels(folder, builds_for([87]), COMPILERS, Progress())  # replaces its own
    assert [path.name for path in tmp_path.iterdir()] == ["kernels"]


def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="exists and is no folder of kernels"):
        build_kernels(tmp_path, BUILDS, COMPILERS, Progress())
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_an_unknown_sm_is_refused() -> None:
    with pytest.raises(UsageError, match=r"sm 86 has no build, there are \[72, 87, 90, 110\]"):
        builds_for([87, 86])
    assert {build.cuda for build in builds_for([87])} == {"11.8", "12.6", "13.0"}


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
