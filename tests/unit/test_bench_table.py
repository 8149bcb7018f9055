"""The figures of scripts/bench beside what they must and should be."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench_table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "gpu"))
    return importlib.import_module("bench_table")


def result(prompt: int, concurrency: int, tok_s: float, ttft_s: float = 0.01) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "concurrency": concurrency,
        "decode_tok_s": tok_s,
        "decode_tok_s_min": tok_s - 1,
        "decode_tok_s_max": tok_s + 1,
        "ttft_s": ttft_s,
        "ttft_min_s": ttft_s,
        "ttft_max_s": 2 * ttft_s,
    }


BENCH = {
    "llama-2-7b-decode": {
        "results": [result(1, 1, 710.0), result(1, 8, 4260.0)],
        "memory": {"other_bytes": 300_000_000, "context_bytes": 500_000_000},
    },
    "internlm2-1.8b-decode": {"results": [result(1, 1, 2000.0)]},
    "internlm2-1.8b-int8-head": {"results": [result(1, 1, 2140.0)]},
    "llama-2-7b-first-token": {"results": [result(512, 1, 1.0, 0.016)]},
    "llama-2-7b-slices": {
        "slices": [
            {"num_sms": 16, "num_tokens": 8, "weights_per_clock": 44.9},
            {"num_sms": 8, "num_tokens": 1, "weights_per_clock": 68.0},
        ]
    },
    "llama-2-7b-nodes": {
        "nodes": [
            {"name": "wo", "seconds": 4e-6, "ratio": 1.15},
            {"name": "attention", "seconds": 1e-5, "ratio": 1.25},
        ]
    },
    "llama-2-7b-load": {
        "load": {"weight_bytes": 3.7e9, "load_s": 1.4, "load_s_min": 1.3, "load_s_max": 1.5}
    },
}


def test_every_figure_stands_beside_what_it_must_and_should_be(bench_table) -> None:
    rows = {row.title: row for row in bench_table.rows_of(BENCH)}
    told = {title: row.verdict for title, row in rows.items() if row.value is not None}
    assert told == {
        "llama-2-7b decode, 1 + 512 tokens": "reached",
        "internlm2-1.8b decode, 1 + 512 tokens": "aim reached",
        "internlm2-1.8b, int8 head": "reached",  # 7 %
        "llama-2-7b, first token after 512": "aim reached",
        "llama-2-7b, 8 at once, total": "aim reached",  # 6 times
        "GEMV on 16 distinct SMs, 8 tokens": "MISSED",
        "GEMV on 8 distinct SMs, 1 token": "",
        "GEMV wo, 4.00 us": "reached",
        "attention at 4096, 10.00 us": "MISSED",  # 80 %
        "GPU memory beyond weights, KV and context": "MISSED",
        "the bare CUDA context": "",
        "load of 3.70 GB from the page cache": "aim reached",
    }
    assert rows["internlm2-1.8b, int8 head"].value == pytest.approx(7.0)
    assert rows["attention at 4096, 10.00 us"].value == pytest.approx(80.0)
    assert rows["llama-2-7b, first token after 512"].spread == pytest.approx((16.0, 32.0))
    assert rows["internlm2-7b, int8 head"].verdict == "not measured"


def test_the_table_has_every_figure_whatever_is_there(bench_table) -> None:
    full, empty = bench_table.table_lines(BENCH), bench_table.table_lines({})
    assert len(full) == len(empty)
    assert all(line.endswith("not measured") for line in empty[1:])
    (line,) = [line for line in full if line.startswith("llama-2-7b decode")]
    told = "llama-2-7b decode, 1 + 512 tokens 710 tok/s (709 - 711) 700 950 reached"
    assert " ".join(line.split()) == told


def test_what_was_cut_off_is_not_measured(bench_table, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"results": []}))
    (tmp_path / "b.json").write_text('{"results": [')
    assert bench_table.read_folder(tmp_path) == {"a": {"results": []}}
