"""What every test here needs: a GPU, and cubins for it in the folder TURBOJET_KERNELS."""

from __future__ import annotations

import os

import pytest

from device_runtime.errors import DeviceError


def _missing() -> str:
    from device_runtime.backends.cuda.driver import open_driver

    try:
        open_driver().close()
    except DeviceError as error:
        return str(error)
    if not os.environ.get("TURBOJET_KERNELS"):
        return "TURBOJET_KERNELS names no folder of cubins, scripts/build-kernels makes one"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _missing()
    if reason:
        for item in items:
            if "/gpu/" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=f"runs on a machine with a GPU: {reason}"))
