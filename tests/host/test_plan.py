"""Plans are arithmetic: what the CUDA engine takes is checked in unit/test_board_plan.py."""

from dataclasses import replace

import pytest

from device_runtime.engine.board_plan import (
    CacheRequest,
    KvFormat,
    board_survey,
    longest_sessions,
)
from device_runtime.errors import UsageError
from device_runtime.package_format.amounts import MIB
from device_runtime.package_format.boards import BOARDS, Board
from device_runtime.package_format.model_config import ModelConfig
from host_tools.package_options import ConfigValues
from host_tools.plan import (
    arithmetic,
    choose_boards,
    describe_plan,
    plan_boards,
    plan_config,
)

MODEL = ModelConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=16,
    num_attention_heads=8,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=32768,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=4096,
    weight_type="fp16",
    group_size=0,
)
# fp16, in elements: a layer has qkv and wo 4 x 1024^2, gate, up and down 3 x 1024 x 4096, norms
# 2 x 1024; the model has 16 of them, embedding and head 2 x 32768 x 1024, and a norm of 1024.
LAYER = 4 * 1024**2 + 3 * 1024 * 4096 + 2 * 1024
WEIGHT_BYTES = 2 * (16 * LAYER + 2 * 32768 * 1024 + 1024)  # 671,156,224: 640 MiB and norms
# One page of 64 tokens: 64 x (K and V) x 16 layers x 8 heads x (128 bytes + fp16 scale and zero)
PAGE_BYTES = 64 * 2 * 16 * 8 * (128 + 4)  # 2,162,688: 2.0625 MiB
REQUEST = CacheRequest(
    cache_max_entry_count=0.8,
    page_size=64,
    session_len=4096,
    max_batch_size=1,
    max_tokens_per_step=512,
    kv_format=KvFormat.INT8_ONLINE,
)


def board(name, usable_mib):
    return Board(name, name, 2 * usable_mib * MIB, usable_mib * MIB, 87, 8, 1000, 100.0, (6,))


def with_free(free_mib, request=REQUEST, model=MODEL):
    """Return a board that has so many MiB left for KV pages."""
    taken = -board_survey(model, request, replace(SMALL, usable_bytes=0)).free_bytes
    return replace(SMALL, usable_bytes=taken + free_mib * MIB)


SMALL, LARGE = board("small", 2048), board("large", 8192)


def test_weights_lie_in_memory_as_in_the_files():
    # Every size is a multiple of the 256 bytes that a tensor starts at.
    assert board_survey(MODEL, REQUEST, SMALL).weight_bytes == WEIGHT_BYTES


def test_int4_weights_take_a_quarter():
    int4 = replace(MODEL, weight_type="int4", group_size=128)
    # linears: half a byte a code, and 4 bytes of scale and zero for 128 codes
    linears = 16 * (4 * 1024**2 + 3 * 1024 * 4096)
    rest = WEIGHT_BYTES - 2 * linears
    found = board_survey(int4, REQUEST, SMALL).weight_bytes
    assert found == rest + linears // 2 + linears // 128 * 4


def test_a_board_with_room_gets_the_whole_context_and_a_batch():
    values, notes = plan_config(MODEL, [with_free(3600)], ConfigValues())
    # Eight sequences of 2048 tokens need 16384 tokens, 256 pages or 528 MiB; half as much again
    # is 792 MiB, 22% of what is free, rounded up to steps of 5%.
    assert values == ConfigValues(8, 0.25, 64, None, 4096, 8)
    assert len(notes) == 1
    assert notes[0].startswith("plan for small: ")
    assert notes[0].endswith(
        "quant_policy 8, session_len 4096, max_batch_size 8, cache_max_entry_count 0.25"
    )


def test_a_tight_board_gets_a_shorter_session_and_no_batch():
    # 80% of 148 MiB are 118.4 MiB: 57 pages of 2.0625 MiB, 3648 tokens
    values, _ = plan_config(MODEL, [with_free(148)], ConfigValues())
    assert values == ConfigValues(8, 0.8, 64, None, 3648, 1)


def test_the_board_that_holds_fewest_tokens_rules():
    both, _ = plan_config(MODEL, [LARGE, SMALL], ConfigValues())
    assert both == plan_config(MODEL, [SMALL], ConfigValues())[0]


def test_what_was_given_stays():
    given = ConfigValues(0, 0.5, 128, 0, 1000, 2)
    assert plan_config(MODEL, [SMALL], given)[0] == given


