// The GEMM of f16_gemm.cuh in tiles of 64 tokens.
#include "f16_gemm.cuh"

namespace {

#ifndef TURBOJET_GEMM_TILE
#define TURBOJET_GEMM_TILE 4, 1, 32, 64, 64, 4, 2
#endif
using GemmTile = Tile<TURBOJET_GEMM_TILE>;

}  // namespace

extern "C" __global__ void __launch_bounds__(GemmTile::kThreads, GemmTile::kBlocksPerSm)
    f16_gemm_64(void* result, float* workspace, uint32_t* tickets, const fp16* x, const fp16* bias,
                const fp16* weights, int32_t num_tokens, int32_t inputs, int32_t outputs,
                int32_t stream_tiles, int32_t output) {
  run_f16_gemm<GemmTile>(
      Destination{static_cast<Output>(output), result, bias, workspace, tickets}, x, weights,
      Shape{num_tokens, inputs, outputs}, stream_tiles);
}
