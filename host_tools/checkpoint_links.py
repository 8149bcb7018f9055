"""Looks where the symbolic links of a checkpoint's folder lead before anything is read."""

from __future__ import annotations

from pathlib import Path

from device_runtime.errors import PackageError
from host_tools.checkpoint_names import PICKLED, SAFETENSORS

SNAPSHOTS = "snapshots"
BLOBS = "blobs"
"""Hugging Face's cache keeps files here and links to them from ``snapshots/REVISION``."""


def check_links(folder: Path) -> None:
    """Check that no link in a folder brings in files from elsewhere, weights excepted.

    Settings and tokenizers are copied into what we make, so a link that leads out would publish a
    file of this machine. Weights are only ever read as tensors; linking to them is common.

    Args:
        folder: of a checkpoint; folders inside are not looked at.

    Raises:
        PackageError: a link leads out or nowhere.
    """
    if not folder.is_dir():
        return
    real = folder.resolve()
    for path in sorted(folder.iterdir()):
        if not path.is_symlink():
            continue
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop before Python 3.13
            raise PackageError(
                f"{path.name} in {folder} is a link that leads nowhere, fetch the checkpoint again"
            ) from error
        is_weight = path.suffix in (SAFETENSORS, PICKLED) and target.is_file()
        is_cached = real.parent.name == SNAPSHOTS and target.parent == real.parent.parent / BLOBS
        if not (is_weight or is_cached or target.is_relative_to(real)):
            raise PackageError(
                f"{path.name} in {folder} is a link that leads out of it, to {target}; copy the "
                f"file into the folder if it belongs there"
            )
