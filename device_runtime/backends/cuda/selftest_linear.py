"""The self test's matrix products: every entry point against its float64 twin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.backends.cuda.array_launch import ArrayLaunch
from device_runtime.kernels.gemm_shape import (
    F16_TILES,
    W4A16_TILES,
    GemmOutput,
    GemmShape,
    GemmTile,
)
from device_runtime.kernels.gemv_shape import pair_gemv, plan_gemv
from device_runtime.kernels.head_shape import HeadShape
from device_runtime.kernels.reference import linear as twin
from device_runtime.kernels.table import GEMV_STAGES
from device_runtime.package_format import int4

EPS = 1e-5
NUM_INPUTS = 640
NUM_OUTPUTS = 320
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Check:
    """What one comparison gave; it passed when ``error <= tolerance``."""

    name: str
    error: float
    tolerance: float

    @property
    def is_passed(self) -> bool:
        """Whether the kernel does what its twin does; NaN does not pass."""
        return self.error <= self.tolerance


def relative_error(got: NDArray[Any], want: NDArray[Any]) -> float:
    """Return the norm of the difference over that of what was wanted."""
    difference = np.linalg.norm(got.astype(np.float64) - want)
    return float(difference / np.linalg.norm(want))


@dataclass(frozen=True)
class _Matrix:
    """Random weights in both forms, and a layer's vectors."""

    weights: NDArray[np.float64]
    arrays: tuple[NDArray[Any], ...]
    bias: NDArray[np.float16]
    norm: NDArray[np.float16]


def check_quantized(run: ArrayLaunch, group_size: int, rng: np.random.Generator) -> Iterator[Check]:
    """Yield the checks of 4-bit GEMVs and GEMMs of one group size."""
    matrix = _quantized(rng, group_size)
    for width in GEMV_STAGES:
        yield from _check_gemv(run, matrix, group_size, width, rng)
    for tile in W4A16_TILES:
        name = f"w4a16_gemm_{tile}"
        yield from _check_gemm(run, name, W4A16_TILES[tile], matrix, group_size, rng)


def check_half(run: ArrayLaunch, rng: np.random.Generator) -> Iterator[Check]:
    """Yield the checks of fp16 GEMMs."""
    weights = (rng.standard_normal((NUM_INPUTS, NUM_OUTPUTS)) / 24).astype(np.float16)
    matrix = _Matrix(weights.astype(np.float64), (weights,), *_vectors(rng))
    for tile in F16_TILES:
        yield from _check_gemm(run, f"f16_gemm_{tile}", F16_TILES[tile], matrix, 0, rng)


def check_norm_and_head(run: ArrayLaunch, rng: np.random.Generator) -> Iterator[Check]:
    """Yield the checks of the RMSNorm and of both output heads."""
    rows, hidden, vocab = 5, NUM_INPUTS, 1000
    x = rng.standard_normal((rows, hidden)).astype(np.float32)
    norm = (1 + 0.1 * rng.standard_normal(hidden)).astype(np.float16)
    normed = twin.rms_norm(x, norm, EPS)
    out = np.full((rows, hidden), np.nan, np.float16)
    run("rms_norm_f16", (rows, 1, 1), (out, x, norm, hidden, EPS))
    yield Check("rms_norm_f16", relative_error(out, normed), TOLERANCE)
    half = (rng.standard_normal((vocab, hidden)) / 24).astype(np.float16)
    codes = rng.integers(-127, 128, (vocab, hidden), np.int8)
    scales = rng.uniform(0.001, 0.002, vocab).astype(np.float16)
    for table, row_scales in (((half,), None), ((codes, scales), scales)):
        for count in (rows, 1):
            shape = HeadShape(count, hidden, row_scales is not None)
            logits = np.full((count, vocab), np.nan, np.float32)
            chosen = np.arange(rows - count, rows, dtype=np.int32)
            run(
                shape.kernel,
                (shape.grid(run.num_sms, run.max_shared_bytes), 1, 1),
                (logits, x, chosen, norm, *table, count, hidden, vocab, EPS),
                shape.shared_bytes,
            )
            want = twin.head(normed[chosen], table[0], row_scales)
            yield Check(f"{shape.kernel}, {count} rows", relative_error(logits, want), TOLERANCE)


