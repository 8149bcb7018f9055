"""Reads the header of a GGUF file, and trusts none of its counts, lengths and offsets.

The ``gguf`` library's own reader walks a file without bounds; here every length is compared with
the bytes that are left before anything is read. Layout: the GGUF specification,
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from device_runtime.errors import PackageError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

MAX_ENTRIES = 1 << 16
"""Most metadata keys or tensors; the largest published models have about 2000 tensors."""
MAX_ARRAY = 1 << 22
"""Most elements of a metadata array; vocabularies and merge lists stay below half a million."""
MAX_STRING_BYTES = 1 << 24
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16

Scalar = int | float | bool | str
Value = Scalar | list[Scalar]

_SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies.

    Attributes:
        name: as the file says it ("blk.0.attn_q.weight").
        kind: how its values are stored.
        shape: outermost dimension first, as numpy and torch count.
        offset: first byte, from the start of the file.
        num_bytes: stored size.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensors of one GGUF file; every tensor lies inside the file."""

    path: Path
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file.

    Raises:
        PackageError: the file is no GGUF, is cut short, or a count, length, type or offset in it
            cannot be.
    """
    try:
        size = path.stat().st_size
        data = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
    except OSError as error:
        raise PackageError(f"{path} cannot be read ({error.strerror})") from error
    cursor = _Cursor(path, data)
    if bytes(cursor.take(4)) != MAGIC:
        raise PackageError(f"{path.name} is no GGUF file, it does not start with 'GGUF'")
    version = cursor.unpack("<I")
    if version not in VERSIONS:
        hint = " (big endian)" if int.from_bytes(version.to_bytes(4, "little"), "big") < 16 else ""
        raise PackageError(
            f"{path.name} has GGUF version {version}{hint}, expected 2 or 3 in little endian"
        )
    num_tensors, num_keys = cursor.count("tensors"), cursor.count("metadata keys")
    metadata: dict[str, Value] = {}
    for _ in range(num_keys):
        key = cursor.string("metadata key")
        if key in metadata:
            raise PackageError(f"{path.name} has the metadata key {key[:80]!r} twice")
        metadata[key] = cursor.value(key)
    entries = [cursor.tensor_entry() for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    is_power = isinstance(alignment, int) and alignment > 0 and alignment & (alignment - 1) == 0
    if not isinstance(alignment, int) or not is_power or alignment > MAX_ALIGNMENT:
        raise PackageError(
            f"{path.name} has alignment {alignment!r}, expected a power of two up to "
            f"{MAX_ALIGNMENT}"
        )
    start = -(-cursor.offset // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for entry in entries:
        tensor = _place(path, entry, start, data.size)
        if tensor.name in tensors:
            raise PackageError(f"{path.name} has the tensor {tensor.name[:80]!r} twice")
        tensors[tensor.name] = tensor
    return GgufHeader(path, metadata, tensors)


@dataclass(frozen=True)
class _Entry:
    name: str
    dimensions: tuple[int, ...]
    kind: int
    offset: int


def _place(path: Path, entry: _Entry, start: int, file_size: int) -> GgufTensor:
    """Turn a tensor entry into bytes of the file.

    Raises:
        PackageError: the type is unknown, rows are not whole blocks, or the bytes are not there.
    """
    name = entry.name[:80]
    try:
        kind = GGMLQuantizationType(entry.kind)
    except ValueError as error:
        raise PackageError(
            f"tensor {name!r} of {path.name} has the unknown type {entry.kind}"
        ) from error
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    if entry.dimensions[0] % block_size:
        raise PackageError(
            f"tensor {name!r} of {path.name} has rows of {entry.dimensions[0]} values, "
            f"expected a multiple of {block_size} for {kind.name}"
        )
    num_bytes = math.prod(entry.dimensions) // block_size * block_bytes
    end = start + entry.offset + num_bytes
    if end > file_size:
        raise PackageError(
            f"tensor {name!r} of {path.name} ends at byte {end}, but the file has {file_size}, "
            "fetch it again"
        )
    shape = tuple(reversed(entry.dimensions))
    return GgufTensor(entry.name, kind, shape, start + entry.offset, num_bytes)


class _Cursor:
    """A position in the file that never moves past its end."""

    def __init__(self, path: Path, data: NDArray[np.uint8]) -> None:
        self._path = path
        self._data = data
        self.offset = 0

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return the next bytes.

        Raises:
            PackageError: the file has fewer left.
        """
        left = self._data.size - self.offset
        if num_bytes > left:
            raise PackageError(
                f"the header of {self._path.name} needs {num_bytes} bytes at byte {self.offset}, "
                f"but {left} are left, fetch it again"
            )
        self.offset += num_bytes
        return self._data[self.offset - num_bytes : self.offset]

    def unpack(self, layout: str) -> int:
        """Return the next integer."""
        return int(struct.unpack(layout, self.take(struct.calcsize(layout)).tobytes())[0])

    def count(self, what: str) -> int:
        """Return the next count of entries.

        Raises:
            PackageError: it is above what any model has.
        """
        number = self.unpack("<Q")
        if number > MAX_ENTRIES:
            raise PackageError(
                f"{self._path.name} claims {number} {what}, expected at most {MAX_ENTRIES}"
            )
        return number

    def string(self, what: str) -> str:
        """Return the next string.

        Raises:
            PackageError: it is too long or no UTF-8.
        """
        length = self.unpack("<Q")
        if length > MAX_STRING_BYTES:
            raise PackageError(
                f"a {what} of {self._path.name} claims {length} bytes, expected at most "
                f"{MAX_STRING_BYTES}"
            )
        try:
            return self.take(length).tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise PackageError(f"a {what} of {self._path.name} is not UTF-8") from error

    def value(self, key: str) -> Value:
        """Return the next typed metadata value.

        Raises:
            PackageError: its type is unknown, it is an array of arrays or one too long.
        """
        kind = self._value_type(key)
        if kind == GGUFValueType.STRING:
            return self.string("metadata value")
        if kind != GGUFValueType.ARRAY:
            return self._numbers(kind, 1)[0]
        element = self._value_type(key)
        length = self.unpack("<Q")
        if length > MAX_ARRAY:
            raise PackageError(
                f"the array {key[:80]!r} of {self._path.name} claims {length} elements, expected "
                f"at most {MAX_ARRAY}"
            )
        if element == GGUFValueType.STRING:
            return [self.string("metadata array") for _ in range(length)]
        if element == GGUFValueType.ARRAY:
            raise PackageError(f"{key[:80]!r} of {self._path.name} is an array of arrays")
        return self._numbers(element, length)

    def tensor_entry(self) -> _Entry:
        """Return the next tensor's name, dimensions (innermost first), type and offset.

        Raises:
            PackageError: it has no dimension, too many, or one that is zero.
        """
        name = self.string("tensor name")
        num_dimensions = self.unpack("<I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise PackageError(
                f"tensor {name[:80]!r} of {self._path.name} has {num_dimensions} dimensions, "
                f"expected 1 to {MAX_DIMENSIONS}"
            )
        dimensions = tuple(self.unpack("<Q") for _ in range(num_dimensions))
        if 0 in dimensions:
            raise PackageError(f"tensor {name[:80]!r} of {self._path.name} is empty")
        return _Entry(name, dimensions, self.unpack("<I"), self.unpack("<Q"))

    def _value_type(self, key: str) -> GGUFValueType:
        number = self.unpack("<I")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise PackageError(
                f"{key[:80]!r} of {self._path.name} has the unknown value type {number}"
            ) from error

    def _numbers(self, kind: GGUFValueType, length: int) -> list[Scalar]:
        dtype = np.dtype(_SCALARS[kind])
        values: list[Scalar] = self.take(length * dtype.itemsize).view(dtype).tolist()
        return values
