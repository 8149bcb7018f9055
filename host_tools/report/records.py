"""Small files of the work folder that the report is gathered from: the build's, and evaluations."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

from device_runtime.errors import PackageError
from device_runtime.package_format import strict_json
from device_runtime.package_format.durable import write_atomically
from host_tools.report.data import (
    ArchiveFacts,
    PerplexityRow,
    PerplexityTable,
    StageFigures,
)
from host_tools.stage import content_sha256

if TYPE_CHECKING:
    from host_tools.evaluate import EvaluationReport

BUILD_RECORD = "build.json"
EVALUATIONS = "evaluations.json"
MAX_BYTES = 4 << 20
MAX_TABLES = 16
"""Evaluations that are kept; the oldest go first."""


@dataclass(frozen=True)
class BuildRecord:
    """What a build noted at its end.

    Attributes:
        target: boards asked for, as written.
        archive: what it wrote.
        stages: in order.
    """

    target: str
    archive: ArchiveFacts
    stages: tuple[StageFigures, ...]


@dataclass(frozen=True)
class Measured:
    """What a row of an evaluation was measured on.

    Attributes:
        path: from the work folder, for the two move together.
        is_archive: whether it was a file.
        sha256: of its content, in hex.
    """

    path: str
    is_archive: bool
    sha256: str


@dataclass(frozen=True)
class Evaluation:
    """A table that ``evaluate`` was told to keep, and what each of its rows was measured on."""

    table: PerplexityTable
    measured: tuple[Measured, ...]


@dataclass(frozen=True)
class Evaluations:
    """What ``evaluate`` was told to keep, oldest first."""

    evaluations: tuple[Evaluation, ...] = ()


def write_build_record(
    work_dir: Path, record: BuildRecord, kept_stages: frozenset[str] = frozenset()
) -> None:
    """Write the build's record; a stage that was kept keeps the figures of its last real run."""
    try:
        earlier = read_build_record(work_dir)
    except PackageError:
        earlier = None
    known = {stage.name: stage for stage in earlier.stages} if earlier else {}
    stages = tuple(
        known.get(stage.name, stage) if stage.name in kept_stages else stage
        for stage in record.stages
    )
    _write(work_dir / BUILD_RECORD, BuildRecord(record.target, record.archive, stages))


def read_build_record(work_dir: Path) -> BuildRecord | None:
    """Read the record of the last build, None when there was none.

    Raises:
        PackageError: the file is damaged.
    """
    path = work_dir / BUILD_RECORD
    value = _parsed(path)
    return None if value is None else strict_json.decode(BuildRecord, value, path.name)


def measured_targets(work_dir: Path, targets: Sequence[str | Path]) -> tuple[Measured, ...]:
    """Return what the targets of an evaluation are now.

    Raises:
        PackageError: one is not there.
    """
    home = work_dir.resolve()
    found = []
    for path in map(Path, targets):
        place = os.path.relpath(path.parent.resolve() / path.name, home)
        found.append(Measured(place, path.is_file(), content_sha256(work_dir, path)))
    return tuple(found)


def add_evaluation(work_dir: Path, table: PerplexityTable, measured: Sequence[Measured]) -> None:
    """Keep a table; one of the same targets and windows is replaced.

    Args:
        work_dir: of the build.
        table: what was found.
        measured: what each row was measured on.

    Raises:
        PackageError: the file of earlier tables is damaged.
    """

    def key(other: PerplexityTable) -> object:
        rows = [(row.target, row.kind) for row in other.rows]
        return other.title, other.dataset, other.num_samples, other.seqlen, rows

    others = [known for known in read_evaluations(work_dir) if key(known.table) != key(table)]
    work_dir.mkdir(parents=True, exist_ok=True)
    kept = (*others, Evaluation(table, tuple(measured)))[-MAX_TABLES:]
    _write(work_dir / EVALUATIONS, Evaluations(kept))


def read_evaluations(work_dir: Path) -> Sequence[Evaluation]:
    """Read the evaluations that were kept.

    Raises:
        PackageError: the file is damaged.
    """
    path = work_dir / EVALUATIONS
    value = _parsed(path)
    if value is None or "tables" in value:  # of before, when nothing said what was measured
        return ()
    return strict_json.decode(Evaluations, value, path.name).evaluations


def current_tables(work_dir: Path, archive: ArchiveFacts | None) -> Iterator[PerplexityTable]:
    """Yield the tables that were kept, without rows of what is no longer what was measured.

    The rows are held against the first; where that one goes, so do they.

    Args:
        work_dir: of the build.
        archive: that the last build wrote, wherever it is now.

    Raises:
        PackageError: the file is damaged.
    """
    for found in read_evaluations(work_dir):
        rows = found.table.rows
        are_current = [_is_current(work_dir, target, archive) for target in found.measured]
        if any(are_current[:1]):
            yield replace(found.table, rows=tuple(compress(rows, are_current)))


def _is_current(work_dir: Path, target: Measured, archive: ArchiveFacts | None) -> bool:
    """Tell whether a target is as it was measured; a folder that is gone was not made anew."""
    path = Path(os.path.normpath(work_dir.resolve() / target.path))
    if path.is_file() or path.is_dir():
        return content_sha256(work_dir, path) == target.sha256
    return not target.is_archive or (archive is not None and archive.sha256 == target.sha256)


def evaluation_table(report: EvaluationReport) -> PerplexityTable:
    """Return what an evaluation found as a table of the report."""
    comparisons = {index + 1: found for index, found in enumerate(report.comparisons)}
    rows = []
    for index, result in enumerate(report.results):
        row = PerplexityRow(Path(result.target).name, result.kind, result.perplexity)
        if index:
            found = comparisons[index]
            row = PerplexityRow(
                row.target,
                row.kind,
                row.perplexity,
                found.perplexity_increase,
                found.kl_divergence,
                found.top1_agreement,
            )
        rows.append(row)
    return PerplexityTable(
        "evaluate", report.dataset, report.num_samples, report.seqlen, tuple(rows)
    )


def _write(path: Path, record: object) -> None:
    write_atomically(path, json.dumps(strict_json.encode(record), indent=1).encode("ascii"))


def _parsed(path: Path) -> dict[str, object] | None:
    if not path.is_file():
        return None
    return strict_json.parse_object(path.read_bytes(), path.name, MAX_BYTES)
