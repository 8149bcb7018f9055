// Reads a buffer once and does nothing else: the ceiling that bandwidth-bound kernels are held to.
//
//   read_bandwidth   sink[0] = xor of all words, written only when it equals a value that random
//                    data practically never gives, so that the loads cannot be dropped
//   sm_probe         sm_ids[block] = %smid; clocks[block] = {SM clocks, nanoseconds} of a spin
//
//   data uint4 [num_chunks], sink uint32 [1]; sm_ids uint32 [grid], clocks uint64 [grid][2].
// Launch: any grid, block 512. sm_probe with the dynamic shared memory of the kernel whose
// placement it stands for.
// Bound by DRAM: 16 * num_chunks bytes.

#include "common.cuh"

namespace {

constexpr int kThreads = 512;
constexpr int kLoads = 8;

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    read_bandwidth(uint32_t* sink, const uint4* data, int32_t num_chunks) {
  let_dependents_launch();
  wait_for_inputs();
  uint32_t mixed = 0;
  const int stride = gridDim.x * kThreads;
  for (int first = blockIdx.x * kThreads + threadIdx.x; first < num_chunks;
       first += stride * kLoads) {
    uint4 values[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = first + i * stride;
      values[i] = index < num_chunks ? load_streaming(data + index) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) mixed ^= values[i].x ^ values[i].y ^ values[i].z ^ values[i].w;
  }
  if (mixed == 0x9e3779b9u) sink[0] = mixed;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    sm_probe(uint32_t* sm_ids, uint64_t* clocks, int32_t num_clocks) {
  if (threadIdx.x != 0) return;
  sm_ids[blockIdx.x] = multiprocessor_id();
  const uint64_t start_ns = nanoseconds();
  const int64_t start = clock64();
  int64_t now = start;
  while (now - start < num_clocks) now = clock64();
  clocks[2 * blockIdx.x] = now - start;
  clocks[2 * blockIdx.x + 1] = nanoseconds() - start_ns;
}
