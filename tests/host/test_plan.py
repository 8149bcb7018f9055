"""Plans are arithmetic: every number here is worked by hand."""

from dataclasses import replace

import pytest

from device_runtime.errors import UsageError
from device_runtime.package_format.boards import BOARDS, Board
from device_runtime.package_format.config_ini import TurboMindConfig
from device_runtime.package_format.model_config import ModelConfig
from host_tools.package_options import ConfigValues
from host_tools.plan import (
    MIB,
    MemoryNeeds,
    arithmetic,
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


def board(name, usable_mib):
    return Board(name, name, 2 * usable_mib * MIB, usable_mib * MIB, 87, 8, 1000, 100.0, (6,))


SMALL, LARGE = board("small", 2048), board("large", 8192)


def config_of(values, model=MODEL):
    config = TurboMindConfig.from_model(
        model, model_name="m", start_id=1, end_id=2, session_len=4104
    )
    given = {name: value for name, value in vars(values).items() if value is not None}
    return replace(config, **given)


def test_needs_by_hand():
    needs = MemoryNeeds.of(MODEL, 64, 8)
    assert needs == MemoryNeeds(WEIGHT_BYTES, PAGE_BYTES, 64, 8)
    assert needs.pages(1) == 1
    assert needs.pages(65) == 2
    # 2048 MiB - weights - 512 MiB workspace = 939,456,512 bytes
    assert needs.free_bytes(SMALL) == 2048 * MIB - WEIGHT_BYTES - 512 * MIB
    # 80% of them are 347 pages
    assert needs.fitting_tokens(SMALL) == 347 * 64


def test_a_board_with_room_gets_the_whole_context_and_a_batch():
    values, notes = plan_config(MODEL, [LARGE], ConfigValues())
    # Free 7,381,907,456 bytes, 2730 pages fit in 80%: 174,720 tokens. Eight sequences of 2048
    # tokens need 16384 tokens or 256 pages, 7.5% of what is free; half as much again is 11.3%,
    # rounded up to steps of 5%.
    assert values == ConfigValues(8, 0.15, 64, None, 4096, 8)
    assert len(notes) == 1
    assert notes[0].startswith("plan for large: 8192 MiB usable - weights 640 MiB")


def test_a_tight_board_gets_a_shorter_session_and_no_batch():
    tight = board("tight", 1300)
    # 1300 - 640.06 - 512 = 147.9 MiB, 80% are 118.3 MiB: 57 pages of 2.0625 MiB, 3648 tokens
    values, _ = plan_config(MODEL, [tight], ConfigValues())
    assert values == ConfigValues(8, 0.8, 64, None, 3648, 1)


def test_the_smallest_board_rules():
    both, _ = plan_config(MODEL, [LARGE, SMALL], ConfigValues())
    assert both == plan_config(MODEL, [SMALL], ConfigValues())[0]


def test_what_was_given_stays():
    given = ConfigValues(0, 0.5, 128, 0, 1000, 2)
    assert plan_config(MODEL, [SMALL], given)[0] == given


def test_a_sliding_window_ends_the_session():
    model = replace(MODEL, sliding_window=2048)
    assert plan_config(model, [LARGE], ConfigValues())[0].session_len == 2048
    with pytest.raises(UsageError, match=r"session-len is 2049, the layers .* look back 2048"):
        plan_config(model, [LARGE], ConfigValues(session_len=2049))


def test_a_session_that_does_not_fit_is_refused_with_the_arithmetic():
    with pytest.raises(
        UsageError,
        match=r"session-len 30000 does not fit on small: 2048 MiB usable - weights 640 MiB - "
        r"workspace 512 MiB = 895 MiB, of which 80% for KV pages of 2\.06 MiB, which hold 22208",
    ):
        plan_config(MODEL, [SMALL], ConfigValues(session_len=30000))


def test_a_named_board_that_is_too_small_is_refused():
    tiny = board("tiny", 1164)
    # 1164 - 640.06 - 512 = 11.9 MiB; 512 tokens are 8 pages or 16.5 MiB
    with pytest.raises(
        UsageError,
        match=r"tiny is too small: weights 640 MiB \+ workspace 512 MiB leave 11 MiB of 1164 MiB "
        "usable, KV for 512 tokens needs 16 MiB; choose a smaller model",
    ):
        plan_config(MODEL, [tiny, LARGE], ConfigValues())


def test_boards_that_are_too_small_are_left_out_of_all():
    tiny = board("tiny", 1100)
    values, notes = plan_config(MODEL, [tiny, LARGE], ConfigValues(), is_all=True)
    assert values == plan_config(MODEL, [LARGE], ConfigValues())[0]
    assert notes[0].startswith("left out: tiny is too small")
    with pytest.raises(UsageError, match="tiny is too small"):
        plan_config(MODEL, [tiny], ConfigValues(), is_all=True)


def test_the_plan_of_a_board_follows_config_ini():
    (plan,) = plan_boards(MODEL, config_of(ConfigValues(8, 0.1, 64, -1, 4096, 8)), [SMALL])
    # 10% of 939,456,512 bytes are 43 pages, 2752 tokens: less than the session asked for
    assert (plan.num_pages, plan.session_len) == (43, 2752)
    assert (plan.weight_bytes, plan.page_bytes) == (WEIGHT_BYTES, PAGE_BYTES)
    assert (plan.board, plan.usable_bytes, plan.workspace_bytes) == (
        "small", 2048 * MIB, 512 * MIB,
    )  # fmt: skip


def test_a_number_of_pages_is_taken_as_such_but_never_more_than_fit():
    (plan,) = plan_boards(MODEL, config_of(ConfigValues(8, 100.0, 64)), [SMALL])
    assert plan.num_pages == 100
    (plan,) = plan_boards(MODEL, config_of(ConfigValues(8, 5000.0, 64)), [SMALL])
    assert plan.num_pages == 434  # 939,456,512 / 2,162,688


def test_the_arithmetic_reads_well():
    needs = MemoryNeeds.of(MODEL, 64, 8)
    assert arithmetic(needs, SMALL) == (
        "2048 MiB usable - weights 640 MiB - workspace 512 MiB = 895 MiB, of which 80% for KV "
        "pages of 2.06 MiB"
    )
    (plan,) = plan_boards(MODEL, config_of(ConfigValues(8, 0.1, 64)), [SMALL])
    # 640 + 512 + 43 x 2.0625 = 1240.7 MiB
    assert describe_plan(plan, 64) == (
        "small: weights 640 MiB + workspace 512 MiB + KV 43 pages x 2.06 MiB = 1240 of 2048 MiB "
        "usable; 2752 tokens in all, session_len 2752"
    )


def test_int4_weights_take_a_quarter():
    int4 = replace(MODEL, weight_type="int4", group_size=128)
    # linears: half a byte a code, and 4 bytes of scale and zero for 128 codes
    linears = 16 * (4 * 1024**2 + 3 * 1024 * 4096)
    rest = WEIGHT_BYTES - 2 * linears
    assert MemoryNeeds.of(int4, 64, 8).weight_bytes == rest + linears // 2 + linears // 128 * 4


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
    needs = MemoryNeeds.of(model, 64, 8)
    # 6.98e9 weights of 4.25 bits, embedding and head 2 x 92544 x 4096 in fp16: about 5.2 GB
    assert 5.1e9 < needs.weight_bytes < 5.3e9
    # 5632 MiB less these and 512 MiB leave 144 MB; 80% of them are 26 pages of 4,325,376 bytes
    assert needs.fitting_tokens(BOARDS["orin-nano-8gb"]) == 26 * 64
    with pytest.raises(UsageError, match="orin-nano-4gb is too small"):
        plan_config(model, [BOARDS["orin-nano-4gb"]], ConfigValues())
    values, _ = plan_config(model, [BOARDS["orin-nx-16gb"]], ConfigValues())
    assert values.session_len == 32768
