"""The sections of report.html, each a plot and the numbers behind it."""

from __future__ import annotations

from device_runtime.package_format.amounts import MIB, format_bytes
from device_runtime.package_format.config_ini import (
    QUANT_POLICY_ONLINE_INT8,
    QUANT_POLICY_STATIC_INT8,
)
from host_tools.costs import NOTABLE_INCREASE
from host_tools.layer_records import CLIP_STEPS, LINEARS, LinearName, LinearRecord
from host_tools.markup import Markup, element, table
from host_tools.perplexity_figures import shown
from host_tools.report.data import Report, StageFigures
from host_tools.report.figures import STEPS, clip_shares, layer_means, relative
from host_tools.report.plots import (
    Segment,
    Series,
    bar_plot,
    heat_plot,
    legend,
    line_plot,
    range_plot,
    stacked_bars,
)

KV_NAMES = {
    0: "fp16",
    QUANT_POLICY_STATIC_INT8: "static int8",
    QUANT_POLICY_ONLINE_INT8: "online int8",
}
_COLOURS = ("c1", "c2", "c3", "c4", "c5")


def error_section(report: Report) -> Markup:
    """Show the error of each layer after each step, and of each linear in the end."""
    record, title = report.quantize, "Error of the layers"
    known = [
        Series(name, colour, tuple(layer_means(record, step)))
        for name, colour, step in (STEPS if record else ())
        if record and any(value is not None for value in layer_means(record, step))
    ]
    if record is None or not known:
        return _section(title, "", _empty("no errors were noted: nothing was searched"))
    linears = {
        (layer.layer, linear.linear): linear for layer in record.layers for linear in layer.linears
    }
    layers = [layer.layer for layer in record.layers]
    finals = [[_final(linears.get((layer, name))) for layer in layers] for name in LINEARS]
    titles = [[_words(layer, name, linears) for layer in layers] for name in LINEARS]
    heads = ("linear", "output x input", "signal", *(name for name, _, _ in STEPS), "final, %")
    rows = [
        (
            f"layers.{layer}.{name}",
            f"{linear.num_outputs} x {linear.num_inputs}",
            _figure(linear.signal),
            *(_figure(step(linear)) for _, _, step in STEPS),
            "fp16" if linear.w_bits > 8 else _percent(_final(linear)),
        )
        for (layer, name), linear in linears.items()
    ]
    return _section(
        title,
        "Mean squared change of what the linears of a layer give, as a share of what they give, "
        "on the calibration's tokens. Lower is better; the scale is logarithmic. "
        f"Computed on: {record.device}.",
        line_plot(known, _percent, "error of each layer before and after the search"),
        legend([(line.name, line.colour) for line in known]),
        element("h3", "What is left, by linear and layer; outlined: fp16, or not measured"),
        heat_plot(LINEARS, finals, titles, "error of each linear that is stored"),
        element(
            "details",
            element("summary", f"{len(rows)} linears in numbers"),
            element("div", table(heads, rows), class_="scroll"),
        ),
    )


def clipping_section(report: Report) -> Markup | None:
    """Show how much of their range the groups kept."""
    shares = clip_shares(report.quantize) if report.quantize else []
    if not shares:
        return None
    whole, cut = shares[CLIP_STEPS], shares[:CLIP_STEPS]
    first = next((place for place, share in enumerate(cut) if share), CLIP_STEPS)
    first = min(first, CLIP_STEPS - 10)
    labels = [f"{100 * place / CLIP_STEPS:.3g}" for place in range(first, CLIP_STEPS)]
    return _section(
        "Clipping",
        f"{100 * whole:.1f} % of the groups keep their whole range. The others keep as many "
        "per cent of it as stands below, for a finer grid; bars are shares of all groups.",
        bar_plot(cut[first:], labels, "groups by the kept part of their range"),
    )


