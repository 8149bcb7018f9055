"""Small files of the work folder that the report is gathered from: the build's, and evaluations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from device_runtime.errors import PackageError
from device_runtime.package_format import strict_json
from device_runtime.package_format.durable import write_atomically
from host_tools.report.data import (
    ArchiveFacts,
    PerplexityRow,
    PerplexityTable,
    StageFigures,
)

if TYPE_CHECKING:
    from host_tools.evaluate import EvaluationReport

BUILD_RECORD = "build.json"
EVALUATIONS = "evaluations.json"
MAX_BYTES = 4 << 20
MAX_TABLES = 16
"""Evaluations that are kept; the oldest go first."""

Record = TypeVar("Record")


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
class Evaluations:
    """Tables that ``evaluate`` was told to keep, oldest first."""

    tables: tuple[PerplexityTable, ...] = ()


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
    return _read(BuildRecord, work_dir / BUILD_RECORD)


def add_evaluation(work_dir: Path, table: PerplexityTable) -> None:
    """Keep a table; one of the same targets and windows is replaced.

    Raises:
        PackageError: the file of earlier tables is damaged.
    """

    def key(other: PerplexityTable) -> object:
        rows = [(row.target, row.kind) for row in other.rows]
        return other.title, other.dataset, other.num_samples, other.seqlen, rows

    others = [known for known in read_evaluations(work_dir) if key(known) != key(table)]
    work_dir.mkdir(parents=True, exist_ok=True)
    _write(work_dir / EVALUATIONS, Evaluations((*others, table)[-MAX_TABLES:]))


def read_evaluations(work_dir: Path) -> Sequence[PerplexityTable]:
    """Read the tables that were kept.

    Raises:
        PackageError: the file is damaged.
    """
    found = _read(Evaluations, work_dir / EVALUATIONS)
    return found.tables if found else ()


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


def _read(kind: type[Record], path: Path) -> Record | None:
    if not path.is_file():
        return None
    value = strict_json.parse_object(path.read_bytes(), path.name, MAX_BYTES)
    return strict_json.decode(kind, value, path.name)
