// How the blocks that share a head in decode_attention.cu add up what each has found.
#ifndef TURBOJET_DECODE_SHARE_CUH
#define TURBOJET_DECODE_SHARE_CUH

#include "fragments.cuh"

#ifndef TURBOJET_EMULATED
namespace {

// As for four numbers (fragments.cuh): PTX ISA "ld", "st", .relaxed.
__device__ __forceinline__ float2 load_of_other_block(const float2* pointer) {
  float2 value;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0,%1}, [%2];"
               : "=f"(value.x), "=f"(value.y)
               : "l"(pointer)
               : "memory");
  return value;
}

__device__ __forceinline__ void store_for_other_block(float2* pointer, float2 value) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1,%2};" ::"l"(pointer), "f"(value.x),
               "f"(value.y)
               : "memory");
}

}  // namespace
#endif

namespace {

constexpr int kTogether = 4;  // shares whose loads are in flight at once
constexpr float kNothing = -1e30f;  // below every score; unlike -inf its differences are numbers

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
// of four floats each; the third number of the first such four counts blocks. All is 0 before and
// after a launch, and nothing but -0 or another number is written meanwhile: each word tells by
// itself whether it is there, in whatever order they arrive. So relaxed accesses are enough, which
// are single ones of 4 bytes each (PTX ISA, "Vector Data-types" of the memory consistency model);
// plain ones would be a data race. From one launch to the next it is the kernel's end that orders.
template <int kQuads>
class SharePlaces {
  // Places are cleared when one warp has found all of them: no other may still look for them.
  static_assert(kWarpSize % kQuads == 0, "a query's dimensions are of one warp");

 public:
  // first: the head's first place.
  __device__ __forceinline__ SharePlaces(float* partials, int64_t first, int num_queries, int query,
                                         int quad)
      : stride_(num_queries * (kQuads + 1)),
        quad_(quad),
        place_(reinterpret_cast<float4*>(partials) + first * stride_ + query * (kQuads + 1)) {}

  // How many of the head's `count` blocks were here before; the last one puts the counter back to 0.
  static __device__ __forceinline__ int take_turn(float* partials, int64_t first, int num_queries,
                                                  int count) {
    float4* const place =
        reinterpret_cast<float4*>(partials) + first * (num_queries * (kQuads + 1)) + kQuads;
    return static_cast<int>(
        atomicInc(reinterpret_cast<unsigned*>(&place->z), static_cast<unsigned>(count - 1)));
  }

  __device__ __forceinline__ void give(const Share& share, int split) const {
    float4* const place = place_ + split * stride_;
    store_for_other_block(place + quad_,
                          float4{never_zero(share.sums.x), never_zero(share.sums.y),
                                 never_zero(share.sums.z), never_zero(share.sums.w)});
    if (quad_ == 0)
      store_for_other_block(statistics_of(place),
                            float2{never_zero(share.top), never_zero(share.total)});
  }

  // The sum of the shares of `count` splits in their order, whoever adds them; `own` is that of
  // `own_split`. Waits for the others. It cannot wait for ever, whatever order blocks start in and
  // however few fit the device: the caller had the last turn, so the others have begun, and once
  // begun they wait for nobody.
  __device__ __forceinline__ Share take(const Share& own, int own_split, int count) const {
    Share share = {};
    share.top = kNothing;
#pragma unroll 1
    for (int start = 0; start < count; start += kTogether) {
      float4 sums[kTogether];
      float2 statistics[kTogether];
      while (!load(sums, statistics, own, own_split, start, count)) {
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
        if (start + i == own_split) continue;
        float4* const place = place_ + (start + i) * stride_;
        store_for_other_block(place + quad_, float4{});
        if (quad_ == 0) store_for_other_block(statistics_of(place), float2{});
      }
    }
    return share;
  }

 private:
  static __device__ __forceinline__ float2* statistics_of(float4* place) {
    return reinterpret_cast<float2*>(place + kQuads);
  }

  // Whether the whole warp has found all that it looked for.
  __device__ __forceinline__ bool load(float4 (&sums)[kTogether], float2 (&statistics)[kTogether],
                                       const Share& own, int own_split, int start,
                                       int count) const {
    bool is_whole = true;
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      sums[i] = own.sums;
      statistics[i] = float2{own.top, own.total};
      if (start + i >= count || start + i == own_split) continue;
      float4* const place = place_ + (start + i) * stride_;
      sums[i] = load_of_other_block(place + quad_);
      statistics[i] = load_of_other_block(statistics_of(place));
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (start + i < count && start + i != own_split)
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
