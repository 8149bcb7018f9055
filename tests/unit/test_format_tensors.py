import dataclasses

import numpy as np
import pytest
from format_samples import FP16, INT4

from device_runtime.errors import PackageError
from device_runtime.package_format import names
from device_runtime.package_format.model_config import ModelConfig, RopeScaling
from device_runtime.package_format.tensors import linear_shapes, padded_vocab_size, tensor_specs


def table(model, **options):
    return {s.name: (s.dtype.str, s.shape, s.split) for s in tensor_specs(model, **options)}


EVERY_LINEAR = tuple(
    names.layer_linear(layer, module) for layer in range(2) for module in names.LAYER_LINEARS
)


def test_every_file_of_a_float_model():
    # hidden 64, inner 96, 2 heads of 32 with 1 kv head: w_qkv has (2 + 2) * 32 = 128 columns.
    one_layer = dataclasses.replace(FP16, num_hidden_layers=1)
    assert table(one_layer, has_kv_scales=False) == {
        "tok_embeddings.weight": ("<f2", (70, 64), "none"),
        "norm.weight": ("<f2", (64,), "none"),
        "output.weight": ("<f2", (70, 64), "none"),
        "layers.0.attention_norm.weight": ("<f2", (64,), "none"),
        "layers.0.ffn_norm.weight": ("<f2", (64,), "none"),
        "layers.0.attention.w_qkv.0.weight": ("<f2", (64, 128), "columns"),
        "layers.0.attention.wo.0.weight": ("<f2", (64, 64), "rows"),
        "layers.0.feed_forward.w1.0.weight": ("<f2", (64, 96), "columns"),
        "layers.0.feed_forward.w3.0.weight": ("<f2", (64, 96), "columns"),
        "layers.0.feed_forward.w2.0.weight": ("<f2", (96, 64), "rows"),
    }


def test_every_file_of_an_int4_model():
    # Words are inputs * outputs / 8; groups of 32 inputs make 2 or 3 rows of scales.
    one_layer = dataclasses.replace(INT4, num_hidden_layers=1)
    assert table(one_layer) == {
        "tok_embeddings.weight": ("<f2", (70, 64), "none"),
        "norm.weight": ("<f2", (64,), "none"),
        "output.weight": ("<f2", (70, 64), "none"),
        "layers.0.attention_norm.weight": ("<f2", (64,), "none"),
        "layers.0.ffn_norm.weight": ("<f2", (64,), "none"),
        "layers.0.attention.w_qkv.0.qweight": ("<u4", (1024,), "columns"),
        "layers.0.attention.w_qkv.0.scales_zeros": ("<u4", (2, 128), "columns"),
        "layers.0.attention.wo.0.qweight": ("<u4", (512,), "rows"),
        "layers.0.attention.wo.0.scales_zeros": ("<u4", (2, 64), "rows"),
        "layers.0.feed_forward.w13.0.qweight": ("<u4", (1536,), "columns"),
        "layers.0.feed_forward.w13.0.scales_zeros": ("<u4", (2, 192), "columns"),
        "layers.0.feed_forward.w2.0.qweight": ("<u4", (768,), "rows"),
        "layers.0.feed_forward.w2.0.scales_zeros": ("<u4", (3, 64), "rows"),
        "layers.0.past_kv_scale.0.weight": ("<f4", (4,), "columns"),
    }


def test_ranks_split_columns_and_rows_and_repeat_the_bias_of_wo():
    model = dataclasses.replace(
        FP16, num_attention_heads=4, num_kv_heads=2, tensor_para_size=2, has_attention_bias=True
    )
    specs = table(model)
    # 4 query and 2 kv heads of 32: (4 + 2 * 2) * 32 / 2 = 128 columns a rank; 4 * 32 / 2 rows.
    for rank in (0, 1):
        assert specs[f"layers.1.attention.w_qkv.{rank}.weight"] == ("<f2", (64, 128), "columns")
        assert specs[f"layers.1.attention.w_qkv.{rank}.bias"] == ("<f2", (128,), "columns")
        assert specs[f"layers.1.attention.wo.{rank}.weight"] == ("<f2", (64, 64), "rows")
        assert specs[f"layers.1.attention.wo.{rank}.bias"] == ("<f2", (64,), "copy")
        assert specs[f"layers.1.feed_forward.w1.{rank}.weight"] == ("<f2", (64, 48), "columns")
        assert specs[f"layers.1.feed_forward.w2.{rank}.weight"] == ("<f2", (48, 64), "rows")
        assert specs[f"layers.1.past_kv_scale.{rank}.weight"] == ("<f4", (4,), "columns")


