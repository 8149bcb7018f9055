"""Our decoder gives the logits of the models that the checkpoints were published for."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from test_checkpoint import internlm2_folder
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from device_runtime.errors import DeviceError
from host_tools.checkpoint import Checkpoint
from host_tools.decoder import stream
from host_tools.decoder.layer import Observer
from host_tools.decoder.rotary import Rotary
from host_tools.decoder.stream import Activations, LayerRunner, choose_device, head_logits

CPU = torch.device("cpu")
SEQLEN = 40
SIZES = {key: value for key, value in tiny.SIZES.items() if key != "rope_theta"}


def token_windows(num_samples: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, 128, (num_samples, SEQLEN), generator=generator, dtype=torch.int32)


def our_logits(folder: Path, token_ids: torch.Tensor) -> torch.Tensor:
    checkpoint = Checkpoint.open(folder)
    activations = Activations.embed(checkpoint, token_ids)
    runner = LayerRunner(checkpoint, token_ids.shape[1], CPU)
    for index in range(checkpoint.model.num_hidden_layers):
        runner.advance(runner.layer(index), activations)
    return torch.stack([head_logits(checkpoint, states, CPU) for states in activations.states])


def save_random(config: PretrainedConfig, model_class: type, folder: Path) -> PreTrainedModel:
    """Save a random model with every weight and bias away from its initial 0 or 1."""
    torch.manual_seed(3)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if "norm" in name else 0.05))
    model.save_pretrained(folder)
    return model


def rope(kind: str, **facts: float) -> dict:
    return {"rope_type": kind, "rope_theta": 10000.0, **facts}


LLAMA3 = rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama_tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama_biases": (LlamaConfig, LlamaForCausalLM, {"attention_bias": True}),
    "llama_head_dim": (LlamaConfig, LlamaForCausalLM, {"head_dim": 32}),
    "llama_linear": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": rope("linear", factor=4.0)},
    ),
    "llama3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "llama_dynamic": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": rope("dynamic", factor=2.0), "max_position_embeddings": 16},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    config_class, model_class, changes = MODELS[name]
    model = save_random(config_class(**{**SIZES, **changes}), model_class, tmp_path)
    token_ids = token_windows()
    with torch.no_grad():
        expected = model(token_ids.long()).logits
    logits = our_logits(tmp_path, token_ids)
    cosine = torch.nn.functional.cosine_similarity(logits, expected, dim=-1)
    assert cosine.min() > 0.9999
    # Sums of 64 products in fp32 in another order.
    assert (logits - expected).abs().max() < 1e-4


def test_internlm2_computes_what_the_same_llama_does(tmp_path: Path) -> None:
    folder, plain = internlm2_folder(tmp_path / "internlm2")
    config = {"architectures": ["LlamaForCausalLM"], "attention_bias": True, **tiny.SIZES}
    llama = tiny.write_checkpoint(tmp_path / "llama", config, plain)
    token_ids = token_windows()
    assert torch.equal(our_logits(folder, token_ids), our_logits(llama, token_ids))


def test_awq_codes_run_as_their_dequantized_weights(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "awq")
    config = json.loads((folder / "config.json").read_text())
    tensors = tiny.quantize_tensors(tiny.read_tensors(folder), 32)
    tiny.write_checkpoint(folder, config, tensors)
    quantized = Checkpoint.open(folder)
    dense = tiny.read_tensors(tiny.write_llama(tmp_path / "dense"))
    for layer in range(2):
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            module = f"{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj"
            weight = quantized.layer(layer).linear(name).weight
            dense[f"model.layers.{layer}.{module}.weight"] = weight
    tiny.write_checkpoint(tmp_path / "dense", config, dense)
    token_ids = token_windows()
    assert torch.equal(our_logits(folder, token_ids), our_logits(tmp_path / "dense", token_ids))


def test_large_activations_are_spilled_and_unchanged(tmp_path: Path, monkeypatch) -> None:
    checkpoint = Checkpoint.open(tiny.write_llama(tmp_path))
    token_ids = token_windows()
    kept = Activations.embed(checkpoint, token_ids)
    monkeypatch.setattr(stream, "SPILL_BYTES", 0)
    before = set(tmp_path.iterdir())
    spilled = Activations.embed(checkpoint, token_ids, tmp_path)
    assert torch.equal(spilled.states, kept.states)
    assert set(tmp_path.iterdir()) == before
    runner = LayerRunner(checkpoint, SEQLEN, CPU)
    for activations in (kept, spilled):
        runner.advance(runner.layer(0), activations)
    assert torch.equal(spilled.states, kept.states)


@pytest.mark.parametrize("is_named", [True, False])
def test_a_disk_without_room_for_activations_is_said(tmp_path: Path, monkeypatch, is_named) -> None:
    def full(descriptor: int, offset: int, num_bytes: int) -> None:
        assert (offset, num_bytes) == (0, 3 << 20)
        raise OSError(errno.ENOSPC, "No space left on device")

    usage = shutil.disk_usage(tmp_path)._replace(free=2 << 20)
    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: {tmp_path: usage}[folder])
    monkeypatch.setattr(stream, "SPILL_BYTES", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    elsewhere = "" if is_named else ", set TMPDIR to a larger disk"
    complaint = (
        rf"the activations need 3\.1 MB in {tmp_path}, which has 2\.1 MB free "
        rf"\(No space left on device\); make room there{elsewhere} or use fewer windows"
    )
    with pytest.raises(DeviceError, match=complaint):
        Activations.allocate((3, 1 << 10, 1 << 8), tmp_path if is_named else None)
    assert not list(tmp_path.iterdir())


def test_batches_cover_every_sample_once(tmp_path: Path) -> None:
    activations = Activations(torch.zeros(19, 512, 2))
    # 4096 tokens are 8 samples of 512.
    assert list(activations.batches()) == [slice(0, 8), slice(8, 16), slice(16, 24)]
    assert list(Activations(torch.zeros(2, 8192, 1)).batches()) == [slice(0, 1), slice(1, 2)]


class Recorder(Observer):
    def __init__(self) -> None:
        self.seen: dict[str, tuple] = {}

    def norm(self, name: str, outputs: torch.Tensor) -> None:
        self.seen[name] = (outputs.clone(),)

    def linear(self, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        self.seen[name] = (inputs.clone(), outputs.clone())

    def keys_values(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.seen["kv"] = (keys.clone(), values.clone())


def test_an_observer_sees_what_enters_and_leaves_each_linear(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny.write_llama(tmp_path))
    activations = Activations.embed(checkpoint, token_windows(1))
    hidden = activations.states.clone()
    runner, recorder = LayerRunner(checkpoint, SEQLEN, CPU), Recorder()
    layer = runner.layer(0)
    runner.advance(layer, activations, recorder)
    seen = recorder.seen
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        inputs, outputs = seen[name]
        assert torch.allclose(outputs, inputs @ layer.weights.linear(name).weight.T, atol=1e-5)
    assert torch.equal(seen["q"][0], seen["attention_norm"][0])
    assert torch.equal(seen["gate"][0], seen["ffn_norm"][0])
    assert torch.allclose(activations.states, hidden + seen["o"][1] + seen["down"][1], atol=1e-5)
    keys, values = seen["kv"]
    plain = seen["k"][1].view(1, SEQLEN, 2, 16).transpose(1, 2)
    assert torch.allclose(keys, runner.rotary.rotate(plain))
    assert torch.equal(values, seen["v"][1].view(1, SEQLEN, 2, 16).transpose(1, 2))


def test_a_pair_turns_by_position_times_frequency(tmp_path: Path) -> None:
    model = Checkpoint.open(tiny.write_llama(tmp_path)).model
    states = torch.zeros(3, 16)
    states[:, 1] = 1.0
    turned = Rotary.of(model, 3, CPU).rotate(states)
    # Pair 1 of 8 turns by position * 10000^(-2/16); its halves are elements 1 and 9.
    angle = torch.tensor(2 * 10000 ** (-2 / 16))
    assert torch.allclose(turned[2, 1], angle.cos())
    assert torch.allclose(turned[2, 9], angle.sin())


def test_a_gpu_that_is_not_there_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    with pytest.raises(DeviceError, match="torch sees no GPU here, use --device cpu or auto"):
        choose_device("cuda")
