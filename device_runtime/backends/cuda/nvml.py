"""What the driver's management library says of the first device.

Boards have none (JetPack 5), or one that lacks functions or refuses them (JetPack 6 and later).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_CLOCK_SM = 1  # NVML_CLOCK_SM


def device_used_bytes() -> int | None:
    """Return what all processes use of the device; None where nothing says."""
    with _device() as (library, handle):
        memory = (ctypes.c_ulonglong * 3)()  # nvmlMemory_t: total, free, used
        if not _ask(library, "nvmlDeviceGetMemoryInfo", handle, memory):
            return None
        return int(memory[2])


def sm_clock_mhz() -> int:
    """Return the SM clock of this moment; 0 where nothing says."""
    with _device() as (library, handle):
        clock = ctypes.c_uint()
        kind = ctypes.c_uint(_CLOCK_SM)
        if not _ask(library, "nvmlDeviceGetClockInfo", handle, kind, ctypes.byref(clock)):
            return 0
        return int(clock.value)


def driver_version() -> str:
    """Return the driver's version, such as 580.159; "" where nothing says."""
    with _device() as (library, _):
        text = ctypes.create_string_buffer(96)
        if not _ask(library, "nvmlSystemGetDriverVersion", text, ctypes.c_uint(len(text))):
            return ""
        return text.value.decode()


@contextmanager
def _device() -> Iterator[tuple[ctypes.CDLL | None, ctypes.c_void_p]]:
    handle = ctypes.c_void_p()
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        yield None, handle
        return
    if not _ask(library, "nvmlInit_v2"):
        yield None, handle
        return
    try:
        first = ctypes.c_uint(0), ctypes.byref(handle)
        is_there = _ask(library, "nvmlDeviceGetHandleByIndex_v2", *first)
        yield (library if is_there else None), handle
    finally:
        _ask(library, "nvmlShutdown")


def _ask(library: ctypes.CDLL | None, function: str, *arguments: object) -> bool:
    """Call a function; return whether it is there and gave an answer."""
    action = getattr(library, function, None)
    return action is not None and action(*arguments) == 0
