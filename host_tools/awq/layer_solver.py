"""Quantizes one decoder layer: scales between its parts, then a grid and codes for each linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from device_runtime.package_format.model_config import ModelConfig
from host_tools.awq.channel_scales import MAGNITUDE_EXPONENT, HeadSharing, channel_scales
from host_tools.awq.gram import CONSUMERS, InputMoments, Tap
from host_tools.awq.grid import MIN_SCALE, Grid
from host_tools.awq.tap_solver import TapJob, TapResult, in_fp16, solve_tap, stored_linear
from host_tools.checkpoint.families import LINEARS, LogicalLinear
from host_tools.checkpoint.linear_weights import DenseLinear, LayerWeights, Linear
from host_tools.decoder.layer import Block
from host_tools.layer_records import LinearRecord

TakeMoments = Callable[[Tap], InputMoments]
Solve = Callable[[torch.device], TapResult]
RunJobs = Callable[[dict[Tap, Solve]], dict[Tap, TapResult]]
"""Runs the jobs of a block's taps, each on a device of its choice."""


@dataclass(frozen=True)
class QuantizedLayer:
    """A decoder layer as it is stored.

    Attributes:
        weights: linears on the CPU, quantized or fp16; norms and biases fp16.
        records: how each linear came out, in the order of `LINEARS`; empty when nothing was
            searched.
    """

    weights: LayerWeights
    records: tuple[LinearRecord, ...] = ()


@dataclass(frozen=True)
class BlockParts:
    """What belongs to one half of a layer.

    Attributes:
        norm: field of its norm.
        first: tap after the norm.
        producer: the consumer of ``first`` whose outputs are, channel by channel, factors of what
            enters ``last``.
        last: tap of the linear that is added to the stream.
    """

    norm: str
    first: Tap
    producer: LogicalLinear
    last: Tap


BLOCKS: dict[Block, BlockParts] = {
    "attention": BlockParts("attention_norm", "qkv", "v", "o"),
    "ffn": BlockParts("ffn_norm", "gate_up", "up", "down"),
}


def round_layer(
    weights: LayerWeights, group_size: int, kept: frozenset[LogicalLinear] = frozenset()
) -> QuantizedLayer:
    """Round every weight to the nearest code of its group's whole range: the baseline.

    Args:
        weights: dense.
        group_size: of the codes.
        kept: linears that stay fp16.
    """
    linears: dict[LogicalLinear, Linear] = {}
    for name in LINEARS:
        linear = weights.linear(name)
        weight = linear.dense(torch.float32, weights.attention_norm.device)
        if name in kept:
            linears[name] = _kept_linear(weight, linear.bias, name)
        else:
            grid = Grid.spanning(weight, group_size)
            codes = grid.codes(weight)
            linears[name] = stored_linear(grid, codes, group_size, linear.bias, name)
    return QuantizedLayer(_stored_layer(replace(weights, **linears)))  # type: ignore[arg-type]


def run_inline(device: torch.device, jobs: dict[Tap, Solve]) -> dict[Tap, TapResult]:
    """Run jobs one after another on one device."""
    return {tap: job(device) for tap, job in jobs.items()}


