"""Takes activations through a layer tap by tap, so that each tap sees what is quantized already.

The exact stream runs everything once. The quantized one runs q, k, v, attention, gate and up twice
(before and after the linear behind them is quantized), o and down once; norms cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from host_tools.awq.gram import InputMoments, MomentSums, Tap
from host_tools.checkpoint.families import LogicalLinear
from host_tools.decoder.free_memory import return_free_memory
from host_tools.decoder.layer import Block, DecoderLayer
from host_tools.decoder.rotary import Rotary
from host_tools.decoder.stream import Activations, LayerRunner

TAPS_OF: dict[Block, tuple[Tap, Tap]] = {"attention": ("qkv", "o"), "ffn": ("gate_up", "down")}
"""The taps of each half of a layer: behind its norm, and before what it adds to the stream."""


@dataclass(frozen=True)
class TapPasses:
    """The two streams on their way, each on a device of its own where there are two.

    A stream's forward passes run on its device. The Gram matrix is summed up where the quantized
    stream is, what compares the streams where the exact one is: that halves the work, and the
    batches come in the same order everywhere, so that the sums have the same bits.

    Attributes:
        runner: of the quantized stream; its device gets the moments.
        exact_runner: of the exact stream.
        exact: the original's residual stream.
        quantized: that of the layers as they are stored.
    """

    runner: LayerRunner
    exact_runner: LayerRunner
    exact: Activations
    quantized: Activations

    def on_exact_device(self, original: DecoderLayer) -> DecoderLayer:
        """Return a layer where the exact stream is."""
        if self.exact_runner.device == self.runner.device:
            return original
        return DecoderLayer.ready(original.weights, original.model, self.exact_runner.device)

    @torch.no_grad()
    def after_norm(
        self, block: Block, original: DecoderLayer, exact_layer: DecoderLayer
    ) -> InputMoments:
        """Return what enters the first linears of a half of the layer; no stream moves.

        Args:
            block: where both streams are.
            original: the layer in floating point; its norm is that of both streams.
            exact_layer: the same layer, where the exact stream is.
        """
        sums = MomentSums()
        for exact, quantized, _ in self._batches():
            sums.add(_normed(exact_layer, block, exact), _normed(original, block, quantized))
        return_free_memory()
        return sums.take()

    @torch.no_grad()
    def before_sum(
        self, block: Block, partial: DecoderLayer, exact_layer: DecoderLayer
    ) -> InputMoments:
        """Return what enters the last linear of a half; the exact stream is taken through it.

        Args:
            block: where both streams are.
            partial: the layer whose first linears of this half are quantized.
            exact_layer: the layer in floating point, where the exact stream is.
        """
        sums = MomentSums()
        name: LogicalLinear = "o" if block == "attention" else "down"
        weight = exact_layer.weights.linear(name).dense(torch.float32, self.exact_runner.device)
        is_of_sum = _is_cheaper_behind_sum(weight)
        for exact, quantized, batch in self._batches():
            inputs = _inner(partial, block, quantized, self.runner.rotary)
            inner = _inner(exact_layer, block, exact, self.exact_runner.rotary)
            drift = exact - quantized.to(exact.device)
            if is_of_sum:
                # The difference is taken before the product: it keeps bits that the two lose.
                drift += functional.linear(inner - inputs.to(inner.device), weight)
            sums.add(inner, inputs, drift, is_of_sum=is_of_sum)
            self.exact.store(batch, exact + exact_layer.linear(name, inner))
        return_free_memory()
        return sums.take()

    def follow(self, block: Block, stored: DecoderLayer) -> None:
        """Take the quantized stream through a half of the layer as it is stored."""
        self.runner.advance(stored, self.quantized, blocks=(block,))

    def follow_exact(self, block: Block, exact_layer: DecoderLayer) -> None:
        """Take the exact stream through a half of the layer where nobody asks for moments."""
        self.exact_runner.advance(exact_layer, self.exact, blocks=(block,))

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice]]:
        # As many at once as when a stream goes through a finished layer: then the bits are alike.
        for batch in self.exact.batches():
            exact = self.exact.load(batch, self.exact_runner.device)
            quantized = self.quantized.load(batch, self.runner.device)
            yield exact, quantized, batch


def _is_cheaper_behind_sum(weight: torch.Tensor) -> bool:
    """Tell whether to sum up the drift of a linear's outputs in place of that of its inputs.

    Two products of ``[tokens, in]`` with as many outputs, one with ``weight``, replace one with as
    many outputs and one with ``in`` columns. A CPU keeps the bits that it always had.
    """
    num_outputs, num_inputs = weight.shape
    return weight.is_cuda and num_inputs > num_outputs


def _normed(layer: DecoderLayer, block: Block, hidden: torch.Tensor) -> torch.Tensor:
    return layer.attention_input(hidden) if block == "attention" else layer.ffn_input(hidden)


def _inner(layer: DecoderLayer, block: Block, hidden: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    normed = _normed(layer, block, hidden)
    return layer.o_input(normed, rotary) if block == "attention" else layer.down_input(normed)
