"""Launches of the attention kernels on random pages, held to float64; on any machine that can.

The caller gives the launch: of the emulator, or of a GPU. Both take numpy arrays, put guard bytes
around each and copy back what a kernel may write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import figures
import numpy as np
from numpy.typing import NDArray

from device_runtime.kernels.attention_shape import (
    DecodeAttentionShape,
    prefill_shared_bytes,
    prefill_tiles,
    store_spans,
)
from device_runtime.kernels.reference import attention as reference
from device_runtime.kernels.reference.attention import AttentionWeights
from device_runtime.kernels.reference.kv_pages import KvLayout

Array = NDArray[np.generic]
Launch = Callable[..., None]
"""(name, grid, arguments, shared_bytes); arguments as the table's row has them."""

NAMES = {0: "half", 4: "static", 8: "online"}
EPS = 1e-6
ATTENTION_TOLERANCE = 2e-3
"""Of a row's result, ||got - want|| / ||want||: fp16 results and, in prefill, fp16 weights."""


@dataclass(frozen=True)
class Heads:
    """Heads of a layer and their cache."""

    quant_policy: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    page_size: int = 64
    num_ranks: int = 1
    has_norm: bool = False

    @property
    def layout(self) -> KvLayout:
        return KvLayout(self.quant_policy, self.head_dim, self.page_size)


