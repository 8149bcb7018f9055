"""Second moments of what enters the linears of a layer: all that the searches need of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from host_tools.checkpoint.families import LogicalLinear
from host_tools.decoder.layer import Observer

Tap = Literal["qkv", "o", "gate_up", "down"]
"""A place in the layer whose activations enter one or more linears."""

CONSUMERS: dict[Tap, tuple[LogicalLinear, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
FEW_TOKENS = 4
"""Inputs per token from which the tokens themselves are kept beside their Gram matrix."""

_TAP_OF: dict[LogicalLinear, Tap] = {linears[0]: tap for tap, linears in CONSUMERS.items()}


@dataclass(frozen=True)
class InputMoments:
    """What is known about the inputs of one tap.

    Attributes:
        gram: ``[in, in]`` fp32, mean over tokens of ``x x^T``.
        magnitude: ``[in]`` fp32, mean over tokens of ``|x|``.
        rows: ``[tokens, in]`` fp32 with ``rows^T rows = gram`` when the tokens are so few that
            they give an error faster than the Gram matrix does, else None.
    """

    gram: torch.Tensor
    magnitude: torch.Tensor
    rows: torch.Tensor | None = None

    def output_error(self, error: torch.Tensor) -> float:
        """Return the mean squared output error that a weight error ``[out, in]`` causes.

        The mean over tokens of ``|E x|^2`` is ``tr(E G E^T)``; summed over outputs.
        """
        if self.rows is not None:
            return float(torch.sum((error @ self.rows.T).square_()))
        return float(torch.sum((error @ self.gram) * error))


class GramObserver(Observer):
    """Accumulates the Gram matrix of every tap of one layer."""

    def __init__(self) -> None:
        self._grams: dict[Tap, torch.Tensor] = {}
        self._magnitudes: dict[Tap, torch.Tensor] = {}
        self._num_tokens: dict[Tap, int] = {}
        self._rows: dict[Tap, list[torch.Tensor]] = {}

    def linear(self, name: LogicalLinear, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """See a linear's inputs; linears that share them are counted once."""
        tap = _TAP_OF.get(name)
        if tap is None:
            return
        rows = inputs.flatten(0, -2)
        magnitude = (rows.new_ones(1, len(rows)) @ rows.abs())[0]
        if tap not in self._grams:
            self._grams[tap] = rows.T @ rows
            self._magnitudes[tap] = magnitude
            self._num_tokens[tap] = len(rows)
            self._rows[tap] = []
        else:
            self._grams[tap].addmm_(rows.T, rows)
            self._magnitudes[tap] += magnitude
            self._num_tokens[tap] += len(rows)
        if self._num_tokens[tap] * FEW_TOKENS > rows.shape[1]:
            self._rows[tap] = []
        else:
            self._rows[tap].append(rows.clone())

    def take(self, tap: Tap) -> InputMoments:
        """Hand out the moments of a tap and forget them."""
        num_tokens = self._num_tokens.pop(tap)
        rows = self._rows.pop(tap)
        return InputMoments(
            self._grams.pop(tap).div_(num_tokens),
            self._magnitudes.pop(tap).div_(num_tokens),
            torch.cat(rows).div_(num_tokens**0.5) if rows else None,
        )
