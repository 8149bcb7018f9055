"""TurboMind's 4-bit words and scales, AWQ's words, and the value of a code (spec section 2).

Every pack function has its inverse here. Codes are one per byte, so the largest matrix of a 7B
model is 45 MB unpacked; temporaries are made strip by strip and stay small.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from device_runtime.errors import PackageError

MAX_CODE = 15
CODES_PER_WORD = 8
TILE = 32
"""Rows and columns of the 32 x 32 tile that fills 128 consecutive words (section 2.4)."""

AWQ_COLUMN_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble p of an AWQ word holds column 8j + this[p] (section 2.1)."""

ZERO_BIAS = 0x5400
"""The fp16 bits of 64; 64 + Z is exactly ``0x5400 + 16 * Z`` for Z in 0..15 (section 2.5)."""

_STRIP_CODES = 1 << 20


def pack_words(codes: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Order 4-bit codes as TurboMind's W4 files do (spec section 2.4).

    Args:
        codes: ``[inputs, outputs]`` uint8, each 0..15; local sizes of one rank's file.

    Returns:
        ``[inputs * outputs // 8]`` uint32 words in file order.

    Raises:
        ValueError: a code is above 15, or a size is not a multiple of 32.
    """
    num_inputs, num_outputs = _tiled_shape(codes.shape)
    _check_codes(codes)
    tiles_m = num_outputs // TILE
    # Bytes of a word: k0 then k8 choose the byte, m8 its high nibble.
    packed = np.empty((num_inputs // TILE, tiles_m, 8, 4, 2, 2, 2, 2), np.uint8)
    strip = max(1, _STRIP_CODES // (TILE * num_outputs))
    for start in range(0, packed.shape[0], strip):
        rows = codes[start * TILE : (start + strip) * TILE]
        # k32, k16, k8, k-pair, k0, m32, m16, m8, m-row
        fields = rows.reshape(-1, 2, 2, 4, 2, tiles_m, 2, 2, 8)
        pairs = fields[:, :, :, :, :, :, :, 0] | (fields[:, :, :, :, :, :, :, 1] << 4)
        packed[start : start + strip] = pairs.transpose(0, 5, 7, 3, 1, 6, 4, 2)
    return packed.reshape(-1).view("<u4")


def unpack_words(words: NDArray[np.uint32], num_inputs: int, num_outputs: int) -> NDArray[np.uint8]:
    """Return the codes ``[num_inputs, num_outputs]`` uint8 of `pack_words`.

    Raises:
        ValueError: a size is not a multiple of 32, or the number of words does not fit.
    """
    _tiled_shape((num_inputs, num_outputs))
    if words.size * CODES_PER_WORD != num_inputs * num_outputs:
        raise ValueError(
            f"{words.size} words hold {words.size * CODES_PER_WORD} codes, "
            f"expected {num_inputs} x {num_outputs}"
        )
    tiles_m = num_outputs // TILE
    packed = np.ascontiguousarray(words, "<u4").view(np.uint8)
    packed = packed.reshape(num_inputs // TILE, tiles_m, 8, 4, 2, 2, 2, 2)
    codes = np.empty((num_inputs, num_outputs), np.uint8)
    strip = max(1, _STRIP_CODES // (TILE * num_outputs))
    for start in range(0, packed.shape[0], strip):
        # m32, m-row, k-pair, k16, m16, k0, k8 -> k16, k8, k-pair, k0, m32, m16, m-row
        pairs = packed[start : start + strip].transpose(0, 4, 7, 3, 6, 1, 5, 2)
        fields = codes[start * TILE : (start + strip) * TILE].reshape(
            -1, 2, 2, 4, 2, tiles_m, 2, 2, 8
        )
        np.bitwise_and(pairs, MAX_CODE, out=fields[:, :, :, :, :, :, :, 0])
        np.right_shift(pairs, 4, out=fields[:, :, :, :, :, :, :, 1])
    return codes


def pack_scales_zeros(scales: NDArray[np.float16], zeros: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Join each scale with 64 + zero in one word (spec section 2.5).

    Args:
        scales: ``[groups, outputs]`` fp16; the bits are kept as they are.
        zeros: ``[groups, outputs]`` uint8, each 0..15.

    Returns:
        ``[groups, outputs]`` uint32: low half fp16 of 64 + zero, high half the scale.

    Raises:
        ValueError: the shapes differ, the scales are not fp16 or a zero is above 15.
    """
    if scales.shape != zeros.shape:
        raise ValueError(f"scales {scales.shape} and zeros {zeros.shape} differ in shape")
    if scales.dtype != np.float16:
        raise ValueError(f"scales are {scales.dtype}, expected float16")
    _check_codes(zeros)
    halves = np.empty((*scales.shape, 2), "<u2")
    halves[..., 0] = zeros.astype(np.uint16) * 16 + ZERO_BIAS
    halves[..., 1] = np.ascontiguousarray(scales, "<f2").view("<u2")
    return halves.view("<u4")[..., 0]


def unpack_scales_zeros(
    words: NDArray[np.uint32],
) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """Return (scales fp16, zeros uint8) of `pack_scales_zeros`, both of the words' shape.

    Raises:
        PackageError: the low half of a word is not 64 + zero for a zero in 0..15.
    """
    halves = np.ascontiguousarray(words, "<u4").view("<u2").reshape(*words.shape, 2)
    zeros, rest = np.divmod(halves[..., 0] - np.uint16(ZERO_BIAS), np.uint16(16))
    if rest.any() or (zeros > MAX_CODE).any():
        bad = int(np.flatnonzero((rest != 0) | (zeros > MAX_CODE))[0])
        raise PackageError(
            f"scales_zeros word {bad} has zero bits {int(halves[..., 0].flat[bad]):#06x}, "
            f"expected {ZERO_BIAS:#06x} plus 16 times 0 to 15; convert again"
        )
    return np.ascontiguousarray(halves[..., 1]).view("<f2"), zeros.astype(np.uint8)


def pack_awq(codes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Pack codes (or zeros) as AWQ gemm checkpoints do (spec section 2.1).

    Args:
        codes: ``[rows, columns]`` uint8, each 0..15.

    Returns:
        ``[rows, columns // 8]`` int32.

    Raises:
        ValueError: a code is above 15, or the columns are not a multiple of 8.
    """
    if codes.ndim != 2 or codes.shape[1] % CODES_PER_WORD:
        raise ValueError(f"codes {codes.shape} are not [rows, a multiple of {CODES_PER_WORD}]")
    _check_codes(codes)
    rows, columns = codes.shape
    fields = codes.reshape(rows, columns // CODES_PER_WORD, CODES_PER_WORD)
    packed = np.empty((rows, columns // CODES_PER_WORD, 4), np.uint8)
    for byte in range(4):
        low, high = AWQ_COLUMN_OF_NIBBLE[2 * byte : 2 * byte + 2]
        np.left_shift(fields[..., high], 4, out=packed[..., byte])
        packed[..., byte] |= fields[..., low]
    return packed.view("<i4").reshape(rows, columns // CODES_PER_WORD)


def unpack_awq(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Return the codes ``[rows, columns]`` uint8 of `pack_awq`.

    Raises:
        ValueError: the words are not a matrix of 32-bit integers.
    """
    if words.ndim != 2 or words.dtype.kind not in "iu" or words.dtype.itemsize != 4:
        raise ValueError(f"words {words.dtype} {words.shape} are not [rows, words] of int32")
    rows, row_words = words.shape
    packed = np.ascontiguousarray(words).astype("<u4", copy=False).view(np.uint8)
    packed = packed.reshape(rows, row_words, 4)
    codes = np.empty((rows, row_words * CODES_PER_WORD), np.uint8)
    fields = codes.reshape(rows, row_words, CODES_PER_WORD)
    for byte in range(4):
        low, high = AWQ_COLUMN_OF_NIBBLE[2 * byte : 2 * byte + 2]
        np.bitwise_and(packed[..., byte], MAX_CODE, out=fields[..., low])
        np.right_shift(packed[..., byte], 4, out=fields[..., high])
    return codes


def dequantize(
    codes: NDArray[np.uint8],
    zeros: NDArray[np.uint8],
    scales: NDArray[np.float16],
    group_size: int,
) -> NDArray[np.float16]:
    """Return the weights fp16((code - zero) * scale), rounded once (spec section 2.5).

    A subnormal scale counts as zero, as in the kernels. With a normal scale every product is
    zero or normal, so no other value can be flushed.

    Args:
        codes: ``[inputs, outputs]`` uint8.
        zeros: ``[inputs // group_size, outputs]`` uint8.
        scales: ``[inputs // group_size, outputs]`` fp16.
        group_size: inputs that share a scale.

    Returns:
        ``[inputs, outputs]`` fp16.

    Raises:
        ValueError: the shapes do not go together.
    """
    num_inputs, num_outputs = codes.shape
    expected = (num_inputs // group_size, num_outputs)
    if num_inputs % group_size or zeros.shape != expected or scales.shape != expected:
        raise ValueError(
            f"codes {codes.shape}, zeros {zeros.shape} and scales {scales.shape} "
            f"do not go together at group_size {group_size}"
        )
    wide_scales = scales.astype(np.float32)
    wide_scales[np.abs(wide_scales) < np.float32(2.0**-14)] *= np.float32(0.0)
    weights = np.empty((num_inputs, num_outputs), np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        for group in range(expected[0]):
            rows = slice(group * group_size, (group + 1) * group_size)
            steps = np.subtract(codes[rows], zeros[group], dtype=np.int8, casting="unsafe")
            # Five bits times eleven are exact in fp32, so the cast is the only rounding.
            weights[rows] = steps * wide_scales[group]
    return weights


def _tiled_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2 or shape[0] % TILE or shape[1] % TILE:
        raise ValueError(f"codes {shape} are not [inputs, outputs] in multiples of {TILE}")
    return shape[0], shape[1]


def _check_codes(codes: NDArray[np.uint8]) -> None:
    if codes.dtype != np.uint8:
        raise ValueError(f"codes are {codes.dtype}, expected uint8")
    if codes.size and int(codes.max()) > MAX_CODE:
        raise ValueError(f"a code is {int(codes.max())}, expected at most {MAX_CODE}")