def test_the_vocabulary_is_padded_to_the_ranks():
    model = dataclasses.replace(
        FP16, vocab_size=71, num_attention_heads=4, num_kv_heads=4, tensor_para_size=4
    )
    assert padded_vocab_size(model) == 72
    assert table(model)["output.weight"] == ("<f2", (72, 64), "none")


def test_bfloat16_models_hold_its_bits_everywhere():
    model = dataclasses.replace(FP16, weight_type="bf16", has_attention_bias=True)
    dtypes = {s.dtype.str for s in tensor_specs(model, has_kv_scales=False)}
    assert dtypes == {"<u2"}


def test_a_tied_head_has_no_file():
    tied = dataclasses.replace(INT4, tie_word_embeddings=True)
    assert table(INT4).keys() - table(tied).keys() == {"output.weight"}
    assert table(tied).keys() <= table(INT4).keys()


@pytest.mark.parametrize("is_tied", [False, True])
def test_an_int8_head_replaces_the_float_one(is_tied):
    model = dataclasses.replace(INT4, head_type="int8", tie_word_embeddings=is_tied)
    specs = table(model)
    assert specs["output.qweight"] == ("|i1", (70, 64), "none")
    assert specs["output.scales"] == ("<f2", (70,), "none")
    assert "output.weight" not in specs


def test_query_and_key_norms_have_one_head():
    model = dataclasses.replace(INT4, has_qk_norm=True)
    specs = table(model)
    assert specs["layers.1.attention.q_norm.weight"] == ("<f2", (32,), "none")
    assert specs["layers.1.attention.k_norm.weight"] == ("<f2", (32,), "none")


