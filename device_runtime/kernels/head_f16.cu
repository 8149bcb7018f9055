// The output head of head.cuh with fp16 weights.
#include "head.cuh"

extern "C" __global__ void __launch_bounds__(kHeadThreads, 2)
    head_f16(float* logits, const float* residual, const int32_t* rows, const fp16* norm_weight,
             const fp16* weights, int32_t num_rows, int32_t hidden_size, int32_t vocab_size,
             float eps) {
  run_head<HalfFormat>(
      reinterpret_cast<const char*>(weights),
      HeadArguments{logits, residual, rows, norm_weight, nullptr, num_rows, hidden_size, vocab_size,
                    eps});
}
