"""GGUF files become checkpoints that transformers runs with the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_gguf as tiny
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from device_runtime.errors import FetchError, PackageError, UsageError
from host_tools.fetch import FetchOptions, fetch
from host_tools.fetch import gguf as gguf_module
from host_tools.fetch.gguf_rope import llama3_divisors
from host_tools.origin import read_origin
from host_tools.progress import Progress


def converted(path: Path, output: Path) -> dict[str, np.ndarray]:
    fetch(str(path), output)
    return load_file(output / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False, "attention_bias": True}),
        ("qwen2", {"tie_word_embeddings": False}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_a_converted_model_gives_the_logits_of_the_original(
    tmp_path: Path, kind: str, settings: dict[str, object]
) -> None:
    model = tiny.random_model(kind, **settings)
    tiny.write_gguf(tmp_path / "m.gguf", model, kind)
    folder = fetch(str(tmp_path / "m.gguf"), tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    token_ids = torch.arange(40)[None] * 5 % tiny.VOCAB
    with torch.no_grad():
        expected, found = model(token_ids).logits, again(token_ids).logits
    # The weights are fp16 values on both sides, so nothing at all may differ.
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_internlm2_becomes_a_llama_checkpoint(tmp_path: Path) -> None:
    model = tiny.random_model("llama", tie_word_embeddings=False)
    tiny.write_gguf(tmp_path / "m.gguf", model, "internlm2")
    weights = converted(tmp_path / "m.gguf", tmp_path / "out")
    assert set(weights) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(weights[name], tensor.half().numpy(), err_msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_the_config_says_what_the_file_says(tmp_path: Path) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_model("llama", tie_word_embeddings=True))
    fetch(str(tmp_path / "m.gguf"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in tiny.SIZES} == tiny.SIZES
    assert config["tie_word_embeddings"] is True
    assert config["rope_scaling"] is None
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "BF16"])
def test_stored_blocks_become_the_fp16_of_their_values(tmp_path: Path, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    stored = tiny.write_gguf(tmp_path / "m.gguf", tiny.random_model("llama"), kind=kind)
    weights = converted(tmp_path / "m.gguf", tmp_path / "out")
    up = gguf.quants.dequantize(gguf.quants.quantize(stored["blk.1.ffn_up.weight"], kind), kind)
    np.testing.assert_array_equal(
        weights["model.layers.1.mlp.up_proj.weight"], up.astype(np.float16)
    )


def test_rows_come_in_parts_and_files_in_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_model("llama"))
    whole = converted(tmp_path / "m.gguf", tmp_path / "whole")
    monkeypatch.setattr(gguf_module, "PART_VALUES", 5 * tiny.HIDDEN)
    parts = converted(tmp_path / "m.gguf", tmp_path / "parts")
    assert list(parts) == list(whole)
    for name, tensor in whole.items():
        np.testing.assert_array_equal(parts[name], tensor, err_msg=name)


def test_llama3_rope_divisors_are_recognised(tmp_path: Path) -> None:
    # head_dim 16, theta 500000: wavelengths 2 pi 500000^(2i/16) are 6.3, 32, 167, 862, 4443,
    # 22908, ...: below 8192 / 4 nothing changes, above 8192 all of the factor, between a blend.
    held = llama3_divisors(500000.0, 16, 32.0)
    np.testing.assert_array_equal(held[:4], np.ones(4))
    np.testing.assert_allclose(held[5:], 32.0)
    # blend = (8192 / 4442.9 - 1) / 3 = 0.28128; 1 / (0.71872 / 32 + 0.28128) = 3.2923
    assert held[4] == pytest.approx(3.2923, abs=1e-3)
    tiny.write_gguf(
        tmp_path / "m.gguf",
        tiny.random_model("llama"),
        metadata={"llama.rope.freq_base": 500000.0},
        tensors={"rope_freqs.weight": held.astype(np.float32)},
    )
    fetch(str(tmp_path / "m.gguf"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_linear_rope_scaling_is_kept(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5}
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_model("llama"), metadata=metadata)
    fetch(str(tmp_path / "m.gguf"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.5}


def test_chat_template_and_stops_come_along(tmp_path: Path) -> None:
    vocabulary = tiny.Vocabulary(ids={"bos": 1, "eos": 0, "eot": 2, "padding": 0})
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_model("llama"), vocabulary=vocabulary)
    folder = fetch(str(tmp_path / "m.gguf"), tmp_path / "out")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    assert config["chat_template"] == tiny.CHAT_TEMPLATE
    assert (config["bos_token"], config["eos_token"]) == ("<|im_start|>", "<|endoftext|>")
    assert config["added_tokens_decoder"]["2"]["content"] == "<|im_end|>"
    assert generation == {"bos_token_id": 1, "eos_token_id": [0, 2], "pad_token_id": 0}


def test_a_second_fetch_changes_nothing_and_the_origin_is_written(tmp_path: Path) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_model("llama"))
    folder = fetch(str(tmp_path / "m.gguf"), tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}
    assert fetch(str(tmp_path / "m.gguf"), tmp_path / "out") == folder
    assert {path: path.stat().st_mtime_ns for path in before} == before
    provenance = read_origin(folder, is_quantized=False).provenance
    assert (provenance.source, provenance.source_kind) == ("m.gguf", "gguf")


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_model("llama"))
    folder = fetch(str(tmp_path / "m.gguf"), tmp_path / "out")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1])
    fetch(str(tmp_path / "m.gguf"), tmp_path / "out")
    assert (folder / "model.safetensors").read_bytes() == weights


def test_a_failed_conversion_leaves_no_checkpoint(tmp_path: Path) -> None:
    broken = np.full((tiny.VOCAB, tiny.HIDDEN), np.nan, np.float32)
    model = tiny.random_model("llama")
    tiny.write_gguf(tmp_path / "m.gguf", model, tensors={"token_embd.weight": broken})
    with pytest.raises(PackageError, match=r"'token_embd.weight' of m.gguf holds values beyond"):
        fetch(str(tmp_path / "m.gguf"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".turbojet"]
    tiny.write_gguf(tmp_path / "m.gguf", model)
    assert (fetch(str(tmp_path / "m.gguf"), tmp_path / "out") / "config.json").is_file()


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    large = np.full((tiny.HIDDEN,), 7e4, np.float32)
    model = tiny.random_model("llama")
    tiny.write_gguf(tmp_path / "m.gguf", model, tensors={"output_norm.weight": large})
    with pytest.raises(PackageError, match=r"'output_norm.weight' .* beyond the range of fp16"):
        fetch(str(tmp_path / "m.gguf"), tmp_path / "out")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_model("llama"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="out holds other files, name an empty folder"):
        fetch(str(tmp_path / "m.gguf"), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_folder_with_another_checkpoint_is_left_alone(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        tiny.write_gguf(tmp_path / name, tiny.random_model("llama"))
    fetch(str(tmp_path / "a.gguf"), tmp_path / "out")
    with pytest.raises(UsageError, match="out holds another checkpoint"):
        fetch(str(tmp_path / "b.gguf"), tmp_path / "out")


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_model("llama"))
    with pytest.raises(UsageError, match=r"m.gguf is a file, name a folder"):
        fetch(str(tmp_path / "m.gguf"), tmp_path / "m.gguf")


def test_download_options_do_not_go_with_a_file(tmp_path: Path) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_model("llama"))
    with pytest.raises(UsageError, match="revision, include, exclude and max-workers go with"):
        fetch(str(tmp_path / "m.gguf"), tmp_path / "out", FetchOptions(revision="v1"))


def test_a_full_disk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_gguf(tmp_path / "m.gguf", tiny.random_model("llama"))
    monkeypatch.setattr(gguf_module, "SPARE_BYTES", 1 << 62)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FetchError, match=r"m.gguf needs [\d.]+ GB in .*folder, but [\d.]+ .* free"):
        gguf_module.convert_gguf(tmp_path / "m.gguf", tmp_path / "folder", Progress())
    assert not list((tmp_path / "folder").iterdir())
