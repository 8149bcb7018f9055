"""Checkpoints open in every supported layout and hand out the same logical weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import save_file

from device_runtime.errors import PackageError
from device_runtime.package_format import int4
from device_runtime.package_format.model_config import RopeScaling
from host_tools.checkpoint import Checkpoint, DenseLinear, QuantizedLinear
from host_tools.checkpoint.families import LINEARS, find_family
from host_tools.checkpoint.linear_weights import join_qkv_rows, linear_shape, split_qkv_rows


def edit_config(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_the_config_becomes_the_model(tmp_path: Path) -> None:
    model = Checkpoint.open(tiny.write_llama(tmp_path, tie_word_embeddings=True)).model
    assert (model.hidden_size, model.intermediate_size, model.head_dim) == (64, 96, 16)
    assert (model.num_attention_heads, model.num_kv_heads, model.vocab_size) == (4, 2, 128)
    assert model.weight_type == "fp16"
    assert model.group_size == 0
    assert model.tie_word_embeddings
    assert not model.has_attention_bias
    assert model.rope_scaling == RopeScaling()


def test_dense_weights_are_the_files_own(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny.write_llama(tmp_path))
    tensors = tiny.read_tensors(tmp_path)
    layer = checkpoint.layer(1)
    for name in LINEARS:
        module = "self_attn" if name in "qkvo" else "mlp"
        expected = tensors[f"model.layers.1.{module}.{name}_proj.weight"]
        assert torch.equal(layer.linear(name).weight, expected)
        assert tuple(expected.shape) == linear_shape(checkpoint.model, name)
    assert torch.equal(layer.ffn_norm, tensors["model.layers.1.post_attention_layernorm.weight"])
    assert torch.equal(checkpoint.head(), tensors["lm_head.weight"])
    assert checkpoint.names() == sorted(tensors)


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny.write_llama(tmp_path, tie_word_embeddings=True))
    assert torch.equal(checkpoint.head(), checkpoint.embedding())


def test_a_head_that_is_stored_though_tied_must_be_the_embedding(tmp_path: Path) -> None:
    folder = edit_config(tiny.write_llama(tmp_path), tie_word_embeddings=True)
    tensors = tiny.read_tensors(folder)
    with pytest.raises(
        PackageError,
        match=r'"tie_word_embeddings": true, but lm_head\.weight differs from '
        r"model\.embed_tokens\.weight; say false to use it, or remove it",
    ):
        Checkpoint.open(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    checkpoint = Checkpoint.open(folder)
    assert torch.equal(checkpoint.head(), checkpoint.embedding())


def test_a_missing_head_is_named_and_how_a_tied_one_is_declared(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path)
    tensors = tiny.read_tensors(folder)
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        PackageError,
        match=r'the output head lm_head\.weight is missing in .* says "tie_word_embeddings": true$',
    ):
        Checkpoint.open(folder)
    tied = Checkpoint.open(edit_config(folder, tie_word_embeddings=True))
    assert torch.equal(tied.head(), tied.embedding())


def test_shards_and_torch_files_hold_the_same_model(tmp_path: Path) -> None:
    whole = tiny.write_llama(tmp_path / "whole")
    tensors = tiny.read_tensors(whole)
    sharded = tiny.write_llama(tmp_path / "sharded")
    tiny.write_shards(sharded, tensors, 3)
    pickled = tiny.write_llama(tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(tensors, pickled / "pytorch_model.bin")
    expected = Checkpoint.open(whole).layer(0).down.weight
    for folder in (sharded, pickled):
        assert torch.equal(Checkpoint.open(folder).layer(0).down.weight, expected)


@pytest.mark.parametrize(
    ("whole", "index"),
    [
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ],
)
def test_a_whole_file_beside_an_index_of_others_is_refused(
    tmp_path: Path, whole: str, index: str
) -> None:
    """Somebody saved a merged model over shards; transformers reads the file, we the shards."""
    folder = tiny.write_llama(tmp_path)
    tensors = tiny.read_tensors(folder)
    tiny.write_shards(folder, tensors, 2)
    if whole.endswith(".bin"):
        for path in folder.glob("model*"):
            path.unlink()
        torch.save(tensors, folder / "pytorch_model-00001-of-00001.bin")
        weight_map = dict.fromkeys(tensors, "pytorch_model-00001-of-00001.bin")
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    Checkpoint.open(folder)
    (folder / whole).write_bytes(b"newer")
    with pytest.raises(PackageError, match=f"has {whole} beside {index}, which names other files"):
        Checkpoint.open(folder)


def test_the_same_weights_in_their_makers_layout_are_left_alone(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path)
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert "lm_head.weight" in Checkpoint.open(folder).names()
    (folder / "model.safetensors").unlink()
    with pytest.raises(PackageError, match=r"has no model\.safetensors, pytorch_model"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_float_types_are_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = Checkpoint.open(tiny.write_llama(tmp_path, dtype=dtype))
    assert checkpoint.dtype == dtype
    assert checkpoint.layer(0).q.weight.dtype == dtype


def test_internlm_has_biases_on_q_k_v_and_o(tmp_path: Path) -> None:
    config = {"architectures": ["InternLMForCausalLM"], "bias": True, **tiny.SIZES}
    tensors = tiny.llama_tensors(config)
    tiny.add_biases(tensors, ("q_proj", "k_proj", "v_proj", "o_proj"))
    checkpoint = Checkpoint.open(tiny.write_checkpoint(tmp_path, config, tensors))
    layer = checkpoint.layer(0)
    assert checkpoint.model.has_attention_bias
    assert torch.equal(layer.o.bias, tensors["model.layers.0.self_attn.o_proj.bias"])
    assert layer.down.bias is None


def test_qwen2_has_biases_on_q_k_and_v_alone(tmp_path: Path) -> None:
    config = {"architectures": ["Qwen2ForCausalLM"], **tiny.SIZES}
    tensors = tiny.llama_tensors(config)
    tiny.add_biases(tensors, ("q_proj", "k_proj", "v_proj"))
    layer = Checkpoint.open(tiny.write_checkpoint(tmp_path, config, tensors)).layer(1)
    assert torch.equal(layer.v.bias, tensors["model.layers.1.self_attn.v_proj.bias"])
    assert layer.o.bias is None


def internlm2_folder(folder: Path, *, group_size: int = 0) -> tuple[Path, dict]:
    """An InternLM2 folder, and the same weights under Llama's names."""
    config = {"architectures": ["InternLM2ForCausalLM"], "bias": True, **tiny.SIZES}
    plain = tiny.llama_tensors(config)
    tiny.add_biases(plain, ("q_proj", "k_proj", "v_proj", "o_proj"))
    source = tiny.quantize_tensors(plain, group_size) if group_size else plain
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    tensors = {}
    for name, value in source.items():
        if name.endswith((".q_proj.bias", ".k_proj.bias", ".v_proj.bias")) or "_proj" not in name:
            renamed = name.replace("embed_tokens", "tok_embeddings").replace("lm_head", "output")
            renamed = renamed.replace("input_layernorm", "attention_norm")
            tensors[renamed.replace("post_attention_layernorm", "ffn_norm")] = value
        elif ".mlp." in name:
            module, kind = name.split(".")[-2:]
            prefix = name.split(".mlp.")[0]
            tensors[f"{prefix}.feed_forward.{names[module]}.{kind}"] = value
        elif ".o_proj." in name:
            tensors[name.replace("self_attn.o_proj", "attention.wo")] = value
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for kind in ("qweight", "qzeros", "scales", "bias") if group_size else ("weight", "bias"):
            parts = [source[f"{prefix}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            tensors.pop(f"{prefix}self_attn.q_proj.bias", None)
            tensors.pop(f"{prefix}self_attn.k_proj.bias", None)
            tensors.pop(f"{prefix}self_attn.v_proj.bias", None)
            # Two kv heads of 16: [q0 q1 k0 v0] [q2 q3 k1 v1], along rows or along columns / 8.
            axis = 0 if kind in ("weight", "bias") else 1
            unit = 2 if kind in ("qweight", "qzeros") else 16
            q, k, v = (part.split(unit, dim=axis) for part in parts)
            groups = [*q[:2], k[0], v[0], *q[2:], k[1], v[1]]
            tensors[f"{prefix}attention.wqkv.{kind}"] = torch.cat(groups, dim=axis)
    tiny.write_checkpoint(folder, config, {key: v.contiguous() for key, v in tensors.items()})
    return folder, plain


def test_internlm2_rows_are_taken_apart_per_kv_head(tmp_path: Path) -> None:
    folder, plain = internlm2_folder(tmp_path)
    layer = Checkpoint.open(folder).layer(1)
    for name in "qkv":
        module = f"model.layers.1.self_attn.{name}_proj"
        assert torch.equal(layer.linear(name).weight, plain[f"{module}.weight"])
        assert torch.equal(layer.linear(name).bias, plain[f"{module}.bias"])


def test_internlm2_codes_are_taken_apart_per_kv_head(tmp_path: Path) -> None:
    folder, plain = internlm2_folder(tmp_path, group_size=32)
    layer = Checkpoint.open(folder).layer(0)
    codes = tiny.quantize_tensors(plain, 32)["model.layers.0.self_attn.k_proj.qweight"]
    assert isinstance(layer.k, QuantizedLinear)
    assert torch.equal(layer.k.codes, torch.from_numpy(int4.unpack_awq(codes.numpy())))


def test_joining_qkv_is_the_inverse_of_splitting(tmp_path: Path) -> None:
    model = Checkpoint.open(tiny.write_llama(tmp_path)).model
    rows = torch.arange(model.qkv_size)
    parts = split_qkv_rows("grouped", rows, model)
    # Head 1 of the queries follows head 0 in the group; the key head comes after both.
    assert parts[0][16] == 16
    assert parts[1][0] == 32
    assert parts[2][16] == 64 + 48
    assert torch.equal(join_qkv_rows("grouped", *parts, model), rows)


@pytest.mark.parametrize("scales_dtype", [torch.float16, torch.float32])
def test_awq_codes_dequantize_as_the_kernels_do(tmp_path: Path, scales_dtype) -> None:
    folder = tiny.write_llama(tmp_path)
    tensors = tiny.quantize_tensors(tiny.read_tensors(folder), 32, scales_dtype=scales_dtype)
    tiny.write_checkpoint(folder, json.loads((folder / "config.json").read_text()), tensors)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.is_quantized
    assert (checkpoint.model.weight_type, checkpoint.model.group_size) == ("int4", 32)
    linear = checkpoint.layer(0).gate
    module = "model.layers.0.mlp.gate_proj"
    codes = int4.unpack_awq(tensors[f"{module}.qweight"].numpy()).astype(int)
    zeros = int4.unpack_awq(tensors[f"{module}.qzeros"].numpy()).astype(int)
    scales = tensors[f"{module}.scales"].half().float().numpy()
    value = ((codes - zeros.repeat(32, 0)) * scales.repeat(32, 0)).astype("float16")
    assert linear.weight.T.numpy().tobytes() == value.tobytes()


def test_a_stated_quantization_must_agree_with_the_tensors(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path)
    tensors = tiny.quantize_tensors(tiny.read_tensors(folder), 32)
    config = json.loads((folder / "config.json").read_text())
    section = {"quant_method": "awq", "version": "GEMM", "w_bit": 4, "q_group_size": 32}
    tiny.write_checkpoint(folder, {**config, "quantization_config": section}, tensors)
    assert Checkpoint.open(folder).model.group_size == 32
    section["q_group_size"] = 64
    tiny.write_checkpoint(folder, {**config, "quantization_config": section}, tensors)
    with pytest.raises(PackageError, match="says group_size 64, the tensors have 32"):
        Checkpoint.open(folder)
    for change, complaint in (
        ({"quant_method": "hqq"}, "quantized with hqq, turbojet reads awq, gptq, compressed-ten"),
        ({"quant_method": "gptq"}, "are no 4-bit GPTQ pair"),
        ({"version": "gemv"}, "awq gemv with 4 bits"),
        ({"w_bit": 8}, "awq gemm with 8 bits"),
    ):
        edit_config(folder, quantization_config={**section, "q_group_size": 32, **change})
        with pytest.raises(PackageError, match=complaint):
            Checkpoint.open(folder)


def test_layers_left_in_floats_are_read_as_such(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path)
    plain = tiny.read_tensors(folder)
    mixed = {**plain}
    for name, value in tiny.quantize_tensors(plain, 32).items():
        if "layers.1." in name and name not in plain:
            mixed[name] = value
            mixed.pop(name.rsplit(".", 1)[0] + ".weight", None)
    tiny.write_checkpoint(folder, json.loads((folder / "config.json").read_text()), mixed)
    checkpoint = Checkpoint.open(folder)
    assert isinstance(checkpoint.layer(0).q, DenseLinear)
    assert isinstance(checkpoint.layer(1).q, QuantizedLinear)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("changes", "theta", "scaling"),
    [
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3},
            5e5,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 1e4, RopeScaling("dynamic", 2.0)),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, 1e4, RopeScaling("linear", 4.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}, 7e4, RopeScaling()),
    ],
)
def test_both_spellings_of_rope_are_read(tmp_path: Path, changes, theta, scaling) -> None:
    model = Checkpoint.open(tiny.write_llama(tmp_path, **changes)).model
    assert (model.rope_theta, model.rope_scaling) == (theta, scaling)


