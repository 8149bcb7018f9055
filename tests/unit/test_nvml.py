"""The management library: what it says, and nothing where it is missing or refuses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from device_runtime.backends.cuda import nvml


class FakeNvml:
    """Stands for the library object that ctypes makes."""

    def __init__(self, failing: str = "", missing: str = "") -> None:
        self.failing = failing
        self.missing = missing
        self.is_open = False

    def __getattr__(self, name: str):
        if name == self.missing:
            raise AttributeError(name)

        def call(*arguments) -> int:
            if name == self.failing:
                return 3
            return getattr(self, f"do_{name}")(*arguments) or 0

        return call

    def do_nvmlInit_v2(self) -> None:
        self.is_open = True

    def do_nvmlShutdown(self) -> None:
        self.is_open = False

    def do_nvmlDeviceGetHandleByIndex_v2(self, index, handle) -> None:
        assert index.value == 0
        handle._obj.value = 77

    def do_nvmlDeviceGetMemoryInfo(self, handle, memory) -> None:
        memory[:] = (100, 60, 40)

    def do_nvmlDeviceGetClockInfo(self, handle, kind, clock) -> None:
        assert (handle.value, kind.value) == (77, 1)  # NVML_CLOCK_SM
        clock._obj.value = 1980

    def do_nvmlSystemGetDriverVersion(self, text, size) -> None:
        text.value = b"580.159.04"


def install(monkeypatch: pytest.MonkeyPatch, library: FakeNvml | None) -> None:
    def load(name: str) -> FakeNvml:
        if library is None:
            raise OSError(name)
        return library

    types = {name: getattr(nvml.ctypes, name) for name in dir(nvml.ctypes)}
    monkeypatch.setattr(nvml, "ctypes", SimpleNamespace(**(types | {"CDLL": load})))


def test_it_says_memory_clock_and_driver(monkeypatch) -> None:
    library = FakeNvml()
    install(monkeypatch, library)
    found = (nvml.device_used_bytes(), nvml.sm_clock_mhz(), nvml.driver_version())
    assert found == (40, 1980, "580.159.04")
    assert not library.is_open


@pytest.mark.parametrize("failing", [None, "nvmlInit_v2", "nvmlDeviceGetHandleByIndex_v2"])
def test_where_it_cannot_be_asked_nothing_is_said(monkeypatch, failing) -> None:
    install(monkeypatch, None if failing is None else FakeNvml(failing))
    assert (nvml.device_used_bytes(), nvml.sm_clock_mhz(), nvml.driver_version()) == (None, 0, "")


def test_a_question_that_is_refused_has_no_answer(monkeypatch) -> None:
    install(monkeypatch, FakeNvml("nvmlDeviceGetMemoryInfo"))
    assert nvml.device_used_bytes() is None
    install(monkeypatch, FakeNvml("nvmlDeviceGetClockInfo"))
    assert nvml.sm_clock_mhz() == 0
    install(monkeypatch, FakeNvml("nvmlSystemGetDriverVersion"))
    assert nvml.driver_version() == ""


@pytest.mark.parametrize(
    "missing",
    ["nvmlInit_v2", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetMemoryInfo", "nvmlShutdown"],
)
def test_a_library_of_a_board_may_lack_functions(monkeypatch, missing) -> None:
    install(monkeypatch, FakeNvml(missing=missing))
    assert nvml.device_used_bytes() == (40 if missing == "nvmlShutdown" else None)
