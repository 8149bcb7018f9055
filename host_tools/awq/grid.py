"""The 4-bit grid: scales and zeros of groups of weights, and the codes that lie on it.

Here a weight is ``[out, in]`` fp32 and a group is ``group_size`` neighbouring inputs of one output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from device_runtime.package_format.int4 import MAX_CODE

MIN_SCALE = 2.0**-14
"""The smallest normal fp16: a smaller scale counts as zero in the kernels (spec section 2.5)."""

STRIP_WEIGHTS = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Weights that are worked on at once: on a CPU a strip and its temporaries stay in the cache; a GPU
wants few launches."""


@dataclass(frozen=True)
class Grid:
    """Where the codes of a weight can lie.

    Attributes:
        scales: ``[out, groups]`` fp32 holding fp16 values of at least :data:`MIN_SCALE`.
        zeros: ``[out, groups]`` fp32 holding whole numbers from 0 to 15.
    """

    scales: torch.Tensor
    zeros: torch.Tensor

    @classmethod
    def between(cls, low: torch.Tensor, high: torch.Tensor) -> Grid:
        """Return the grid that spans ``low`` to ``high`` and holds zero, as zero itself is a code.

        Args:
            low: ``[out, groups]``, at most 0.
            high: ``[out, groups]``, at least 0.
        """
        scales = ((high - low) / MAX_CODE).clamp_(min=MIN_SCALE).half().float()
        zeros = (-low / scales).round_().clamp_(0, MAX_CODE)
        return cls(scales, zeros)

    @classmethod
    def spanning(cls, weight: torch.Tensor, group_size: int) -> Grid:
        """Return the grid from each group's least to its greatest weight."""
        return cls.between(*extrema(weight, group_size))

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the nearest codes of ``[out, in]``, fp32 whole numbers from 0 to 15."""
        groups = grouped(weight, self.scales.shape[1])
        steps = groups.div(self.scales.unsqueeze(-1)).round_()
        return steps.add_(self.zeros.unsqueeze(-1)).clamp_(0, MAX_CODE).view_as(weight)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weights that codes ``[out, in]`` stand for, fp32 holding fp16 values."""
        steps = grouped(codes, self.scales.shape[1]).sub(self.zeros.unsqueeze(-1))
        # The product is exact in fp32, so this is the kernels' one rounding.
        return steps.mul_(self.scales.unsqueeze(-1)).half().float().view_as(codes)

    @property
    def greatest(self) -> torch.Tensor:
        """The greatest ``|value|`` that any code of each group has, ``[out, groups]`` fp32."""
        return torch.maximum(self.zeros, MAX_CODE - self.zeros).mul_(self.scales)

    def reach(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the greatest ``|value|`` of these codes in each group, ``[out, groups]`` fp32."""
        least, greatest = torch.aminmax(grouped(codes, self.scales.shape[1]), dim=-1)
        return torch.maximum(self.zeros - least, greatest - self.zeros).mul_(self.scales)

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the nearest values on the grid; not rounded to fp16, for searching.

        The rounding is 2^-11 of a value, a hundredth of the grid's own error.
        """
        groups = grouped(weight, self.scales.shape[1])
        scales, zeros = self.scales.unsqueeze(-1), self.zeros.unsqueeze(-1)
        steps = groups.div(scales).round_()
        # Clamping before the zero is added gives the same value as codes() and values().
        return torch.clamp(steps, -zeros, MAX_CODE - zeros).mul_(scales).view_as(weight)


def extrema(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return least and greatest weight of each group, ``[out, groups]``, with 0 between them."""
    low, high = torch.aminmax(grouped(weight, weight.shape[1] // group_size), dim=-1)
    return low.clamp_(max=0), high.clamp_(min=0)


def grouped(values: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return ``[out, in]`` as ``[out, groups, group_size]``, a view."""
    return values.view(values.shape[0], num_groups, -1)


def strips(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return ``[out, in]`` cut into rows that are searched together; outputs are independent."""
    num_rows = max(1, STRIP_WEIGHTS[weight.device.type] // weight.shape[1])
    return torch.split(weight, num_rows)
