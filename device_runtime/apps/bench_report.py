"""The results of a benchmark as a table, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from device_runtime.apps.bench_device import Machine, MemoryUse
from device_runtime.apps.bench_load import LoadResult
from device_runtime.apps.bench_runs import PERCENTILES, Result
from device_runtime.apps.sizes import format_bytes

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


def print_report(
    console: Console,
    title: str,
    results: Sequence[Result],
    machine: Machine,
    memory: MemoryUse,
    load: LoadResult | None,
) -> None:
    """Print the table and what it was measured on."""
    table = Table(
        title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), collapse_padding=True
    )
    for first, second in _HEADINGS:
        table.add_column(f"{first}\n{second}", justify="right", no_wrap=True)
    for result in results:
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
    console.print("\n".join(machine_lines(machine, memory)), soft_wrap=True)
    if load is not None:
        rate = load.weight_bytes / load.load_s
        console.print(
            f"load    {load.load_s:.2f} s ({load.load_s_min:.2f} - {load.load_s_max:.2f}), "
            f"{format_bytes(rate)}/s",
            soft_wrap=True,
        )


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
