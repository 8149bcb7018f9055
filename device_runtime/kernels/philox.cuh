// Random numbers that depend on a seed, a position and a vocabulary index alone: Philox4x32-10 of
// Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC'11, section 3.3). The
// same numbers as backends/reference/philox.py.
#ifndef TURBOJET_PHILOX_CUH
#define TURBOJET_PHILOX_CUH

#include "common.cuh"

namespace {

constexpr int kPhiloxRounds = 10;
constexpr int kUniformBits = 23;

// Word index % 4 of the counter (index / 4, position, 0, 0).
__device__ __forceinline__ uint32_t philox_word(uint32_t seed_low, uint32_t seed_high,
                                                uint32_t position, uint32_t index) {
  uint32_t c0 = index / 4, c1 = position, c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ seed_low;
    c2 = high0 ^ c3 ^ seed_high;
    c1 = low1;
    c3 = low0;
    seed_low += 0x9E3779B9u;
    seed_high += 0xBB67AE85u;
  }
  const uint32_t low = index % 2 == 0 ? c0 : c1;
  const uint32_t high = index % 2 == 0 ? c2 : c3;
  return index % 4 < 2 ? low : high;
}

// -log(-log(u)), u = (top 23 bits + 1/2) / 2^23 exactly; between -2.82 and 16.64.
__device__ __forceinline__ float gumbel(uint32_t word) {
  const float uniform = (static_cast<float>(word >> (32 - kUniformBits)) + 0.5f) *
                        (1.0f / static_cast<float>(1 << kUniformBits));
  return -logf(-logf(uniform));
}

}  // namespace

#endif
