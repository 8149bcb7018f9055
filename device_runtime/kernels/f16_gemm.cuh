// y = W x for any number of tokens, W in fp16: the linear layers of packages without quantization.
//
//   f16_gemm, by its last argument `output`:
//     kHalf  result[t,m] = fp16(y[t,m] + bias[m])
//     kSilu  result[t,i] = fp16(silu(y[t,2i]) * y[t,2i+1])
//     kAdd   result[t,m] = result[t,m] + y[t,m] + bias[m]
//   y[t,m] = sum_k weights[k,m] x[t,k] in fp32
//
//   result fp16 [num_tokens][outputs], fp16 [num_tokens][outputs / 2] or fp32 [num_tokens][outputs]
//   (updated); x fp16 [num_tokens][inputs]; bias fp16 [outputs] or null, not read for kSilu; weights
//   fp16 [inputs][outputs]; workspace fp32 and tickets uint32 as in gemm.cuh, tickets zero at first.
// One source file for each tile of 8, 32, 64 or 128 tokens; that of 8 serves decode steps.
// Launch: block and dynamic shared memory of gemm_shape.py's GemmShape, any grid up to
// stream_tiles * ceil(inputs / kStageInputs) blocks if stream_tiles > 0.
// inputs % 32 == outputs % 32 == 0.
// Bound by 2 * num_tokens * inputs * outputs tensor FLOP, below some 150 tokens by DRAM.
// Checked against reference/linear.py, relative error 1e-3.
//
// A row of shared memory holds the outputs of one input; ldmatrix transposes them into A fragments.
#ifndef TURBOJET_F16_GEMM_CUH
#define TURBOJET_F16_GEMM_CUH

#include "gemm.cuh"

namespace {

template <class T>
struct HalfWeights {
  static constexpr int kRowBytes = T::kOutputs * 2;
  static constexpr int kStageBytes = T::kStageInputs * kRowBytes;
  static_assert(T::kOutputs % 64 == 0, "eight chunks of a row are swizzled");

  const fp16* weights;
  int inputs;
  int outputs;

  // Past the end the last rows and columns are repeated: finite weights for inputs that are zero or
  // outputs that are not stored.
  __device__ __forceinline__ void copy_step(char* slot, int step, int first_output) const {
    constexpr int kChunks = kRowBytes / 16;
    constexpr int kRows = T::kThreads / kChunks;
    static_assert(T::kThreads % kChunks == 0 && T::kStageInputs % kRows == 0, "whole rows");
    const int chunk = threadIdx.x % kChunks;
    const int output = smaller(first_output + chunk * 8, outputs - 8);
#pragma unroll kCopyUnroll
    for (int i = 0; i < T::kStageInputs / kRows; ++i) {
      const int own = threadIdx.x / kChunks + i * kRows;
      const int row = smaller(step * T::kStageInputs + own, inputs - 1);
      copy16_async(slot + own * kRowBytes + ((chunk ^ (own & 7)) << 4),
                   weights + static_cast<int64_t>(row) * outputs + output);
    }
  }

  // The A fragments of a warp. `load` brings what sub-step k needs into registers, `make` hands it
  // out; sub-step after sub-step, in turn.
  struct Fragments {
    int offset;  // of the first fragment; the next are 2, 4 ... chunks on, before the swizzle
    uint32_t words[T::kRowTiles][4];

    // Lane l points ldmatrix to input l % 8 of outputs 0-7 or 8-15 and inputs 0-7 or 8-15.
    __device__ __forceinline__ Fragments(int warp_output, int lane)
        : offset((lane / 16 * 8 + lane % 8) * kRowBytes +
                 (((warp_output / 8 + lane / 8 % 2) ^ lane % 8) << 4)) {
      static_assert(T::kWarpOutputs == 32 || T::kWarpOutputs == 64, "chunks do not carry");
    }

    __device__ __forceinline__ void load(const char* slot, int k) {
#pragma unroll
      for (int i = 0; i < T::kRowTiles; ++i)
        load_matrices_transposed(words[i], slot + (offset ^ i * 32) + k * 16 * kRowBytes);
    }

    __device__ __forceinline__ void make(uint32_t (&a)[T::kRowTiles][4], int) {
#pragma unroll
      for (int i = 0; i < T::kRowTiles; ++i) {
#pragma unroll
        for (int word = 0; word < 4; ++word) a[i][word] = words[i][word];
      }
    }
  };
};

template <class T>
__device__ __forceinline__ void run_f16_gemm(const Destination& destination, const fp16* x,
                                             const fp16* weights, const Shape& shape,
                                             int stream_tiles) {
  run_gemm<T, HalfWeights<T>>(HalfWeights<T>{weights, shape.inputs, shape.outputs}, x,
                                       shape, destination, stream_tiles);
}

}  // namespace

#endif
