"""One row for each CUDA entry point: what Python must know to compile, check and launch it."""

from __future__ import annotations

from dataclasses import dataclass

from device_runtime.kernels.attention_shape import DECODE_WARPS

ARGUMENT_TYPES = {"P": "pointer", "i": "int32_t", "f": "float"}
"""The letters of `Kernel.arguments`."""


@dataclass(frozen=True)
class Kernel:
    """One ``extern "C"`` function.

    Attributes:
        name: the entry point.
        source: the .cu file without its suffix.
        arguments: one letter of `ARGUMENT_TYPES` per parameter.
        block: threads of a block.
        max_registers: per thread, on every target; what co-residency was planned with.
        blocks_per_sm: that an SM's shared memory is split for, so that no other kernel's block is
            beside them; 0 where kernels follow each other on an SM as they fit.
    """

    name: str
    source: str
    arguments: str
    block: int
    max_registers: int
    blocks_per_sm: int = 0


DECODE_THREADS = 32 * (DECODE_WARPS + 2)
"""Of a block of decode_attention.cu (decode_block.cuh kDecodeThreads)."""
GEMV_WARPS = 16
PAIRED_GEMV_WARPS = 8
"""Of a block of w4a16_gemv_paired_1.cu, two of which share an SM."""
GEMV_STAGES = {1: 2, 4: 1, 8: 1}
"""Units that a warp of a GEMV keeps in flight, by the tokens that it is built for; a step with
fewer tokens runs in the next wider."""
QUANTIZE_THREADS = 256
"""Of a block that quantizes activations for a GEMV of several tokens."""
GEMM_TILES = (16, 32, 64, 128)
"""Tokens of the tiles that a GEMM of 4-bit weights is built for (gemm_shape.py)."""
F16_GEMM_TILES = (8, 32, 64, 128)
"""The same for fp16 weights; 8 serves decode steps."""


def _gemv_rows(width: int) -> tuple[Kernel, ...]:
    source, block = f"w4a16_gemv_{width}", 32 * GEMV_WARPS
    # With one token it reads the residual and the norm's weights; else quantized activations.
    read = "PP" if width == 1 else "P"
    rows = (
        Kernel(f"w4a16_gemv_norm_{width}", source, f"PP{read}PPPiiiiif", block, 128),
        Kernel(f"w4a16_gemv_norm_silu_{width}", source, f"PP{read}PPiiiiif", block, 128),
        Kernel(f"w4a16_gemv_add_{width}", source, "PPPPPPiiiii", block, 128),
    )
    if width == 1:
        return rows
    return (
        *rows,
        Kernel(f"w4a16_quantize_norm_{width}", source, "PPPii", QUANTIZE_THREADS, 64),
        Kernel(f"w4a16_quantize_{width}", source, "PPii", QUANTIZE_THREADS, 64),
    )


def _gemm_row(kind: str, tokens: int) -> Kernel:
    name = f"{kind}_gemm_{tokens}"
    weights = "PP" if kind == "w4a16" else "P"
    return Kernel(name, name, f"PPPPP{weights}iiiii", 128, 255)


def _decode_attention_rows() -> tuple[Kernel, ...]:
    source, arguments = "decode_attention", "P" * 10 + "i" * 9 + "f"
    rows = []
    for wide in ("", "wide_"):
        # Two blocks of decode_attention_online share an SM.
        online_registers = 168 if wide else 96
        rows += [
            Kernel(f"decode_attention_{wide}half", source, arguments, DECODE_THREADS, 168),
            Kernel(f"decode_attention_{wide}static", source, "P" + arguments, DECODE_THREADS, 168),
            Kernel(
                f"decode_attention_{wide}online",
                source,
                arguments,
                DECODE_THREADS,
                online_registers,
            ),
        ]
    return tuple(rows)


KERNELS = (
    *(row for width in GEMV_STAGES for row in _gemv_rows(width)),
    Kernel(
        "w4a16_gemv_paired_add_1",
        "w4a16_gemv_paired_1",
        "PPPPPPiiiii",
        32 * PAIRED_GEMV_WARPS,
        128,
        blocks_per_sm=2,
    ),
    *(_gemm_row("w4a16", tokens) for tokens in GEMM_TILES),
    *(_gemm_row("f16", tokens) for tokens in F16_GEMM_TILES),
    Kernel("rms_norm_f16", "rms_norm", "PPPif", 256, 64),
    Kernel("head_f16", "head_f16", "PPPPPiiif", 256, 128),
    Kernel("head_int8_4", "head_int8", "PPPPPPiiif", 256, 128),
    Kernel("head_int8_8", "head_int8", "PPPPPPiiif", 256, 128),
    *_decode_attention_rows(),
    Kernel("store_kv_half", "store_kv", "P" * 8 + "iiiiiif", 256, 112),
    Kernel("store_kv_static", "store_kv", "P" * 9 + "iiiiiif", 256, 112),
    Kernel("store_kv_online", "store_kv", "P" * 8 + "iiiiiif", 256, 112),
    Kernel("prefill_attention_half", "prefill_attention", "P" * 10 + "iiiiiif", 128, 255),
    Kernel("prefill_attention_static", "prefill_attention", "P" * 11 + "iiiiiif", 128, 255),
    Kernel("prefill_attention_online", "prefill_attention", "P" * 10 + "iiiiiif", 128, 255),
    Kernel("embed_f16", "embedding", "PPPPPPPPiiiff", 256, 40),
    Kernel("embed_bf16", "embedding", "PPPPPPPPiiiff", 256, 40),
    Kernel("mark_seen", "mark_seen", "PPPii", 256, 32),
    Kernel("sample_top_f32", "sample_top", "P" * 12 + "iiii", 256, 64),
    Kernel("sample_top_f16", "sample_top", "P" * 12 + "iiii", 256, 64),
    Kernel("sample_draw_f32", "sample_draw", "P" * 10 + "iiii", 512, 128),
    Kernel("sample_draw_f16", "sample_draw", "P" * 10 + "iiii", 512, 128),
    Kernel("read_bandwidth", "read_bandwidth", "PPi", 512, 64),
    Kernel("sm_probe", "read_bandwidth", "PPi", 512, 64),
)


def kernel(name: str) -> Kernel:
    """Return the row of an entry point; KeyError if there is none."""
    return _BY_NAME[name]


_BY_NAME = {row.name: row for row in KERNELS}
