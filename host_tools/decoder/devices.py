"""Which devices compute, how precisely, and where the activations of a run lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from device_runtime.errors import DeviceError
from device_runtime.package_format.model_config import ModelConfig
from host_tools.decoder.compact import CompactActivations
from host_tools.decoder.stream import BATCH_TOKENS, Activations, choose_device

USABLE_SHARE = 0.9
"""Of a GPU's free memory; the rest is for what the libraries take and for holes."""

SMALL_GPU_BYTES = 8e9
"""Where this much is enough with activations in host memory, no more is taken: a 7B fits a small
GPU, and a larger one is left to others."""


def choose_devices(device: str, devices: Sequence[str]) -> tuple[torch.device, ...]:
    """Return the devices that a stage computes on, that of the forward pass first.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``; counts when ``devices`` is empty.
        devices: GPU numbers, or ``cpu`` several times; one that comes twice searches two strips of
            linears at once.

    Raises:
        DeviceError: torch does not see one of them, or they would not give the same bits.
    """
    if not devices:
        return (choose_device(device),)
    if set(devices) == {"cpu"}:
        return tuple(torch.device("cpu") for _ in devices)
    num_seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for name in devices:
        if not name.isdecimal() or int(name) >= num_seen:
            raise DeviceError(f"there is no GPU {name}, torch sees {num_seen} of them")
    kinds = sorted({torch.cuda.get_device_name(int(name)) for name in devices})
    if len(kinds) > 1:
        raise DeviceError(
            f"the devices {','.join(devices)} are {' and '.join(kinds)}, whose sums differ in the "
            f"last bits; name devices of one kind"
        )
    return tuple(torch.device("cuda", int(name)) for name in devices)


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """Let fp32 products on a GPU round their factors to TF32's 11 bits; sums stay fp32.

    A CPU computes as before. The setting is the process's: no two runs may overlap.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def working_bytes(model: ModelConfig, num_streams: int, seqlen: int, search_bytes: int = 0) -> int:
    """Estimate what a layer's forward passes and searches take on a GPU beside the activations.

    Weights of the layer in fp32 and of the next one as stored, and the larger of two moments: a
    pass that sums up what enters the largest linear, with a batch's intermediates and the linears
    before it as they were quantized, and a search. All but the next layer is fp32.

    Args:
        model: sizes.
        num_streams: residual streams, that of the original among them.
        seqlen: tokens of a window.
        search_bytes: of the dearest search of a linear, 0 where nothing is quantized.
    """
    hidden, attention, inner = model.hidden_size, model.q_size, model.intermediate_size
    weights = hidden * (model.qkv_size + attention + 3 * inner)
    largest = max(hidden, inner)
    moments = num_streams * largest**2 + hidden * largest
    num_tokens = max(BATCH_TOKENS, seqlen)
    batch = num_tokens * (4 * inner + 8 * hidden + 3 * (model.qkv_size + attention))
    partial = 2 * hidden * inner if search_bytes else 0
    return 6 * weights + max(4 * (moments + batch + partial), search_bytes)


def place_activations(
    model: ModelConfig,
    windows: torch.Tensor,
    devices: Sequence[torch.device],
    folder: Path,
    search_bytes: int = 0,
) -> list[Activations]:
    """Make room for residual streams of all windows where they cost least.

    A CPU keeps fp32, in memory or in a file. A GPU takes the compact form: on the device as many
    streams as its memory allows, the first ones first, the others in pinned host memory.

    Args:
        model: sizes.
        windows: token ids ``[num_samples, seqlen]``.
        devices: where each stream is computed; several may be on one.
        folder: for the file.
        search_bytes: see `working_bytes`.
    """
    num_samples, seqlen = windows.shape
    shape = (num_samples, seqlen, model.hidden_size)
    if devices[0].type == "cpu":
        return [Activations.allocate(shape, folder) for _ in devices]
    needed = working_bytes(model, len(devices), seqlen, search_bytes)
    rooms = {device: _room_bytes(device, needed) for device in devices}
    stream_bytes = num_samples * seqlen * (2 * model.hidden_size + 4)
    streams: list[Activations] = []
    for device in devices:
        fits = stream_bytes <= rooms[device]
        rooms[device] -= stream_bytes if fits else 0
        streams.append(CompactActivations.make(shape, device if fits else torch.device("cpu")))
    return streams


def _room_bytes(device: torch.device, needed: int) -> float:
    """Return what a GPU has for activations when this much is needed beside them."""
    # What an earlier stage of this process left in torch's cache is free, too.
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    usable = USABLE_SHARE * free_bytes
    return (min(usable, SMALL_GPU_BYTES) if needed <= SMALL_GPU_BYTES else usable) - needed
