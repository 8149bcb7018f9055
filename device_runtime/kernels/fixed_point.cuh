// Numbers as two parts that tensor cores multiply: 16-bit fixed point as two 8-bit digits against
// int8 codes, fp16 as a rounded value and what rounding leaves.
#ifndef TURBOJET_FIXED_POINT_CUH
#define TURBOJET_FIXED_POINT_CUH

#include "common.cuh"

namespace {

constexpr float kLargestFixed = 127.0f * 256.0f;

// Two 8-bit digits of round(value), |value| <= kLargestFixed: byte 1 the high, byte 0 the low one.
__device__ __forceinline__ uint32_t to_digits(float value) {
  // Rounding the low digit to -128..127 carries one into the high digit.
  return static_cast<uint32_t>(__float2int_rn(value)) + 0x80u;
}

// What to_digits has rounded to.
__device__ __forceinline__ int rounded_of(uint32_t digits) {
  return static_cast<int>(digits - 0x80u);
}

// Splits four results of to_digits into a word of high and a word of low digits, all int8.
__device__ __forceinline__ uint2 split_digits(const uint32_t (&digits)[4]) {
  const uint32_t pair0 = __byte_perm(digits[0], digits[1], 0x5140);
  const uint32_t pair1 = __byte_perm(digits[2], digits[3], 0x5140);
  return uint2{__byte_perm(pair0, pair1, 0x7632), __byte_perm(pair0, pair1, 0x5410) ^ 0x80808080u};
}

__device__ __forceinline__ float join_digits(int high, int low) {
  return static_cast<float>(high * 256 + low);
}
__device__ __forceinline__ float join_digits(float high, float low) { return high + low; }

// fp16 pairs of the values and of what rounding leaves.
__device__ __forceinline__ uint2 split_halves(float a, float b) {
  const uint32_t high = pack_fp16(a, b);
  return uint2{high, pack_fp16(a - low_to_float(high), b - high_to_float(high))};
}

}  // namespace

#endif
