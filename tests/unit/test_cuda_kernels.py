"""Cubins: which fit a device, what is said when none does, and launches held to the table."""

from __future__ import annotations

import dataclasses
import json

import pytest
from fake_cuda import FakeCuda, install, write_cubins

from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.kernel_set import (
    KernelSet,
    find_cubins,
    kernel_folders,
    to_arguments,
)
from device_runtime.errors import DeviceError, InternalError, PackageError
from device_runtime.kernels import cubins
from device_runtime.kernels.cubins import (
    RECORD,
    Cubin,
    choose_cubins,
    cubin_file,
    interface_of,
    read_record,
    write_record,
)
from device_runtime.kernels.table import kernel


def cubin(sm: int, cuda: str, *, group_size: int = 0, is_plain: bool = False) -> Cubin:
    name = cubin_file("embedding", sm, cuda, group_size, is_plain)
    return Cubin(name, "embedding", sm, cuda, group_size, is_plain, "", "", "", ())


def test_a_record_reads_back(tmp_path) -> None:
    rows = (cubin(72, "11.8", is_plain=True), cubin(87, "12.6", group_size=64))
    write_record(tmp_path, reversed(rows))
    assert read_record(tmp_path) == rows
    assert read_record(tmp_path / "nothing") == ()
    assert rows[1].file == "sm_87-cuda12.6.embedding.g64.cubin"
    assert rows[0].file == "sm_72-cuda11.8-plain.embedding.cubin"


def test_the_latest_release_that_the_driver_takes_is_chosen() -> None:
    cubins = [cubin(87, "11.8"), cubin(87, "13.0"), cubin(87, "12.6"), cubin(72, "11.8")]
    for version, want in (((11, 4), "11.8"), ((12, 2), "12.6"), ((13, 2), "13.0")):
        assert choose_cubins(cubins, 87, version)["embedding", 0].cuda == want
    assert choose_cubins(cubins, 87, (10, 2)) == {}
    assert choose_cubins(cubins, 110, (13, 0)) == {}


def test_the_plain_variant_runs_where_it_is_asked_for_or_nothing_else_can() -> None:
    cubins = [cubin(90, "13.0"), cubin(90, "13.0", is_plain=True), cubin(72, "11.8", is_plain=True)]
    assert not choose_cubins(cubins, 90, (13, 0))["embedding", 0].is_plain
    assert choose_cubins(cubins, 90, (13, 0), is_plain=True)["embedding", 0].is_plain
    assert choose_cubins(cubins, 72, (11, 4))["embedding", 0].is_plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-20], "is damaged"),
        (lambda text: text.replace('"file": "', '"file": "../'), "is not a file beside it"),
        (lambda text: text.replace('"sm": 90', '"sm": "x"'), "an sm or group_size that is no"),
        (lambda text: text.replace('"cuda": "13.0"', '"cuda": "new"'), "is damaged"),
        (lambda text: text.replace('"sm": 90', '"smx": 90'), "a row has the keys"),
        (lambda text: text.replace('"format_version": 2', '"format_version": 3'), "has format 3"),
        (lambda text: text + " " * (1 << 20), "more than 1048576 bytes"),
        (lambda text: text.replace('"interface"', '"inter"'), "a row has the keys"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, change, message) -> None:
    write_record(tmp_path, [cubin(90, "13.0")])
    path = tmp_path / RECORD
    path.write_text(change(path.read_text()))
    with pytest.raises(PackageError, match=message):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("is_integrated", "remedy"),
    [
        (1, "pack for this board, set TURBOJET_KERNELS to a folder of them or use"),
        (
            0,
            "packages hold those of Jetsons, so set TURBOJET_KERNELS to a folder that "
            "`turbojet-host kernels --sm 90` made, if it can, or use",
        ),
    ],
)
def test_where_no_cubin_fits_the_message_says_what_there_is(
    tmp_path, monkeypatch, is_integrated, remedy
) -> None:
    install(monkeypatch).attributes[18] = is_integrated
    write_cubins(tmp_path, sm=87, cuda="12.6")
    with CudaDriver() as driver:
        with pytest.raises(
            DeviceError,
            match=r"no kernels for sm_90 and a driver of CUDA 13.0 in .*missing embedding; "
            rf"there are sm_87 by CUDA 12.6\); {remedy} the reference backend",
        ):
            find_cubins((tmp_path,), ("embedding",), 0, driver)
        with pytest.raises(DeviceError, match="there are none"):
            find_cubins((tmp_path / "nothing",), ("embedding",), 0, driver)


