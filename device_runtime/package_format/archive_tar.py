"""Walks the members of a tar stream, strictly forward.

Only what a package can hold is understood: regular files, folders, and symbolic links so that the
caller can tell which they are; everything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from device_runtime.errors import PackageError
from device_runtime.package_format.archive_ustar import (
    BLOCK_BYTES,
    SPARSE_KEY,
    TarHeader,
    check_global,
    padding_bytes,
    parse_decimal,
    parse_header,
    parse_pax,
    parse_text,
)

MemberKind = Literal["file", "folder", "symlink"]

_MAX_EXTENDED_BYTES = 64 << 10
# tar fills its last record: 10 KiB unless it was told otherwise with --blocking-factor.
_MAX_PADDING_BYTES = 8 << 20

_KINDS: dict[bytes, MemberKind] = {b"0": "file", b"\0": "file", b"5": "folder", b"2": "symlink"}
_REFUSED_KINDS = {
    b"1": "a hard link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a named pipe",
    b"7": "a contiguous file",
    b"S": "a sparse file",
    b"K": "a link with a long target",
}
_PAX_LOCAL = b"x"
_PAX_GLOBAL = b"g"
_GNU_LONG_NAME = b"L"


@dataclass(frozen=True)
class TarMember:
    """One entry of an archive; ``path`` is as written there and not yet checked."""

    path: str
    size: int
    kind: MemberKind
    link_target: str = ""


class TarReader:
    """Walks the members of a tar stream that arrives in pieces, strictly forward.

    Call :meth:`next_member`, then :meth:`data` until it is used up, and so on.

    Args:
        chunks: the tar stream in pieces of any size.
    """

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._view = memoryview(b"")
        self._data_left = 0
        self._padding_left = 0

    def next_member(self) -> TarMember | None:
        """Return the next member; None at the end, once all that follows is known to be zero.

        Raises:
            PackageError: the stream is cut short or damaged, or holds a kind of member that no
                package needs.
        """
        for _ in self.data():
            pass
        path: str | None = None
        records: dict[str, str] = {}
        while True:
            block = self._take(BLOCK_BYTES)
            if not any(block):
                if path is not None or records:
                    raise PackageError("the archive ends after an extended header without a member")
                self._check_end()
                return None
            header = parse_header(block)
            if header.kind == _GNU_LONG_NAME and path is None:
                path = parse_text(self._take_extended(header.size).partition(b"\0")[0])
            elif header.kind == _PAX_LOCAL and not records:
                records = parse_pax(self._take_extended(header.size))
            elif header.kind == _PAX_GLOBAL:
                check_global(parse_pax(self._take_extended(header.size)))
            elif header.kind in (_GNU_LONG_NAME, _PAX_LOCAL):
                raise PackageError("the archive holds two extended headers for one member")
            else:
                return self._member(header, path, records)

    def data(self) -> Iterator[memoryview]:
        """Yield what is left of the current member's data, in pieces of any size.

        Raises:
            PackageError: the stream is cut short.
        """
        while self._data_left:
            piece = self._piece(self._data_left)
            self._data_left -= len(piece)
            yield piece
        while self._padding_left:
            self._padding_left -= len(self._piece(self._padding_left))

    def _member(self, header: TarHeader, path: str | None, records: dict[str, str]) -> TarMember:
        if path is None:
            path = records["path"] if "path" in records else parse_text(header.path)
        if header.kind not in _KINDS:
            what = _REFUSED_KINDS.get(header.kind, f"of type {header.kind.decode('latin-1')!a}")
            raise PackageError(
                f"archive member {path[:120]!a} is {what}, "
                "a package holds regular files and folders only"
            )
        if any(key.startswith(SPARSE_KEY) for key in records):
            raise PackageError(
                f"archive member {path[:120]!a} is a sparse file, pack it without --sparse"
            )
        kind = _KINDS[header.kind]
        size = parse_decimal(records["size"]) if "size" in records else header.size
        if size and kind != "file":
            raise PackageError(
                f"archive member {path[:120]!a} is a {kind} of {size} bytes, expected 0"
            )
        self._data_left, self._padding_left = size, padding_bytes(size)
        target = ""
        if kind == "symlink":
            target = (
                records["linkpath"] if "linkpath" in records else parse_text(header.link_target)
            )
        return TarMember(path, size, kind, target)

    def _check_end(self) -> None:
        """After one block of zeros: a second one must follow, and only tar's own padding after."""
        if any(self._take(BLOCK_BYTES)):
            raise PackageError("the archive goes on after a block of zeros, expected its end")
        num_padding = 0
        chunk: bytes | memoryview | None = self._view
        while chunk is not None:
            if bytes(chunk).strip(b"\0"):
                raise PackageError("the archive goes on after its end with data that is not zero")
            num_padding += len(chunk)
            if num_padding > _MAX_PADDING_BYTES:
                raise PackageError(
                    f"the archive goes on after its end with {num_padding} zeros, "
                    f"expected at most {_MAX_PADDING_BYTES}"
                )
            chunk = next(self._chunks, None)

    def _take_extended(self, size: int) -> bytes:
        if not 0 < size <= _MAX_EXTENDED_BYTES:
            raise PackageError(
                f"the archive holds an extended header of {size} bytes, "
                f"expected 1 to {_MAX_EXTENDED_BYTES}"
            )
        return self._take(size + padding_bytes(size))[:size]

    def _take(self, size: int) -> bytes:
        taken = b""
        while len(taken) < size:
            taken += self._piece(size - len(taken))
        return taken

    def _piece(self, limit: int) -> memoryview:
        """Return at least one and at most ``limit`` bytes of the stream."""
        while not self._view:
            chunk = next(self._chunks, None)
            if chunk is None:
                raise PackageError(
                    "the archive is cut short, its tar stream ends without the two blocks of zeros "
                    "that close it; copy it again"
                )
            self._view = memoryview(chunk)
        piece, self._view = self._view[:limit], self._view[limit:]
        return piece