class LayerSolver:
    """Quantizes a layer block by block so that its linears' outputs change least.

    Four pairs share scales: attention norm and q, k, v; v and o; MLP norm and gate, up; up and
    down. In floating point they cancel. A linear's own output scales do not matter to its error:
    every output has grids of its own.
    """

    def __init__(
        self,
        weights: LayerWeights,
        model: ModelConfig,
        group_size: int,
        kept: frozenset[LogicalLinear] = frozenset(),
        run_jobs: RunJobs | None = None,
    ) -> None:
        """Begin with the layer as it is.

        Args:
            weights: dense, fp32, on the device that computes.
            model: sizes.
            group_size: of the codes.
            kept: linears that stay fp16, all of a tap or none.
            run_jobs: spreads taps over devices; one after another where the weights lie if None.
        """
        self._weights = weights
        self._group_size = group_size
        self._kept = kept
        self._run_jobs = run_jobs or partial(run_inline, weights.attention_norm.device)
        heads_per_value = model.num_attention_heads // model.num_kv_heads
        self._sharing = HeadSharing(heads_per_value, model.head_dim)
        self._records: dict[LogicalLinear, LinearRecord] = {}

    def solve(self, block: Block, take_moments: TakeMoments) -> LayerWeights:
        """Quantize one half of the layer.

        Args:
            block: which half.
            take_moments: gives the inputs' moments of each of its taps once.

        Returns:
            The layer so far: quantized halves as they are stored, the other half as it was.

        Raises:
            PackageError: activations are not finite, or a value does not fit fp16.
        """
        parts = BLOCKS[block]
        moments = {tap: take_moments(tap) for tap in (parts.last, parts.first)}
        sharing = self._sharing if block == "attention" else None
        last_scales = self._scales(parts.last, moments[parts.last], sharing)
        first_scales = self._scales(parts.first, moments[parts.first])
        changes: dict[str, object] = {}
        norm = getattr(self._weights, parts.norm)
        if first_scales is None:
            changes[parts.norm] = in_fp16(norm, parts.norm)
        else:
            folded, first_scales = fold_into_norm(norm, first_scales)
            changes[parts.norm] = in_fp16(folded, parts.norm)
        rows = {}
        if last_scales is not None:
            shared = last_scales if sharing is None else sharing.of_producer(last_scales)
            rows[parts.producer] = shared
        jobs: dict[Tap, Solve] = {}
        for tap, scales, row_scales in (
            (parts.last, last_scales, {}),
            (parts.first, first_scales, rows),
        ):
            if scales is None:
                changes |= dict(self._kept_tap(tap, row_scales).items())
                continue
            job = TapJob(
                {name: self._dense(name) for name in CONSUMERS[tap]},
                scales,
                row_scales,
                MAGNITUDE_EXPONENT,
                self._group_size,
            )
            jobs[tap] = _bound(job, moments, tap)
        for result in self._run_jobs(jobs).values():
            changes |= dict(result.linears.items())
            self._records.update(result.records)
        self._weights = replace(self._weights, **changes)  # type: ignore[arg-type]
        return self._weights

    def result(self) -> QuantizedLayer:
        """Return the layer once both halves are solved."""
        records = tuple(self._records[name] for name in LINEARS if name in self._records)
        return QuantizedLayer(_stored_layer(self._weights), records)

    def _scales(
        self, tap: Tap, moments: InputMoments, sharing: HeadSharing | None = None
    ) -> torch.Tensor | None:
        """Return the scales of a tap's inputs; None when its linears stay as they are."""
        if self._kept.issuperset(CONSUMERS[tap]):
            return None
        stacked = torch.cat([self._dense(name).weight for name in CONSUMERS[tap]])
        return channel_scales(stacked, moments.magnitude, self._group_size, sharing)

    def _kept_tap(
        self, tap: Tap, row_scales: dict[LogicalLinear, torch.Tensor]
    ) -> dict[LogicalLinear, DenseLinear]:
        linears = {}
        for name in CONSUMERS[tap]:
            weight, bias = self._dense(name).weight, self._dense(name).bias
            rows = row_scales.get(name)
            if rows is not None:
                weight = weight / rows.unsqueeze(1)
                bias = None if bias is None else bias / rows
            linears[name] = _kept_linear(weight, bias, name)
            num_outputs, num_inputs = weight.shape
            self._records[name] = LinearRecord(name, num_outputs, num_inputs, w_bits=16)
        return linears

    def _dense(self, name: LogicalLinear) -> DenseLinear:
        linear = self._weights.linear(name)
        if not isinstance(linear, DenseLinear):
            raise TypeError(f"{name} is quantized already")
        return linear


def solve_layer(
    weights: LayerWeights,
    take_moments: TakeMoments,
    model: ModelConfig,
    group_size: int,
    kept: frozenset[LogicalLinear] = frozenset(),
) -> QuantizedLayer:
    """Quantize both halves of a layer from moments that were taken before; see `LayerSolver`."""
    solver = LayerSolver(weights, model, group_size, kept)
    for block in BLOCKS:
        solver.solve(block, take_moments)
    return solver.result()


def fold_into_norm(norm: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide a norm's weight by scales and return it with the scales that this really undoes.

    The stored weight is fp16; the consumers take the exact quotient of old and stored weight, so
    its rounding costs nothing. A channel whose norm is zero, or would leave fp16's normal range,
    keeps its weight and has scale 1.

    Args:
        norm: ``[in]`` fp32.
        scales: ``[in]`` fp32, the scales wished for.

    Returns:
        The norm's new weight ``[in]`` fp16, and scales ``[in]`` fp32.
    """
    kept = norm.half()
    folded = (norm / scales).half()
    is_normal = torch.isfinite(folded) & (folded.abs() >= MIN_SCALE)
    stored = torch.where(is_normal, folded, kept)
    exact = norm / stored.float()
    usable = torch.isfinite(exact) & (exact > 0)
    return stored, torch.where(usable, exact, torch.ones_like(exact))


def _bound(job: TapJob, moments: dict[Tap, InputMoments], tap: Tap) -> Solve:
    def solve(device: torch.device) -> TapResult:
        return solve_tap(job.on(device), moments.pop(tap).on(device))

    return solve


def _kept_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, name: LogicalLinear
) -> DenseLinear:
    return DenseLinear(
        in_fp16(weight, f"weight of {name}"),
        None if bias is None else in_fp16(bias, f"bias of {name}"),
    )


def _stored_layer(weights: LayerWeights) -> LayerWeights:
    """Return a layer with all norms in fp16 on the CPU."""
    names = ("attention_norm", "ffn_norm", "q_norm", "k_norm")
    norms = {name: getattr(weights, name) for name in names}
    changes = {
        name: in_fp16(value, name)
        for name, value in norms.items()
        if isinstance(value, torch.Tensor)
    }
    return replace(weights, **changes)  # type: ignore[arg-type]
