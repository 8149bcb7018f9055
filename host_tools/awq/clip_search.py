"""Finds the range of each group's grid: a finer grid is worth a few clipped weights."""

from __future__ import annotations

import torch

from host_tools.awq.fused_blocks import clip_fused, is_fused
from host_tools.awq.grid import MIN_SCALE, Grid, extrema, grouped, strips

NUM_SHRINKS = 20
MAX_SHRINK = 0.5
"""Ranges from the whole to half of it are tried, as in AWQ's clipping search."""

NUM_TRIMS = 6
TRIM = 0.04
"""Then each end alone is moved by up to 6 times 4% of its length, inwards and outwards."""

MAX_END = 1.1


def search_clipping(weight: torch.Tensor, costs: torch.Tensor, group_size: int) -> Grid:
    """Return each group's best grid among ranges that are shrunken or shifted.

    A weight's error counts by its square and the cost of its input.

    Args:
        weight: ``[out, in]`` fp32.
        costs: ``[in]`` fp32, not negative.
        group_size: of the codes.
    """
    if is_fused(weight.device):
        return Grid(
            *clip_fused(
                weight,
                costs,
                group_size,
                MIN_SCALE=MIN_SCALE,
                NUM_SHRINKS=NUM_SHRINKS,
                SHRINK=MAX_SHRINK / NUM_SHRINKS,
                NUM_TRIMS=NUM_TRIMS,
                TRIM=TRIM,
                MAX_END=MAX_END,
            )
        )
    found = [_Search(rows, costs, group_size).run() for rows in strips(weight)]
    return Grid(
        torch.cat([strip.scales for strip in found]), torch.cat([strip.zeros for strip in found])
    )


def group_errors(grid: Grid, weight: torch.Tensor, costs: torch.Tensor) -> torch.Tensor:
    """Return the cost of rounding each group to the nearest code, ``[out, groups]``."""
    squares = grid.nearest(weight).sub_(weight).square_().mul_(costs)
    return grouped(squares, grid.scales.shape[1]).sum(dim=-1)


class _Search:
    """The best grid of some rows so far."""

    def __init__(self, weight: torch.Tensor, costs: torch.Tensor, group_size: int) -> None:
        self._weight = weight
        self._costs = costs
        self._low, self._high = extrema(weight, group_size)
        self._best = Grid.between(self._low, self._high)
        self._least = group_errors(self._best, weight, costs)
        # What is kept of either end of each group's range.
        self._kept_low = torch.ones_like(self._low)
        self._kept_high = torch.ones_like(self._high)

    def run(self) -> Grid:
        whole = torch.ones_like(self._low)
        for step in range(1, NUM_SHRINKS):
            kept = whole * (1 - step * MAX_SHRINK / NUM_SHRINKS)
            self._try(kept, kept)
        for step in range(1, NUM_TRIMS + 1):
            for change in (-step * TRIM, step * TRIM):
                self._try((self._kept_low + change).clamp_(max=MAX_END), self._kept_high)
                self._try(self._kept_low, (self._kept_high + change).clamp_(max=MAX_END))
        return self._best

    def _try(self, kept_low: torch.Tensor, kept_high: torch.Tensor) -> None:
        grid = Grid.between(self._low * kept_low, self._high * kept_high)
        errors = group_errors(grid, self._weight, self._costs)
        is_better = errors < self._least
        self._least = torch.where(is_better, errors, self._least)
        self._best = Grid(
            torch.where(is_better, grid.scales, self._best.scales),
            torch.where(is_better, grid.zeros, self._best.zeros),
        )
        self._kept_low = torch.where(is_better, kept_low, self._kept_low)
        self._kept_high = torch.where(is_better, kept_high, self._kept_high)
