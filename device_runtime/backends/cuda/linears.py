"""The linear layers as launches: 4-bit ones by GEMV up to 8 tokens, all others by norm and GEMM.

A model may mix 4-bit and fp16 matrices; each goes its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from device_runtime.backends.cuda.kernel_set import KernelSet
from device_runtime.backends.cuda.weights import has_half_matrices, layer_name
from device_runtime.kernels.gemm_shape import (
    F16_TILES,
    W4A16_TILES,
    GemmOutput,
    GemmShape,
    fastest_tile,
)
from device_runtime.kernels.gemv_shape import GemvShape, pair_gemv, plan_gemv
from device_runtime.kernels.graphs import Launch
from device_runtime.kernels.table import GEMV_STAGES
from device_runtime.package_format import names
from device_runtime.package_format.model_config import ModelConfig

MAX_GEMV_TOKENS = max(GEMV_STAGES)


Resized = tuple[tuple[int, int, int], dict[int, int]]
"""The grid of a launch, and its whole-number arguments that change, by their place."""


@dataclass(frozen=True)
class PassSize:
    """What differs from one pass over prompts to the next.

    Attributes:
        num_tokens: new tokens of all its sequences.
        num_tiles: blocks of the attention, times kv heads.
        num_spans: blocks of the store, times kv heads.
    """

    num_tokens: int
    num_tiles: int
    num_spans: int


@dataclass(frozen=True)
class Step:
    """A launch, and how it fits passes of another size; None where it always fits."""

    launch: Launch
    resized: Callable[[PassSize], Resized] | None

    def resize(self, size: PassSize) -> None:
        """Make the launch fit a pass."""
        if self.resized is not None:
            self.launch.resize(*self.resized(size))


@dataclass(frozen=True)
class Matrix:
    """One matrix in device memory, joined over ranks.

    Attributes:
        parts: addresses of its words and of its groups' (zero, scale) words, or of its fp16.
        bias: address or None.
        num_inputs: rows.
        num_outputs: columns.
    """

    parts: tuple[int, ...]
    bias: int | None
    num_inputs: int
    num_outputs: int

    @property
    def is_quantized(self) -> bool:
        """Whether it is 4-bit codes with scales."""
        return len(self.parts) > 1


@dataclass(frozen=True)
class LayerMatrices:
    """The matrices and norms of a layer, by address."""

    attention_norm: int
    ffn_norm: int
    qkv: Matrix
    wo: Matrix
    gate_up: Matrix
    down: Matrix


def layer_matrices(model: ModelConfig, places: Mapping[str, int], layer: int) -> LayerMatrices:
    """Return where a layer's matrices are."""

    def matrix(module: str, num_inputs: int, num_outputs: int) -> Matrix:
        is_quantized = model.is_quantized(layer, module)
        kinds = (names.QWEIGHT, names.SCALES_ZEROS) if is_quantized else (names.WEIGHT,)
        return Matrix(
            tuple(places[layer_name(layer, module, kind)] for kind in kinds),
            places.get(layer_name(layer, module, names.BIAS)),
            num_inputs,
            num_outputs,
        )

    hidden, inner = model.hidden_size, model.intermediate_size
    return LayerMatrices(
        attention_norm=places[layer_name(layer, names.ATTENTION_NORM, names.WEIGHT)],
        ffn_norm=places[layer_name(layer, names.FFN_NORM, names.WEIGHT)],
        qkv=matrix(names.W_QKV, hidden, model.qkv_size),
        wo=matrix(names.WO, model.q_size, hidden),
        gate_up=matrix(names.W13, hidden, 2 * inner),
        down=matrix(names.W2, inner, hidden),
    )


def _has_gemv(matrix: Matrix, num_tokens: int) -> bool:
    return matrix.is_quantized and num_tokens <= MAX_GEMV_TOKENS


