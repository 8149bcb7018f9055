"""The driver: errors as sentences, a context that is always left, pycuda where it is there."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from fake_cuda import FakeCuda, install
from tiny_package import make_package

from device_runtime.backends.cuda.driver import PycudaDriver, open_driver
from device_runtime.engine.engine import Engine
from device_runtime.engine.options import EngineOptions
from device_runtime.errors import DeviceError, OutOfMemoryError
from device_runtime.kernels import libcuda
from device_runtime.kernels.libcuda import NoDeviceError


class FakePycuda:
    """What the driver uses of pycuda.driver, in the order in which it uses it."""

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    def __init__(self) -> None:
        self.log: list[str] = []
        self.host_alloc_flags = SimpleNamespace(PORTABLE=1, DEVICEMAP=2)
        self.is_full = False

    def init(self) -> None:
        self.log.append("init")

    def Device(self, number: int) -> FakePycuda:
        self.log.append(f"device {number}")
        return self

    def retain_primary_context(self) -> FakePycuda:
        return self

    def push(self) -> None:
        self.log.append("push")

    def pop(self) -> None:
        self.log.append("pop")

    def detach(self) -> None:
        self.log.append("detach")

    def mem_alloc(self, size: int) -> FakeAllocation:
        if self.is_full:
            raise self.MemoryError("cuMemAlloc failed: out of memory")
        return FakeAllocation(self.log, size)

    def pagelocked_empty(self, size: int, dtype: type, mem_flags: int) -> np.ndarray:
        if self.is_full:
            raise self.MemoryError("cuMemHostAlloc failed: out of memory")
        assert mem_flags == 3
        return FakePinned(size).view_of()

    def Stream(self, flags: int) -> FakeStream:
        assert flags == 1
        return FakeStream(self.log)


class FakeStream:
    handle = 77

    def __init__(self, log: list[str]) -> None:
        self._log = log

    def __del__(self) -> None:
        self._log.append("stream destroyed")


class FakeAllocation:
    def __init__(self, log: list[str], size: int) -> None:
        self._log, self._address = log, 4096 * size

    def __del__(self) -> None:
        self._log.append("allocation destroyed")

    def __int__(self) -> int:
        return self._address

    def free(self) -> None:
        self._log.append("free")


class FakePinned(np.ndarray):
    def __new__(cls, size: int) -> FakePinned:
        return np.empty(size, np.uint8).view(cls)

    def view_of(self) -> np.ndarray:
        return self[:]

    def get_device_pointer(self) -> int:
        return 1234

    def free(self) -> None:
        raise FakePycuda.Error("cuMemFreeHost failed: context is destroyed")


def test_no_driver_is_a_sentence(monkeypatch) -> None:
    monkeypatch.setattr(libcuda.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(DeviceError, match=r"no CUDA driver was found .*reference backend"):
        open_driver()


def test_a_machine_without_a_gpu_takes_the_reference_in_silence(monkeypatch, tmp_path) -> None:
    root = make_package(tmp_path / "tiny").root
    install(monkeypatch, FakeCuda(failing={"cuInit": 100}))
    monkeypatch.setattr(libcuda, "_BOARD_DEVICE", str(tmp_path / "nvmap"))
    with Engine.open(root) as engine:
        assert (engine.backend_name, engine.plan.notes) == ("reference", ())
    with pytest.raises(NoDeviceError, match=r"cuInit failed: some failure \(CUDA error 100\)$"):
        Engine.open(root, EngineOptions(backend="cuda"))


@pytest.mark.parametrize(
    ("code", "is_mine", "reason"),
    [
        (100, True, "cuInit failed: some failure (CUDA error 100)"),
        (801, True, "cuInit failed: some failure (CUDA error 801)"),
        (
            801,
            False,
            "cuInit failed: some failure (CUDA error 801); this user may not open {device}: "
            "`sudo usermod -aG video,render $USER`, then log in again",
        ),
    ],
)
def test_a_board_says_why_its_gpu_is_not_used(
    monkeypatch, tmp_path, code: int, is_mine: bool, reason: str
) -> None:
    root = make_package(tmp_path / "tiny").root
    install(monkeypatch, FakeCuda(failing={"cuInit": code}))
    device = tmp_path / "nvmap"
    device.touch()
    monkeypatch.setattr(libcuda, "_BOARD_DEVICE", str(device))
    monkeypatch.setattr("os.access", lambda path, mode: is_mine)  # root may open everything
    reason = reason.format(device=device)
    with Engine.open(root) as engine:
        assert engine.plan.notes == (f"the GPU is not used: {reason}",)
    with pytest.raises(DeviceError, match=f"^{re.escape(reason)}$"):
        Engine.open(root, EngineOptions(backend="cuda"))


def test_a_container_without_the_boards_devices_says_so(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(libcuda.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    monkeypatch.setattr(libcuda, "_BOARD_DEVICE", str(tmp_path / "nvmap"))
    family = tmp_path / "family"
    monkeypatch.setattr(libcuda, "_SOC_FAMILY", str(family))
    family.write_text("Tegra\n")
    with pytest.raises(
        DeviceError, match=r"no CUDA driver .*a Jetson without .*nvmap: a container needs `--runt"
    ) as caught:
        open_driver()
    assert not isinstance(caught.value, NoDeviceError)
    family.write_text("Snapdragon\n")
    with pytest.raises(NoDeviceError, match="no CUDA driver was found"):
        open_driver()


def test_a_failing_call_names_the_call_and_cudas_reason(monkeypatch) -> None:
    install(monkeypatch, FakeCuda(failing={"cuCtxSynchronize": 700}))
    with (
        open_driver() as driver,
        pytest.raises(
            DeviceError, match=r"cuCtxSynchronize failed: some failure \(CUDA error 700\)"
        ),
    ):
        driver.synchronize()


def test_memory_that_ran_out_has_a_class_of_its_own(monkeypatch) -> None:
    install(monkeypatch, FakeCuda(capacity=100))
    with open_driver() as driver, pytest.raises(OutOfMemoryError, match="cuMemAlloc_v2 failed"):
        driver.allocate(1000)


def test_the_context_is_left_also_after_an_exception(monkeypatch) -> None:
    fake = install(monkeypatch)
    with pytest.raises(ValueError, match="on purpose"), open_driver():
        assert fake.contexts == 1
        raise ValueError("on purpose")
    assert fake.contexts == 0
    assert fake.calls[-2:] == ["cuCtxPopCurrent_v2", "cuDevicePrimaryCtxRelease_v2"]


def test_closing_twice_releases_once(monkeypatch) -> None:
    fake = install(monkeypatch)
    driver = open_driver()
    driver.close()
    driver.close()
    assert fake.contexts == 0
    assert fake.calls.count("cuDevicePrimaryCtxRelease_v2") == 1


def test_a_driver_that_nobody_closed_closes_at_exit(monkeypatch) -> None:
    registered = []
    monkeypatch.setattr("atexit.register", registered.append)
    fake = install(monkeypatch)
    driver = open_driver()
    registered[0]()
    assert fake.contexts == 0
    driver.close()


def test_the_driver_says_which_cuda_it_speaks(monkeypatch) -> None:
    install(monkeypatch, FakeCuda(version=12060))
    with open_driver() as driver:
        assert driver.version == (12, 6)
        assert driver.sm == 90
        assert driver.name == "libcuda"


def test_pinned_memory_is_zero_and_writable(monkeypatch) -> None:
    fake = install(monkeypatch)
    with open_driver() as driver:
        memory = driver.allocate_pinned(100)
        assert memory.bytes.shape == (100,)
        assert not memory.bytes.any()
        memory.bytes[3] = 9
        assert fake.pinned[memory.address].raw[3] == 9
        driver.free_pinned(memory)
    assert not fake.pinned


def test_rows_are_copied_with_their_pitch(monkeypatch) -> None:
    install(monkeypatch)
    with open_driver() as driver:
        stream = driver.new_stream()
        address = driver.allocate(64)
        pinned = driver.allocate_pinned(12)
        pinned.bytes[:] = np.arange(12)
        driver.fill(address, 0xFFFFFFFF, 16, stream)
        driver.copy_rows(address + 2, 10, pinned.address, row_bytes=4, num_rows=3, stream=stream)
        got = np.empty(64, np.uint8)
        driver.copy_to_host(got.ctypes.data, address, 64)
        want = np.full(64, 255, np.uint8)
        for row in range(3):
            want[2 + 10 * row : 6 + 10 * row] = np.arange(4 * row, 4 * row + 4)
        assert np.array_equal(got, want)


def test_a_stream_that_failed_is_told(monkeypatch) -> None:
    fake = install(monkeypatch)
    with open_driver() as driver:
        stream = driver.new_stream()
        assert driver.check(stream)
        fake.failing["cuStreamQuery"] = 600
        assert not driver.check(stream)
        fake.failing |= {"cuStreamQuery": 719, "cuStreamSynchronize": 719}
        with pytest.raises(DeviceError, match="cuStreamSynchronize failed"):
            driver.check(stream)


def test_pycuda_owns_context_memory_and_streams_where_it_is_there(monkeypatch) -> None:
    fake = install(monkeypatch)
    pycuda = FakePycuda()
    driver = PycudaDriver(pycuda)
    assert driver.name == "pycuda"
    address = driver.allocate(10)
    assert address == 40960
    driver.free(address)
    stream = driver.new_stream()
    assert stream.pointer.value == 77
    stream.close()
    forgotten = driver.new_stream()
    assert "cuMemAlloc_v2" not in fake.calls
    driver.close()
    driver.close()
    forgotten.close()
    log = ["init", "device 0", "push", "free", "allocation destroyed", "stream destroyed"]
    assert pycuda.log == [*log, "stream destroyed", "pop", "detach"]
    assert fake.contexts == 0


def test_of_a_lost_device_pycuda_destroys_nothing(monkeypatch) -> None:
    fake = install(monkeypatch)
    pycuda = FakePycuda()
    driver = PycudaDriver(pycuda)
    address, pinned, stream = driver.allocate(10), driver.allocate_pinned(10), driver.new_stream()
    driver.new_stream()  # which nobody closes
    driver.allocate(11)
    fake.failing["cuStreamSynchronize"] = 700
    with pytest.raises(DeviceError, match="start again"):
        stream.synchronize()
    driver.free(address)
    driver.free_pinned(pinned)
    stream.close()
    driver.close()
    assert pycuda.log == ["init", "device 0", "push", "pop", "detach"]
    assert fake.contexts == 0


def test_pycudas_errors_become_ours(monkeypatch) -> None:
    install(monkeypatch)
    pycuda = FakePycuda()
    with PycudaDriver(pycuda) as driver:
        pycuda.is_full = True
        with pytest.raises(OutOfMemoryError, match="mem_alloc failed: cuMemAlloc failed"):
            driver.allocate(10)
        with pytest.raises(OutOfMemoryError, match="pagelocked_empty failed"):
            driver.allocate_pinned(10)
        pycuda.is_full = False
        memory = driver.allocate_pinned(10)
        with pytest.raises(DeviceError, match="free of pinned memory failed: cuMemFreeHost failed"):
            driver.free_pinned(memory)


def test_pycuda_that_cannot_open_leaves_nothing(monkeypatch) -> None:
    fake = install(monkeypatch)
    pycuda = FakePycuda()

    def refuse() -> None:
        raise pycuda.Error("cuInit failed: no device")

    monkeypatch.setattr(pycuda, "init", refuse)
    with pytest.raises(DeviceError, match="pycuda cannot open device 0: cuInit failed"):
        PycudaDriver(pycuda)
    assert fake.contexts == 0
