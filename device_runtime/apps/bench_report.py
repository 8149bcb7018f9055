"""The results of a benchmark as a table, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from device_runtime import __version__
from device_runtime.apps.bench_device import Machine, MemoryUse, machine_facts
from device_runtime.apps.bench_load import LoadResult
from device_runtime.apps.bench_nodes import node_lines, slice_lines
from device_runtime.apps.bench_project import Projection, projection_lines
from device_runtime.apps.bench_runs import PERCENTILES, Result, Workload
from device_runtime.package_format.amounts import format_bytes

if TYPE_CHECKING:
    from device_runtime.backends.cuda.nodes import NodeTime
    from device_runtime.backends.cuda.slices import SliceRate

_HEADINGS = (
    ("prompt+", "answer"),
    ("at", "once"),
    ("TTFT", "ms"),
    ("prefill", "tok/s"),
    ("decode", "tok/s"),
    ("", "+-"),
    ("ms/tok", "p50"),
    ("", "p90"),
    ("", "p99"),
    ("", "GB/s"),
    ("of", "max"),
)


@dataclass(frozen=True)
class Report:
    """Everything that one call measured; tuples are empty for what was not asked for.

    Attributes:
        title: what ran.
        backend: its name.
        quant_policy: of the KV cache.
        kv_title: the same in words.
        machine: what it ran on.
        memory: what it took.
        results: one for each workload.
        load: how long loading takes.
        nodes: of a decode step of the first workload.
        slices: rates of the GEMV on a few SMs.
        projections: of boards, for one sequence of the first workload.
    """

    title: str
    backend: str
    quant_policy: int
    kv_title: str
    machine: Machine
    memory: MemoryUse
    results: tuple[Result, ...]
    load: LoadResult | None
    nodes: tuple[NodeTime, ...]
    slices: tuple[SliceRate, ...]
    projections: tuple[Projection, ...]

    @property
    def first(self) -> Workload:
        """The workload that nodes and projections are for."""
        return self.results[0].workload


def report_facts(report: Report) -> dict[str, object]:
    """Return a report as JSON values."""
    return {
        "model": report.title,
        "backend": report.backend,
        "version": __version__,
        "quant_policy": report.quant_policy,
        **machine_facts(report.machine, report.memory),
        "load": asdict(report.load) if report.load else None,
        "results": [result_facts(result, report.machine) for result in report.results],
        "nodes": [asdict(node) | {"ratio": node.ratio} for node in report.nodes],
        "slices": [asdict(rate) for rate in report.slices],
        "projections": [asdict(projection) for projection in report.projections],
    }


def result_facts(result: Result, machine: Machine) -> dict[str, object]:
    """Return one result as flat JSON values."""
    facts: dict[str, object] = asdict(result.workload)
    facts |= {key: value for key, value in asdict(result).items() if key != "workload"}
    del facts["token_time_s"]
    for percentile in PERCENTILES:
        facts[f"token_time_p{percentile}_s"] = result.token_time_s[percentile]
    facts["share_of_read_bandwidth"] = result.read_bytes_s / machine.read_bytes_s
    return facts


def to_csv(rows: Sequence[dict[str, object]]) -> str:
    """Return rows with the same keys as CSV with a header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def print_report(console: Console, report: Report) -> None:
    """Print the table, what it was measured on, and what else was asked for."""
    machine, load = report.machine, report.load
    title = f"{report.title}, {report.backend}, {report.kv_title} KV cache"
    table = Table(
        title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), collapse_padding=True
    )
    for first, second in _HEADINGS:
        table.add_column(f"{first}\n{second}", justify="right", no_wrap=True)
    for result in report.results:
        workload = result.workload
        share = result.read_bytes_s / machine.read_bytes_s
        spread = result.decode_tok_s_max - result.decode_tok_s_min
        times = (f"{1e3 * result.token_time_s[p]:.2f}" for p in PERCENTILES)
        table.add_row(
            f"{workload.prompt_tokens}+{workload.completion_tokens}",
            str(workload.concurrency),
            f"{1e3 * result.ttft_s:.1f}",
            f"{result.prefill_tok_s:.0f}",
            f"{result.decode_tok_s:.1f}",
            f"{spread / 2:.1f}",
            *times,
            f"{result.read_bytes_s / 1e9:.0f}",
            f"{share:.0%}",
        )
    console.print(table)
    console.print("\n".join(machine_lines(machine, report.memory)), soft_wrap=True)
    if load is not None:
        rate = load.weight_bytes / load.load_s
        console.print(
            f"load    {load.load_s:.2f} s ({load.load_s_min:.2f} - {load.load_s_max:.2f}), "
            f"{format_bytes(rate)}/s",
            soft_wrap=True,
        )
    for line in (
        *node_lines(report.nodes, report.first),
        *slice_lines(report.slices),
        *projection_lines(report.projections, report.first),
    ):
        console.print(line, soft_wrap=True, highlight=False)


def machine_lines(machine: Machine, memory: MemoryUse) -> list[str]:
    """Return what the table was measured on, for a person."""
    device = [machine.device, machine.board]
    if machine.sm:
        device.append(f"sm_{machine.sm}, {machine.num_sms} SMs")
    if machine.gpu_mhz:
        device.append(f"{machine.gpu_mhz} MHz")
    device += [machine.power_mode, machine.software, machine.driver]
    return [
        "device  " + ", ".join(part for part in device if part),
        f"reads   {machine.read_bytes_s / 1e9:.0f} GB/s when it does nothing else",
        f"memory  weights {format_bytes(memory.weight_bytes)}, "
        f"KV {format_bytes(memory.kv_bytes)}, the rest {format_bytes(memory.other_bytes)},",
        f"        context {format_bytes(memory.context_bytes)}, "
        f"host peak {format_bytes(memory.host_peak_bytes)}",
    ]