class Linears:
    """Builds launches of one model's linear layers over one workspace."""

    def __init__(self, model: ModelConfig, kernels: KernelSet, buffers: Mapping[str, int]) -> None:
        self._model = model
        self._kernels = kernels
        self._buffers = buffers

    def normed(
        self, out: int, matrix: Matrix, norm: int, num_tokens: int, *, is_silu: bool
    ) -> list[Step]:
        """Return ``out = matrix @ norm(residual)``, through silu(gate) * up where asked."""
        eps = float(self._model.rms_norm_eps)
        buffers = self._buffers
        if _has_gemv(matrix, num_tokens):
            shape = self._gemv(matrix, num_tokens)
            source = (buffers["residual"], norm)
            steps, x = self._quantized("quantize_norm", source, shape, num_tokens)
            bias = () if is_silu else (matrix.bias,)
            name = (
                f"w4a16_gemv_norm_silu_{shape.width}"
                if is_silu
                else (f"w4a16_gemv_norm_{shape.width}")
            )
            head = (out, buffers["gemv_sums"], *x, *bias)
            return [*steps, self._launch_gemv(name, shape, head, matrix, num_tokens, (eps,))]
        norm_step = Step(
            self._kernels.launch(
                "rms_norm_f16",
                (num_tokens, 1, 1),
                (buffers["normed"], buffers["residual"], norm, matrix.num_inputs, eps),
            ),
            lambda size: ((size.num_tokens, 1, 1), {}),
        )
        output = GemmOutput.SILU if is_silu else GemmOutput.HALF
        return [norm_step, self._gemm(output, out, buffers["normed"], matrix, num_tokens)]

    def added(self, x: int, matrix: Matrix, num_tokens: int) -> list[Step]:
        """Return ``residual += matrix @ x``."""
        buffers = self._buffers
        if _has_gemv(matrix, num_tokens):
            shape = self._gemv(matrix, num_tokens)
            if self._kernels.is_programmatic:
                shape = pair_gemv(shape, self._kernels.max_shared_bytes)
            steps, activations = self._quantized("quantize", (x,), shape, num_tokens)
            head = (buffers["residual"], buffers["gemv_sums"], *activations, matrix.bias)
            name = shape.add_kernel
            return [*steps, self._launch_gemv(name, shape, head, matrix, num_tokens, ())]
        return [self._gemm(GemmOutput.ADD, buffers["residual"], x, matrix, num_tokens)]

    def program_key(self, num_tokens: int) -> int:
        """Return a number that passes share which differ in `Step.resize` alone."""
        if self._model.group_size and num_tokens <= MAX_GEMV_TOKENS:
            return num_tokens
        # Two kinds of matrices have tiles of their own, and passes share both or neither.
        return 1000 * self._tile_number(num_tokens, True) + self._tile_number(num_tokens, False)

    def _tile_number(self, num_tokens: int, is_quantized: bool) -> int:
        """Return the tile of one kind of matrices, 0 where the model has none of them."""
        is_there = self._model.group_size > 0 if is_quantized else has_half_matrices(self._model)
        return fastest_tile(num_tokens, is_quantized=is_quantized) if is_there else 0

    def _gemv(self, matrix: Matrix, num_tokens: int) -> GemvShape:
        width = min(width for width in GEMV_STAGES if width >= num_tokens)
        return plan_gemv(
            width=width,
            num_inputs=matrix.num_inputs,
            num_outputs=matrix.num_outputs,
            group_size=self._model.group_size,
            num_sms=self._kernels.num_sms,
            max_shared_bytes=self._kernels.max_shared_bytes,
        )

    def _quantized(
        self, name: str, source: tuple[int, ...], shape: GemvShape, num_tokens: int
    ) -> tuple[list[Step], tuple[int, ...]]:
        """Return what makes the activations of a GEMV, and where they are.

        For one token every block makes them itself.
        """
        if shape.width == 1:
            return [], source
        activations = self._buffers["gemv_activations"]
        launch = self._kernels.launch(
            f"w4a16_{name}_{shape.width}",
            (shape.quantize_grid, 1, 1),
            (activations, *source, num_tokens, shape.num_inputs),
        )
        return [Step(launch, None)], (activations,)

    def _launch_gemv(
        self,
        name: str,
        shape: GemvShape,
        head: tuple[int | None, ...],
        matrix: Matrix,
        num_tokens: int,
        tail: tuple[float, ...],
    ) -> Step:
        arguments = (
            *head,
            *matrix.parts,
            num_tokens,
            matrix.num_inputs,
            matrix.num_outputs,
            shape.phase_units,
            shape.held_tiles,
            *tail,
        )
        grid = (shape.grid, 1, 1)
        return Step(
            self._kernels.launch(name, grid, arguments, shared_bytes=shape.shared_bytes), None
        )

    def _gemm_shape(self, matrix: Matrix, num_tokens: int) -> GemmShape:
        tiles = W4A16_TILES if matrix.is_quantized else F16_TILES
        return GemmShape(
            tiles[fastest_tile(num_tokens, is_quantized=matrix.is_quantized)],
            num_tokens,
            matrix.num_inputs,
            matrix.num_outputs,
            self._kernels.num_sms,
        )

    def _gemm(
        self, output: GemmOutput, result: int, x: int, matrix: Matrix, num_tokens: int
    ) -> Step:
        shape = self._gemm_shape(matrix, num_tokens)
        kind = "w4a16" if matrix.is_quantized else "f16"
        name = f"{kind}_gemm_{shape.tile.tokens}"
        arguments = (
            result,
            self._buffers["gemm_sums"],
            self._buffers["gemm_tickets"],
            x,
            None if output is GemmOutput.SILU else matrix.bias,
            *matrix.parts,
            num_tokens,
            matrix.num_inputs,
            matrix.num_outputs,
            shape.stream_tiles,
            int(output),
        )
        group_size = self._model.group_size if matrix.is_quantized else 0
        shared_bytes = shape.tile.shared_bytes(group_size)
        first_number = 5 + len(matrix.parts)

        def resized(size: PassSize) -> Resized:
            wanted = self._gemm_shape(matrix, size.num_tokens)
            numbers = {first_number: size.num_tokens, first_number + 3: wanted.stream_tiles}
            return (wanted.grid, 1, 1), numbers

        return Step(
            self._kernels.launch(name, (shape.grid, 1, 1), arguments, shared_bytes=shared_bytes),
            resized,
        )
