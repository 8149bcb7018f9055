"""Quantizes one decoder layer: scales between its parts, then a grid and codes for each linear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from device_runtime.errors import PackageError
from device_runtime.package_format.model_config import ModelConfig
from host_tools.awq.clip_search import search_clipping
from host_tools.awq.gram import CONSUMERS, InputMoments, Tap
from host_tools.awq.grid import MIN_SCALE, Grid
from host_tools.awq.scale_search import HeadSharing, search_scales
from host_tools.checkpoint.families import LINEARS, LogicalLinear
from host_tools.checkpoint.linear_weights import LayerWeights, QuantizedLinear


@dataclass(frozen=True)
class QuantizedLayer:
    """A decoder layer as it is stored.

    Attributes:
        weights: quantized linears on the CPU, norms and biases fp16.
        errors: mean squared output error of each tap's linears, with what the weights would
            cost when just rounded: ``(rounded, quantized)``. Empty when nothing was searched.
    """

    weights: LayerWeights
    errors: dict[Tap, tuple[float, float]]


def round_layer(weights: LayerWeights, group_size: int) -> QuantizedLayer:
    """Round every weight to the nearest code of its group's whole range: the baseline."""
    linears = {}
    for name in LINEARS:
        weight = weights.linear(name).dense(torch.float32, weights.attention_norm.device)
        grid = Grid.spanning(weight, group_size)
        linears[name] = _stored(grid, weight, group_size, weights.linear(name).bias, name)
    return QuantizedLayer(_assemble(weights, weights.attention_norm, weights.ffn_norm, linears), {})


def solve_layer(
    weights: LayerWeights,
    take_moments: Callable[[Tap], InputMoments],
    model: ModelConfig,
    group_size: int,
) -> QuantizedLayer:
    """Quantize a layer so that its linears' outputs change least on the calibration's inputs.

    Four pairs share scales: attention norm and q, k, v; v and o; MLP norm and gate, up; up and
    down. In floating point they cancel. A linear's own output scales do not matter to its error:
    every output has grids of its own. So the pairs are searched one by one.

    Args:
        weights: dense, fp32, on the device that computes.
        take_moments: gives the inputs' moments of each tap once.
        model: sizes.
        group_size: of the codes.
    """
    return _LayerSolver(weights, take_moments, model, group_size).solve()


class _LayerSolver:
    """The state of one layer on its way."""

    def __init__(
        self,
        weights: LayerWeights,
        take_moments: Callable[[Tap], InputMoments],
        model: ModelConfig,
        group_size: int,
    ) -> None:
        self._weights = weights
        self._take = take_moments
        self._group_size = group_size
        heads_per_value = model.num_attention_heads // model.num_kv_heads
        self._sharing = HeadSharing(heads_per_value, model.head_dim)
        self._linears: dict[LogicalLinear, QuantizedLinear] = {}
        self._errors: dict[Tap, tuple[float, float]] = {}

    def solve(self) -> QuantizedLayer:
        # A consumer comes before its producer, whose outputs take the consumer's scales.
        o_scales = self._solve_tap("o", self._sharing)
        v_scales = self._sharing.of_producer(o_scales)
        attention_norm = self._solve_after_norm("qkv", self._weights.attention_norm, "v", v_scales)
        down_scales = self._solve_tap("down", None)
        ffn_norm = self._solve_after_norm("gate_up", self._weights.ffn_norm, "up", down_scales)
        layer = _assemble(self._weights, attention_norm, ffn_norm, self._linears)
        return QuantizedLayer(layer, self._errors)

    def _solve_tap(self, tap: Tap, sharing: HeadSharing | None) -> torch.Tensor:
        """Quantize the consumers of a linear and return the scales that the linear must undo."""
        moments = self._take(tap)
        stacked = self._stacked(tap)
        choice = search_scales(stacked, moments, self._group_size, sharing)
        self._finish(tap, moments, choice.scales, {}, choice.plain_error)
        return choice.scales

    def _solve_after_norm(
        self, tap: Tap, norm: torch.Tensor, producer: LogicalLinear, row_scales: torch.Tensor
    ) -> torch.Tensor:
        """Quantize the consumers of a norm and return the norm's new weight, fp16.

        Args:
            tap: the norm's output.
            norm: its weight.
            producer: the consumer whose own outputs are divided by ``row_scales``.
            row_scales: ``[out]`` of the producer.
        """
        moments = self._take(tap)
        choice = search_scales(self._stacked(tap), moments, self._group_size)
        folded, scales = fold_into_norm(norm, choice.scales)
        self._finish(tap, moments, scales, {producer: row_scales}, choice.plain_error)
        return folded

    def _stacked(self, tap: Tap) -> torch.Tensor:
        return torch.cat([self._weights.linear(name).weight for name in CONSUMERS[tap]])

    def _finish(
        self,
        tap: Tap,
        moments: InputMoments,
        scales: torch.Tensor,
        row_scales: dict[LogicalLinear, torch.Tensor],
        plain_error: float,
    ) -> None:
        gram = moments.gram / scales / scales.unsqueeze(1)
        error = 0.0
        for name in CONSUMERS[tap]:
            linear = self._weights.linear(name)
            weight, bias = linear.weight * scales, linear.bias
            rows = row_scales.get(name)
            if rows is not None:
                weight = weight / rows.unsqueeze(1)
                bias = None if bias is None else bias / rows
            grid = search_clipping(weight, gram, self._group_size)
            self._linears[name] = _stored(grid, weight, self._group_size, bias, name)
            values = grid.values(grid.codes(weight))
            difference = values.sub_(weight)
            if rows is not None:
                difference.mul_(rows.unsqueeze(1))
            error += moments.output_error(difference.div_(scales))
        self._errors[tap] = (plain_error, error)


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


def _stored(
    grid: Grid,
    weight: torch.Tensor,
    group_size: int,
    bias: torch.Tensor | None,
    name: LogicalLinear,
) -> QuantizedLinear:
    return QuantizedLinear(
        codes=grid.codes(weight).to(torch.uint8).T.contiguous().cpu(),
        zeros=grid.zeros.to(torch.uint8).T.contiguous().cpu(),
        scales=in_fp16(grid.scales, f"scales of {name}").T.contiguous(),
        group_size=group_size,
        bias=None if bias is None else in_fp16(bias, f"bias of {name}"),
    )


def _assemble(
    weights: LayerWeights,
    attention_norm: torch.Tensor,
    ffn_norm: torch.Tensor,
    linears: dict[LogicalLinear, QuantizedLinear],
) -> LayerWeights:
    def norm(value: torch.Tensor | None, name: str) -> torch.Tensor | None:
        return None if value is None else in_fp16(value, name)

    return LayerWeights(
        attention_norm=in_fp16(attention_norm, "attention_norm"),
        ffn_norm=in_fp16(ffn_norm, "ffn_norm"),
        q=linears["q"],
        k=linears["k"],
        v=linears["v"],
        o=linears["o"],
        gate=linears["gate"],
        up=linears["up"],
        down=linears["down"],
        q_norm=norm(weights.q_norm, "q_norm"),
        k_norm=norm(weights.k_norm, "k_norm"),
    )


def in_fp16(values: torch.Tensor, name: str) -> torch.Tensor:
    """Return values in fp16 on the CPU.

    Raises:
        PackageError: one of them is beyond fp16.
    """
    stored = values.to(device="cpu", dtype=torch.float16)
    if not torch.isfinite(stored).all():
        raise PackageError(
            f"{name} reaches {float(values.abs().max()):.3g}, beyond the 65504 of fp16; "
            f"the checkpoint cannot be run in 4 bits"
        )
    return stored
