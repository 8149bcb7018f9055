"""Chooses grid and codes of some outputs of a linear: aim, clip, compensate, refit, descend."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from device_runtime.package_format.model_config import ModelConfig
from host_tools.awq.clip_search import search_clipping
from host_tools.awq.compensation import InputGrids, compensate, descend, refit_steps
from host_tools.awq.curvature import Curvature
from host_tools.awq.gram import InputMoments
from host_tools.awq.grid import MIN_SCALE, Grid

AIM = 0.5
"""Share of the streams' drift that a linear is asked to make up for; all of it follows the
calibration text too closely."""

NUM_REFITS = 1
"""Rounds of refitting steps and descending; a second one follows the calibration text only."""

MAX_REFIT = 1.4
"""A refitted step stays within this factor of the searched one; beyond, few tokens speak."""

MAX_ROWS = {"cpu": 1 << 9, "cuda": 1 << 12}
"""Outputs that are solved at once. They do not depend on each other, so what is beyond that may be
solved elsewhere meanwhile. 4096 are 128 programs of `fused_blocks`, one for each multiprocessor of
a large GPU."""

MAX_SYSTEM_BYTES = 1 << 30
"""Of the linear systems of refitting, groups by groups for each output, on a GPU: small groups of
many inputs would otherwise take more than all the rest."""

FACTOR_MATRICES = 5
"""Matrices of a linear's inputs squared that its factorization holds at once."""

STRIP_FORMS = 8
"""Arrays of a strip's size that refitting holds at once: the strip scaled, turned over and copied,
its codes, what they stand for, and products of all."""


@dataclass(frozen=True)
class SolvedRows:
    """Outputs of a weight on their grids.

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
        return moments.residual_drift
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


def strip_bounds(device: torch.device, num_outputs: int, num_groups: int) -> list[tuple[int, int]]:
    """Cut a linear's outputs into strips that are solved at once, all about as large.

    The cuts depend on the shape and the kind of device alone, never on how many devices there are:
    a product may have other last bits with another number of outputs.

    Args:
        device: that solves.
        num_outputs: of the linear.
        num_groups: of each output.

    Returns:
        The first output of each strip and the one behind its last.
    """
    num_strips = -(-num_outputs // rows_at_once(device, num_groups))
    return list(pairwise(num_outputs * number // num_strips for number in range(num_strips + 1)))


def rows_at_once(device: torch.device, num_groups: int) -> int:
    """Return how many outputs are solved at once at most, each with so many groups."""
    limit = MAX_ROWS[device.type]
    if device.type == "cpu":
        return limit
    return max(1, min(limit, MAX_SYSTEM_BYTES // (4 * num_groups**2)))


def search_bytes(model: ModelConfig, group_size: int) -> int:
    """Estimate what searching the largest linear of a layer takes on a GPU, all of it fp32.

    The larger of two moments: the factorization of its curvature, with the weight, what it aims at
    and what becomes of either, and the refitting of a strip's steps: curvature and aim, the strip
    in its forms, and its linear systems, which torch copies to solve them.

    Args:
        model: sizes.
        group_size: of the codes.
    """
    hidden, largest = model.hidden_size, max(model.hidden_size, model.intermediate_size)
    num_groups = largest // group_size
    bounds = strip_bounds(torch.device("cuda"), hidden, num_groups)
    num_rows = max(end - start for start, end in bounds)
    factorization = FACTOR_MATRICES * largest**2 + 4 * hidden * largest
    strip = num_rows * (STRIP_FORMS * largest + 2 * num_groups**2)
    return 4 * max(factorization, 2 * largest**2 + hidden * largest + strip)


def solve_rows(weight: torch.Tensor, curvature: Curvature, group_size: int) -> SolvedRows:
    """Quantize outputs of a weight so that their error under the curvature is small.

    Args:
        weight: ``[out, in]`` fp32, scaled.
        curvature: of its inputs as they meet this weight.
        group_size: of the codes.
    """
    clipped = grid = search_clipping(weight, curvature.conditional, group_size)
    target = weight.T[curvature.order]
    grids = InputGrids.of(grid, curvature)
    codes = compensate(target.clone(), grids, curvature)
    for _ in range(NUM_REFITS):
        grid = bounded_refit(clipped, refit_steps(codes, target, grids, curvature).T)
        grids = InputGrids.of(grid, curvature)
        codes = descend(codes, target, grids, curvature.form)
    return SolvedRows(clipped, grid, codes[curvature.back].T.contiguous())


def bounded_refit(grid: Grid, scales: torch.Tensor) -> Grid:
    """Return the grid with new scales in fp16 where they are near the old ones."""
    is_near = (scales < grid.scales * MAX_REFIT) & (scales > grid.scales / MAX_REFIT)
    stored = torch.where(is_near, scales, grid.scales).half().float().clamp_(min=MIN_SCALE)
    return Grid(stored, grid.zeros)
