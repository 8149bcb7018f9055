"""Which backend runs, by name; each is imported only when it is chosen."""

from __future__ import annotations

from device_runtime.backends.base import Backend
from device_runtime.errors import DeviceError, UsageError

BACKEND_NAMES = ("auto", "reference", "cuda")


def create_backend(name: str) -> Backend:
    """Return a backend with nothing loaded.

    Args:
        name: one of `BACKEND_NAMES`; "auto" takes the fastest that runs here.

    Raises:
        UsageError: there is no backend of this name.
        DeviceError: it cannot run here.
    """
    if name not in BACKEND_NAMES:
        raise UsageError(f"backend is {name!r}, expected one of {', '.join(BACKEND_NAMES)}")
    if name == "cuda":
        raise DeviceError("this turbojet has no cuda backend, use the backend reference")
    from device_runtime.backends.reference.backend import ReferenceBackend

    return ReferenceBackend()
