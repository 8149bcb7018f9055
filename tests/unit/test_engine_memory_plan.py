"""The memory plan by hand: what is left becomes pages."""

import dataclasses

import pytest

from device_runtime.backends.kv_format import KvFormat, kv_format, kv_page_bytes
from device_runtime.backends.memory_plan import (
    CacheRequest,
    MemorySurvey,
    cache_tokens,
    plan_memory,
)
from device_runtime.engine.options import EngineOptions
from device_runtime.errors import OutOfMemoryError, PackageError, UsageError
from device_runtime.package_format.model_config import ModelConfig

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
    weight_type="int4",
    group_size=128,
)
# 2 (K and V) x 2 layers x 1 head x 64 tokens x 32 fp16 = 16384 bytes a page.
TINY = dataclasses.replace(
    LLAMA_2_7B,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_kv_heads=1,
    head_dim=32,
    intermediate_size=128,
)
REQUEST = CacheRequest(
    cache_max_entry_count=0.5,
    page_size=64,
    session_len=256,
    max_batch_size=4,
    max_tokens_per_step=512,
    kv_format=KvFormat.FP16,
)
SURVEY = MemorySurvey("reference", available_bytes=1_000_000, weight_bytes=0, workspace_bytes=0)


def plan(survey=SURVEY, **changes):
    return plan_memory(TINY, dataclasses.replace(REQUEST, **changes), survey)


def test_a_page_of_llama_2_7b_is_64_mib_as_the_specification_says() -> None:
    # 2 * 32 layers * 32 heads * 128 tokens * 128 dims * 2 bytes (section 3.2).
    assert kv_page_bytes(LLAMA_2_7B, 128, KvFormat.FP16) == 64 << 20
    assert kv_page_bytes(LLAMA_2_7B, 128, KvFormat.INT8_STATIC) == 32 << 20
    # Online int8 adds two fp16 for every 128 codes: 33 MiB.
    assert kv_page_bytes(LLAMA_2_7B, 128, KvFormat.INT8_ONLINE) == 33 << 20


@pytest.mark.parametrize(
    ("policy", "expected"),
    [(0, KvFormat.FP16), (4, KvFormat.INT8_STATIC), (8, KvFormat.INT8_ONLINE)],
)
def test_quant_policies_have_turbominds_meaning(policy, expected) -> None:
    assert kv_format(policy) is expected
    assert expected.title


def test_an_unknown_quant_policy_is_refused() -> None:
    with pytest.raises(PackageError, match=r"quant_policy is 3, expected 0 .*, 4 .* or 8"):
        kv_format(3)


def test_a_share_is_taken_of_what_the_weights_leave() -> None:
    survey = dataclasses.replace(
        SURVEY, weight_bytes=300_000, workspace_bytes=100_000, context_bytes=50_000
    )
    # 1,000,000 - 450,000 = 550,000; half is 275,000; 275,000 // 16,384 = 16 pages.
    made = plan(survey)
    assert made.num_pages == 16
    assert made.kv_bytes == 16 * 16384
    assert made.total_bytes == 450_000 + 16 * 16384
    assert made.notes == ()
    assert made.max_pages_per_sequence == 4


def test_the_share_is_held_as_fp32_and_floored() -> None:
    # 0.8 of 83,886,079 is 67,108,863.2, 4095 pages; fp32(0.8) = 0.800000012 adds 1.0: 4096.
    survey = dataclasses.replace(SURVEY, available_bytes=83_886_079)
    assert plan(survey, cache_max_entry_count=0.8).num_pages == 4096


def test_a_count_is_that_many_pages() -> None:
    assert plan(cache_max_entry_count=7.0).num_pages == 7
    assert plan(cache_max_entry_count=7.9).num_pages == 7
    made = plan(cache_max_entry_count=1.0, session_len=64)
    assert made.num_pages == 1  # exactly 1.0 is one page, not all of the memory


def test_a_count_that_does_not_fit_is_cut_and_said() -> None:
    made = plan(cache_max_entry_count=1000.0)
    assert made.num_pages == 61  # 1,000,000 // 16,384
    assert "cut from 1000 to 61 pages" in made.notes[0]


def test_session_len_is_cut_to_what_the_cache_holds_and_said() -> None:
    made = plan(cache_max_entry_count=3.0)
    assert made.session_len == 192
    assert "session_len is cut from 256 to 192 tokens" in made.notes[0]


def test_tokens_that_the_pages_hold_end_with_the_memory() -> None:
    # Half of 1,000,000 bytes are 30 pages of 16,384, all of them 61.
    for count, num_pages in ((0.5, 30), (7.0, 7), (1000.0, 61)):
        request = dataclasses.replace(REQUEST, cache_max_entry_count=count)
        assert cache_tokens(TINY, request, SURVEY) == 64 * num_pages
    full = dataclasses.replace(SURVEY, weight_bytes=1_000_001)
    assert cache_tokens(TINY, REQUEST, full) == 0


def test_a_backend_that_asks_for_it_gets_no_more_pages_than_the_batch_can_fill() -> None:
    capped = dataclasses.replace(SURVEY, is_capped_at_use=True)
    assert plan(capped).num_pages == 16  # 4 sequences of 256 / 64 pages
    assert plan().num_pages == 30
    assert plan(capped, cache_max_entry_count=20.0).num_pages == 20


def test_a_share_below_one_page_takes_one_and_says_so() -> None:
    made = plan(dataclasses.replace(SURVEY, available_bytes=17_000), session_len=64)
    assert made.num_pages == 1
    assert "is less than one page of 16384 bytes" in made.notes[0]


def test_notes_of_the_backend_come_first() -> None:
    survey = dataclasses.replace(SURVEY, notes=("layers are streamed",))
    assert plan(survey, cache_max_entry_count=3.0).notes[0] == "layers are streamed"


@pytest.mark.parametrize(
    ("weights", "workspace", "message"),
    [
        (
            9 << 20,
            0,
            r"take 9 MiB of 8 MiB; one KV page needs 16384 .* smaller model",
        ),
        (
            (8 << 20) - 9,
            0,
            r"weights 7 MiB \+ workspace 0 .* leave 0 MiB of 8 MiB",
        ),
        (1 << 20, 9 << 20, r"take 10 MiB of 8 MiB; .* smaller session_len or max_batch_size"),
    ],
)
def test_no_room_for_a_page_shows_the_arithmetic(weights, workspace, message) -> None:
    survey = MemorySurvey("reference", 8 << 20, weights, workspace)
    with pytest.raises(OutOfMemoryError, match=message):
        plan(survey)


def test_a_page_size_that_is_not_made_of_tiles_is_refused() -> None:
    with pytest.raises(PackageError, match="cache_block_seq_len is 96, expected a multiple of 64"):
        plan(page_size=96)


@pytest.mark.parametrize("name", ["cache_max_entry_count", "session_len", "max_batch_size"])
def test_limits_must_be_positive(name) -> None:
    with pytest.raises(UsageError, match=f"{name} is 0, expected more than 0"):
        plan(**{name: 0})


def test_an_option_is_finite() -> None:
    with pytest.raises(UsageError, match="is inf, expected more than 0 and less than infinity"):
        EngineOptions(cache_max_entry_count=float("inf"))
