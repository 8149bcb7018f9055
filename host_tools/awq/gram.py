"""Second moments of what enters the linears of a layer: all that quantizing needs of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from host_tools.checkpoint.families import LogicalLinear
from host_tools.decoder.layer import Block, Observer

Tap = Literal["qkv", "o", "gate_up", "down"]
"""A place in the layer whose activations enter one or more linears."""

CONSUMERS: dict[Tap, tuple[LogicalLinear, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
ADDS_TO_RESIDUAL: tuple[Tap, ...] = ("o", "down")

_TAP_OF: dict[LogicalLinear, Tap] = {linears[0]: tap for tap, linears in CONSUMERS.items()}


@dataclass(frozen=True)
class InputMoments:
    """What is known about the inputs of one tap.

    There may be two streams of activations: the exact one of the original model, and the one of
    the model whose earlier layers are quantized already. The linear will see the second and should
    give what the first asks for.

    Attributes:
        gram: ``[in, in]`` fp32, mean over tokens of ``x x^T``, of the quantized stream if any.
        magnitude: ``[in]`` fp32, mean over tokens of ``|x|`` in the exact stream.
        num_tokens: that were seen, of one stream.
        drift: ``[in, in]`` fp32, mean of ``(exact x - quantized x) (quantized x)^T``; None when
            there is one stream.
        residual_drift: ``[hidden_size, in]`` fp32, mean of ``(exact h - quantized h)
            (quantized x)^T`` for the stream ``h`` that the linear's output is added to; None for
            one stream, and for linears whose output goes elsewhere.
    """

    gram: torch.Tensor
    magnitude: torch.Tensor
    num_tokens: int
    drift: torch.Tensor | None = None
    residual_drift: torch.Tensor | None = None

    def on(self, device: torch.device) -> InputMoments:
        """Return the same moments with their tensors on a device."""
        return InputMoments(
            self.gram.to(device),
            self.magnitude.to(device),
            self.num_tokens,
            None if self.drift is None else self.drift.to(device),
            None if self.residual_drift is None else self.residual_drift.to(device),
        )


class GramObserver(Observer):
    """Accumulates the moments of every tap of one layer.

    With two streams the first half of every batch is the exact one, the second half the quantized
    one of the same windows.
    """

    def __init__(self, num_streams: int = 1) -> None:
        """Begin with nothing seen.

        Args:
            num_streams: 1, or 2 for pairs.
        """
        self._num_streams = num_streams
        self._sums: dict[Tap, _Sums] = {}
        self._drift: torch.Tensor | None = None

    def residual(self, block: Block, hidden: torch.Tensor) -> None:
        """See the stream that the block's last linear adds to."""
        if self._num_streams == 2:
            exact, quantized = hidden.chunk(2)
            self._drift = (exact - quantized).flatten(0, -2)

    def linear(self, name: LogicalLinear, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """See a linear's inputs; linears that share them are counted once."""
        tap = _TAP_OF.get(name)
        if tap is None:
            return
        parts = inputs.chunk(self._num_streams)
        drift = self._drift if tap in ADDS_TO_RESIDUAL else None
        if tap not in self._sums:
            self._sums[tap] = _Sums()
        self._sums[tap].add(parts[0].flatten(0, -2), parts[-1].flatten(0, -2), drift)

    def take(self, tap: Tap) -> InputMoments:
        """Hand out the moments of a tap and forget them."""
        return self._sums.pop(tap).moments()


class _Sums:
    """Running sums of one tap."""

    def __init__(self) -> None:
        self._gram: torch.Tensor | None = None
        self._magnitude: torch.Tensor | None = None
        self._drift: torch.Tensor | None = None
        self._residual_drift: torch.Tensor | None = None
        self._num_tokens = 0

    def add(
        self, exact: torch.Tensor, quantized: torch.Tensor, residual_drift: torch.Tensor | None
    ) -> None:
        """Add a batch; both ``[tokens, in]``, the same tensor when there is one stream."""
        self._num_tokens += len(exact)
        self._gram = _plus_product(self._gram, quantized, quantized)
        magnitude = (exact.new_ones(1, len(exact)) @ exact.abs())[0]
        self._magnitude = magnitude if self._magnitude is None else self._magnitude.add_(magnitude)
        if exact.data_ptr() != quantized.data_ptr():
            self._drift = _plus_product(self._drift, exact - quantized, quantized)
        if residual_drift is not None:
            self._residual_drift = _plus_product(self._residual_drift, residual_drift, quantized)

    def moments(self) -> InputMoments:
        """Return the means; the sums are used up."""
        gram, magnitude, *drifts = (
            None if total is None else total.div_(self._num_tokens)
            for total in (self._gram, self._magnitude, self._drift, self._residual_drift)
        )
        if gram is None or magnitude is None:
            raise ValueError("nothing was seen")
        return InputMoments(gram, magnitude, self._num_tokens, *drifts)


def _plus_product(
    total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """Add ``left^T right`` of ``[tokens, ...]`` to a total."""
    return left.T @ right if total is None else total.addmm_(left.T, right)
