"""The GEMM, norm and head kernels on the CPU, by the emulator; all sizes run in tests/gpu."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import emulator
from linear_cases import (
    Argument,
    GemmCase,
    HeadCase,
    Launch,
    relative_error,
    run_gemm,
    run_head,
    run_norm,
)

pytestmark = pytest.mark.skipif(
    not emulator.has_compiler(), reason="the kernels run on the CPU where there is g++"
)

# fp16 results are rounded once, 2^-11 at most and 2^-12.6 on average.
TOLERANCE = 3e-4


def launch_with(*flags: str) -> Launch:
    def launch(
        name: str,
        grid: tuple[int, int, int],
        arguments: list[Argument],
        shared_bytes: int = 0,
    ) -> None:
        emulator.launch(name, grid, arguments, shared_bytes, flags)

    return launch


launch = launch_with()
launch_groups_of_32 = launch_with("-DTURBOJET_GROUP_SIZE=32")


# With few SMs a block takes whole tiles, with many every tile is cut and its parts are added up.
@pytest.mark.parametrize(
    "case",
    [
        GemmCase(16, 9, 160, 96, 32, "half", num_sms=1),
        GemmCase(16, 17, 1152, 96, 32, "add", num_sms=2),
        GemmCase(16, 16, 288, 160, 32, "silu", num_sms=1),
    ],
    ids=str,
)
def test_four_bit_products_are_those_of_float64(case: GemmCase) -> None:
    got, want = run_gemm(launch_groups_of_32, case)
    assert relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize(
    "case",
    [
        GemmCase(8, 1, 96, 160, 0, "half", num_sms=1),
        GemmCase(8, 9, 576, 192, 0, "add", num_sms=4),
        GemmCase(8, 5, 320, 64, 0, "silu", num_sms=1),
    ],
    ids=str,
)
def test_half_products_are_those_of_float64(case: GemmCase) -> None:
    got, want = run_gemm(launch, case)
    assert relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize(
    "case",
    [
        HeadCase(1, 64, 40, is_int8=True, grid=1),
        HeadCase(3, 192, 333, is_int8=True, grid=2),
        HeadCase(8, 128, 80, is_int8=True, grid=2),
    ],
    ids=str,
)
def test_logits_are_those_of_float64(case: HeadCase) -> None:
    got, want = run_head(launch, case, first_rows=case.num_rows == 1)
    assert relative_error(got, want) < TOLERANCE


def test_a_row_has_the_same_logits_in_any_company_and_on_any_grid() -> None:
    alone, _ = run_head(launch, HeadCase(1, 128, 100, is_int8=True, grid=3))
    many, _ = run_head(launch, HeadCase(4, 128, 100, is_int8=True, grid=2))
    assert np.array_equal(alone[0], many[0])


def test_the_plain_variant_gives_the_same_product() -> None:
    plain = launch_with("-DTURBOJET_GROUP_SIZE=32", "-DTURBOJET_PLAIN=1")
    got, want = run_gemm(plain, GemmCase(16, 17, 288, 96, 32, "half", num_sms=1))
    assert relative_error(got, want) < TOLERANCE


def test_a_normed_row_is_that_of_float64() -> None:
    got, want = run_norm(launch, 3, 576)
    assert relative_error(got, want) < TOLERANCE
