"""The device memory of a step beside weights and KV pages, planned before it is allocated."""

from __future__ import annotations

import math
from dataclasses import dataclass

from device_runtime.backends.cuda.regions import region_bytes
from device_runtime.backends.cuda.weights import has_half_matrices, padded_rows
from device_runtime.kernels.attention_shape import PREFILL_ROWS, SPAN_TOKENS, DecodeAttentionShape
from device_runtime.kernels.gemm_shape import F16_TILES, W4A16_TILES
from device_runtime.kernels.gemv_shape import GemvShape
from device_runtime.kernels.head_shape import MAX_ROWS
from device_runtime.kernels.reference.kv_pages import KvLayout
from device_runtime.kernels.sampling_row import SAMPLING_ROW, STOP_IDS
from device_runtime.kernels.table import GEMV_STAGES
from device_runtime.package_format.model_config import ModelConfig

RING_SIZE = 64
"""Tokens of a slot that the host may not have read yet; more than the steps that run ahead."""
GEMM_TICKETS = 8192
SHARED = {"mixed": "normed", "inner": "qkv"}
"""Buffers that lie where another does, which has been read to its end before they are written."""
SPLIT_UNITS = 12
"""Units of the KV cache (64 int8 or 32 fp16 tokens) that one block takes before a second helps."""
MAX_SPLITS = 8


@dataclass(frozen=True)
class StepLimits:
    """The largest step.

    Attributes:
        model: what runs.
        layout: of the KV cache.
        width: sequences that decode together.
        num_slots: rows of state; sequences that left keep theirs until their last step is done.
        max_tokens: tokens of one pass.
        max_pages: width of the page table.
        num_sms: of the device.
    """

    model: ModelConfig
    layout: KvLayout
    width: int
    num_slots: int
    max_tokens: int
    max_pages: int
    num_sms: int

    @property
    def rows(self) -> int:
        """Tokens that activations have room for."""
        return max(self.max_tokens, self.width)

    @property
    def seen_words(self) -> int:
        """Words of a slot's set of seen tokens."""
        return -(-self.model.vocab_size // 32)

    @property
    def logits_rows(self) -> int:
        """Rows of logits in memory."""
        return max(self.width, MAX_ROWS)

    @property
    def max_splits(self) -> int:
        """Blocks that share a kv head: enough to fill the device with one sequence."""
        return max(1, min(MAX_SPLITS, self.num_sms // self.model.num_kv_heads))

    def attention(self, rows: int) -> DecodeAttentionShape:
        """Return the launch of the attention of so many sequences."""
        return DecodeAttentionShape(
            layout=self.layout,
            num_heads=self.model.num_attention_heads,
            num_kv_heads=self.model.num_kv_heads,
            rows=rows,
            max_pages=self.max_pages,
            max_splits=self.max_splits,
            split_units=SPLIT_UNITS,
        )

    def buffers(self) -> dict[str, int]:
        """Return the bytes of each buffer but the `SHARED` ones by name; all are zero at first.

        ``no_rotation`` takes the place of ``rotation`` in layers without rope: (1, 0) throughout.
        """
        model, rows, slots = self.model, self.rows, self.num_slots
        pairs = model.head_dim // 2
        return {
            "residual": 4 * rows * model.hidden_size,
            "normed": 2 * rows * max(model.hidden_size, model.q_size),
            "qkv": 2 * rows * max(model.qkv_size, model.intermediate_size),
            "rotation": 8 * rows * pairs,
            "query_scale": 4 * rows,
            "partials": 4 * self.attention(self.width).partials_floats,
            "gemm_sums": self.gemm_bytes,
            "gemm_tickets": 4 * GEMM_TICKETS,
            "gemv_activations": self.gemv_activation_bytes,
            "gemv_sums": 4 * 8 * max(model.qkv_size, 2 * model.intermediate_size),
            "logits": 4 * self.logits_rows * padded_rows(model),
            "prompt_tokens": 4 * rows,
            "prompt_positions": 4 * rows,
            "prompt_slots": 4 * rows,
            "prompt_start": 8,
            "prompt_pages": 4 * self.max_pages,
            "prompt_tiles": 8 * self.max_tiles,
            "prompt_spans": 8 * self.max_spans,
            "head_rows": 4 * rows,
            "head_slots": 4,
            "tokens": 4 * slots,
            "positions": 4 * slots,
            "seen": 4 * slots * self.seen_words,
            "stop_ids": 4 * slots * STOP_IDS,
            "last_positions": 4 * slots,
            "sampling": SAMPLING_ROW.itemsize * slots,
            "turns": 8 * slots * pairs,
            "page_table": 4 * slots * self.max_pages,
            "top": 8 * self.logits_rows,
            "best": 8 * self.logits_rows,
            "sample_tickets": 4 * self.logits_rows,
            **({"kv_scales": self._kv_scale_bytes} if self.layout.quant_policy == 4 else {}),
            **({"no_rotation": 8 * rows * pairs} if model.layers_without_rope else {}),
        }

    @property
    def max_tiles(self) -> int:
        """Blocks of the prompt attention, times kv heads, in the worst case."""
        group = self.model.num_attention_heads // self.model.num_kv_heads
        return self.rows * group // PREFILL_ROWS + 1

    @property
    def max_spans(self) -> int:
        """Spans of positions that the new tokens of a pass can touch."""
        return self.rows // SPAN_TOKENS + 2

    @property
    def gemv_activation_bytes(self) -> int:
        """Bytes of the quantized activations of the widest GEMV."""
        model = self.model
        return max(
            GemvShape(
                width=max(GEMV_STAGES),
                num_inputs=num_inputs,
                num_outputs=32,
                group_size=model.group_size or 128,
                grid=1,
                phase_units=1,
                held_tiles=1,
                stages=1,
            ).activation_bytes
            for num_inputs in (model.hidden_size, model.q_size, model.intermediate_size)
        )

    @property
    def gemm_bytes(self) -> int:
        """Bytes of the sums that blocks of any GEMM hand to each other."""
        tiles = list(W4A16_TILES.values()) if self.model.group_size else []
        if has_half_matrices(self.model):
            tiles += F16_TILES.values()
        return max(2 * self.num_sms * tile.blocks_per_sm * tile.part_bytes for tile in tiles)

    @property
    def num_bytes(self) -> int:
        """Bytes of all buffers."""
        return region_bytes(list(self.buffers().values()))

    @property
    def _kv_scale_bytes(self) -> int:
        return 16 * self.model.num_hidden_layers * self.model.num_kv_heads

    @property
    def ring_bytes(self) -> int:
        """Bytes of the pinned ring of tokens."""
        return 8 * self.num_slots * RING_SIZE

    def kv_region_bytes(self, num_pages: int) -> int:
        """Bytes of one layer's pages."""
        return math.prod(self.layout.shape(num_pages, self.model.num_kv_heads))
