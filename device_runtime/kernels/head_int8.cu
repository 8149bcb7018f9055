// The output head of head.cuh with int8 weights, for up to 4 and up to 8 rows.
#include "head.cuh"

extern "C" __global__ void __launch_bounds__(kHeadThreads, 2)
    head_int8_4(float* logits, const float* residual, const int32_t* rows, const fp16* norm_weight,
                const int8_t* weights, const fp16* scales, int32_t num_rows, int32_t hidden_size,
                int32_t vocab_size, float eps) {
  run_head<ByteFormat<1>>(
      reinterpret_cast<const char*>(weights),
      HeadArguments{logits, residual, rows, norm_weight, scales, num_rows, hidden_size, vocab_size,
                    eps});
}

extern "C" __global__ void __launch_bounds__(kHeadThreads, 2)
    head_int8_8(float* logits, const float* residual, const int32_t* rows, const fp16* norm_weight,
                const int8_t* weights, const fp16* scales, int32_t num_rows, int32_t hidden_size,
                int32_t vocab_size, float eps) {
  run_head<ByteFormat<2>>(
      reinterpret_cast<const char*>(weights),
      HeadArguments{logits, residual, rows, norm_weight, scales, num_rows, hidden_size, vocab_size,
                    eps});
}
