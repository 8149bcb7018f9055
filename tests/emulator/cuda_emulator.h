// Runs the CUDA kernels of this project on a CPU, so that their indexing, barriers and arithmetic
// are tested where there is no GPU. One cluster of blocks at a time, every thread a fiber; warp,
// block and cluster operations are rendezvous of fibers. Asynchronous copies are done as late as the kernel allows
// (or as early, TURBOJET_EMULATE_EARLY), so that a missing wait shows; blocks run in the order of their
// index, or the last first (emulate_backwards). Shared memory starts as NaN.
// A deadlock, lanes at different warp operations or an out-of-range lane stop the launch with a
// message. It says nothing about speed; what nothing orders is found where TURBOJET_RACE_CHECK is set
// (race_check.cpp).
//
// Included before the kernel source (g++ -include); takes the place of ptx.cuh.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "emulated_fibers.h"

#define __device__
#define __global__
#define __host__
#define __shared__ static __attribute__((section("turbojet_shared")))
#define __constant__ static
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __restrict__
// What tells the race checker of an access, so that the line that it names is the kernel's.
#define EMULATED_INLINE __attribute__((always_inline)) inline
#define TURBOJET_PTX_CUH
#define TURBOJET_EMULATED 1

struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(16) int4 { int32_t x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(8) int2 { int32_t x, y; };
struct alignas(8) float2 { float x, y; };

#define threadIdx (emulator::me().index)
#define blockIdx (emulator::my_block().index)
#define blockDim (emulator::state.block_size)
#define gridDim (emulator::state.grid_size)

enum { kOpShuffle = 1, kOpSync = emulator::kSyncWarp, kOpReduce, kOpVote, kOpMmaInt, kOpMmaHalf, kOpLoadMatrix, kOpBlock };

template <typename T>
T emulated_lane(T value, int lane, int operation = kOpShuffle) {
  static_assert(sizeof(T) <= 8);
  const emulator::Slot* slots = emulator::exchange(&value, sizeof(T), operation);
  if (lane < 0 || lane >= emulator::kLanes) emulator::fail("shuffle from a lane that is not there");
  T result;
  memcpy(&result, slots[lane].words, sizeof(T));
  return result;
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) { return emulated_lane(value, lane & 31); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulated_lane(value, emulator::my_lane() ^ mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int lane = emulator::my_lane() + delta;
  return emulated_lane(value, lane < 32 ? lane : emulator::my_lane());
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = emulator::my_lane() - delta;
  return emulated_lane(value, lane >= 0 ? lane : emulator::my_lane());
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const emulator::Slot* slots = emulator::exchange(&value, 4, kOpReduce);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) {
    unsigned other;
    memcpy(&other, slots[i].words, 4);
    result = other > result ? other : result;
  }
  return result;
}
inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  const emulator::Slot* slots = emulator::exchange(&value, 4, kOpReduce);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) {
    unsigned other;
    memcpy(&other, slots[i].words, 4);
    result += other;
  }
  return result;
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const uint64_t word = value;
  const emulator::Slot* slots = emulator::exchange(&word, 8, kOpVote);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= static_cast<unsigned>(slots[i].words[0] & 1) << i;
  return result;
}
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline bool __all_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) == ~0u; }
inline void __syncwarp(unsigned = ~0u) {
  const int zero = 0;
  emulator::exchange(&zero, 4, kOpSync);
}
inline void emulated_block_barrier(int value) {
  emulator::Block& block = emulator::my_block();
  block.any |= value;
  // Threads that returned no longer count, as on sm_70 and newer.
  if (!emulator::meet(block.meeting, block.num_live, kOpBlock)) return;
  block.any_before = block.any;
  block.any = 0;
  race_sync_block(emulator::state.current / emulator::state.block_size.x);
}
inline void __syncthreads() { emulated_block_barrier(0); }
inline int __syncthreads_or(int value) {
  emulated_block_barrier(value != 0);
  return emulator::my_block().any_before;
}
inline uint32_t __float_as_uint(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
inline float __uint_as_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline int __float2int_rn(float value) { return isnan(value) ? 0 : static_cast<int>(lrintf(value)); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float value) { return expf(value); }
inline float __logf(float value) { return logf(value); }
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline float __fsqrt_rn(float value) { return sqrtf(value); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __saturatef(float value) { return value < 0 ? 0 : value > 1 ? 1 : value; }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clz(int value) { return value ? __builtin_clz(value) : 32; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i)
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
inline int64_t clock64() { static int64_t ticks; return ticks += 1000; }
// Read, change and write at once, without an order of other memory.
template <typename T, typename F>
EMULATED_INLINE T emulated_atomic(T* address, F changed) {
  race_atomic(address, sizeof(T), kReadAndWrite, kRelaxed);
  const RaceMute mute;
  const T old = *address;
  *address = changed(old);
  return old;
}
template <typename T>
EMULATED_INLINE T atomicAdd(T* address, T value) {
  return emulated_atomic(address, [=](T old) { return old + value; });
}
template <typename T>
EMULATED_INLINE T atomicMax(T* address, T value) {
  return emulated_atomic(address, [=](T old) { return value > old ? value : old; });
}
EMULATED_INLINE unsigned atomicInc(unsigned* address, unsigned last) {
  return emulated_atomic(address, [=](unsigned old) { return old >= last ? 0 : old + 1; });
}
template <typename T>
EMULATED_INLINE T atomicOr(T* address, T value) {
  return emulated_atomic(address, [=](T old) { return old | value; });
}
template <typename T>
EMULATED_INLINE T atomicExch(T* address, T value) {
  return emulated_atomic(address, [=](T) { return value; });
}

// --- the functions of ptx.cuh ---------------------------------------------------------------------

struct fp16;

namespace {

// As the compiler's own conversion, which is a call where the CPU may have none for fp16.
inline float emulated_to_float(uint16_t bits) {
  const bool is_finite = (bits & 0x7c00) != 0x7c00;
  const uint32_t word = (bits & 0x7fff) << 13 | (is_finite ? 0 : 0x7f800000);
  const uint32_t sign = (bits & 0x8000) << 16;
  float value;
  memcpy(&value, &word, 4);
  if (is_finite) value *= 0x1p112f;  // exponents of fp16 are biased by 15, those of fp32 by 127
  uint32_t result;
  memcpy(&result, &value, 4);
  result |= sign;
  memcpy(&value, &result, 4);
  return value;
}
uint16_t emulated_to_bits(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
template <typename T>
float to_float(T value) { return emulated_to_float(value.bits); }
struct EmulatedHalf {
  uint16_t bits;
  template <typename T>
  operator T() const { return T{bits}; }
};
EmulatedHalf to_fp16(float value) { return {emulated_to_bits(value)}; }

int thread_index_here() { return threadIdx.x; }

char* dynamic_shared_bytes() { return emulator::my_block().shared; }

EMULATED_INLINE void copy16_async(void* shared, const void* global) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    emulator::fail("a 16-byte copy is not aligned");
#if TURBOJET_PLAIN || defined(TURBOJET_EMULATE_EARLY)
  race_access(global, 16, kRead);
  race_access(shared, 16, kWrite);
  const RaceMute mute;
  memcpy(shared, global, 16);
#else
  race_begin_copy(shared, global, 16);
  emulator::me().open_group.push_back({shared, global, 16});
#endif
}
using CopyTarget = char*;
CopyTarget copy_target(char* shared, int) { return shared; }
uint64_t weights_policy() { return 0; }
EMULATED_INLINE void copy16_weights_async(CopyTarget target, int offset, const void* global, uint64_t) {
  copy16_async(target + offset, global);
}
void commit_copies() {
  emulator::me().groups.push_back(std::move(emulator::me().open_group));
  emulator::me().open_group.clear();
}
template <int kPending>
void wait_copies() {
  auto& groups = emulator::me().groups;
  while (groups.size() > kPending) {
    for (const emulator::Copy& copy : groups.front()) emulator::perform(copy);
    groups.erase(groups.begin());
  }
}
using SplitBarrier = uint64_t;
#if TURBOJET_PLAIN
void start_split_barrier(SplitBarrier*, int) {}
void arrive(SplitBarrier*) {}
void wait_for_all(SplitBarrier*, int) { __syncthreads(); }
#else
struct EmulatedBarrier { uint16_t arrived, num_warps, phase, is_started; };
EMULATED_INLINE void start_split_barrier(SplitBarrier* barrier, int num_warps) {
  race_access(barrier, sizeof *barrier, kWrite);
  const RaceMute mute;
  *reinterpret_cast<EmulatedBarrier*>(barrier) = {0, static_cast<uint16_t>(num_warps), 0, 1};
}
EMULATED_INLINE void arrive(SplitBarrier* barrier) {
  race_atomic(barrier, sizeof *barrier, kReadAndWrite, kAcquireRelease);
  const RaceMute mute;
  auto& state = *reinterpret_cast<EmulatedBarrier*>(barrier);
  if (state.is_started != 1) emulator::fail("arrives at a barrier that was not started");
  emulator::state.idle_yields = 0;
  if (++state.arrived < state.num_warps) return;
  state.arrived = 0;
  ++state.phase;
}
EMULATED_INLINE void wait_for_all(SplitBarrier* barrier, int parity) {
  const auto& state = *reinterpret_cast<const EmulatedBarrier*>(barrier);
  for (;;) {
    {
      const RaceMute mute;
      if (state.phase % 2 != parity) break;
    }
    emulator::yield();
  }
  race_atomic(barrier, sizeof *barrier, kReadAndWrite, kAcquireRelease);
}
#endif
float max_or_nan(float a, float b) { return isnan(a) || a >= b ? a : b; }
void prefetch_line(const void*) {}
EMULATED_INLINE void add_to_memory(float* pointer, float value) { atomicAdd(pointer, value); }

#if TURBOJET_PLAIN || defined(TURBOJET_EMULATE_NO_CLUSTERS)
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif
int cluster_size() { return kHasClusters ? emulator::state.num_blocks : 1; }
int cluster_rank() { return kHasClusters ? blockIdx.x % emulator::state.num_blocks : 0; }
void cluster_arrive() {
  ++emulator::me().cluster_turn;
  ++emulator::state.arrivals;
  emulator::state.idle_yields = 0;
}
void cluster_wait() {
  const unsigned expected = emulator::me().cluster_turn * emulator::state.num_threads;
  while (emulator::state.arrivals < expected) emulator::yield();
}
float load_of_rank(const float* pointer, int rank) {
  const emulator::Block& other = emulator::state.blocks[rank];
  if (other.num_live == 0) emulator::fail("reads the shared memory of a block that has left");
  return *reinterpret_cast<const float*>(
      other.shared + (reinterpret_cast<const char*>(pointer) - emulator::my_block().shared));
}

void let_dependents_launch() {}
void wait_for_inputs() { race_wait_for_inputs(); }

int byte_of(uint64_t word, int index) { return static_cast<int>(word >> 8 * index & 0xff); }

inline int dot4_u8_s8(uint32_t a, uint32_t b, int d) {
  return d + static_cast<int>(a & 0xff) * static_cast<int8_t>(b) +
         static_cast<int>(a >> 8 & 0xff) * static_cast<int8_t>(b >> 8) +
         static_cast<int>(a >> 16 & 0xff) * static_cast<int8_t>(b >> 16) +
         static_cast<int>(a >> 24) * static_cast<int8_t>(b >> 24);
}

// PTX ISA "Matrix Fragments for mma.m16n8k32", u8 and s8.
void mma_u8_s8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
               uint32_t b1) {
  const uint64_t mine[6] = {a0, a1, a2, a3, b0, b1};
  const emulator::Slot* slots = emulator::exchange(mine, sizeof mine, kOpMmaInt);
  const int lane = emulator::my_lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 8; ++k)  // four bytes each
      d[i] = dot4_u8_s8(slots[row % 8 * 4 + k % 4].words[row / 8 + k / 4 * 2],
                        slots[column * 4 + k % 4].words[4 + k / 4], d[i]);
  }
}
uint4 load_streaming(const uint4* pointer) { return *pointer; }
uint64_t nanoseconds() { return clock64(); }
uint32_t multiprocessor_id() { return blockIdx.x; }

}  // namespace

#include "emulated_fragments.h"
#include "emulated_load_matrix.h"
#include "emulated_signed_products.h"
