"""Quantizes the linears of one tap: they share inputs, scales and curvature."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from device_runtime.errors import PackageError
from host_tools.awq.curvature import Curvature
from host_tools.awq.gram import InputMoments
from host_tools.awq.grid import Grid
from host_tools.awq.linear_solver import aimed_weight, drift_products, solve_rows, strip_bounds
from host_tools.awq.output_errors import StripErrors, linear_record
from host_tools.awq.single_thread import single_thread
from host_tools.checkpoint.families import LogicalLinear
from host_tools.checkpoint.linear_weights import DenseLinear, QuantizedLinear
from host_tools.layer_records import LinearRecord


@dataclass(frozen=True)
class Strip:
    """Outputs of a linear that are solved at once.

    Attributes:
        name: of the linear.
        start: the first of them.
        end: the one behind the last.
    """

    name: LogicalLinear
    start: int
    end: int


Solved = tuple[QuantizedLinear, StripErrors]
RunJobs = Callable[[Mapping[Strip, Callable[[torch.device], Solved]]], dict[Strip, Solved]]
"""Runs the jobs of a tap's strips, each on a device of its choice."""


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
        run_jobs: spreads strips of the linears over devices; one after another where they lie if
            None.

    Raises:
        PackageError: a value does not fit fp16.
    """
    job, device = tap.job, tap.job.scales.device
    num_groups = len(job.scales) // job.group_size
    strips = {
        name: [
            Strip(name, *bounds) for bounds in strip_bounds(device, len(linear.weight), num_groups)
        ]
        for name, linear in job.linears.items()
    }
    copies = _Copies(tap.curvature)
    jobs = {
        strip: partial(_solve, tap, copies, strip) for parts in strips.values() for strip in parts
    }
    if run_jobs is None:
        found = {strip: solve(device) for strip, solve in jobs.items()}
    else:
        found = run_jobs(jobs)
    linears, records = {}, {}
    for name, parts in strips.items():
        linears[name] = _joined([found[strip][0] for strip in parts])
        shape = (len(job.linears[name].weight), len(job.scales))
        errors = [found[strip][1] for strip in parts]
        records[name] = linear_record(name, shape, errors, job.scale_ratio)
    return TapResult(linears, records)


class _Copies:
    """A curvature on every device that asks for it."""

    def __init__(self, curvature: Curvature) -> None:
        self._of = {curvature.scales.device: curvature}
        self._original = curvature
        self._lock = threading.Lock()

    def on(self, device: torch.device) -> Curvature:
        with self._lock:
            if device not in self._of:
                self._of[device] = self._original.on(device)
            return self._of[device]


def _solve(tap: PreparedTap, copies: _Copies, strip: Strip, device: torch.device) -> Solved:
    """Quantize one strip on a device."""
    job, curvature = tap.job, copies.on(device)
    linear = job.linears[strip.name]
    rows = slice(strip.start, strip.end)
    aimed = tap.aimed[strip.name][rows].to(device)
    bias = None if linear.bias is None else linear.bias[rows]
    with single_thread(device):
        solved = solve_rows(aimed * curvature.scales, curvature, job.group_size)
        # First: what does not fit fp16 is refused here, and its errors cannot be measured.
        stored = stored_linear(solved.grid, solved.codes, job.group_size, bias, strip.name)
        errors = StripErrors.of(
            curvature, aimed, solved, first_output=strip.start, num_outputs=len(linear.weight)
        )
    return stored, errors


def _joined(parts: Sequence[QuantizedLinear]) -> QuantizedLinear:
    """Return a linear of which these are the outputs, in order."""
    if len(parts) == 1:
        return parts[0]
    biases = [part.bias for part in parts if part.bias is not None]
    return QuantizedLinear(
        codes=_joined_codes([part.codes for part in parts]),
        zeros=torch.cat([part.zeros for part in parts], dim=1),
        scales=torch.cat([part.scales for part in parts], dim=1),
        group_size=parts[0].group_size,
        bias=torch.cat(biases) if biases else None,
    )


def _joined_codes(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return codes ``[in, out]`` of strips, pinned where theirs are."""
    shape = (len(parts[0]), sum(part.shape[1] for part in parts))
    joined = torch.empty(shape, dtype=torch.uint8, pin_memory=parts[0].is_pinned())
    return torch.cat(list(parts), dim=1, out=joined)


def on_host(values: torch.Tensor) -> torch.Tensor:
    """Return values on the CPU, in pinned memory where they come from a GPU: they go back there."""
    if not values.is_cuda:
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values)


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
    scales = in_fp16(grid.scales, f"scales of {name}").T.contiguous()
    if float(grid.greatest.max()) > torch.finfo(torch.float16).max:
        in_fp16(grid.reach(codes), f"weight of {name}")
    return QuantizedLinear(
        codes=on_host(codes.to(torch.uint8).T.contiguous()),
        zeros=on_host(grid.zeros.to(torch.uint8).T.contiguous()),
        scales=scales,
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
