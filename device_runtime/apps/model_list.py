"""The table of installed models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from device_runtime.apps.release import Release
from device_runtime.apps.store import Store
from device_runtime.errors import PackageError
from device_runtime.package_format.amounts import format_bytes
from device_runtime.package_format.package import open_package

_HEADINGS = ("NAME", "RELEASE", "WEIGHTS", "SIZE", "INSTALLED", "")


@dataclass(frozen=True)
class ListedRelease:
    """One row.

    Attributes:
        name: of the model.
        release: its id.
        is_current: whether the name means this release.
        weights: element type of the weights, "" when damaged.
        size_bytes: of the weight files, 0 when damaged.
        installed_at: UTC, ISO 8601, "" when unknown.
        damage: why it does not open, "" when it does.
    """

    name: str
    release: str
    is_current: bool
    weights: str
    size_bytes: int
    installed_at: str
    damage: str

    def as_json(self) -> dict[str, object]:
        """Return the row as JSON values."""
        return asdict(self)


def list_releases(store: Store) -> list[ListedRelease]:
    """Return a row for every installed release, models by name, the current release first."""
    return [_row(release) for name in store.names() for release in store.releases(name)]


def to_table(rows: Sequence[ListedRelease]) -> str:
    """Return the rows as aligned columns."""
    cells = [_HEADINGS]
    for row in rows:
        facts = (("current", row.is_current), ("damaged", bool(row.damage)))
        state = ", ".join(word for word, is_so in facts if is_so)
        size = format_bytes(row.size_bytes) if row.size_bytes else "?"
        when = row.installed_at[:16].replace("T", " ") or "?"
        cells.append((row.name, row.release, row.weights or "?", size, when, state))
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    )


def _row(release: Release) -> ListedRelease:
    weights, size_bytes, installed_at, damage = "", 0, "", ""
    try:
        installed_at = release.record().installed_at
        package = open_package(release.root)
        group = f" g{package.model.group_size}" if package.model.group_size else ""
        weights, size_bytes = package.model.weight_type + group, package.weight_bytes
    except PackageError as error:
        damage = str(error)
    return ListedRelease(
        name=release.name,
        release=release.release_id,
        is_current=release.is_current,
        weights=weights,
        size_bytes=size_bytes,
        installed_at=installed_at,
        damage=damage,
    )
