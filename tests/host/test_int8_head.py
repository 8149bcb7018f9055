"""The int8 output head: row scales, tied heads, what the engine makes of it."""

import numpy as np
import pytest
import torch
from test_convert_bytes import GQA_64, int4_tensors
from tiny_checkpoints import write_checkpoint
from tiny_tokenizer import write_tokenizer

from device_runtime.backends.cuda.weights import weight_layout
from device_runtime.engine.engine import Engine, EngineOptions
from device_runtime.errors import PackageError, UsageError
from device_runtime.package_format.package import open_package
from host_tools.convert import convert
from host_tools.int8_head import dequantize_rows, quantize_rows
from host_tools.package_options import BuildOptions, ConvertOptions
from host_tools.progress import Progress


def test_rows_by_hand():
    # Scale 254 / 127 = 2: 254 -> 127, -3 -> -1.5 -> -2 (ties to even), 0.9 -> 0.
    codes, scales = quantize_rows(torch.tensor([[254.0, -3.0, 0.9], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[127, -2, 0], [0, 0, 0]]
    assert scales.dtype == torch.float16 and scales.tolist() == [2.0, 0.0]


@pytest.mark.parametrize("size", [1e-7, 3e-6, 1e-3, 1.0, 3e4])
def test_no_weight_is_further_off_than_half_a_step(size):
    rows = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)) * size
    codes, scales = quantize_rows(rows)
    error = (dequantize_rows(codes, scales) - rows).abs()
    # Scales so small that fp16 has few digits for them are the next larger ones.
    assert torch.all(error <= scales.float().unsqueeze(1) * 0.5001)
    largest = rows.abs().amax(1) / 127
    assert torch.all(scales.float() <= largest * 1.001 + 2.0**-24)


def test_many_rows_are_taken_in_parts(monkeypatch):
    rows = torch.randn(50, 8)
    whole = quantize_rows(rows)
    monkeypatch.setattr("host_tools.int8_head.ROWS_AT_ONCE", 7)
    parts = quantize_rows(rows)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


def test_a_head_beyond_fp16_scales_is_refused():
    with pytest.raises(PackageError, match=r"output head reaches 9e\+06, beyond what an int8 head"):
        quantize_rows(torch.tensor([[9e6]]))


def write_awq(folder, *, is_tied):
    tensors = int4_tensors(GQA_64, 64)
    if is_tied:
        del tensors["lm_head.weight"]
    config = GQA_64.config(tie_word_embeddings=is_tied)
    write_tokenizer(write_checkpoint(folder, config, tensors))
    return folder


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_package_has_an_int8_head_of_its_own(tmp_path, is_tied):
    source = write_awq(tmp_path / "awq", is_tied=is_tied)
    packages = {}
    for head in ("fp16", "int8"):
        options = ConvertOptions("tiny", tp=2, head=head)
        packages[head] = open_package(convert(source, tmp_path / head, options, Progress()))
    half, int8 = packages["fp16"], packages["int8"]
    assert int8.model.head_type == "int8"
    assert int8.model.tie_word_embeddings == is_tied
    table = half.tensor("tok_embeddings.weight" if is_tied else "output.weight")
    codes, scales = int8.tensor("output.qweight"), int8.tensor("output.scales")
    want = quantize_rows(torch.from_numpy(table.copy()))
    assert np.array_equal(codes, want[0].numpy()) and np.array_equal(scales, want[1].numpy())
    embeddings = [package.tensor("tok_embeddings.weight") for package in (half, int8)]
    assert np.array_equal(*embeddings)
    # One byte a code and two a row, in the place of two bytes a weight where there was a table.
    rows, columns = codes.shape
    saved = rows * (columns - 2) if not is_tied else -rows * (columns + 2)
    assert half.weight_bytes - int8.weight_bytes == saved
    # On the device every tensor starts at 256 bytes and a bias that ranks share lies once.
    planned = weight_layout(int8.model).num_bytes - int8.weight_bytes
    assert abs(planned) < 256 * len(int8.specs)


def test_the_engine_gives_the_logits_of_the_rounded_head(tmp_path):
    source = write_awq(tmp_path / "awq", is_tied=True)
    token_ids = list(range(3, 40))
    logits = {}
    for head in ("fp16", "int8"):
        root = convert(source, tmp_path / head, ConvertOptions("tiny", head=head), Progress())
        with Engine.open(root, EngineOptions(backend="reference")) as engine:
            logits[head] = engine.logits(token_ids)
    difference = np.abs(logits["fp16"] - logits["int8"])
    assert 0 < difference.max() < 0.02 * np.abs(logits["fp16"]).max()


@pytest.mark.parametrize(
    "options", [lambda: ConvertOptions("tiny", head="int4"), lambda: BuildOptions(head="int4")]
)
def test_other_heads_are_refused(options):
    with pytest.raises(UsageError, match="head is 'int4', choose one of fp16, int8"):
        options()


def test_fp16_patterns_go_with_quantization():
    with pytest.raises(UsageError, match="keep-fp16 goes with a method that quantizes"):
        BuildOptions(method="none", keep_fp16=("*.down",))