def perplexity_section(report: Report) -> Markup:
    """Show every measurement of perplexity."""
    title = "Perplexity"
    if not report.perplexities:
        return _section(
            title, "", _empty("not measured; turbojet-host evaluate --work-dir adds a table here")
        )
    parts = []
    for found in report.perplexities:
        caption = f"{found.title}: {found.num_samples} windows of {found.seqlen} tokens"
        parts.append(element("h3", f"{caption} of {found.dataset}"))
        has_more = any(row.kl_divergence is not None for row in found.rows)
        heads = ("target", "", "perplexity", "increase", *(("KL", "top-1") if has_more else ()))
        rows = []
        for row in found.rows:
            increase = None
            if row.increase is not None:
                kind = "warn" if row.increase > NOTABLE_INCREASE else None
                increase = element("span", f"{shown(100 * row.increase, '+.2f')} %", class_=kind)
            more = (
                "" if row.kl_divergence is None else shown(row.kl_divergence, ".4f"),
                "" if row.top1_agreement is None else f"{100 * row.top1_agreement:.1f} %",
            )
            cells = (row.target, row.kind, shown(row.perplexity, ".3f"), increase)
            rows.append((*cells, *(more if has_more else ())))
        parts.append(table(heads, rows, num_words=2))
    return _section(title, "", *parts)


def kv_section(report: Report) -> Markup | None:
    """Show the range of keys and values of each layer."""
    ranges = report.kv_ranges
    if not ranges:
        return None
    text = "Least and greatest value over the calibration's tokens and all heads of a layer."
    if report.package is not None:
        text += f" The package is set to a {KV_NAMES[report.package.quant_policy]} cache."
    keys = range_plot([r.k_min for r in ranges], [r.k_max for r in ranges], "c1", "range of keys")
    values = range_plot(
        [r.v_min for r in ranges], [r.v_max for r in ranges], "c3", "range of values"
    )
    parts = (element("h3", "Keys"), keys, element("h3", "Values"), values)
    return _section("Keys and values", text, *parts)


def size_section(report: Report) -> Markup | None:
    """Show what the package is made of."""
    if report.package is None:
        return None
    parts = report.package.parts
    total = sum(part.size_bytes for part in parts)
    named = [
        Segment(part.name, part.size_bytes, format_bytes(part.size_bytes), colour)
        for part, colour in zip(parts, _COLOURS, strict=False)
    ]
    rest = sum(part.size_bytes for part in parts[len(_COLOURS) :])
    if rest:
        named.append(Segment("others", rest, format_bytes(rest), "c0"))
    rows = [
        (
            part.name,
            str(part.num_files),
            f"{part.size_bytes:,}".replace(",", " "),
            f"{100 * part.size_bytes / total:.1f} %",
        )
        for part in parts
    ]
    files = str(sum(part.num_files for part in parts))
    rows.append(("all", files, f"{total:,}".replace(",", " "), ""))
    return _section(
        "Size",
        "",
        stacked_bars([("package", named)], "parts of the package by size"),
        legend([(piece.name, piece.colour) for piece in named]),
        table(("part", "files", "bytes", "share"), rows),
    )


