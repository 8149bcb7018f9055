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

FACTOR_MATRICES = 4
"""Matrices of the largest linear's inputs squared that a search holds beside the Gram matrices."""


def choose_devices(device: str, devices: Sequence[str]) -> tuple[torch.device, ...]:
    """Return the devices that a stage computes on, that of the forward pass first.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``; counts when ``devices`` is empty.
        devices: GPU numbers, or ``cpu`` several times; one that comes twice works on two layers.

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


def working_bytes(model: ModelConfig, batch_tokens: int = BATCH_TOKENS) -> int:
    """Estimate what a layer's forward pass and search take on a GPU beside the activations.

    Weights of the layer in fp32 and of the next as stored, the Gram matrices of four taps, the
    larger of a batch's intermediates and a search's factorizations, all but the next layer fp32.
    """
    hidden, inner = model.hidden_size, model.intermediate_size
    weights = hidden * (model.qkv_size + model.q_size + 3 * inner)
    grams = 2 * hidden**2 + model.q_size**2 + inner**2
    batch = batch_tokens * (4 * inner + 8 * hidden + 3 * (model.qkv_size + model.q_size))
    search = FACTOR_MATRICES * max(hidden, inner) ** 2 + 4 * hidden * inner
    return 6 * weights + 4 * (grams + max(batch, search))


def place_activations(
    model: ModelConfig, windows: torch.Tensor, device: torch.device, folder: Path
) -> Activations:
    """Make room for the residual stream of all windows where it costs least.

    Args:
        model: sizes.
        windows: token ids ``[num_samples, seqlen]``.
        device: that computes. A CPU keeps fp32, in memory or in a file; a GPU takes the
            compact form on the device if everything fits there, else in pinned host memory.
        folder: for the file.
    """
    num_samples, seqlen = windows.shape
    shape = (num_samples, seqlen, model.hidden_size)
    if device.type == "cpu":
        return Activations.allocate(shape, folder)
    free_bytes, _ = torch.cuda.mem_get_info(device)
    state_bytes = num_samples * seqlen * (2 * model.hidden_size + 4)
    batch_tokens = max(seqlen, BATCH_TOKENS)
    fits = state_bytes + working_bytes(model, batch_tokens) <= USABLE_SHARE * free_bytes
    return CompactActivations.make(shape, device if fits else torch.device("cpu"))
