"""`turbojet selftest`: kernels that are right pass on the emulator, wrong ones are told."""

from __future__ import annotations

import json

import numpy as np
import pytest
from emulator import emulator
from fake_cuda import install, write_cubins

from device_runtime import cli
from device_runtime.backends.cuda import selftest_attention, selftest_linear, selftest_sampling
from device_runtime.backends.cuda.array_launch import ArrayLaunch
from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.kernel_set import KernelSet
from device_runtime.backends.cuda.selftest_linear import Check, relative_error
from device_runtime.errors import DeviceError
from device_runtime.kernels.cubins import SOURCES
from device_runtime.kernels.table import KERNELS

needs_compiler = pytest.mark.skipif(
    not emulator.has_compiler(), reason="g++ builds the kernels for the CPU; CI has it"
)


class EmulatedRun:
    """Stands for `ArrayLaunch`; `spoil` changes what a kernel leaves in the array at a place."""

    num_sms = 2
    max_shared_bytes = 227 << 10

    def __init__(self, spoil: str = "", place: int = 0) -> None:
        self._spoil = spoil
        self._place = place

    def __call__(self, name, grid, arguments, shared_bytes=0) -> None:
        emulator.launch(name, grid, list(arguments), shared_bytes)
        if name == self._spoil:
            arguments[self._place].reshape(-1)[:1] += 1


@needs_compiler
@pytest.mark.parametrize(
    "checks",
    [
        selftest_sampling.check_embedding,
        selftest_sampling.check_sampling,
        selftest_linear.check_norm_and_head,
    ],
)
def test_kernels_that_are_right_pass(checks) -> None:
    found = list(checks(EmulatedRun(), np.random.default_rng(0)))
    assert found
    assert [check.name for check in found if not check.is_passed] == []


@needs_compiler
def test_one_wrong_number_fails_the_kernel_that_made_it() -> None:
    run = EmulatedRun(spoil="rms_norm_f16")
    found = list(selftest_linear.check_norm_and_head(run, np.random.default_rng(0)))
    assert [check.name for check in found if not check.is_passed] == ["rms_norm_f16"]


@needs_compiler
def test_attention_that_leaves_something_to_the_next_launch_fails() -> None:
    run = EmulatedRun(spoil="decode_attention_half", place=2)
    checks = selftest_attention.check_attention(run, np.random.default_rng(0))
    found = next(check for check in checks if check.name == "decode_attention_half")
    assert found.error == 1.0 and not found.is_passed


def test_every_kernel_runs(tmp_path, monkeypatch) -> None:
    launched = install(monkeypatch).launches
    monkeypatch.setenv("TURBOJET_KERNELS", str(write_cubins(tmp_path, group_size=32)))
    cli.main(["selftest"])
    assert {launch.name for launch in launched} == {row.name for row in KERNELS}


def test_an_error_that_is_no_number_does_not_pass() -> None:
    assert not Check("a kernel", float("nan"), 1.0).is_passed
    assert Check("a kernel", 0.0, 0.0).is_passed
    assert relative_error(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == pytest.approx(0.1)


def test_the_command_fails_where_kernels_do_nothing(tmp_path, monkeypatch, capsys) -> None:
    # The fake device launches nothing, so every comparison finds the poison it started with.
    install(monkeypatch)
    monkeypatch.setenv("TURBOJET_KERNELS", str(write_cubins(tmp_path, group_size=64)))
    assert cli.main(["selftest", "--json"]) == DeviceError.exit_code
    facts = json.loads(capsys.readouterr().out)
    assert facts["device"] == "Fake GPU, sm_90"
    names = " ".join(row["name"] for row in facts["checks"])
    for word in ("embed", "rms_norm", "head_f16", "head_int8", "f16_gemm_8 add", "group 64"):
        assert word in names
    assert not any(row["is_passed"] for row in facts["checks"])
    assert cli.main(["selftest"]) == DeviceError.exit_code
    out = capsys.readouterr().out
    assert "FAIL  rms_norm_f16" in out
    assert f"0 of {len(facts['checks'])} ok on Fake GPU, sm_90" in out


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_came_before_a_lost_device_is_told(tmp_path, monkeypatch, capsys, options) -> None:
    def lose_device(*_args):
        yield Check("the first kernel", 0.0, 1.0)
        raise DeviceError("the device is lost")

    install(monkeypatch)
    monkeypatch.setattr("device_runtime.backends.cuda.selftest.run_checks", lose_device)
    monkeypatch.setenv("TURBOJET_KERNELS", str(tmp_path))
    assert cli.main(["selftest", *options]) == DeviceError.exit_code
    captured = capsys.readouterr()
    assert "ok    the first kernel" in (captured.err if options else captured.out)
    assert captured.err.endswith("turbojet: the device is lost\n")


def test_a_gpu_without_kernels_is_told(tmp_path, monkeypatch, capsys) -> None:
    install(monkeypatch)
    monkeypatch.setenv("TURBOJET_KERNELS", str(tmp_path))
    assert cli.main(["selftest"]) == DeviceError.exit_code
    assert "no kernels for sm_90" in capsys.readouterr().err


def test_a_kernel_that_writes_beside_an_array_is_told(tmp_path, monkeypatch) -> None:
    fake = install(monkeypatch)
    folder = write_cubins(tmp_path)
    files = {source: folder / f"sm_90-cuda13.0.{source}.cubin" for source in ("rms_norm",)}
    assert "rms_norm" in SOURCES

    def spill(launched) -> None:
        address = launched.arguments[0]
        (np.ctypeslib.ctypes.c_uint8 * 1).from_address(address + 64)[0] = 0

    monkeypatch.setattr(fake, "_run", spill)
    with CudaDriver() as driver:
        kernels = KernelSet(driver, files)
        run = ArrayLaunch(driver, kernels, driver.new_stream())
        out = np.zeros(32, np.float16)
        with pytest.raises(DeviceError, match="rms_norm_f16 wrote beside one of its arrays"):
            run("rms_norm_f16", (1, 1, 1), (out, out, out, 32, 1e-5))
        kernels.close()
    assert fake.num_bytes == 0
