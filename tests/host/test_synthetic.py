"""Checkpoints whose weights are drawn when they are read: published shapes without downloads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from test_checkpoint import internlm2_folder

from device_runtime.errors import PackageError
from host_tools import measure_quantize
from host_tools.checkpoint import Checkpoint
from host_tools.checkpoint import synthetic as synthetic_module
from host_tools.checkpoint.synthetic import MARKER, write_synthetic

CONFIG = {"architectures": ["LlamaForCausalLM"], "attention_bias": True, **tiny.SIZES}


@pytest.fixture(autouse=True)
def small_pool(monkeypatch) -> None:
    monkeypatch.setattr(synthetic_module, "_POOL", 1 << 16)
    synthetic_module._pool.cache_clear()


def test_names_and_shapes_are_those_of_the_published_layout(tmp_path: Path) -> None:
    published, _ = internlm2_folder(tmp_path / "internlm2")
    config = json.loads((published / "config.json").read_text())
    real = Checkpoint.open(published)
    drawn = Checkpoint.open(write_synthetic(tmp_path / "drawn", config))
    assert drawn.names() == real.names()
    for name in real.names():
        assert drawn.tensor(name).shape == real.tensor(name).shape
    tied = write_synthetic(tmp_path / "tied", {**CONFIG, "tie_word_embeddings": True})
    assert "lm_head.weight" not in Checkpoint.open(tied).names()


def test_weights_depend_on_seed_and_name_alone(tmp_path: Path) -> None:
    folders = [
        write_synthetic(tmp_path / "a", CONFIG, seed=1),
        write_synthetic(tmp_path / "b", CONFIG, seed=1),
        write_synthetic(tmp_path / "c", CONFIG, seed=2),
    ]
    up, again, other = (Checkpoint.open(folder).layer(0).up.weight for folder in folders)
    assert torch.equal(up, again)
    assert not torch.equal(up, other)
    assert not torch.equal(up, Checkpoint.open(folders[0]).layer(1).up.weight)


def test_products_keep_the_size_of_their_inputs(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_synthetic(tmp_path / "a", CONFIG, dtype="bfloat16"))
    layer = checkpoint.layer(1)
    assert layer.up.weight.dtype == torch.bfloat16
    # 96 x 64 normal numbers over 8, the root of 64 inputs; three deviations of the estimate.
    assert layer.up.weight.float().std().item() == pytest.approx(1 / 8, rel=0.03)
    assert layer.attention_norm.float().log().std().item() == pytest.approx(0.5, rel=0.3)
    assert 0 < layer.o.bias.float().abs().max() < 0.2


@pytest.mark.parametrize(
    "marker",
    [
        {},
        {"seed": 0},
        {"seed": "0", "dtype": "float16"},
        {"seed": 0, "dtype": "int8"},
        {"seed": 0, "dtype": "float16", "more": 1},
    ],
)
def test_a_marker_that_says_something_else_is_refused(tmp_path: Path, marker: dict) -> None:
    folder = write_synthetic(tmp_path / "a", CONFIG)
    (folder / MARKER).write_text(json.dumps(marker))
    with pytest.raises(PackageError, match=f"{MARKER} says .* expected a whole seed and a dtype"):
        Checkpoint.open(folder)


def test_a_config_that_lies_does_not_become_memory(tmp_path: Path) -> None:
    folder = write_synthetic(tmp_path / "a", {**CONFIG, "vocab_size": 1 << 24, "hidden_size": 4096})
    # 2^24 x 2^12 numbers of 2 bytes are 2^37 bytes.
    with pytest.raises(
        PackageError, match=r"embed_tokens.weight of .* would have 137438953472 bytes"
    ):
        Checkpoint.open(folder)


def test_weight_files_come_before_the_marker(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "a")
    expected = Checkpoint.open(folder).layer(0).up.weight
    (folder / MARKER).write_text("{}")
    assert torch.equal(Checkpoint.open(folder).layer(0).up.weight, expected)


def test_a_published_shape_is_measured_from_end_to_end(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(measure_quantize.PUBLISHED, "internlm2-1.8b", CONFIG)
    arguments = ["--here", "--model", "internlm2-1.8b", "--layers", "2", "--samples", "2"]
    arguments += ["--seqlen", "32", "--group-size", "32", "--device", "cpu"]
    assert measure_quantize.main([*arguments, "--scratch", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_layers"], found["tokens"], found["device"]) == (2, [2, 32], "cpu")
    assert {"forward", "search", "packing", "disk"} <= set(found["quantize_times"]["seconds"])
    assert found["peak_anon_bytes"] > 0
    assert "model.safetensors" in found["outputs"]
    assert not list(tmp_path.iterdir())
    line = measure_quantize._line(found)
    assert line.startswith("internlm2-1.8b, 2 layers on cpu: ")
    assert "peak RssAnon" in line
