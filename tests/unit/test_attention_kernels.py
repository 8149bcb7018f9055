"""The attention kernels on the emulator: indexing, barriers and arithmetic without a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pytest
from attention_cases import Heads, check_decode, check_prefill
from emulator import emulator

from device_runtime.kernels.attention_shape import (
    DecodeAttentionShape,
    prefill_tiles,
    store_spans,
)
from device_runtime.kernels.reference.kv_pages import KvLayout

pytestmark = pytest.mark.skipif(
    not emulator.has_compiler(), reason="g++ builds the emulator; it runs where there is one"
)
PLAIN = partial(emulator.launch, flags=("-DTURBOJET_PLAIN=1",))
EARLY = partial(emulator.launch, flags=("-DTURBOJET_EMULATE_EARLY=1",))
Grid: TypeAlias = tuple[int, int, int]


@pytest.mark.parametrize(
    ("heads", "lengths", "splits", "slots"),
    [
        # A page's end, one token alone, an idle row, blocks that share a head.
        (Heads(8, 128, 4, 4), [200, 1, 64, 65], 3, 4),
        (Heads(8, 128, 12, 2, has_norm=True), [130, 0, 33], 3, 3),
        (Heads(8, 64, 9, 3, page_size=192), [300, 257], 2, 3),
        # Blocks with 8 of 16 query heads; more splits than are added at once.
        (Heads(8, 64, 32, 2), [650], 6, 2),
        (Heads(4, 128, 4, 2, num_ranks=2), [129], 1, 2),
        (Heads(0, 128, 2, 2), [97, 32, 1], 2, 1),
        (Heads(0, 64, 8, 1, has_norm=True), [333], 4, 2),
    ],
)
def test_a_new_token_attends_to_all_before_it(
    heads: Heads, lengths: list[int], splits: int, slots: int
) -> None:
    check_decode(emulator.launch, heads, lengths, max_splits=splits, slots=slots)


def test_a_query_that_is_no_number_spoils_its_own_result_and_nothing_else() -> None:
    """Blocks that share a head know by the bits of a number that it is there (decode_share.cuh)."""
    dim = 64

    def launch(name: str, grid: Grid, arguments: list[Any], shared_bytes: int) -> None:
        partials = arguments[2]
        for value, is_spoiled in ((np.nan, True), (np.inf, True), (0.0, False)):
            others = [item.copy() if isinstance(item, np.ndarray) else item for item in arguments]
            others[2] = partials
            others[3][0, :dim] = value
            emulator.launch(name, grid, others, shared_bytes)
            assert not partials.view(np.uint32).any()
            out = others[0].view(np.uint16)
            assert np.isnan(others[0][0, :dim]).all() == is_spoiled
            results.append((out[0, dim:].tobytes(), out[1:].tobytes()))
        emulator.launch(name, grid, arguments, shared_bytes)
        out = arguments[0].view(np.uint16)
        assert set(results) == {(out[0, dim:].tobytes(), out[1:].tobytes())}
        results.clear()

    results: list[tuple[bytes, bytes]] = []
    for policy in (0, 8):
        check_decode(launch, Heads(policy, dim, 8, 2), [300, 270])


@pytest.mark.parametrize(
    ("heads", "sequences"),
    [
        (Heads(8, 128, 2, 2), [(0, 140)]),
        (Heads(8, 128, 12, 2, has_norm=True), [(130, 20), (0, 65), (63, 2), (7, 1)]),
        (Heads(4, 128, 4, 2, num_ranks=2), [(129, 40)]),
        (Heads(8, 64, 16, 1), [(70, 20)]),
        (Heads(0, 64, 8, 1, page_size=128), [(97, 40), (0, 32)]),
    ],
)
def test_a_chunk_attends_to_the_cache_and_itself(
    heads: Heads, sequences: list[tuple[int, int]]
) -> None:
    check_prefill(emulator.launch, heads, sequences)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [PLAIN, EARLY])
def test_plain_products_and_early_copies_give_the_same(launch: partial[None]) -> None:
    for policy in (0, 4, 8):
        check_decode(launch, Heads(policy, 128, 6, 1), [70, 170])
        check_prefill(launch, Heads(policy, 64, 7, 1), [(70, 50)])


def test_tiles_cover_every_row_longest_first() -> None:
    # Sequence 0: 200 rows from position 0; sequence 1: 4 rows at position 500.
    start, positions = np.array([0, 100, 102], np.int32), np.r_[0:100, 500:502].astype(np.int32)
    assert prefill_tiles(start, positions, 2).tolist() == [[1, 0], [0, 128], [0, 0]]


def test_spans_cover_every_position_once() -> None:
    start = np.array([0, 3, 3, 70], np.int32)
    positions = np.r_[62:65, 128:195].astype(np.int32)
    # 62..64 lie in spans 0 and 1, 128..194 in 2 and 3; the empty sequence has none.
    assert store_spans(start, positions).tolist() == [[0, 0], [0, 1], [2, 2], [2, 3]]


def test_rings_are_as_long_as_what_shares_an_sm_leaves() -> None:
    def shape(rows: int, policy: int = 8, num_heads: int = 32) -> DecodeAttentionShape:
        return DecodeAttentionShape(KvLayout(policy, 128), num_heads, 32, rows, 64, 4, 8)

    # 8 warps x 32 tokens x (128 codes + 2 x 4 bytes) a slot; columns, queries, numbers, pages.
    rest = 8 * 128 + 4 * (4 * 128 + 128 + 12) + 4 * 64
    assert shape(1).shared_bytes(4) == 4 * 8 * 32 * 136 + rest
    h200, orin, xavier = (132, 232448), (16, 166912), (8, 98304)
    assert shape(1).ring_slots(*h200) == 4
    # 256 blocks on 132 SMs: two of 3 slots fit into 227 KiB, two of 2 into 163 KiB.
    assert shape(8).ring_slots(*h200) == 3
    assert shape(1).ring_slots(*orin) == 2
    # Two do not fit into 96 KiB, one of 2 slots does.
    assert shape(1).ring_slots(*xavier) == 2
    assert shape(1).shared_bytes(2) <= 98304 < shape(1).shared_bytes(3)
    # fp16 takes twice the memory; wide kernels have an SM for themselves.
    assert [shape(1, 0).ring_slots(*board) for board in (h200, orin, xavier)] == [2, 2, 1]
    assert shape(8, num_heads=256).ring_slots(*h200) == 4
    assert shape(1).ring_slots(8, 1024) == 2