def test_a_sliding_window_limits_the_context(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path, architectures=["MistralForCausalLM"], sliding_window=32)
    model = Checkpoint.open(folder).model
    assert (model.max_position_embeddings, model.sliding_window, model.context_tokens) == (
        64,
        32,
        32,
    )
    edit_config(folder, use_sliding_window=False)
    assert Checkpoint.open(folder).model.sliding_window == 0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture 'MambaForCausalLM' is not one"),
        ({"architectures": None}, "config.json has no architectures, expected a list of one name"),
        ({"mlp_bias": True}, "asks for biases in the MLP"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', turbojet runs silu"),
        ({"hidden_act": 3}, "hidden_act 3, expected a string"),
        ({"hidden_size": True}, "hidden_size True, expected an integer"),
        ({"hidden_size": 66}, "hidden_size 66, which num_attention_heads 4 does not divide"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, expected an integer from 1"),
        ({"rms_norm_eps": -1}, "rms_norm_eps -1, expected a positive number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings 'false', expected true or false"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "rope scaling 'yarn', turbojet runs"),
        ({"rope_scaling": "dynamic"}, "rope_scaling 'dynamic', expected an object"),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_scaling in config.json has no factor, expected a positive number",
        ),
        ({"partial_rotary_factor": 0.5, "rope_scaling": LLAMA3}, "partial rotary embeddings"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, "model.layers.1..* has no place in a llama model with 1 layers"),
        ({"intermediate_size": 128}, r"gate_proj.weight is .*\[96, 64\].* means \[128, 64\]"),
        ({"vocab_size": 10_000_000}, r"embed_tokens.weight is .*means \[10000000, 64\]"),
        ({"quantization_config": []}, "quantization_config that is no object"),
        (
            {"quantization_config": {"load_in_8bit": True}},
            "quantized with a method without a name, turbojet reads awq, gptq",
        ),
        (
            {"quantization_config": {"quant_method": "awq", "group_size": 64}},
            "config.json says awq, no tensor is called qweight, fetch it again",
        ),
    ],
)
def test_a_config_that_lies_is_refused(tmp_path: Path, changes, complaint: str) -> None:
    folder = edit_config(tiny.write_llama(tmp_path), **changes)
    with pytest.raises(PackageError, match=complaint):
        Checkpoint.open(folder)


def test_every_architecture_leads_to_one_table() -> None:
    assert find_family("InternLM2ForCausalLM").name == "internlm2"
    assert find_family("Qwen3ForCausalLM").has_qk_norm
    with pytest.raises(ValueError, match="qkv layout separate is not fused"):
        split_qkv_rows("separate", torch.zeros(1), None)
    with pytest.raises(ValueError, match="qkv layout separate is not fused"):
        join_qkv_rows("separate", torch.zeros(1), torch.zeros(1), torch.zeros(1), None)
