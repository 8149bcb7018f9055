"""Gzip members of an archive: ours hold stored blocks and say their size; any other is read too.

Members are stored, not compressed: 4-bit weights shrink by 6 to 8 % at any level, at a thirtieth
of the speed, and a compressor's bytes change with the zlib it was built with. Stored blocks are
the same bytes on every machine.
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO

from device_runtime.errors import PackageError

MEMBER_DATA_BYTES = 4 << 20
"""Bytes of tar stream in each member we write but the last."""

# RFC 1952 section 2.3: magic, deflate, FLG = FEXTRA, no time, XFL 0, OS unknown, then an extra
# field of one subfield "TJ" that holds the sizes of the whole member and of its data.
_HEADER = struct.Struct("<4sIBBH2sHII")
_SIGNATURE = b"\x1f\x8b\x08\x04"
_SUBFIELD_ID = b"TJ"
_SUBFIELD_BYTES = 8
_EXTRA_BYTES = 4 + _SUBFIELD_BYTES
_OS_UNKNOWN = 255
_TRAILER = struct.Struct("<II")
# RFC 1951 section 3.2.4: one byte of block type, then LEN and its complement.
_STORED = struct.Struct("<BHH")
_MAX_STORED_BYTES = 65535

GZIP_MAGIC = b"\x1f\x8b"
_READ_BYTES = 1 << 18
_MAX_OUTPUT_BYTES = 4 << 20
_MAX_TAGGED_DATA_BYTES = 64 << 20
_OTHER_FORMATS = (
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ", "xz"),
    (b"BZh", "bzip2"),
    (b"PK\x03\x04", "zip"),
)


@dataclass(frozen=True)
class _TaggedMember:
    """Sizes that a member of ours says of itself, so that members can be inflated in parallel."""

    member_bytes: int
    data_bytes: int


def stored_member(data: bytes | bytearray | memoryview) -> bytearray:
    """Return ``data`` as one gzip member of stored blocks: the same bytes on every machine.

    Args:
        data: at most 64 MiB.
    """
    num_blocks = max(1, -(-len(data) // _MAX_STORED_BYTES))
    member_bytes = _HEADER.size + num_blocks * _STORED.size + len(data) + _TRAILER.size
    member = bytearray(member_bytes)
    _HEADER.pack_into(
        member,
        0,
        _SIGNATURE,
        0,
        0,
        _OS_UNKNOWN,
        _EXTRA_BYTES,
        _SUBFIELD_ID,
        _SUBFIELD_BYTES,
        member_bytes,
        len(data),
    )
    at = _HEADER.size
    view = memoryview(data)
    for block in range(num_blocks):
        piece = view[block * _MAX_STORED_BYTES : (block + 1) * _MAX_STORED_BYTES]
        is_last = block == num_blocks - 1
        _STORED.pack_into(member, at, is_last, len(piece), len(piece) ^ 0xFFFF)
        at += _STORED.size
        member[at : at + len(piece)] = piece
        at += len(piece)
    _TRAILER.pack_into(member, at, zlib.crc32(view), len(data))
    return member


class GzipReader:
    """Yields the data of a gzip stream member by member; ours are inflated in parallel.

    Reads the stream strictly forward, so it can be a pipe. Use it as a context manager: leaving
    it ends the threads; the stream stays open and belongs to the caller.

    Attributes:
        bytes_read: compressed bytes taken from the stream so far.
    """

    def __init__(self, stream: BinaryIO, num_threads: int) -> None:
        self.bytes_read = 0
        self._stream = stream
        self._num_threads = num_threads
        self._held = b""
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="inflate")

    def __enter__(self) -> GzipReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def chunks(self) -> Iterator[bytes]:
        """Yield the data in order, in pieces of at most 64 MiB.

        Raises:
            PackageError: the stream is not gzip, is cut short, is damaged, or goes on after its
                last member with something else.
        """
        pending: deque[Future[list[bytes]]] = deque()
        offset = 0
        while self._peek(_HEADER.size):
            tagged = _parse_tagged(self._held)
            if tagged is None:
                while pending:
                    yield from pending.popleft().result()
                self._check_signature(offset)
                yield from self._inflate_plain(offset)
            else:
                member = self._take(tagged.member_bytes)
                pending.append(self._pool.submit(_inflate_tagged, member, tagged, offset))
                if len(pending) > self._num_threads:
                    yield from pending.popleft().result()
            offset = self.bytes_read - len(self._held)
        while pending:
            yield from pending.popleft().result()
        if not offset:
            raise PackageError("the archive is empty, 0 bytes; copy it again")

    def _check_signature(self, offset: int) -> None:
        if self._held.startswith(GZIP_MAGIC):
            return
        if offset:
            raise PackageError(
                f"the archive goes on after its last gzip member, at byte {offset}, with data "
                "that is not gzip; copy it again"
            )
        for magic, kind in _OTHER_FORMATS:
            if self._held.startswith(magic):
                raise PackageError(f"the archive is {kind}, expected gzip; repack it with pigz")
        raise PackageError(
            f"the archive starts with bytes {self._held[:2].hex()}, expected {GZIP_MAGIC.hex()} "
            "of gzip; is it a .tgz?"
        )

    def _inflate_plain(self, offset: int) -> Iterator[bytes]:
        """Yield the data of one member that does not say its size, inflating one piece ahead."""
        inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        data, self._held = self._held, b""
        output = b""
        while not inflater.eof:
            if not data:
                raise _cut_short(self.bytes_read)
            job = self._pool.submit(inflater.decompress, data, _MAX_OUTPUT_BYTES)
            if output:
                yield output
            try:
                output = job.result()
            except zlib.error as error:
                raise _damaged(offset, error) from error
            data = inflater.unconsumed_tail
            if not data and not inflater.eof:
                data = self._read(_READ_BYTES)
        if output:
            yield output
        self._held = inflater.unused_data

    def _peek(self, size: int) -> bool:
        """Hold at least ``size`` bytes where there are so many; False at the end of the stream."""
        while len(self._held) < size:
            data = self._read(size - len(self._held))
            if not data:
                break
            self._held += data
        return bool(self._held)

    def _take(self, size: int) -> list[bytes]:
        """Return exactly ``size`` bytes of the stream, in pieces as they came."""
        pieces = [self._held[:size]]
        self._held = self._held[size:]
        size -= len(pieces[0])
        while size:
            data = self._read(size)
            if not data:
                raise _cut_short(self.bytes_read)
            pieces.append(data)
            size -= len(data)
        return pieces

    def _read(self, size: int) -> bytes:
        try:
            data = self._stream.read(size)
        except OSError as error:
            raise PackageError(
                f"the archive cannot be read after {self.bytes_read} bytes: {error.strerror}"
            ) from error
        self.bytes_read += len(data)
        return data


def _parse_tagged(header: bytes) -> _TaggedMember | None:
    """Return the sizes a member of ours says; None for another's, which is read without them."""
    if len(header) < _HEADER.size:
        return None
    fields = _HEADER.unpack_from(header)
    if fields[0] != _SIGNATURE or fields[4:7] != (_EXTRA_BYTES, _SUBFIELD_ID, _SUBFIELD_BYTES):
        return None
    member_bytes, data_bytes = fields[7:]
    # Deflate never needs more than 5 bytes per 64 KiB over the data; a larger claim is not ours.
    if data_bytes > _MAX_TAGGED_DATA_BYTES or member_bytes > data_bytes + data_bytes // 64 + 256:
        return None
    return _TaggedMember(member_bytes, data_bytes)


def _inflate_tagged(pieces: list[bytes], tagged: _TaggedMember, offset: int) -> list[bytes]:
    inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    chunks = []
    left = tagged.data_bytes
    try:
        for piece in pieces:
            # One byte more than is left shows a member that holds too much.
            chunks.append(inflater.decompress(piece, left + 1))
            left -= len(chunks[-1])
            if left < 0 or inflater.unused_data:
                break
    except zlib.error as error:
        raise _damaged(offset, error) from error
    if not inflater.eof or inflater.unused_data or left:
        raise _damaged(offset, f"it does not hold the {tagged.data_bytes} bytes its header says")
    return chunks


def _damaged(offset: int, reason: object) -> PackageError:
    return PackageError(
        f"the archive is damaged in the gzip member at byte {offset} ({reason}); copy it again"
    )


def _cut_short(num_bytes: int) -> PackageError:
    return PackageError(
        f"the archive is cut short, it ends after {num_bytes} bytes in the middle of a gzip "
        "member; copy it again"
    )
