"""Compensation, descent and refitting against the plain algorithms they are fast forms of."""

from __future__ import annotations

import pytest
import torch

from device_runtime.errors import PackageError
from host_tools.awq import compensation
from host_tools.awq.compensation import InputGrids, compensate, descend, refit_steps
from host_tools.awq.curvature import Curvature
from host_tools.awq.grid import Grid
from host_tools.awq.linear_solver import (
    MAX_REFIT,
    bounded_refit,
    rows_at_once,
    solve_rows,
    strip_bounds,
)
from host_tools.decoder.devices import tensor_cores

GROUP = 32


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(num_tokens: int, channels: int) -> torch.Tensor:
    mixed = randn(num_tokens, channels, seed=1) @ randn(channels, channels, seed=2)
    return mixed / channels**0.5 * torch.exp(randn(channels, seed=3))


@pytest.fixture
def inputs() -> torch.Tensor:
    return correlated(700, 96)


@pytest.fixture
def scales() -> torch.Tensor:
    return torch.exp(0.3 * randn(96, seed=4))


@pytest.fixture
def curvature(inputs: torch.Tensor, scales: torch.Tensor) -> Curvature:
    return Curvature.of(inputs.T @ inputs / len(inputs), len(inputs), scales)


def natural_form(curvature: Curvature) -> torch.Tensor:
    return curvature.form[curvature.back][:, curvature.back]


def cost(error: torch.Tensor, form: torch.Tensor) -> torch.Tensor:
    """Of each row of ``[out, in]``."""
    return ((error @ form) * error).sum(1)


def test_the_form_is_the_gram_matrix_with_a_ridge_in_falling_order(
    inputs: torch.Tensor, scales: torch.Tensor, curvature: Curvature
) -> None:
    gram = inputs.T @ inputs / 700
    # 0.01 + 3 * 96 / 700 mean diagonals.
    ridge = float(gram.diagonal().mean()) * (0.01 + 288 / 700)
    expected = (gram + ridge * torch.eye(96)) / scales / scales[:, None]
    torch.testing.assert_close(natural_form(curvature), expected)
    assert float(curvature.ridge) == pytest.approx(ridge)
    assert (gram.diagonal()[curvature.order].diff() <= 0).all()
    assert torch.equal(curvature.order[curvature.back], torch.arange(96))


def test_the_factor_is_upper_and_gives_the_inverse(curvature: Curvature) -> None:
    assert torch.equal(curvature.factor, curvature.factor.triu())
    product = curvature.factor.T @ curvature.factor @ curvature.form
    torch.testing.assert_close(product, torch.eye(96), rtol=0, atol=1e-4)


def test_conditional_costs_are_those_left_when_the_rest_adapts(curvature: Curvature) -> None:
    form = curvature.form.double()
    for place in (0, 40, 95):
        rest = form[place + 1 :, place + 1 :]
        column = form[place + 1 :, place]
        # The Schur complement: least cost of a unit error here over all errors after it.
        left = form[place, place] - column @ torch.linalg.solve(rest, column)
        found = curvature.conditional[curvature.order[place]]
        assert float(found) == pytest.approx(float(left), rel=1e-4)


def test_solving_and_errors_do_not_see_scales_and_ridge(
    inputs: torch.Tensor, scales: torch.Tensor, curvature: Curvature
) -> None:
    plain = inputs.T @ inputs / 700 + curvature.ridge * torch.eye(96)
    products = randn(5, 96, seed=5)
    torch.testing.assert_close(curvature.solve(products) @ plain, products, rtol=1e-3, atol=1e-4)
    error = randn(5, 96, seed=6)
    direct = (inputs @ (error / scales).T).square().mean(0)
    torch.testing.assert_close(curvature.output_errors(error), direct, rtol=1e-3, atol=1e-4)


def test_silent_inputs_are_no_trouble_and_infinite_ones_are_named() -> None:
    gram = torch.zeros(64, 64)
    assert torch.isfinite(Curvature.of(gram, 10, torch.ones(64)).factor).all()
    gram[3, 3] = torch.inf
    with pytest.raises(PackageError, match="a linear of 64 inputs are not finite in fp32"):
        Curvature.of(gram, 10, torch.ones(64))


def test_a_gpu_factorizes_without_rounding_to_tf32(monkeypatch) -> None:
    inputs, precisions = correlated(300, 32), []

    def watched(function):
        def run(*arguments, **options):
            precisions.append(torch.get_float32_matmul_precision())
            return function(*arguments, **options)

        return run

    for name in ("cholesky_ex", "solve_triangular"):
        monkeypatch.setattr(torch.linalg, name, watched(getattr(torch.linalg, name)))
    with tensor_cores(torch.device("cuda")):
        Curvature.of(inputs.T @ inputs / 300, 300, torch.ones(32))
        assert torch.get_float32_matmul_precision() == "high"
    assert precisions == ["highest", "highest"]


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    inputs = correlated(1200, 576)  # as many as LAPACK needs to split its work
    gram, num_threads, factors = inputs.T @ inputs / 1200, torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            factors.append(Curvature.of(gram, 1200, torch.ones(576)).factor)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(*factors)


