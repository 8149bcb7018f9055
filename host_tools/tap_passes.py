"""Takes activations through a layer tap by tap, so that each tap sees what is quantized already.

The exact stream runs everything once. The quantized one runs q, k, v, attention, gate and up twice
(before and after the linear behind them is quantized), o and down once; norms cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

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
    """The two streams on their way.

    Attributes:
        runner: of the forward passes.
        exact: the original's residual stream.
        quantized: that of the layers as they are stored.
    """

    runner: LayerRunner
    exact: Activations
    quantized: Activations

    @torch.no_grad()
    def after_norm(self, block: Block, original: DecoderLayer) -> InputMoments:
        """Return what enters the first linears of a half of the layer; no stream moves.

        Args:
            block: where both streams are.
            original: the layer in floating point; its norm is that of both streams.
        """
        sums = MomentSums()
        for exact, quantized, _ in self._batches():
            sums.add(_normed(original, block, exact), _normed(original, block, quantized))
        return_free_memory()
        return sums.take()

    @torch.no_grad()
    def before_sum(
        self, block: Block, original: DecoderLayer, partial: DecoderLayer
    ) -> InputMoments:
        """Return what enters the last linear of a half; the exact stream is taken through it.

        Args:
            block: where both streams are.
            original: the layer in floating point.
            partial: the layer whose first linears of this half are quantized.
        """
        sums, rotary = MomentSums(), self.runner.rotary
        name: LogicalLinear = "o" if block == "attention" else "down"
        for exact, quantized, batch in self._batches():
            inner = _inner(original, block, exact, rotary)
            sums.add(inner, _inner(partial, block, quantized, rotary), exact - quantized)
            self.exact.store(batch, exact + original.linear(name, inner))
        return_free_memory()
        return sums.take()

    def follow(self, block: Block, stored: DecoderLayer) -> None:
        """Take the quantized stream through a half of the layer as it is stored."""
        self.runner.advance(stored, self.quantized, blocks=(block,))

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice]]:
        # As many at once as when a stream goes through a finished layer: then the bits are alike.
        for batch in self.exact.batches():
            exact, quantized = (
                stream.load(batch, self.runner.device) for stream in (self.exact, self.quantized)
            )
            yield exact, quantized, batch


def _normed(layer: DecoderLayer, block: Block, hidden: torch.Tensor) -> torch.Tensor:
    return layer.attention_input(hidden) if block == "attention" else layer.ffn_input(hidden)


def _inner(layer: DecoderLayer, block: Block, hidden: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    normed = _normed(layer, block, hidden)
    return layer.o_input(normed, rotary) if block == "attention" else layer.down_input(normed)
