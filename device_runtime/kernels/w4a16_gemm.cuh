// y = W x for 9 tokens and more, W in 4-bit codes: the linear layers of a prompt.
//
//   w4a16_gemm, by its last argument `output`:
//     kHalf  result[t,m] = fp16(y[t,m] + bias[m])
//     kSilu  result[t,i] = fp16(silu(y[t,2i]) * y[t,2i+1])
//     kAdd   result[t,m] = result[t,m] + y[t,m] + bias[m]
//   y[t,m] = sum_k w[k,m] x[t,k] in fp32
//   w[k,m] = fp16((q[k,m] - z[k div group_size, m]) * s[k div group_size, m]), rounded once and
//            without subnormals: the weight that the reference engine uses
//
//   result fp16 [num_tokens][outputs], fp16 [num_tokens][outputs / 2] or fp32 [num_tokens][outputs]
//   (updated); x fp16 [num_tokens][inputs]; bias fp16 [outputs] or null, not read for kSilu; codes
//   uint32 [inputs * outputs / 8] and scales_zeros uint32 [inputs / group_size][outputs] as in
//   package_format/SPEC.md; workspace fp32 and tickets uint32 as in gemm.cuh, tickets zero at first.
// One source file for each tile of 16, 32, 64 or 128 tokens.
// Launch: block and dynamic shared memory of gemm_shape.py's GemmShape, any grid up to
// stream_tiles * ceil(inputs / kStageInputs) blocks if stream_tiles > 0.
// inputs % 32 == outputs % 32 == inputs % group_size == 0; group_size 128, 64 or 32.
// Bound by 2 * num_tokens * inputs * outputs tensor FLOP, below some 50 tokens by DRAM.
// Checked against reference/linear.py, relative error 1e-3.
//
// A 32 x 32 tile of codes is 512 bytes, and the 16 bytes of a lane are its four A fragments
// (16 inputs x 16 outputs each), so that codes go through shared memory as they lie.
#ifndef TURBOJET_W4A16_GEMM_CUH
#define TURBOJET_W4A16_GEMM_CUH

#include "gemm.cuh"

namespace {

#ifndef TURBOJET_GROUP_SIZE
#define TURBOJET_GROUP_SIZE 128
#endif
constexpr int kGroupSize = TURBOJET_GROUP_SIZE;
static_assert(kGroupSize == 128 || kGroupSize == 64 || kGroupSize == 32, "supported group sizes");

template <class T>
struct QuantizedWeights {
  static constexpr int kTiles = T::kOutputs / 32;
  static constexpr int kTileRows = T::kStageInputs / 32;
  static constexpr int kScaleRows =
      T::kStageInputs > kGroupSize ? T::kStageInputs / kGroupSize : 1;
  static constexpr int kScaleSubSteps = T::kSubSteps / kScaleRows;
  static constexpr int kCodeBytes = kTileRows * kTiles * 512;
  static constexpr int kStageBytes = kCodeBytes + kScaleRows * T::kOutputs * 4;

  const uint4* codes;
  const uint32_t* scales_zeros;
  int inputs;
  int outputs;

  // Past the end the last rows and tiles are repeated: finite weights for inputs that are zero or
  // outputs that are not stored.
  __device__ __forceinline__ void copy_step(char* slot, int step, int first_output) const {
    constexpr int kChunks = kTileRows * kTiles * 32;
    const int first_tile = first_output / 32;
    const int last_tile = outputs / 32 - 1;
#pragma unroll kCopyUnroll
    for (int i = 0; i < (kChunks + T::kThreads - 1) / T::kThreads; ++i) {
      const int index = threadIdx.x + i * T::kThreads;
      const int tile = smaller(first_tile + index / 32 % kTiles, last_tile);
      const int row = smaller(step * kTileRows + index / 32 / kTiles, inputs / 32 - 1);
      if (kChunks % T::kThreads == 0 || index < kChunks)
        copy16_async(slot + index * 16,
                     codes + (static_cast<int64_t>(row) * (outputs / 32) + tile) * 32 + index % 32);
    }
    constexpr int kScaleChunks = kScaleRows * T::kOutputs / 4;
#pragma unroll
    for (int i = 0; i < (kScaleChunks + T::kThreads - 1) / T::kThreads; ++i) {
      const int index = threadIdx.x + i * T::kThreads;
      const int tile = smaller(first_tile + index / 8 % kTiles, last_tile);
      const int row = smaller(step * T::kStageInputs / kGroupSize + index / 8 / kTiles,
                              inputs / kGroupSize - 1);
      if (kScaleChunks % T::kThreads == 0 || index < kScaleChunks)
        copy16_async(slot + kCodeBytes + index * 16,
                     scales_zeros + static_cast<int64_t>(row) * outputs + tile * 32 + index % 8 * 4);
    }
  }