def test_another_group_size_is_missing(tmp_path, monkeypatch) -> None:
    install(monkeypatch)
    write_cubins(tmp_path, group_size=128)
    with CudaDriver() as driver:
        files = find_cubins((tmp_path,), ("w4a16_gemv_1", "embedding"), 128, driver)
        assert files["w4a16_gemv_1"].name == "sm_90-cuda13.0.w4a16_gemv_1.g128.cubin"
        assert files["embedding"].name == "sm_90-cuda13.0.embedding.cubin"
        with pytest.raises(DeviceError, match="missing w4a16_gemv_1, group size 64"):
            find_cubins((tmp_path,), ("w4a16_gemv_1",), 64, driver)


def test_the_variable_takes_the_place_of_the_packages_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("TURBOJET_KERNELS", raising=False)
    assert kernel_folders(tmp_path)[0] == tmp_path
    monkeypatch.setenv("TURBOJET_KERNELS", "/elsewhere")
    assert [str(folder) for folder in kernel_folders(tmp_path)] == ["/elsewhere"]


def test_launches_have_the_types_and_the_block_of_the_table(tmp_path, monkeypatch) -> None:
    fake = install(monkeypatch)
    files = dict(_files(write_cubins(tmp_path)))
    with CudaDriver() as driver:
        kernels = KernelSet(driver, files)
        stream = driver.new_stream()
        launch = kernels.launch("rms_norm_f16", (3, 1, 1), (11, 12, None, 64, 0.5))
        launch.enqueue(stream)
        launch.resize((5, 2, 1), {3: 128})
        launch.enqueue(stream)
        kernels.close()
    first, second = fake.launches
    assert (first.grid, first.block, first.arguments) == ((3, 1, 1), 256, [11, 12, 0, 64, 0.5])
    assert (second.grid, second.arguments) == ((5, 2, 1), [11, 12, 0, 128, 0.5])
    assert first.is_programmatic


def test_an_old_driver_or_gpu_launches_without_attributes(tmp_path, monkeypatch) -> None:
    fake = install(monkeypatch, FakeCuda(missing={"cuLaunchKernelEx"}))
    files = dict(_files(write_cubins(tmp_path)))
    with CudaDriver() as driver:
        kernels = KernelSet(driver, files)
        kernels.launch("rms_norm_f16", (3, 1, 1), (1, 2, 3, 64, 0.5)).enqueue(driver.new_stream())
    assert not fake.launches[0].is_programmatic


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((1, 2, 3, 4), "rms_norm_f16 takes 5 arguments, 4 are given"),
        ((1, 2, 3, 4, 5), "argument 4 of rms_norm_f16 is 5, expected 'f'"),
        ((1, 2, 3, 1 << 31, 0.5), "argument 3 of rms_norm_f16 is 2147483648, expected 'i'"),
        ((1, 2.5, 3, 4, 0.5), "argument 1 of rms_norm_f16 is 2.5, expected 'P'"),
        ((1, 2, 3, None, 0.5), "argument 3 of rms_norm_f16 is None, expected 'i'"),
    ],
)
def test_arguments_that_do_not_fit_the_table_are_refused(values, message) -> None:
    with pytest.raises(InternalError, match=message):
        to_arguments(kernel("rms_norm_f16"), values)


def test_launches_that_cannot_be_are_refused(tmp_path, monkeypatch) -> None:
    install(monkeypatch)
    files = dict(_files(write_cubins(tmp_path)))
    del files["mark_seen"]
    with CudaDriver() as driver:
        kernels = KernelSet(driver, files)
        with pytest.raises(
            InternalError, match=r"rms_norm_f16 is launched with the grid \(0, 1, 1\)"
        ):
            kernels.launch("rms_norm_f16", (0, 1, 1), (1, 2, 3, 64, 0.5))
        with pytest.raises(
            DeviceError, match="needs 300000 bytes of shared memory, the device gives"
        ):
            kernels.launch("rms_norm_f16", (1, 1, 1), (1, 2, 3, 64, 0.5), shared_bytes=300000)
        with pytest.raises(InternalError, match="mark_seen was not among the kernels"):
            kernels.launch("mark_seen", (1, 1, 1), (1, 2, 3, 4, 5))


