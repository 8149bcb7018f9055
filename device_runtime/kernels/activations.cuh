// From fp32 values to the 16-bit fixed point of w4a16.cuh.
#ifndef TURBOJET_ACTIVATIONS_CUH
#define TURBOJET_ACTIVATIONS_CUH

#include "w4a16.cuh"

namespace {

// Inputs of a stretch that a lane holds, in the order of the bytes of its word: lane = (tile j of
// the stretch, half k16, t), inputs 32 j + 16 k16 + {2t, 2t + 8, 2t + 1, 2t + 9}.
__device__ __forceinline__ int first_input(int lane) {
  return lane / 8 * 32 + lane / 4 % 2 * 16 + lane % 4 * 2;
}

struct FixedPoint {
  uint32_t high;    // four high digits, int8
  uint32_t low;     // four low digits, int8
  float scale;      // the same on every lane
  int negated_sum;  // -sum over the lane's group, the same on every lane of the group
};

// Quantizes one stretch, four values a lane. NaN and infinity make the scale NaN or infinite, so
// that they reach the result.
template <int kGroupSize>
__device__ __forceinline__ FixedPoint to_fixed_point(const float (&values)[4]) {
  const float largest = max_or_nan(max_or_nan(fabsf(values[0]), fabsf(values[1])),
                                   max_or_nan(fabsf(values[2]), fabsf(values[3])));
  // Magnitudes compare as integers do, NaN above all.
  const float peak = __uint_as_float(warp_max(__float_as_uint(largest)));
  const bool is_zero = peak < 1e-30f;
  const float inverse = is_zero ? 0.0f : __fdividef(kFixedPointMax, peak);
  FixedPoint result;
  result.scale = is_zero ? 0.0f : peak * (1.0f / kFixedPointMax);
  // Added to 1.5 * 2^23 a value is rounded to an integer in the low bits. The 128 on top carries
  // one into the high digit where the low digit, -128..127, is to be negative.
  constexpr float kRounder = 12582912.0f + 128.0f;
  constexpr uint32_t kRounderBits = 0x4b400080u;
  uint32_t digits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) digits[i] = __float_as_uint(__fmaf_rn(values[i], inverse, kRounder));
  const uint32_t pair0 = __byte_perm(digits[0], digits[1], 0x5140);  // low 0, low 1, high 0, high 1
  const uint32_t pair1 = __byte_perm(digits[2], digits[3], 0x5140);
  result.low = __byte_perm(pair0, pair1, 0x5410) ^ 0x80808080u;
  result.high = __byte_perm(pair0, pair1, 0x7632);
  const uint32_t sum = digits[0] + digits[1] + digits[2] + digits[3];
  constexpr int kLanes = kGroupSize / 4;
  const uint32_t group_sum = kLanes == kWarpSize ? warp_sum(sum) : lanes_sum<kLanes>(sum);
  result.negated_sum = static_cast<int>(kGroupSize * kRounderBits - group_sum);
  return result;
}

}  // namespace

#endif
