"""Second moments of what enters the linears of a layer: all that quantizing needs of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from host_tools.checkpoint.families import LogicalLinear
from host_tools.columns import column_norms

Tap = Literal["qkv", "o", "gate_up", "down"]
"""A place in the layer whose activations enter one or more linears."""

STRIP_ROWS = 2048
"""Rows of a Gram matrix that a GPU sums up at once, from the diagonal on: 2048 columns of them are
128 tiles of 128 x 256, about one for each multiprocessor of a large GPU."""

CONSUMERS: dict[Tap, tuple[LogicalLinear, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}


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
            there is one stream, and where the residual drift has it in it.
        residual_drift: ``[hidden_size, in]`` fp32, mean of ``(exact h - quantized h)
            (quantized x)^T`` for the stream ``h`` that the linear's output is added to; None for
            one stream, and for linears whose output goes elsewhere. Without ``drift`` it is that
            of the sum, ``exact h - quantized h + W (exact x - quantized x)``.
    """

    gram: torch.Tensor
    magnitude: torch.Tensor
    num_tokens: int
    drift: torch.Tensor | None = None
    residual_drift: torch.Tensor | None = None


class MomentSums:
    """Running sums of one tap."""

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self._gram: torch.Tensor | None = None
        self._magnitude: torch.Tensor | None = None
        self._drift: torch.Tensor | None = None
        self._residual_drift: torch.Tensor | None = None
        self._num_tokens = 0

    def add(
        self,
        exact: torch.Tensor,
        quantized: torch.Tensor | None = None,
        residual_drift: torch.Tensor | None = None,
        *,
        is_of_sum: bool = False,
    ) -> None:
        """Add a batch of inputs.

        Args:
            exact: ``[..., in]`` fp32 of the exact stream.
            quantized: the same tokens' of the quantized stream, on the same or another device;
                None when there is one stream.
            residual_drift: ``[..., hidden_size]``, exact less quantized, of the stream that the
                linear's output is added to; where ``exact`` is.
            is_of_sum: whether that is the drift behind the sum, which tells all that is needed of
                the inputs' drift; the same for every batch.
        """
        exact = exact.flatten(0, -2)
        inputs = exact if quantized is None else quantized.flatten(0, -2)
        self._num_tokens += len(exact)
        self._gram = _plus_gram(self._gram, inputs)
        magnitude = column_norms(exact)
        self._magnitude = magnitude if self._magnitude is None else self._magnitude.add_(magnitude)
        inputs = inputs.to(exact.device)
        if quantized is not None and not is_of_sum:
            self._drift = _plus_product(self._drift, exact - inputs, inputs)
        if residual_drift is not None:
            rows = residual_drift.flatten(0, -2)
            self._residual_drift = _plus_product(self._residual_drift, rows, inputs)

    def take(self) -> InputMoments:
        """Hand out the means, where the inputs of the linears are; the sums are as new afterwards.

        Raises:
            ValueError: nothing was added.
        """
        if self._gram is None or self._magnitude is None:
            raise ValueError("no activations were added")
        device = self._gram.device
        if _is_halved(self._gram):
            _mirror(self._gram)
        drifts = (
            None if total is None else total.div_(self._num_tokens).to(device)
            for total in (self._drift, self._residual_drift)
        )
        found = InputMoments(
            self._gram.div_(self._num_tokens),
            self._magnitude.div_(self._num_tokens).to(device),
            self._num_tokens,
            *drifts,
        )
        self._gram = self._magnitude = self._drift = self._residual_drift = None
        self._num_tokens = 0
        return found


def _plus_product(
    total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """Add ``left^T right`` of ``[tokens, ...]`` to a total."""
    return left.T @ right if total is None else total.addmm_(left.T, right)


def _plus_gram(total: torch.Tensor | None, inputs: torch.Tensor) -> torch.Tensor:
    """Add ``x^T x`` of ``[tokens, in]`` to a total, of which `_mirror` completes a halved one."""
    if not _is_halved(inputs):
        return _plus_product(total, inputs, inputs)
    num_inputs = inputs.shape[1]
    if total is None:
        total = inputs.new_zeros(num_inputs, num_inputs)
    for start in range(0, num_inputs, STRIP_ROWS):
        strip = slice(start, start + STRIP_ROWS)
        total[strip, start:].addmm_(inputs[:, strip].T, inputs[:, start:])
    return total


def _mirror(total: torch.Tensor) -> None:
    """Fill what lies below the strips of :func:`_plus_gram` with what lies above the diagonal."""
    for start in range(0, len(total), STRIP_ROWS):
        stop = start + STRIP_ROWS
        total[stop:, start:stop] = total[start:stop, stop:].T


def _is_halved(matrix: torch.Tensor) -> bool:
    """Tell whether a Gram matrix of as many inputs as ``matrix`` has columns is summed in strips.

    A GPU's products take longer than their starts; a CPU keeps the bits that it always had.
    """
    return matrix.is_cuda and matrix.shape[1] > STRIP_ROWS
