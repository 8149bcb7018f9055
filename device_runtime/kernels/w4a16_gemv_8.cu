// The GEMV of w4a16_gemv.cuh for 5-8 tokens.
#ifndef TURBOJET_GEMV_STAGES
#define TURBOJET_GEMV_STAGES 1
#endif
#include "w4a16_gemv.cuh"

namespace {

constexpr int kTokens = 8;

}  // namespace

extern "C" __global__ void __launch_bounds__(kQuantizeThreads)
    w4a16_quantize_norm_8(uint4* activations, const float* residual, const fp16* norm_weight,
                          int32_t num_tokens, int32_t inputs) {
  Arguments arguments{};
  arguments.residual = const_cast<float*>(residual);
  arguments.norm_weight = norm_weight;
  arguments.num_tokens = num_tokens;
  run_quantize<kTokens, true>(activations, arguments, inputs);
}

extern "C" __global__ void __launch_bounds__(kQuantizeThreads)
    w4a16_quantize_8(uint4* activations, const fp16* x, int32_t num_tokens, int32_t inputs) {
  Arguments arguments{};
  arguments.x = x;
  arguments.num_tokens = num_tokens;
  run_quantize<kTokens, false>(activations, arguments, inputs);
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    w4a16_gemv_norm_8(fp16* out, float* workspace, const uint4* activations, const fp16* bias,
                      const uint4* codes, const uint32_t* scales_zeros, int32_t num_tokens,
                      int32_t inputs, int32_t outputs, int32_t phase_units, int32_t held_tiles,
                      float eps) {
  run_gemv<kTokens, Output::kHalf>(
      QuantizedMatrix{codes, scales_zeros, inputs, outputs},
      Arguments{out, nullptr, nullptr, nullptr, activations, bias, workspace, num_tokens,
                phase_units, held_tiles, eps});
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    w4a16_gemv_norm_silu_8(fp16* out, float* workspace, const uint4* activations,
                           const uint4* codes, const uint32_t* scales_zeros, int32_t num_tokens,
                           int32_t inputs, int32_t outputs, int32_t phase_units,
                           int32_t held_tiles, float eps) {
  run_gemv<kTokens, Output::kSilu>(
      QuantizedMatrix{codes, scales_zeros, inputs, outputs},
      Arguments{out, nullptr, nullptr, nullptr, activations, nullptr, workspace, num_tokens,
                phase_units, held_tiles, eps});
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    w4a16_gemv_add_8(float* residual, float* workspace, const uint4* activations,
                     const fp16* bias, const uint4* codes, const uint32_t* scales_zeros,
                     int32_t num_tokens, int32_t inputs, int32_t outputs, int32_t phase_units,
                     int32_t held_tiles) {
  run_gemv<kTokens, Output::kAdd>(
      QuantizedMatrix{codes, scales_zeros, inputs, outputs},
      Arguments{nullptr, residual, nullptr, nullptr, activations, bias, workspace, num_tokens,
                phase_units, held_tiles, 0.0f});
}
