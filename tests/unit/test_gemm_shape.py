"""How products are shared out among blocks, and that Python and the kernels mean the same tiles."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

import device_runtime.kernels
from device_runtime.kernels.gemm_shape import (
    F16_TILES,
    W4A16_TILES,
    GemmOutput,
    GemmShape,
    GemmTile,
    fastest_tile,
)
from device_runtime.kernels.head_shape import HeadShape
from device_runtime.kernels.table import F16_GEMM_TILES, GEMM_TILES, kernel

KERNELS = Path(device_runtime.kernels.__file__).parent
SHAPES = [(9, 576, 960), (64, 4096, 4096), (128, 11008, 4096), (520, 4096, 22016), (33, 64, 32)]


@pytest.mark.parametrize(
    ("kind", "tokens", "tile"),
    [("w4a16", *item) for item in W4A16_TILES.items()]
    + [("f16", *item) for item in F16_TILES.items()],
)
def test_a_source_builds_the_tile_of_its_name(kind: str, tokens: int, tile: GemmTile) -> None:
    text = (KERNELS / f"{kind}_gemm_{tokens}.cu").read_text()
    found = re.search(r"#define TURBOJET_GEMM_TILE (.*)", text)
    assert found
    # Template arguments of gemm.cuh's Tile.
    warps_out, warps_tokens, warp_outputs, warp_tokens, *rest = map(int, found[1].split(","))
    threads = 32 * warps_out * warps_tokens
    built = GemmTile(
        warps_out * warp_outputs, warps_tokens * warp_tokens, rest[0], rest[1], threads, rest[2]
    )
    assert built == tile
    assert tile.tokens == tokens
    assert kernel(f"{kind}_gemm_{tokens}").block == tile.threads


def test_outputs_have_the_same_numbers() -> None:
    found = re.search(
        r"enum class Output : int32_t \{ (.*?) \}", (KERNELS / "gemm.cuh").read_text()
    )
    assert found
    assert found[1].split(", ") == [f"k{output.name.title()}" for output in GemmOutput]
    assert list(GemmOutput) == [0, 1, 2]


def test_the_table_has_every_tile() -> None:
    assert tuple(W4A16_TILES) == GEMM_TILES
    assert tuple(F16_TILES) == F16_GEMM_TILES


@pytest.mark.parametrize("num_sms", [1, 8, 16, 132])
@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("tile", [*W4A16_TILES.values(), *F16_TILES.values()], ids=str)
def test_every_step_of_every_tile_has_one_block(
    tile: GemmTile, sizes: tuple[int, int, int], num_sms: int
) -> None:
    shape = GemmShape(tile, *sizes, num_sms)
    steps, grid, streamed = shape.num_steps, shape.grid, shape.stream_tiles
    assert 1 <= grid <= max(shape.slots, shape.num_tiles)
    assert 0 <= streamed <= shape.num_tiles
    # gemm.cuh Schedule::begin and block_of.
    starts = [streamed * steps * block // grid for block in range(grid + 1)]
    assert starts[0] == 0 and starts[-1] == streamed * steps
    if streamed:
        assert all(a < b for a, b in pairwise(starts))
        for step in range(0, streamed * steps, max(1, streamed * steps // 97)):
            block = ((step + 1) * grid - 1) // (streamed * steps)
            assert starts[block] <= step < starts[block + 1]
    # The rest is taken whole, block after block.
    whole = [
        tile for block in range(grid) for tile in range(streamed + block, shape.num_tiles, grid)
    ]
    assert sorted(whole) == list(range(streamed, shape.num_tiles))


def test_sums_need_two_tiles_for_each_block() -> None:
    # 11008 / 64 = 172 steps and 32 tiles for 264 blocks: 8 to a tile is 256, within 85% of all.
    shape = GemmShape(W4A16_TILES[128], 128, 11008, 4096, 132)
    assert (shape.grid, shape.stream_tiles) == (256, 32)
    assert shape.workspace_bytes == 2 * 256 * 128 * 128 * 4
    # 172 * 4 tiles in waves of 264: 160 are left, too few for a wave, and are cut.
    shape = GemmShape(W4A16_TILES[128], 512, 4096, 22016, 132)
    assert (shape.grid, shape.stream_tiles) == (264, 160)


def test_whole_waves_are_not_cut() -> None:
    shape = GemmShape(W4A16_TILES[128], 128 * 33, 4096, 128 * 8, 132)
    assert (shape.num_tiles, shape.grid, shape.stream_tiles, shape.workspace_bytes) == (
        264,
        264,
        0,
        0,
    )


def test_shared_memory_holds_the_ring_or_the_result() -> None:
    # 3 slots of 128 tokens x 64 inputs x 2 bytes, 64 x 128 codes, a row of 128 scales.
    assert W4A16_TILES[128].shared_bytes(128) == 3 * (128 * 64 * 2 + 64 * 128 // 2 + 128 * 4)
    # Two rows of scales with groups of 32.
    assert W4A16_TILES[128].shared_bytes(32) == 3 * (128 * 64 * 2 + 64 * 128 // 2 + 2 * 128 * 4)
    assert F16_TILES[8].shared_bytes(0) == 4 * (8 * 64 * 2 + 64 * 128 * 2)


def test_all_blocks_of_an_sm_fit_an_orin() -> None:
    # 164 KiB on an SM of sm_87, 1 KiB of it for each block (CUDA programming guide).
    for tile in W4A16_TILES.values():
        assert tile.blocks_per_sm * (tile.shared_bytes(128) + 1024) <= 164 * 1024


def test_a_tile_is_chosen_by_tokens() -> None:
    tokens = (1, 16, 17, 32, 33, 64, 65, 96, 97, 192, 193, 2048)
    chosen = [fastest_tile(count, is_quantized=True) for count in tokens]
    assert chosen == [16, 16, 32, 32, 64, 64, 32, 32, 64, 64, 128, 128]
    chosen = [fastest_tile(count, is_quantized=False) for count in (1, 8, 9, 32, 33, 128, 129)]
    assert chosen == [8, 8, 32, 32, 64, 64, 128]


def test_a_head_takes_two_blocks_of_an_sm_where_they_fit() -> None:
    # 8 warps x 4 slots x 2 KiB, two buffers of 8 KiB, 17 x 8 statistics; columns of 4096 x 2 + 64.
    shared = 64 * 1024 + 16 * 1024 + 17 * 8 * 4
    assert HeadShape(1, 4096, is_int8=False).shared_bytes == shared + 8256
    assert HeadShape(1, 4096, is_int8=False).grid(132, 227 * 1024) == 264
    assert HeadShape(8, 4096, is_int8=False).grid(132, 227 * 1024) == 132
    # int8: two digits of each row, and 64 bytes that half a unit reads past them.
    assert HeadShape(2, 576, is_int8=True).shared_bytes == shared + 4 * 576 + 64
    assert [HeadShape(n, 576, is_int8=True).kernel for n in (4, 5)] == [
        "head_int8_4",
        "head_int8_8",
    ]
