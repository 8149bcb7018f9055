"""Gives memory that was freed back to the system between layers."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    # Only glibc has it; musl gives memory back by itself.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if trim is None else functools.partial(trim)


def return_free_memory() -> None:
    """Ask glibc for the holes that a layer's large temporaries left between small results.

    Without it the heap of a calibration grows by the temporaries of every layer: measured 1.5 GB
    instead of 0.7 GB on a 135M model.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
