"""`turbojet bench`: what it measures, what it says, on the reference backend."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import pytest
from tiny_package import make_package

from device_runtime import cli
from device_runtime.apps import bench_device
from device_runtime.apps.bench import read_workloads
from device_runtime.apps.bench_device import power_mode
from device_runtime.apps.bench_engine import decode_weight_bytes, step_bytes
from device_runtime.apps.bench_nodes import node_lines, slice_lines
from device_runtime.apps.bench_project import (
    nearest_rate,
    project,
    project_all,
    projection_lines,
    quantized_weights,
    rates_alone,
)
from device_runtime.apps.bench_runs import Round, Workload, summarize
from device_runtime.backends.cuda.nodes import NodeTime
from device_runtime.backends.cuda.slices import SliceRate
from device_runtime.backends.kv_format import KvFormat
from device_runtime.backends.memory_plan import CacheRequest
from device_runtime.backends.synthetic import synthetic_package
from device_runtime.errors import UsageError
from device_runtime.package_format.boards import BOARDS
from device_runtime.package_format.tensors import tensor_specs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_package(tmp_path_factory.mktemp("bench") / "tiny", session_len=256).root


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(bench_device, "_CPU_ARRAY_BYTES", 1 << 20)


def run(root, capsys, *arguments: str) -> str:
    fixed = ("bench", str(root), "--backend", "reference", "--warm-up", "0", "--repeats", "2")
    assert cli.main([*fixed, *arguments]) == 0
    return capsys.readouterr().out


def test_every_combination_is_measured(root, capsys) -> None:
    out = run(
        root, capsys, "--prompt", "4,9", "--completion", "1,5", "--concurrency", "2", "--json"
    )
    facts = json.loads(out)
    rows = [
        (r["prompt_tokens"], r["completion_tokens"], r["concurrency"]) for r in facts["results"]
    ]
    assert rows == [(4, 1, 2), (4, 5, 2), (9, 1, 2), (9, 5, 2)]
    row = facts["results"][3]
    assert row["rounds"] == 2
    assert row["ttft_min_s"] <= row["ttft_s"] <= row["ttft_max_s"]
    assert 0 < row["decode_tok_s_min"] <= row["decode_tok_s"] <= row["decode_tok_s_max"]
    assert row["token_time_p50_s"] <= row["token_time_p90_s"] <= row["token_time_p99_s"]
    assert facts["results"][0]["decode_tok_s"] == 0.0  # one token each leaves nothing to decode
    assert facts["backend"] == "reference"
    assert facts["memory"]["kv_bytes"] > 0


def test_csv_has_a_header_and_a_line_for_each(root, capsys) -> None:
    out = run(root, capsys, "--prompt", "4,5", "--completion", "3", "--csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["prompt_tokens"] for row in rows] == ["4", "5"]
    assert float(rows[0]["share_of_read_bandwidth"]) > 0


def test_the_table_fits_80_columns_and_names_the_machine(root, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = run(root, capsys, "--prompt", "4", "--completion", "3")
    assert "…" not in out
    assert max(len(line) for line in out.splitlines()) <= 80
    for word in ("TTFT", "decode", "GB/s", "device", "memory", "host peak"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "4,x"], "--prompt is '4,x', expected whole numbers above 0 with commas"),
        (["--completion", "0"], "--completion is '0', expected whole numbers above 0"),
        (["--repeats", "0"], "--warm-up is 1 and --repeats 0, expected at least 0 and 1"),
        (
            ["--synthetic", "llama-2-7b"],
            "bench takes the name of a model, a folder, or --synthetic",
        ),
    ],
)
def test_arguments_that_mean_nothing_are_refused(root, capsys, arguments, message) -> None:
    assert cli.main(["bench", str(root), *arguments]) == UsageError.exit_code
    assert message in capsys.readouterr().err


def test_bench_needs_something_to_measure(capsys) -> None:
    assert cli.main(["bench"]) == UsageError.exit_code
    assert "bench takes the name of a model" in capsys.readouterr().err


def test_workloads_are_ordered_by_concurrency() -> None:
    workloads = read_workloads("1,2", "3", "1,8")
    assert workloads == [
        Workload(1, 3, 1),
        Workload(2, 3, 1),
        Workload(1, 3, 8),
        Workload(2, 3, 8),
    ]


def test_rounds_add_up_by_their_medians() -> None:
    rounds = [
        Round(ttft_s=(0.1, 0.3), token_times_s=(0.01, 0.03), decode_s=1.0, num_decoded=100),
        Round(ttft_s=(0.2, 0.2), token_times_s=(0.02,), decode_s=1.0, num_decoded=200),
        Round(ttft_s=(0.5, 0.5), token_times_s=(0.02,), decode_s=2.0, num_decoded=800),
    ]
    result = summarize(Workload(10, 5, 2), rounds, bytes_per_step=1000)
    assert result.ttft_s == pytest.approx(0.2)  # means 0.2, 0.2 and 0.5
    assert (result.ttft_min_s, result.ttft_max_s) == pytest.approx((0.2, 0.5))
    assert result.prefill_tok_s == pytest.approx(20 / 0.3)  # 67, 100 and 40
    assert (result.decode_tok_s_min, result.decode_tok_s, result.decode_tok_s_max) == (
        pytest.approx(100),
        pytest.approx(200),
        pytest.approx(400),
    )
    assert result.token_time_s[50] == pytest.approx(0.02)
    assert result.read_bytes_s == pytest.approx(1000 * 200 / 2)


def test_a_step_reads_all_weights_but_the_embedding() -> None:
    model = synthetic_package("llama-2-7b").model
    every = sum(spec.size_bytes for spec in tensor_specs(model, has_kv_scales=False))
    assert decode_weight_bytes(model) == every - 32000 * 4096 * 2
    tied = synthetic_package("smollm2-135m").model
    every = sum(spec.size_bytes for spec in tensor_specs(tied, has_kv_scales=False))
    assert decode_weight_bytes(tied) == every
    # 2 x 32 layers x 32 heads x (128 codes + scale and zero) bytes a token, 101 tokens on average
    kv_bytes = 2 * 32 * 32 * 132 * 101
    assert step_bytes(model, 8, Workload(1, 200, 1)) == decode_weight_bytes(model) + kv_bytes


def test_the_power_mode_has_nvpmodels_name(tmp_path, monkeypatch) -> None:
    status, modes = tmp_path / "status", tmp_path / "nvpmodel.conf"
    monkeypatch.setattr(bench_device, "_POWER_STATUS_FILE", str(status))
    monkeypatch.setattr(bench_device, "_POWER_MODES_FILE", str(modes))
    assert power_mode() == ""
    status.write_text("pmode:0002 fmode:fanNull")
    assert power_mode() == "mode 2"
    modes.write_text("< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n")
    assert power_mode() == "MAXN_SUPER"


def test_a_projection_is_arithmetic_over_the_boards_facts() -> None:
    model = synthetic_package("llama-2-7b").model
    board = BOARDS["agx-orin-64gb"]
    # 32 x (4096 x 12288 + 4096 x 4096 + 3 x 4096 x 11008) weights
    assert quantized_weights(model) == 6_476_005_376
    # Without 4096 x 11008 that stay in fp16.
    mixed = dataclasses.replace(model, fp16_linears=("layers.3.feed_forward.w2",))
    assert quantized_weights(mixed) == 6_476_005_376 - 4096 * 11008
    request = CacheRequest(0.5, 64, 512, 8, 512, KvFormat.INT8_ONLINE)
    found = project(board, model, request, 3_900_000_000, 65.0)
    assert found.memory_s == pytest.approx(3.9 / (0.8 * 204.8))
    assert found.arithmetic_s == pytest.approx(6_476_005_376 / (65 * 16 * 1300e6))
    assert found.launch_s == pytest.approx((5 * 32 + 3) * 2e-6)
    assert found.decode_tok_s == pytest.approx(1 / (found.memory_s + found.launch_s))
    slow = project(board, model, request, 3_900_000_000, 5.0)
    assert slow.decode_tok_s == pytest.approx(1 / (slow.arithmetic_s + slow.launch_s))
    assert not project(board, model, request, 1, None).is_rate_measured


def test_a_projection_says_where_the_model_does_not_fit() -> None:
    model = synthetic_package("llama-2-7b").model
    request = CacheRequest(0.5, 64, 512, 8, 512, KvFormat.INT8_ONLINE)
    boards = (BOARDS["orin-nano-4gb"], BOARDS["orin-nano-8gb"])
    small, large = project_all(boards, model, request, 3_900_000_000, {})
    # 3.9 GB of weights in 2 GiB, and in 5.5 GiB, where the model's whole context fits beside them.
    assert small.session_tokens == 0
    assert large.session_tokens >= 4096
    lines = projection_lines([small, large], Workload(512, 256, 1))
    assert [line for line in lines if "but its memory" in line] == [
        "    but its memory holds 0 tokens beside the weights: "
        "turbojet info MODEL --board orin-nano-4gb"
    ]


def test_a_board_takes_the_rate_of_the_slice_that_is_nearest() -> None:
    assert nearest_rate({8: 1.0, 14: 2.0, 16: 3.0}, 20) == 3.0
    assert nearest_rate({8: 1.0, 14: 2.0, 16: 3.0}, 6) == 1.0
    assert nearest_rate({}, 6) is None


def test_projections_say_that_they_are_and_what_they_assume(root, capsys) -> None:
    out = run(root, capsys, "--prompt", "4", "--completion", "3", "--project", "orin-nano-8gb,thor")
    assert "projected, not measured: one sequence of 5 tokens" in out
    for word in (
        "orin-nano-8gb:",
        "thor:",
        "80% of the nominal",
        "45 weights per clock",
        "assumed",
    ):
        assert word in out


def test_slices_are_told_for_each_number_of_tokens() -> None:
    rates = [SliceRate(8, 1, 70.0), SliceRate(8, 8, 40.5), SliceRate(16, 1, 69.0)]
    assert slice_lines(rates)[1:] == [
        "   8 SMs    70.0 with 1 at once,   40.5 with 8 at once",
        "  16 SMs    69.0 with 1 at once",
    ]
    assert slice_lines([]) == []
    assert rates_alone(rates) == {8: 70.0, 16: 69.0}


def test_nodes_are_told_beside_reading() -> None:
    nodes = [
        NodeTime("qkv", "w4a16_gemv_norm_1", 26_738_688, 7.5e-6, 7.5e-6 / 1.25),
        NodeTime("embed_f16", "embed_f16", 0, 2e-6, 0.0),
    ]
    lines = node_lines(nodes, Workload(4096, 64, 1))
    assert "of a step of 1 at 4096 tokens" in lines[0]
    told = "qkv 7.50 us 26.74 MB, reading them 6.00 us: 1.25 times"
    assert " ".join(lines[1].split()) == told
    assert lines[2].split() == ["embed_f16", "2.00", "us"]
    assert node_lines([], Workload(1, 1, 1)) == []


def test_nodes_are_those_of_a_gpu(root, capsys) -> None:
    arguments = ["bench", str(root), "--backend", "reference", "--repeats", "1", "--prompt", "3"]
    assert cli.main([*arguments, "--completion", "2", "--nodes"]) == UsageError.exit_code
    assert "--nodes measures the cuda backend, reference runs" in capsys.readouterr().err
