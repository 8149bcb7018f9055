"""Launches of the W4A16 GEMV on random inputs, beside their float64 results.

Whoever launches is passed in, so that the CPU emulator and a GPU run the same cases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from linear_cases import Launch, Values
from numpy.typing import NDArray

from device_runtime.kernels.gemv_shape import GemvShape
from device_runtime.kernels.reference import linear
from device_runtime.package_format import int4

EPS = 1e-5


@dataclass(frozen=True)
class GemvCase:
    """One product.

    Attributes:
        num_tokens: rows of x.
        shape: how it is launched.
        output: "norm", "norm_silu" or "add".
        has_bias: whether a bias is added.
    """

    num_tokens: int
    shape: GemvShape
    output: str
    has_bias: bool = True


def run_gemv(launch: Launch, case: GemvCase, seed: int = 0) -> tuple[NDArray[np.generic], Values]:
    """Return what the kernel writes and what it should give.

    For "add" both are without the residual's old value, the first in float64. ``launch`` runs
    kernels that were built for the case's group size. Inputs are the same for the same seed and
    matrix, whatever the number of tokens.
    """
    shape = case.shape
    rng = np.random.default_rng(seed)
    size, group_size = (shape.num_inputs, shape.num_outputs), shape.group_size
    groups = (size[0] // group_size, size[1])
    codes = rng.integers(0, 16, size, dtype=np.uint8)
    zeros = rng.integers(0, 16, groups, dtype=np.uint8)
    scales = (rng.random(groups) * 0.002 + 0.0008).astype(np.float16)
    operands = [int4.pack_words(codes), int4.pack_scales_zeros(scales, zeros)]
    weights = linear.weights_of(codes, zeros, scales)
    bias = rng.standard_normal(size[1]).astype(np.float16) if case.has_bias else None
    norm = (rng.random(size[0]) + 0.5).astype(np.float16)
    loud = rng.choice([0.2, 1.0, 5.0], (8, size[0]))
    x = (rng.standard_normal((8, size[0])) * loud).astype(np.float16)[: case.num_tokens]
    residual = (rng.standard_normal((8, size[0])) * 3).astype(np.float32)
    residual[:, rng.integers(size[0])] *= 40  # an outlier, which the fixed point must bear
    residual = residual[: case.num_tokens].copy()
    workspace = np.full(shape.num_outputs * shape.width, np.nan, np.float32)
    numbers = [case.num_tokens, *size, shape.phase_units, shape.held_tiles]

    is_add = case.output == "add"
    read: list[NDArray[np.generic]] = [x] if is_add else [residual, norm]
    if shape.width > 1:
        # Every byte that the GEMV reads must have been written.
        activations = np.full(shape.activation_bytes, 0xFF, np.uint8)
        kind = "w4a16_quantize" if is_add else "w4a16_quantize_norm"
        name = f"{kind}_{shape.width}"
        launch(name, (shape.quantize_grid, 1, 1), [activations, *read, case.num_tokens, size[0]])
        read = [activations]
    name = shape.add_kernel if is_add else f"w4a16_gemv_{case.output}_{shape.width}"
    grid = (shape.grid, 1, 1)
    if is_add:
        want = linear.linear(x, weights, bias)
        sums = rng.standard_normal(want.shape).astype(np.float32)
        old = sums.astype(np.float64)
        launch(name, grid, [sums, workspace, *read, bias, *operands, *numbers], shape.shared_bytes)
        return sums.astype(np.float64) - old, want
    want = linear.rms_norm(residual, norm, EPS) @ weights
    biases = []
    if case.output == "norm_silu":
        want = linear.silu_product(want)
    else:
        biases = [bias]
        want = want if bias is None else want + bias.astype(np.float64)
    out = np.full(want.shape, np.nan, np.float16)
    values = [out, workspace, *read, *biases, *operands, *numbers, EPS]
    launch(name, grid, values, shape.shared_bytes)
    return out, want
