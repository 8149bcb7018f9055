// Products of small matrices held in the registers of a warp, with plain counterparts for sm_72,
// and the few other instructions that attention and sampling need. PTX ISA sections in the names.
#ifndef TURBOJET_FRAGMENTS_CUH
#define TURBOJET_FRAGMENTS_CUH

#include "common.cuh"

#ifndef TURBOJET_EMULATED
namespace {

#if !TURBOJET_PLAIN
// d += a * b for fp16 [16, 16] and [16, 8]: PTX ISA "Matrix Fragments for mma.m16n8k16".
__device__ __forceinline__ void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                        uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

// 2^x, a denormal result is 0: PTX ISA "ex2".
__device__ __forceinline__ float exp2_fast(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// log2(x), a denormal counts as 0: PTX ISA "lg2".
__device__ __forceinline__ float log2_fast(float value) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

// Adds one; what the block wrote before is seen by whoever adds later. PTX ISA "atom".
__device__ __forceinline__ uint32_t take_ticket(uint32_t* counter) {
  uint32_t result;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
               : "=r"(result)
               : "l"(counter)
               : "memory");
  return result;
}

// Words that another block may be writing; each by itself is old or new. PTX ISA "ld", .relaxed.
__device__ __forceinline__ float4 load_of_other_block(const float4* pointer) {
  float4 value;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(pointer)
               : "memory");
  return value;
}

// The other side: PTX ISA "st", .relaxed.
__device__ __forceinline__ void store_for_other_block(float4* pointer, float4 value) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(pointer), "f"(value.x),
               "f"(value.y), "f"(value.z), "f"(value.w)
               : "memory");
}

}  // namespace
#endif

namespace {

// A fragments of one 16-row tile, 32 bytes a row: word 0 row r, 1 row r + 8, 2 and 3 the same
// rows' second halves; lane = 4 r + t holds bytes 4t..4t+3 of a half. B likewise with columns.

#if TURBOJET_PLAIN
__device__ __forceinline__ float dot2_f16(uint32_t a, uint32_t b, float d) {
  d = fmaf(low_to_float(a), low_to_float(b), d);
  return fmaf(high_to_float(a), high_to_float(b), d);
}

__device__ __forceinline__ int dot_words(uint32_t a, uint32_t b, int d) {
  return dot4_u8_s8(a, b, d);
}
__device__ __forceinline__ float dot_words(uint32_t a, uint32_t b, float d) {
  return dot2_f16(a, b, d);
}

template <typename T>
struct Quad {
  T values[4];
};

// A call: inlined it would be most of the code, and of the time to compile it. A loop: unrolled it
// takes registers that its callers need.
template <typename T>
__device__ __noinline__ Quad<T> plain_product(Quad<T> d, uint4 a, uint2 b) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll 1
  for (int source = 0; source < 4; ++source) {
    const int row_lane = (lane & ~3) | source;
    const uint32_t x0 = __shfl_sync(kFullMask, a.x, row_lane);
    const uint32_t x1 = __shfl_sync(kFullMask, a.y, row_lane);
    const uint32_t x2 = __shfl_sync(kFullMask, a.z, row_lane);
    const uint32_t x3 = __shfl_sync(kFullMask, a.w, row_lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column_lane = 4 * (lane % 4 * 2 + i) + source;
      const uint32_t y0 = __shfl_sync(kFullMask, b.x, column_lane);
      const uint32_t y1 = __shfl_sync(kFullMask, b.y, column_lane);
      d.values[i] = dot_words(x0, y0, dot_words(x2, y1, d.values[i]));
      d.values[2 + i] = dot_words(x1, y0, dot_words(x3, y1, d.values[2 + i]));
    }
  }
  return d;
}

template <typename T>
__device__ __forceinline__ void multiply_plain(T (&d)[4], uint4 a, uint2 b) {
  const Quad<T> result = plain_product(Quad<T>{{d[0], d[1], d[2], d[3]}}, a, b);
#pragma unroll
  for (int i = 0; i < 4; ++i) d[i] = result.values[i];
}
#endif

// d[16 x 8] += a[16 x 32] b[32 x 8] for bytes; d of a lane: rows r and r + 8, columns 2t, 2t + 1.
__device__ __forceinline__ void multiply(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
#if !TURBOJET_PLAIN
  mma_u8_s8(d, a0, a1, a2, a3, b0, b1);
#else
  multiply_plain(d, uint4{a0, a1, a2, a3}, uint2{b0, b1});
#endif
}

// The same for fp16, d[16 x 8] += a[16 x 16] b[16 x 8].
__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
#if !TURBOJET_PLAIN
  mma_f16(d, a0, a1, a2, a3, b0, b1);
#else
  multiply_plain(d, uint4{a0, a1, a2, a3}, uint2{b0, b1});
#endif
}

}  // namespace

#endif
