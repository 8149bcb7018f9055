// Every instruction that CUDA C++ has no name for, one function each; included by common.cuh only.
#ifndef TURBOJET_PTX_CUH
#define TURBOJET_PTX_CUH

namespace {

// cvt: PTX ISA "Data Movement and Conversion Instructions: cvt".
__device__ __forceinline__ float to_float(fp16 value) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
}

__device__ __forceinline__ fp16 to_fp16(float value) {
  fp16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}

// threadIdx.x, read where it stands: what is made of it is not carried in registers from before.
__device__ __forceinline__ int thread_index_here() {
  int result;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(result));
  return result;
}

// The block's dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ char* dynamic_shared_bytes() {
  extern __shared__ uint4 dynamic_shared_words[];
  return reinterpret_cast<char*>(dynamic_shared_words);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes from global to shared memory, past L1: cp.async, PTX ISA "Data Movement: cp.async".
__device__ __forceinline__ void copy16_async(void* shared, const void* global) {
#if TURBOJET_PLAIN
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
#endif
}

// Copies of weights: where TURBOJET_READ_ONCE is set they tell L2 to give them up before anything
// else, since a step reads them once ("createpolicy", evict_first). A hint, without a part in the
// order of memory.
#ifndef TURBOJET_READ_ONCE
#define TURBOJET_READ_ONCE 0
#endif
#if TURBOJET_READ_ONCE && !TURBOJET_PLAIN
using CopyTarget = uint32_t;
#else
using CopyTarget = char*;
#endif

// Where the lane's weights go; all lanes call it together. The shuffle keeps the address out of
// uniform registers: ptxas 13.0 puts those of a copy's address where its policy should be, and
// Hopper stops at the instruction.
__device__ __forceinline__ CopyTarget copy_target(char* shared, int lane) {
#if TURBOJET_READ_ONCE && !TURBOJET_PLAIN
  return __shfl_sync(0xffffffffu, shared_address(shared), lane);
#else
  return shared;
#endif
}

__device__ __forceinline__ uint64_t weights_policy() {
  uint64_t policy = 0;
#if TURBOJET_READ_ONCE && !TURBOJET_PLAIN
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

__device__ __forceinline__ void copy16_weights_async(CopyTarget target, int offset,
                                                     const void* global, uint64_t policy) {
#if TURBOJET_READ_ONCE && !TURBOJET_PLAIN
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(target + offset),
      "l"(global), "l"(policy)
      : "memory");
#else
  copy16_async(target + offset, global);
#endif
}

__device__ __forceinline__ void commit_copies() {
#if !TURBOJET_PLAIN
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Returns when at most kPending of this thread's newest copy groups are still in flight.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
#if !TURBOJET_PLAIN
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// A barrier of the block that warps arrive at before they wait for it: PTX ISA "mbarrier". What a warp
// did before it arrived is seen by those that have waited. Phases follow each other; a warp waits for
// each once, after it has arrived. Plain: there they wait at once.
using SplitBarrier = uint64_t;

// By one thread, before a barrier of the block.
__device__ __forceinline__ void start_split_barrier(SplitBarrier* barrier, int num_warps) {
#if !TURBOJET_PLAIN
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(num_warps)
               : "memory");
#endif
}

// By one lane, for its warp.
__device__ __forceinline__ void arrive(SplitBarrier* barrier) {
#if !TURBOJET_PLAIN
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared.b64 state, [%0];\n}" ::"r"(
                   shared_address(barrier))
               : "memory");
#endif
}

// By all lanes; parity: 0 for the first phase, 1 for the second, and so on in turn. From sm_90 on a warp
// sleeps there ("try_wait"); before, it would take turns from those that it waits for.
__device__ __forceinline__ void wait_for_all(SplitBarrier* barrier, int parity) {
#if TURBOJET_PLAIN
  __syncthreads();
#elif defined(__CUDA_ARCH__)
#if __CUDA_ARCH__ >= 900
#define TURBOJET_WAIT "mbarrier.try_wait"
  constexpr int kRestNs = 0;
#else
#define TURBOJET_WAIT "mbarrier.test_wait"
  constexpr int kRestNs = 40;
#endif
  uint32_t has_passed = 0;
  for (;;) {
    asm volatile(
        "{\n.reg .pred passed;\n" TURBOJET_WAIT ".parity.shared.b64 passed, [%1], %2;\n"
        "selp.b32 %0, 1, 0, passed;\n}"
        : "=r"(has_passed)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    if (has_passed) break;
    if (kRestNs > 0) __nanosleep(kRestNs);
  }
#undef TURBOJET_WAIT
#endif
}

// Programmatic dependent launch: PTX ISA "griddepcontrol". No-ops when not launched so.
//
// A kernel may start when every block of the one before has let it or has ended, and that one may
// not have waited yet: several kernels of a step are under way at once, but the blocks of each have
// all started before the next one's. The wait ends when the kernel before is complete and its writes
// are seen; as that one has waited as well, so is everything before it. A launch in which nobody
// waits would break this chain for all that follow. tests/unit/test_race_steps.py checks it.

__device__ __forceinline__ void let_dependents_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Before it a kernel writes nothing and reads only what the step writes nowhere before it: weights,
// tables, cached tokens.
__device__ __forceinline__ void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

#if !TURBOJET_PLAIN
// d += a * b for u8 [16, 32] and s8 [32, 8]: PTX ISA "Matrix Fragments for mma.m16n8k32".
__device__ __forceinline__ void mma_u8_s8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                          uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#else
// d + sum of four u8 * s8 products: PTX ISA "dp4a".
__device__ __forceinline__ int dot4_u8_s8(uint32_t a, uint32_t b, int d) {
  int result;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(d));
  return result;
}
#endif

// The larger value, NaN if either is: PTX ISA "max".
__device__ __forceinline__ float max_or_nan(float a, float b) {
#if TURBOJET_PLAIN
  return a >= b || a != a ? a : b;
#else
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#endif
}

// Asks for 128 bytes to be in L2 soon: PTX ISA "prefetch".
__device__ __forceinline__ void prefetch_line(const void* pointer) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
}

// memory += value, without waiting for it: PTX ISA "red".
__device__ __forceinline__ void add_to_memory(float* pointer, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(pointer), "f"(value) : "memory");
}

// A 16-byte load of data that is read once: past L1. Nobody may write it while the kernel runs, the
// kernel before it included (.nc).
__device__ __forceinline__ uint4 load_streaming(const uint4* pointer) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(pointer));
  return value;
}

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t value;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
  return value;
}

__device__ __forceinline__ uint32_t multiprocessor_id() {
  uint32_t value;
  asm volatile("mov.u32 %0, %smid;" : "=r"(value));
  return value;
}

}  // namespace

#endif
