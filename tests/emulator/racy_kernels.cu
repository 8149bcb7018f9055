// Kernels that are right, or wrong in one way each where `is_broken` says so: what the race checker
// must tell, and must not. tests/unit/test_race_check.py.

#include "fragments.cuh"

namespace {

constexpr int kThreads = 64;

__device__ __forceinline__ int next_thread() { return (threadIdx.x + 1) % kThreads; }

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    barrier_between(uint32_t* out, const uint32_t* in, int32_t is_broken) {
  __shared__ uint32_t words[kThreads];
  words[threadIdx.x] = in[threadIdx.x];
  if (!is_broken) __syncthreads();
  out[threadIdx.x] = words[next_thread()];
}

// A barrier before the words are written again, of two that are needed.
extern "C" __global__ void __launch_bounds__(kThreads)
    barrier_before_reuse(uint32_t* out, const uint32_t* in, int32_t is_broken) {
  uint32_t* const words = dynamic_shared<uint32_t>();
  uint32_t sum = 0;
  for (int i = 0; i < 2; ++i) {
    words[threadIdx.x] = in[threadIdx.x] + i;
    __syncthreads();
    sum += words[next_thread()];
    if (!is_broken) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// A shuffle brings the lanes together, but says nothing about memory.
extern "C" __global__ void __launch_bounds__(kThreads)
    warp_between(uint32_t* out, const uint32_t* in, int32_t is_broken) {
  uint32_t* const words = dynamic_shared<uint32_t>();
  words[threadIdx.x] = in[threadIdx.x];
  if (is_broken)
    __shfl_xor_sync(kFullMask, words[threadIdx.x], 1);
  else
    __syncwarp();
  out[threadIdx.x] = words[threadIdx.x ^ 1];
}

// Bytes of a word belong to different threads; broken: one of them to two.
extern "C" __global__ void __launch_bounds__(kThreads)
    bytes_of_words(uint32_t* out, const uint32_t* in, int32_t is_broken) {
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(out);
  bytes[threadIdx.x] = static_cast<uint8_t>(in[threadIdx.x]);
  if (is_broken && threadIdx.x == 5) bytes[6] = static_cast<uint8_t>(in[6] + 1);
}

// All threads write the same; broken: another number each.
extern "C" __global__ void __launch_bounds__(kThreads)
    same_value(uint32_t* out, const uint32_t*, int32_t is_broken) {
  out[0] = is_broken ? threadIdx.x : 7;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    copy_waited_for(uint4* out, const uint4* in, int32_t is_broken) {
  uint4* const chunks = dynamic_shared<uint4>();
  copy16_async(chunks + threadIdx.x, in + threadIdx.x);
  commit_copies();
  if (!is_broken) wait_copies<0>();
  out[threadIdx.x] = chunks[threadIdx.x];
}

// Every thread waits for its own copies only.
extern "C" __global__ void __launch_bounds__(kThreads)
    copy_of_another(uint4* out, const uint4* in, int32_t is_broken) {
  uint4* const chunks = dynamic_shared<uint4>();
  copy16_async(chunks + threadIdx.x, in + threadIdx.x);
  commit_copies();
  if (is_broken) __syncthreads();
  wait_copies<0>();
  if (!is_broken) __syncthreads();
  out[threadIdx.x] = chunks[next_thread()];
}

// A copy into what lanes of the warp may still be reading.
extern "C" __global__ void __launch_bounds__(kThreads)
    copy_into_read(uint4* out, const uint4* in, int32_t is_broken) {
  uint4* const chunks = dynamic_shared<uint4>();
  chunks[threadIdx.x] = in[threadIdx.x];
  __syncwarp();
  const uint4 other = chunks[threadIdx.x ^ 1];
  if (!is_broken) __syncwarp();
  copy16_async(chunks + threadIdx.x, in + threadIdx.x);
  commit_copies();
  wait_copies<0>();
  out[threadIdx.x] = other;
}

// The block that comes last reads what the others wrote; broken: before it has all of its own.
extern "C" __global__ void __launch_bounds__(kThreads)
    ticket_of_block(uint32_t* out, uint32_t* parts, uint32_t* ticket, int32_t is_broken) {
  __shared__ uint32_t before;
  parts[blockIdx.x * kThreads + threadIdx.x] = threadIdx.x;
  if (!is_broken) __syncthreads();
  if (threadIdx.x == 0) before = take_ticket(ticket);
  __syncthreads();
  if (before != gridDim.x - 1) return;
  uint32_t sum = 0;
  for (int block = 0; block < gridDim.x; ++block) sum += parts[block * kThreads + threadIdx.x];
  out[threadIdx.x] = sum;
  if (threadIdx.x == 0) *ticket = 0;
}

// An atomic that orders nothing; right where nobody takes it for more.
extern "C" __global__ void __launch_bounds__(kThreads)
    counter_of_block(uint32_t* out, uint32_t* parts, uint32_t* counter, int32_t is_broken) {
  if (threadIdx.x != 0) return;
  parts[blockIdx.x] = 1;
  const uint32_t before = atomicAdd(counter, 1u);
  if (is_broken && before == gridDim.x - 1) out[0] = parts[0];
}

// Words that tell by themselves that they are there; the reader puts zeros in their place.
extern "C" __global__ void __launch_bounds__(kThreads)
    word_that_tells(float4* out, float4* words, int32_t is_broken) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    store_for_other_block(words, float4{1.0f, 1.0f, 1.0f, 1.0f});
    return;
  }
  out[blockIdx.x] = load_of_other_block(words);
  if (is_broken)
    words[0] = float4{};
  else
    store_for_other_block(words, float4{});
}

// The last block waits for the first one; broken: the first for the last, which may start after it.
extern "C" __global__ void __launch_bounds__(kThreads)
    waits_for_block(float4*, float4* words, int32_t is_broken) {
  if (threadIdx.x >= kWarpSize) return;
  if (blockIdx.x == (is_broken ? gridDim.x - 1 : 0)) {
    store_for_other_block(words, float4{1.0f, 1.0f, 1.0f, 1.0f});
    return;
  }
  while (!__all_sync(kFullMask, load_of_other_block(words).x != 0.0f)) {
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    first_of_step(uint32_t* out, const uint32_t* in, int32_t) {
  let_dependents_launch();
  wait_for_inputs();
  out[threadIdx.x] = in[threadIdx.x];
}

// Reads weights before it waits; broken: what the kernel before writes.
extern "C" __global__ void __launch_bounds__(kThreads)
    reads_early(uint32_t* out, const uint32_t* in, const uint32_t* weights, int32_t is_broken) {
  let_dependents_launch();
  uint32_t value = weights[threadIdx.x];
  if (is_broken) value += in[threadIdx.x];
  wait_for_inputs();
  if (!is_broken) value += in[threadIdx.x];
  out[threadIdx.x] = value;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    writes_early(uint32_t* out, const uint32_t* in, int32_t is_broken) {
  let_dependents_launch();
  if (is_broken) out[threadIdx.x] = 1;
  wait_for_inputs();
  if (!is_broken) out[threadIdx.x] = in[threadIdx.x];
}

// One thread waits, and tells the others; broken: does not tell.
extern "C" __global__ void __launch_bounds__(kThreads)
    one_waits(uint32_t* out, const uint32_t* in, int32_t is_broken) {
  let_dependents_launch();
  if (threadIdx.x == 0) wait_for_inputs();
  if (!is_broken) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

// Touches nothing of the others, but what comes next believes that it has waited.
extern "C" __global__ void __launch_bounds__(kThreads)
    passes_on(uint32_t*, const uint32_t*, int32_t is_broken) {
  let_dependents_launch();
  if (!is_broken) wait_for_inputs();
}
