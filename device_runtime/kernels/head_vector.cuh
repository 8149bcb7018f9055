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
    if (num_ranks == 1) return (part == 0 ? 0 : num_heads + (part - 1) * num_kv_heads) + head;
    const int rank_heads = num_heads / num_ranks;
    const int rank_kv_heads = num_kv_heads / num_ranks;
    const int of_rank = part == 0 ? rank_heads : rank_kv_heads;
    const int rank = head / of_rank;
    const int before = part == 0 ? 0 : rank_heads + (part - 1) * rank_kv_heads;
    return rank * (rank_heads + 2 * rank_kv_heads) + before + head % of_rank;
  }
};

__device__ __forceinline__ void widen_four(float (&values)[4], uint2 words) {
  values[0] = low_to_float(words.x);
  values[1] = high_to_float(words.x);
  values[2] = low_to_float(words.y);
  values[3] = high_to_float(words.y);
}

// Loads four dimensions; lanes beyond the head repeat those of an active lane.
template <int kHeadDim>
__device__ __forceinline__ void load_head(float (&values)[4], const fp16* head, int lane) {
  widen_four(values, *reinterpret_cast<const uint2*>(head + lane % (kHeadDim / 4) * 4));
}

// A query or key as it was projected, and what it becomes one with; all loads start at once.
template <int kHeadDim>
struct RawHead {
  uint2 values;
  uint2 weights;
  float4 turn;
  bool has_norm;

  // weight [head_dim] or null; rotation [head_dim / 2] (cos, sin) of the token.
  __device__ __forceinline__ void load(const fp16* head, const fp16* weight,
                                       const float2* rotation, int lane) {
    const int quad = lane % (kHeadDim / 4);
    values = reinterpret_cast<const uint2*>(head)[quad];
    turn = reinterpret_cast<const float4*>(rotation)[quad];
    has_norm = weight != nullptr;
    if (has_norm) weights = reinterpret_cast<const uint2*>(weight)[quad];
  }

  // x / sqrt(mean(x^2) + eps) * weight, then adjacent pairs turned.
  __device__ __forceinline__ void finish(float (&out)[4], float eps) const {
    widen_four(out, values);
    if (has_norm) {
      const float squares =
          out[0] * out[0] + out[1] * out[1] + out[2] * out[2] + out[3] * out[3];
      // Lanes that repeat others do not count twice.
      const float factor = rsqrtf(
          lanes_sum<kHeadDim / 4>(squares) / static_cast<float>(kHeadDim) + eps);
      float scales[4];
      widen_four(scales, weights);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[i] *= factor * scales[i];
    }
    const float a = out[0] * turn.x - out[1] * turn.y;
    const float b = out[0] * turn.y + out[1] * turn.x;
    const float c = out[2] * turn.z - out[3] * turn.w;
    const float d = out[2] * turn.w + out[3] * turn.z;
    out[0] = a;
    out[1] = b;
    out[2] = c;
    out[3] = d;
  }
};

}  // namespace

#endif
