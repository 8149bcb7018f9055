// The GEMV of w4a16_gemv.cuh for one token.
#ifndef TURBOJET_GEMV_STAGES
#define TURBOJET_GEMV_STAGES 2
#endif
#ifndef TURBOJET_READ_ONCE
#define TURBOJET_READ_ONCE 1
#endif
#include "w4a16_gemv.cuh"

namespace {

constexpr int kTokens = 1;

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    w4a16_gemv_norm_1(fp16* out, float* workspace, const float* residual, const fp16* norm_weight,
                      const fp16* bias, const uint4* codes, const uint32_t* scales_zeros,
                      int32_t num_tokens, int32_t inputs, int32_t outputs, int32_t phase_units,
                      int32_t held_tiles, float eps) {
  run_gemv<kTokens, Output::kHalf>(
      QuantizedMatrix{codes, scales_zeros, inputs, outputs},
      Arguments{out, const_cast<float*>(residual), nullptr, norm_weight, nullptr, bias, workspace,
                num_tokens, phase_units, held_tiles, eps});
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    w4a16_gemv_norm_silu_1(fp16* out, float* workspace, const float* residual,
                           const fp16* norm_weight, const uint4* codes,
                           const uint32_t* scales_zeros, int32_t num_tokens, int32_t inputs,
                           int32_t outputs, int32_t phase_units, int32_t held_tiles, float eps) {
  run_gemv<kTokens, Output::kSilu>(
      QuantizedMatrix{codes, scales_zeros, inputs, outputs},
      Arguments{out, const_cast<float*>(residual), nullptr, norm_weight, nullptr, nullptr,
                workspace, num_tokens, phase_units, held_tiles, eps});
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    w4a16_gemv_add_1(float* residual, float* workspace, const fp16* x, const fp16* bias,
                     const uint4* codes, const uint32_t* scales_zeros, int32_t num_tokens,
                     int32_t inputs, int32_t outputs, int32_t phase_units, int32_t held_tiles) {
  run_gemv<kTokens, Output::kAdd>(
      QuantizedMatrix{codes, scales_zeros, inputs, outputs},
      Arguments{nullptr, residual, x, nullptr, nullptr, bias, workspace, num_tokens, phase_units,
                held_tiles, 0.0f});
}
