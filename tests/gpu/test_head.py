"""The output head and the norm on the GPU against float64."""

from __future__ import annotations

from collections.abc import Iterator

import figures
import numpy as np
import pytest
from device_launch import ArrayLaunch, device_launch
from linear_cases import HeadCase, relative_error, run_head, run_norm

# fp16: activations are rounded once, 2^-12.6 on average; int8: to 16 bits of the largest, times the
# outlier that the inputs have.
TOLERANCE = 5e-4
ROWS = (1, 3, 4, 5, 8)
HEADS = [
    (64, 40, ROWS),
    (576, 5001, ROWS),
    (960, 333, ROWS),
    (1536, 1000, ROWS),
    (2048, 9254, ROWS),
]
HEADS += [(4096, 32000, (8,))]


@pytest.fixture(scope="module")
def launch() -> Iterator[ArrayLaunch]:
    with device_launch("head_f16", "head_int8", "rms_norm") as launch:
        yield launch


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize(("hidden_size", "vocab_size", "row_counts"), HEADS)
def test_logits_are_those_of_float64(
    launch: ArrayLaunch,
    hidden_size: int,
    vocab_size: int,
    row_counts: tuple[int, ...],
    is_int8: bool,
) -> None:
    for num_rows in row_counts:
        case = HeadCase(num_rows, hidden_size, vocab_size, is_int8, 132)
        got, want = run_head(launch, case, first_rows=num_rows == 3)
        error = relative_error(got, want)
        figures.note(f"worst relative error, {'int8' if is_int8 else 'fp16'} head", error)
        assert error < TOLERANCE
        assert np.abs(got - want).max() < 2e-3 * np.abs(want).max()


@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize("hidden_size", [192, 576, 4096])
def test_a_row_has_the_same_logits_in_any_company_and_on_any_grid(
    launch: ArrayLaunch, hidden_size: int, is_int8: bool
) -> None:
    alone, _ = run_head(launch, HeadCase(1, hidden_size, 5000, is_int8, 132))
    for num_rows, grid in ((1, 264), (2, 7), (4, 1), (5, 132), (8, 400)):
        many, _ = run_head(launch, HeadCase(num_rows, hidden_size, 5000, is_int8, grid))
        assert np.array_equal(alone[0], many[0])


@pytest.mark.parametrize("hidden_size", [64, 576, 4096, 8192])
def test_normed_rows_are_those_of_float64(launch: ArrayLaunch, hidden_size: int) -> None:
    for num_tokens in (1, 9, 130):
        got, want = run_norm(launch, num_tokens, hidden_size)
        assert relative_error(got, want) < TOLERANCE
