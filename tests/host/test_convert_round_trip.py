"""What convert wrote, opened as a package and taken apart, is the checkpoint again."""

import numpy as np
import pytest
import torch
from test_convert_bytes import GQA_64, GQA_128, int4_tensors
from tiny_checkpoints import add_biases, llama_tensors, write_checkpoint
from tiny_tokenizer import write_tokenizer

from device_runtime.package_format import fusion, int4
from device_runtime.package_format.package import open_package
from device_runtime.package_format.rotary import to_halves
from host_tools.checkpoint import Checkpoint
from host_tools.convert import convert
from host_tools.package_options import ConvertOptions
from host_tools.progress import Progress


def convert_and_open(tmp_path, config, tensors, tp):
    source = write_checkpoint(tmp_path / "source", config, tensors)
    write_tokenizer(source)
    convert(source, tmp_path / "tm", ConvertOptions("tiny", tp=tp), Progress())
    return Checkpoint.open(source), open_package(tmp_path / "tm")


def split_qkv(package, layer, kind, read):
    """q, k and v of all ranks in the checkpoint's order of columns."""
    model = package.model
    parts = [
        read(package, f"layers.{layer}.attention.w_qkv.{rank}", kind)
        for rank in range(model.tensor_para_size)
    ]
    q, k, v = fusion.split_qkv(parts, model.num_attention_heads, model.num_kv_heads, model.head_dim)
    return to_halves(q, model.head_dim), to_halves(k, model.head_dim), v


def join(package, layer, module, kind, read):
    model = package.model
    parts = [
        read(package, f"layers.{layer}.{module}.{rank}", kind)
        for rank in range(model.tensor_para_size)
    ]
    is_rows = module.endswith(("wo", "w2"))
    return (fusion.join_rows if is_rows else fusion.join_columns)(parts)


def read_float(package, name, kind):
    return package.tensor(f"{name}.{kind}")


def read_int4(package, name, kind):
    """Codes, zeros or scales of one rank's linear."""
    packed = package.tensor(f"{name}.scales_zeros")
    scales, zeros = int4.unpack_scales_zeros(packed)
    if kind != "codes":
        return scales if kind == "scales" else zeros
    inputs = packed.shape[0] * package.model.group_size
    return int4.unpack_words(package.tensor(f"{name}.qweight"), inputs, packed.shape[1])


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("shape", [GQA_64, GQA_128], ids=["d64", "d128"])
def test_int4_checkpoints_come_back_code_for_code(tmp_path, shape, tp):
    tensors = int4_tensors(shape, 64)
    checkpoint, package = convert_and_open(tmp_path, shape.config(), tensors, tp)
    for layer in range(shape.num_hidden_layers):
        source = checkpoint.layer(layer)
        for kind in ("codes", "zeros", "scales"):
            found = dict(zip("qkv", split_qkv(package, layer, kind, read_int4), strict=True))
            found["o"] = join(package, layer, "attention.wo", kind, read_int4)
            found["down"] = join(package, layer, "feed_forward.w2", kind, read_int4)
            w13 = join(package, layer, "feed_forward.w13", kind, read_int4)
            found["gate"], found["up"] = fusion.split_w13(w13)
            for name, value in found.items():
                expected = getattr(source.linear(name), kind).numpy()
                assert np.array_equal(value, expected), (layer, name, kind)


@pytest.mark.parametrize("tp", [1, 4])
def test_float_checkpoints_come_back_bit_for_bit(tmp_path, tp):
    config = GQA_64.config(architectures=["InternLMForCausalLM"], bias=True)
    tensors = llama_tensors(config)
    add_biases(tensors, ("q_proj", "k_proj", "v_proj", "o_proj"))
    checkpoint, package = convert_and_open(tmp_path, config, tensors, tp)
    for layer in range(2):
        source = checkpoint.layer(layer)
        weights = dict(zip("qkv", split_qkv(package, layer, "weight", read_float), strict=True))
        for name, module in (
            ("o", "attention.wo"),
            ("gate", "feed_forward.w1"),
            ("up", "feed_forward.w3"),
            ("down", "feed_forward.w2"),
        ):
            weights[name] = join(package, layer, module, "weight", read_float)
        for name, value in weights.items():
            assert np.array_equal(value.T, source.linear(name).weight.numpy()), (layer, name)
        biases = split_qkv(package, layer, "bias", read_float)
        for name, value in zip("qkv", biases, strict=True):
            assert np.array_equal(value, source.linear(name).bias.numpy()), (layer, name)
    assert np.array_equal(
        package.tensor("tok_embeddings.weight")[: GQA_64.vocab_size],
        checkpoint.embedding().numpy(),
    )


def test_bf16_bits_come_back(tmp_path):
    config = GQA_64.config(torch_dtype="bfloat16")
    tensors = llama_tensors(config, dtype=torch.bfloat16)
    checkpoint, package = convert_and_open(tmp_path, config, tensors, 1)
    assert package.model.weight_type == "bf16"
    found = torch.from_numpy(package.tensor("output.weight").view(np.int16).copy())
    assert torch.equal(found.view(torch.bfloat16), checkpoint.head())
