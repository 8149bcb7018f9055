"""Finds how far each group's range may shrink: a finer grid is worth a few clipped weights."""

from __future__ import annotations

import torch

from host_tools.awq.grid import Grid, extrema, grouped, strips

NUM_SHRINKS = 20
MAX_SHRINK = 0.5
"""Ranges from the whole to half of it are tried, as in AWQ's clipping search."""


def search_clipping(weight: torch.Tensor, gram: torch.Tensor, group_size: int) -> Grid:
    """Return each group's best grid among shrunken ranges.

    A group is judged alone, by the block of the Gram matrix that belongs to its inputs: errors of
    different groups are taken as independent.

    Args:
        weight: ``[out, in]`` fp32.
        gram: ``[in, in]`` fp32 of the inputs as they meet this weight.
        group_size: of the codes.
    """
    blocks = diagonal_blocks(gram, group_size)
    found = [_search_strip(rows, blocks, group_size) for rows in strips(weight)]
    return Grid(
        torch.cat([strip.scales for strip in found]), torch.cat([strip.zeros for strip in found])
    )


def diagonal_blocks(gram: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the blocks of a Gram matrix on its diagonal, ``[groups, group_size, group_size]``."""
    num_groups = gram.shape[0] // group_size
    blocks = gram.view(num_groups, group_size, num_groups, group_size)
    return torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _search_strip(weight: torch.Tensor, blocks: torch.Tensor, group_size: int) -> Grid:
    low, high = extrema(weight, group_size)
    best = Grid.between(low, high)
    least = group_errors(best, weight, blocks)
    for step in range(1, NUM_SHRINKS):
        kept = 1 - step * MAX_SHRINK / NUM_SHRINKS
        grid = Grid.between(low * kept, high * kept)
        errors = group_errors(grid, weight, blocks)
        is_better = errors < least
        least = torch.where(is_better, errors, least)
        best = Grid(
            torch.where(is_better, grid.scales, best.scales),
            torch.where(is_better, grid.zeros, best.zeros),
        )
    return best


def group_errors(grid: Grid, weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Return the output error of each group alone, ``[out, groups]``."""
    error = grouped(grid.nearest(weight).sub_(weight), len(blocks)).transpose(0, 1)
    return torch.sum((error @ blocks) * error, dim=-1).T