def _check_gemv(
    run: ArrayLaunch, matrix: _Matrix, group_size: int, width: int, rng: np.random.Generator
) -> Iterator[Check]:
    shape = plan_gemv(
        width=width,
        num_inputs=NUM_INPUTS,
        num_outputs=NUM_OUTPUTS,
        group_size=group_size,
        num_sms=run.num_sms,
        max_shared_bytes=run.max_shared_bytes,
    )
    residual = rng.standard_normal((width, NUM_INPUTS)).astype(np.float32)
    x = rng.standard_normal((width, NUM_INPUTS)).astype(np.float16)
    sizes = (width, NUM_INPUTS, NUM_OUTPUTS, shape.phase_units, shape.held_tiles)
    sums = np.zeros(8 * NUM_OUTPUTS, np.float32)

    def quantized(name: str, *source: NDArray[Any]) -> tuple[NDArray[Any], ...]:
        if width == 1:
            return source
        activations = np.zeros(shape.activation_bytes, np.uint8)
        grid = (shape.quantize_grid, 1, 1)
        run(f"{name}_{width}", grid, (activations, *source, width, NUM_INPUTS))
        return (activations,)

    normed = twin.rms_norm(residual, matrix.norm, EPS) @ matrix.weights
    read = quantized("w4a16_quantize_norm", residual, matrix.norm)
    out = np.full((width, NUM_OUTPUTS), np.nan, np.float16)
    grid, shared = (shape.grid, 1, 1), shape.shared_bytes
    name = f"w4a16_gemv_norm_{width}"
    run(name, grid, (out, sums, *read, matrix.bias, *matrix.arrays, *sizes, EPS), shared)
    yield _check(name, group_size, out, normed + matrix.bias.astype(np.float64))
    halves = np.full((width, NUM_OUTPUTS // 2), np.nan, np.float16)
    name = f"w4a16_gemv_norm_silu_{width}"
    run(name, grid, (halves, sums, *read, *matrix.arrays, *sizes, EPS), shared)
    yield _check(name, group_size, halves, twin.silu_product(normed))
    residual = rng.standard_normal((width, NUM_OUTPUTS)).astype(np.float32)
    want = residual + twin.linear(x, matrix.weights, matrix.bias)
    read = quantized("w4a16_quantize", x)
    for launched in dict.fromkeys((shape, pair_gemv(shape, run.max_shared_bytes))):
        added = residual.copy()
        name, shared = launched.add_kernel, launched.shared_bytes
        run(name, grid, (added, sums, *read, matrix.bias, *matrix.arrays, *sizes), shared)
        yield _check(name, group_size, added, want)


def _check_gemm(
    run: ArrayLaunch,
    name: str,
    tile: GemmTile,
    matrix: _Matrix,
    group_size: int,
    rng: np.random.Generator,
) -> Iterator[Check]:
    num_tokens = tile.tokens + 1 if tile.tokens > 8 else tile.tokens
    shape = GemmShape(tile, num_tokens, NUM_INPUTS, NUM_OUTPUTS, run.num_sms)
    x = rng.standard_normal((num_tokens, NUM_INPUTS)).astype(np.float16)
    sums = np.zeros(max(1, shape.workspace_bytes // 4), np.float32)
    tickets = np.zeros(max(1, shape.num_tiles), np.uint32)
    sizes = (num_tokens, NUM_INPUTS, NUM_OUTPUTS, shape.stream_tiles)
    grid, shared = (shape.grid, 1, 1), tile.shared_bytes(group_size)
    product = twin.linear(x, matrix.weights, None)
    biased = product + matrix.bias.astype(np.float64)
    added = rng.standard_normal((num_tokens, NUM_OUTPUTS)).astype(np.float32)
    results: dict[GemmOutput, tuple[NDArray[Any], NDArray[Any]]] = {
        GemmOutput.HALF: (np.full(product.shape, np.nan, np.float16), biased),
        GemmOutput.SILU: (
            np.full((num_tokens, NUM_OUTPUTS // 2), np.nan, np.float16),
            twin.silu_product(product),
        ),
        GemmOutput.ADD: (added, added + biased),
    }
    for output, (got, want) in results.items():
        bias = None if output is GemmOutput.SILU else matrix.bias
        arguments = (got, sums, tickets, x, bias, *matrix.arrays, *sizes, int(output))
        run(name, grid, arguments, shared)
        yield _check(f"{name} {output.name.lower()}", group_size, got, want)


def _check(name: str, group_size: int, got: NDArray[Any], want: NDArray[Any]) -> Check:
    label = f"{name}, group {group_size}" if group_size else name
    return Check(label, relative_error(got, want), TOLERANCE)


def _quantized(rng: np.random.Generator, group_size: int) -> _Matrix:
    codes = rng.integers(0, 16, (NUM_INPUTS, NUM_OUTPUTS), np.uint8)
    groups = NUM_INPUTS // group_size
    zeros = rng.integers(0, 16, (groups, NUM_OUTPUTS), np.uint8)
    scales = rng.uniform(0.005, 0.015, (groups, NUM_OUTPUTS)).astype(np.float16)
    arrays = (int4.pack_words(codes), int4.pack_scales_zeros(scales, zeros))
    return _Matrix(twin.weights_of(codes, zeros, scales), arrays, *_vectors(rng))


def _vectors(rng: np.random.Generator) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    bias = rng.standard_normal(NUM_OUTPUTS).astype(np.float16)
    norm = (1 + 0.1 * rng.standard_normal(NUM_INPUTS)).astype(np.float16)
    return bias, norm
