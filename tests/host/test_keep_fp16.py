"""Quantize with linears that stay fp16: the folder, what others make of it, what is noted."""

import json
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from test_checkpoint import internlm2_folder
from test_quantize import calibrated
from transformers.quantizers.quantizers_utils import should_convert_module

from device_runtime.backends.cuda.weights import weight_layout
from device_runtime.errors import UsageError
from device_runtime.package_format.archive_reader import extract_archive
from device_runtime.package_format.package import open_package
from host_tools.awq.gram import MomentSums
from host_tools.build import build
from host_tools.checkpoint import Checkpoint, DenseLinear, QuantizedLinear
from host_tools.checkpoint.families import LINEARS
from host_tools.decoder.stream import Activations, LayerRunner, head_logits
from host_tools.layer_records import read_quantize_record
from host_tools.options import CalibrateOptions, QuantizeOptions
from host_tools.package_options import BuildOptions
from host_tools.progress import Progress
from host_tools.quantize import quantize
from host_tools.report.gather import collect_report

CPU = torch.device("cpu")
KEPT = {"q", "k", "v", "down"}
"""Of layer 0 with the patterns below; layer 1 keeps down alone."""
PATTERNS = ("layers.0.v", "*.down")
MODULES = [
    *(f"model.layers.0.self_attn.{name}_proj" for name in "qkv"),
    "model.layers.0.mlp.down_proj",
    "model.layers.0.self_attn.qkv_proj",
    "model.layers.1.mlp.down_proj",
]


class Notes(Progress):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keep") / "checkpoint"
    tiny.write_llama(folder, eos_token_id=2)
    calibrated(folder, folder.parent / "work")
    return folder


def run(source, output, *patterns, method="awq", progress=None):
    options = QuantizeOptions(group_size=32, method=method, device="cpu", keep_fp16=patterns)
    return quantize(source, source.parent / "work", output, options, progress or Progress())


def logits(folder, token_ids):
    checkpoint = Checkpoint.open(folder)
    activations = Activations.embed(checkpoint, token_ids)
    runner = LayerRunner(checkpoint, token_ids.shape[1], CPU)
    for index in range(checkpoint.model.num_hidden_layers):
        runner.advance(runner.layer(index), activations)
    return head_logits(checkpoint, activations.states[0], CPU)


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_kept_linears_are_fp16_and_the_others_codes(source, tmp_path, method):
    notes = Notes()
    awq = run(source, tmp_path / "awq", *PATTERNS, method=method, progress=notes)
    assert any("layers.0 keeps q and k and v together" in line for line in notes.lines)
    checkpoint = Checkpoint.open(awq)
    for layer in range(2):
        kept = KEPT if layer == 0 else {"down"}
        for name in LINEARS:
            kind = DenseLinear if name in kept else QuantizedLinear
            assert isinstance(checkpoint.layer(layer).linear(name), kind), (layer, name)
    assert checkpoint.layer(0).q.weight.dtype == torch.float16
    if method == "rtn":
        original = Checkpoint.open(source).layer(0).down.weight
        assert torch.equal(checkpoint.layer(0).down.weight, original.half())
    record = read_quantize_record(source.parent / "work")
    bits = {
        f"{r.layer}.{linear.linear}": linear.w_bits for r in record.layers for linear in r.linears
    }
    if method == "awq":
        assert {name for name, w_bits in bits.items() if w_bits == 16} == {
            *(f"0.{name}" for name in KEPT),
            "1.down",
        }


