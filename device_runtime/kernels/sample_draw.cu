// Draws the next token of each row that is not greedy, after sample_top: penalty, temperature,
// top-k, top-p, min-p, then Gumbel-max.
//
//   sample_draw_f32, sample_draw_f16
//   d[i] = (top - logit[i]) / temperature, in fp32 as backends/reference/sampler.py has it (negated)
//   top-k keeps d up to the k-th smallest; top-p the smallest of those whose weights exp(-d) reach
//   top_p of theirs; min-p d up to -log(min_p); 19.5 at most. Every filter is a threshold on d, so
//   equal logits stay or go together. The token is the largest of gumbel - d, the lowest index on a
//   tie, with the noise of (seed, position of the new token, index).
//   Float details: d, its comparison and gumbel - d are fp32 exactly as in the reference; exp and
//   log are CUDA's (1 ulp), weights are added up in fixed point of 2^-44, so the order does not
//   matter. The reference adds float64: the two differ where top_p falls within 1e-6 of a cut.
//
//   Arrays as sample_top.cu.
// Launch: grid (num_logits_rows), block kDrawThreads, dynamic shared memory kSharedBytes.
// Bound by one SM reading the logits twice from L2; more often where thousands of tokens survive.
// Checked against backends/reference/sampler.py: the same token unless two scores are within 1e-5.
//
// A histogram of d in steps of 1/128 finds the bucket in which each filter cuts, without sorting;
// only the tokens of that bucket are ranked. What survives usually fits a list in shared memory.

#include "draw.cuh"

namespace {

template <typename T>
__device__ __forceinline__ void run(const uint64_t* top, const StepState& state, const T* logits,
                                    const SamplingRow* sampling, const int32_t* row_ids,
                                    int vocab_size, int stride) {
  let_dependents_launch();
  wait_for_inputs();
  const int row = row_ids == nullptr ? static_cast<int>(blockIdx.x) : row_ids[blockIdx.x];
  const SamplingRow params = sampling[row];
  const int position = state.positions[row];
  if (position < 0 || params.temperature == 0.0f) return;
  const Logits<T> source{logits + static_cast<int64_t>(blockIdx.x) * stride,
                         state.seen + static_cast<int64_t>(row) * state.seen_words,
                         params.penalty};
  const float largest = from_ordered(static_cast<uint32_t>(top[blockIdx.x] >> 32));
  const int token = Draw<T>(source, vocab_size, largest, params).run(position + 1);
  if (threadIdx.x == 0) finish_row(state, row, token);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kDrawThreads, 1)
    sample_draw_f32(const uint64_t* top, int32_t* tokens, int32_t* positions, uint32_t* seen,
                    uint64_t* ring, const float* logits, const SamplingRow* sampling,
                    const int32_t* stop_ids, const int32_t* last_positions,
                    const int32_t* row_ids, int32_t vocab_size, int32_t stride,
                    int32_t seen_words, int32_t ring_size) {
  run(top,
      StepState{tokens, positions, seen, ring, stop_ids, last_positions, seen_words, ring_size},
      logits, sampling, row_ids, vocab_size, stride);
}

extern "C" __global__ void __launch_bounds__(kDrawThreads, 1)
    sample_draw_f16(const uint64_t* top, int32_t* tokens, int32_t* positions, uint32_t* seen,
                    uint64_t* ring, const fp16* logits, const SamplingRow* sampling,
                    const int32_t* stop_ids, const int32_t* last_positions,
                    const int32_t* row_ids, int32_t vocab_size, int32_t stride,
                    int32_t seen_words, int32_t ring_size) {
  run(top,
      StepState{tokens, positions, seen, ring, stop_ids, last_positions, seen_words, ring_size},
      logits, sampling, row_ids, vocab_size, stride);
}
