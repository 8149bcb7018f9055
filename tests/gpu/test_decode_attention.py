"""Decode attention on the GPU against float64: formats, head sizes, ratios, edges of pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from attention_cases import Heads, check_decode
from device_launch import ArrayLaunch, device_launch


@pytest.fixture(scope="module")
def launch() -> Iterator[ArrayLaunch]:
    with device_launch("decode_attention") as launch:
        yield launch


@pytest.mark.parametrize("policy", [8, 4, 0])
@pytest.mark.parametrize(
    ("head_dim", "num_heads", "num_kv_heads", "page_size", "lengths", "splits"),
    [
        # Edges of steps, units and pages; a row alone; idle rows.
        (128, 32, 32, 64, [1, 2, 31, 32, 33, 63, 64, 65, 127, 129, 0, 0], 5),
        (128, 48, 8, 64, [4096, 31, 2048, 1], 8),
        (64, 9, 3, 128, [1000, 33, 257], 8),
        (128, 10, 2, 192, [1500, 4095], 7),
        (64, 7, 1, 64, [513], 3),
        (64, 64, 8, 256, [300] * 8, 4),
        (128, 4, 4, 64, [8192], 32),
    ],
)
def test_a_new_token_attends_to_all_before_it(
    launch: ArrayLaunch,
    policy: int,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    page_size: int,
    lengths: list[int],
    splits: int,
) -> None:
    heads = Heads(policy, head_dim, num_heads, num_kv_heads, page_size)
    check_decode(launch, heads, lengths, max_splits=splits)


@pytest.mark.parametrize("slots", [2, 3, 4])
def test_rings_of_any_length_give_the_same(launch: ArrayLaunch, slots: int) -> None:
    check_decode(launch, Heads(8, 128, 32, 32), [1023, 4096, 77], max_splits=4, slots=slots)


def test_blocks_find_what_others_left_every_time(launch: ArrayLaunch) -> None:
    # 2112 blocks, far more than run at once; 16 query heads of a kv head in two blocks.
    for seed in range(4):
        lengths = [2049 + 31 * seed] * 12
        check_decode(launch, Heads(8, 64, 176, 11), lengths, max_splits=8, seed=seed)


@pytest.mark.parametrize("policy", [8, 4, 0])
def test_queries_and_keys_are_normed_and_may_come_from_several_ranks(
    launch: ArrayLaunch, policy: int
) -> None:
    heads = Heads(policy, 128, 12, 4, num_ranks=2, has_norm=True)
    check_decode(launch, heads, [700, 96, 32, 1], max_splits=4, split_units=4)
