"""Quantizes one layer after another while two residual streams go through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from host_tools.awq.channel_scales import ValueRange
from host_tools.awq.gram import CONSUMERS, InputMoments
from host_tools.awq.layer_solver import LayerSolver, QuantizedLayer
from host_tools.checkpoint.families import LogicalLinear
from host_tools.checkpoint.linear_weights import LayerWeights
from host_tools.decoder.layer import BLOCKS, DecoderLayer
from host_tools.decoder.prefetch import ReadyLayer
from host_tools.layer_records import LayerSeconds
from host_tools.layer_writer import LayerWriter
from host_tools.phase_times import FORWARD, SEARCH, PhaseTimes
from host_tools.spread import Spread
from host_tools.tap_passes import TAPS_OF, TapPasses


@dataclass(frozen=True)
class SolvedLayer:
    """A layer that waits to be stored.

    Attributes:
        index: number of the layer.
        quantized: what the search gave.
        seconds: what the layer took so far.
    """

    index: int
    quantized: QuantizedLayer
    seconds: LayerSeconds


@dataclass(frozen=True)
class LayerRun:
    """What the layers of one run are taken through.

    Attributes:
        passes: of the original's residual stream and that of the quantized layers.
        writer: of finished layers.
        spread: of the searches.
        times: hears of forward passes and searches.
        group_size: of the codes.
    """

    passes: TapPasses
    writer: LayerWriter[SolvedLayer]
    spread: Spread
    times: PhaseTimes
    group_size: int

    def search(
        self,
        ready: ReadyLayer,
        kept: frozenset[LogicalLinear],
        values: ValueRange | None,
    ) -> None:
        """Quantize a layer, tap after tap, take the streams through it and have it stored.

        Args:
            ready: the layer.
            kept: its linears that stay fp16.
            values: what the original's span, None where nothing says so.
        """
        spent = {FORWARD: 0.0, SEARCH: 0.0}
        device, model = self.passes.runner.device, ready.layer.model
        solver = LayerSolver(
            ready.layer.weights, model, self.group_size, kept, self.spread.run, values
        )

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            with self.times.phase(name, device) as span:
                yield
            spent[name] += span.seconds_s

        exact_layer = self.passes.on_exact_device(ready.layer)
        for block, (first, last) in TAPS_OF.items():
            moments: list[InputMoments] = []
            if solver.needs_moments(first):
                with phase(FORWARD):
                    moments.append(self.passes.after_norm(block, ready.layer, exact_layer))
            with phase(SEARCH):
                # Popped, so that the search can free them.
                solver.solve(first, moments.pop)
            with phase(FORWARD):
                if solver.needs_moments(last):
                    partial = DecoderLayer.ready(solver.weights, model, device, CONSUMERS[first])
                    moments.append(self.passes.before_sum(block, partial, exact_layer))
                    del partial
                else:
                    self.passes.follow_exact(block, exact_layer)
            with phase(SEARCH):
                solver.solve(last, moments.pop)
            with phase(FORWARD):
                names = (*CONSUMERS[first], *CONSUMERS[last])
                stored = DecoderLayer.ready(solver.weights, model, device, names)
                self.passes.follow(block, stored)
                del stored
        seconds = LayerSeconds(spent[FORWARD], spent[SEARCH], disk_s=ready.waited_s)
        self.writer.put(SolvedLayer(ready.index, solver.result(), seconds))

    def pass_by(self, ready: ReadyLayer, stored: LayerWeights) -> None:
        """Take the streams through a layer that is finished.

        Args:
            ready: the original.
            stored: what became of it.
        """
        runner = self.passes.runner
        with self.times.phase(FORWARD, runner.device):
            exact_layer = self.passes.on_exact_device(ready.layer)
            layer = DecoderLayer.ready(stored, ready.layer.model, runner.device)
            # Half by half as a search does: on a GPU storing the states rounds them.
            for block in BLOCKS:
                self.passes.follow_exact(block, exact_layer)
                self.passes.follow(block, layer)
