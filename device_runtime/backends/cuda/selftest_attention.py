"""The self test's attention and sampling: every entry point against its twin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.cuda.array_launch import ArrayLaunch
from device_runtime.backends.cuda.selftest_linear import Check, relative_error
from device_runtime.backends.reference.sampler import sample
from device_runtime.backends.sampling_params import SamplingParams
from device_runtime.kernels.attention_shape import (
    DecodeAttentionShape,
    prefill_shared_bytes,
    prefill_tiles,
    store_spans,
)
from device_runtime.kernels.reference import attention as twin
from device_runtime.kernels.reference import embedding
from device_runtime.kernels.reference.kv_pages import KvLayout
from device_runtime.kernels.sampling_row import (
    DRAW_SHARED_BYTES,
    SAMPLING_ROW,
    STOP_IDS,
    sampling_row,
)

TOLERANCE = 2e-3
_KINDS = {0: "half", 4: "static", 8: "online"}
_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM = 6, 2, 128
_LENGTHS = (70, 200)
_EPS = 1e-6


def check_attention(run: ArrayLaunch, rng: np.random.Generator) -> Iterator[Check]:
    """Yield the checks of storing keys and values, prompt and decode attention."""
    for quant_policy, kind in _KINDS.items():
        state = _Cache(quant_policy, rng)
        starts = np.cumsum([0, *(length - 1 for length in _LENGTHS)]).astype(np.int32)
        positions = np.concatenate([np.arange(n - 1) for n in _LENGTHS]).astype(np.int32)
        qkv, rotation, scales = state.inputs(positions, rng)
        spans = store_spans(starts, positions)
        tiles = prefill_tiles(starts, positions, _NUM_HEADS // _NUM_KV_HEADS)
        shared = (positions, starts)
        run(
            f"store_kv_{kind}",
            (_NUM_KV_HEADS, len(spans), 1),
            (state.pages, qkv, None, rotation, *state.kv_scale, *shared, spans, *state.tail),
        )
        out = np.full((len(positions), _NUM_HEADS * _HEAD_DIM), np.nan, np.float16)
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


def check_embedding(run: ArrayLaunch, rng: np.random.Generator) -> Iterator[Check]:
    """Yield the check of the embedding and of the rotary angles."""
    count, hidden, pairs = 5, 576, 32
    table = rng.standard_normal((100, hidden)).astype(np.float16)
    tokens = rng.integers(0, 100, count).astype(np.int32)
    positions = rng.integers(0, 100_000, count).astype(np.int32)
    turns = embedding.turns(10000.0 ** (-np.arange(pairs) / pairs))[None]
    residual = np.full((count, hidden), np.nan, np.float32)
    rotation = np.full((count, pairs, 2), np.nan, np.float32)
    scales = np.full(count, np.nan, np.float32)
    rows = np.zeros(count, np.int32)
    arrays = (residual, rotation, scales, table, tokens, positions, rows, turns)
    run("embed_f16", (1, count, 1), (*arrays, hidden, pairs, 4096, 0.125, 0.0))
    exact = float(np.abs(residual - table[tokens].astype(np.float32)).max())
    yield Check("embed_f16", exact, 0.0)
    angles = float(np.abs(rotation - embedding.rotation(positions, turns[0])).max())
    yield Check("embed_f16, angles", angles, 1e-6)


def check_sampling(run: ArrayLaunch, rng: np.random.Generator) -> Iterator[Check]:
    """Yield the check of the sampler: the share of rows that got another token."""
    cases = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, repetition_penalty=1.3),
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_k=0, top_p=0.95, temperature=1.3),
        SamplingParams(seed=3, top_k=0, top_p=1.0, min_p=0.05),
        SamplingParams(seed=4, top_k=50, top_p=1.0, repetition_penalty=1.2),
    ]
    rows, vocab, ring_size = len(cases), 2000, 16
    words = -(-vocab // 32)
    logits = (3 * rng.standard_normal((rows, vocab))).astype(np.float32)
    positions = rng.integers(0, 5000, rows).astype(np.int32)
    tokens = rng.integers(0, vocab, 2 * rows).astype(np.int32)
    owners = np.repeat(np.arange(rows, dtype=np.int32), 2)
    seen = np.zeros((rows, words), np.uint32)
    run("mark_seen", (1, 1, 1), (seen, tokens, owners, len(tokens), words))
    flags = np.unpackbits(seen.view(np.uint8), axis=1, bitorder="little")[:, :vocab].astype(bool)
    wanted_flags = np.zeros((rows, vocab), bool)
    wanted_flags[owners, tokens] = True
    yield Check("mark_seen", float((flags != wanted_flags).sum()), 0.0)
    want = [
        sample(logits[row], params, int(positions[row]) + 1, flags[row])
        for row, params in enumerate(cases)
    ]
    chosen = np.full(rows, -1, np.int32)
    ring = np.zeros((rows, ring_size), np.uint64)
    records = np.concatenate([_record(params) for params in cases]).view(np.uint8)
    top, best = np.zeros(rows, np.uint64), np.zeros(rows, np.uint64)
    tickets = np.zeros(rows, np.uint32)
    rules: tuple[Any, ...] = (
        records,
        np.full((rows, STOP_IDS), -1, np.int32),
        np.full(rows, 1 << 30, np.int32),
        None,
    )
    sizes = (vocab, vocab, words, ring_size)
    state = (chosen, positions, seen, ring, logits)
    run("sample_top_f32", (2, rows, 1), (top, best, tickets, *state, *rules, *sizes))
    run("sample_draw_f32", (rows, 1, 1), (top, *state, *rules, *sizes), DRAW_SHARED_BYTES)
    yield Check("sample_top_f32, sample_draw_f32", float((chosen != np.array(want)).mean()), 0.0)


def _record(params: SamplingParams) -> NDArray[np.void]:
    record: NDArray[np.void] = sampling_row(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        penalty=params.repetition_penalty,
        seed=params.seed,
    )
    return record.view(SAMPLING_ROW)


class _Cache:
    """Pages of two sequences in one format, and what the kernels are told about them."""

    def __init__(self, quant_policy: int, rng: np.random.Generator) -> None:
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
            _NUM_HEADS,
            _NUM_KV_HEADS,
            eps=_EPS,
            kv_scale=scales.astype(np.float64) if quant_policy == 4 else None,
        )
        sizes = (_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM, 1, 64, max_pages)
        self.sizes = sizes
        self.tail: tuple[Any, ...] = (self.table, *sizes, _EPS)

    def inputs(
        self, positions: NDArray[np.int32], rng: np.random.Generator
    ) -> tuple[NDArray[np.float16], NDArray[np.float32], NDArray[np.float32]]:
        """Return qkv, rotation and query scales of new tokens."""
        count = len(positions)
        width = (_NUM_HEADS + 2 * _NUM_KV_HEADS) * _HEAD_DIM
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
        num_heads=_NUM_HEADS,
        num_kv_heads=_NUM_KV_HEADS,
        rows=len(_LENGTHS),
        max_pages=state.table.shape[1],
        max_splits=3,
        split_units=2,
    )
    out = np.full((len(_LENGTHS), _NUM_HEADS * _HEAD_DIM), np.nan, np.float16)
    partials = np.full(shape.partials_floats, np.nan, np.float32)
    tickets = np.zeros(len(_LENGTHS) * _NUM_KV_HEADS, np.uint32)
    arrays = (out, state.pages, partials, tickets, qkv, None, None, rotation, scales)
    numbers = (positions, state.table, *state.sizes, shape.split_units, _EPS)
    name = f"decode_attention_{kind}"
    run(name, shape.grid, (*arrays, *state.kv_scale, *numbers), shape.shared_bytes)
    starts = np.arange(len(_LENGTHS) + 1, dtype=np.int32)
    want = state.expected(qkv, rotation, scales, positions, starts)
    return Check(f"decode_attention_{kind}", relative_error(out, want), TOLERANCE)
