"""Gathers what the stages of a build noted and writes report.json and report.html.

A work folder keeps what earlier builds made, for a later one to use again: where a build ended
there, only what its own stages noted is told.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from device_runtime.engine.configure import cache_request
from device_runtime.engine.options import EngineOptions
from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format import names, strict_json
from device_runtime.package_format.boards import parse_targets
from device_runtime.package_format.durable import write_atomically
from device_runtime.package_format.manifest import Manifest
from device_runtime.package_format.model_config import ModelConfig
from device_runtime.package_format.package import Package, open_package
from host_tools.costs import read_costs
from host_tools.layer_records import QuantizeRecord, read_quantize_record
from host_tools.origin import tool_versions
from host_tools.package_options import ALL_TARGETS
from host_tools.package_parts import linear_bytes, num_linear_weights, package_parts
from host_tools.plan import choose_boards, plan_boards
from host_tools.report.data import (
    REPORT_HTML,
    REPORT_JSON,
    REPORT_VERSION,
    KvRange,
    PackageFacts,
    PerplexityRow,
    PerplexityTable,
    Phase,
    Report,
    Setting,
    StageFigures,
)
from host_tools.report.page import render_page
from host_tools.report.records import BuildRecord, current_tables, read_build_record
from host_tools.stage import RECORD_DIR

AWQ_DIR = "awq"
CHECKPOINT_DIR = "checkpoint"
WORKSPACE_DIR = "turbomind"
_RECORD_FOLDERS = (
    ("fetch", CHECKPOINT_DIR),
    ("calibrate", ""),
    ("quantize", AWQ_DIR),
    ("convert", WORKSPACE_DIR),
    ("kv-qparams", WORKSPACE_DIR),
    ("costs", ""),
    ("pack", ""),
)
"""Where each stage of a build keeps its record, below the work folder."""


def write_report(work_dir: Path) -> Path:
    """Write both files of the report into a work folder and return the page.

    Raises:
        UsageError: nothing was noted there.
        PackageError: a record is damaged, or config.ini holds what no device runs.
    """
    report = collect_report(work_dir)
    content = json.dumps(strict_json.encode(report), indent=1) + "\n"
    write_atomically(work_dir / REPORT_JSON, content.encode("ascii"))
    path = work_dir / REPORT_HTML
    write_atomically(path, render_page(report).encode("utf-8"))
    return path


def collect_report(work_dir: Path) -> Report:
    """Return everything that the stages noted in a work folder.

    Raises:
        UsageError: nothing was noted there.
        PackageError: a record is damaged, or config.ini holds what no device runs.
    """
    build = read_build_record(work_dir)
    package = _package(work_dir)
    records = {name: r for name, r in _stage_records(work_dir) if _ran(build, name)}
    quantize = _quantize_record(work_dir) if _is_quantized(build, package) else None
    if build is None and quantize is None and package is None and not records:
        raise UsageError(f"{work_dir} holds nothing to report, name the work folder of a build")
    manifest = package.manifest if package else None
    return Report(
        report_version=REPORT_VERSION,
        name=manifest.name if manifest else work_dir.resolve().name,
        archive=build.archive if build else None,
        package=_package_facts(package, manifest, build) if package and manifest else None,
        quantize=quantize,
        kv_ranges=_kv_ranges(work_dir, package.model)
        if package and _ran(build, "calibrate")
        else (),
        stages=_stages(build, records),
        perplexities=tuple(_perplexities(work_dir, build)),
        settings=tuple(_settings(records)),
        versions=manifest.provenance.tools if manifest else tool_versions(),
    )


def _package(work_dir: Path) -> Package | None:
    """Open the workspace that ``build`` converts into; one in the making counts as none."""
    root = work_dir / WORKSPACE_DIR
    return open_package(root) if (root / names.MANIFEST).is_file() else None


def _ran(build: BuildRecord | None, name: str) -> bool:
    """Tell whether a stage was part of the last build; stages that were run one by one all were."""
    return build is None or any(stage.name == name for stage in build.stages)


def _is_quantized(build: BuildRecord | None, package: Package | None) -> bool:
    """Tell whether the weights of the package come from the quantization in the work folder."""
    manifest = package.manifest if package else None
    is_float = manifest is not None and manifest.quantization.method == "none"
    return _ran(build, "quantize") and not is_float


def _package_facts(package: Package, manifest: Manifest, build: BuildRecord | None) -> PackageFacts:
    request = cache_request(package, EngineOptions())  # refuses what no device runs
    model, config = package.model, package.config.resolved()
    target = build.target if build else ALL_TARGETS
    try:
        boards, _ = choose_boards(
            model, request, parse_targets(target), is_all=target == ALL_TARGETS
        )
    except UsageError:  # config.ini was edited, or no board is large enough
        boards = ()
    return PackageFacts(
        model=model,
        quantization=manifest.quantization,
        provenance=manifest.provenance,
        template=manifest.template.name,
        quant_policy=config.quant_policy,
        page_size=config.cache_block_seq_len,
        session_len=config.session_len,
        max_batch_size=config.max_batch_size,
        cache_max_entry_count=config.cache_max_entry_count,
        num_linear_weights=num_linear_weights(package),
        linear_bytes=linear_bytes(package),
        parts=package_parts(package),
        memory=plan_boards(model, request, boards),
    )


def _quantize_record(work_dir: Path) -> QuantizeRecord | None:
    """Return the notes of the quantization whose folder is there."""
    record = read_quantize_record(work_dir)
    if record is None:
        return None
    stage = _read_json(work_dir / AWQ_DIR / RECORD_DIR / "quantize.json")
    if stage is not None and stage.get("fingerprint") != record.fingerprint:
        return None
    return record


def _kv_ranges(work_dir: Path, model: ModelConfig) -> tuple[KvRange, ...]:
    from host_tools.kv_qparams import KEY_STATS, VALUE_STATS, read_extrema  # takes torch

    if not ((work_dir / KEY_STATS).is_file() and (work_dir / VALUE_STATS).is_file()):
        return ()
    keys = read_extrema(work_dir / KEY_STATS, model)
    values = read_extrema(work_dir / VALUE_STATS, model)
    return tuple(
        KvRange(
            layer,
            *(float(bound) for bound in (k_low.min(), k_high.max(), v_low.min(), v_high.max())),
        )
        for layer, ((k_low, k_high), (v_low, v_high)) in enumerate(zip(keys, values, strict=True))
    )


def _perplexities(work_dir: Path, build: BuildRecord | None) -> Iterator[PerplexityTable]:
    yield from current_tables(work_dir, build.archive if build else None)
    costs = read_costs(work_dir)
    if costs is None:
        return
    rows = [PerplexityRow("as converted", "fp16 KV, fp16 head", costs.perplexity)]
    rows += [PerplexityRow(c.name, "host decoder", c.perplexity, c.increase) for c in costs.costs]
    yield PerplexityTable(
        "savings of this package", costs.dataset, costs.num_samples, costs.seqlen, tuple(rows)
    )


def _stage_records(work_dir: Path) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield what each stage's record says."""
    for name, folder in _RECORD_FOLDERS:
        record = _read_json(work_dir / folder / RECORD_DIR / f"{name}.json")
        if record is not None:
            yield name, record


