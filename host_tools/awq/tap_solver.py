"""Quantizes the linears of one tap: they share inputs, scales and curvature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from device_runtime.errors import PackageError
from host_tools.awq.curvature import Curvature
from host_tools.awq.gram import InputMoments
from host_tools.awq.grid import Grid
from host_tools.awq.linear_solver import SolvedLinear, aimed_weight, drift_products, solve_linear
from host_tools.checkpoint.families import LogicalLinear
from host_tools.checkpoint.linear_weights import DenseLinear, QuantizedLinear
from host_tools.layer_records import CLIP_STEPS, LinearRecord

ERROR_ROWS = 256
"""Outputs of a linear, at even distances, on which its errors are measured for the record."""


Solved = tuple[QuantizedLinear, LinearRecord]
RunJobs = Callable[
    [Mapping[LogicalLinear, Callable[[torch.device], Solved]]], dict[LogicalLinear, Solved]
]
"""Runs the jobs of a tap's linears, each on a device of its choice."""


@dataclass(frozen=True)
class TapJob:
    """What is asked of one tap.

    Attributes:
        linears: its consumers, dense, fp32.
        scales: ``[in]`` fp32, what their inputs are multiplied by.
        scale_ratio: exponent of the activations in the scales, for the record.
        group_size: of the codes.
    """

    linears: dict[LogicalLinear, DenseLinear]
    scales: torch.Tensor
    scale_ratio: float
    group_size: int


@dataclass(frozen=True)
class TapResult:
    """The quantized linears of a tap, on the CPU, and how they came out."""

    linears: dict[LogicalLinear, QuantizedLinear]
    records: dict[LogicalLinear, LinearRecord]


@dataclass(frozen=True)
class PreparedTap:
    """What remains of the moments of a tap.

    Attributes:
        job: what is asked.
        curvature: of the scaled inputs.
        aimed: the weights to come near, ``[out, in]`` fp32, not scaled.
    """

    job: TapJob
    curvature: Curvature
    aimed: dict[LogicalLinear, torch.Tensor]


def prepare_tap(job: TapJob, take_moments: Callable[[], InputMoments]) -> PreparedTap:
    """Turn the moments of a tap into a curvature and weights to aim at.

    Args:
        job: the linears, on the device of the moments.
        take_moments: hands out those of their common inputs; nobody else should hold them, so
            that each matrix is freed when it was used.

    Raises:
        PackageError: the moments are not finite.
    """
    weight = torch.cat([linear.weight for linear in job.linears.values()])
    moments = take_moments()
    products = drift_products(weight, moments)
    gram, num_tokens = [moments.gram], moments.num_tokens
    del moments
    curvature = Curvature.of(gram.pop(), num_tokens, job.scales)
    aimed = aimed_weight(weight, products, curvature)
    sizes = [len(linear.weight) for linear in job.linears.values()]
    return PreparedTap(
        job, curvature, dict(zip(job.linears, torch.split(aimed, sizes), strict=True))
    )


def solve_tap(tap: PreparedTap, run_jobs: RunJobs | None = None) -> TapResult:
    """Quantize every consumer of a tap.

    Args:
        tap: is not changed.
        run_jobs: spreads the linears over devices; one after another where they lie if None.

    Raises:
        PackageError: a value does not fit fp16.
    """
    jobs = {name: partial(_solve, tap, name) for name in tap.job.linears}
    device = tap.job.scales.device
    if run_jobs is None:
        found = {name: job(device) for name, job in jobs.items()}
    else:
        found = run_jobs(jobs)
    return TapResult(
        {name: linear for name, (linear, _) in found.items()},
        {name: record for name, (_, record) in found.items()},
    )


def _solve(tap: PreparedTap, name: LogicalLinear, device: torch.device) -> Solved:
    """Quantize one linear on a device."""
    job, curvature, aimed = tap.job, tap.curvature.on(device), tap.aimed[name].to(device)
    solved = solve_linear(aimed * curvature.scales, curvature, job.group_size)
    bias = job.linears[name].bias
    linear = stored_linear(solved.grid, solved.codes, job.group_size, bias, name)
    return linear, _Report(curvature, aimed, solved, job).record(name)


@dataclass(frozen=True)
class _Report:
    """What is asked about one linear, on a sample of its outputs."""

    curvature: Curvature
    aimed: torch.Tensor
    solved: SolvedLinear
    job: TapJob

    def record(self, name: LogicalLinear) -> LinearRecord:
        num_outputs, num_inputs = self.aimed.shape
        plain = Grid.spanning(self._sample(self.aimed), self.job.group_size)
        scaled = self._sample(self.aimed) * self.curvature.scales
        whole = Grid.spanning(scaled, self.job.group_size)
        clipped, final = (
            Grid(self._sample(grid.scales), self._sample(grid.zeros))
            for grid in (self.solved.clipped, self.solved.grid)
        )
        rounded = plain.nearest(self._sample(self.aimed)) * self.curvature.scales
        return LinearRecord(
            linear=name,
            num_outputs=num_outputs,
            num_inputs=num_inputs,
            w_bits=4,
            signal=self._cost(scaled),
            rounded=self._cost(rounded - scaled),
            scaled=self._cost(whole.nearest(scaled) - scaled),
            clipped=self._cost(clipped.nearest(scaled) - scaled),
            compensated=self._cost(final.values(self._sample(self.solved.codes)) - scaled),
            scale_ratio=self.job.scale_ratio,
            clip_counts=self._clip_counts(),
        )

    def _sample(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:: -(-len(rows) // ERROR_ROWS)]

    def _cost(self, error: torch.Tensor) -> float:
        """Return the mean squared output error of all rows."""
        costs = self.curvature.output_errors(error)
        return max(0.0, float(costs.mean()) * len(self.aimed))

    def _clip_counts(self) -> tuple[int, ...]:
        whole = Grid.spanning(self.aimed * self.curvature.scales, self.job.group_size)
        shares = (self.solved.clipped.scales / whole.scales).clamp_(max=1.0).mul_(CLIP_STEPS)
        counts = torch.bincount(shares.round_().long().flatten().cpu(), minlength=CLIP_STEPS + 1)
        return tuple(counts.tolist())


def stored_linear(
    grid: Grid,
    codes: torch.Tensor,
    group_size: int,
    bias: torch.Tensor | None,
    name: LogicalLinear,
) -> QuantizedLinear:
    """Return a linear as it is stored, on the CPU.

    Args:
        grid: of the codes.
        codes: ``[out, in]`` fp32 whole numbers.
        group_size: inputs of a group.
        bias: ``[out]`` fp32 or None.
        name: for messages.

    Raises:
        PackageError: a value does not fit fp16.
    """
    return QuantizedLinear(
        codes=codes.to(torch.uint8).T.contiguous().cpu(),
        zeros=grid.zeros.to(torch.uint8).T.contiguous().cpu(),
        scales=in_fp16(grid.scales, f"scales of {name}").T.contiguous(),
        group_size=group_size,
        bias=None if bias is None else in_fp16(bias, f"bias of {name}"),
    )


def in_fp16(values: torch.Tensor, name: str) -> torch.Tensor:
    """Return values in fp16 on the CPU.

    Raises:
        PackageError: one of them is beyond fp16.
    """
    stored = values.to(device="cpu", dtype=torch.float16)
    least, greatest = torch.aminmax(stored)
    if not (torch.isfinite(least) and torch.isfinite(greatest)):
        raise PackageError(
            f"{name} reaches {float(values.abs().max()):.3g}, beyond the 65504 of fp16; "
            f"the checkpoint cannot be run in 4 bits"
        )
    return stored
