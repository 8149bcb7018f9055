"""What a cubin says about its kernels: registers and stack of each, read from the ELF file."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from device_runtime.errors import InternalError

# Tags of .nv.info, one for every kernel: a format byte (4: sized value), the tag, a size, then a
# symbol's number and the value. Not documented; the values are those cuobjdump --dump-elf prints
# as EIATTR_REGCOUNT and EIATTR_FRAME_SIZE.
_SIZED = 4
_FRAME_SIZE = 0x11
_REGCOUNT = 0x2F


@dataclass(frozen=True)
class Resources:
    """Of one kernel.

    Attributes:
        registers: of a thread.
        stack_bytes: of a thread: spilled registers and arrays that are not in registers.
    """

    registers: int
    stack_bytes: int


def cubin_resources(cubin: bytes) -> dict[str, Resources]:
    """Return the resources of each kernel of a cubin by its name.

    Raises:
        InternalError: the file is not a cubin as the supported compilers write them.
    """
    try:
        return _read(cubin)
    except (struct.error, ValueError, IndexError, KeyError) as error:
        raise InternalError(f"a cubin of {len(cubin)} bytes cannot be read: {error}") from error


def _read(cubin: bytes) -> dict[str, Resources]:
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("it is no 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_bytes, count, names_index = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * entry_bytes) for i in range(count)
    ]

    def content(index: int) -> bytes:
        return cubin[headers[index][4] :][: headers[index][5]]

    def text(data: bytes, offset: int) -> str:
        return data[offset : data.index(b"\0", offset)].decode()

    names = {text(content(names_index), header[0]): i for i, header in enumerate(headers)}
    symbols, strings = content(names[".symtab"]), content(names[".strtab"])
    kernels = {name.removeprefix(".text.") for name in names if name.startswith(".text.")}
    values: dict[str, dict[int, int]] = {name: {} for name in kernels}
    info, at = content(names[".nv.info"]), 0
    while at < len(info):
        form, tag, size = struct.unpack_from("<BBH", info, at)
        if form == _SIZED and size == 8 and tag in (_FRAME_SIZE, _REGCOUNT):
            symbol, value = struct.unpack_from("<II", info, at + 4)
            name = text(strings, struct.unpack_from("<I", symbols, 24 * symbol)[0])
            if name in values:
                values[name][tag] = value
        at += 4 + (size if form == _SIZED else 0)
    return {name: Resources(found[_REGCOUNT], found[_FRAME_SIZE]) for name, found in values.items()}
