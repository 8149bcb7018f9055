"""Which names an archive may hold: every member has one path, inside, and no two can collide."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from device_runtime.errors import PackageError
from device_runtime.package_format.archive_tar import TarMember
from device_runtime.package_format.names import TRITON_MODELS, check_relative_path

MAX_PART_BYTES = 255
"""Longest file or folder name that Linux file systems take."""

# The links that LMDeploy's converter makes for Triton (spec section 1.1). A workspace that a user
# packed by hand holds them; nothing of ours reads them, so they are left out.
LMDEPLOY_LINKS = {
    **{
        f"model_repository/{model}": f"../{TRITON_MODELS}/{folder}"
        for model, folder in (
            ("turbomind", "interactive"),
            ("preprocessing", "preprocessing"),
            ("postprocessing", "postprocessing"),
        )
    },
    f"{TRITON_MODELS}/interactive/1/weights": "../../weights",
    f"{TRITON_MODELS}/preprocessing/1/tokenizer": "../../tokenizer",
    f"{TRITON_MODELS}/postprocessing/1/tokenizer": "../../tokenizer",
}


@dataclass
class _Claim:
    path: str
    is_folder: bool
    is_member: bool


class MemberNames:
    """Checks the path of each member against the rules and against all members before it.

    Two paths collide when they are equal after Unicode normalisation and case folding, so that an
    archive means the same on every file system; a folder that is only the parent of a member
    counts as seen but may still come as a member of its own.
    """

    def __init__(self, max_members: int) -> None:
        self._max_members = max_members
        self._num_members = 0
        self._claims: dict[str, _Claim] = {}
        self._parents: set[str] = set()

    def claim(self, member: TarMember) -> str:
        """Return the member's clean path, ``""`` for the archive's own root folder.

        Raises:
            PackageError: the path leaves the archive, is not normalised, is too long, collides
                with an earlier one, or there are too many members.
        """
        self._num_members += 1
        if self._num_members > self._max_members:
            raise PackageError(f"the archive holds more than {self._max_members} members")
        path = _clean_path(member)
        if not path:
            return path
        parent = path.rpartition("/")[0]
        while parent and parent not in self._parents:
            self._parents.add(parent)
            self._claim(parent, is_folder=True, is_member=False)
            parent = parent.rpartition("/")[0]
        self._claim(path, is_folder=member.kind == "folder", is_member=True)
        return path

    def _claim(self, path: str, *, is_folder: bool, is_member: bool) -> None:
        key = unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())
        earlier = self._claims.setdefault(key, _Claim(path, is_folder, is_member=False))
        shown = ascii(path)
        if earlier.path != path:
            raise PackageError(
                f"the archive holds {earlier.path!a} and {shown}, "
                "which differ only in case or Unicode form"
            )
        if earlier.is_folder != is_folder:
            raise PackageError(f"the archive holds {shown} both as a file and as a folder")
        if earlier.is_member and is_member:
            raise PackageError(f"the archive holds {shown} twice")
        earlier.is_member |= is_member


def is_lmdeploy_link(path: str, target: str) -> bool:
    """Tell whether a symbolic link is one that LMDeploy's converter makes in its workspace."""
    return any(
        target == known_target and (path == known or path.endswith(f"/{known}"))
        for known, known_target in LMDEPLOY_LINKS.items()
    )


def _clean_path(member: TarMember) -> str:
    """Return the path without the ``./`` and the trailing slash that tar itself writes."""
    path = member.path
    if member.kind == "folder":
        path = path[:-1] if path.endswith("/") and path != "/" else path
        if path == ".":
            return ""
    path = path[2:] if path.startswith("./") else path
    check_relative_path(path)
    for part in path.split("/"):
        if len(part.encode("utf-8")) > MAX_PART_BYTES:
            raise PackageError(
                f"path {path[:120]!a} has a part of {len(part.encode('utf-8'))} bytes, "
                f"expected at most {MAX_PART_BYTES}"
            )
    return path
