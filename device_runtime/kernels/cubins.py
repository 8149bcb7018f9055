"""The set of cubins in a folder: what each is for, and which ones fit a device.

A cubin is built for one SM by one CUDA release and, where the source depends on it, for one group
size. It runs on drivers of the same or a later release: JetPack 5 takes CUDA 11 cubins, JetPack 6
also those of 12, JetPack 7 all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from device_runtime.errors import PackageError
from device_runtime.kernels.table import KERNELS

RECORD = "kernels.json"
"""Lists the cubins beside it."""
FORMAT_VERSION = 2
"""Version 1 had no `Cubin.interface`."""
GROUP_SIZES = (128, 64, 32)
"""Values of TURBOJET_GROUP_SIZE that sources of 4-bit matrices are built for."""
MAX_RECORD_BYTES = 1 << 20
SOURCES = tuple(dict.fromkeys(row.source for row in KERNELS))
"""Every .cu file without its suffix."""


def interface_of(source: str) -> str:
    """Return what Python must know to launch a source's kernels, as 16 hexadecimal digits.

    Cubins of another turbojet that takes other arguments must not run.
    """
    rows = (f"{row.name} {row.arguments} {row.block}" for row in KERNELS if row.source == source)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()[:16]


def has_group_size(source: str) -> bool:
    """Return whether a source is built once for each group size."""
    return source.startswith("w4a16")


@dataclass(frozen=True)
class Cubin:
    """One file of a set.

    Attributes:
        file: its name.
        source: the .cu file without its suffix.
        sm: 87 for sm_87.
        cuda: release of the compiler, "12.6".
        group_size: of 4-bit matrices; 0 where the source does not depend on it.
        is_plain: built with TURBOJET_PLAIN.
        sha256: of the file.
        sources_sha256: of the sources it was made of.
        interface: `interface_of` its source when it was made.
        flags: of the compiler.
    """

    file: str
    source: str
    sm: int
    cuda: str
    group_size: int
    is_plain: bool
    sha256: str
    sources_sha256: str
    interface: str
    flags: tuple[str, ...]

    @property
    def release(self) -> tuple[int, int]:
        """``cuda`` as numbers."""
        major, _, minor = self.cuda.partition(".")
        return int(major), int(minor or 0)

    @property
    def build(self) -> str:
        """What it was built for, for people."""
        return build_name(self.sm, self.cuda, self.is_plain)


def build_name(sm: int, cuda: str, is_plain: bool) -> str:
    """Return what people call the cubins of one SM and CUDA release."""
    return f"sm_{sm} by CUDA {cuda}{', plain' if is_plain else ''}"


def cubin_file(source: str, sm: int, cuda: str, group_size: int, is_plain: bool = False) -> str:
    """Return the name of a cubin's file."""
    group = f".g{group_size}" if group_size else ""
    plain = "-plain" if is_plain else ""
    return f"sm_{sm}-cuda{cuda}{plain}.{source}{group}.cubin"


def write_record(folder: Path, cubins: Iterable[Cubin]) -> None:
    """Write the record of a folder of cubins."""
    rows = [asdict(cubin) for cubin in sorted(cubins, key=lambda cubin: cubin.file)]
    text = json.dumps({"format_version": FORMAT_VERSION, "cubins": rows}, indent=1)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> tuple[Cubin, ...]:
    """Return what a folder holds; nothing where there is no record.

    Raises:
        PackageError: the record is damaged or of a later format.
    """
    path = folder / RECORD
    if not path.is_file():
        return ()
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise ValueError(f"more than {MAX_RECORD_BYTES} bytes")
        record = json.loads(path.read_text(encoding="utf-8"))
        version = record["format_version"]
        if version not in (1, FORMAT_VERSION):
            raise PackageError(
                f"{path} has format {version}, this turbojet reads {FORMAT_VERSION}; update it"
            )
        earlier = {"interface": ""} if version == 1 else {}
        return tuple(_cubin({**earlier, **row}) for row in record["cubins"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise PackageError(f"{path} is damaged: {error}; pack again") from error


def choose_cubins(
    cubins: Iterable[Cubin], sm: int, driver: tuple[int, int], is_plain: bool = False
) -> dict[tuple[str, int], Cubin]:
    """Return the cubins that run on a device by (source, group_size), the latest release of each.

    Args:
        cubins: what there is.
        sm: of the device.
        driver: CUDA release of its driver.
        is_plain: take the plain variant.
    """
    chosen: dict[tuple[str, int], Cubin] = {}
    for cubin in sorted(cubins, key=lambda cubin: cubin.release):
        # Tegra and older desktop chips: SASS of exactly this SM (jetson facts D.3).
        fits = cubin.sm == sm and cubin.release[0] <= driver[0]
        if fits and (cubin.is_plain == is_plain or sm < 80):
            chosen[cubin.source, cubin.group_size] = cubin
    return chosen


def _cubin(row: dict[str, Any]) -> Cubin:
    names = Cubin.__dataclass_fields__
    if set(row) != set(names):
        raise ValueError(f"a row has the keys {sorted(row)}")
    cubin = Cubin(**{**row, "flags": tuple(row["flags"])})
    if Path(cubin.file).name != cubin.file:
        raise ValueError(f"{cubin.file!r} is not a file beside it")
    if not (isinstance(cubin.sm, int) and isinstance(cubin.group_size, int)):
        raise ValueError(f"{cubin.file} has an sm or group_size that is no number")
    cubin.release  # noqa: B018 - raises ValueError
    return cubin
