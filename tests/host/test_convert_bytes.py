"""Every weight file that convert writes, compared byte for byte with the specification's words."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from spec_workspace import awq_words, model_files, unpacked
from tiny_checkpoints import add_biases, llama_tensors, write_checkpoint
from tiny_tokenizer import VOCAB_SIZE, write_tokenizer

from host_tools.convert import convert
from host_tools.package_options import ConvertOptions
from host_tools.progress import Progress


@dataclass(frozen=True)
class Shape:
    """Sizes of one tiny model."""

    head_dim: int
    num_heads: int
    num_kv_heads: int
    hidden_size: int = 128
    intermediate_size: int = 256
    num_hidden_layers: int = 2
    vocab_size: int = VOCAB_SIZE + 1  # odd, so that ranks need padding rows

    def config(self, **more):
        return {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab_size,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 256,
            **more,
        }


MHA_64 = Shape(head_dim=64, num_heads=4, num_kv_heads=4)
GQA_64 = Shape(head_dim=64, num_heads=8, num_kv_heads=4)
GQA_128 = Shape(head_dim=128, num_heads=8, num_kv_heads=4)


def int4_tensors(shape, group_size, *, scales_dtype=torch.float16, seed=3, **more):
    """A checkpoint whose codes, zeros and scales are random over their whole range."""
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, value in llama_tensors(shape.config(**more)).items():
        if not name.endswith("_proj.weight"):
            tensors[name] = value
            continue
        outputs, inputs = value.shape
        module = name.removesuffix(".weight")
        groups = inputs // group_size
        codes = generator.integers(0, 16, (inputs, outputs), np.uint8)
        zeros = generator.integers(0, 16, (groups, outputs), np.uint8)
        tensors[f"{module}.qweight"] = torch.from_numpy(awq_words(codes))
        tensors[f"{module}.qzeros"] = torch.from_numpy(awq_words(zeros))
        scales = generator.uniform(1e-3, 0.1, (groups, outputs)).astype(np.float32)
        tensors[f"{module}.scales"] = torch.from_numpy(scales).to(scales_dtype)
    return tensors


def converted_files(tmp_path, config, tensors, tp):
    """Convert a checkpoint and return its weight files, name -> bytes."""
    source = write_checkpoint(tmp_path / "source", config, tensors)
    write_tokenizer(source)
    output = convert(source, tmp_path / "tm", ConvertOptions("tiny", tp=tp), Progress())
    files = (output / "triton_models" / "weights").iterdir()
    return {path.name: path.read_bytes() for path in files if path.name != "config.ini"}


def check(tmp_path, shape, config, tensors, tp, dtype=torch.float16):
    found = converted_files(tmp_path, config, tensors, tp)
    expected = model_files(tensors, shape, tp, dtype)
    assert sorted(found) == sorted(expected)
    for name, data in expected.items():
        assert found[name] == data, name


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("shape", [MHA_64, GQA_64, GQA_128], ids=["mha64", "gqa64", "gqa128"])
def test_float_weights_for_every_rank(tmp_path, shape, tp):
    check(tmp_path, shape, shape.config(), llama_tensors(shape.config()), tp)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("shape", "group_size"), [(MHA_64, 64), (GQA_64, 32), (GQA_128, 64)],
    ids=["mha64-g64", "gqa64-g32", "gqa128-g64"],
)  # fmt: skip
def test_int4_weights_for_every_rank(tmp_path, shape, group_size, tp):
    check(tmp_path, shape, shape.config(), int4_tensors(shape, group_size), tp)


def test_int4_weights_in_groups_of_128(tmp_path):
    check(tmp_path, GQA_128, GQA_128.config(), int4_tensors(GQA_128, 128), 2)


def test_fp32_scales_of_lmdeploy_are_rounded_to_fp16(tmp_path):
    tensors = int4_tensors(GQA_64, 64, scales_dtype=torch.float32)
    check(tmp_path, GQA_64, GQA_64.config(), tensors, 1)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("is_int4", [False, True], ids=["fp16", "int4"])
def test_biases_on_qkv_and_o_as_internlm_has_them(tmp_path, is_int4, tp):
    config = GQA_64.config(architectures=["InternLMForCausalLM"], bias=True)
    dense = llama_tensors(config)
    add_biases(dense, ("q_proj", "k_proj", "v_proj", "o_proj"))
    tensors = int4_tensors(GQA_64, 64) if is_int4 else dense
    tensors |= {name: value for name, value in dense.items() if name.endswith(".bias")}
    check(tmp_path, GQA_64, config, tensors, tp)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_missing_output_bias_is_written_as_zeros_as_for_qwen2(tmp_path, tp):
    config = GQA_64.config(architectures=["Qwen2ForCausalLM"])
    tensors = llama_tensors(config)
    add_biases(tensors, ("q_proj", "k_proj", "v_proj"))
    check(tmp_path, GQA_64, config, tensors, tp)


def test_a_tied_head_has_no_file(tmp_path):
    config = GQA_64.config(tie_word_embeddings=True)
    found = converted_files(tmp_path, config, llama_tensors(config), 1)
    assert "output.weight" not in found
    assert "tok_embeddings.weight" in found


def test_query_and_key_norms_are_permuted_like_their_heads(tmp_path):
    config = GQA_64.config(architectures=["Qwen3ForCausalLM"])
    tensors = llama_tensors(config)
    for layer in range(GQA_64.num_hidden_layers):
        for name in ("q_norm", "k_norm"):
            norm = torch.randn(64, generator=torch.Generator().manual_seed(layer)).half()
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = norm
    check(tmp_path, GQA_64, config, tensors, 1)


@pytest.mark.parametrize("tp", [1, 2])
def test_bf16_checkpoints_stay_bf16_bit_for_bit(tmp_path, tp):
    config = GQA_64.config(torch_dtype="bfloat16")
    tensors = llama_tensors(config, dtype=torch.bfloat16)
    check(tmp_path, GQA_64, config, tensors, tp, dtype=torch.bfloat16)


def test_fp32_checkpoints_are_rounded_to_fp16(tmp_path):
    tensors = llama_tensors(GQA_64.config(), dtype=torch.float32)
    check(tmp_path, GQA_64, GQA_64.config(torch_dtype="float32"), tensors, 1)


def test_floats_of_an_int4_model_are_fp16_even_from_bf16(tmp_path):
    tensors = int4_tensors(GQA_64, 64)
    for name, value in tensors.items():
        if value.dtype == torch.float16 and "scales" not in name:
            tensors[name] = value.to(torch.bfloat16)
    check(tmp_path, GQA_64, GQA_64.config(torch_dtype="bfloat16"), tensors, 1)


@dataclass(frozen=True)
class FusedFamily:
    """How a family's checkpoint differs from the Llama of the same weights."""

    architecture: str
    qkv: str
    is_grouped: bool
    names: dict
    config: dict
    has_bias: bool = False


