"""Runs a checkpoint layer by layer over many windows: one layer's weights in memory at a time."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from device_runtime.errors import DeviceError, PackageError
from device_runtime.package_format.amounts import format_bytes
from host_tools.checkpoint import Checkpoint
from host_tools.decoder.free_memory import return_free_memory
from host_tools.decoder.layer import BLOCKS, SILENT, Block, DecoderLayer, Observer, rms_norm
from host_tools.decoder.rotary import Rotary

BATCH_TOKENS = 4096
"""Tokens that go through a layer at once: enough for full speed, small beside the weights."""

SPILL_BYTES = 256 << 20
"""Activations above this live in a file, where the kernel can take their memory back."""

HEAD_ROWS = 8192
"""Rows of the output projection that are widened to fp32 at once."""


def choose_device(name: str) -> torch.device:
    """Return the device that ``auto``, ``cpu`` or ``cuda`` means here.

    Raises:
        DeviceError: cuda was asked for and torch sees no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("torch sees no GPU here, use --device cpu or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


class Activations:
    """The residual stream of all windows between two layers.

    Attributes:
        states: ``[num_samples, seqlen, hidden_size]`` fp32, in memory or mapped from a file that
            has no name any more and so vanishes with the process.
    """

    def __init__(self, states: torch.Tensor) -> None:
        self.states = states

    @classmethod
    def allocate(cls, shape: tuple[int, int, int], folder: Path | None = None) -> Activations:
        """Make room for ``[num_samples, seqlen, hidden_size]``.

        Args:
            shape: of the states.
            folder: where a large one is spilled; the system's folder for temporary files if None.

        Raises:
            DeviceError: the disk of the folder has no room for them.
        """
        num_bytes = 4 * int(np.prod(shape))
        if num_bytes <= SPILL_BYTES:
            return cls(torch.empty(shape, dtype=torch.float32))
        with tempfile.TemporaryFile(dir=folder) as stream:
            _reserve(stream.fileno(), num_bytes, folder)
            spilled = np.memmap(stream, dtype=np.float32, mode="r+", shape=shape)
        return cls(torch.from_numpy(spilled))

    @classmethod
    def embed(
        cls, checkpoint: Checkpoint, token_ids: torch.Tensor, folder: Path | None = None
    ) -> Activations:
        """Return the embeddings of ``token_ids`` ``[num_samples, seqlen]``; rows alone are read.

        Raises:
            PackageError: a token id has no embedding.
        """
        num_samples, seqlen = token_ids.shape
        activations = cls.allocate((num_samples, seqlen, checkpoint.model.hidden_size), folder)
        activations.fill(checkpoint, token_ids)
        return activations

    @property
    def num_bytes(self) -> int:
        """Bytes that the states take."""
        return sum(part.nbytes for part in self.parts())

    def parts(self) -> Sequence[torch.Tensor]:
        """Return the tensors that hold the states, samples along the first axis of each."""
        return (self.states,)

    def load(self, batch: slice, device: torch.device) -> torch.Tensor:
        """Return some samples' states on ``device``, ``[samples, seqlen, hidden_size]`` fp32."""
        return self.states[batch].to(device)

    def store(self, batch: slice, hidden: torch.Tensor) -> None:
        """Replace some samples' states by ``[samples, seqlen, hidden_size]`` fp32 of any device."""
        self.states[batch] = hidden.to("cpu")

    def fill(self, checkpoint: Checkpoint, token_ids: torch.Tensor) -> None:
        """Make these the embeddings of ``token_ids`` ``[num_samples, seqlen]``.

        Raises:
            PackageError: a token id has no embedding.
        """
        vocab_size = checkpoint.model.vocab_size
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= vocab_size:
            raise PackageError(
                f"the windows have the token id {int(token_ids.max())}, the embedding has "
                f"{vocab_size} rows; they are of another tokenizer"
            )
        table = checkpoint.embedding()
        for sample in range(len(token_ids)):
            rows = functional.embedding(token_ids[sample : sample + 1].long(), table)
            self.store(slice(sample, sample + 1), rows)

    def batches(self, max_tokens: int = BATCH_TOKENS) -> Iterator[slice]:
        """Return runs of samples of at most ``max_tokens`` tokens, or single samples."""
        num_samples, seqlen = self.states.shape[:2]
        step = max(1, max_tokens // seqlen)
        return (slice(start, start + step) for start in range(0, num_samples, step))


def _reserve(descriptor: int, num_bytes: int, folder: Path | None) -> None:
    """Give a new file all of its room: a full disk would end a process that stores in a map."""
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        place = folder or Path(tempfile.gettempdir())
        elsewhere = "" if folder else ", set TMPDIR to a larger disk"
        raise DeviceError(
            f"the activations need {format_bytes(num_bytes)} in {place}, which has "
            f"{format_bytes(shutil.disk_usage(place).free)} free "
            f"({error.strerror}); make room there{elsewhere} or use fewer windows"
        ) from error


class LayerRunner:
    """Moves activations through layers on one device.

    Attributes:
        checkpoint: where the weights come from.
        device: where they are computed with.
        rotary: angles of the windows' positions.
    """

    def __init__(self, checkpoint: Checkpoint, seqlen: int, device: torch.device) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.rotary = Rotary.of(checkpoint.model, seqlen, device)

    def layer(self, index: int) -> DecoderLayer:
        """Return one layer of the checkpoint, ready to run."""
        return DecoderLayer.ready(self.checkpoint.layer(index), self.checkpoint.model, self.device)

    @torch.no_grad()
    def advance(
        self,
        layer: DecoderLayer,
        activations: Activations,
        observer: Observer = SILENT,
        blocks: Sequence[Block] = BLOCKS,
    ) -> None:
        """Replace the activations by what the layer, or one half of it, makes of them."""
        for batch in activations.batches():
            hidden = activations.load(batch, self.device)
            for block in blocks:
                hidden = layer.block(block, hidden, self.rotary, observer)
            activations.store(batch, hidden)
        return_free_memory()


@torch.no_grad()
def head_logits(checkpoint: Checkpoint, hidden: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the logits of last-layer states.

    Args:
        checkpoint: gives final norm and head; the head is widened to fp32 piece by piece.
        hidden: ``[tokens, hidden_size]`` fp32.
        device: where to compute; the result stays there.

    Returns:
        ``[tokens, vocab_size]`` fp32.
    """
    weight = checkpoint.final_norm().to(device=device, dtype=torch.float32)
    normed = rms_norm(hidden.to(device), weight, checkpoint.model.rms_norm_eps)
    head = checkpoint.head()
    logits = torch.empty(len(normed), len(head), dtype=torch.float32, device=device)
    for start in range(0, len(head), HEAD_ROWS):
        rows = head[start : start + HEAD_ROWS].to(device=device, dtype=torch.float32)
        torch.mm(normed, rows.T, out=logits[:, start : start + len(rows)])
    return logits
