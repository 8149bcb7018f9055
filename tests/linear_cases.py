"""Launches of the GEMM, norm and head kernels on random inputs, beside their float64 results.

Whoever launches is passed in, so that the CPU emulator and a GPU run the same cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from device_runtime.kernels.gemm_shape import F16_TILES, W4A16_TILES, GemmOutput, GemmShape
from device_runtime.kernels.head_shape import HeadShape
from device_runtime.kernels.reference import linear
from device_runtime.package_format import int4

Values: TypeAlias = NDArray[np.float64]
Argument: TypeAlias = "NDArray[np.generic] | int | float | None"


class Launch(Protocol):
    """Runs a kernel on host arrays, which it updates; guards around them must stay as they were."""

    def __call__(
        self,
        name: str,
        grid: tuple[int, int, int],
        arguments: list[Argument],
        shared_bytes: int = 0,
    ) -> None: ...


@dataclass(frozen=True)
class GemmCase:
    """One product.

    Attributes:
        tile: tokens of the tile.
        num_tokens: rows of x.
        num_inputs: rows of the matrix.
        num_outputs: columns of the matrix.
        group_size: of 4-bit weights; 0 for fp16 ones.
        output: "half", "silu" or "add".
        num_sms: that the tiles are shared out among.
    """

    tile: int
    num_tokens: int
    num_inputs: int
    num_outputs: int
    group_size: int
    output: str
    num_sms: int = 132

    @property
    def shape(self) -> GemmShape:
        """How it is launched."""
        tiles = W4A16_TILES if self.group_size else F16_TILES
        sizes = (self.num_tokens, self.num_inputs, self.num_outputs, self.num_sms)
        return GemmShape(tiles[self.tile], *sizes)


def run_gemm(launch: Launch, case: GemmCase, seed: int = 0) -> tuple[Values, Values]:
    """Return what the kernel gives and what it should give; the residual's old value is taken off.

    ``launch`` runs kernels that were built for the case's group size.

    Raises:
        AssertionError: tickets were left behind, or the residual's neighbours changed.
    """
    rng = np.random.default_rng(seed)
    size = (case.num_inputs, case.num_outputs)
    weights, operands = (
        _quantized(rng, size, case.group_size) if case.group_size else _half(rng, size)
    )
    x = rng.standard_normal((case.num_tokens, case.num_inputs)).astype(np.float16)
    bias = None if case.output == "silu" else rng.standard_normal(size[1]).astype(np.float16)
    product = linear.linear(x, weights, bias)
    want = linear.silu_product(product) if case.output == "silu" else product
    shape = case.shape
    workspace = np.full(max(shape.workspace_bytes // 4, 1), np.nan, np.float32)
    tickets = np.zeros(max(shape.stream_tiles, 1), np.uint32)
    old = np.zeros(1)
    out: NDArray[np.generic] = np.full(want.shape, np.nan, np.float16)
    if case.output == "add":
        out = rng.standard_normal(want.shape).astype(np.float32)
        old = out.astype(np.float64)
    kind = "w4a16" if case.group_size else "f16"
    launch(
        f"{kind}_gemm_{case.tile}",
        (shape.grid, 1, 1),
        [
            out,
            workspace,
            tickets,
            x,
            bias,
            *operands,
            case.num_tokens,
            *size,
            shape.stream_tiles,
            int(GemmOutput[case.output.upper()]),
        ],
        shape.tile.shared_bytes(case.group_size),
    )
    assert not tickets.any()
    return out.astype(np.float64) - old, want


def _quantized(
    rng: np.random.Generator, size: tuple[int, int], group_size: int
) -> tuple[Values, list[NDArray[np.generic]]]:
    groups = (size[0] // group_size, size[1])
    codes = rng.integers(0, 16, size, dtype=np.uint8)
    zeros = rng.integers(0, 16, groups, dtype=np.uint8)
    # Down to scales whose small multiples are below the smallest normal fp16, 6.1e-5.
    scales = np.exp(rng.uniform(np.log(1e-5), np.log(4e-3), groups)).astype(np.float16)
    weights = int4.dequantize(codes, zeros, scales, group_size).astype(np.float64)
    return weights, [int4.pack_words(codes), int4.pack_scales_zeros(scales, zeros)]


def _half(
    rng: np.random.Generator, size: tuple[int, int]
) -> tuple[Values, list[NDArray[np.generic]]]:
    weights = (rng.standard_normal(size) * 0.02).astype(np.float16)
    return weights.astype(np.float64), [weights]


@dataclass(frozen=True)
class HeadCase:
    """Logits of a few rows.

    Attributes:
        num_rows: 1 to 8.
        hidden_size: columns of the head.
        vocab_size: its rows.
        is_int8: whether its weights are.
        grid: blocks.
    """

    num_rows: int
    hidden_size: int
    vocab_size: int
    is_int8: bool
    grid: int


def run_head(
    launch: Launch, case: HeadCase, *, first_rows: bool = False, seed: int = 0
) -> tuple[Values, Values]:
    """Return the logits that the kernel gives and those that it should give.

    Args:
        launch: runs it.
        case: sizes.
        first_rows: pass no row numbers, which asks for the first ones.
        seed: inputs are the same for the same seed and sizes of the head.
    """
    rng = np.random.default_rng(seed)
    hidden, vocab = case.hidden_size, case.vocab_size
    residual = (rng.standard_normal((11, hidden)) * 3).astype(np.float32)
    residual[:, 5] *= 40  # an outlier, which the fixed point must bear
    norm = (rng.random(hidden) + 0.5).astype(np.float16)
    order = rng.permutation(11).astype(np.int32)
    head_scales = (rng.random(vocab) * 1e-3 + 1e-4).astype(np.float16)
    if case.is_int8:
        weights: NDArray[np.generic] = rng.integers(-127, 128, (vocab, hidden)).astype(np.int8)
    else:
        weights = (rng.standard_normal((vocab, hidden)) * 0.02).astype(np.float16)
    rows = None if first_rows else order[: case.num_rows].copy()
    chosen = residual[: case.num_rows] if rows is None else residual[rows]
    want = linear.head(
        linear.rms_norm(chosen, norm, 1e-5), weights, head_scales if case.is_int8 else None
    )
    shape = HeadShape(case.num_rows, hidden, case.is_int8)
    logits = np.full((case.num_rows, vocab), np.nan, np.float32)
    tables = [weights, head_scales] if case.is_int8 else [weights]
    launch(
        shape.kernel,
        (case.grid, 1, 1),
        [logits, residual, rows, norm, *tables, case.num_rows, hidden, vocab, 1e-5],
        shape.shared_bytes,
    )
    return logits.astype(np.float64), want


def run_norm(launch: Launch, num_tokens: int, hidden_size: int) -> tuple[Values, Values]:
    """Return what rms_norm_f16 gives and what it should give."""
    rng = np.random.default_rng(num_tokens)
    x = (rng.standard_normal((num_tokens, hidden_size)) * 9).astype(np.float32)
    weight = (rng.random(hidden_size) + 0.5).astype(np.float16)
    out = np.full(x.shape, np.nan, np.float16)
    launch(
        "rms_norm_f16",
        (num_tokens, 1, 1),
        [out, x, weight, hidden_size, 1e-6],
    )
    return out.astype(np.float64), linear.rms_norm(x, weight, 1e-6)


def relative_error(got: Values, want: Values) -> float:
    """Return ||got - want|| / ||want||; NaN, what outputs are filled with, is never small."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))
