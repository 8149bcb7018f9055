from __future__ import annotations

import pytest

from device_runtime.errors import InternalError
from device_runtime.kernels.gemv_shape import GemvShape, pair_gemv, plan_gemv

XAVIER = 96 * 1024
ORIN = 163 * 1024
HOPPER = 227 * 1024


def plan(width: int, sizes: tuple[int, int], num_sms: int, most: int) -> GemvShape:
    return plan_gemv(
        width=width,
        num_inputs=sizes[0],
        num_outputs=sizes[1],
        group_size=128,
        num_sms=num_sms,
        max_shared_bytes=most,
    )


def test_shared_memory_by_hand() -> None:
    shape = GemvShape(1, 4096, 12288, 128, 132, 16, 3, 2)
    # 16 warps x 2 stages x (256 x 32 / 2 codes + 2 groups x 32 x 4)
    ring = 16 * 2 * (4096 + 256)
    # 1 / rms and 32 sums of squares, in sixteens; 32 stretches of 2 x 128 digits + 2 numbers
    activations = 16 + 128 + 32 * (256 + 16)
    # 3 tiles x 16 units x 32 rows
    # and the barrier between batches
    assert shape.shared_bytes == ring + activations + 3 * 16 * 32 * 4 + 8
    assert shape.activation_bytes == 0
    assert shape.workspace_bytes == 0


def test_activations_of_eight_tokens_by_hand() -> None:
    shape = GemvShape(8, 4864, 64, 32, 2, 19, 1, 1)
    # 38 stretches, each 2 x 128 x 8 digits, 8 scales, 4 x 8 sums; and 8 sums of squares
    assert shape.activation_bytes == 38 * (2048 + 160 + 32)
    # 38 x 8 warps, 8 in a block
    assert shape.quantize_grid == 38


def test_a_large_gpu_does_all_at_once() -> None:
    shape = plan(1, (4096, 22016), 132, HOPPER)
    assert (shape.grid, shape.block_tiles, shape.held_tiles) == (132, 6, 6)
    assert shape.phase_units == shape.num_units == 16


def test_more_sums_than_fit_are_taken_in_batches_of_one_size() -> None:
    shape = plan(4, (4096, 12288), 8, ORIN)
    assert shape.block_tiles == 48
    assert shape.held_tiles < 48
    assert shape.shared_bytes <= ORIN
    # Of which two are held at once.
    assert shape.held_tiles % 2 == 0
    batches = -(-48 // (shape.held_tiles // 2))
    assert batches * shape.held_tiles // 2 - 48 < batches


@pytest.mark.parametrize("width", [4, 8])
def test_two_batches_fit_or_all_tiles_do(width: int) -> None:
    for most in (XAVIER, ORIN, HOPPER):
        for sizes in ((576, 1536), (4096, 4096), (11008, 4096), (8192, 2 * 28672)):
            shape = plan(width, sizes, 16, most)
            assert shape.held_tiles == shape.block_tiles or shape.held_tiles % 2 == 0


def test_blocks_of_half_the_warps_serve_small_matrices_where_two_fit() -> None:
    shape = plan(1, (4096, 4096), 132, HOPPER)
    paired = pair_gemv(shape, HOPPER)
    assert (paired.warps, paired.add_kernel) == (8, "w4a16_gemv_paired_add_1")
    assert shape.shared_bytes - paired.shared_bytes == 8 * 2 * (4096 + 256)
    assert pair_gemv(shape, 150 * 1024) == shape  # 79 KiB are more than half of it
    for other in (
        plan(1, (11008, 4096), 132, HOPPER),  # several units a warp
        plan(1, (4096, 8192), 132, HOPPER),  # several tiles a block
        plan(4, (4096, 4096), 132, HOPPER),
    ):
        assert pair_gemv(other, HOPPER) == other
        assert other.add_kernel == f"w4a16_gemv_add_{other.width}"


def test_more_inputs_than_fit_are_taken_in_phases() -> None:
    shape = plan(8, (18944, 3584), 16, ORIN)
    assert shape.phase_units < shape.num_units == 74
    assert shape.shared_bytes <= ORIN
    assert shape.workspace_bytes == 4 * 8 * 3584


@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize("most", [XAVIER, ORIN, HOPPER])
def test_every_shape_of_a_board_fits(width: int, most: int) -> None:
    for sizes in ((576, 1536), (4096, 4096), (11008, 4096), (8192, 2 * 28672), (28672, 8192)):
        for num_sms in (8, 16):
            shape = plan(width, sizes, num_sms, most)
            assert shape.shared_bytes <= most
            assert shape.stages == (2 if width == 1 and most > XAVIER else 1)


def test_a_device_with_too_little_shared_memory_is_refused() -> None:
    with pytest.raises(InternalError, match=r"4096 x 64 GEMV of width 8 needs \d+ .* has 65536"):
        plan(8, (4096, 64), 8, 65536)
