"""GEMMs of 4-bit and fp16 weights on the GPU against float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import figures
import numpy as np
import pytest
from device_launch import ArrayLaunch, device_launch
from linear_cases import GemmCase, relative_error, run_gemm

from device_runtime.kernels.gemm_shape import F16_TILES, W4A16_TILES

# fp16 results are rounded once, 2^-11 at most; silu multiplies two sums.
TOLERANCE = 5e-4
OUTPUTS = ("half", "silu", "add")


SOURCES = (
    *(f"w4a16_gemm_{tile}" for tile in W4A16_TILES),
    *(f"f16_gemm_{tile}" for tile in F16_TILES),
)
GROUP_SIZES = (128, 64, 32)


@pytest.fixture(scope="module")
def launches() -> Iterator[dict[int, ArrayLaunch]]:
    """By the group size that kernels are built for; 0 for fp16 weights."""
    with ExitStack() as stack:
        by_size = {
            size: stack.enter_context(device_launch(*SOURCES, group_size=size))
            for size in GROUP_SIZES
        }
        yield by_size | {0: by_size[128]}


def check(launches: dict[int, ArrayLaunch], case: GemmCase) -> None:
    got, want = run_gemm(launches[case.group_size], case)
    error = relative_error(got, want)
    figures.note(f"worst relative error, {'W4A16' if case.group_size else 'fp16'} GEMM", error)
    assert error < TOLERANCE
    # No single element is off by more than a rounding of fp16 and the sums' fp32 can explain.
    assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("tile", W4A16_TILES)
def test_four_bit_products_at_the_edges(
    launches: dict[int, ArrayLaunch], tile: int, group_size: int, output: str
) -> None:
    for num_tokens in (1, 9, tile - 1, tile, tile + 1, 3 * tile):
        for num_inputs, num_outputs in ((group_size, 32), (640, 576), (1152, 1536)):
            check(launches, GemmCase(tile, num_tokens, num_inputs, num_outputs, group_size, output))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("tile", F16_TILES)
def test_half_products_at_the_edges(
    launches: dict[int, ArrayLaunch], tile: int, output: str
) -> None:
    for num_tokens in (1, 9, tile - 1, tile, tile + 1, 3 * tile):
        for num_inputs, num_outputs in ((32, 32), (640, 576), (1152, 1536)):
            check(launches, GemmCase(tile, num_tokens, num_inputs, num_outputs, 0, output))


@pytest.mark.parametrize("num_sms", [1, 3, 16, 132])
@pytest.mark.parametrize("tile", W4A16_TILES)
def test_products_do_not_depend_on_how_tiles_are_cut(
    launches: dict[int, ArrayLaunch], tile: int, num_sms: int
) -> None:
    check(launches, GemmCase(tile, 2 * tile + 5, 4096, 1024, 128, "add", num_sms))


def test_the_last_block_adds_parts_in_one_order(launches: dict[int, ArrayLaunch]) -> None:
    case = GemmCase(64, 100, 11008, 1024, 128, "add")
    assert case.shape.stream_tiles > 0
    results = {run_gemm(launches[case.group_size], case)[0].tobytes() for _ in range(5)}
    assert len(results) == 1


@pytest.mark.parametrize(
    ("num_inputs", "num_outputs", "output"),
    [(4096, 12288, "half"), (4096, 4096, "add"), (4096, 22016, "silu"), (11008, 4096, "add")],
)
def test_the_matrices_of_a_7b_layer(
    launches: dict[int, ArrayLaunch], num_inputs: int, num_outputs: int, output: str
) -> None:
    for tile, num_tokens in ((16, 16), (128, 200)):
        check(launches, GemmCase(tile, num_tokens, num_inputs, num_outputs, 128, output))