def renamed(*pairs):
    return dict(pairs)


FUSED = {
    "internlm2": FusedFamily(
        "InternLM2ForCausalLM",
        "attention.wqkv",
        True,
        renamed(
            ("self_attn.o_proj", "attention.wo"), ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.up_proj", "feed_forward.w3"), ("mlp.down_proj", "feed_forward.w2"),
            ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
            ("model.embed_tokens", "model.tok_embeddings"), ("lm_head", "output"),
        ),
        {"bias": False},
    ),
    "baichuan2": FusedFamily("BaichuanForCausalLM", "self_attn.W_pack", False, {}, {}),
    "qwen": FusedFamily(
        "QWenLMHeadModel",
        "attn.c_attn",
        False,
        renamed(
            ("self_attn.o_proj", "attn.c_proj"), ("mlp.gate_proj", "mlp.w2"),
            ("mlp.up_proj", "mlp.w1"), ("mlp.down_proj", "mlp.c_proj"),
            ("input_layernorm", "ln_1"), ("post_attention_layernorm", "ln_2"),
            ("model.layers.", "transformer.h."), ("model.embed_tokens", "transformer.wte"),
            ("model.norm", "transformer.ln_f"),
        ),
        {
            "model_type": "qwen", "kv_channels": 128, "intermediate_size": 1024,
            "layer_norm_epsilon": 1e-5, "rotary_emb_base": 10000, "seq_length": 256,
        },
        has_bias=True,
    ),
}  # fmt: skip


def fused_rows(q, k, v, shape, is_grouped):
    """[rows, ...]: per KV head its queries, its key, its value; or all q, all k, all v."""
    if not is_grouped:
        return torch.cat([q, k, v])
    d, group = shape.head_dim, shape.num_heads // shape.num_kv_heads
    parts = []
    for head in range(shape.num_kv_heads):
        parts += [q[head * group * d : (head + 1) * group * d], k[head * d : (head + 1) * d]]
        parts.append(v[head * d : (head + 1) * d])
    return torch.cat(parts)


def fused_checkpoint(separate, family, shape):
    """The tensors under the family's names, q, k and v as one module."""

    def of(layer, part, kind):
        tensor = separate[f"model.layers.{layer}.self_attn.{part}_proj.{kind}"]
        if kind in ("qweight", "qzeros"):
            return torch.from_numpy(unpacked(tensor.numpy()).T.copy())
        return tensor.T if kind == "scales" else tensor

    tensors = {
        name: value
        for name, value in separate.items()
        if not any(f".{part}_proj." in name for part in "qkv")
    }
    for layer in range(shape.num_hidden_layers):
        for kind in ("weight", "bias", "qweight", "qzeros", "scales"):
            if f"model.layers.{layer}.self_attn.q_proj.{kind}" not in separate:
                continue
            rows = fused_rows(*(of(layer, p, kind) for p in "qkv"), shape, family.is_grouped)
            if kind in ("qweight", "qzeros"):
                rows = torch.from_numpy(awq_words(rows.numpy().T))
            elif kind == "scales":
                rows = rows.T.contiguous()
            tensors[f"model.layers.{layer}.{family.qkv}.{kind}"] = rows
    for old, new in family.names.items():
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
    return tensors


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("is_int4", [False, True], ids=["float", "int4"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_families_come_apart_into_the_same_files(tmp_path, name, is_int4, tp):
    family = FUSED[name]
    # Baichuan and Qwen-1 have as many KV heads as heads.
    shape = Shape(128, 4, 2 if family.is_grouped and tp < 4 else 4, 128, 512, 1)
    stated = shape.config(architectures=[family.architecture], **family.config)
    if not family.is_grouped:
        del stated["num_key_value_heads"]
    # LMDeploy writes float Qwen-1 as bf16 (spec section 1.2).
    dtype = torch.bfloat16 if name == "qwen" and not is_int4 else torch.float16
    dense = llama_tensors(shape.config(), dtype=dtype)
    if family.has_bias:
        add_biases(dense, ("q_proj", "k_proj", "v_proj"))
    separate = int4_tensors(shape, 128) if is_int4 else dict(dense)
    separate |= {key: value for key, value in dense.items() if key.endswith(".bias")}
    found = converted_files(tmp_path, stated, fused_checkpoint(separate, family, shape), tp)
    if name == "baichuan2":
        head = separate["lm_head.weight"]
        separate["lm_head.weight"] = torch.nn.functional.normalize(head)
    expected = model_files(separate, shape, tp, dtype)
    assert sorted(found) == sorted(expected)
    for key, data in expected.items():
        assert found[key] == data, key
