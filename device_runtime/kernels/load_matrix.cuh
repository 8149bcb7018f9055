// Fragments out of shared memory, arithmetic on fp16 pairs, and copies that can bring zeros.
#ifndef TURBOJET_LOAD_MATRIX_CUH
#define TURBOJET_LOAD_MATRIX_CUH

#include "common.cuh"

#ifndef TURBOJET_EMULATED
namespace {

// Four 8 x 8 matrices of fp16: lane l gives the address of row l % 8 of matrix l / 8 and receives
// in r[j] columns 2 (l % 4) and + 1 of row l / 4 of matrix j. PTX ISA "ldmatrix".
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
#if TURBOJET_PLAIN
  const int lane = threadIdx.x % kWarpSize;
  const uint64_t address = reinterpret_cast<uint64_t>(row);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint64_t other = __shfl_sync(kFullMask, address, 8 * j + lane / 4);
    r[j] = reinterpret_cast<const uint32_t*>(other)[lane % 4];
  }
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// The same for two matrices, whose rows lanes 0-15 give.
__device__ __forceinline__ void load_two_matrices(uint32_t (&r)[2], const void* row) {
#if TURBOJET_PLAIN
  const int lane = threadIdx.x % kWarpSize;
  const uint64_t address = reinterpret_cast<uint64_t>(row);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint64_t other = __shfl_sync(kFullMask, address, 8 * j + lane / 4);
    r[j] = reinterpret_cast<const uint32_t*>(other)[lane % 4];
  }
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// The same as load_matrices, but receives rows 2 (l % 4) and + 1 of column l / 4.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
#if TURBOJET_PLAIN
  const int lane = threadIdx.x % kWarpSize;
  const uint64_t address = reinterpret_cast<uint64_t>(row);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint64_t even = __shfl_sync(kFullMask, address, 8 * j + lane % 4 * 2);
    const uint64_t odd = __shfl_sync(kFullMask, address, 8 * j + lane % 4 * 2 + 1);
    r[j] = reinterpret_cast<const uint16_t*>(even)[lane / 4] |
           static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(odd)[lane / 4]) << 16;
  }
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// a - b and a * b of two fp16 each, subnormal results are 0: PTX ISA "sub", "mul" for f16x2.
__device__ __forceinline__ uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("sub.rn.ftz.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("mul.rn.ftz.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// (word & mask) | bits in one instruction, which the compiler does not make of two constants by
// itself: PTX ISA "lop3".
template <uint32_t kMask, uint32_t kBits>
__device__ __forceinline__ uint32_t mask_and_set(uint32_t word) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(word), "n"(kMask), "n"(kBits));
  return result;
}

// copy16_async, or 16 bytes of zeros; `global` must be a valid address either way.
__device__ __forceinline__ void copy16_or_zeros_async(void* shared, const void* global,
                                                      bool has_data) {
#if TURBOJET_PLAIN
  *static_cast<uint4*>(shared) =
      has_data ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(has_data ? 16 : 0)
               : "memory");
#endif
}

// What another block has written, from L2: PTX ISA "ld", .cg.
__device__ __forceinline__ float4 load_quad_shared_by_blocks(const float4* pointer) {
  float4 value;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "l"(pointer)
               : "memory");
  return value;
}

}  // namespace
#endif

#endif