  // The A fragments of a warp. `load` brings what sub-step k needs into registers, `make` builds
  // its fragments; sub-step after sub-step, in turn.
  struct Fragments {
    // The plain variant has no registers to keep anything from one sub-step to the next.
    static constexpr bool kIsFresh = TURBOJET_PLAIN;

    int code_offset;
    int scale_offset;
    uint4 words[T::kWarpOutputs / 32];
    uint32_t pairs[T::kRowTiles][2];   // 64 + z | s << 16 of rows r and r + 8
    uint32_t zeros[T::kRowTiles][2];   // 1024 + z and 64 + z, twice
    uint32_t scales[T::kRowTiles][2];

    __device__ __forceinline__ Fragments(int warp_output, int lane)
        : code_offset(warp_output * 16 + lane * 16),
          scale_offset(kCodeBytes + (warp_output + lane / 4) * 4) {}

    __device__ __forceinline__ void load(const char* slot, int k) {
      if (kIsFresh || k % 2 == 0) {
#pragma unroll
        for (int i = 0; i < T::kWarpOutputs / 32; ++i)
          words[i] = *reinterpret_cast<const uint4*>(slot + code_offset + k / 2 * kTiles * 512 +
                                                     i * 512);
      }
      if (kIsFresh || k % kScaleSubSteps == 0) {
#pragma unroll
        for (int i = 0; i < 2 * T::kRowTiles; ++i)
          pairs[i / 2][i % 2] = *reinterpret_cast<const uint32_t*>(
              slot + scale_offset + k / kScaleSubSteps * T::kOutputs * 4 + i * 32);
      }
    }

    __device__ __forceinline__ void make(uint32_t (&a)[T::kRowTiles][4], int k) {
#pragma unroll
      for (int i = 0; i < T::kRowTiles; ++i) {
        if (kIsFresh || k % kScaleSubSteps == 0) {
          // fp16 64 + z is 0x5400 + 16 z, fp16 1024 + z is 0x6400 + z.
          const uint32_t twice = __byte_perm(pairs[i][0], 0, 0x1010);
          zeros[i][0] = mask_and_set<0x000f000fu, 0x64006400u>(twice >> 4);
          zeros[i][1] = __byte_perm(pairs[i][1], 0, 0x1010);
          scales[i][0] = __byte_perm(pairs[i][0], 0, 0x3232);
          scales[i][1] = __byte_perm(pairs[i][1], 0, 0x3232);
        }
        const uint4& quad = words[i / 2];
        const int index = k % 2 * 2 + i % 2;
        const uint32_t word = index == 0   ? quad.x
                              : index == 1 ? quad.y
                              : index == 2 ? quad.z
                                           : quad.w;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t shifted = word >> 8 * half;
          const uint32_t low = mask_and_set<0x000f000fu, 0x64006400u>(shifted);  // 1024 + q, row r
          const uint32_t high = mask_and_set<0x00f000f0u, 0x54005400u>(shifted);  // 64 + q, r + 8
          a[i][2 * half] = multiply_pairs(subtract_pairs(low, zeros[i][0]), scales[i][0]);
          a[i][2 * half + 1] = multiply_pairs(subtract_pairs(high, zeros[i][1]), scales[i][1]);
        }
      }
    }
  };
};

template <class T>
__device__ __forceinline__ void run_w4a16_gemm(const Destination& destination, const fp16* x,
                                               const uint4* codes, const uint32_t* scales_zeros,
                                               const Shape& shape, int stream_tiles) {
  run_gemm<T, QuantizedWeights<T>>(
      QuantizedWeights<T>{codes, scales_zeros, shape.inputs, shape.outputs}, x, shape, destination,
      stream_tiles);
}

}  // namespace

#endif
