"""What is known of where a checkpoint comes from, kept in a small file inside its folder."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from device_runtime import __version__
from device_runtime.errors import PackageError
from device_runtime.package_format import strict_json
from device_runtime.package_format.durable import write_atomically
from device_runtime.package_format.manifest import Calibration, Provenance, ToolVersion
from host_tools.checkpoint_folder import folder_name
from host_tools.stage import RECORD_DIR

ORIGIN_FILE = "origin.json"
MAX_ORIGIN_BYTES = 1 << 16

Method = Literal["none", "rtn", "awq", "gptq", "awq+gptq"]


@dataclass(frozen=True)
class Origin:
    """Source of a checkpoint and how its weights got their bits."""

    provenance: Provenance
    method: Method

    def quantized(self, method: Method, calibration: Calibration | None) -> Origin:
        """Return the origin of what ``quantize`` makes of this checkpoint."""
        return Origin(replace(self.provenance, calibration=calibration), method)


def read_origin(folder: Path, *, is_quantized: bool, method: Method = "awq") -> Origin:
    """Return what the folder says of itself; a folder that says nothing is its own source.

    Args:
        folder: of a checkpoint.
        is_quantized: whether its weights are int4.
        method: how somebody else's int4 weights were made.

    Raises:
        PackageError: the file in it is damaged.
    """
    path = folder / RECORD_DIR / ORIGIN_FILE
    if not path.is_file():
        made_by: Method = method if is_quantized else "none"
        return Origin(Provenance(folder_name(folder), "folder"), made_by)
    try:
        value = strict_json.parse_object(path.read_bytes(), str(path), MAX_ORIGIN_BYTES)
        return strict_json.decode(Origin, value, str(path))
    except (OSError, PackageError) as error:
        raise PackageError(f"{path} is damaged, remove it or fetch again") from error


def write_origin(folder: Path, origin: Origin) -> None:
    """Write what is known into the folder, whole or not at all."""
    path = folder / RECORD_DIR / ORIGIN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(strict_json.encode(origin), indent=1).encode())


def tool_versions() -> tuple[ToolVersion, ...]:
    """Return the versions of what computes the bytes of a package, ours first."""
    libraries = (ToolVersion(name, importlib.metadata.version(name)) for name in ("torch", "numpy"))
    return (ToolVersion("turbojet", __version__), *libraries)
