"""New tokens of prompts: a pass over each sequence's share of a step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.base import Batch
from device_runtime.backends.cuda.driver import CudaDriver
from device_runtime.backends.cuda.linears import PassSize
from device_runtime.backends.cuda.programs import Programs, PromptPrograms
from device_runtime.backends.cuda.uploads import Uploads
from device_runtime.backends.cuda.weights import padded_rows
from device_runtime.backends.cuda.workspace import StepLimits
from device_runtime.kernels.attention_shape import prefill_tiles, store_spans
from device_runtime.kernels.graphs import Launch
from device_runtime.kernels.libcuda import Stream


def single_row(batch: Batch, row: int) -> NDArray[np.int32]:
    """Return the token ids of one row of a batch."""
    return batch.token_ids[batch.query_start[row] : batch.query_start[row + 1]]


class PromptRunner:
    """Uploads rows and launches passes over them."""

    def __init__(
        self,
        driver: CudaDriver,
        stream: Stream,
        limits: StepLimits,
        programs: Programs,
        buffers: dict[str, int],
        uploads: Uploads,
    ) -> None:
        self._driver = driver
        self._stream = stream
        self._limits = limits
        self._programs = programs
        self._passes = PromptPrograms(programs, limits.max_tokens)
        self._buffers = buffers
        self._uploads = uploads
        self._heads = {1: programs.head(1)}
        self._samples = {
            is_greedy: programs.sample(1, buffers["head_slots"], is_greedy=is_greedy)
            for is_greedy in (True, False)
        }

    def run(self, batch: Batch, row: int, slot: int) -> None:
        """Enqueue a pass over one row of a batch: keys, values and last hidden states."""
        tokens = single_row(batch, row)
        positions = batch.positions[batch.query_start[row] : batch.query_start[row + 1]]
        start = np.array([0, len(tokens)], np.int32)
        model = self._limits.model
        tiles = prefill_tiles(start, positions, model.num_attention_heads // model.num_kv_heads)
        spans = store_spans(start, positions)
        pages = np.array(batch.pages[row], np.int32)
        for name, values in (
            ("prompt_tokens", tokens),
            ("prompt_positions", positions),
            ("prompt_slots", np.full(len(tokens), slot, np.int32)),
            ("prompt_start", start),
            ("prompt_pages", pages),
            ("prompt_tiles", tiles),
            ("prompt_spans", spans),
        ):
            self._uploads.put(self._buffers[name], values)
        for step in self._passes.fitted(PassSize(len(tokens), len(tiles), len(spans))):
            step.launch.enqueue(self._stream)

    def sample(self, token: int, slot: int, *, is_greedy: bool) -> None:
        """Enqueue the choice of a token after one token of the newest pass.

        Args:
            token: index in the pass.
            slot: whose row of state moves on.
            is_greedy: it does not draw at random.
        """
        self._uploads.put(self._buffers["head_rows"], np.array([token], np.int32))
        self._uploads.put(self._buffers["head_slots"], np.array([slot], np.int32))
        for launch in (*self._head(1), *self._samples[is_greedy]):
            launch.enqueue(self._stream)

    def read_logits(self, num_tokens: int) -> NDArray[np.float32]:
        """Return the logits ``[num_tokens, vocab_size]`` of the newest pass; waits for them."""
        stride = padded_rows(self._limits.model)
        result = np.empty((num_tokens, stride), np.float32)
        for start in range(0, num_tokens, self._limits.logits_rows):
            end = min(start + self._limits.logits_rows, num_tokens)
            self._uploads.put(self._buffers["head_rows"], np.arange(start, end, dtype=np.int32))
            for launch in self._head(end - start):
                launch.enqueue(self._stream)
            self._stream.synchronize()
            part = result[start:end]
            self._driver.copy_to_host(part.ctypes.data, self._buffers["logits"], part.nbytes)
        return result[:, : self._limits.model.vocab_size]

    def mark(self, slot: int, token_ids: NDArray[np.int32]) -> None:
        """Enqueue the note that a sequence has these tokens."""
        room = self._limits.rows
        for start in range(0, len(token_ids), room):
            part = token_ids[start : start + room]
            self._uploads.put(self._buffers["prompt_tokens"], part)
            self._uploads.put(self._buffers["prompt_slots"], np.full(len(part), slot, np.int32))
            self._programs.mark_seen(len(part)).enqueue(self._stream)

    def _head(self, num_rows: int) -> list[Launch]:
        if num_rows not in self._heads:
            self._heads[num_rows] = self._programs.head(num_rows)
        return self._heads[num_rows]
