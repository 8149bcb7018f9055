// The largest logit of each row, and with it the next token of rows that are greedy.
//
//   sample_top_f32, sample_top_f16
//   top[i] = the largest of logits[i] after the repetition penalty and the lowest index that has it;
//   a greedy row takes that token and moves on (sampling.cuh finish_row).
//
//   top uint64 [num_logits_rows] as to_candidate; best uint64 and tickets uint32 [num_logits_rows],
//   0 before and after; state arrays as sampling.cuh; logits [num_logits_rows][stride] fp32 or fp16,
//   16-byte aligned, readable to the next multiple of 4; sampling SamplingRow [rows]; row_ids int32
//   [num_logits_rows], the state's row of each, or null: its own number.
// Launch: grid (any, num_logits_rows), block kThreads. stride % 8 == 0.
// Bound by L2: 4 (or 2) * vocab_size bytes a row.
// Checked against backends/reference/sampler.py: the same token.

#include "sampling.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kLoads = 4;

template <typename T>
__device__ __forceinline__ void run(uint64_t* top, uint64_t* best, uint32_t* tickets,
                                    const StepState& state, const T* logits,
                                    const SamplingRow* sampling, const int32_t* row_ids,
                                    int vocab_size, int stride) {
  __shared__ uint64_t warp_best[kThreads / kWarpSize];
  let_dependents_launch();
  wait_for_inputs();
  const int row = row_ids == nullptr ? static_cast<int>(blockIdx.y) : row_ids[blockIdx.y];
  if (state.positions[row] < 0) return;
  const Logits<T> source{logits + static_cast<int64_t>(blockIdx.y) * stride,
                         state.seen + static_cast<int64_t>(row) * state.seen_words,
                         sampling[row].penalty};
  const int step = 4 * kThreads * gridDim.x;
  uint64_t mine = 0;
  for (int start = 4 * (blockIdx.x * kThreads + threadIdx.x); start < vocab_size;
       start += step * kLoads) {
    float values[kLoads][4];
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
      if (start + j * step < vocab_size) source.load(values[j], start + j * step);
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int index = start + j * step + i;
        if (index >= vocab_size) continue;
        const uint64_t candidate = to_candidate(values[j][i], index);
        mine = candidate > mine ? candidate : mine;
      }
  }
  mine = block_max<kThreads>(mine, warp_best);
  if (threadIdx.x != 0) return;
  atomicMax(reinterpret_cast<unsigned long long*>(best + blockIdx.y),
            static_cast<unsigned long long>(mine));
  if (take_ticket(tickets + blockIdx.y) != gridDim.x - 1) return;
  tickets[blockIdx.y] = 0;
  const uint64_t winner = atomicExch(reinterpret_cast<unsigned long long*>(best + blockIdx.y), 0ull);
  top[blockIdx.y] = winner;
  const float value = from_ordered(static_cast<uint32_t>(winner >> 32));
  if (!(fabsf(value) <= 3.402823466e38f))
    finish_row(state, row, -1);
  else if (sampling[row].temperature == 0.0f)
    finish_row(state, row, index_of(winner));
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    sample_top_f32(uint64_t* top, uint64_t* best, uint32_t* tickets, int32_t* tokens,
                   int32_t* positions, uint32_t* seen, uint64_t* ring, const float* logits,
                   const SamplingRow* sampling, const int32_t* stop_ids,
                   const int32_t* last_positions, const int32_t* row_ids, int32_t vocab_size,
                   int32_t stride, int32_t seen_words, int32_t ring_size) {
  run(top, best, tickets,
      StepState{tokens, positions, seen, ring, stop_ids, last_positions, seen_words, ring_size},
      logits, sampling, row_ids, vocab_size, stride);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    sample_top_f16(uint64_t* top, uint64_t* best, uint32_t* tickets, int32_t* tokens,
                   int32_t* positions, uint32_t* seen, uint64_t* ring, const fp16* logits,
                   const SamplingRow* sampling, const int32_t* stop_ids,
                   const int32_t* last_positions, const int32_t* row_ids, int32_t vocab_size,
                   int32_t stride, int32_t seen_words, int32_t ring_size) {
  run(top, best, tickets,
      StepState{tokens, positions, seen, ring, stop_ids, last_positions, seen_words, ring_size},
      logits, sampling, row_ids, vocab_size, stride);
}
