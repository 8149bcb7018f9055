"""Chooses grid and codes of linears with common inputs: aim, clip, compensate, refit, descend."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from host_tools.awq.clip_search import search_clipping
from host_tools.awq.compensation import InputGrids, compensate, descend, refit_steps
from host_tools.awq.curvature import Curvature
from host_tools.awq.gram import InputMoments
from host_tools.awq.grid import MIN_SCALE, Grid
from host_tools.awq.single_thread import single_thread

AIM = 0.5
"""Share of the streams' drift that a linear is asked to make up for; all of it follows the
calibration text too closely."""

NUM_REFITS = 1
"""Rounds of refitting steps and descending; a second one follows the calibration text only."""

MAX_REFIT = 1.4
"""A refitted step stays within this factor of the searched one; beyond, few tokens speak."""

MAX_ROWS = {"cpu": 1 << 12, "cuda": 1 << 15}
"""Outputs that are solved at once; they do not depend on each other."""

MAX_SYSTEM_BYTES = 1 << 30
"""Of the linear systems of refitting, groups by groups for each output, on a GPU: small groups of
many inputs would otherwise take more than all the rest."""


@dataclass(frozen=True)
class SolvedLinear:
    """A weight on its grid.

    Attributes:
        clipped: the grid that the search over ranges chose.
        grid: the grid of the codes.
        codes: ``[out, in]`` fp32, whole numbers from 0 to 15.
    """

    clipped: Grid
    grid: Grid
    codes: torch.Tensor


def drift_products(weight: torch.Tensor, moments: InputMoments) -> torch.Tensor | None:
    """Return how the outputs that are due differ from those there will be, times the inputs.

    With ``X`` and ``Y`` the exact and the quantized inputs and ``D`` the drift of the stream that
    the output is added to: the mean over tokens of ``(W (X - Y) + D) Y^T``.

    Args:
        weight: ``[out, in]`` fp32.
        moments: of its inputs.

    Returns:
        ``[out, in]``; None when there is one stream.
    """
    if moments.drift is None:
        return None
    products = weight @ moments.drift
    return products if moments.residual_drift is None else products.add_(moments.residual_drift)


def aimed_weight(
    weight: torch.Tensor, products: torch.Tensor | None, curvature: Curvature
) -> torch.Tensor:
    """Return the weight that gives on the quantized stream what is due on the exact one.

    Least squares asks for ``W + (W (X - Y) + D) Y^T (Y Y^T)^-1`` (as GPTAQ, arXiv 2504.02692, does
    without D); :data:`AIM` of that correction is taken.

    Args:
        weight: ``[out, in]`` fp32, not scaled.
        products: of :func:`drift_products`.
        curvature: of the inputs.
    """
    if products is None:
        return weight
    return weight + curvature.solve(products).mul_(AIM)


def solve_linear(weight: torch.Tensor, curvature: Curvature, group_size: int) -> SolvedLinear:
    """Quantize a weight so that its output error under the curvature is small.

    Args:
        weight: ``[out, in]`` fp32, scaled.
        curvature: of its inputs as they meet this weight.
        group_size: of the codes.
    """
    with single_thread(weight.device):
        solved = [
            _solve_rows(rows, curvature, group_size)
            for rows in torch.split(
                weight, rows_at_once(weight.device, weight.shape[1] // group_size)
            )
        ]
    return SolvedLinear(
        clipped=_stacked([part.clipped for part in solved]),
        grid=_stacked([part.grid for part in solved]),
        codes=torch.cat([part.codes for part in solved]),
    )


def rows_at_once(device: torch.device, num_groups: int) -> int:
    """Return how many outputs are solved at once, each with so many groups."""
    limit = MAX_ROWS[device.type]
    if device.type == "cpu":
        return limit
    return max(1, min(limit, MAX_SYSTEM_BYTES // (4 * num_groups**2)))


def _solve_rows(weight: torch.Tensor, curvature: Curvature, group_size: int) -> SolvedLinear:
    clipped = grid = search_clipping(weight, curvature.conditional, group_size)
    target = weight.T[curvature.order]
    grids = InputGrids.of(grid, curvature)
    codes = compensate(target.clone(), grids, curvature)
    for _ in range(NUM_REFITS):
        grid = bounded_refit(clipped, refit_steps(codes, target, grids, curvature).T)
        grids = InputGrids.of(grid, curvature)
        codes = descend(codes, target, grids, curvature.form)
    return SolvedLinear(clipped, grid, codes[curvature.back].T.contiguous())


def bounded_refit(grid: Grid, scales: torch.Tensor) -> Grid:
    """Return the grid with new scales in fp16 where they are near the old ones."""
    is_near = (scales < grid.scales * MAX_REFIT) & (scales > grid.scales / MAX_REFIT)
    stored = torch.where(is_near, scales, grid.scales).half().float().clamp_(min=MIN_SCALE)
    return Grid(stored, grid.zeros)


def _stacked(grids: list[Grid]) -> Grid:
    return Grid(
        torch.cat([grid.scales for grid in grids]), torch.cat([grid.zeros for grid in grids])
    )