def _stages(
    build: BuildRecord | None, records: dict[str, dict[str, object]]
) -> tuple[StageFigures, ...]:
    """Return the build's figures with the phases that stages noted in their records."""
    return tuple(
        StageFigures(
            stage.name,
            stage.seconds_s,
            stage.peak_anon_bytes,
            stage.size_bytes,
            _phases(records.get(stage.name, {})),
        )
        for stage in (build.stages if build else ())
    )


def _phases(record: dict[str, object]) -> tuple[Phase, ...]:
    times = record.get("times")
    if not isinstance(times, dict):
        return ()
    found = []
    for key, is_beside in (("seconds", False), ("seconds_beside", True)):
        seconds = times.get(key)
        for name, value in seconds.items() if isinstance(seconds, dict) else ():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if is_number and name != "total":
                found.append(Phase(str(name), float(value), is_beside))
    return tuple(found)


def _settings(records: dict[str, dict[str, object]]) -> Iterator[Setting]:
    for stage, record in records.items():
        settings = record.get("settings")
        for name, value in sorted(settings.items()) if isinstance(settings, dict) else ():
            if value not in (None, "", []) and name not in ("origin", "output"):
                shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                yield Setting(stage, str(name), shown)


def _read_json(path: Path) -> dict[str, object] | None:
    """Return a record of a stage, None when there is none.

    Raises:
        PackageError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PackageError(f"{path} is damaged, run the stage again") from error
    if not isinstance(value, dict):
        raise PackageError(f"{path} is damaged, run the stage again")
    return value
