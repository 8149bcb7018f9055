"""Reads the next layer's weights while a GPU works on this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import torch

from host_tools.checkpoint import Checkpoint, DenseLinear, LayerWeights
from host_tools.decoder.layer import DecoderLayer
from host_tools.phase_times import READING, PhaseTimes


@dataclass(frozen=True)
class ReadyLayer:
    """A layer that can be run.

    Attributes:
        index: its number.
        layer: fp32 on the device that computes.
        waited_s: seconds that were waited for it.
    """

    index: int
    layer: DecoderLayer
    waited_s: float


def ready_layers(
    checkpoint: Checkpoint, indices: Iterable[int], device: torch.device, times: PhaseTimes
) -> Iterator[ReadyLayer]:
    """Yield layers of a checkpoint in floating point, ready to run.

    A GPU gets each layer as stored, from a thread, while it works on the one before; a CPU has no
    time to spare and reads each when it is asked for.

    Args:
        checkpoint: dense.
        indices: of the layers, in the order in which they are wanted.
        device: that computes.
        times: hears how long a layer was waited for.
    """
    if device.type == "cuda":
        layers = read_ahead(Upload(checkpoint, device), indices)
    else:
        layers = ((index, checkpoint.layer(index)) for index in indices)
    while True:
        with times.phase(READING, device) as reading:
            found = next(layers, None)
            if found is None:
                return
            layer = DecoderLayer.ready(found[1], checkpoint.model, device)
        ready = ReadyLayer(found[0], layer, reading.seconds_s)
        # Nothing here may keep a layer alive while the next one comes.
        del found, layer
        yield ready
        del ready


def read_ahead(
    read: Callable[[int], LayerWeights], indices: Iterable[int]
) -> Iterator[tuple[int, LayerWeights]]:
    """Yield ``read(index)`` for each index; the next one is read in a thread meanwhile."""
    wanted = iter(indices)
    with ThreadPoolExecutor(1, thread_name_prefix="layer-reader") as pool:
        index = next(wanted, None)
        coming = None if index is None else pool.submit(read, index)
        while index is not None and coming is not None:
            current, found = index, [coming.result()]
            index = next(wanted, None)
            coming = None if index is None else pool.submit(read, index)
            # Popped: a layer as stored must not lie here while the caller works on it in fp32.
            yield current, found.pop()


class Upload:
    """Brings layers to a GPU, as stored, on a stream of its own."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        """Make the stream; what is brought is for the caller's stream.

        Args:
            checkpoint: dense.
            device: a GPU.
        """
        self._checkpoint = checkpoint
        self._device = device
        self._consumer = torch.cuda.current_stream(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, index: int) -> LayerWeights:
        """Return the weights of a layer; they have arrived."""
        with torch.cuda.stream(self._stream):
            weights = moved_weights(self._checkpoint.layer(index), self._sent)
        # From mapped files the last piece of a copy may still be on its way.
        self._stream.synchronize()
        return weights

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        sent = tensor.to(self._device)
        # Its memory must not be given to the next layer before the consumer has read it.
        sent.record_stream(self._consumer)
        return sent


def moved_weights(
    weights: LayerWeights, move: Callable[[torch.Tensor], torch.Tensor]
) -> LayerWeights:
    """Return dense weights with every tensor replaced by ``move`` of it."""
    changes: dict[str, object] = {}
    for field in fields(weights):
        value = getattr(weights, field.name)
        if isinstance(value, DenseLinear):
            bias = None if value.bias is None else move(value.bias)
            changes[field.name] = DenseLinear(move(value.weight), bias)
        elif isinstance(value, torch.Tensor):
            changes[field.name] = move(value)
    return replace(weights, **changes)  # type: ignore[arg-type]
