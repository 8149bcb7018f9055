// Scalar types, half pairs and warp reductions that every kernel shares.
//
// The kernels are compiled by NVRTC on machines without a CUDA toolkit, so nothing of it is
// included: fp16 is a 16-bit storage type here. Two build variants exist:
//   TURBOJET_PLAIN = 0  sm_80 and newer: cp.async, mma.m16n8k16, mma.m16n8k32
//   TURBOJET_PLAIN = 1  sm_72: the same results from plain loads and dp4a; also builds for newer
//                       SMs so that it can be tested without a Xavier
// Everything that is PTX sits in ptx.cuh; an emulator can put its own functions in that place.
#ifndef TURBOJET_COMMON_CUH
#define TURBOJET_COMMON_CUH

#ifdef __CUDACC_RTC__
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <stdint.h>
#endif

#ifndef TURBOJET_PLAIN
#define TURBOJET_PLAIN 0
#endif

struct fp16 {
  uint16_t bits;
};
static_assert(sizeof(fp16) == 2, "fp16 is the IEEE binary16 storage format");

#include "ptx.cuh"

namespace {

constexpr int kWarpSize = 32;
constexpr uint32_t kFullMask = 0xffffffffu;

// Lower and upper half of a packed pair.
__device__ __forceinline__ float low_to_float(uint32_t pair) {
  return to_float(fp16{static_cast<uint16_t>(pair & 0xffffu)});
}

__device__ __forceinline__ float high_to_float(uint32_t pair) {
  return to_float(fp16{static_cast<uint16_t>(pair >> 16)});
}

__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  return static_cast<uint32_t>(to_fp16(low).bits) |
         (static_cast<uint32_t>(to_fp16(high).bits) << 16);
}

// Sums within aligned runs of kLanes lanes; every lane gets the sum.
template <int kLanes, typename T>
__device__ __forceinline__ T lanes_sum(T value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

template <int kLanes, typename T>
__device__ __forceinline__ T lanes_max(T value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kFullMask, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// The same over a whole warp, in one instruction where there is one.
__device__ __forceinline__ uint32_t warp_max(uint32_t value) {
#if TURBOJET_PLAIN
  return lanes_max<kWarpSize>(value);
#else
  return __reduce_max_sync(kFullMask, value);
#endif
}

__device__ __forceinline__ uint32_t warp_sum(uint32_t value) {
#if TURBOJET_PLAIN
  return lanes_sum<kWarpSize>(value);
#else
  return __reduce_add_sync(kFullMask, value);
#endif
}

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int larger(int a, int b) { return a > b ? a : b; }

template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
  return reinterpret_cast<T*>(dynamic_shared_bytes());
}

}  // namespace

#endif
