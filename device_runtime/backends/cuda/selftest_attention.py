"""The self test's attention: every entry point against its twin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.cuda.array_launch import ArrayLaunch
from device_runtime.backends.cuda.selftest_linear import Check, relative_error
from device_runtime.kernels.attention_shape import (
    DecodeAttentionShape,
    prefill_shared_bytes,
    prefill_tiles,
    store_spans,
)
from device_runtime.kernels.reference import attention as twin
from device_runtime.kernels.reference import embedding
from device_runtime.kernels.reference.kv_pages import KvLayout

TOLERANCE = 2e-3
_KINDS = {0: "half", 4: "static", 8: "online"}
_NUM_HEADS = (6, 12)
"""Up to 4 query heads of a kv head, and more: other kernels decode."""
_NUM_KV_HEADS, _HEAD_DIM = 2, 128
_LENGTHS = (70, 200)
_EPS = 1e-6


def check_attention(run: ArrayLaunch, rng: np.random.Generator) -> Iterator[Check]:
    """Yield the checks of storing keys and values, prompt and decode attention."""
    for quant_policy, kind in _KINDS.items():
        for num_heads in _NUM_HEADS:
            yield from _check_heads(run, kind, _Cache(quant_policy, num_heads, rng), rng)


def _check_heads(
    run: ArrayLaunch, kind: str, state: _Cache, rng: np.random.Generator
) -> Iterator[Check]:
    num_heads = state.num_heads
    starts = np.cumsum([0, *(length - 1 for length in _LENGTHS)]).astype(np.int32)
    positions = np.concatenate([np.arange(n - 1) for n in _LENGTHS]).astype(np.int32)
    qkv, rotation, scales = state.inputs(positions, rng)
    spans = store_spans(starts, positions)
    tiles = prefill_tiles(starts, positions, num_heads // _NUM_KV_HEADS)
    shared = (positions, starts)
    run(
        f"store_kv_{kind}",
        (_NUM_KV_HEADS, len(spans), 1),
        (state.pages, qkv, None, rotation, *state.kv_scale, *shared, spans, *state.tail),
    )
    out = np.full((len(positions), num_heads * _HEAD_DIM), np.nan, np.float16)
    arrays = (out, state.pages, qkv, None, rotation, scales, *state.kv_scale)
    run(
        f"prefill_attention_{kind}",
        (_NUM_KV_HEADS, len(tiles), 1),
        (*arrays, *shared, tiles, *state.tail),
        prefill_shared_bytes(state.layout),
    )
    want = state.expected(qkv, rotation, scales, positions, starts)
    yield Check(f"prefill_attention_{kind}", relative_error(out, want), TOLERANCE)
    yield _check_decode(run, kind, state, rng)


class _Cache:
    """Pages of two sequences in one format, and what the kernels are told about them."""

    def __init__(self, quant_policy: int, num_heads: int, rng: np.random.Generator) -> None:
        self.num_heads = num_heads
        self.layout = KvLayout(quant_policy, _HEAD_DIM)
        num_pages = sum(-(-length // 64) for length in _LENGTHS)
        self.pages = np.zeros(self.layout.shape(num_pages, _NUM_KV_HEADS), np.uint8)
        max_pages = max(-(-length // 64) for length in _LENGTHS)
        self.table = np.zeros((2, max_pages), np.int32)
        order = iter(rng.permutation(num_pages))
        for row, length in enumerate(_LENGTHS):
            for place in range(-(-length // 64)):
                self.table[row, place] = next(order)
        scales = np.full((_NUM_KV_HEADS, 4), (0.03, 0.1, 0.03, -0.1), np.float32)
        self.kv_scale = (scales,) if quant_policy == 4 else ()
        self.weights = twin.AttentionWeights(
            num_heads,
            _NUM_KV_HEADS,
            eps=_EPS,
            kv_scale=scales.astype(np.float64) if quant_policy == 4 else None,
        )
        sizes = (num_heads, _NUM_KV_HEADS, _HEAD_DIM, 1, 64, max_pages)
        self.sizes = sizes
        self.tail: tuple[Any, ...] = (self.table, *sizes, _EPS)

    def inputs(
        self, positions: NDArray[np.int32], rng: np.random.Generator
    ) -> tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.float32]]:
        """Return qkv, rotation and query scales of new tokens."""
        count = len(positions)
        width = (self.num_heads + 2 * _NUM_KV_HEADS) * _HEAD_DIM
        qkv = rng.standard_normal((count, width)).astype(np.float16)
        turns = embedding.turns(10000.0 ** (-np.arange(_HEAD_DIM // 2) / (_HEAD_DIM // 2)))
        rotation = embedding.rotation(positions, turns).astype(np.float32)
        scales = np.full(count, twin.LOG2_E / np.sqrt(_HEAD_DIM), np.float32)
        return qkv, rotation, scales

    def expected(
        self,
        qkv: NDArray[np.float16],
        rotation: NDArray[np.float32],
        scales: NDArray[np.float32],
        positions: NDArray[np.int32],
        starts: NDArray[np.int32],
    ) -> NDArray[np.float64]:
        """Return what attention over the stored keys and values gives."""
        rows = []
        for sequence in range(len(starts) - 1):
            end = int(starts[sequence + 1])
            length = int(positions[end - 1]) + 1
            kv = twin.load(self.pages, self.layout, self.table[sequence], length, self.weights)
            for token in range(int(starts[sequence]), end):
                turn = rotation[token].astype(np.float64)
                q, _, _ = twin.prepare(qkv[token], turn, self.weights)
                visible = kv[:, :, : int(positions[token]) + 1]
                rows.append(twin.attend(q, visible, float(scales[token])))
        return np.stack(rows)


def _check_decode(run: ArrayLaunch, kind: str, state: _Cache, rng: np.random.Generator) -> Check:
    positions = np.array([length - 1 for length in _LENGTHS], np.int32)
    qkv, rotation, scales = state.inputs(positions, rng)
    shape = DecodeAttentionShape(
        layout=state.layout,
        num_heads=state.num_heads,
        num_kv_heads=_NUM_KV_HEADS,
        rows=len(_LENGTHS),
        max_pages=state.table.shape[1],
        max_splits=3,
        split_units=2,
    )
    slots = 2
    out = np.full((len(_LENGTHS), state.num_heads * _HEAD_DIM), np.nan, np.float16)
    partials = np.zeros(shape.partials_floats, np.float32)
    arrays = (out, state.pages, partials, qkv, None, None, rotation, scales)
    numbers = (
        positions,
        state.table,
        *state.sizes,
        shape.max_splits,
        shape.split_units,
        slots,
        _EPS,
    )
    arguments = (*arrays, *state.kv_scale, *numbers)
    run(shape.kernel(kind), shape.grid, arguments, shape.shared_bytes(slots))
    starts = np.arange(len(_LENGTHS) + 1, dtype=np.int32)
    want = state.expected(qkv, rotation, scales, positions, starts)
    left = np.count_nonzero(partials.view(np.uint32))  # the next launch would begin with it
    return Check(shape.kernel(kind), max(relative_error(out, want), float(left)), TOLERANCE)