def test_a_number_of_pages_rules_the_session():
    values, notes = plan_config(MODEL, [SMALL], ConfigValues(cache_max_entry_count=10.0))
    assert (values.session_len, values.max_batch_size) == (640, 1)
    assert "of which 10 KV pages of 2.06 MiB; " in notes[0]
    with pytest.raises(UsageError, match=r"session-len 641 .* which hold 640 tokens"):
        plan_config(MODEL, [SMALL], ConfigValues(cache_max_entry_count=10.0, session_len=641))
    # 64 MiB hold 31 pages of 2.0625 MiB
    tight = with_free(64)
    plan_config(MODEL, [tight], ConfigValues(cache_max_entry_count=31.0))
    with pytest.raises(
        UsageError,
        match=r"cache-max-entry-count 32 does not fit on small: .* = 64 MiB, of which 32 KV "
        r"pages of 2\.06 MiB, and 31 pages fit; ask for fewer",
    ):
        plan_config(MODEL, [tight], ConfigValues(cache_max_entry_count=32.0))


def test_a_share_that_is_less_than_a_page_is_refused():
    with pytest.raises(
        UsageError,
        match=r"cache-max-entry-count 0\.005 is less than one KV page on small: .* = 148 MiB, of "
        r"which 0\.5% for KV pages of 2\.06 MiB; ask for more",
    ):
        plan_config(MODEL, [with_free(148)], ConfigValues(cache_max_entry_count=0.005))


@pytest.mark.parametrize("asked", [0.0, -1.0, float("inf"), float("nan")])
def test_a_share_or_a_number_of_pages_is_finite(asked):
    with pytest.raises(UsageError, match="expected a share of the free memory below 1 or a number"):
        ConfigValues(cache_max_entry_count=asked)


def test_a_sliding_window_ends_the_session():
    model = replace(MODEL, sliding_window=2048)
    assert plan_config(model, [LARGE], ConfigValues())[0].session_len == 2048
    with pytest.raises(UsageError, match=r"session-len is 2049, the layers .* look back 2048"):
        plan_config(model, [LARGE], ConfigValues(session_len=2049))


def test_a_session_that_does_not_fit_is_refused_with_the_arithmetic():
    asked = replace(REQUEST, session_len=30000)
    # 80% of 900 MiB are 349 pages, 22336 tokens
    with pytest.raises(
        UsageError,
        match=r"session-len 30000 does not fit on small: \d+ MiB usable - weights 640 MiB - "
        r"workspace \d+ MiB - context and process \d+ MiB = 900 MiB, of which 80% for KV pages "
        r"of 2\.06 MiB, which hold 22336 tokens; use a shorter one",
    ):
        plan_config(MODEL, [with_free(900, asked)], ConfigValues(session_len=30000))


def test_sequences_whose_tables_do_not_fit_are_refused():
    for values in (
        ConfigValues(session_len=10**12),
        ConfigValues(session_len=4096, max_batch_size=10**7),
    ):
        with pytest.raises(
            UsageError,
            match=r"session-len \d+ with max-batch-size \d+ does not fit on small: weights 640 MiB "
            r"\+ workspace \d+ MiB \+ .* take \d+ MiB of 2048 MiB usable; use smaller ones",
        ):
            plan_config(MODEL, [SMALL], values)


def test_a_named_board_that_is_too_small_is_refused():
    # 512 tokens are 8 pages or 16.5 MiB; 80% of 20 MiB are less
    with pytest.raises(
        UsageError,
        match=r"small is too small: weights 640 MiB \+ workspace \d+ MiB \+ context and process "
        r"\d+ MiB leave 20 MiB of \d+ MiB usable, 80% of it for KV, and 512 tokens of KV need "
        "17 MiB; --head int8 takes 31 MiB less",  # 32768 x 1022 bytes
    ):
        plan_config(MODEL, [with_free(20), LARGE], ConfigValues())
    plan_config(MODEL, [with_free(21), LARGE], ConfigValues())
    with pytest.raises(UsageError, match=r"take \d+ MiB of 500 MiB usable, and 512 .* choose a"):
        plan_config(replace(MODEL, head_type="int8"), [board("tiny", 500)], ConfigValues())


def test_boards_that_are_too_small_are_left_out_of_all():
    tiny = board("tiny", 700)
    values, notes = plan_config(MODEL, [tiny, LARGE], ConfigValues(), is_all=True)
    assert values == plan_config(MODEL, [LARGE], ConfigValues())[0]
    assert notes[0].startswith("left out: tiny is too small")
    with pytest.raises(UsageError, match="tiny is too small"):
        plan_config(MODEL, [tiny], ConfigValues(), is_all=True)