def test_other_engines_are_told_which_modules_are_fp16(source, tmp_path):
    awq = run(source, tmp_path / "awq", *PATTERNS, method="rtn")
    config = json.loads((awq / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == MODULES
    # vLLM and SGLang look for parts of names, in the names of their own fused modules.
    for layer, fused, is_kept in (
        (0, "self_attn.qkv_proj", True),
        (1, "self_attn.qkv_proj", False),
        (0, "mlp.gate_up_proj", False),
    ):
        name = f"model.layers.{layer}.{fused}"
        assert any(module in name for module in config["modules_to_not_convert"]) == is_kept, name
    # The rule of transformers is stricter.
    tensors = tiny.read_tensors(awq)
    for name in tensors:
        module, _, kind = name.rpartition(".")
        if "_proj" in module:
            is_packed = should_convert_module(module, config["modules_to_not_convert"])
            assert is_packed == (kind != "weight"), name
            assert is_packed == (not any(kept in module for kept in MODULES)), name


def test_scales_cancel_around_what_is_kept(source, tmp_path):
    """With all but one linear in fp16 the model differs from the original by that one alone."""
    token_ids = torch.arange(3, 35)[None].int()
    original = logits(source, token_ids)
    everything = logits(run(source, tmp_path / "all"), token_ids)
    whole = torch.norm(everything - original)
    others = {name: f"layers.1.{name}" for name in LINEARS}
    for name, fused in (("o", ("o",)), ("down", ("down",)), ("v", ("q", "k", "v"))):
        keep = [pattern for other, pattern in others.items() if other not in fused]
        alone = logits(run(source, tmp_path / name, "layers.0.*", *keep), token_ids)
        error = torch.norm(alone - original)
        assert 0 < error < 0.75 * whole, name
    # Kept v and up still take the scales of what reads them; nothing else is left to differ.
    keep = [pattern for other, pattern in others.items() if other not in ("o", "down")]
    both = logits(run(source, tmp_path / "both", "layers.0.*", *keep), token_ids)
    assert torch.norm(both - original) < 0.75 * whole


def test_what_is_kept_is_not_measured(source, tmp_path, monkeypatch):
    """Moments and the passes for them are the most that a tap costs; here o and down need none."""
    widths = []
    add = MomentSums.add

    def counted(self, exact, *others, **settings):
        widths.append(exact.shape[-1])
        add(self, exact, *others, **settings)

    monkeypatch.setattr(MomentSums, "add", counted)
    run(source, tmp_path / "whole")
    # Two layers, one batch: q, k and v take 64, o 64, gate and up 64, down 96.
    assert widths == [64, 64, 64, 96] * 2
    widths.clear()
    run(source, tmp_path / "awq", "*.o", "layers.1.down", "layers.0.q")
    assert widths == [64, 96, 64, 64]


def test_a_fused_module_of_the_checkpoint_stays_whole(tmp_path):
    folder, _ = internlm2_folder(tmp_path / "internlm2")
    options = QuantizeOptions(
        group_size=32, method="rtn", device="cpu", keep_fp16=("layers.1.q", "layers.0.up")
    )
    awq = quantize(folder, tmp_path / "work", tmp_path / "awq", options, Progress())
    source, stored = Checkpoint.open(folder), Checkpoint.open(awq)
    config = json.loads((awq / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == [
        "model.layers.0.feed_forward.w1",
        "model.layers.0.feed_forward.w3",
        "model.layers.0.feed_forward.gate_up_proj",
        "model.layers.1.attention.wqkv",
    ]
    module = "model.layers.1.attention.wqkv.weight"
    assert torch.equal(stored.tensor(module), source.tensor(module).half())
    assert stored.model.fp16_linears == ("layers.0.feed_forward.w13", "layers.1.attention.w_qkv")


def test_other_patterns_quantize_again_and_the_same_ones_do_not(source, tmp_path):
    run(source, tmp_path / "awq", "layers.0.o", method="rtn")
    notes = Notes()
    run(source, tmp_path / "awq", "layers.0.o", method="rtn", progress=notes)
    assert any("is up to date" in line for line in notes.lines)
    run(source, tmp_path / "awq", "layers.1.o", method="rtn")
    assert Checkpoint.open(tmp_path / "awq").model.fp16_linears == ("layers.1.attention.wo",)


def test_a_pattern_that_matches_nothing_stops_before_anything(source, tmp_path):
    with pytest.raises(UsageError, match=r"keep-fp16 'layers\.2\.\*' matches no linear"):
        run(source, tmp_path / "awq", "layers.2.*")
    assert not (tmp_path / "awq").exists()


def test_a_build_plans_and_packs_a_mixed_package(source, tmp_path):
    text = tiny.write_text(tmp_path / "words.txt")
    calibration = CalibrateOptions(str(text), num_samples=4, seqlen=32, device="cpu")
    options = BuildOptions(
        model_name="mixed",
        calibrate=calibration,
        group_size=32,
        keep_fp16=PATTERNS,
        head="int8",
        target="orin-nano-8gb",
        kernels="none",
    )
    notes = Notes()
    report = build(str(source), tmp_path / "x.tgz", tmp_path / "work", options, notes)
    package = open_package(extract_archive(report.archive, tmp_path / "device").root)
    assert package.model.fp16_linears == (
        "layers.0.attention.w_qkv",
        "layers.0.feed_forward.w2",
        "layers.1.feed_forward.w2",
    )
    assert report.memory[0].weight_bytes == weight_layout(package.model).num_bytes
    assert any(line.startswith("plan for orin-nano-8gb") for line in notes.lines)
    facts = collect_report(tmp_path / "work")
    parts = {part.name: part.num_files for part in facts.package.parts}
    # w_qkv of layer 0, w2 of both; the others are codes with scales, w13 being one.
    assert (parts["linears in 16 bits"], parts["4-bit codes"], parts["output head"]) == (3, 5, 2)
    kept = [
        f"{layer.layer}.{linear.linear}"
        for layer in facts.quantize.layers
        for linear in layer.linears
        if linear.w_bits == 16
    ]
    assert kept == ["0.q", "0.k", "0.v", "0.down", "1.down"]
