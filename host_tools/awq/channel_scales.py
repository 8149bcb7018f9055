"""Scales of a linear's inputs that give its largest activations a finer grid (AWQ)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from host_tools.awq.grid import grouped

MIN_FACTOR = 1e-4
MAGNITUDE_EXPONENT = 0.2
IMPORTANCE_EXPONENT = 0.3
"""Of ``magnitude^a / importance^b`` (AWQ, arXiv 2306.00978, searches a with b = 1 - a): with
compensation after it, weak scales do best."""


MAX_OVERRUN = 1.5
"""Times the range of the original's values that scaled ones may span, for the static int8 cache has
its parameters from the original. A lower bound would double the steps of layers that need not."""


@dataclass(frozen=True)
class ValueRange:
    """What each channel of a layer's values spans in the original.

    Attributes:
        least: ``[kv_size]`` fp32.
        most: ``[kv_size]`` fp32.
    """

    least: torch.Tensor
    most: torch.Tensor

    def factor(self, divisors: torch.Tensor) -> float:
        """Return the power of two that keeps values in their range when divisors are multiplied.

        Both ends of a tap scaled by a power of two have the same codes as before.

        Args:
            divisors: ``[kv_size]`` fp32, greater than 0.
        """
        overrun = 1.0
        for extremes in (self.most.to(divisors.device), -self.least.to(divisors.device)):
            whole = extremes.max().item()
            if whole > 0:
                overrun = max(overrun, (extremes / divisors).max().item() / whole)
        if overrun <= MAX_OVERRUN:
            return 1.0
        fraction, exponent = math.frexp(overrun)
        return 2.0 ** (exponent if fraction > 0.5 else exponent - 1)


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


def channel_scales(
    weight: torch.Tensor,
    magnitude: torch.Tensor,
    group_size: int,
    sharing: HeadSharing | None = None,
) -> torch.Tensor:
    """Return what the inputs of all consumers are multiplied by, ``[in]`` fp32.

    Args:
        weight: ``[out, in]`` of all consumers, stacked on the outputs.
        magnitude: ``[in]``, mean ``|x|`` of the inputs.
        group_size: of the codes.
        sharing: of the inputs between heads; None when every input is free.
    """
    magnitude = magnitude.clamp(min=MIN_FACTOR)
    importance = channel_importance(weight, group_size).clamp(min=MIN_FACTOR)
    if sharing is not None:
        magnitude, importance = sharing.average(magnitude), sharing.average(importance)
    return centred(magnitude**MAGNITUDE_EXPONENT / importance**IMPORTANCE_EXPONENT)


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
