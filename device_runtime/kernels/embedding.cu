// The start of a step: each token's embedding, the angles of its position, its query scale.
//
//   embed_f16, embed_bf16
//   residual[i] = table[tokens[i]];  rotation[i, p] = (cos, sin)(positions[i] * frequency p)
//   query_scale[i] = scale, times log(n) * log_n_factor for the n-th token of a sequence, n > trained
//
//   residual fp32 [num_tokens][hidden_size]; rotation (cos, sin) fp32 [num_tokens][num_pairs];
//   query_scale fp32 [num_tokens]; table fp16 or bf16 [vocab_size][hidden_size]; tokens, positions
//   int32 [num_tokens], a negative position makes the row 0; row_ids int32 [num_tokens], the row of
//   `turns` of each token, or null: its own number; turns uint64 [rows][num_pairs], what a pair
//   turns by per position in 2^-64 of a full turn, so that any position is exact.
// Launch: grid (any, num_tokens), block kThreads. hidden_size % 4 == 0; log_n_factor 0: none.
// Bound by DRAM: 6 * hidden_size bytes a token.
// Checked against reference/embedding.py: residual equal, rotation within 3e-7.

#include "common.cuh"

namespace {

constexpr int kThreads = 256;

struct Fp16Row {
  static __device__ __forceinline__ float4 widen(uint2 words) {
    return float4{low_to_float(words.x), high_to_float(words.x), low_to_float(words.y),
                  high_to_float(words.y)};
  }
};

struct Bf16Row {
  static __device__ __forceinline__ float4 widen(uint2 words) {
    return float4{__uint_as_float(words.x << 16), __uint_as_float(words.x & 0xffff0000u),
                  __uint_as_float(words.y << 16), __uint_as_float(words.y & 0xffff0000u)};
  }
};

template <typename Row>
__device__ __forceinline__ void run(float* residual, float2* rotation, float* query_scale,
                                    const uint16_t* table, const int32_t* tokens,
                                    const int32_t* positions, const int32_t* row_ids,
                                    const uint64_t* turns, int hidden_size, int num_pairs,
                                    int trained, float scale, float log_n_factor) {
  let_dependents_launch();
  wait_for_inputs();
  const int64_t token = blockIdx.y;
  const int position = positions[token];
  const uint2* const source =
      reinterpret_cast<const uint2*>(table + static_cast<int64_t>(tokens[token]) * hidden_size);
  float4* const target = reinterpret_cast<float4*>(residual + token * hidden_size);
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < hidden_size / 4; i += gridDim.x * kThreads)
    target[i] = position < 0 ? float4{0.0f, 0.0f, 0.0f, 0.0f} : Row::widen(source[i]);
  if (blockIdx.x != 0) return;
  const int64_t row = row_ids == nullptr ? token : row_ids[token];
  for (int i = threadIdx.x; i < num_pairs; i += kThreads) {
    const uint64_t turned =
        turns[row * num_pairs + i] * static_cast<uint64_t>(larger(position, 0));
    // Half turns, -1 to 1: whole turns have run out of the 64 bits.
    const float half_turns =
        static_cast<float>(static_cast<int32_t>(turned >> 32)) * (1.0f / 2147483648.0f);
    rotation[token * num_pairs + i] = float2{cospif(half_turns), sinpif(half_turns)};
  }
  if (threadIdx.x == 0)
    query_scale[token] = log_n_factor > 0.0f && position >= trained
                             ? scale * log_n_factor * logf(static_cast<float>(position + 1))
                             : scale;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    embed_f16(float* residual, float2* rotation, float* query_scale, const uint16_t* table,
              const int32_t* tokens, const int32_t* positions, const int32_t* row_ids,
              const uint64_t* turns, int32_t hidden_size, int32_t num_pairs, int32_t trained,
              float scale, float log_n_factor) {
  run<Fp16Row>(residual, rotation, query_scale, table, tokens, positions, row_ids, turns,
               hidden_size, num_pairs, trained, scale, log_n_factor);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    embed_bf16(float* residual, float2* rotation, float* query_scale, const uint16_t* table,
               const int32_t* tokens, const int32_t* positions, const int32_t* row_ids,
               const uint64_t* turns, int32_t hidden_size, int32_t num_pairs, int32_t trained,
               float scale, float log_n_factor) {
  run<Bf16Row>(residual, rotation, query_scale, table, tokens, positions, row_ids, turns,
               hidden_size, num_pairs, trained, scale, log_n_factor);
}
