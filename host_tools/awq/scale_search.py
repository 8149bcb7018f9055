"""Finds the channel scales that make a 4-bit weight do the least harm (AWQ, arXiv 2306.00978)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from host_tools.awq.gram import InputMoments
from host_tools.awq.grid import Grid, grouped, strips

MIN_FACTOR = 1e-4
GRID_STEPS = 20
"""Exponents that are tried, from 0 to 0.95 (spec section 5.5)."""


@dataclass(frozen=True)
class ScaleChoice:
    """What a search settled on.

    Attributes:
        scales: ``[in]`` fp32; consumers are multiplied by it, their producer divided.
        ratio: the exponent of the activations' magnitude.
        error: mean squared output error with these scales, and ``plain_error`` without any.
    """

    scales: torch.Tensor
    ratio: float
    error: float
    plain_error: float


@dataclass(frozen=True)
class HeadSharing:
    """Query heads that read the same value head, so their inputs of o must share scales.

    Attributes:
        num_shared: query heads per kv head.
        head_dim: inputs of one head.
    """

    num_shared: int
    head_dim: int

    def average(self, values: torch.Tensor) -> torch.Tensor:
        """Return ``[q_size]`` values with the mean over the heads that share in place of each."""
        heads = values.view(-1, self.num_shared, self.head_dim)
        return heads.mean(dim=1, keepdim=True).expand_as(heads).reshape(-1)

    def of_producer(self, scales: torch.Tensor) -> torch.Tensor:
        """Return the scales of the value heads ``[kv_size]`` of those ``[q_size]``."""
        return scales.view(-1, self.num_shared, self.head_dim)[:, 0].reshape(-1)


def search_scales(
    weight: torch.Tensor,
    moments: InputMoments,
    group_size: int,
    sharing: HeadSharing | None = None,
) -> ScaleChoice:
    """Try ``magnitude^r / importance^(1-r)`` for a grid of r and no scales at all.

    Nothing is run: the error of each candidate follows from the Gram matrix.

    Args:
        weight: ``[out, in]`` of all consumers, stacked on the outputs.
        moments: of their common input.
        group_size: of the codes.
        sharing: of the inputs between heads; None when every input is free.
    """
    magnitude = moments.magnitude.clamp(min=MIN_FACTOR)
    importance = channel_importance(weight, group_size).clamp(min=MIN_FACTOR)
    if sharing is not None:
        magnitude, importance = sharing.average(magnitude), sharing.average(importance)
    plain_error = _error(weight, torch.ones_like(magnitude), moments, group_size)
    best = ScaleChoice(torch.ones_like(magnitude), 0.0, plain_error, plain_error)
    for step in range(GRID_STEPS):
        ratio = step / GRID_STEPS
        scales = centred(magnitude**ratio / importance ** (1 - ratio))
        error = _error(weight, scales, moments, group_size)
        if error < best.error:
            best = ScaleChoice(scales, ratio, error, plain_error)
    return best


def channel_importance(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return how large each input's weights are in their groups (spec section 5.2), ``[in]``.

    The mean over outputs of ``|w|`` relative to the greatest ``|w|`` of its group.
    """
    groups = grouped(weight.abs(), weight.shape[1] // group_size)
    relative = groups / groups.amax(dim=-1, keepdim=True).clamp_(min=MIN_FACTOR**2)
    return relative.view_as(weight).mean(dim=0)


def centred(scales: torch.Tensor) -> torch.Tensor:
    """Return scales whose least and greatest are each other's inverse; errors do not change."""
    scales = scales.clamp(min=MIN_FACTOR)
    return scales / (scales.max() * scales.min()).sqrt()


def _error(
    weight: torch.Tensor, scales: torch.Tensor, moments: InputMoments, group_size: int
) -> float:
    error = 0.0
    for rows in strips(weight):
        scaled = rows * scales
        nearest = Grid.spanning(scaled, group_size).nearest(scaled)
        error += moments.output_error(nearest.div_(scales).sub_(rows))
    return error
