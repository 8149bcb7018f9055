// Products of signed bytes held in the registers of a warp, with a plain counterpart for sm_72.
#ifndef TURBOJET_SIGNED_PRODUCTS_CUH
#define TURBOJET_SIGNED_PRODUCTS_CUH

#include "common.cuh"

#ifndef TURBOJET_EMULATED
namespace {

#if !TURBOJET_PLAIN
// d += a * b for s8 [16, 32] and s8 [32, 8]: PTX ISA "Matrix Fragments for mma.m16n8k32".
__device__ __forceinline__ void mma_s8_s8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                          uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#else
// d + sum of four s8 * s8 products: PTX ISA "dp4a".
__device__ __forceinline__ int dot4_s8_s8(uint32_t a, uint32_t b, int d) {
  int result;
  asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(d));
  return result;
}
#endif

}  // namespace
#endif

namespace {

// d[16 x 8] += a[16 x 32] b[32 x 8] for signed bytes, in the order of fragments.cuh.
__device__ __forceinline__ void multiply_signed(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                                uint32_t a3, uint32_t b0, uint32_t b1) {
#if !TURBOJET_PLAIN
  mma_s8_s8(d, a0, a1, a2, a3, b0, b1);
#else
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int source = 0; source < 4; ++source) {
    const int row_lane = (lane & ~3) | source;
    const uint32_t x0 = __shfl_sync(kFullMask, a0, row_lane);
    const uint32_t x1 = __shfl_sync(kFullMask, a1, row_lane);
    const uint32_t x2 = __shfl_sync(kFullMask, a2, row_lane);
    const uint32_t x3 = __shfl_sync(kFullMask, a3, row_lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column_lane = 4 * (lane % 4 * 2 + i) + source;
      const uint32_t y0 = __shfl_sync(kFullMask, b0, column_lane);
      const uint32_t y1 = __shfl_sync(kFullMask, b1, column_lane);
      d[i] = dot4_s8_s8(x0, y0, dot4_s8_s8(x2, y1, d[i]));
      d[2 + i] = dot4_s8_s8(x1, y0, dot4_s8_s8(x3, y1, d[2 + i]));
    }
  }
#endif
}

}  // namespace

#endif