class Layer:
    """Random weights, pages and steps of one attention layer."""

    def __init__(self, heads: Heads, seed: int) -> None:
        self.heads = heads
        self.rng = np.random.default_rng(seed)
        self.q_norm = self._norm()
        self.k_norm = self._norm()
        self.kv_scale: NDArray[np.float32] | None = None
        if heads.quant_policy == 4:
            scale = self.rng.random((heads.num_kv_heads, 4)) * 0.02 + 0.01
            self.kv_scale = scale.astype(np.float32)
        self.weights = AttentionWeights(
            heads.num_heads,
            heads.num_kv_heads,
            heads.num_ranks,
            None if self.q_norm is None else self.q_norm.astype(np.float64),
            None if self.k_norm is None else self.k_norm.astype(np.float64),
            EPS,
            self.kv_scale,
        )

    def _norm(self) -> NDArray[np.float16] | None:
        if not self.heads.has_norm:
            return None
        return (self.rng.random(self.heads.head_dim) + 0.5).astype(np.float16)

    def pages(
        self, lengths: Sequence[int], max_pages: int
    ) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
        """Pages whose first `lengths` tokens are random, the rest NaN; and the page table."""
        heads, layout = self.heads, self.heads.layout
        num_pages = len(lengths) * max_pages + 2
        shape = layout.shape(num_pages, heads.num_kv_heads)
        if heads.quant_policy == 0:
            halves = self.rng.standard_normal(int(np.prod(shape)) // 2).astype(np.float16)
            pages = halves.view(np.uint8).reshape(shape)
        else:
            pages = self.rng.integers(0, 256, shape, dtype=np.uint8)
        if heads.quant_policy == 8:
            scale = self.rng.random((*shape[:3], 2 * layout.unit_tokens)) * 0.025 + 0.004
            zero = -128 * scale + self.rng.standard_normal(scale.shape) * 0.3
            parameters = np.stack([scale, zero], -1).astype(np.float16)
            pages[..., 2 * layout.part_bytes :] = parameters.view(np.uint8).reshape(*shape[:3], -1)
        table = self.rng.permutation(num_pages)[: len(lengths) * max_pages]
        table = table.reshape(len(lengths), max_pages).astype(np.int32)
        written = pages.copy()
        pages[:] = 0xFF
        for row, length in enumerate(lengths):
            for token in range(length):
                page, offset = divmod(token, layout.page_size)
                unit, place = divmod(offset, layout.unit_tokens)
                where = self._bytes_of(place)
                pages[table[row, page], :, unit, where] = written[table[row, page], :, unit, where]
        return pages, table

    def _bytes_of(self, token: int) -> NDArray[np.int64]:
        layout = self.heads.layout
        elements = np.concatenate([layout.key_offsets(token), layout.value_offsets(token)])
        places = [elements + i for i in range(layout.element_bytes)]
        if layout.parameter_bytes:
            starts = [layout.parameter_offset(token, is_value) for is_value in (False, True)]
            places += [start + np.arange(4) for start in starts]
        return np.concatenate(places)

    def tokens(self, num_tokens: int) -> dict[str, Array]:
        """qkv, rotation and query scales of new tokens."""
        heads, dim = self.heads, self.heads.head_dim
        columns = (heads.num_heads + 2 * heads.num_kv_heads) * dim
        angles = self.rng.random((num_tokens, dim // 2)) * 2 * np.pi
        scale = reference.LOG2_E / np.sqrt(dim) * (1 + self.rng.random(num_tokens))
        return {
            "qkv": (self.rng.standard_normal((num_tokens, columns)) * 1.5).astype(np.float16),
            "rotation": np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32),
            "query_scale": scale.astype(np.float32),
        }

    def sizes(self, max_pages: int) -> list[int]:
        heads = self.heads
        return [
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            heads.num_ranks,
            heads.page_size,
            max_pages,
        ]

    def scales(self) -> list[Array]:
        return [] if self.kv_scale is None else [self.kv_scale]

    def prepared(self, new: dict[str, Array], token: int) -> tuple[Array, Array, Array]:
        """q, k and v of a new token as attention uses them."""
        rotation = new["rotation"][token].astype(np.float64)
        return reference.prepare(new["qkv"][token], rotation, self.weights)

    def check_stored(self, pages: Array, want: Array) -> None:
        """Codes may differ by one where fp32 rounds otherwise than float64, here and there."""
        if self.heads.quant_policy == 0:
            difference = np.abs(
                np.asarray(pages).view(np.uint16).astype(int) - want.view(np.uint16).astype(int)
            )
        else:
            difference = np.abs(pages.astype(int) - want.astype(int))
        assert difference.max() <= 2
        assert (difference > 0).mean() < 1e-2

    def error(
        self,
        got: Array,
        pages: Array,
        row_pages: Array,
        length: int,
        token: int,
        new: dict[str, Array],
    ) -> float:
        """Of one token's result, which attends to `length` tokens of the pages."""
        q, _, _ = self.prepared(new, token)
        kv = reference.load(pages, self.heads.layout, row_pages, length, self.weights)
        want = reference.attend(q, kv, float(new["query_scale"][token]))
        return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


def poisoned(shape: tuple[int, ...]) -> NDArray[np.float16]:
    """NaN where nothing is written."""
    return np.full(shape, 0x7E00, np.uint16).view(np.float16)


def check_decode(
    launch: Launch,
    heads: Heads,
    lengths: Sequence[int],
    *,
    max_splits: int = 3,
    split_units: int = 1,
    slots: int = 2,
    seed: int = 0,
) -> None:
    """One decode step; lengths count the new token, 0 is an idle row. Rows do not mix."""
    layer = Layer(heads, seed)
    max_pages = max(1, *(-(-length // heads.page_size) for length in lengths))
    pages, table = layer.pages([max(length - 1, 0) for length in lengths], max_pages)
    new = layer.tokens(len(lengths))
    positions = np.array(lengths, np.int32) - 1

    def run(rows: slice, cache: Array) -> Array:
        first = {name: np.ascontiguousarray(array[rows]) for name, array in new.items()}
        count = len(positions[rows])
        shape = DecodeAttentionShape(
            heads.layout,
            heads.num_heads,
            heads.num_kv_heads,
            count,
            max_pages,
            max_splits,
            split_units,
        )
        out = poisoned((count, heads.num_heads * heads.head_dim))
        partials = np.zeros(shape.partials_floats, np.float32)
        arguments = [out, cache, partials, first["qkv"], layer.q_norm, layer.k_norm]
        arguments += [first["rotation"], first["query_scale"], *layer.scales(), positions[rows]]
        arguments += [table[rows], *layer.sizes(max_pages), max_splits, split_units, slots, EPS]
        name = shape.kernel(NAMES[heads.quant_policy])
        launch(name, shape.grid, arguments, shape.shared_bytes(slots))
        assert not partials.view(np.uint32).any()
        return out

    after = pages.copy()
    out = run(slice(None), after)
    want = pages.copy()
    for row, length in enumerate(lengths):
        if length == 0:
            assert (out[row] == 0).all()
            continue
        _, k, v = layer.prepared(new, row)
        reference.store(want, heads.layout, table[row], length - 1, (k, v), layer.weights)
    layer.check_stored(after, want)
    for row, length in enumerate(lengths):
        if length:
            error = layer.error(out[row], after, table[row], length, row, new)
            figures.note("worst relative error, decode attention", error)
            assert error < ATTENTION_TOLERANCE
    alone = run(slice(0, 1), pages.copy())
    assert (alone[0].view(np.uint16) == out[0].view(np.uint16)).all()


def check_prefill(
    launch: Launch, heads: Heads, sequences: Sequence[tuple[int, int]], *, seed: int = 0
) -> None:
    """One step of prompts: (tokens in the cache, new tokens) of each sequence."""
    layer = Layer(heads, seed)
    max_pages = max(-(-(old + count) // heads.page_size) for old, count in sequences)
    pages, table = layer.pages([old for old, _ in sequences], max_pages)
    start = np.cumsum([0] + [count for _, count in sequences]).astype(np.int32)
    positions = np.concatenate([np.arange(old, old + count) for old, count in sequences])
    positions = positions.astype(np.int32)
    new = layer.tokens(len(positions))
    after = pages.copy()
    spans = store_spans(start, positions)
    kind = NAMES[heads.quant_policy]
    sizes = [*layer.sizes(max_pages), EPS]
    arguments = [after, new["qkv"], layer.k_norm, new["rotation"], *layer.scales(), positions]
    grid = (heads.num_kv_heads, len(spans), 1)
    launch(f"store_kv_{kind}", grid, [*arguments, start, spans, table, *sizes], 0)
    want = pages.copy()
    for row, (old, count) in enumerate(sequences):
        for i in range(count):
            _, k, v = layer.prepared(new, int(start[row]) + i)
            reference.store(want, heads.layout, table[row], old + i, (k, v), layer.weights)
    layer.check_stored(after, want)

    out = poisoned((len(positions), heads.num_heads * heads.head_dim))
    tiles = prefill_tiles(start, positions, heads.num_heads // heads.num_kv_heads)
    arguments = [out, after, new["qkv"], layer.q_norm, new["rotation"], new["query_scale"]]
    arguments += [*layer.scales(), positions, start, tiles, table, *sizes]
    grid = (heads.num_kv_heads, len(tiles), 1)
    shared_bytes = prefill_shared_bytes(heads.layout)
    launch(f"prefill_attention_{kind}", grid, arguments, shared_bytes)
    for row, (old, count) in enumerate(sequences):
        for i in range(count):
            token = int(start[row]) + i
            error = layer.error(out[token], after, table[row], old + i + 1, token, new)
            figures.note("worst relative error, prefill attention", error)
            assert error < ATTENTION_TOLERANCE
