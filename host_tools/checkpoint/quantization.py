"""Finds out how a checkpoint's linears are packed: by its config, else by its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from device_runtime.errors import PackageError
from device_runtime.package_format.int4 import CODES_PER_WORD
from device_runtime.package_format.names import QWEIGHT
from host_tools.checkpoint.awq_tensors import SCALES, find_awq
from host_tools.checkpoint.compressed_tensors import PACKED, find_compressed
from host_tools.checkpoint.gptq_tensors import G_IDX, find_gptq
from host_tools.checkpoint.packed_format import PackedFormat
from host_tools.checkpoint.tensor_files import TensorFiles
from host_tools.json_file import read_json

QUANTIZE_CONFIG = "quantize_config.json"
"""Where AutoGPTQ says what it did, besides or in place of config.json."""

METHODS = ("awq", "gptq", "compressed-tensors")


def find_packed(
    folder: Path, config: Mapping[str, object], files: TensorFiles
) -> PackedFormat | None:
    """Return the reader of a checkpoint's 4-bit linears, None where they are floating-point.

    Args:
        folder: of the checkpoint.
        config: its config.json.
        files: its tensors.

    Raises:
        PackageError: a method or variant that we do not read, or config and tensors disagree.
    """
    section = _section(config)
    method = str(section.get("quant_method") or "") if section else ""
    if not method:
        method = _method_of_tensors(files)
    if not method:
        if section is None:
            return None
        method = "a method without a name"
    if method == "gptq" and section is None and (folder / QUANTIZE_CONFIG).is_file():
        section = read_json(folder / QUANTIZE_CONFIG)
    if method == "gptq":
        return find_gptq(files, section or {})
    if method == "compressed-tensors":
        if section is None:
            raise PackageError(
                f"the checkpoint has tensors called {PACKED}, config.json has no "
                f"quantization_config, fetch it again"
            )
        return find_compressed(files, section)
    if method != "awq":
        raise PackageError(
            f"the checkpoint is quantized with {method[:40]}, turbojet reads {', '.join(METHODS)}; "
            f"use the floating-point checkpoint"
        )
    return find_awq(files, section)


def _section(config: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return what config.json says of quantization, None where it is silent."""
    for key in ("quantization_config", "compression_config"):
        section = config.get(key)
        if section in (None, {}):
            continue
        if not isinstance(section, dict):
            raise PackageError(f"config.json says a {key} that is no object")
        return section
    return None


def _method_of_tensors(files: TensorFiles) -> str:
    """Return what a checkpoint without a word about it must be, "" where there are no codes."""
    method = ""
    for name in files:
        if name.endswith(f".{PACKED}"):
            return "compressed-tensors"
        if name.endswith(f".{G_IDX}"):
            return "gptq"
        if name.endswith(f".{QWEIGHT}"):
            method = "awq"
            scales = f"{name.removesuffix(QWEIGHT)}{SCALES}"
            if scales in files:
                words, columns = files.facts(name)[1][-1:], files.facts(scales)[1][-1:]
                # GPTQ packs inputs, AWQ outputs, eight to a word.
                if words == columns and words != (columns[0] // CODES_PER_WORD,):
                    return "gptq"
    return method