@pytest.mark.parametrize(("group_size", "head_dim"), [(32, 64), (64, 64), (128, 128)])
def test_group_and_head_size_are_parameters(group_size, head_dim):
    model = dataclasses.replace(
        INT4, hidden_size=256, intermediate_size=384, head_dim=head_dim, group_size=group_size
    )
    specs = table(model)
    assert specs["layers.0.attention.w_qkv.0.scales_zeros"][1] == (
        256 // group_size,
        4 * head_dim,
    )
    assert specs["layers.0.feed_forward.w2.0.scales_zeros"][1] == (384 // group_size, 256)


def test_sizes_of_internlm2_1_8b_by_hand():
    # hidden 2048, inner 8192, 16 heads on 8 of 128, 92544 pieces, 24 layers, groups of 128.
    model = ModelConfig(2048, 8192, 24, 16, 8, 128, 92544, 1e-5, 1e6, 32768, "int4", 128)
    sizes = {s.name: s.size_bytes for s in tensor_specs(model)}
    assert sizes["tok_embeddings.weight"] == 92544 * 2048 * 2
    assert sizes["layers.0.attention.w_qkv.0.qweight"] == 2048 * 4096 // 2
    assert sizes["layers.0.attention.w_qkv.0.scales_zeros"] == 16 * 4096 * 4
    assert sizes["layers.23.feed_forward.w13.0.qweight"] == 2048 * 16384 // 2
    assert sizes["layers.23.feed_forward.w2.0.scales_zeros"] == 64 * 2048 * 4
    # 3 global files; 2 norms, 8 linear files and past_kv_scale a layer.
    assert len(sizes) == 3 + 24 * 11


def test_linear_shapes_are_those_of_one_rank():
    shapes = {s.module: (s.num_inputs, s.num_outputs) for s in linear_shapes(INT4, 0)}
    assert shapes == {
        "attention.w_qkv": (64, 128),
        "attention.wo": (64, 64),
        "feed_forward.w13": (64, 192),
        "feed_forward.w2": (96, 64),
    }


def test_linears_that_stay_fp16_are_stored_as_those_of_a_float_model():
    kept = ("layers.0.feed_forward.w13", "layers.1.attention.w_qkv", "layers.1.feed_forward.w2")
    model = dataclasses.replace(INT4, fp16_linears=kept)
    mixed, floats = ({spec.name: spec for spec in tensor_specs(m)} for m in (model, FP16))
    stems = {
        "layers.0.feed_forward.w1.0",
        "layers.0.feed_forward.w3.0",
        "layers.1.attention.w_qkv.0",
        "layers.1.feed_forward.w2.0",
    }
    for stem in stems:
        assert mixed[f"{stem}.weight"] == floats[f"{stem}.weight"]
    codes = {name.removesuffix(".qweight") for name in mixed if name.endswith(".qweight")}
    assert codes == {
        "layers.0.attention.w_qkv.0",
        "layers.0.attention.wo.0",
        "layers.0.feed_forward.w2.0",
        "layers.1.attention.wo.0",
        "layers.1.feed_forward.w13.0",
    }
    linears = {name for name in mixed if name.rpartition(".")[0] in stems}
    assert len(linears) == len(stems)
    assert model.is_mixed and not INT4.is_mixed
    assert not model.is_quantized(0, "feed_forward.w13")
    assert model.is_quantized(1, "feed_forward.w13")
    assert not FP16.is_quantized(0, "attention.wo")


def test_inner_size_must_split_over_the_ranks():
    model = dataclasses.replace(
        FP16, intermediate_size=97, num_attention_heads=4, num_kv_heads=2, tensor_para_size=2
    )
    with pytest.raises(PackageError, match="intermediate_size 97 is not a multiple of tensor_para"):
        tensor_specs(model)


def test_int4_needs_whole_tiles():
    # 3 heads on 3 of 8 columns: 72 columns of w_qkv, which is no multiple of 32.
    model = dataclasses.replace(
        INT4,
        num_attention_heads=3,
        num_kv_heads=3,
        head_dim=8,
        group_size=8,
        intermediate_size=64,
    )
    with pytest.raises(PackageError, match="w_qkv is 64 x 72 on each of 1 ranks, int4 needs"):
        linear_shapes(model, 0)
    assert linear_shapes(dataclasses.replace(model, weight_type="fp16", group_size=0), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected 1 to 1024"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected 1 to 1024"),
        ({"vocab_size": 2**24 + 1}, "vocab_size is 16777217, expected 1 to 16777216"),
        ({"head_dim": 33}, "head_dim 33 is odd"),
        ({"num_kv_heads": 3}, "num_attention_heads 2 is not a multiple of num_kv_heads 3"),
        ({"tensor_para_size": 2}, "num_kv_heads 1 is not a multiple of tensor_para_size 2"),
        ({"group_size": 0}, "group_size 0 does not go with weight_type int4"),
        ({"weight_type": "fp16"}, "group_size 32 does not go with weight_type fp16"),
        ({"weight_type": "fp16", "group_size": -1}, "group_size is -1, expected 0 or more"),
        ({"hidden_size": 80}, "hidden_size 80 is not a multiple of group_size 32"),
        ({"intermediate_size": 100}, "intermediate_size 100 is not a multiple of group_size 32"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0, expected a finite number above 0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, expected a finite number above 0"),
        ({"layers_without_rope": (1, 0)}, "layers_without_rope has 2 numbers, expected different"),
        ({"layers_without_rope": (0, 0)}, "layers_without_rope has 2 numbers, expected different"),
        ({"layers_without_rope": (2,)}, "has 1 numbers, expected .* in order, from 0 to 1"),
        ({"layers_without_rope": (-1, 1)}, "has 2 numbers, expected .* in order, from 0 to 1"),
        ({"sliding_window": -1}, "sliding_window is -1, expected 0 to 2147483648"),
        (
            {"fp16_linears": ("layers.0.attention.q",)},
            r"fp16_linears has 'layers\.0\.attention\.q'",
        ),
        (
            {"fp16_linears": ("layers.00.attention.wo",)},
            r"has 'layers\.00\.att.*expected layers\.N",
        ),
        ({"fp16_linears": ("layers.2.attention.wo",)}, "'layers.2.attention.wo', the model has 2"),
        (
            {"fp16_linears": ("layers.1.attention.wo", "layers.0.attention.wo")},
            "fp16_linears is not in the order",
        ),
        (
            {"fp16_linears": ("layers.1.attention.wo", "layers.1.attention.wo")},
            "fp16_linears is not in the order",
        ),
        ({"fp16_linears": EVERY_LINEAR}, "fp16_linears names every linear"),
        (
            {"weight_type": "fp16", "group_size": 0, "fp16_linears": EVERY_LINEAR[:1]},
            "fp16_linears has 1 names in a model of weight_type fp16",
        ),
    ],
)
def test_models_that_cannot_be_are_refused(changes, message):
    with pytest.raises(PackageError, match=message):
        dataclasses.replace(INT4, **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear", 0.0), "rope scaling factor is 0.0, expected above 0"),
        (("linear", float("nan")), "rope scaling factor is nan, expected above 0"),
        (("llama3", 8.0, 4.0, 4.0, 8192), "low_freq_factor 4.0 is not below high_freq_factor 4.0"),
        (("llama3", 8.0, 1.0, 4.0, 0), "llama3 has original_max_position_embeddings 0, expected"),
    ],
)
def test_rope_scaling_that_cannot_be_computed_is_refused(arguments, message):
    with pytest.raises(PackageError, match=message):
        RopeScaling(*arguments)


def test_specs_are_exact_types():
    for spec in tensor_specs(INT4):
        assert isinstance(spec.dtype, np.dtype)
        assert spec.path == f"triton_models/weights/{spec.name}"
