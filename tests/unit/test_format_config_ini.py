import configparser
import dataclasses
import io

import pytest
from format_samples import FP16, INT4, config_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from device_runtime.errors import PackageError
from device_runtime.package_format.config_ini import MAX_CONFIG_BYTES, TurboMindConfig
from device_runtime.package_format.model_config import RopeScaling

# What LMDeploy v0.2.3 writes for InternLM2-chat-1.8B in W4, key by key (spec section 3).
INTERNLM2 = """[llama]
model_name = internlm2-chat-1_8b
tensor_para_size = 1
head_num = 16
kv_head_num = 8
vocab_size = 92544
num_layer = 24
inter_size = 8192
norm_eps = 1e-05
attn_bias = 0
start_id = 1
end_id = 2
session_len = 32776
weight_type = int4
rotary_embedding = 128
rope_theta = 1000000.0
size_per_head = 128
group_size = 128
max_batch_size = 64
max_context_token_num = 1
step_length = 1
cache_max_entry_count = 0.8
cache_block_seq_len = 128
cache_chunk_size = -1
num_tokens_per_iter = 0
max_prefill_iters = 1
extra_tokens_per_iter = 0
use_context_fmha = 1
quant_policy = 0
max_position_embeddings = 32768
rope_scaling_factor = 0.0
use_logn_attn = 0

"""

# The keys that have no default: sizes, ids and the name.
LEAST = "\n".join(
    [
        "[llama]",
        *INTERNLM2.splitlines()[1:11],
        "end_id = 2",
        "weight_type = fp16",
        "size_per_head = 128",
    ]
)


def without(key):
    return "".join(line for line in INTERNLM2.splitlines(True) if not line.startswith(f"{key} ="))


def with_value(key, value):
    return without(key).rstrip("\n") + f"\n{key} = {value}\n"


def test_the_file_of_lmdeploy_comes_back_byte_for_byte():
    assert TurboMindConfig.from_text(INTERNLM2).to_text() == INTERNLM2


def test_the_text_is_what_configparser_writes():
    config = dataclasses.replace(config_of(INT4), model_arch="LlamaForCausalLM")
    parser = configparser.ConfigParser()
    parser["llama"] = {key: str(value) for key, value in dataclasses.asdict(config).items()}
    file = io.StringIO()
    parser.write(file)
    assert config.to_text() == file.getvalue()


def test_the_class_that_newer_releases_want_comes_back_where_it_is():
    assert "model_arch" not in config_of(INT4).to_text()
    text = with_value("model_arch", "InternLM2ForCausalLM") + "\n"
    config = TurboMindConfig.from_text(text)
    assert config.model_arch == "InternLM2ForCausalLM"
    assert config.to_text() == text
    with pytest.raises(PackageError, match=r"model_arch 'x{60}', expected at most 256"):
        TurboMindConfig.from_text(with_value("model_arch", "x" * 300))


def test_convert_writes_the_values_of_v0_2_3():
    config = TurboMindConfig.from_model(
        TurboMindConfig.from_text(INTERNLM2).model_config(),
        model_name="internlm2-chat-1_8b",
        start_id=1,
        end_id=2,
        session_len=32776,
    )
    assert config.to_text() == INTERNLM2


def test_head_size_and_group_size_come_from_the_model():
    config = config_of(INT4)
    assert (config.size_per_head, config.rotary_embedding, config.group_size) == (32, 32, 32)
    assert (config.head_num, config.kv_head_num) == (2, 1)


def test_a_plain_workspace_says_its_model():
    model = TurboMindConfig.from_text(INTERNLM2).model_config()
    assert model.hidden_size == 16 * 128
    assert (model.weight_type, model.group_size) == ("int4", 128)
    assert (model.num_attention_heads, model.num_kv_heads, model.head_dim) == (16, 8, 128)
    assert model.rope_scaling == RopeScaling()
    assert not model.tie_word_embeddings


def test_model_and_config_agree_both_ways():
    for model in (
        INT4,
        FP16,
        dataclasses.replace(FP16, weight_type="bf16", has_attention_bias=True, use_logn_attn=True),
    ):
        assert config_of(model).model_config() == model


def test_dynamic_rope_scaling_is_not_written_as_lmdeploy_does_not():
    dynamic = dataclasses.replace(INT4, rope_scaling=RopeScaling("dynamic", 2.5))
    assert config_of(dynamic).to_text() == config_of(INT4).to_text()
    text = with_value("rope_scaling_factor", "2.5")
    model = TurboMindConfig.from_text(text).model_config()
    assert model.rope_scaling == RopeScaling("dynamic", 2.5)


def test_fp32_weights_lie_on_disk_as_fp16():
    text = with_value("weight_type", "fp32")
    model = TurboMindConfig.from_text(text).model_config()
    assert (model.weight_type, model.group_size) == ("fp16", 0)


def test_keys_that_v0_1_0_lacks_get_their_defaults():
    text = INTERNLM2
    for key in ("num_tokens_per_iter", "max_prefill_iters", "extra_tokens_per_iter"):
        text = text.replace(f"{key} =", f"; {key} =")
    assert TurboMindConfig.from_text(text) == TurboMindConfig.from_text(INTERNLM2)


def test_missing_keys_get_the_defaults_of_the_engine():
    config = TurboMindConfig.from_text(LEAST)
    assert config.cache_max_entry_count == 0.95
    assert config.session_len == 0
    assert config.rotary_embedding == 128
    assert config.group_size == 0
    no_kv_heads = TurboMindConfig.from_text(without("kv_head_num"))
    assert no_kv_heads.kv_head_num == 16


