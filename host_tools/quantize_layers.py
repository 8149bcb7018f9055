"""Takes a checkpoint's layers one after another to 4 bits; what is finished survives a kill."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from device_runtime.errors import PackageError
from host_tools.awq.awq_folder import LayerFiles
from host_tools.awq.channel_scales import ValueRange
from host_tools.awq.layer_solver import round_layer
from host_tools.awq.linear_solver import search_bytes
from host_tools.checkpoint import Checkpoint
from host_tools.checkpoint.mixed import KeptLinears
from host_tools.decoder.devices import place_activations, tensor_cores
from host_tools.decoder.prefetch import ready_layers
from host_tools.decoder.snapshots import Snapshots
from host_tools.decoder.stream import Activations, LayerRunner
from host_tools.layer_records import (
    LayerRecord,
    LayerSeconds,
    QuantizeRecord,
    read_layer_record,
    write_layer_record,
)
from host_tools.layer_run import LayerRun, SolvedLayer
from host_tools.layer_writer import LayerWriter
from host_tools.options import QuantizeOptions
from host_tools.phase_times import DISK, PACKING, READING, SEARCH, PhaseTimes
from host_tools.progress import Progress
from host_tools.spread import Spread
from host_tools.tap_passes import TapPasses

MAX_CPU_SEARCHES = 8
"""More would wait for Python, which starts thousands of operations of microseconds."""


@dataclass(frozen=True)
class LayerQuantizer:
    """Quantizes the layers of one checkpoint into a folder of the run's own.

    Attributes:
        checkpoint: dense.
        scratch: holds finished layers, their records and a snapshot of the activations.
        options: of the quantization.
        kept: linears that stay fp16.
        devices: that search; the first runs the forward pass of what is quantized so far, the
            second, where there is one, that of the original.
        times: hears of every phase.
        values: what each layer's values span in the original; empty where nothing says so.
    """

    checkpoint: Checkpoint
    scratch: Path
    options: QuantizeOptions
    kept: KeptLinears
    devices: tuple[torch.device, ...]
    times: PhaseTimes
    values: tuple[ValueRange, ...] = ()

    @cached_property
    def files(self) -> LayerFiles:
        """The finished layers."""
        return LayerFiles(self.scratch, self.checkpoint)

    @torch.no_grad()
    def round(self, progress: Progress) -> None:
        """Round every layer that is not finished."""
        unfinished, device = self.files.unfinished(), self.devices[0]
        with (
            self._writer() as writer,
            progress.task(f"round on {device}", self._num_layers, "layers") as task,
        ):
            task.begin_at(self._num_layers - len(unfinished))
            for ready in ready_layers(self.checkpoint, unfinished, device, self.times):
                with self.times.phase(SEARCH, device) as search:
                    quantized = round_layer(
                        ready.layer.weights,
                        self.options.group_size,
                        self.kept.of_layer(ready.index),
                    )
                seconds = LayerSeconds(disk_s=ready.waited_s, search_s=search.seconds_s)
                writer.put(SolvedLayer(ready.index, quantized, seconds))
                del ready, quantized  # else they are there until the next layer has come
                task.advance()
            writer.drain()

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
        device = self.devices[0]
        with self.times.phase(READING, device):
            model = self.checkpoint.model
            streams = place_activations(
                model,
                token_ids,
                self._stream_devices,
                self.scratch,
                search_bytes(model, self.options.group_size),
            )
            snapshots = Snapshots(self.scratch, streams)
            start = self._enter(token_ids, streams, snapshots, min(unfinished))
        indices = range(start, max(unfinished) + 1)
        with (
            snapshots,
            tensor_cores(device),
            self._writer() as writer,
            Spread(self._search_devices()) as spread,
            progress.task(f"quantize on {self._place}", self._num_layers, "layers") as task,
        ):
            task.begin_at(start)
            exact_runner, runner = (
                LayerRunner(self.checkpoint, token_ids.shape[1], stream_device)
                for stream_device in self._stream_devices
            )
            run = LayerRun(
                TapPasses(runner, exact_runner, *streams),
                writer,
                spread,
                self.times,
                self.options.group_size,
            )
            for ready in ready_layers(self.checkpoint, indices, device, self.times):
                index = ready.index
                if index in unfinished:
                    values = self.values[index] if self.values else None
                    run.search(ready, self.kept.of_layer(index), values)
                else:
                    with self.times.phase(READING):
                        stored = self.files.read(index, self.options.group_size)
                    run.pass_by(ready, stored)
                del ready  # else it is there until the next layer has come
                if index < indices[-1] and snapshots.is_due():
                    # No layer before a snapshot is looked at again.
                    writer.drain()
                    with self.times.phase(DISK):
                        snapshots.save(index + 1)
                task.move_to(index + 1)
            writer.drain()

    def record(self, fingerprint: str, device: str) -> QuantizeRecord:
        """Return what was noted about every layer, those of earlier runs included.

        Args:
            fingerprint: of the stage.
            device: what computed, in words.
        """
        return QuantizeRecord(
            fingerprint=fingerprint,
            method=self.options.method,
            group_size=self.options.group_size,
            device=device,
            layers=tuple(self._layer_record(index) for index in range(self._num_layers)),
        )

    @property
    def _num_layers(self) -> int:
        return self.checkpoint.model.num_hidden_layers

    @property
    def _place(self) -> str:
        return " and ".join(dict.fromkeys(str(device) for device in self.devices))

    def _enter(
        self,
        token_ids: torch.Tensor,
        streams: list[Activations],
        snapshots: Snapshots,
        first_unfinished: int,
    ) -> int:
        """Fill the residual streams; return the layer that they enter next."""
        start, _ = snapshots.load()
        if 0 < start <= first_unfinished:
            return start
        for stream in streams:
            stream.fill(self.checkpoint, token_ids)
        return 0

    @property
    def _stream_devices(self) -> tuple[torch.device, torch.device]:
        """Where the original's residual stream is run, and that of what is quantized so far."""
        return (self.devices[1 % len(self.devices)], self.devices[0])

    def _search_devices(self) -> tuple[torch.device, ...]:
        """Return where strips are searched: a CPU takes several at once, each on one thread."""
        is_cpu = self.devices == (torch.device("cpu"),)
        return self.devices * min(MAX_CPU_SEARCHES, os.cpu_count() or 1) if is_cpu else self.devices

    def _writer(self) -> LayerWriter[SolvedLayer]:
        is_threaded = self.devices[0].type == "cuda"
        return LayerWriter(self._store, self.times, is_threaded=is_threaded)

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
        record = LayerRecord(index, solved.quantized.records, seconds)
        write_layer_record(self._record_path(index), record)

    def _record_path(self, index: int) -> Path:
        return self.scratch / f"layer-{index:05d}.json"

    def _layer_record(self, index: int) -> LayerRecord:
        try:
            return read_layer_record(self._record_path(index))
        except PackageError:
            return LayerRecord(index, ())
