"""Reads Protocol Buffers messages of untrusted origin, field by field.

Wire format: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from device_runtime.errors import PackageError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}


@dataclass(frozen=True)
class Field:
    """One field of a message.

    Attributes:
        number: of the field.
        value: the unsigned integer of a varint; the bytes of any other kind.
        what: names the message in errors.
    """

    number: int
    value: int | bytes
    what: str

    @property
    def integer(self) -> int:
        """The value of an integer, enumeration or bool field.

        Raises:
            PackageError: the field is of another kind.
        """
        if isinstance(self.value, int):
            return self.value
        raise self._wrong("an integer")

    @property
    def content(self) -> bytes:
        """The value of a string, bytes or message field.

        Raises:
            PackageError: the field is of another kind.
        """
        if isinstance(self.value, bytes):
            return self.value
        raise self._wrong("bytes")

    @property
    def text(self) -> str:
        """The value of a string field.

        Raises:
            PackageError: the field is of another kind or not UTF-8.
        """
        try:
            return self.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._wrong("UTF-8") from error

    @property
    def number_32(self) -> float:
        """The value of a float field.

        Raises:
            PackageError: the field is of another kind.
        """
        if len(self.content) != 4:
            raise self._wrong("four bytes")
        return float(struct.unpack("<f", self.content)[0])

    def _wrong(self, expected: str) -> PackageError:
        return PackageError(f"field {self.number} of {self.what} is not {expected}")


def read_fields(message: bytes, what: str) -> Iterator[Field]:
    """Yield the fields of a message in the order of the file.

    Args:
        message: not trusted; messages inside are fields of bytes.
        what: names the message in errors.

    Raises:
        PackageError: the message ends inside a field, or has one of an unknown kind.
    """
    position = 0
    while position < len(message):
        start = position
        key, position = _read_varint(message, position, what)
        number, kind = key >> 3, key & 7
        value: int | bytes
        if kind == _VARINT:
            value, position = _read_varint(message, position, what)
        else:
            if kind == _BYTES:
                size, position = _read_varint(message, position, what)
            elif kind in _FIXED_SIZES:
                size = _FIXED_SIZES[kind]
            else:
                raise PackageError(
                    f"{what} has the unknown field kind {kind} at byte {start}, "
                    "it is damaged or no such file"
                )
            if size > len(message) - position:
                raise PackageError(
                    f"{what} ends inside field {number}: {size} bytes are announced at byte "
                    f"{start}, {len(message) - position} follow"
                )
            value = message[position : position + size]
            position += size
        yield Field(number, value, what)


def _read_varint(message: bytes, position: int, what: str) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            raise PackageError(f"{what} ends inside a number at byte {position}")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise PackageError(f"{what} has a number of more than 10 bytes at byte {position - 10}")
