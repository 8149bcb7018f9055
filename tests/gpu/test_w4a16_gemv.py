"""The W4A16 GEMV on the GPU against float64, at every width, group size and edge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import figures
import numpy as np
import pytest
from device_launch import ArrayLaunch, device_launch
from gemv_cases import GemvCase, run_gemv
from linear_cases import relative_error

from device_runtime.kernels.gemv_shape import GemvShape, pair_gemv, plan_gemv
from device_runtime.kernels.table import GEMV_STAGES

# fp16 results are rounded once, 2^-11 at most; silu multiplies two sums.
TOLERANCE = 5e-4
GROUP_SIZES = (128, 64, 32)
OUTPUTS = ("norm", "norm_silu", "add")
SOURCES = (*(f"w4a16_gemv_{width}" for width in GEMV_STAGES), "w4a16_gemv_paired_1")
HOPPER_BYTES = 227 * 1024
ORIN_BYTES = 163 * 1024


@pytest.fixture(scope="module")
def launches() -> Iterator[dict[int, ArrayLaunch]]:
    """By the group size that kernels are built for."""
    with ExitStack() as stack:
        yield {
            size: stack.enter_context(device_launch(*SOURCES, group_size=size))
            for size in GROUP_SIZES
        }


def plan(
    width: int,
    sizes: tuple[int, int],
    group_size: int = 128,
    num_sms: int = 132,
    most: int = HOPPER_BYTES,
) -> GemvShape:
    return plan_gemv(
        width=width,
        num_inputs=sizes[0],
        num_outputs=sizes[1],
        group_size=group_size,
        num_sms=num_sms,
        max_shared_bytes=most,
    )


def variants(shape: GemvShape, output: str) -> tuple[GemvShape, ...]:
    """The launch as planned, and that of half the warps where it serves."""
    paired = pair_gemv(shape, HOPPER_BYTES) if output == "add" else shape
    return tuple(dict.fromkeys((shape, paired)))


def check(launches: dict[int, ArrayLaunch], case: GemvCase) -> np.ndarray:
    got, want = run_gemv(launches[case.shape.group_size], case)
    values = got.astype(np.float64)
    error = relative_error(values, want)
    figures.note("worst relative error, W4A16 GEMV", error)
    assert error < TOLERANCE
    assert np.abs(values - want).max() < 2e-3 * np.abs(want).max()
    return got


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("width", GEMV_STAGES)
def test_products_at_the_edges(
    launches: dict[int, ArrayLaunch], width: int, group_size: int, output: str
) -> None:
    for num_tokens in {1, max(1, width - 1), width}:
        for sizes in ((group_size, 32), (640, 576), (1152, 1536), (4864, 992)):
            for num_sms in (3, 132):
                shape = plan(width, sizes, group_size, num_sms)
                for launched in variants(shape, output):
                    check(launches, GemvCase(num_tokens, launched, output, has_bias=num_sms == 3))


@pytest.mark.parametrize(
    ("sizes", "output"),
    [
        ((4096, 12288), "norm"),
        ((4096, 4096), "add"),
        ((4096, 22016), "norm_silu"),
        ((11008, 4096), "add"),
        ((8192, 2048), "add"),
        ((18944, 3584), "add"),
    ],
)
@pytest.mark.parametrize("width", GEMV_STAGES)
def test_matrices_of_real_models(
    launches: dict[int, ArrayLaunch], width: int, sizes: tuple[int, int], output: str
) -> None:
    for shape in variants(plan(width, sizes), output):
        check(launches, GemvCase(width, shape, output))


def test_a_token_has_the_same_bits_in_every_width_and_launch_shape(
    launches: dict[int, ArrayLaunch],
) -> None:
    for sizes, output in (
        ((4096, 1536), "norm"),
        ((11008, 1024), "add"),
        ((576, 1536), "norm"),
        ((4096, 1024), "add"),
    ):
        group_size = 64 if sizes[0] == 576 else 128
        results = set()
        for width in GEMV_STAGES:
            for num_tokens in {1, width}:
                for num_sms, most in ((132, HOPPER_BYTES), (8, ORIN_BYTES), (3, HOPPER_BYTES)):
                    shape = plan(width, sizes, group_size, num_sms, most)
                    for launched in variants(shape, output):
                        got = check(launches, GemvCase(num_tokens, launched, output))
                        results.add(got[0].tobytes())
        assert len(results) == 1, (sizes, output)