def test_a_model_that_the_kernels_do_not_run_is_told():
    model = replace(MODEL, head_dim=96)
    _, notes = plan_config(model, [LARGE], ConfigValues())
    assert notes[0].startswith("warning: no board runs this model on its GPU: head_dim is 96")


def test_the_plan_of_a_board_is_that_of_its_engine():
    request = replace(REQUEST, cache_max_entry_count=0.1, max_batch_size=8)
    roomy = with_free(900, request)
    (plan,) = plan_boards(MODEL, request, [roomy])
    # 10% of 900 MiB are 43 pages, 2752 tokens: less than the session asked for
    assert (plan.num_pages, plan.session_len) == (43, 2752)
    assert (plan.weight_bytes, plan.page_bytes) == (WEIGHT_BYTES, PAGE_BYTES)
    assert (plan.board, plan.usable_bytes) == ("small", roomy.usable_bytes)
    assert plan.usable_bytes - plan.weight_bytes - plan.workspace_bytes == 900 * MIB


def test_no_more_pages_are_planned_than_the_batch_can_fill():
    (plan,) = plan_boards(MODEL, replace(REQUEST, max_batch_size=2), [LARGE])
    assert plan.num_pages == 2 * 4096 // 64


def test_a_number_of_pages_is_taken_as_such_but_never_more_than_fit():
    for asked, num_pages in ((100.0, 100), (100.9, 100), (1.0, 1), (5000.0, 436)):
        request = replace(REQUEST, cache_max_entry_count=asked)
        # 900 MiB / 2.0625 MiB = 436
        (plan,) = plan_boards(MODEL, request, [with_free(900, request)])
        assert plan.num_pages == num_pages


def test_the_arithmetic_reads_well():
    survey = board_survey(MODEL, REQUEST, SMALL)
    parts = [survey.workspace_bytes // MIB, survey.context_bytes // MIB]
    assert arithmetic(MODEL, REQUEST, SMALL) == (
        f"2048 MiB usable - weights 640 MiB - workspace {parts[0]} MiB - context and process "
        f"{parts[1]} MiB = {survey.free_bytes // MIB} MiB, of which 80% for KV pages of 2.06 MiB"
    )
    (plan,) = plan_boards(MODEL, REQUEST, [SMALL])
    plan = replace(plan, workspace_bytes=400 * MIB, num_pages=43)
    # 640 + 400 + 43 x 2.0625 = 1128.7 MiB
    assert describe_plan(plan, 64) == (
        "small: weights 640 MiB + workspace and process 400 MiB + KV 43 pages x 2.06 MiB = 1128 "
        "of 2048 MiB usable; 2752 tokens in all, session_len 4096"
    )


def test_internlm2_7b_fits_the_boards_it_should():
    model = ModelConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=92544,
        rms_norm_eps=1e-5,
        rope_theta=1000000.0,
        max_position_embeddings=32768,
        weight_type="int4",
        group_size=128,
    )
    # 6.98e9 weights of 4.25 bits, embedding and head 2 x 92544 x 4096 in fp16: about 5.2 GB
    nano = BOARDS["orin-nano-8gb"]
    survey = board_survey(model, REQUEST, nano)
    assert 5.1e9 < survey.weight_bytes < 5.3e9
    # Less than the 512 MiB that Turbojet allows itself beside weights and KV pages.
    assert survey.workspace_bytes + survey.context_bytes < 440 * MIB
    (longest,) = longest_sessions(model, REQUEST, [nano])
    assert 2048 < longest.int8_tokens < 4096
    with pytest.raises(UsageError, match="orin-nano-4gb is too small"):
        plan_config(model, [BOARDS["orin-nano-4gb"]], ConfigValues())
    values, _ = plan_config(model, [BOARDS["orin-nx-16gb"]], ConfigValues())
    assert values.session_len == 32768


def test_boards_are_chosen_by_what_the_workspace_asks_for():
    # fp16 KV of 512 tokens takes 32 MiB of the 80%, int8 16.5 MiB.
    fitting, _ = choose_boards(MODEL, REQUEST, [with_free(24)], is_all=False)
    assert [found.name for found in fitting] == ["small"]
    half = replace(REQUEST, kv_format=KvFormat.FP16)
    with pytest.raises(UsageError, match="512 tokens of KV need 32 MiB"):
        choose_boards(MODEL, half, [with_free(24)], is_all=False)