def memory_section(report: Report) -> Markup | None:
    """Show the memory plan of each board."""
    if report.package is None or not report.package.memory:
        return None
    bars, rows = [], []
    for plan in report.package.memory:
        kv_bytes = plan.num_pages * plan.page_bytes
        left = max(0, plan.usable_bytes - plan.weight_bytes - plan.workspace_bytes - kv_bytes)
        amounts = (
            ("weights", plan.weight_bytes, "c1"),
            ("workspace, process", plan.workspace_bytes, "c2"),
            ("KV pages", kv_bytes, "c3"),
            ("free", left, "c0"),
        )
        pieces = [
            Segment(name, size / plan.usable_bytes, f"{size // MIB} MiB", colour)
            for name, size, colour in amounts
        ]
        bars.append((plan.board, pieces))
        tokens = plan.num_pages * report.package.page_size
        mib = [str(size // MIB) for _, size, _ in amounts]
        rows.append((plan.board, str(plan.usable_bytes // MIB), *mib, str(tokens)))
    facts = report.package
    return _section(
        "Memory on the boards",
        f"KV cache {KV_NAMES[facts.quant_policy]}, pages of {facts.page_size} tokens, session_len "
        f"{facts.session_len}, max_batch_size {facts.max_batch_size}, cache_max_entry_count "
        f"{facts.cache_max_entry_count:g}. Bars show shares of what a model may use, numbers MiB.",
        stacked_bars(bars, "memory plan of each board"),
        legend([(piece.name, piece.colour) for piece in bars[0][1]]),
        table(
            ("board", "usable", "weights", "workspace, process", "KV", "free", "KV tokens"), rows
        ),
    )


def time_section(report: Report) -> Markup | None:
    """Show where the time of each stage went."""
    if not report.stages:
        return None
    seconds: dict[str, float] = {}
    for stage in report.stages:
        for phase in stage.phases:
            if not phase.is_beside and phase.name != "other":
                seconds[phase.name] = seconds.get(phase.name, 0.0) + phase.seconds_s
    names = sorted(seconds, key=lambda name: (-seconds[name], name))
    colours = dict(zip(names, _COLOURS, strict=False))
    bars = [(stage.name, _segments(stage, colours)) for stage in report.stages]
    rows = [
        (
            stage.name,
            _shares(stage),
            f"{stage.seconds_s:.1f}",
            format_bytes(stage.peak_anon_bytes),
            format_bytes(stage.size_bytes),
        )
        for stage in report.stages
    ]
    return _section(
        "Time",
        "Of each stage when it last had work to do.",
        stacked_bars(bars, "seconds of each stage by phase"),
        legend([*colours.items(), ("other", "c0")]),
        table(("stage", "of which", "seconds", "peak memory", "result"), rows, num_words=2),
    )


def settings_section(report: Report) -> Markup:
    """Show how the stages were told to work, and what programs did it."""
    rows = [(found.stage, found.name, found.value) for found in report.settings]
    if report.package is not None:
        rows.append(("package", "chat template", report.package.template))
    rows += [("version", tool.name, tool.version) for tool in report.versions]
    return _section("Settings and versions", "", table(("of", "name", "value"), rows, num_words=3))


def _shares(stage: StageFigures) -> str:
    """Return what the phases of a stage took of its time, and what ran beside it."""
    own = sorted(
        (p for p in stage.phases if not p.is_beside and p.seconds_s > 0),
        key=lambda p: (-p.seconds_s, p.name),
    )
    total = sum(phase.seconds_s for phase in own)
    listed = [f"{p.name} {p.seconds_s:.1f} s, {100 * p.seconds_s / total:.1f} %" for p in own]
    beside = [f"beside it {p.name} {p.seconds_s:.1f} s" for p in stage.phases if p.is_beside]
    return "; ".join([*listed, *beside])


def _segments(stage: StageFigures, colours: dict[str, str]) -> list[Segment]:
    """Return the phases of a stage in one order, and the rest of its time."""
    own = {phase.name: phase.seconds_s for phase in stage.phases if not phase.is_beside}
    pieces = [
        Segment(name, own[name], f"{own[name]:.1f} s", colour)
        for name, colour in colours.items()
        if own.get(name, 0.0) > 0
    ]
    rest = stage.seconds_s - sum(piece.amount for piece in pieces)
    if rest > 0:
        pieces.append(Segment("other", rest, f"{rest:.1f} s", "c0"))
    return pieces


def _section(title: str, text: str, *parts: Markup) -> Markup:
    return element("section", element("h2", title), element("p", text) if text else None, *parts)


def _empty(text: str) -> Markup:
    return element("p", text, class_="empty")


def _final(linear: LinearRecord | None) -> float | None:
    return None if linear is None else relative(linear.final, linear)


def _words(
    layer: int, name: LinearName, linears: dict[tuple[int, LinearName], LinearRecord]
) -> str:
    linear = linears.get((layer, name))
    if linear is None:
        return f"layers.{layer}.{name}: nothing noted"
    if linear.w_bits > 8:
        return f"layers.{layer}.{name}: fp16"
    error = _final(linear)
    return f"layers.{layer}.{name}: {'not measured' if error is None else _percent(error)}"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g} %"