def test_zeros_resolve_as_in_the_engine():
    config = TurboMindConfig.from_text(LEAST).resolved()
    # max_position_embeddings 2048; session_len the same; max_context_token_num 1 is at most
    # max_batch_size 64, so 1 * 2048; num_tokens_per_iter the same.
    assert config.max_position_embeddings == 2048
    assert config.session_len == 2048
    assert config.max_context_token_num == 2048
    assert config.num_tokens_per_iter == 2048
    assert config.max_batch_size == 64
    assert config.resolved() == config
    # A count of tokens above max_batch_size is taken as it is, up to it times session_len.
    for tokens, resolved in ((64, 64 * 2048), (65, 65)):
        config = dataclasses.replace(TurboMindConfig.from_text(LEAST), max_context_token_num=tokens)
        assert config.resolved().max_context_token_num == resolved
    zeros = dataclasses.replace(
        config_of(INT4),
        kv_head_num=0,
        cache_max_entry_count=0.0,
        cache_block_seq_len=0,
        rope_theta=0.0,
        step_length=0,
        max_batch_size=0,
        max_context_token_num=0,
    ).resolved()
    assert (zeros.kv_head_num, zeros.cache_max_entry_count) == (2, 0.95)
    assert (zeros.cache_block_seq_len, zeros.rope_theta, zeros.step_length) == (128, 10000.0, 1)
    # 0 means session_len, 136, which is above the 64 of max_batch_size.
    assert (zeros.max_batch_size, zeros.max_context_token_num) == (64, 136)


def test_hand_edits_are_read():
    text = INTERNLM2.replace("quant_policy = 0", "Quant_Policy: 4 ; int8")
    text = text.replace("cache_max_entry_count = 0.8", "# less\r\ncache_max_entry_count=.2")
    config = TurboMindConfig.from_text(text)
    assert config.quant_policy == 4
    assert config.cache_max_entry_count == 0.2


def test_a_percent_sign_is_a_character():
    config = config_of(INT4, model_name="100%(x)s 书生")
    assert TurboMindConfig.from_text(config.to_text()) == config


def test_booleans_in_integer_keys_count():
    assert TurboMindConfig.from_text(with_value("use_logn_attn", "True")).use_logn_attn == 1


@pytest.mark.parametrize("key", ["model_name", "head_num", "weight_type", "group_size", "end_id"])
def test_a_missing_key_that_nothing_replaces_is_named(key):
    with pytest.raises(PackageError, match=f"lacks the key {key}$"):
        TurboMindConfig.from_text(without(key))


def test_an_unknown_key_is_named():
    with pytest.raises(PackageError, match="'cache_max_entry_cuont', which LMDeploy"):
        TurboMindConfig.from_text(INTERNLM2.replace("entry_count", "entry_cuont"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("head_num", "16.0", "head_num '16.0', expected an integer"),
        ("head_num", "", "head_num '', expected an integer"),
        ("head_num", "1_6", "head_num '1_6', expected an integer"),
        ("head_num", "9" * 5000, "expected an integer"),
        ("head_num", "0", "head_num 0, expected at least 1"),
        ("session_len", "-1", "session_len -1, expected at least 0"),
        ("norm_eps", "small", "norm_eps 'small', expected a number"),
        ("norm_eps", "nan", "norm_eps 'nan', expected a number"),
        ("rope_theta", "1e999", "rope_theta inf, expected at least 0"),
        ("cache_max_entry_count", "-0.5", "cache_max_entry_count -0.5, expected at least 0"),
        ("weight_type", "int8", "weight_type 'int8', expected one of fp16, fp32, bf16, int4"),
        ("model_name", "", "model_name '', expected 1 to 256 printable characters"),
        ("model_name", "x" * 257, "expected 1 to 256 printable characters"),
        ("model_name", "a\x1b[2J", "expected 1 to 256 printable characters"),
    ],
)
def test_a_bad_value_is_named(key, value, message):
    with pytest.raises(PackageError, match=message):
        TurboMindConfig.from_text(with_value(key, value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the sections '', expected 'llama' alone"),
        ("head_num = 1", "is not an INI file"),
        ("[qwen]\nhead_num = 1", "has the sections 'qwen'"),
        (INTERNLM2 + "[more]\na = 1", "has the sections 'llama, more'"),
        (INTERNLM2.rstrip() + "\nhead_num = 16", "is not an INI file"),
        ("[llama]\nnonsense", "is not an INI file"),
        ("x" * (MAX_CONFIG_BYTES + 1), f"characters, expected at most {MAX_CONFIG_BYTES}"),
    ],
)
def test_texts_that_are_no_config_are_refused(text, message):
    with pytest.raises(PackageError, match=message):
        TurboMindConfig.from_text(text)


def test_a_config_of_another_model_is_refused():
    config = config_of(INT4)
    config.check_model(INT4)
    other = dataclasses.replace(INT4, num_hidden_layers=3)
    with pytest.raises(PackageError, match="num_layer 2, the manifest 3; convert again"):
        config.check_model(other)
    with pytest.raises(PackageError, match="weight_type int4, the manifest fp16"):
        config.check_model(FP16)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.integers(0, len(INTERNLM2)), st.integers(0, 40))
@example("=", 0, 0)
@example("[", 0, 700)
def test_no_text_raises_anything_else(text, start, length):
    damaged = INTERNLM2[:start] + text + INTERNLM2[start + length :]
    for candidate in (text, damaged):
        try:
            config = TurboMindConfig.from_text(candidate)
            config.resolved()
            config.model_config()
        except PackageError:
            continue
        assert TurboMindConfig.from_text(config.to_text()) == config
