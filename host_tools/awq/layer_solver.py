"""Quantizes one decoder layer: scales between its parts, then a grid and codes for each linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from device_runtime.package_format.model_config import ModelConfig
from host_tools.awq.channel_scales import (
    MAGNITUDE_EXPONENT,
    HeadSharing,
    ValueRange,
    channel_scales,
)
from host_tools.awq.gram import CONSUMERS, InputMoments, Tap
from host_tools.awq.grid import MIN_SCALE, Grid
from host_tools.awq.tap_solver import (
    RunJobs,
    TapJob,
    in_fp16,
    prepare_tap,
    solve_tap,
    stored_linear,
)
from host_tools.checkpoint.families import LINEARS, LogicalLinear
from host_tools.checkpoint.linear_weights import DenseLinear, LayerWeights, Linear
from host_tools.layer_records import LinearRecord


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


TAPS: tuple[Tap, ...] = ("qkv", "o", "gate_up", "down")
"""In the order in which activations pass them."""

PRODUCERS: dict[Tap, tuple[str | None, LogicalLinear | None]] = {
    "qkv": ("attention_norm", None),
    "o": (None, "v"),
    "gate_up": ("ffn_norm", None),
    "down": (None, "up"),
}
"""What gives a tap's inputs, channel by channel, and so undoes their scales: a norm or a linear."""


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


class LayerSolver:
    """Quantizes a layer tap by tap so that its linears' outputs change least.

    Four pairs share scales: attention norm and q, k, v; v and o; MLP norm and gate, up; up and
    down. In floating point they cancel. A linear's own output scales do not matter to its error:
    every output has grids of its own. So each tap can see what came out of the ones before it.
    """

    def __init__(
        self,
        weights: LayerWeights,
        model: ModelConfig,
        group_size: int,
        kept: frozenset[LogicalLinear] = frozenset(),
        run_jobs: RunJobs | None = None,
        values: ValueRange | None = None,
    ) -> None:
        """Begin with the layer as it is.

        Args:
            weights: dense, fp32, on the device that computes.
            model: sizes.
            group_size: of the codes.
            kept: linears that stay fp16, all of a tap or none.
            run_jobs: spreads a tap's linears over devices; all where the weights lie if None.
            values: of the layer, which scaled ones then do not leave far; free if None.
        """
        self._weights = weights
        self._group_size = group_size
        self._kept = kept
        self._run_jobs = run_jobs
        self._values = values
        heads_per_value = model.num_attention_heads // model.num_kv_heads
        self._sharing = HeadSharing(heads_per_value, model.head_dim)
        self._records: dict[LogicalLinear, LinearRecord] = {}

    @property
    def weights(self) -> LayerWeights:
        """The layer so far: quantized linears as they are stored, the others as they were."""
        return self._weights

    def needs_moments(self, tap: Tap) -> bool:
        """Tell whether a tap has linears that are quantized."""
        return not self._kept.issuperset(CONSUMERS[tap])

    def solve(self, tap: Tap, take_moments: Callable[[], InputMoments]) -> None:
        """Quantize the linears of a tap; taps come in the order of `TAPS`.

        Args:
            tap: where the inputs were seen.
            take_moments: hands out the moments of the inputs that the layer so far gives; is not
                called where none are needed.

        Raises:
            PackageError: activations are not finite, or a value does not fit fp16.
        """
        names = CONSUMERS[tap]
        linears = {name: self._dense(name) for name in names}
        norm, producer = PRODUCERS[tap]
        if not self.needs_moments(tap):
            changes: dict[str, object] = {name: self._kept_linear(name) for name in names}
            if norm is not None:
                changes[norm] = in_fp16(getattr(self._weights, norm), norm)
            self._weights = replace(self._weights, **changes)  # type: ignore[arg-type]
            return
        moments = [take_moments()]
        sharing = self._sharing if tap == "o" else None
        stacked = torch.cat([linear.weight for linear in linears.values()])
        scales = channel_scales(stacked, moments[0].magnitude, self._group_size, sharing)
        del stacked
        changes = {}
        if norm is not None:
            folded, scales = fold_into_norm(getattr(self._weights, norm), scales)
            changes[norm] = in_fp16(folded, norm)
        if sharing is not None and self._values is not None:
            scales = scales * self._values.factor(sharing.of_producer(scales))
        if producer is not None:
            rows = scales if sharing is None else sharing.of_producer(scales)
            changes[producer] = divided_outputs(self._weights.linear(producer), rows, producer)
        job = TapJob(linears, scales, MAGNITUDE_EXPONENT, self._group_size)
        result = solve_tap(prepare_tap(job, moments.pop), self._run_jobs)
        changes |= dict(result.linears.items())
        self._records.update(result.records)
        self._weights = replace(self._weights, **changes)  # type: ignore[arg-type]

    def result(self) -> QuantizedLayer:
        """Return the layer once all taps are solved."""
        records = tuple(self._records[name] for name in LINEARS if name in self._records)
        return QuantizedLayer(_stored_layer(self._weights), records)

    def _kept_linear(self, name: LogicalLinear) -> DenseLinear:
        linear = self._dense(name)
        num_outputs, num_inputs = linear.weight.shape
        self._records[name] = LinearRecord(name, num_outputs, num_inputs, w_bits=16)
        return _kept_linear(linear.weight, linear.bias, name)

    def _dense(self, name: LogicalLinear) -> DenseLinear:
        linear = self._weights.linear(name)
        if not isinstance(linear, DenseLinear):
            raise TypeError(f"{name} is quantized already")
        return linear


def divided_outputs(linear: Linear, rows: torch.Tensor, name: LogicalLinear) -> Linear:
    """Return a linear of the layer whose outputs are divided by scales, as it is stored.

    A quantized one keeps its codes: its grids are divided, rounded to fp16 once more.

    Args:
        linear: on the CPU as it is stored, or kept fp16.
        rows: ``[out]`` fp32, greater than 0.
        name: for messages.

    Raises:
        PackageError: a value does not fit fp16.
    """
    rows = rows.to("cpu")
    bias = None if linear.bias is None else in_fp16(linear.bias.float() / rows, f"bias of {name}")
    if isinstance(linear, DenseLinear):
        weight = in_fp16(linear.weight.float() / rows.unsqueeze(1), f"weight of {name}")
        return DenseLinear(weight, bias)
    scales = (linear.scales.float() / rows).clamp_(min=MIN_SCALE)
    return replace(linear, scales=in_fp16(scales, f"scales of {name}"), bias=bias)


def solve_layer(
    weights: LayerWeights,
    take_moments: Callable[[Tap], InputMoments],
    model: ModelConfig,
    group_size: int,
    kept: frozenset[LogicalLinear] = frozenset(),
) -> QuantizedLayer:
    """Quantize a layer from moments that were all taken before; see `LayerSolver`."""
    solver = LayerSolver(weights, model, group_size, kept)
    for tap in TAPS:
        solver.solve(tap, partial(take_moments, tap))
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
