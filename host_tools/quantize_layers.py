"""Takes a checkpoint's layers one after another to 4 bits; what is finished survives a kill."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from device_runtime.errors import InternalError, PackageError
from host_tools.awq.awq_folder import LayerFiles
from host_tools.awq.gram import GramObserver
from host_tools.awq.layer_solver import QuantizedLayer, round_layer, solve_layer
from host_tools.checkpoint import Checkpoint
from host_tools.checkpoint.linear_weights import LayerWeights
from host_tools.decoder.devices import place_activations, tensor_cores
from host_tools.decoder.layer import SILENT
from host_tools.decoder.prefetch import ready_layers
from host_tools.decoder.snapshots import Snapshots
from host_tools.decoder.stream import LayerRunner
from host_tools.layer_records import (
    LayerRecord,
    LayerSeconds,
    QuantizeRecord,
    read_layer_record,
    write_layer_record,
)
from host_tools.layer_searches import (
    LayerSearches,
    SearchJob,
    Solve,
    SolvedLayer,
    TakeMoments,
)
from host_tools.options import QuantizeOptions
from host_tools.phase_times import DISK, FORWARD, PACKING, READING, PhaseTimes
from host_tools.progress import Progress

SNAPSHOT_INTERVAL_S = 60.0
"""Forward passes that a kill may cost; a finished layer is never searched again."""


@dataclass(frozen=True)
class LayerQuantizer:
    """Quantizes the layers of one checkpoint into a folder of the run's own.

    Attributes:
        checkpoint: dense.
        scratch: holds finished layers, their records and a snapshot of the activations.
        options: of the quantization.
        devices: that search; the first runs the forward pass.
        times: hears of every phase.
    """

    checkpoint: Checkpoint
    scratch: Path
    options: QuantizeOptions
    devices: tuple[torch.device, ...]
    times: PhaseTimes

    @property
    def files(self) -> LayerFiles:
        """The finished layers."""
        return LayerFiles(self.scratch, self.checkpoint)

    @torch.no_grad()
    def round(self, progress: Progress) -> None:
        """Round every layer that is not finished."""
        unfinished = self.files.unfinished()

        def solve(weights: LayerWeights, take_moments: TakeMoments | None) -> QuantizedLayer:
            return round_layer(weights, self.options.group_size)

        with (
            self._searches(solve) as searches,
            progress.task(f"round on {self._place}", self._num_layers, "layers") as task,
        ):
            task.move_to(self._num_layers - len(unfinished))
            layers = ready_layers(self.checkpoint, unfinished, self.devices[0], self.times)
            for ready in layers:
                seconds = LayerSeconds(disk_s=ready.waited_s)
                searches.submit(SearchJob(ready.index, ready.layer.weights, None, seconds))
                del ready  # else it is there until the next one has come
                task.advance()
            searches.drain()

    @torch.no_grad()
    def solve(self, token_ids: torch.Tensor, progress: Progress) -> None:
        """Search every layer that is not finished on the windows' activations.

        Args:
            token_ids: ``[num_samples, seqlen]`` int32.
            progress: hears of every layer.

        Raises:
            PackageError: a token id has no embedding, or a weight cannot be stored.
        """
        unfinished = frozenset(self.files.unfinished())
        if not unfinished:
            return
        model, device = self.checkpoint.model, self.devices[0]
        snapshots = Snapshots(self.scratch, SNAPSHOT_INTERVAL_S)
        with self.times.phase(READING, device):
            activations = place_activations(model, token_ids, device, self.scratch)
            start = snapshots.load([activations])
            if start == 0 or start > min(unfinished):
                start = 0
                activations.fill(self.checkpoint, token_ids)
        runner = LayerRunner(self.checkpoint, token_ids.shape[1], device)

        def solve(weights: LayerWeights, take_moments: TakeMoments | None) -> QuantizedLayer:
            if take_moments is None:
                raise InternalError("a layer came to the search without its inputs' moments")
            return solve_layer(weights, take_moments, model, self.options.group_size)

        indices = range(start, max(unfinished) + 1)
        with (
            tensor_cores(device),
            self._searches(solve) as searches,
            progress.task(f"quantize on {self._place}", self._num_layers, "layers") as task,
        ):
            for ready in ready_layers(self.checkpoint, indices, device, self.times):
                index = ready.index
                seen = GramObserver() if index in unfinished else None
                with self.times.phase(FORWARD, device) as forward:
                    runner.advance(ready.layer, activations, seen or SILENT)
                if seen is not None:
                    seconds = LayerSeconds(forward_s=forward.seconds_s, disk_s=ready.waited_s)
                    searches.submit(SearchJob(index, ready.layer.weights, seen.take, seconds))
                del ready, seen  # else they are there until the next layer has come
                if snapshots.is_due():
                    # No layer before a snapshot is looked at again.
                    searches.drain()
                    with self.times.phase(DISK):
                        snapshots.save(index + 1, [activations])
                task.move_to(index + 1)
            searches.drain()

    def record(self, fingerprint: str) -> QuantizeRecord:
        """Return what was noted about every layer, those of earlier runs included."""
        return QuantizeRecord(
            fingerprint=fingerprint,
            method=self.options.method,
            group_size=self.options.group_size,
            device=" + ".join(_device_name(device) for device in self.devices),
            layers=tuple(self._layer_record(index) for index in range(self._num_layers)),
        )

    @property
    def _num_layers(self) -> int:
        return self.checkpoint.model.num_hidden_layers

    @property
    def _place(self) -> str:
        return " and ".join(dict.fromkeys(str(device) for device in self.devices))

    def _searches(self, solve: Solve) -> LayerSearches:
        return LayerSearches(self.devices, solve, self._store, self.times)

    def _store(self, solved: SolvedLayer) -> None:
        """Write a layer, then what was noted about it; a kill between the two loses the notes."""
        index = solved.index
        with self.times.phase(PACKING) as packing:
            content = self.files.pack(index, solved.quantized)
        with self.times.phase(DISK) as disk:
            self.files.write(index, content)
        seconds = replace(
            solved.seconds,
            packing_s=packing.seconds_s,
            disk_s=solved.seconds.disk_s + disk.seconds_s,
        )
        write_layer_record(self._record_path(index), LayerRecord(index, (), seconds))

    def _record_path(self, index: int) -> Path:
        return self.scratch / f"layer-{index:05d}.json"

    def _layer_record(self, index: int) -> LayerRecord:
        try:
            return read_layer_record(self._record_path(index))
        except PackageError:
            return LayerRecord(index, ())


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
