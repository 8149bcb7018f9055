"""Attention of prompts on the GPU against float64, and what it leaves in the pages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from attention_cases import Heads, check_prefill
from device_launch import ArrayLaunch, device_launch


@pytest.fixture(scope="module")
def launch() -> Iterator[ArrayLaunch]:
    with device_launch("store_kv", "prefill_attention") as launch:
        yield launch


@pytest.mark.parametrize("policy", [8, 4, 0])
@pytest.mark.parametrize(
    ("head_dim", "num_heads", "num_kv_heads", "page_size", "sequences"),
    [
        (128, 2, 2, 64, [(0, 300)]),
        (128, 8, 2, 64, [(100, 200), (0, 1), (63, 2), (511, 65), (7, 9)]),
        (64, 9, 3, 128, [(40, 150)]),
        (64, 16, 2, 192, [(1000, 9), (0, 64)]),
        (128, 7, 1, 64, [(257, 255)]),
        (128, 24, 4, 64, [(31, 1), (2000, 40)]),
    ],
)
def test_a_chunk_attends_to_the_cache_and_itself(
    launch: ArrayLaunch,
    policy: int,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    page_size: int,
    sequences: list[tuple[int, int]],
) -> None:
    check_prefill(launch, Heads(policy, head_dim, num_heads, num_kv_heads, page_size), sequences)


@pytest.mark.parametrize("policy", [8, 4, 0])
def test_queries_and_keys_are_normed_and_may_come_from_several_ranks(
    launch: ArrayLaunch, policy: int
) -> None:
    heads = Heads(policy, 128, 12, 4, num_ranks=2, has_norm=True)
    check_prefill(launch, heads, [(700, 33), (31, 70)])
