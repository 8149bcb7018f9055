"""What ``build`` decides for a person who did not say."""

from __future__ import annotations

import re
from pathlib import Path

from device_runtime.errors import UsageError
from device_runtime.package_format.archive_writer import ARCHIVE_SUFFIX
from device_runtime.package_format.model_config import ModelConfig
from host_tools.checkpoint_folder import folder_name
from host_tools.fetch.sources import FolderSource, GgufSource, parse_source
from host_tools.options import GROUP_SIZES

_GGUF_QUANTIZATION = re.compile(r"[.-](I?Q\d|BF16|F16|F32)[A-Za-z0-9_]*$", re.IGNORECASE)


def default_name(source: str, adapter: Path | None = None) -> str:
    """Return the package's name when none is given: the source's own, without its path.

    The name of an adapter follows after a hyphen.

    Raises:
        UsageError: the source is nothing we know.
    """
    if adapter is not None:
        return f"{default_name(source)}-{folder_name(adapter)}"
    found = parse_source(source)
    if isinstance(found, GgufSource):
        return _GGUF_QUANTIZATION.sub("", found.path.stem)
    if isinstance(found, FolderSource):
        return folder_name(found.path)
    return found.model_id.rpartition("/")[2]


def default_work_dir(output: Path) -> Path:
    """Return the work folder when none is given: beside the archive, named after it."""
    return output.with_name(f"{output.name.removesuffix(ARCHIVE_SUFFIX)}.work")


def largest_group_size(model: ModelConfig, tp: int) -> tuple[int, str]:
    """Return the largest group size that fits the model, and why no larger one does ("").

    Raises:
        UsageError: none fits.
    """
    inputs = {
        "hidden_size": model.hidden_size,
        "attention outputs of a rank": model.q_size // tp,
        "intermediate_size of a rank": model.intermediate_size // tp,
    }
    reason = ""
    for group_size in GROUP_SIZES:
        misfits = [f"{name} {size}" for name, size in inputs.items() if size % group_size]
        if not misfits:
            return group_size, reason
        reason = reason or f"{group_size} does not divide {misfits[0]}"
    raise UsageError(
        f"no group size fits this model: {GROUP_SIZES[-1]} does not divide {misfits[0]}; "
        "use --method none"
    )
