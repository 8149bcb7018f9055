"""Draws report.html: one file that needs nothing else, no network and no script."""

from __future__ import annotations

from device_runtime.package_format.amounts import format_bytes, format_duration
from host_tools.markup import Markup, element, joined
from host_tools.report.data import REPORT_JSON, Report
from host_tools.report.figures import bits_per_weight, median_gain, num_measured
from host_tools.report.sections import (
    clipping_section,
    error_section,
    kv_section,
    memory_section,
    perplexity_section,
    settings_section,
    size_section,
    time_section,
)
from host_tools.report.style import STYLE

MINUS = "\N{MINUS SIGN}"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render_page(report: Report) -> str:
    """Return the page; everything in the report that is text is escaped."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", f"{report.name} - build report"),
        element("style", Markup(STYLE)),
    )
    sections = (
        error_section(report),
        clipping_section(report),
        perplexity_section(report),
        kv_section(report),
        size_section(report),
        memory_section(report),
        time_section(report),
        settings_section(report),
    )
    footer = element(
        "footer",
        "All figures are also in ",
        element("code", REPORT_JSON),
        " beside this page. The page loads nothing.",
    )
    body = element("body", element("main", _header(report), _tiles(report), *sections, footer))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _header(report: Report) -> Markup:
    facts = report.package
    lines = []
    if facts is not None:
        source = facts.provenance
        revision = f" at {source.revision}" if source.revision else ""
        lines.append(element("p", f"from {source.source}{revision} ({source.source_kind})"))
    if report.archive is not None:
        lines.append(
            element("p", f"{report.archive.file}, sha256 ", element("code", report.archive.sha256))
        )
    return element("header", element("h1", report.name), *lines)


def _tiles(report: Report) -> Markup:
    tiles = []
    facts, record = report.package, report.quantize
    if report.archive is not None:
        size = report.archive.size_bytes
        tiles.append(_tile("archive", format_bytes(size), f"{size:,} bytes".replace(",", " ")))
    if facts is not None:
        model = facts.model
        kind = f"group {model.group_size}" if model.group_size else model.weight_type
        note = f"{facts.quantization.method}, {kind}"
        if kept := len(model.fp16_linears):
            note += f", {kept} {'matrices' if kept > 1 else 'matrix'} fp16"
        tiles.append(_tile("weights", f"{bits_per_weight(facts):.2f} bits", note))
    gain = median_gain(record) if record else None
    if record is not None and gain is not None:
        note = f"against plain rounding, median of {num_measured(record)} linears"
        tiles.append(_tile("output error", f"{-100 * gain:+.0f} %".replace("-", MINUS), note))
    increases = [
        row.increase
        for table in report.perplexities
        for row in table.rows
        if row.increase is not None
    ]
    if increases:
        tiles.append(
            _tile("perplexity", f"{100 * max(increases):+.2f} %", "the largest increase measured")
        )
    if facts is not None and facts.memory:
        tokens = min(plan.session_len for plan in facts.memory)
        boards = len(facts.memory)
        note = f"a session at least, on {boards} board{'s' if boards > 1 else ''}"
        tiles.append(_tile("context", f"{tokens} tokens", note))
    if report.stages:
        seconds = sum(stage.seconds_s for stage in report.stages)
        peak = max(stage.peak_anon_bytes for stage in report.stages)
        tiles.append(_tile("build", format_duration(seconds), f"peak memory {format_bytes(peak)}"))
    return element("div", *tiles, class_="tiles")


def _tile(label: str, value: str, note: str) -> Markup:
    return element(
        "div",
        joined(
            element("div", label, class_="label"),
            element("div", value, class_="value"),
            element("div", note, class_="note"),
        ),
        class_="tile",
    )
