// How the blocks that share a head in decode_attention.cu add up what each has found.
#ifndef TURBOJET_DECODE_SHARE_CUH
#define TURBOJET_DECODE_SHARE_CUH

#include "fragments.cuh"

namespace {

constexpr int kTogether = 4;  // shares whose loads are in flight at once

// Four dimensions of a query's weighted sum of values, the sum of the weights, and the log2 of what
// both are multiples of.
struct Share {
  float4 sums;
  float top;
  float total;

  // weight: 2^(top of the other - own top).
  __device__ __forceinline__ void add(float4 other, float other_total, float weight) {
    sums.x = fmaf(weight, other.x, sums.x);
    sums.y = fmaf(weight, other.y, sums.y);
    sums.z = fmaf(weight, other.z, sums.z);
    sums.w = fmaf(weight, other.w, sums.w);
    total = fmaf(weight, other_total, total);
  }

  __device__ __forceinline__ void raise_top(float new_top) {
    const float keep = exp2_fast(top - new_top);
    sums = float4{sums.x * keep, sums.y * keep, sums.z * keep, sums.w * keep};
    total *= keep;
    top = new_top;
  }
};

// Where the blocks of a head leave their shares: [splits][queries][kQuads sums, (top, total, -, -)]
// of four floats each. All is 0 before and after a launch, and nothing but -0 or another number is
// written meanwhile: each word tells by itself whether it is there, in whatever order they arrive.
template <int kQuads>
class SharePlaces {
 public:
  __device__ __forceinline__ SharePlaces(float* partials, int64_t first, int num_queries, int query,
                                         int quad)
      : stride_(num_queries * (kQuads + 1)),
        quad_(quad),
        place_(reinterpret_cast<float4*>(partials) + first * stride_ + query * (kQuads + 1)) {}

  __device__ __forceinline__ void give(const Share& share, int split) const {
    float4* const place = place_ + split * stride_;
    store_for_other_block(place + quad_,
                          float4{never_zero(share.sums.x), never_zero(share.sums.y),
                                 never_zero(share.sums.z), never_zero(share.sums.w)});
    if (quad_ == 0)
      store_for_other_block(place + kQuads,
                            float4{never_zero(share.top), never_zero(share.total), 0.0f, 0.0f});
  }

  // Waits for the shares of splits 0 to count - 1 and adds them in that order. Their blocks wait for
  // nobody and have been started: their indices in the grid are lower, and blocks start in order.
  __device__ __forceinline__ void take(Share& share, int count) const {
#pragma unroll 1
    for (int start = 0; start < count; start += kTogether) {
      float4 sums[kTogether], statistics[kTogether];
      while (!load(sums, statistics, start, count)) {
      }
      float top = share.top;
#pragma unroll
      for (int i = 0; i < kTogether; ++i)
        if (start + i < count) top = fmaxf(top, statistics[i].x);
      share.raise_top(top);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (start + i >= count) continue;
        share.add(sums[i], statistics[i].y, exp2_fast(statistics[i].x - top));
        float4* const place = place_ + (start + i) * stride_;
        store_for_other_block(place + quad_, float4{});
        if (quad_ == 0) store_for_other_block(place + kQuads, float4{});
      }
    }
  }

 private:
  // Whether the whole warp has found all that it looked for.
  __device__ __forceinline__ bool load(float4 (&sums)[kTogether], float4 (&statistics)[kTogether],
                                       int start, int count) const {
    bool is_whole = true;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (start + i >= count) continue;
      const float4* const place = place_ + (start + i) * stride_;
      sums[i] = load_of_other_block(place + quad_);
      statistics[i] = load_of_other_block(place + kQuads);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (start + i < count)
        is_whole = is_whole && is_there(sums[i].x) && is_there(sums[i].y) && is_there(sums[i].z) &&
                   is_there(sums[i].w) && is_there(statistics[i].x) && is_there(statistics[i].y);
    return __all_sync(kFullMask, is_whole);
  }

  static __device__ __forceinline__ float never_zero(float value) {
    return value == 0.0f ? -0.0f : value;
  }
  static __device__ __forceinline__ bool is_there(float value) {
    return __float_as_uint(value) != 0;
  }

  const int stride_;
  const int quad_;
  float4* const place_;
};

}  // namespace

#endif
