import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from device_runtime.errors import PackageError
from device_runtime.package_format import int4

TILES = st.tuples(st.integers(1, 3), st.integers(1, 3)).map(lambda t: (32 * t[0], 32 * t[1]))
CODES = st.integers(0, 15)


def word_and_nibble(k, m, num_outputs):
    """The formulas of spec section 2.4, one code at a time."""
    lane = (m % 8) * 4 + (k % 8) // 2
    tile = (k // 32) * (num_outputs // 32) + m // 32
    word = ((tile * 32 + lane) * 2 + (k % 32) // 16) * 2 + (m % 32) // 16
    nibble = (k % 2) * 4 + ((k % 16) // 8) * 2 + (m % 16) // 8
    return word, nibble


def test_the_check_value_of_the_layout():
    # Spec section 2.4: these eight codes make word 0 0x87654321.
    codes = np.zeros((32, 32), np.uint8)
    places = ((0, 0), (0, 8), (8, 0), (8, 8), (1, 0), (1, 8), (9, 0), (9, 8))
    for code, (k, m) in enumerate(places, start=1):
        codes[k, m] = code
    words = int4.pack_words(codes)
    assert words[0] == 0x87654321
    assert words[1:].any() == np.False_
    assert words.tobytes()[:4] == bytes([0x21, 0x43, 0x65, 0x87])


@pytest.mark.parametrize(
    ("k", "m", "word", "nibble"),
    [
        # lane 1 owns k 2 and 3: word (1 * 2 + 0) * 2 + 0.
        (2, 0, 4, 0),
        (3, 0, 4, 4),
        # lane 4 owns m 1: word 4 * 4.
        (0, 1, 16, 0),
        # m 16 is the second word of lane 0, k 16 the third.
        (0, 16, 1, 0),
        (16, 0, 2, 0),
        # m 32 is the next tile, k 32 the next row of two tiles.
        (0, 32, 128, 0),
        (32, 0, 256, 0),
        # The last code of the last tile: lane 31, words 124 to 127, nibble 7.
        (63, 63, 511, 7),
    ],
)
def test_where_single_codes_lie(k, m, word, nibble):
    codes = np.zeros((64, 64), np.uint8)
    codes[k, m] = 15
    words = int4.pack_words(codes)
    assert np.flatnonzero(words).tolist() == [word]
    assert words[word] == 15 << (4 * nibble)


def test_every_code_lies_where_the_formulas_say():
    codes = np.random.default_rng(1).integers(0, 16, (96, 64), np.uint8)
    expected = np.zeros(96 * 64 // 8, np.uint32)
    for k in range(96):
        for m in range(64):
            word, nibble = word_and_nibble(k, m, 64)
            expected[word] |= np.uint32(codes[k, m]) << np.uint32(4 * nibble)
    assert int4.pack_words(codes).tobytes() == expected.astype("<u4").tobytes()


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.uint8, TILES, elements=CODES))
def test_words_and_codes_are_a_bijection(codes):
    words = int4.pack_words(codes)
    assert words.dtype == np.dtype("<u4")
    assert words.size * 8 == codes.size
    assert np.array_equal(int4.unpack_words(words, *codes.shape), codes)


@settings(max_examples=30, deadline=None)
@given(TILES.flatmap(lambda s: st.tuples(st.just(s), st.binary(min_size=s[0] * s[1] // 2))))
def test_every_word_file_is_some_matrix(shape_and_bytes):
    shape, data = shape_and_bytes
    words = np.frombuffer(data, "<u4", shape[0] * shape[1] // 8)
    assert int4.pack_words(int4.unpack_words(words, *shape)).tobytes() == words.tobytes()


def test_views_and_column_order_pack_like_contiguous_codes():
    codes = np.random.default_rng(2).integers(0, 16, (64, 96), np.uint8)
    expected = int4.pack_words(codes).tobytes()
    assert int4.pack_words(np.asfortranarray(codes)).tobytes() == expected
    wide = np.repeat(codes, 2, axis=1)
    assert int4.pack_words(wide[:, ::2]).tobytes() == expected


def test_matrices_of_several_strips_pack_like_their_row_blocks():
    # 4096 columns make strips of 8 tiles; 17 tiles end in a short one. Tiles run over k last.
    codes = np.random.default_rng(3).integers(0, 16, (17 * 32, 4096), np.uint8)
    words = int4.pack_words(codes)
    blocks = [int4.pack_words(codes[row : row + 32]) for row in range(0, 17 * 32, 32)]
    assert words.tobytes() == b"".join(block.tobytes() for block in blocks)
    assert np.array_equal(int4.unpack_words(words, *codes.shape), codes)


def test_a_row_split_is_a_byte_range_of_the_whole():
    codes = np.random.default_rng(4).integers(0, 16, (128, 64), np.uint8)
    whole = int4.pack_words(codes).tobytes()
    assert whole == int4.pack_words(codes[:64]).tobytes() + int4.pack_words(codes[64:]).tobytes()


def test_packing_takes_little_memory_beside_its_result():
    codes = np.zeros((4096, 4096), np.uint8)
    words = np.zeros(codes.size // 8, "<u4")
    for work, result_bytes in (
        (lambda: int4.pack_words(codes), codes.nbytes // 2),
        (lambda: int4.unpack_words(words, *codes.shape), codes.nbytes),
        (lambda: int4.pack_awq(codes), codes.nbytes // 2),
        (lambda: int4.dequantize(codes, codes[:32], codes[:32], 128), 2 * codes.nbytes),
    ):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # Strips hold 2^20 codes, pairs of codes and one group of fp32 products at a time.
        assert peak < result_bytes + 4 * 2**20


@pytest.mark.parametrize("shape", [(31, 32), (32, 40), (32,), (1, 32, 32)])
def test_codes_outside_whole_tiles_are_refused(shape):
    with pytest.raises(ValueError, match=r"are not \[inputs, outputs\] in multiples of 32"):
        int4.pack_words(np.zeros(shape, np.uint8))


def test_codes_above_fifteen_are_refused():
    codes = np.zeros((32, 32), np.uint8)
    codes[31, 31] = 16
    with pytest.raises(ValueError, match="a code is 16, expected at most 15"):
        int4.pack_words(codes)
    with pytest.raises(ValueError, match="a code is 16, expected at most 15"):
        int4.pack_awq(codes)


def test_codes_of_another_type_are_refused():
    with pytest.raises(ValueError, match="codes are int32, expected uint8"):
        int4.pack_words(np.zeros((32, 32), np.int32))


def test_a_wrong_number_of_words_is_refused():
    with pytest.raises(ValueError, match="127 words hold 1016 codes, expected 32 x 32"):
        int4.unpack_words(np.zeros(127, np.uint32), 32, 32)


def test_scale_one_and_zero_eight_make_the_word_of_the_specification():
    # Section 2.5: 64 + 8 = 72 is 0x5480 in fp16, 1.0 is 0x3C00.
    words = int4.pack_scales_zeros(np.array([[1.0]], np.float16), np.array([[8]], np.uint8))
    assert words.tolist() == [[0x3C005480]]
    assert words.tobytes() == bytes([0x80, 0x54, 0x00, 0x3C])


def test_the_low_half_is_fp16_of_64_plus_zero():
    zeros = np.arange(16, dtype=np.uint8)[None, :]
    words = int4.pack_scales_zeros(np.zeros((1, 16), np.float16), zeros)
    assert words[0].tolist() == (64.0 + zeros[0]).astype(np.float16).view(np.uint16).tolist()


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.uint16, (3, 5)),  # every fp16: NaN, infinities, subnormals, minus zero
    hnp.arrays(np.uint8, (3, 5), elements=CODES),
)
def test_scales_and_zeros_come_back_with_the_same_bits(bits, zeros):
    scales, same_zeros = int4.unpack_scales_zeros(
        int4.pack_scales_zeros(bits.view(np.float16), zeros)
    )
    assert scales.tobytes() == bits.tobytes()
    assert same_zeros.dtype == np.uint8
    assert np.array_equal(same_zeros, zeros)


@pytest.mark.parametrize("low", [0x5401, 0x53F0, 0x5500, 0, 0xFFFF])
def test_a_word_without_a_zero_is_a_damaged_package(low):
    words = np.array([[0x3C005480, 0x3C000000 | low]], np.uint32)
    with pytest.raises(PackageError, match=f"word 1 has zero bits {low:#06x}, expected 0x5400"):
        int4.unpack_scales_zeros(words)


def test_scales_and_zeros_must_go_together():
    zeros = np.zeros((1, 2), np.uint8)
    with pytest.raises(ValueError, match="differ in shape"):
        int4.pack_scales_zeros(np.zeros((1, 3), np.float16), zeros)
    with pytest.raises(ValueError, match="scales are float32, expected float16"):
        int4.pack_scales_zeros(np.zeros((1, 2), np.float32), zeros)
    with pytest.raises(ValueError, match="a code is 16"):
        int4.pack_scales_zeros(np.zeros((1, 2), np.float16), zeros + 16)


def test_awq_columns_lie_in_the_order_of_the_specification():
    # Section 2.1: nibble p holds column (0, 2, 4, 6, 1, 3, 5, 7)[p].
    codes = np.arange(8, dtype=np.uint8)[None, :]
    words = int4.pack_awq(codes)
    assert words.dtype == np.dtype("<i4")
    assert words.tolist() == [[0x75316420]]


def test_an_awq_word_with_the_top_bit_is_negative():
    codes = np.zeros((1, 16), np.uint8)
    codes[0, 15] = 8
    # Column 7 of the second word is its nibble 7: 8 << 28 = -2^31.
    assert int4.pack_awq(codes).tolist() == [[0, -(2**31)]]


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_awq_words_and_codes_are_a_bijection(words):
    codes = int4.unpack_awq(words)
    assert codes.shape == (words.shape[0], words.shape[1] * 8)
    assert int4.pack_awq(codes).tobytes() == words.tobytes()


def test_big_endian_awq_words_mean_the_same():
    words = np.array([[0x75316420]], ">i4")
    assert int4.unpack_awq(words).tolist() == [list(range(8))]


def test_awq_shapes_are_checked():
    with pytest.raises(ValueError, match="a multiple of 8"):
        int4.pack_awq(np.zeros((2, 12), np.uint8))
    with pytest.raises(ValueError, match="of int32"):
        int4.unpack_awq(np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match="of int32"):
        int4.unpack_awq(np.zeros((2, 2), np.float32))


def test_a_weight_is_code_minus_zero_times_scale():
    codes = np.array([[3, 15], [8, 0], [1, 2], [0, 15]], np.uint8)
    zeros = np.array([[8, 15], [0, 1]], np.uint8)
    scales = np.array([[0.5, 2.0], [0.25, -1.0]], np.float16)
    # Rows 0 and 1 use the first group, rows 2 and 3 the second.
    expected = [[-2.5, 0.0], [0.0, -30.0], [0.25, -1.0], [0.0, -14.0]]
    assert int4.dequantize(codes, zeros, scales, group_size=2).tolist() == expected


def test_products_are_rounded_once_to_nearest_even():
    codes = np.array([[3, 5, 15]], np.uint8)
    zeros = np.zeros((1, 3), np.uint8)
    # 0x3C01 is 1 + 2^-10. Times 3: 3 + 3 * 2^-10, between 3 + 2^-9 (odd) and 3 + 2^-8 (even), a
    # tie that goes to 3 + 2^-8 = 0x4202. Times 5: 5 + 5/4 * 2^-8 -> 5 + 2^-8 = 0x4501. Times 15:
    # 15 + 15/8 * 2^-7 -> 15 + 2 * 2^-7 = 0x4B82.
    scales = np.full((1, 3), 0x3C01, np.uint16).view(np.float16)
    weights = int4.dequantize(codes, zeros, scales, group_size=1)
    assert [hex(bits) for bits in weights.view(np.uint16)[0]] == ["0x4202", "0x4501", "0x4b82"]


def test_subnormal_scales_count_as_zero_and_overflow_as_infinity():
    # 0x03FF is the largest subnormal, 0x0400 the smallest normal; 15 * 65504 overflows.
    scales = np.array([[0x03FF, 0x0400, 0x83FF, 0x7BFF]], np.uint16).view(np.float16)
    codes = np.full((1, 4), 15, np.uint8)
    weights = int4.dequantize(codes, np.zeros((1, 4), np.uint8), scales, group_size=1)
    # 15 * 2^-14: 1.875 * 2^-11 is exponent 4, mantissa 0.875 * 1024 = 0x380.
    assert [hex(bits) for bits in weights.view(np.uint16)[0]] == [
        "0x0",
        "0x1380",
        "0x8000",
        "0x7c00",
    ]


@settings(max_examples=50, deadline=None)
@given(
    hnp.arrays(np.uint8, (4, 3), elements=CODES),
    hnp.arrays(np.uint8, (2, 3), elements=CODES),
    hnp.arrays(np.uint16, (2, 3), elements=st.integers(0x0400, 0x7BFF)),
)
def test_weights_agree_with_fp16_arithmetic(codes, zeros, bits):
    scales = bits.view(np.float16)
    with np.errstate(over="ignore"):
        difference = codes.astype(np.float16) - np.repeat(zeros, 2, axis=0).astype(np.float16)
        expected = difference * np.repeat(scales, 2, axis=0)
    weights = int4.dequantize(codes, zeros, scales, group_size=2)
    assert weights.dtype == np.float16
    assert weights.tobytes() == expected.tobytes()


def test_dequantize_checks_its_shapes():
    codes = np.zeros((4, 2), np.uint8)
    groups = np.zeros((2, 2), np.uint8)
    with pytest.raises(ValueError, match="do not go together at group_size 3"):
        int4.dequantize(codes, groups, groups.astype(np.float16), group_size=3)
    with pytest.raises(ValueError, match="do not go together at group_size 4"):
        int4.dequantize(codes, groups, groups.astype(np.float16), group_size=4)