def test_kernels_that_cannot_be_loaded_are_told(tmp_path, monkeypatch) -> None:
    fake = install(monkeypatch)
    files = dict(_files(write_cubins(tmp_path)))
    with CudaDriver() as driver:
        fake.failing["cuModuleLoadData"] = 209
        with pytest.raises(DeviceError, match="cuModuleLoadData failed"):
            KernelSet(driver, files)
        del fake.failing["cuModuleLoadData"]
        files["embedding"].unlink()
        with pytest.raises(PackageError, match=r"kernels cannot be read.*install again"):
            KernelSet(driver, files)


def _files(folder):
    rows = json.loads((folder / RECORD).read_text())["cubins"]
    return [(row["source"], folder / row["file"]) for row in rows]


def test_kernels_of_another_release_are_told_from_none(tmp_path, monkeypatch) -> None:
    install(monkeypatch)
    write_cubins(tmp_path)
    rows = [row for row in read_record(tmp_path) if row.source != "w4a16_gemv_paired_1"]
    write_record(tmp_path, rows)
    with (
        CudaDriver() as driver,
        pytest.raises(
            DeviceError,
            match=r"not all kernels for sm_90 .* \(missing w4a16_gemv_paired_1, group size 32; "
            r".*\); they are another turbojet's, so pack again with this one or use the reference",
        ),
    ):
        find_cubins((tmp_path,), ("w4a16_gemv_1", "w4a16_gemv_paired_1"), 32, driver)


@pytest.mark.parametrize("is_first_version", [False, True])
def test_kernels_that_take_other_arguments_do_not_run(
    tmp_path, monkeypatch, is_first_version
) -> None:
    install(monkeypatch)
    write_cubins(tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    for row in record["cubins"]:
        if row["source"] == "embedding":
            row["interface"] = "0" * 16
        if is_first_version:
            del row["interface"]
    if is_first_version:
        record["format_version"] = 1
    (tmp_path / RECORD).write_text(json.dumps(record))
    with CudaDriver() as driver:
        if not is_first_version:
            assert find_cubins((tmp_path,), ("rms_norm",), 0, driver)
        with pytest.raises(DeviceError, match=r"missing embedding.*another turbojet's, so pack ag"):
            find_cubins((tmp_path,), ("embedding", "rms_norm"), 0, driver)


def test_an_interface_is_names_arguments_and_block_sizes(monkeypatch) -> None:
    before = interface_of("rms_norm")
    assert len(before) == 16
    row = kernel("rms_norm_f16")
    for change in ({"arguments": "PPPii"}, {"block": 512}, {"name": "rms_norm_bf16"}):
        monkeypatch.setattr(cubins, "KERNELS", (dataclasses.replace(row, **change),))
        assert interface_of("rms_norm") != before
    monkeypatch.setattr(cubins, "KERNELS", (dataclasses.replace(row, max_registers=1),))
    assert interface_of("rms_norm") == before


def test_two_blocks_that_share_an_sm_have_its_shared_memory(tmp_path, monkeypatch) -> None:
    install(monkeypatch)
    write_cubins(tmp_path)
    asked = []
    with CudaDriver() as driver:
        files = find_cubins((tmp_path,), ("w4a16_gemv_1", "w4a16_gemv_paired_1"), 32, driver)
        kernels = KernelSet(driver, files)
        call = driver.call

        def listen(name: str, *arguments: object) -> None:
            if name == "cuFuncSetAttribute" and arguments[1].value == 9:  # of the carveout
                asked.append(arguments[2].value)
            call(name, *arguments)

        monkeypatch.setattr(driver, "call", listen)
        values = [1, 2, 3, None, 5, 6, 1, 4096, 4096, 16, 1]
        for name in ("w4a16_gemv_add_1", "w4a16_gemv_paired_add_1"):
            kernels.launch(name, (128, 1, 1), values, shared_bytes=80_000)
        kernels.close()
    # 2 x (80,000 + 1,024 of the device's) of 228 KiB
    assert asked == [100, 70]
