"""Looks at a checkpoint's folder before anything in it is read: its name, links, pointers."""

from __future__ import annotations

import os
from pathlib import Path

from device_runtime.errors import PackageError
from host_tools.checkpoint_names import (
    CONFIG_JSON,
    JSON,
    PICKLED,
    SAFETENSORS,
    TOKENIZER_FILES,
)

SNAPSHOTS = "snapshots"
BLOBS = "blobs"
"""Hugging Face's cache keeps files here and links to them from ``snapshots/REVISION``."""

_CACHED_MODEL = "models--"
_CACHED_DOT = "___"

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""What Git LFS leaves in the place of a file that was not pulled (git-lfs docs/spec.md)."""
_MAX_POINTER_BYTES = 1024


def folder_name(folder: Path) -> str:
    """Return the name of the model in a folder: the folder's own, or what a hub's cache means.

    Hugging Face keeps ``owner/name`` in ``models--owner--name/snapshots/REVISION`` (huggingface_hub
    ``file_download.py``, repo_folder_name); ModelScope writes a dot of the name as three
    underscores (modelscope ``hub/utils/utils.py``).
    """
    real = folder.resolve()
    cached = real.parent.parent.name
    if real.parent.name == SNAPSHOTS and cached.startswith(_CACHED_MODEL):
        return cached.rpartition("--")[2]
    return real.name.replace(_CACHED_DOT, ".")


def check_path(path: Path) -> None:
    """Check that a path is UTF-8: the libraries open no other file, and no manifest names one.

    Raises:
        PackageError: it is not.
    """
    try:
        os.fsencode(path).decode()
    except UnicodeError as error:
        raise PackageError(f"the path {path} is not UTF-8, rename what is not") from error


def check_folder(folder: Path) -> None:
    """Check that the files of a folder are where they seem to be and what they seem to be.

    Args:
        folder: of a checkpoint; folders inside are not looked at.

    Raises:
        PackageError: a link leads out or nowhere, a file is a pointer of Git LFS, the folder is one
            of Hugging Face's cache above the checkpoint, or its path is not UTF-8.
    """
    if not folder.is_dir():
        return
    check_path(folder.resolve())
    _check_cache(folder)
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            _check_link(path, folder)
        if path.suffix in (SAFETENSORS, PICKLED, JSON) or path.name in TOKENIZER_FILES:
            _check_pulled(path)


def _check_cache(folder: Path) -> None:
    revisions = sorted(folder.glob(f"{SNAPSHOTS}/*/{CONFIG_JSON}"))
    if revisions and not (folder / CONFIG_JSON).exists():
        raise PackageError(
            f"{folder} is a folder of Hugging Face's cache, name the checkpoint in it, "
            f"{revisions[-1].parent}"
        )


def _check_link(path: Path, folder: Path) -> None:
    """Check that a link brings in no file from elsewhere, weights excepted.

    Settings and tokenizers are copied into what we make, so a link that leads out would publish a
    file of this machine. Weights are only ever read as tensors; linking to them is common.
    """
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop before Python 3.13
        raise PackageError(
            f"{path.name} in {folder} is a link that leads nowhere, fetch the checkpoint again"
        ) from error
    real = folder.resolve()
    is_weight = path.suffix in (SAFETENSORS, PICKLED) and target.is_file()
    is_cached = real.parent.name == SNAPSHOTS and target.parent == real.parent.parent / BLOBS
    if not (is_weight or is_cached or target.is_relative_to(real)):
        raise PackageError(
            f"{path.name} in {folder} is a link that leads out of it, to {target}; copy the file "
            f"into the folder if it belongs there"
        )


def _check_pulled(path: Path) -> None:
    if not path.is_file() or path.stat().st_size > _MAX_POINTER_BYTES:
        return
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_LFS_POINTER))
    except OSError:
        return  # whoever needs the file says so
    if start == _LFS_POINTER:
        raise PackageError(
            f"{path.name} in {path.parent} is a pointer of Git LFS in the place of the file, run "
            f"git lfs pull there or fetch the checkpoint again"
        )
