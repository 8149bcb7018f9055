"""Weight files to GPU memory through two pinned buffers, read by several threads at once.

Host memory never holds more than the two buffers of them, and what was read is taken out of the
page cache, which on a board is the same memory (jetson facts D.1).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from device_runtime.backends.cuda.bf16_weights import to_half
from device_runtime.backends.cuda.driver import CudaDriver, PinnedMemory
from device_runtime.backends.cuda.sizes import STAGING_BYTES
from device_runtime.backends.cuda.staging import Staging, StagingBuffer
from device_runtime.backends.cuda.weights import Piece
from device_runtime.errors import PackageError
from device_runtime.kernels.libcuda import Stream
from device_runtime.package_format.files import check_file
from device_runtime.package_format.tensors import BF16_BITS

READ_BYTES = 2 << 20
"""What one thread reads at a time."""
NUM_READERS = 8


@dataclass(frozen=True)
class Part:
    """Rows of a piece that fit into a staging buffer.

    Attributes:
        piece: what they belong to.
        first_byte: in the file.
        num_bytes: whole rows, or any bytes of a piece that has one row.
        staged: place in the staging buffer.
    """

    piece: Piece
    first_byte: int
    num_bytes: int
    staged: int


def plan_fills(pieces: Iterable[Piece], staging_bytes: int = STAGING_BYTES) -> Iterator[list[Part]]:
    """Yield what each fill of a staging buffer holds, in order."""
    parts: list[Part] = []
    used = 0
    for piece in pieces:
        done = 0
        while done < piece.spec.size_bytes:
            room = staging_bytes - used
            left = piece.spec.size_bytes - done
            size = min(room, left)
            if piece.num_rows > 1:
                size = size // piece.row_bytes * piece.row_bytes
            if size == 0:
                yield parts
                parts, used = [], 0
                continue
            parts.append(Part(piece, done, size, used))
            # Reads and copies start at multiples of 64 bytes.
            used = min(staging_bytes, -(-(used + size) // 64) * 64)
            done += size
    if parts:
        yield parts


def load_weights(
    driver: CudaDriver,
    stream: Stream,
    root: Path,
    pieces: tuple[Piece, ...],
    places: dict[str, int],
) -> None:
    """Copy weight files to their places; returns when they are there.

    Args:
        driver: with a current context.
        stream: for the copies.
        root: of the package.
        pieces: of `weight_layout`.
        places: address of each tensor.

    Raises:
        PackageError: a file is missing, was changed or cannot be read.
        DeviceError: a copy failed, or a bf16 value is too large for fp16.
    """
    with ExitStack() as stack:
        staging = stack.enter_context(Staging(driver, stream, STAGING_BYTES))
        files = stack.enter_context(_Files(root))
        readers = stack.enter_context(ThreadPoolExecutor(NUM_READERS))  # ends before files close
        forgotten: list[Future[None]] = []
        unsent: deque[tuple[StagingBuffer, list[Part], list[Future[None]]]] = deque()

        def send() -> None:
            buffer, parts, jobs = unsent.popleft()
            for job in jobs:
                job.result()
            for part in parts:
                _copy(driver, stream, buffer.memory, part, places)
            staging.sent(buffer)
            for part in parts:
                if part.first_byte + part.num_bytes == part.piece.spec.size_bytes:
                    forgotten.append(readers.submit(_forget, files.take(part.piece)))

        for parts in plan_fills(pieces):
            buffer = staging.take()
            unsent.append((buffer, parts, _start_reading(readers, files, buffer.memory, parts)))
            if len(unsent) == 2:  # the readers go on with this fill meanwhile
                send()
        while unsent:
            send()
        for job in forgotten:
            job.result()


def drop_from_page_cache(path: Path) -> None:
    """Let the page cache forget a file."""
    _forget(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _forget(descriptor: int) -> None:
    """Let the page cache forget an open file, and close it."""
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _start_reading(
    readers: ThreadPoolExecutor, files: _Files, buffer: PinnedMemory, parts: list[Part]
) -> list[Future[None]]:
    view = memoryview(buffer.bytes)  # type: ignore[arg-type]
    jobs = []
    for part in parts:
        files.open(part.piece)
        for start in range(0, part.num_bytes, READ_BYTES):
            size = min(READ_BYTES, part.num_bytes - start)
            target = view[part.staged + start : part.staged + start + size]
            jobs.append(readers.submit(files.read, part.piece, part.first_byte + start, target))
    return jobs


def _copy(
    driver: CudaDriver, stream: Stream, buffer: PinnedMemory, part: Part, places: dict[str, int]
) -> None:
    piece = part.piece
    source = buffer.address + part.staged
    base = places[piece.tensor] + piece.offset
    if piece.num_rows == 1:
        driver.copy_to_device(base + part.first_byte, source, part.num_bytes, stream)
        return
    first_row = part.first_byte // piece.row_bytes
    driver.copy_rows(
        base + first_row * piece.pitch,
        piece.pitch,
        source,
        row_bytes=piece.row_bytes,
        num_rows=part.num_bytes // piece.row_bytes,
        stream=stream,
    )


class _Files:
    """Open weight files; those that nobody took are closed at the end."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[str, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *details: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def open(self, piece: Piece) -> int:
        """Return the descriptor of a piece's file."""
        path = piece.spec.path
        if path not in self._open:
            check_file(self._root, path, piece.spec.size_bytes)
            try:
                self._open[path] = os.open(self._root / path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise PackageError(f"{path} cannot be read: {error}") from error
        return self._open[path]

    def read(self, piece: Piece, first_byte: int, target: memoryview) -> None:
        """Read bytes of a file, bf16 ones as fp16; any thread."""
        descriptor = self._open[piece.spec.path]
        done = 0
        try:
            while done < len(target):
                count = os.preadv(descriptor, [target[done:]], first_byte + done)
                if count == 0:
                    raise PackageError(
                        f"{piece.spec.path} ends at byte {first_byte + done}, expected "
                        f"{piece.spec.size_bytes}; verify the package"
                    )
                done += count
        except OSError as error:
            raise PackageError(f"{piece.spec.path} cannot be read: {error}") from error
        if piece.spec.dtype == BF16_BITS:
            bits = np.frombuffer(target, np.uint16)
            bits[:] = to_half(bits, piece.spec.name).view(np.uint16)

    def take(self, piece: Piece) -> int:
        """Return the descriptor of a piece's file, which is the caller's from now on."""
        return self._open.pop(piece.spec.path)
