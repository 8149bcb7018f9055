"""One tar header as archives of packages need it: written as ustar, read as ustar, GNU or pax."""

from __future__ import annotations

from dataclasses import dataclass

from device_runtime.errors import PackageError

BLOCK_BYTES = 512
"""Headers, and the data of each member, fill whole blocks of this size."""

END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)

SPARSE_KEY = "GNU.sparse."
"""Begins the pax keys of a sparse file."""

_MODE = 0o644
# Some versions of tar warn about times at or before 1970; 2000-01-01 00:00:00 UTC is as fixed.
_MTIME_S = 946_684_800
# POSIX.1-2017 pax, "ustar Interchange Format": field offsets and sizes.
_NAME = slice(0, 100)
_MODE_FIELD = slice(100, 108)
_UID_FIELD = slice(108, 116)
_GID_FIELD = slice(116, 124)
_SIZE_FIELD = slice(124, 136)
_MTIME_FIELD = slice(136, 148)
_CHECKSUM_FIELD = slice(148, 156)
_TYPE_FIELD = slice(156, 157)
_LINK_FIELD = slice(157, 257)
_MAGIC_FIELD = slice(257, 265)
_PREFIX_FIELD = slice(345, 500)
_USTAR_MAGIC = b"ustar\x0000"
_GNU_MAGIC = b"ustar  \x00"
_MAX_OCTAL_SIZE = 8**11 - 1
_MAX_SIZE_BYTES = 1 << 48
_PAX_PER_MEMBER = ("path", "size", "linkpath")


@dataclass(frozen=True)
class TarHeader:
    """What one header block says, before extended headers change it.

    Attributes:
        kind: type flag.
        path: prefix and name; only a start of them, perhaps cut inside of a character, where an
            extended header has the whole.
        size: bytes of data that follow.
        link_target: of a link, else empty; cut likewise.
    """

    kind: bytes
    path: bytes
    size: int
    link_target: bytes


def padding_bytes(size: int) -> int:
    """Return the zero bytes that follow ``size`` bytes of data to fill the last block."""
    return -size % BLOCK_BYTES


def file_header(path: str, size: int) -> bytes:
    """Return the ustar header of a regular file with fixed owner, mode and time.

    Raises:
        PackageError: the path or the size does not fit the ustar format.
    """
    prefix, name = _split_path(path)
    if size > _MAX_OCTAL_SIZE:
        raise PackageError(
            f"{path} has {size} bytes, an archive holds files of at most {_MAX_OCTAL_SIZE}"
        )
    header = bytearray(BLOCK_BYTES)
    for field, value in (
        (_NAME, name),
        (_MODE_FIELD, b"%07o" % _MODE),
        (_UID_FIELD, b"%07o" % 0),
        (_GID_FIELD, b"%07o" % 0),
        (_SIZE_FIELD, b"%011o" % size),
        (_MTIME_FIELD, b"%011o" % _MTIME_S),
        (_TYPE_FIELD, b"0"),
        (_MAGIC_FIELD, _USTAR_MAGIC),
        (_PREFIX_FIELD, prefix),
    ):
        header[field.start : field.start + len(value)] = value
    header[_CHECKSUM_FIELD] = b"%06o\0 " % _checksum(header)
    return bytes(header)


def parse_header(block: bytes) -> TarHeader:
    """Read a header block of 512 bytes that is not all zero.

    Raises:
        PackageError: it has no ustar signature, another checksum or a size that is no number.
    """
    _check_header(block)
    return TarHeader(
        kind=block[_TYPE_FIELD],
        path=_header_path(block),
        size=_parse_number(block[_SIZE_FIELD]),
        link_target=block[_LINK_FIELD].partition(b"\0")[0],
    )


