"""Which backend runs, by name; each is imported only when it is chosen."""

from __future__ import annotations

from device_runtime.backends.base import Backend
from device_runtime.errors import DeviceError, UsageError
from device_runtime.kernels.libcuda import NoDeviceError
from device_runtime.package_format.package import Package

BACKEND_NAMES = ("auto", "reference", "cuda")


def create_backend(name: str, package: Package) -> Backend:
    """Return a backend with nothing loaded.

    Args:
        name: one of `BACKEND_NAMES`; "auto" takes cuda where there is a GPU with kernels that fit
            the package, else reference; where there is a GPU, the plan's notes then say why not.
        package: what it shall run.

    Raises:
        UsageError: there is no backend of this name.
        DeviceError: it cannot run here.
    """
    if name not in BACKEND_NAMES:
        raise UsageError(f"backend is {name!r}, expected one of {', '.join(BACKEND_NAMES)}")
    from device_runtime.backends.reference.backend import ReferenceBackend

    if name == "reference":
        return ReferenceBackend()
    from device_runtime.backends.cuda.backend import CudaBackend

    try:
        backend = CudaBackend()
    except DeviceError as error:
        if name == "cuda":
            raise
        if isinstance(error, NoDeviceError):  # which is nothing to speak of
            return ReferenceBackend()
        return ReferenceBackend(note=f"the GPU is not used: {error}")
    try:
        backend.check(package)
    except DeviceError as error:
        backend.close()
        if name == "cuda":
            raise
        return ReferenceBackend(note=f"the GPU is not used: {error}")
    except BaseException:
        backend.close()
        raise
    return backend
