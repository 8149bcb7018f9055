"""The figures of scripts/bench beside what they must and should be on one H200."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Bench = Mapping[str, Mapping[str, Any]]
"""What each run found, by its name."""


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        title: what was measured.
        unit: of all numbers, as it follows them.
        must: what it has to reach; None where nothing is asked.
        aim: what it should reach.
        value: that was measured; None where it was not.
        spread: least and most of the rounds, where each has a value of its own.
        is_lower_better: of times and bytes.
    """

    title: str
    unit: str
    must: float | None
    aim: float | None
    value: float | None
    spread: tuple[float, float] | None = None
    is_lower_better: bool = False

    @property
    def verdict(self) -> str:
        """What was reached."""
        if self.value is None:
            return "not measured"
        if self.must is None or self.aim is None:
            return ""
        sign = -1 if self.is_lower_better else 1
        if sign * self.value >= sign * self.aim:
            return "aim reached"
        return "reached" if sign * self.value >= sign * self.must else "MISSED"


def read_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what each run of a folder found, without those that were cut off."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue  # its log says why
    return found


def rows_of(bench: Bench) -> Iterator[Row]:
    """Yield every figure, measured or not."""
    decode = {"llama-2-7b": (700, 950), "internlm2-1.8b": (1400, 2000), "internlm2-7b": (600, 800)}
    for model, (must, aim) in decode.items():
        yield _decode_row(bench, model, must, aim)
    for model, must, aim in (("internlm2-1.8b", 6.0, 8.0), ("internlm2-7b", 5.0, 6.5)):
        rates = [_rate(bench, f"{model}-{kind}") for kind in ("int8-head", "decode")]
        gain = 100 * (rates[0] / rates[1] - 1) if rates[0] and rates[1] else None
        yield Row(f"{model}, int8 head", "% faster", must, aim, gain)
    for length, must, aim in ((128, 14, 6), (512, 25, 16), (2048, 95, 60)):
        row = _result(bench, "llama-2-7b-first-token", length, 1)
        times = _scaled(row, 1e3, "ttft_s", "ttft_min_s", "ttft_max_s")
        title = f"llama-2-7b, first token after {length}"
        yield Row(title, "ms", must, aim, times[0] if times else None, _rest(times), True)
    rates = [_rate(bench, "llama-2-7b-decode", concurrency) for concurrency in (1, 8)]
    ratio = rates[1] / rates[0] if rates[0] and rates[1] else None
    yield Row("llama-2-7b, 8 at once, total", "times one", 4.5, 6, ratio)
    yield from _slice_rows(bench)
    yield from _node_rows(bench)
    memory = bench.get("llama-2-7b-decode", {}).get("memory", {})
    for key, title, must, aim in (
        ("other_bytes", "GPU memory beyond weights, KV and context", 0.25, 0.12),
        ("context_bytes", "the bare CUDA context", None, None),
    ):
        value = memory[key] / 1e9 if key in memory else None
        yield Row(title, "GB", must, aim, value, is_lower_better=True)
    load = bench.get("llama-2-7b-load", {}).get("load") or {}
    times = _scaled(load, 1.0, "load_s", "load_s_min", "load_s_max")
    size = f" of {load['weight_bytes'] / 1e9:.2f} GB" if load else ""
    value = times[0] if times else None
    yield Row(f"load{size} from the page cache", "s", 3.0, 1.5, value, _rest(times), True)


def table_lines(bench: Bench) -> list[str]:
    """Return the table for a person."""
    lines = [f"{'figure':<46}{'measured':>22}{'(least - most)':>20}{'must':>8}{'aim':>8}"]
    for row in rows_of(bench):
        measured = "-" if row.value is None else f"{_number(row.value)} {row.unit}"
        spread = f"({_number(row.spread[0])} - {_number(row.spread[1])})" if row.spread else ""
        goals = "".join(f"{'' if goal is None else goal:>8}" for goal in (row.must, row.aim))
        lines.append(f"{row.title:<46}{measured:>22}{spread:>20}{goals}  {row.verdict}".rstrip())
    return lines


def _decode_row(bench: Bench, model: str, must: float, aim: float) -> Row:
    row = _result(bench, f"{model}-decode", 1, 1)
    rates = _scaled(row, 1.0, "decode_tok_s", "decode_tok_s_min", "decode_tok_s_max")
    value = rates[0] if rates else None
    return Row(f"{model} decode, 1 + 512 tokens", "tok/s", must, aim, value, _rest(rates))


def _slice_rows(bench: Bench) -> Iterator[Row]:
    slices = bench.get("llama-2-7b-slices", {}).get("slices", ())
    found = {(part["num_sms"], part["num_tokens"]): part["weights_per_clock"] for part in slices}
    for num_sms in (16, 14, 8):
        for num_tokens in (1, 8):
            goals = (45, 70) if num_sms == 16 else (None, None)
            title = f"GEMV on {num_sms} distinct SMs, {num_tokens} token{'s'[: num_tokens > 1]}"
            yield Row(title, "weights/clk/SM", *goals, found.get((num_sms, num_tokens)))


def _node_rows(bench: Bench) -> Iterator[Row]:
    nodes = {node["name"]: node for node in bench.get("llama-2-7b-nodes", {}).get("nodes", ())}
    for name in ("qkv", "wo", "gate+up", "down"):
        node = nodes.get(name, {})
        us = f", {1e6 * node['seconds']:.2f} us" if node else ""
        ratio = node.get("ratio") or None
        yield Row(f"GEMV {name}{us}", "times reading", 1.15, 1.0, ratio, None, True)
    yield _attention_row(bench, "llama-2-7b-nodes", 4096, (85, 95))
    yield _attention_row(bench, "llama-2-7b-nodes-4128", 4128, (None, None))


def _attention_row(
    bench: Bench, name: str, length: int, goals: tuple[float | None, float | None]
) -> Row:
    nodes = {node["name"]: node for node in bench.get(name, {}).get("nodes", ())}
    node = nodes.get("attention", {})
    us = f", {1e6 * node['seconds']:.2f} us" if node else ""
    share = 100 / node["ratio"] if node.get("ratio") else None
    return Row(f"attention at {length}{us}", "% of reading", *goals, share)


def _result(bench: Bench, name: str, prompt: int, concurrency: int) -> Mapping[str, Any]:
    for row in bench.get(name, {}).get("results", ()):
        if (row["prompt_tokens"], row["concurrency"]) == (prompt, concurrency):
            found: Mapping[str, Any] = row
            return found
    return {}


def _rate(bench: Bench, name: str, concurrency: int = 1) -> float | None:
    return _result(bench, name, 1, concurrency).get("decode_tok_s")


def _scaled(row: Mapping[str, Any], factor: float, *names: str) -> list[float]:
    return [factor * row[name] for name in names] if row else []


def _rest(values: list[float]) -> tuple[float, float] | None:
    return (values[1], values[2]) if values else None


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
