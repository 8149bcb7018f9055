"""AWQ, GPTQ and compressed-tensors checkpoints: read exactly, converted exactly, or refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import packed_checkpoints as packed
import pytest
import tiny_checkpoints as tiny
import torch
from packed_checkpoints import PACKINGS, Codes, compressed_config, gptq_config, packed_tensors
from transformers import LlamaForCausalLM

from device_runtime.engine.engine import Engine
from device_runtime.engine.options import EngineOptions
from device_runtime.errors import PackageError
from device_runtime.package_format.manifest import read_manifest
from host_tools.checkpoint import Checkpoint, QuantizedLinear
from host_tools.convert import convert
from host_tools.package_facts import MAX_RECIPE_CHARACTERS, quantization_method
from host_tools.package_options import ConvertOptions
from host_tools.progress import Progress

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "eos_token_id": 127,
    **tiny.SIZES,
    "intermediate_size": 128,
}
MODULE = "model.layers.1.mlp.down_proj"
ALL = list(PACKINGS)


def write(
    folder: Path, packing: str, size: int = 32, /, *, dtype=torch.float16, **section: object
) -> dict[str, Codes]:
    """Write a checkpoint of random codes; return what its linears hold."""
    tensors, linears = packed_tensors(tiny.llama_tensors(CONFIG), packing, size, dtype=dtype)
    stated = PACKINGS[packing][1](size if size > 0 else None)
    config = {**CONFIG, "quantization_config": {**stated, **section}}
    tiny.write_checkpoint(folder, config, tensors)
    tiny.write_tokenizer(folder)
    return linears


def change(folder: Path, tensors: dict, **section: object) -> None:
    """Change tensors (None removes one) and the quantization_config of a checkpoint."""
    changed = {**tiny.read_tensors(folder), **tensors}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**config["quantization_config"], **section}
    kept = {name: value for name, value in changed.items() if value is not None}
    tiny.write_checkpoint(folder, config, kept)


def linear_of(folder: Path, module: str = MODULE) -> QuantizedLinear:
    name = module.rsplit(".", 1)[-1].removesuffix("_proj")
    linear = Checkpoint.open(folder).layer(int(module.split(".")[2])).linear(name)
    assert isinstance(linear, QuantizedLinear)
    return linear


def converted(folder: Path, output: Path, tp: int = 1) -> dict[str, bytes]:
    convert(folder, output, ConvertOptions("tiny", tp=tp), Progress())
    weights = output / "triton_models" / "weights"
    return {path.name: path.read_bytes() for path in weights.iterdir()}


@pytest.mark.parametrize("packing", ALL)
def test_codes_zeros_and_scales_are_read_as_they_were_packed(tmp_path: Path, packing) -> None:
    linears = write(tmp_path, packing)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.is_quantized
    assert checkpoint.model.group_size == 32
    for module, expected in linears.items():
        found = linear_of(tmp_path, module)
        assert np.array_equal(found.codes.numpy(), expected.codes), module
        assert np.array_equal(found.zeros.numpy(), expected.zeros), module
        assert torch.equal(found.scales, expected.scales), module
        # The origin's own formula: a product of exact numbers, rounded to fp16 once.
        assert torch.equal(found.weight, expected.weight), module


@pytest.mark.parametrize("packing", ALL)
def test_the_engine_computes_what_the_dequantized_model_does(tmp_path: Path, packing) -> None:
    linears = write(tmp_path / "packed", packing)
    output = tmp_path / "tm"
    converted(tmp_path / "packed", output)
    dense = tiny.llama_tensors(CONFIG)
    dense |= {f"{module}.weight": linear.weight for module, linear in linears.items()}
    tiny.write_checkpoint(tmp_path / "dense", CONFIG, dense)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    token_ids = list(range(3, 43))
    with torch.no_grad():
        expected = model(torch.tensor([token_ids])).logits[0]
    with Engine.open(output, EngineOptions(backend="reference", quant_policy=0)) as engine:
        logits = torch.from_numpy(engine.logits(token_ids))
    cosine = torch.nn.functional.cosine_similarity(logits, expected, dim=-1)
    # The cache holds keys and values in fp16; everything else is fp32 on both sides.
    assert cosine.min() > 0.99999


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("packing", ["gptq", "gptq_v2", "gptqmodel", "symmetric", "asymmetric"])
def test_every_packing_becomes_the_workspace_of_the_same_awq(tmp_path: Path, packing, tp) -> None:
    linears = write(tmp_path / "packed", packing)
    tensors = {**tiny.llama_tensors(CONFIG)}
    for module, linear in linears.items():
        del tensors[f"{module}.weight"]
        tensors |= {f"{module}.{kind}": value for kind, value in packed.awq(linear).items()}
    tiny.write_checkpoint(tmp_path / "awq", CONFIG, tensors)
    tiny.write_tokenizer(tmp_path / "awq")
    expected = converted(tmp_path / "awq", tmp_path / "tm-awq", tp)
    assert converted(tmp_path / "packed", tmp_path / "tm", tp) == expected


@pytest.mark.parametrize("packing", ["gptq", "asymmetric"])
@pytest.mark.parametrize(("group_size", "run_as"), [(64, 64), (-1, 64)])
def test_a_whole_column_is_several_groups_of_one_scale(
    tmp_path: Path, packing, group_size, run_as
) -> None:
    linears = write(tmp_path, packing, group_size)
    # The inputs are 64 and 128, so whole columns are groups of 64 with repeated scales.
    assert Checkpoint.open(tmp_path).model.group_size == run_as
    for module, expected in linears.items():
        assert torch.equal(linear_of(tmp_path, module).weight, expected.weight), module


@pytest.mark.parametrize("packing", ["gptq", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_types_are_rounded_to_fp16(tmp_path: Path, packing, dtype) -> None:
    linears = write(tmp_path, packing, dtype=dtype)
    assert torch.equal(linear_of(tmp_path).scales, linears[MODULE].scales.half())


def test_autogptq_s_own_file_of_settings_is_read(tmp_path: Path) -> None:
    write(tmp_path, "gptq_v2")
    config = json.loads((tmp_path / "config.json").read_text())
    section = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps(section))
    expected = packed_tensors(tiny.llama_tensors(CONFIG), "gptq_v2", 32)[1][MODULE]
    assert np.array_equal(linear_of(tmp_path).zeros.numpy(), expected.zeros)


@pytest.mark.parametrize("has_index", [True, False])
def test_tensors_tell_gptq_where_nothing_else_does(tmp_path: Path, has_index) -> None:
    linears = write(tmp_path, "gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    tensors = tiny.read_tensors(tmp_path)
    kept = {name: v for name, v in tensors.items() if has_index or not name.endswith("g_idx")}
    tiny.write_checkpoint(tmp_path, config, kept)
    assert torch.equal(linear_of(tmp_path).weight, linears[MODULE].weight)


def test_biases_of_zeros_that_autogptq_adds_are_no_biases(tmp_path: Path) -> None:
    write(tmp_path, "gptq")
    change(tmp_path, {f"{MODULE}.bias": torch.zeros(64).half()})
    assert linear_of(tmp_path).bias is None
    change(tmp_path, {f"{MODULE}.bias": torch.ones(64).half()})
    with pytest.raises(PackageError, match=r"down_proj.bias is not zero, a llama has no such"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("packing", "recipe", "method"),
    [
        ("awq", "", "awq"),
        ("gptq", "", "gptq"),
        ("symmetric", "", "rtn"),
        ("symmetric", "GPTQModifier:\n  targets: Linear", "gptq"),
        ("asymmetric", "AWQModifier: {}\nGPTQModifier: {}", "awq+gptq"),
    ],
)
def test_the_manifest_says_how_the_weights_were_made(
    tmp_path: Path, packing, recipe, method
) -> None:
    write(tmp_path / "packed", packing)
    if recipe:
        (tmp_path / "packed" / "recipe.yaml").write_text(recipe)
    converted(tmp_path / "packed", tmp_path / "tm")
    quantization = read_manifest(tmp_path / "tm").quantization
    assert (quantization.method, quantization.group_size) == (method, 32)


def test_a_recipe_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    write(tmp_path, "symmetric")
    os.mkfifo(tmp_path / "recipe.yaml")
    # As full as a pipe can be, so that who reads it nevertheless does not wait for ever.
    pipe = os.open(tmp_path / "recipe.yaml", os.O_RDWR)
    os.write(pipe, b"GPTQModifier".ljust(MAX_RECIPE_CHARACTERS))
    try:
        assert quantization_method(Checkpoint.open(tmp_path)) == "rtn"
    finally:
        os.close(pipe)


def refused(folder: Path, complaint: str) -> None:
    with pytest.raises(PackageError, match=complaint):
        checkpoint = Checkpoint.open(folder)
        for layer in range(2):
            checkpoint.layer(layer)


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"bits": 8}, "gptq with 8 bits, turbojet reads 4"),
        ({"desc_act": True}, r"activation order \(desc_act\).* quantize it with desc_act false"),
        ({"checkpoint_format": "marlin"}, "gptq in the format marlin, turbojet reads gptq and"),
        ({"is_marlin_format": True}, "gptq in the format marlin"),
        ({"pack_dtype": "int16"}, "gptq packed in int16, expected int32"),
        ({"group_size": 64}, "config.json says group_size 64, the tensors have 32"),
    ],
)
def test_gptq_that_does_not_run_is_refused_by_name(tmp_path: Path, section, complaint) -> None:
    write(tmp_path, "gptq", **section)
    refused(tmp_path, complaint)


def _order(*, is_swapped: bool) -> torch.Tensor:
    order = torch.arange(128, dtype=torch.int32) // 32
    if is_swapped:
        order[[5, 40]] = order[[40, 5]]
    return order


GPTQ_DAMAGE = {
    "order": ({"g_idx": _order(is_swapped=True)}, "g_idx puts input 5 into group 1 instead of 0"),
    "order of another length": ({"g_idx": _order(is_swapped=False)[:64]}, "g_idx is .* means"),
    "floats for an order": ({"g_idx": torch.zeros(128)}, "g_idx is torch.float32 .* means"),
    "too few codes": (
        {"qweight": torch.zeros(8, 64, dtype=torch.int32)},
        "group_size 32, the tensors have 16",
    ),
    "codes of another width": ({"qweight": torch.zeros(16, 32, dtype=torch.int32)}, "no 4-bit GP"),
    "scales of one axis": ({"scales": torch.zeros(64).half()}, "no 4-bit GPTQ pair"),
    "no group": ({"scales": torch.zeros(0, 64).half()}, "has 128 inputs in 0 groups"),
    "no input": ({"qweight": torch.zeros(0, 64, dtype=torch.int32)}, "has 0 inputs in 4 groups"),
    "groups that do not divide": ({"scales": torch.ones(3, 64).half()}, "128 inputs in 3 groups"),
    "few zeros": ({"qzeros": torch.zeros(4, 7, dtype=torch.int32)}, "qzeros is .* means"),
    "no zeros": ({"qzeros": None}, "down_proj.qzeros is missing"),
    "no scales": ({"scales": None}, "down_proj.scales is missing"),
    "no codes": ({"qweight": None}, "down_proj.qweight is missing"),
    "an infinite scale": ({"scales": torch.full((4, 64), torch.inf).half()}, "NaN or infinity"),
    "a scale beyond fp16": ({"scales": torch.full((4, 64), 1e6)}, "a scale that fp16 cannot"),
    # A nibble of 15 is zero 16 to AutoGPTQ's one kernel, zero 0 to another.
    "a zero of two meanings": (
        {"qzeros": torch.full((4, 8), -1, dtype=torch.int32)},
        "stores a zero point of 15, which AutoGPTQ's kernels read as 16 or as 0",
    ),
}


@pytest.mark.parametrize("damage", GPTQ_DAMAGE)
def test_damaged_gptq_tensors_are_refused(tmp_path: Path, damage: str) -> None:
    tensors, complaint = GPTQ_DAMAGE[damage]
    write(tmp_path, "gptq")
    change(tmp_path, {f"{MODULE}.{kind}": value for kind, value in tensors.items()})
    refused(tmp_path, complaint)


def test_a_packed_config_without_packed_tensors_is_refused(tmp_path: Path) -> None:
    tensors = tiny.llama_tensors(CONFIG)
    for section, complaint in (
        (gptq_config(32), "says gptq, no tensor is called qweight"),
        (compressed_config(32, is_symmetric=True), "compressed-tensors, no tensor is called weigh"),
    ):
        tiny.write_checkpoint(tmp_path, {**CONFIG, "quantization_config": section}, tensors)
        refused(tmp_path, complaint)


def test_a_config_that_says_nothing_of_quantization_in_braces_is_float(tmp_path: Path) -> None:
    config = {**CONFIG, "quantization_config": {}}
    tiny.write_checkpoint(tmp_path, config, tiny.llama_tensors(CONFIG))
    assert not Checkpoint.open(tmp_path).is_quantized


def test_packed_tensors_without_their_config_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "symmetric")
    tiny.write_checkpoint(tmp_path, CONFIG, tiny.read_tensors(tmp_path))
    refused(tmp_path, "tensors called weight_packed, config.json has no quantization_config")


def test_a_quantized_head_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "gptq")
    head = packed.gptq(packed.random_codes(64, 128, 32, seed=9))
    change(tmp_path, {f"lm_head.{kind}": value for kind, value in head.items()})
    refused(tmp_path, "lm_head is quantized, turbojet runs a head of floating-point weights")


def test_groups_that_no_kernel_runs_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "gptq", 16)
    refused(tmp_path, r"has groups of 16 inputs \(group_size 16\), turbojet runs multiples of 32")
    write(tmp_path, "awq", 16)
    refused(tmp_path, r"is awq in groups of 16, turbojet runs 128, 64, 32; quantize it again")


def _weights(**changes: object) -> dict:
    scheme = compressed_config(32, is_symmetric=True)["config_groups"]["group_0"]
    return {"group_0": {**scheme, "weights": {**scheme["weights"], **changes}}}


SCHEME = _weights()["group_0"]
COMPRESSED_REFUSALS = {
    "format": ({"format": "marlin-24"}, "in the format marlin-24, turbojet reads pack-quantized"),
    "group's format": (
        {"config_groups": {"group_0": {**SCHEME, "format": "nvfp4-pack-quantized"}}},
        "in the format nvfp4-pack-quantized",
    ),
    "sparsity": ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "with sparsity sparse-24"),
    "kv cache": ({"kv_cache_scheme": {"num_bits": 8}}, r"KV cache \(kv_cache_scheme\)"),
    "transform": ({"transform_config": {"R1": 1}}, r"transforms of activations \(transform_con"),
    "no groups": ({"config_groups": {}}, "compressed-tensors without config_groups"),
    "no weights": ({"config_groups": {"g": {"weights": None}}}, "says g of config_groups without"),
    "no object": ({"config_groups": {"g": 3}}, "says g of config_groups without weights"),
    "activations": (
        {"config_groups": {"g": {**SCHEME, "input_activations": {"num_bits": 8}}}},
        "with input_activations in g, turbojet runs 4-bit weights with 16-bit activations",
    ),
    "actorder": ({"config_groups": _weights(actorder="group")}, r"activation order \(actorder gro"),
    "bits": ({"config_groups": _weights(num_bits=8)}, "weights of 8 bits, type int, strategy gr"),
    "type": ({"config_groups": _weights(type="float")}, "4 bits, type float, strategy group"),
    "strategy": ({"config_groups": _weights(strategy="tensor")}, "strategy tensor"),
    "group size that is none": (
        {"config_groups": _weights(group_size=[32])},
        r"says group_size \[32\] in group_0 of config_groups, expected an integer",
    ),
    "group size": ({"config_groups": _weights(group_size=64)}, "group_size 64, the tensors have"),
}


@pytest.mark.parametrize("name", COMPRESSED_REFUSALS)
def test_compressed_tensors_that_do_not_run_are_refused_by_name(tmp_path: Path, name) -> None:
    section, complaint = COMPRESSED_REFUSALS[name]
    write(tmp_path, "symmetric", **section)
    refused(tmp_path, complaint)


def test_an_activation_order_of_calibration_alone_changes_nothing(tmp_path: Path) -> None:
    linears = write(tmp_path, "symmetric", config_groups=_weights(actorder="static"))
    assert torch.equal(linear_of(tmp_path).weight, linears[MODULE].weight)


COMPRESSED_DAMAGE = {
    "order": (
        {"weight_g_idx": _order(is_swapped=True)},
        "weight_g_idx puts input 5 into group 1 instead of 0",
    ),
    "shape": ({"weight_shape": torch.tensor([64, 127])}, r"says \[64, 127\], config.json means"),
    "shape of floats": ({"weight_shape": torch.zeros(2)}, "weight_shape is torch.float32"),
    "no shape": ({"weight_shape": None}, "weight_shape is missing"),
    "codes": (
        {"weight_packed": torch.zeros(64, 8, dtype=torch.int32)},
        r"\[64, 8\].*|the tensors have 16",
    ),
    "codes and scales": ({"weight_scale": torch.ones(63, 4).half()}, "no 4-bit pack-quantized pai"),
    "no scales": ({"weight_scale": None}, "weight_scale is missing"),
    "no codes": ({"weight_packed": None}, "weight_packed is missing"),
    "no zeros": ({"weight_zero_point": None}, "weight_zero_point is missing"),
    "few zeros": ({"weight_zero_point": torch.zeros(7, 4, dtype=torch.int32)}, "zero_point is .*m"),
    "NaN": ({"weight_scale": torch.full((64, 4), torch.nan).half()}, "holds NaN or infinity"),
}


@pytest.mark.parametrize("damage", COMPRESSED_DAMAGE)
def test_damaged_compressed_tensors_are_refused(tmp_path: Path, damage: str) -> None:
    tensors, complaint = COMPRESSED_DAMAGE[damage]
    write(tmp_path, "asymmetric")
    change(tmp_path, {f"{MODULE}.{kind}": value for kind, value in tensors.items()})
    refused(tmp_path, complaint)


def test_two_schemes_of_one_model_are_told_apart_by_their_tensors(tmp_path: Path) -> None:
    linears = write(tmp_path, "asymmetric")
    even = Codes(linears[MODULE].codes, linears[MODULE].zeros * 0 + 8, linears[MODULE].scales)
    other = compressed_config(32, is_symmetric=False)["config_groups"]["group_0"]
    groups = {"group_0": SCHEME, "group_1": other}
    change(tmp_path, {f"{MODULE}.weight_zero_point": None}, config_groups=groups)
    assert torch.equal(linear_of(tmp_path).weight, even.weight)


@pytest.mark.parametrize("packing", ["gptq", "asymmetric"])
def test_a_fused_qkv_comes_apart_in_every_packing(tmp_path: Path, packing) -> None:
    shapes = {
        "attention.wqkv": (64, 128),
        "attention.wo": (64, 64),
        "feed_forward.w1": (64, 128),
        "feed_forward.w3": (64, 128),
        "feed_forward.w2": (128, 64),
    }
    pack, section, zeros = PACKINGS[packing]
    ours, awq = {}, {}
    for layer in range(2):
        for seed, (module, shape) in enumerate(shapes.items()):
            linear = packed.random_codes(*shape, 32, seed=10 * layer + seed, zeros=zeros)
            name = f"model.layers.{layer}.{module}"
            ours |= {f"{name}.{kind}": value for kind, value in pack(linear).items()}
            awq |= {f"{name}.{kind}": value for kind, value in packed.awq(linear).items()}
    renamed = {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output"}
    renamed |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
    others = {}
    for name, value in tiny.llama_tensors(CONFIG).items():
        if "_proj." not in name:
            for old, new in renamed.items():
                name = name.replace(old, new)
            others[name] = value
    config = {**CONFIG, "architectures": ["InternLM2ForCausalLM"], "bias": False}
    found = []
    for folder, tensors, stated in (
        ("packed", ours, {**config, "quantization_config": section(32)}),
        ("awq", awq, config),
    ):
        tiny.write_checkpoint(tmp_path / folder, stated, {**others, **tensors})
        tiny.write_tokenizer(tmp_path / folder)
        found.append(converted(tmp_path / folder, tmp_path / f"tm-{folder}", 2))
    assert found[0] == found[1]
