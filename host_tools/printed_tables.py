"""Shows what a build or an evaluation found: tables for people, plain values for JSON."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from device_runtime.package_format.amounts import MIB, format_bytes
from host_tools.perplexity_figures import shown

if TYPE_CHECKING:
    from host_tools.build import BuildReport
    from host_tools.evaluate import EvaluationReport


def plain_summary(report: BuildReport) -> dict[str, object]:
    """Return the report with paths as text, for JSON."""
    facts = asdict(report)
    facts["archive"] = str(report.archive)
    facts["page"] = str(report.page) if report.page else None
    for stage in facts["stages"]:
        stage["result"] = str(stage["result"])
    return facts


def print_summary(report: BuildReport) -> None:
    """Print what each stage of a build took, and what the package takes on each board."""
    table = Table(title=f"build of {report.name}", title_justify="left")
    table.add_column("stage")
    for title in ("seconds", "peak memory", "size"):
        table.add_column(title, justify="right")
    table.add_column("")
    for stage in report.stages:
        table.add_row(
            stage.name,
            f"{stage.seconds_s:.1f}",
            format_bytes(stage.peak_anon_bytes),
            format_bytes(stage.size_bytes),
            "kept" if stage.is_kept else "",
        )
    console = Console(file=sys.stdout, highlight=False)
    console.print(table)
    console.print(_boards_table(report))


def _boards_table(report: BuildReport) -> Table:
    """Return the memory plan of each board; MiB, and tokens of one conversation."""
    table = Table(
        title="memory on the boards in MiB; longest conversation in tokens, by KV format",
        title_justify="left",
    )
    table.add_column("board", no_wrap=True)
    for title in ("weights", "beside", "KV", "usable", "int8", "fp16"):
        table.add_column(title, justify="right", no_wrap=True)
    for plan, longest in zip(report.memory, report.longest, strict=True):
        sizes = (
            plan.weight_bytes,
            plan.workspace_bytes,
            plan.num_pages * plan.page_bytes,
            plan.usable_bytes,
        )
        tokens = (longest.int8_tokens, longest.fp16_tokens)
        table.add_row(plan.board, *(str(size // MIB) for size in sizes), *map(str, tokens))
    return table


def print_evaluation(report: EvaluationReport) -> None:
    """Print each target's perplexity, and how far it is from the first one."""
    table = Table(
        title=f"{report.num_samples} windows of {report.seqlen} tokens of {report.dataset}",
        title_justify="left",
    )
    table.add_column("target", overflow="fold")
    table.add_column("kind", min_width=10)
    titles = ["perplexity", "seconds"]
    if report.comparisons:
        titles += ["vs first", "KL", "top-1"]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for result, comparison in zip(report.results, (None, *report.comparisons), strict=True):
        row = [
            result.target,
            result.kind,
            shown(result.perplexity, ".3f"),
            f"{result.seconds_s:.1f}",
        ]
        if comparison is not None:
            row += [
                f"{shown(100 * comparison.perplexity_increase, '+.2f')}%",
                shown(comparison.kl_divergence, ".4f"),
                f"{100 * comparison.top1_agreement:.1f}%",
            ]
        table.add_row(*row)
    Console(file=sys.stdout, highlight=False).print(table)
