// Marks the tokens of prompts as seen, which is what the repetition penalty goes by.
//
//   mark_seen: bit tokens[i] % 32 of seen[rows[i]][tokens[i] / 32] is set.
//
//   seen uint32 [rows][seen_words]; tokens, rows int32 [num_tokens], a negative token marks nothing.
// Launch: grid (any), block kThreads. Bound by L2: 12 bytes a token.
// Checked against numpy: equal.

#include "fragments.cuh"

namespace {
constexpr int kThreads = 256;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    mark_seen(uint32_t* seen, const int32_t* tokens, const int32_t* rows, int32_t num_tokens,
              int32_t seen_words) {
  let_dependents_launch();
  wait_for_inputs();
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < num_tokens; i += gridDim.x * kThreads) {
    const int token = tokens[i];
    if (token >= 0)
      atomicOr(seen + static_cast<int64_t>(rows[i]) * seen_words + token / 32, 1u << (token % 32));
  }
}
