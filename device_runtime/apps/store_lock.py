"""One writer at a time: a lock that the kernel takes back from a process that dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from device_runtime.errors import DeviceError


@contextmanager
def exclusive(path: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock for as long as the block runs; wait for whoever holds it now.

    Args:
        path: the lock's file, made where it does not exist; it holds the owner's process id.
        tell: hears a sentence before a wait.

    Raises:
        DeviceError: the file cannot be made or locked.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise DeviceError(
            f"cannot open the lock {path}: {error.strerror}; is {path.parent} yours, and not "
            "read-only or full"
        ) from error
    try:
        _lock(descriptor, path, tell)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode("ascii"), 0)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path, tell: Callable[[str], None]) -> None:
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 20, 0).decode("ascii", "replace") or "unknown"
            tell(f"waiting for another turbojet that changes {path.parent} (process {owner})")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        raise DeviceError(
            f"cannot lock {path}: {error.strerror}; choose a data folder on a local disk"
        ) from error
