"""Chooses the files of a hub repository that are downloaded, and refuses names that lie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format import names
from host_tools.checkpoint_names import SAFETENSORS, SECOND_WEIGHTS
from host_tools.stage import RECORD_DIR

MAX_FILES = 10_000

CHECKPOINT_PATTERNS = (
    "*.json",
    f"*{SAFETENSORS}",
    "pytorch_model*.bin",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.jinja",
    # llm-compressor's, which says how the weights were quantized.
    "recipe.yaml",
    # Data to us, never run: LMDeploy's workspace carries them (spec section 1.1).
    "*.py",
    "LICENSE*",
    "NOTICE*",
)
"""What a checkpoint needs, at the top of its repository."""

SECOND_COPIES = (f"{SECOND_WEIGHTS}*", "original/*", "training_args.bin")
"""The same weights in their maker's own layout, or leftovers of training."""


@dataclass(frozen=True)
class RepoFile:
    """One file as the hub lists it.

    Attributes:
        path: relative to the root of the repository.
        size: bytes.
    """

    path: str
    size: int


def select_files(
    files: Iterable[RepoFile], include: Sequence[str], exclude: Sequence[str]
) -> list[RepoFile]:
    """Return the files to download, sorted by name.

    Args:
        files: everything the hub lists.
        include: patterns over the whole path; empty takes what a checkpoint needs, and leaves out
            pickled weights where there are safetensors.
        exclude: patterns to leave out.

    Raises:
        UsageError: nothing is left.
        PackageError: a name is one that could leave the folder, is there twice, or there are too
            many.
    """
    listed = list(files)
    if include:
        chosen = [file for file in listed if _matches(file.path, include)]
    else:
        chosen = [file for file in listed if _is_needed(file.path)]
        if any(file.path.endswith(SAFETENSORS) for file in chosen):
            chosen = [file for file in chosen if not fnmatchcase(file.path, "pytorch_model*")]
    chosen = sorted(
        (file for file in chosen if not _matches(file.path, exclude)), key=lambda file: file.path
    )
    if not chosen:
        some = ", ".join(file.path[:60] for file in listed[:5])
        raise UsageError(
            f"none of the {len(listed)} files of the repository is wanted, choose others with "
            f"include and exclude; it has {some or 'none'}"
        )
    if len(chosen) > MAX_FILES:
        raise PackageError(
            f"the repository lists {len(chosen)} files to fetch, expected at most {MAX_FILES}"
        )
    for file in chosen:
        _check_name(file)
    if len({file.path for file in chosen}) != len(chosen):
        raise PackageError("the repository lists a file twice")
    return chosen


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _is_needed(path: str) -> bool:
    is_hidden_or_below = "/" in path or path.startswith(".")
    return (
        not is_hidden_or_below
        and _matches(path, CHECKPOINT_PATTERNS)
        and not _matches(path, SECOND_COPIES)
    )


def _check_name(file: RepoFile) -> None:
    """Check that a name stays in its folder, and says to the SDK what it says to us.

    Raises:
        PackageError: it does not.
    """
    names.check_relative_path(file.path)
    # The SDK splits patterns at commas and strips them; with such a name they would match others.
    if "," in file.path or file.path != file.path.strip():
        raise PackageError(f"file name {file.path[:120]!a} has a comma or a blank at its edge")
    if file.path.split("/", maxsplit=1)[0] == RECORD_DIR:
        raise PackageError(f"file name {file.path[:120]!a} lies in {RECORD_DIR}, which is ours")
    if file.size < 0:
        raise PackageError(f"file {file.path[:120]!a} has {file.size} bytes")
