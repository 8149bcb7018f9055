"""The W4A16 GEMV on the CPU, by the emulator; all sizes run in tests/gpu."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from emulator import emulator
from gemv_cases import GemvCase, run_gemv
from linear_cases import Argument, Launch, relative_error

from device_runtime.kernels.gemv_shape import GemvShape, pair_gemv

pytestmark = pytest.mark.skipif(
    not emulator.has_compiler(), reason="the kernels run on the CPU where there is g++"
)

# fp16 results are rounded once, 2^-11 at most; silu multiplies two sums.
TOLERANCE = 4e-4


def launch_with(*flags: str) -> Launch:
    def launch(
        name: str,
        grid: tuple[int, int, int],
        arguments: list[Argument],
        shared_bytes: int = 0,
    ) -> None:
        emulator.launch(name, grid, arguments, shared_bytes, flags)

    return launch


def shape_of(
    width: int, sizes: tuple[int, int], group_size: int, grid: int, phase_units: int, batch: int
) -> GemvShape:
    """A launch whose blocks add up so many tiles at once; of several tokens two batches in turn."""
    stages = 2 if width == 1 else 1
    block_tiles = -(-sizes[1] // 32 // grid)
    held = batch if width == 1 else min(block_tiles, 2 * batch)
    return GemvShape(width, *sizes, group_size, grid, phase_units, held, stages)


# Inputs that end inside a unit, blocks with several tiles, fewer units than warps, phases, batches
# of which some warps have nothing.
CASES = [
    ((576, 160), 64, "norm", 2, 3, 1),
    ((640, 64), 128, "norm", 1, 3, 2),
    ((192, 96), 64, "norm_silu", 1, 1, 3),
    ((192, 224), 64, "norm_silu", 1, 1, 2),
    ((1536, 192), 32, "add", 1, 4, 1),
    ((4864, 32), 128, "add", 1, 19, 1),
    ((4864, 96), 128, "norm", 1, 10, 1),
]


@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_those_of_float64(width: int, case: tuple) -> None:
    sizes, group_size, output, grid, phase_units, held = case
    shape = shape_of(width, sizes, group_size, grid, phase_units, held)
    launch = launch_with(f"-DTURBOJET_GROUP_SIZE={group_size}")
    got, want = run_gemv(launch, GemvCase(1 if width == 1 else 7, shape, output))
    assert relative_error(got.astype(np.float64), want) < TOLERANCE


def test_a_token_has_the_same_bits_in_every_width_and_launch_shape() -> None:
    launch = launch_with("-DTURBOJET_GROUP_SIZE=128")
    results = set()
    for width, num_tokens, grid, phase_units, held in (
        (1, 1, 5, 5, 1),
        (1, 1, 1, 2, 2),
        (4, 3, 2, 5, 2),
        (4, 3, 1, 3, 1),
        (8, 8, 3, 3, 1),
        (8, 1, 1, 5, 1),
        (8, 8, 1, 2, 2),
    ):
        shape = shape_of(width, (1152, 160), 128, grid, phase_units, held)
        got, _ = run_gemv(launch, GemvCase(num_tokens, shape, "norm"))
        results.add(got[0].tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("flag", ["-DTURBOJET_PLAIN=1", "-DTURBOJET_EMULATE_EARLY"])
def test_the_plain_variant_and_early_copies_give_the_same_bits(flag: str) -> None:
    case = GemvCase(4, shape_of(4, (576, 64), 64, 1, 3, 2), "norm_silu", has_bias=False)
    group = "-DTURBOJET_GROUP_SIZE=64"
    wanted, _ = run_gemv(launch_with(group), case)
    got, _ = run_gemv(launch_with(group, flag), case)
    assert got.tobytes() == wanted.tobytes()


def test_no_bias_is_no_bias() -> None:
    launch = launch_with("-DTURBOJET_GROUP_SIZE=128")
    shape = shape_of(1, (256, 32), 128, 1, 1, 1)
    for output in ("norm", "add"):
        got, want = run_gemv(launch, GemvCase(1, shape, output, has_bias=False))
        assert relative_error(got.astype(np.float64), want) < TOLERANCE


def test_a_value_that_is_no_number_reaches_the_result() -> None:
    base = launch_with("-DTURBOJET_GROUP_SIZE=128")

    def spoil(launch: Launch, name: str, grid: tuple, arguments: list, shared: int = 0) -> None:
        for argument in arguments:
            if isinstance(argument, np.ndarray) and argument.shape == (1, 256):
                argument[0, 77] = np.nan
        launch(name, grid, arguments, shared)

    case = GemvCase(1, shape_of(1, (256, 32), 128, 1, 1, 1), "add")
    got, _ = run_gemv(partial(spoil, base), case)
    assert np.isnan(got.astype(np.float64)).all()


@pytest.mark.parametrize(
    ("width", "flags"),
    [
        (1, ("-DTURBOJET_GEMV_PARTS=2", "-DTURBOJET_GEMV_EARLY_PARTS=1")),
        (1, ("-DTURBOJET_GEMV_SINGLE_EARLY=2",)),
        (1, ("-DTURBOJET_GEMV_SINGLE_EARLY=0",)),
        (8, ("-DTURBOJET_GEMV_PARTS=2",)),
    ],
    ids=str,
)
def test_kernels_with_other_switches_give_the_same_bits(width: int, flags: tuple[str, ...]) -> None:
    case = GemvCase(width, shape_of(width, (1152, 160), 128, 2, 3, 1), "add")
    usual, _ = run_gemv(launch_with("-DTURBOJET_GROUP_SIZE=128"), case)
    other, _ = run_gemv(launch_with("-DTURBOJET_GROUP_SIZE=128", *flags), case)
    assert other.tobytes() == usual.tobytes()


@pytest.mark.parametrize("sizes", [(576, 96), (1920, 32)], ids=str)
def test_blocks_of_half_the_warps_give_the_same_bits(sizes: tuple[int, int]) -> None:
    launch = launch_with("-DTURBOJET_GROUP_SIZE=64")
    shape = shape_of(1, sizes, 64, sizes[1] // 32, -(-sizes[0] // 256), 1)
    paired = pair_gemv(shape, 227 * 1024)
    assert paired.add_kernel == "w4a16_gemv_paired_add_1"
    usual, _ = run_gemv(launch, GemvCase(1, shape, "add"))
    other, want = run_gemv(launch, GemvCase(1, paired, "add"))
    assert other.tobytes() == usual.tobytes()
    assert relative_error(other.astype(np.float64), want) < TOLERANCE