def _split_path(path: str) -> tuple[bytes, bytes]:
    """Return ustar's prefix and name, split at a slash so that each fits its field."""
    encoded = path.encode("utf-8")
    name_limit = _NAME.stop - _NAME.start
    if len(encoded) <= name_limit:
        return b"", encoded
    cut = encoded.find(b"/", len(encoded) - name_limit - 1)
    prefix, name = encoded[:cut], encoded[cut + 1 :]
    if cut < 0 or not name or len(prefix) > _PREFIX_FIELD.stop - _PREFIX_FIELD.start:
        raise PackageError(
            f"path {path!a} has {len(encoded)} bytes and no slash that splits it into at most "
            f"155 and 100 as ustar needs; use a shorter name"
        )
    return prefix, name


def _checksum(header: bytes | bytearray) -> int:
    """Sum of the header's bytes with the checksum field itself counted as spaces."""
    return sum(header) - sum(header[_CHECKSUM_FIELD]) + 8 * ord(" ")


def _check_header(header: bytes) -> None:
    if header[_MAGIC_FIELD] not in (_USTAR_MAGIC, _GNU_MAGIC):
        raise PackageError(
            f"the archive holds a member without a ustar signature, "
            f"{header[_MAGIC_FIELD].decode('latin-1')!a} instead of 'ustar'; is it a tar?"
        )
    stated = _parse_number(header[_CHECKSUM_FIELD])
    if stated != _checksum(header):
        raise PackageError(
            f"the archive holds a tar header with checksum {_checksum(header)}, "
            f"it says {stated}; copy it again"
        )


def _header_path(header: bytes) -> bytes:
    name = header[_NAME].partition(b"\0")[0]
    prefix = header[_PREFIX_FIELD].partition(b"\0")[0]
    # GNU headers keep times where POSIX has the prefix.
    if header[_MAGIC_FIELD] == _USTAR_MAGIC and prefix:
        return prefix + b"/" + name
    return name


def _parse_number(field: bytes) -> int:
    """Return an octal number, or GNU's base-256 one where the first byte is 0x80."""
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
    else:
        digits = field.strip(b" \0")
        if not digits or not all(0x30 <= digit <= 0x37 for digit in digits):
            raise PackageError(
                f"the archive holds {field.decode('latin-1')!a} where a tar header has an "
                "octal number"
            )
        value = int(digits, 8)
    return _check_size(value)


def parse_decimal(text: str) -> int:
    """Return the number of a pax size record.

    Raises:
        PackageError: it is no number, or too large.
    """
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise PackageError(f"the archive holds a pax size of {text[:40]!a}, expected a number")
    return _check_size(int(text))


def _check_size(value: int) -> int:
    if value > _MAX_SIZE_BYTES:
        raise PackageError(
            f"the archive holds a member of {value} bytes, expected at most {_MAX_SIZE_BYTES}"
        )
    return value


def parse_text(raw: bytes) -> str:
    """Return a name.

    Raises:
        PackageError: it is not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PackageError(
            f"the archive holds a name that is not UTF-8: {raw[:120].decode('latin-1')!a}"
        ) from error


def parse_pax(raw: bytes) -> dict[str, str]:
    """Return the records of an extended header.

    Each is LENGTH, a space, KEY=VALUE and a newline; LENGTH counts the whole record.

    Raises:
        PackageError: a record is damaged.
    """
    records: dict[str, str] = {}
    at = 0
    while at < len(raw):
        digits = raw[at : at + 8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = raw[at : at + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) != length or not record.endswith(b"\n") or not key or not equals:
            raise PackageError(
                f"the archive holds a damaged pax header, {raw[at : at + 40].decode('latin-1')!a}"
            )
        name = parse_text(key)
        # Values of other keys, such as extended attributes, may be binary; nobody reads them.
        records[name] = parse_text(value) if name in _PAX_PER_MEMBER else ""
        at += length
    return records


def check_global(records: dict[str, str]) -> None:
    """Check that a header for all members says nothing that only one can have.

    Raises:
        PackageError: it does.
    """
    for key in records:
        if key in _PAX_PER_MEMBER or key.startswith(SPARSE_KEY):
            raise PackageError(f"the archive sets {key!r} for all members in a global pax header")
