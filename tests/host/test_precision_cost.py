"""What static int8 KV and an int8 head cost, measured on the host, is what the engine shows."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_convert_bytes import GQA_64, int4_tensors
from tiny_checkpoints import write_checkpoint
from tiny_tokenizer import write_tokenizer

from device_runtime.engine.engine import Engine, EngineOptions
from device_runtime.errors import DeviceError, PackageError
from device_runtime.package_format.kv_scale import KvScale
from device_runtime.package_format.package import open_package
from device_runtime.package_format.workspace import WorkspaceWriter
from host_tools import costs, precision_cost
from host_tools.convert import convert
from host_tools.datasets import BUILTIN, WindowRequest, calibration_windows
from host_tools.package_options import ConfigValues, ConvertOptions
from host_tools.perplexity_figures import MAX_FIGURE
from host_tools.precision_cost import measure_costs
from host_tools.progress import Progress
from host_tools.tokenizer_folder import SourceTokenizer

NUM_SAMPLES, SEQLEN = 2, 48
COARSE = (KvScale(1.5, 0.25, 1.0, 0.0), KvScale(0.5, 0.0, 0.75, -0.125))
"""Of two ranks: so coarse that the cost is plain to see, and different in each."""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(precision_cost, "NUM_SAMPLES", NUM_SAMPLES)
    monkeypatch.setattr(precision_cost, "SEQLEN", SEQLEN)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An AWQ checkpoint with a wide head, so that its predictions differ."""
    tensors = int4_tensors(GQA_64, 64)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    folder = tmp_path_factory.mktemp("cost") / "awq"
    write_tokenizer(write_checkpoint(folder, GQA_64.config(), tensors))
    return folder


class Notes(Progress):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


def converted(source, output, *, policy=4, head="fp16", scales=COARSE):
    values = ConfigValues(quant_policy=policy, cache_block_seq_len=64)
    options = ConvertOptions("tiny", tp=2, config=values, head=head)
    convert(source, output, options, Progress())
    if scales:
        writer = WorkspaceWriter(output, open_package(output).model)
        for layer in range(GQA_64.num_hidden_layers):
            for rank, scale in enumerate(scales):
                writer.write_kv_scale(layer, rank, scale)
    return output


def engine_perplexity(source, workspace, policy):
    tokenizer = SourceTokenizer.open(source, GQA_64.vocab_size).tokenizer
    request = WindowRequest(BUILTIN, NUM_SAMPLES, SEQLEN)
    loss = 0.0
    options = EngineOptions(backend="reference", quant_policy=policy, session_len=SEQLEN)
    with Engine.open(workspace, options) as engine:
        for ids in calibration_windows(tokenizer, request, workspace, Progress()).tolist():
            logits = torch.from_numpy(engine.logits(ids)[:-1]).double()
            loss += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])))
    return math.exp(loss / NUM_SAMPLES)


def test_the_costs_are_those_of_the_engine(source, tmp_path):
    half = converted(source, tmp_path / "half")
    int8 = converted(source, tmp_path / "int8", head="int8")
    (tmp_path / "work").mkdir()
    report = measure_costs(source, int8, tmp_path / "work", "cpu", Progress())
    assert (report.dataset, report.num_samples, report.seqlen) == (BUILTIN, NUM_SAMPLES, SEQLEN)
    want = {
        "exact": engine_perplexity(source, half, 0),
        costs.STATIC_KV: engine_perplexity(source, half, 4),
        costs.INT8_HEAD: engine_perplexity(source, int8, 0),
        costs.BOTH: engine_perplexity(source, int8, 4),
    }
    got = {"exact": report.perplexity} | {cost.name: cost.perplexity for cost in report.costs}
    assert list(got) == list(want)
    # The engine keeps unquantized keys and values in fp16; the savings cost far more than that.
    assert got == pytest.approx(want, rel=2e-4)
    for cost in report.costs:
        assert cost.increase == pytest.approx(cost.perplexity / report.perplexity - 1)
    assert abs(report.costs[0].increase) > 0.01


