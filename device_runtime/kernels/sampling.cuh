// What choosing a token has in common: logits with the repetition penalty, and the end of a step.
#ifndef TURBOJET_SAMPLING_CUH
#define TURBOJET_SAMPLING_CUH

#include "fragments.cuh"

namespace {

constexpr int kStopIds = 8;  // of a row; unused ones are negative

// How a row's token is drawn; one 32-byte record a row, twin sampling_row.py.
struct SamplingRow {
  float temperature;  // 0: greedy
  int32_t top_k;      // 0: off
  float top_p;        // 1: off
  float floor;        // max(-19.5, log(min_p)): lowest scaled logit that can be drawn
  float penalty;      // 1: off
  uint32_t seed_low;
  uint32_t seed_high;
  int32_t unused;
};
static_assert(sizeof(SamplingRow) == 32, "as sampling_row.py has it");

// The device's copy of where each sequence stands. seen: a bit for each token of the sequence.
struct StepState {
  int32_t* tokens;                // [rows] to be fed next
  int32_t* positions;             // [rows] of that token; negative: the row is idle
  uint32_t* seen;                 // [rows][seen_words]
  uint64_t* ring;                 // [rows][ring_size] position << 32 | token, read by the host
  const int32_t* stop_ids;        // [rows][kStopIds]
  const int32_t* last_positions;  // [rows] position of the last token to be chosen
  int32_t seen_words;
  int32_t ring_size;
};

// Records the token that follows a row's position; a row that is done becomes idle, so that steps
// already enqueued do nothing. A negative token says that the logits were not finite.
__device__ __forceinline__ void finish_row(const StepState& state, int row, int token) {
  const int position = state.positions[row] + 1;
  bool is_done = token < 0 || position >= state.last_positions[row];
#pragma unroll
  for (int i = 0; i < kStopIds; ++i) is_done |= token == state.stop_ids[row * kStopIds + i];
  if (token >= 0) {
    state.tokens[row] = token;
    uint32_t* const word = state.seen + static_cast<int64_t>(row) * state.seen_words + token / 32;
    *word |= 1u << (token % 32);
  }
  state.positions[row] = is_done ? -1 : position;
  state.ring[static_cast<int64_t>(row) * state.ring_size + position % state.ring_size] =
      static_cast<uint64_t>(static_cast<uint32_t>(position)) << 32 | static_cast<uint32_t>(token);
}

__device__ __forceinline__ void load4(float (&out)[4], const float* values) {
  const float4 loaded = *reinterpret_cast<const float4*>(values);
  out[0] = loaded.x;
  out[1] = loaded.y;
  out[2] = loaded.z;
  out[3] = loaded.w;
}

__device__ __forceinline__ void load4(float (&out)[4], const fp16* values) {
  const uint2 loaded = *reinterpret_cast<const uint2*>(values);
  out[0] = low_to_float(loaded.x);
  out[1] = high_to_float(loaded.x);
  out[2] = low_to_float(loaded.y);
  out[3] = high_to_float(loaded.y);
}

// A row's logits; those of tokens that were seen are divided (above 0) or multiplied by the penalty.
template <typename T>
struct Logits {
  const T* values;
  const uint32_t* seen;
  float penalty;

  // Four from a multiple of 4; the row is padded to one.
  __device__ __forceinline__ void load(float (&out)[4], int first) const {
    load4(out, values + first);
    if (penalty == 1.0f) return;
    const uint32_t bits = seen[first / 32] >> (first % 32);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (bits >> i & 1)
        out[i] = out[i] > 0.0f ? __fdiv_rn(out[i], penalty) : __fmul_rn(out[i], penalty);
  }
};

// Larger values have larger words, NaN the largest.
__device__ __forceinline__ uint32_t to_ordered(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0xffffffffu;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered(uint32_t word) {
  return __uint_as_float(word >> 31 ? word & 0x7fffffffu : ~word);
}

// The larger value wins, then the lower index.
__device__ __forceinline__ uint64_t to_candidate(float value, int index) {
  return static_cast<uint64_t>(to_ordered(value)) << 32 | ~static_cast<uint32_t>(index);
}

__device__ __forceinline__ int index_of(uint64_t candidate) {
  return static_cast<int>(~static_cast<uint32_t>(candidate));
}

// Largest over the block; thread 0 has it. shared holds one entry a warp.
template <int kThreads>
__device__ __forceinline__ uint64_t block_max(uint64_t value, uint64_t* shared) {
  value = lanes_max<kWarpSize>(value);
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    value = threadIdx.x < kThreads / kWarpSize ? shared[threadIdx.x] : 0;
    value = lanes_max<kWarpSize>(value);
  }
  return value;
}

}  // namespace

#endif
