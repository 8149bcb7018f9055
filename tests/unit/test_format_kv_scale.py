import struct

import numpy as np
import pytest

from device_runtime.errors import PackageError
from device_runtime.package_format.kv_scale import KvScale


def test_asymmetric_parameters_by_hand():
    # Keys -1..3: (3 + 1) / 255 = 0.0156862..., next to 2^-6 * 1.00392: fp16 steps of 2^-16 give
    # 1028 * 2^-16 = 0.01568603515625; centre (3 - 1) / 2 = 1. Values -127.5..127.5: 1 and 0.
    scale = KvScale.from_extrema(-1.0, 3.0, -127.5, 127.5)
    assert scale == KvScale(1028 * 2.0**-16, 1.0, 1.0, 0.0)


def test_every_step_is_rounded_to_fp16():
    # max - min = 2048.5 + 1 = 2049.5 in exact arithmetic; in fp16 2048.5 is 2048 already and
    # 2048 + 1 = 2049 ties to 2048. 2048 / 255 = 8.0314: fp16 steps of 2^-7 give 1028 * 2^-7.
    # The sum 2048 - 1 = 2047 is exact, half of it 1023.5.
    scale = KvScale.from_extrema(-1.0, 2048.5, -127.5, 127.5)
    assert (scale.k_scale, scale.k_zero_point) == (1028 * 2.0**-7, 1023.5)


def test_symmetric_parameters_by_hand():
    # Largest magnitudes 254 and 63.5, divided by 127; zero points 0.
    scale = KvScale.from_extrema(-254.0, 3.0, -1.0, 63.5, is_symmetric=True)
    assert scale == KvScale(2.0, 0.0, 0.5, 0.0)


def test_other_widths_change_the_divisor():
    # 4 bits: 30 / 15 = 2; symmetric 28 / 7 = 4.
    assert KvScale.from_extrema(-15.0, 15.0, 0.0, 30.0, bits=4) == KvScale(2.0, 0.0, 2.0, 15.0)
    symmetric = KvScale.from_extrema(-28.0, 7.0, 0.0, 7.0, bits=4, is_symmetric=True)
    assert symmetric == KvScale(4.0, 0.0, 1.0, 0.0)


def test_extrema_are_taken_over_all_heads_and_dims():
    low = np.array([[0.0, -1.0], [2.0, -3.0]], np.float16)
    high = np.array([[5.0, 252.0], [2.0, 1.0]], np.float16)
    # -3..252 is a range of 255: scale 1, centre 249 / 2.
    assert KvScale.from_extrema(low, high, low, high) == KvScale(1.0, 124.5, 1.0, 124.5)


def test_a_range_that_rounds_to_nothing_keeps_a_positive_scale():
    scale = KvScale.from_extrema(2.0, 2.0, 0.0, 0.0)
    assert scale == KvScale(2.0**-24, 2.0, 2.0**-24, 0.0)


@pytest.mark.parametrize(
    ("low", "high"), [(np.nan, 1.0), (0.0, np.inf), (1.0, 0.0), (-np.inf, 0.0)]
)
def test_impossible_statistics_are_refused(low, high):
    with pytest.raises(PackageError, match="key statistics run from"):
        KvScale.from_extrema(low, high, 0.0, 1.0)
    with pytest.raises(PackageError, match="value statistics run from"):
        KvScale.from_extrema(0.0, 1.0, low, high)


def test_a_range_beyond_fp16_is_refused():
    with pytest.raises(PackageError, match="k_scale inf, expected a finite number above 0"):
        KvScale.from_extrema(-60000.0, 60000.0, 0.0, 1.0)


@pytest.mark.parametrize("bits", [1, 9])
def test_widths_outside_two_to_eight_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}, expected 2 to 8"):
        KvScale.from_extrema(0.0, 1.0, 0.0, 1.0, bits=bits)


def test_the_file_is_four_little_endian_floats():
    # 1.0 is 0x3F800000, 2.0 0x40000000, 0.5 0x3F000000, -1.0 0xBF800000.
    data = KvScale(1.0, 2.0, 0.5, -1.0).to_bytes()
    assert data.hex() == "0000803f000000400000003f000080bf"
    assert KvScale.from_bytes(data) == KvScale(1.0, 2.0, 0.5, -1.0)


def test_fp16_numbers_survive_the_file():
    scale = KvScale.from_extrema(-1.0, 3.0, -0.7, 0.1)
    assert KvScale.from_bytes(scale.to_bytes()) == scale


def test_the_symmetric_file_of_lmdeploy_is_read():
    data = struct.pack("<2f", 0.25, 0.5)
    assert KvScale.from_bytes(data) == KvScale(0.25, 0.0, 0.5, 0.0)
    assert len(KvScale.from_bytes(data).to_bytes()) == 16


@pytest.mark.parametrize("size", [0, 4, 12, 15, 17, 32])
def test_files_of_another_size_are_refused(size):
    with pytest.raises(PackageError, match=f"has {size} bytes, expected 16"):
        KvScale.from_bytes(bytes(size))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 0.0, 1.0, 0.0), "k_scale 0.0, expected a finite number above 0"),
        ((1.0, 0.0, -1.0, 0.0), "v_scale -1.0, expected a finite number above 0"),
        ((1.0, float("nan"), 1.0, 0.0), "k_zero_point nan, expected a finite number"),
        ((1.0, 0.0, 1.0, float("inf")), "v_zero_point inf, expected a finite number"),
    ],
)
def test_unusable_numbers_are_refused(values, message):
    with pytest.raises(PackageError, match=message):
        KvScale.from_bytes(struct.pack("<4f", *values))