def test_a_finished_measurement_is_kept_until_its_inputs_change(source, tmp_path, monkeypatch):
    workspace = converted(source, tmp_path / "tm")
    work = tmp_path / "work"
    work.mkdir()
    first = measure_costs(source, workspace, work, "cpu", Progress())
    calls = []
    measure = precision_cost._measure
    monkeypatch.setattr(
        precision_cost, "_measure", lambda *given: calls.append(1) or measure(*given)
    )
    assert measure_costs(source, workspace, work, "cpu", Progress()) == first
    assert not calls
    finer = [replace(scale, k_scale=0.01, v_scale=0.01) for scale in COARSE]
    converted(source, workspace, scales=finer)
    assert measure_costs(source, workspace, work, "cpu", Progress()) != first
    assert calls


def test_the_first_of_several_devices_measures(source, tmp_path, monkeypatch):
    workspace = converted(source, tmp_path / "tm")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="there is no GPU 7, torch sees 0 of them"):
        measure_costs(source, workspace, tmp_path, "auto", Progress(), ("7", "0"))


def test_nothing_is_measured_where_nothing_is_saved(source, tmp_path):
    workspace = converted(source, tmp_path / "tm", policy=8)
    (tmp_path / costs.COSTS).write_text("of an earlier build")
    assert measure_costs(source, workspace, tmp_path, "cpu", Progress()) is None
    assert costs.read_costs(tmp_path) is None


def test_the_costs_of_a_ruined_model_are_finite(tmp_path):
    tensors = int4_tensors(GQA_64, 64)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 1e4  # a mean loss beyond 709
    source = write_checkpoint(tmp_path / "ruined", GQA_64.config(), tensors)
    write_tokenizer(source)
    workspace = converted(source, tmp_path / "tm")
    report = measure_costs(source, workspace, tmp_path, "cpu", Progress())
    assert report == costs.read_costs(tmp_path)
    assert report.perplexity == report.costs[0].perplexity == MAX_FIGURE
    assert costs.cost_sentences(report)[0].startswith(
        "static int8 KV costs 0.00 % perplexity (1e+300 -> 1e+300 on 2 windows"
    )


def test_a_build_warns_above_one_percent_and_says_what_to_do():
    found = costs.CostReport(
        "builtin",
        8,
        512,
        20.0,
        (
            costs.Cost(costs.STATIC_KV, 20.21, 0.0105),
            costs.Cost(costs.INT8_HEAD, 20.02, 0.001),
            costs.Cost(costs.BOTH, 20.3, 0.015),
        ),
    )
    text = "8 windows of 512 tokens of the builtin text"
    assert costs.cost_sentences(found) == (
        "warning: static int8 KV costs 1.05 % perplexity (20.000 -> 20.210 on "
        f"{text}), more than 1 %; --quant-policy 8 costs less",
        f"int8 head costs 0.10 % perplexity (20.000 -> 20.020 on {text})",
        "warning: static int8 KV and int8 head costs 1.50 % perplexity (20.000 -> 20.300 on "
        f"{text}), more than 1 %; see each alone",
    )


def test_damaged_costs_are_refused(tmp_path):
    (tmp_path / costs.COSTS).write_text("{}")
    with pytest.raises(PackageError, match=r"costs\.json lacks the key 'dataset'"):
        costs.read_costs(tmp_path)


def test_static_kv_rounds_half_to_even_and_clamps():
    observer = precision_cost.StaticKv([KvScale(2.0, 1.0, 1.0, 0.0)], 1, torch.device("cpu"))
    keys = torch.tensor([2.0, 4.0, 6.0, 1000.0, -1000.0]).view(1, 1, 5, 1)
    values = torch.tensor([0.5, 1.5, 2.4, 0.0, -0.6]).view(1, 1, 5, 1)
    stored = observer.cached(keys, values)
    # (2 - 1) / 2 + 128 = 128.5 -> 128 -> 1; (4 - 1) / 2 -> 129.5 -> 130 -> 5; 130.5 -> 130 -> 5;
    # 255 -> 127 * 2 + 1; 0 -> -128 * 2 + 1.
    assert np.array_equal(stored[0].flatten(), [1.0, 5.0, 5.0, 255.0, -255.0])
    assert np.array_equal(stored[1].flatten(), [0.0, 2.0, 2.0, 0.0, -1.0])
