// The GEMV of w4a16_gemv.cuh for one token and matrices of at most two units a warp: blocks of half the
// warps, of which two share an SM, so that one asks for its weights while the other adds up.
#define TURBOJET_GEMV_WARPS 8
#define TURBOJET_GEMV_STAGES 2
#define TURBOJET_GEMV_TRIGGERS_LATE 1
#define TURBOJET_READ_ONCE 1
#include "w4a16_gemv.cuh"

namespace {

constexpr int kTokens = 1;

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    w4a16_gemv_paired_add_1(float* residual, float* workspace, const fp16* x, const fp16* bias,
                            const uint4* codes, const uint32_t* scales_zeros, int32_t num_tokens,
                            int32_t inputs, int32_t outputs, int32_t phase_units,
                            int32_t held_tiles) {
  run_gemv<kTokens, Output::kAdd>(
      QuantizedMatrix{codes, scales_zeros, inputs, outputs},
      Arguments{nullptr, residual, x, nullptr, nullptr, bias, workspace, num_tokens, phase_units,
                held_tiles, 0.0f});
}