def optimal_brain_quantizer(weight: torch.Tensor, grid: Grid, curvature: Curvature) -> torch.Tensor:
    """OBQ in a fixed order, one row at a time, the inverse updated by Gauss-Jordan elimination."""
    form = natural_form(curvature).double()
    codes = torch.empty_like(weight)
    for row in range(len(weight)):
        left, inverse = weight[row].double().clone(), torch.linalg.inv(form)
        for place in curvature.order.tolist():
            group = place // GROUP
            step, zero = grid.scales[row, group].double(), grid.zeros[row, group].double()
            code = (left[place] / step + zero).round().clamp(0, 15)
            codes[row, place] = code
            error = left[place] - (code - zero) * step
            left -= error / inverse[place, place] * inverse[place]
            inverse -= torch.outer(inverse[:, place], inverse[place]) / inverse[place, place]
            inverse[place, place] = 1.0  # out of the game; its row and column are zero
    return codes


@pytest.mark.parametrize("block", [128, 40])
def test_compensation_is_optimal_brain_quantization(
    curvature: Curvature, monkeypatch, block: int
) -> None:
    monkeypatch.setattr(compensation, "BLOCK", block)
    weight = randn(24, 96)
    grid = Grid.spanning(weight, GROUP)
    codes = compensate(weight.T[curvature.order], InputGrids.of(grid, curvature), curvature)
    assert torch.equal(codes[curvature.back].T, optimal_brain_quantizer(weight, grid, curvature))


@pytest.mark.parametrize("block", [128, 40])
def test_descent_is_coordinate_descent(curvature: Curvature, monkeypatch, block: int) -> None:
    monkeypatch.setattr(compensation, "BLOCK", block)
    weight = randn(24, 96)
    grid = Grid.spanning(weight, GROUP)
    form = natural_form(curvature)
    nearest = grid.codes(weight)
    codes = nearest[:, curvature.order].T.contiguous()
    grids = InputGrids.of(grid, curvature)
    found = descend(codes, weight.T[curvature.order], grids, curvature.form)
    found = found[curvature.back].T
    expected, values = nearest.clone(), grid.nearest(weight)
    for place in curvature.order.tolist():
        step, zero = grid.scales[:, place // GROUP], grid.zeros[:, place // GROUP]
        slope = (values - weight) @ form[:, place]
        best = expected[:, place] - slope / form[place, place] / step
        expected[:, place] = best.round().clamp(0, 15)
        values[:, place] = (expected[:, place] - zero) * step
    assert torch.equal(found, expected)
    before, after = cost(grid.nearest(weight) - weight, form), cost(values - weight, form)
    assert (after <= before * 1.00001).all()
    assert after.sum() < 0.9 * before.sum()


def test_refitted_steps_are_the_least_squares_solution(curvature: Curvature) -> None:
    weight = randn(8, 96)
    grid = Grid.spanning(weight, GROUP)
    codes = grid.codes(weight)
    codes[:, 7] = (codes[:, 7] + 3).clamp(max=15)
    grids = InputGrids.of(grid, curvature)
    steps = refit_steps(
        codes[:, curvature.order].T.contiguous(), weight.T[curvature.order], grids, curvature
    )
    root = torch.linalg.cholesky(natural_form(curvature).double())
    for row in range(8):
        counts = (codes[row].view(3, GROUP) - grid.zeros[row, :, None]).double()
        columns = torch.block_diag(*[group[:, None] for group in counts])
        expected = torch.linalg.lstsq(root.T @ columns, root.T @ weight[row].double()).solution
        torch.testing.assert_close(steps[:, row].double(), expected, rtol=1e-3, atol=1e-6)


def test_a_refitted_step_stays_near_the_searched_one() -> None:
    grid = Grid(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.zeros(1, 4))
    found = bounded_refit(grid, torch.tensor([[1.25, 1.5, 0.5, float("nan")]]))
    assert MAX_REFIT == 1.4
    assert found.scales.tolist() == [[1.25, 1.0, 1.0, 1.0]]


@pytest.mark.parametrize("seed", range(3))
def test_no_row_gets_worse_than_clipping_alone(
    curvature: Curvature, scales: torch.Tensor, seed: int
) -> None:
    weight = randn(64, 96, seed=seed) * torch.exp(randn(64, 1, seed=9)) * scales
    solved = solve_rows(weight, curvature, GROUP)
    form = natural_form(curvature)
    clipped = cost(solved.clipped.nearest(weight) - weight, form)
    final = cost(solved.grid.values(solved.codes) - weight, form)
    assert (final <= clipped).all()
    assert final.sum() < 0.9 * clipped.sum()


def test_small_groups_are_refitted_for_fewer_outputs_at_once() -> None:
    cuda = torch.device("cuda", 0)
    # 2^30 bytes of fp32: 86 groups of 128 take 29584 bytes an output, 344 of 32 take 473344.
    assert rows_at_once(cuda, 86) == 4096  # 36294 would fit
    assert rows_at_once(cuda, 344) == 2268
    assert rows_at_once(torch.device("cpu"), 344) == 512


def test_strips_are_even_and_cover_every_output() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert strip_bounds(cpu, 512, 8) == [(0, 512)]
    # 1300 / 3 is 433.3.
    assert strip_bounds(cpu, 1300, 8) == [(0, 433), (433, 866), (866, 1300)]
    # gate of a Llama-2-7B: with two and up four devices are busy two times three strips long.
    assert strip_bounds(cuda, 11008, 32) == [(0, 3669), (3669, 7338), (7338, 11008)]


def test_outputs_do_not_depend_on_each_other(curvature: Curvature) -> None:
    weight = randn(40, 96)
    whole = solve_rows(weight, curvature, GROUP)
    parts = [solve_rows(rows, curvature, GROUP) for rows in weight.split(16)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
