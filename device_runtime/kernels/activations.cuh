// From fp32 values to the 16-bit fixed point of w4a16.cuh.
#ifndef TURBOJET_ACTIVATIONS_CUH
#define TURBOJET_ACTIVATIONS_CUH

#include "w4a16.cuh"

namespace {

// Inputs of a unit that a lane holds, in the order of the bytes of its word: lane = (tile j of the
// unit, half k16, t), inputs 32 j + 16 k16 + {2t, 2t + 8, 2t + 1, 2t + 9}.
__device__ __forceinline__ int first_input(int lane) {
  return lane / 8 * 32 + lane / 4 % 2 * 16 + lane % 4 * 2;
}

struct FixedPoint {
  uint32_t high;      // four high digits, int8
  uint32_t low;       // four low digits, int8
  float scale;        // the same on every lane
  int negated_sum;    // -sum over the lane's group, the same on every lane of the group
};

// Quantizes one unit, four values a lane. NaN and infinity make the scale NaN or infinite, so that
// they reach the result.
template <int kGroupSize>
__device__ __forceinline__ FixedPoint to_fixed_point(const float (&values)[4]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t magnitude = __float_as_uint(values[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
#if TURBOJET_PLAIN
  largest = lanes_max<kWarpSize>(largest);
#else
  largest = __reduce_max_sync(kFullMask, largest);
#endif
  const float peak = __uint_as_float(largest);
  const bool is_zero = peak < 1e-30f;
  const float inverse = is_zero ? 0.0f : __fdividef(kFixedPointMax, peak);
  FixedPoint result;
  result.scale = is_zero ? 0.0f : peak * (1.0f / kFixedPointMax);
  uint32_t digits[4];
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int value = __float2int_rn(values[i] * inverse);
    sum += value;
    // Rounding the low digit to -128..127 carries one into the high digit.
    digits[i] = static_cast<uint32_t>(value) + 0x80u;
  }
  const uint32_t pair0 = __byte_perm(digits[0], digits[1], 0x5140);  // low 0, low 1, high 0, high 1
  const uint32_t pair1 = __byte_perm(digits[2], digits[3], 0x5140);
  result.low = __byte_perm(pair0, pair1, 0x5410) ^ 0x80808080u;
  result.high = __byte_perm(pair0, pair1, 0x7632);
  result.negated_sum = -lanes_sum<kGroupSize / 4>(sum);
  return result;
}

}  // namespace

#endif
