"""Measures what the outputs of a linear lose in each step of its search, on a sample of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from host_tools.awq.curvature import Curvature
from host_tools.awq.grid import Grid
from host_tools.awq.linear_solver import SolvedRows
from host_tools.checkpoint.families import LogicalLinear
from host_tools.layer_records import CLIP_STEPS, LinearRecord

ERROR_ROWS = 256
"""Outputs of a linear, at even distances, on which its errors are measured for the record."""


@dataclass(frozen=True)
class StripErrors:
    """Mean squared output errors of a sample of some outputs, each ``[sampled]`` fp32 on the CPU.

    See `LinearRecord` for the steps.

    Attributes:
        clip_counts: ``[CLIP_STEPS + 1]`` int64, groups of all these outputs by what was kept of
            their range.
    """

    signal: torch.Tensor
    rounded: torch.Tensor
    scaled: torch.Tensor
    clipped: torch.Tensor
    compensated: torch.Tensor
    clip_counts: torch.Tensor

    @classmethod
    def of(
        cls,
        curvature: Curvature,
        aimed: torch.Tensor,
        solved: SolvedRows,
        *,
        first_output: int,
        num_outputs: int,
    ) -> StripErrors:
        """Measure some outputs of a linear.

        Args:
            curvature: of its inputs.
            aimed: ``[out, in]`` fp32, what these outputs should be, not scaled.
            solved: what they became.
            first_output: place of the first of them in the linear.
            num_outputs: of the linear; tells the distance of the sample.
        """
        group_size = aimed.shape[1] // solved.grid.scales.shape[1]
        distance = -(-num_outputs // ERROR_ROWS)
        sample = slice(-first_output % distance, None, distance)
        plain = Grid.spanning(aimed[sample], group_size)
        whole = Grid.spanning(aimed * curvature.scales, group_size)
        scaled = aimed[sample] * curvature.scales
        unclipped, clipped, final = (
            Grid(grid.scales[sample], grid.zeros[sample])
            for grid in (whole, solved.clipped, solved.grid)
        )

        def cost(error: torch.Tensor) -> torch.Tensor:
            return curvature.output_errors(error).cpu()

        shares = (solved.clipped.scales / whole.scales).clamp_(max=1.0).mul_(CLIP_STEPS)
        steps = shares.round_().long().flatten().cpu()
        return cls(
            signal=cost(scaled),
            rounded=cost(plain.nearest(aimed[sample]) * curvature.scales - scaled),
            scaled=cost(unclipped.nearest(scaled) - scaled),
            clipped=cost(clipped.nearest(scaled) - scaled),
            compensated=cost(final.values(solved.codes[sample]) - scaled),
            clip_counts=torch.bincount(steps, minlength=CLIP_STEPS + 1),
        )


def linear_record(
    name: LogicalLinear, shape: tuple[int, int], strips: Sequence[StripErrors], scale_ratio: float
) -> LinearRecord:
    """Return how one linear came out.

    Args:
        name: of the linear.
        shape: its outputs and inputs.
        strips: errors of all its outputs, in order.
        scale_ratio: exponent of the activations in the channel scales.
    """
    num_outputs, num_inputs = shape

    def whole(step: Callable[[StripErrors], torch.Tensor]) -> float:
        costs = torch.cat([step(strip) for strip in strips])
        return max(0.0, float(costs.mean()) * num_outputs)

    counts = torch.stack([strip.clip_counts for strip in strips]).sum(0)
    return LinearRecord(
        linear=name,
        num_outputs=num_outputs,
        num_inputs=num_inputs,
        w_bits=4,
        signal=whole(lambda strip: strip.signal),
        rounded=whole(lambda strip: strip.rounded),
        scaled=whole(lambda strip: strip.scaled),
        clipped=whole(lambda strip: strip.clipped),
        compensated=whole(lambda strip: strip.compensated),
        scale_ratio=scale_ratio,
        clip_counts=tuple(counts.tolist()),
    )
