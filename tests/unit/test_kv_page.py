import pytest

from device_runtime.package_format.kv_page import kv_page_bytes, kv_token_bytes
from device_runtime.package_format.model_config import ModelConfig

TINY = ModelConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=96,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_position_embeddings=256,
    weight_type="fp16",
    group_size=0,
)

LLAMA_2_7B = ModelConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=4096,
    weight_type="fp16",
    group_size=0,
)


def test_page_bytes_by_hand():
    # 2 layers x (K and V) x 2 heads x 16 numbers: fp16, int8, int8 with fp16 scale and zero
    assert kv_token_bytes(TINY, 0) == 2 * 2 * 2 * 32
    assert kv_token_bytes(TINY, 4) == 2 * 2 * 2 * 16
    assert kv_token_bytes(TINY, 8) == 2 * 2 * 2 * 20
    assert kv_page_bytes(TINY, 64, 8) == 64 * 160


def test_llama_2_7b_has_pages_of_64_mib():
    # spec section 3.2: 2*32*32*128*128*2
    assert kv_page_bytes(LLAMA_2_7B, 128, 0) == 64 << 20


def test_other_policies_are_refused():
    with pytest.raises(ValueError, match="quant_policy is 16, expected 0, 4 or 8"):
        kv_token_bytes(TINY, 16)
