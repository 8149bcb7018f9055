"""Quantizes the linears of one tap; taps of a block do not depend on each other."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class TapJob:
    """What is asked of one tap.

    Attributes:
        linears: its consumers, dense, fp32.
        scales: ``[in]`` fp32, what their inputs are multiplied by.
        row_scales: ``[out]`` fp32 of a consumer whose outputs are divided by them; for few names.
        scale_ratio: exponent of the activations in the scales, for the record.
        group_size: of the codes.
    """

    linears: dict[LogicalLinear, DenseLinear]
    scales: torch.Tensor
    row_scales: dict[LogicalLinear, torch.Tensor]
    scale_ratio: float
    group_size: int

    def on(self, device: torch.device) -> TapJob:
        """Return the same job with its tensors on a device."""
        return TapJob(
            {
                name: DenseLinear(
                    linear.weight.to(device),
                    None if linear.bias is None else linear.bias.to(device),
                )
                for name, linear in self.linears.items()
            },
            self.scales.to(device),
            {name: rows.to(device) for name, rows in self.row_scales.items()},
            self.scale_ratio,
            self.group_size,
        )


@dataclass(frozen=True)
class TapResult:
    """The quantized linears of a tap, on the CPU, and how they came out."""

    linears: dict[LogicalLinear, QuantizedLinear]
    records: dict[LogicalLinear, LinearRecord]


def solve_tap(job: TapJob, moments: InputMoments) -> TapResult:
    """Quantize every consumer of a tap.

    Args:
        job: the linears, on the device of the moments.
        moments: of their common inputs.

    Raises:
        PackageError: the moments are not finite, or a value does not fit fp16.
    """
    names = list(job.linears)
    sizes = [len(job.linears[name].weight) for name in names]
    weight = torch.cat([job.linears[name].weight for name in names])
    products = drift_products(weight, moments)
    gram, num_tokens = moments.gram, moments.num_tokens
    del moments
    curvature = Curvature.of(gram, num_tokens, job.scales)
    del gram
    aimed = aimed_weight(weight, products, curvature)
    del products
    row_scales = torch.cat(
        [
            job.row_scales.get(name, weight.new_ones(size))
            for name, size in zip(names, sizes, strict=True)
        ]
    )
    scaled = aimed * job.scales / row_scales.unsqueeze(1)
    solved = solve_linear(scaled, curvature, job.group_size)
    linears, records = {}, {}
    start = 0
    for name, size in zip(names, sizes, strict=True):
        rows = slice(start, start + size)
        own, start = _rows(solved, rows), start + size
        bias = job.linears[name].bias
        if bias is not None and name in job.row_scales:
            bias = bias / job.row_scales[name]
        linears[name] = stored_linear(own.grid, own.codes, job.group_size, bias, name)
        report = _Report(curvature, aimed[rows], row_scales[rows], own, job)
        records[name] = report.record(name)
    return TapResult(linears, records)


@dataclass(frozen=True)
class _Report:
    """What is asked about one linear, on a sample of its outputs."""

    curvature: Curvature
    aimed: torch.Tensor
    row_scales: torch.Tensor
    solved: SolvedLinear
    job: TapJob

    def record(self, name: LogicalLinear) -> LinearRecord:
        num_outputs, num_inputs = self.aimed.shape
        plain = Grid.spanning(self._sample(self.aimed), self.job.group_size)
        scaled = self._sample(self._scaled())
        whole = Grid.spanning(scaled, self.job.group_size)
        clipped, final = (
            Grid(self._sample(grid.scales), self._sample(grid.zeros))
            for grid in (self.solved.clipped, self.solved.grid)
        )
        rounded = plain.nearest(self._sample(self.aimed)) * self.job.scales
        rounded /= self._sample(self.row_scales).unsqueeze(1)
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

    def _scaled(self) -> torch.Tensor:
        return self.aimed * self.job.scales / self.row_scales.unsqueeze(1)

    def _cost(self, error: torch.Tensor) -> float:
        """Return the mean squared output error of all rows, row scales undone."""
        costs = self.curvature.output_errors(error) * self._sample(self.row_scales).square()
        return max(0.0, float(costs.mean()) * len(self.aimed))

    def _clip_counts(self) -> tuple[int, ...]:
        whole = Grid.spanning(self._scaled(), self.job.group_size)
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


def _rows(solved: SolvedLinear, rows: slice) -> SolvedLinear:
    def cut(grid: Grid) -> Grid:
        return Grid(grid.scales[rows], grid.zeros[rows])

    return SolvedLinear(cut(solved.clipped), cut(solved.grid), solved.codes[rows])
