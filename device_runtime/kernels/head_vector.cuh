// One head of a token on its way from the qkv projection into attention: norm and rotation.
//
// A warp holds a head as four consecutive dimensions a lane, lanes below head_dim / 4.
#ifndef TURBOJET_HEAD_VECTOR_CUH
#define TURBOJET_HEAD_VECTOR_CUH

#include "common.cuh"

namespace {

// Where the heads of a token lie: [num_ranks][q heads, k heads, v heads of the rank][head_dim].
struct QkvRow {
  const fp16* values;
  int num_heads;
  int num_kv_heads;
  int num_ranks;

  // Index of a query head (part 0), key head (1) or value head (2) among the row's heads.
  __device__ __forceinline__ int head_index(int part, int head) const {
    const int rank_heads = num_heads / num_ranks;
    const int rank_kv_heads = num_kv_heads / num_ranks;
    const int of_rank = part == 0 ? rank_heads : rank_kv_heads;
    const int rank = head / of_rank;
    const int before = part == 0 ? 0 : rank_heads + (part - 1) * rank_kv_heads;
    return rank * (rank_heads + 2 * rank_kv_heads) + before + head % of_rank;
  }
};

// Loads four dimensions; lanes beyond the head repeat those of an active lane.
template <int kHeadDim>
__device__ __forceinline__ void load_head(float (&values)[4], const fp16* head, int lane) {
  const uint2 words = *reinterpret_cast<const uint2*>(head + lane % (kHeadDim / 4) * 4);
  values[0] = low_to_float(words.x);
  values[1] = high_to_float(words.x);
  values[2] = low_to_float(words.y);
  values[3] = high_to_float(words.y);
}

// x / sqrt(mean(x^2) + eps) * weight over the head; weight null leaves it as it is.
template <int kHeadDim>
__device__ __forceinline__ void normalize_head(float (&values)[4], const fp16* weight, float eps,
                                               int lane) {
  if (weight == nullptr) return;
  float squares = values[0] * values[0] + values[1] * values[1] + values[2] * values[2] +
                  values[3] * values[3];
  // Lanes that repeat others do not count twice.
  squares = lanes_sum<kHeadDim / 4>(squares);
  const float factor = rsqrtf(squares / static_cast<float>(kHeadDim) + eps);
  float weights[4];
  load_head<kHeadDim>(weights, weight, lane);
#pragma unroll
  for (int i = 0; i < 4; ++i) values[i] *= factor * weights[i];
}

// Turns adjacent pairs by the token's angles; rotation [head_dim / 2] (cos, sin).
template <int kHeadDim>
__device__ __forceinline__ void rotate_head(float (&values)[4], const float2* rotation,
                                            int lane) {
  const float4 turn =
      *reinterpret_cast<const float4*>(rotation + lane % (kHeadDim / 4) * 2);
  const float a = values[0] * turn.x - values[1] * turn.y;
  const float b = values[0] * turn.y + values[1] * turn.x;
  const float c = values[2] * turn.z - values[3] * turn.w;
  const float d = values[2] * turn.w + values[3] * turn.z;
  values[0] = a;
  values[1] = b;
  values[2] = c;
  values[3] = d;
}

}  // namespace

#endif
