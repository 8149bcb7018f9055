// W4A16 dot products on integers: the part that the GEMV kernels for 1 and for 2-8 tokens share.
//
//   y[m] = sum over k of (q[k,m] - z[g,m]) * s[g,m] * x[k],   g = k div group_size
//
// Activations are held in 16-bit fixed point, one scale for each unit of 128 inputs:
//   x[k] = scale * (256 * high[k] + low[k]),   high and low int8,   |256 * high + low| <= 32639
// which is finer than fp16 for every value above 1/16 of the unit's largest. Weight codes are the
// unsigned operand just as they lie in memory: `word & 0x0f0f0f0f` is four codes of output row r,
// `word & 0xf0f0f0f0` is 16 times four codes of row r + 8. The products and their sums are exact
// 32-bit integers (at most 240 * 32639 * 128 < 2^31), so a result does not depend on how many
// tokens or which instructions made it; scale and zero are applied once per group.
//
// Weights are in TurboMind order (package_format/SPEC.md): a 32 x 32 tile is 512 bytes, one 16-byte
// load per lane, word (k16, m16) of lane (r, t) = row r of the eight low rows, inputs 2t, 2t + 8,
// 2t + 1, 2t + 9 of a sixteen: the A fragment of mma.m16n8k32 with its inputs permuted. The
// activations are permuted likewise when they are quantized.
//
// One warp computes 32 outputs ("tile") x 128 inputs ("unit") at a time.
#ifndef TURBOJET_W4A16_CUH
#define TURBOJET_W4A16_CUH

#include "common.cuh"

namespace {

constexpr int kUnitInputs = 128;
constexpr int kTileOutputs = 32;
constexpr int kTilesPerUnit = kUnitInputs / 32;
constexpr int kCodeBytesPerUnit = kUnitInputs * kTileOutputs / 2;
constexpr float kFixedPointMax = 32639.0f;  // 127 * 256 + 127: both digits fit int8

struct QuantizedMatrix {
  const uint4* codes;            // [inputs / 32][outputs / 32][32 lanes]
  const uint32_t* scales_zeros;  // [inputs / group_size][outputs]: fp16 64 + z | fp16 s << 16
  int inputs;
  int outputs;
};

// Bytes of one unit of weights in shared memory: codes, then scales_zeros of its groups.
template <int kGroupSize>
constexpr int kUnitBytes = kCodeBytesPerUnit + kUnitInputs / kGroupSize * kTileOutputs * 4;

// Activations of one unit, quantized: 16-byte chunks [blocks of 4 tokens][2][columns][4 lanes].
// Column 2i holds the high digits of token i of the block, column 2i + 1 the low ones.
template <int kTokens>
constexpr int kActivationBytes = 2 * kTokens * kUnitInputs;

// Walks the units of one warp: those of a tile, `stride` units apart, then those of the block's next
// tile, and starts copying each to shared memory.
template <int kGroupSize>
struct UnitStream {
  static constexpr int kGroups = kUnitInputs / kGroupSize;

  const char* codes;   // this lane's 16 bytes of the unit's first tile
  const char* scales;  // this lane's 16 bytes of the unit's scales, for lane < 8 * kGroups
  int unit;
  int tile;

  __device__ __forceinline__ void seek(const QuantizedMatrix& matrix, int new_tile, int new_unit,
                                       int lane) {
    tile = new_tile;
    unit = new_unit;
    const int64_t row_bytes = static_cast<int64_t>(matrix.outputs) * 16;
    codes = reinterpret_cast<const char*>(matrix.codes) + unit * (kTilesPerUnit * row_bytes) +
            tile * 512 + lane * 16;
    scales = reinterpret_cast<const char*>(matrix.scales_zeros) +
             (static_cast<int64_t>(unit) * kGroups + lane / 8) * matrix.outputs * 4 + tile * 128 +
             lane % 8 * 16;
  }

  // Inputs past the end are not copied: their activations are zero, and a group past the end gets
  // the scales of the first one, which are finite.
  __device__ __forceinline__ void copy_async(char* slot, const QuantizedMatrix& matrix,
                                             int lane) const {
    const int64_t row_bytes = static_cast<int64_t>(matrix.outputs) * 16;
#pragma unroll
    for (int j = 0; j < kTilesPerUnit; ++j) {
      // With groups of 128 a unit is never cut short.
      if (kGroupSize == 128 || j == 0 || unit * kUnitInputs + j * 32 < matrix.inputs)
        copy16_async(slot + j * 512 + lane * 16, codes + j * row_bytes);
    }
    if (lane < 8 * kGroups) {
      const bool is_inside =
          kGroupSize == 128 || unit * kUnitInputs + lane / 8 * kGroupSize < matrix.inputs;
      copy16_async(slot + kCodeBytesPerUnit + lane * 16,
                   is_inside ? scales : reinterpret_cast<const char*>(matrix.scales_zeros));
    }
  }

  __device__ __forceinline__ void advance(const QuantizedMatrix& matrix, int units, int first_unit,
                                          int stride, int lane) {
    unit += stride;
    codes += stride * kTilesPerUnit * static_cast<int64_t>(matrix.outputs) * 16;
    scales += stride * kGroups * static_cast<int64_t>(matrix.outputs) * 4;
    if (unit >= units) seek(matrix, tile + gridDim.x, first_unit, lane);
  }
};

__device__ __forceinline__ uint32_t word_of(const uint4& words, int index) {
  return index == 0 ? words.x : index == 1 ? words.y : index == 2 ? words.z : words.w;
}

// Sums of one group of a unit, for the two sixteen-row halves of the tile:
// sums[half][0] and [1] start as and become the high and low digit sums of row r (codes), [2] and
// [3] those of row r + 8 (16 * codes). A lane (r = lane / 4, t = lane % 4) ends with token
// 4 * block + t; with one token every lane of a row holds the same.
template <int kTokens, int kFirst, int kCount>
__device__ __forceinline__ void group_sums(int (&sums)[2][4], const uint4 (&codes)[kTilesPerUnit],
                                           const uint4* activations, int block, int lane) {
  constexpr int kColumns = kTokens < 4 ? 2 * kTokens : 8;
#if !TURBOJET_PLAIN
  const int column = (lane / 4) % kColumns;
#pragma unroll
  for (int j = kFirst; j < kFirst + kCount; ++j) {
    const uint4 b = activations[((block * 2 + j / 2) * kColumns + column) * 4 + lane % 4];
    const uint32_t b0 = word_of(b, j % 2 * 2);
    const uint32_t b1 = word_of(b, j % 2 * 2 + 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t first = word_of(codes[j], half);
      const uint32_t second = word_of(codes[j], 2 + half);
      mma_u8_s8(sums[half], first & 0x0f0f0f0fu, first & 0xf0f0f0f0u, second & 0x0f0f0f0fu,
                second & 0xf0f0f0f0u, b0, b1);
    }
  }
#else
  // Each lane sums the inputs of its own t for every token, then the four lanes of a row add up.
#pragma unroll
  for (int token = 0; token < (kTokens < 4 ? kTokens : 4); ++token) {
    int part[2][4] = {};
#pragma unroll
    for (int j = kFirst; j < kFirst + kCount; ++j) {
#pragma unroll
      for (int digit = 0; digit < 2; ++digit) {
        const uint4 b =
            activations[((block * 2 + j / 2) * kColumns + 2 * token + digit) * 4 + lane % 4];
#pragma unroll
        for (int k16 = 0; k16 < 2; ++k16) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t word = word_of(codes[j], 2 * k16 + half);
            const uint32_t digits = word_of(b, j % 2 * 2 + k16);
            part[half][digit] = dot4_u8_s8(word & 0x0f0f0f0fu, digits, part[half][digit]);
            part[half][2 + digit] = dot4_u8_s8(word & 0xf0f0f0f0u, digits, part[half][2 + digit]);
          }
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int total = lanes_sum<4>(part[half][i]);
        if (kTokens == 1 || lane % 4 == token) sums[half][i] += total;
      }
    }
  }
#endif
}

// The activations of one unit as the dot product needs them.
struct UnitActivations {
  const uint4* chunks;         // kActivationBytes<kTokens>
  const float* scales;         // [kTokens]
  const int* negated_sums;     // [groups of the unit][kTokens]: -sum of the fixed-point values
};

// y[block][i] += the unit's share of row (r, r + 8, r + 16, r + 24)[i] for token 4 * block + t.
// Rows 1 and 3 are kept 16 times too large; `row_scale` undoes it once at the end.
template <int kTokens, int kGroupSize>
__device__ __forceinline__ void add_unit(float (&y)[(kTokens + 3) / 4][4],
                                         const char* weights, const UnitActivations& x, int lane) {
  constexpr int kGroups = kUnitInputs / kGroupSize;
  uint4 codes[kTilesPerUnit];
#pragma unroll
  for (int j = 0; j < kTilesPerUnit; ++j)
    codes[j] = *reinterpret_cast<const uint4*>(weights + j * 512 + lane * 16);
  constexpr int kTilesPerGroup = kTilesPerUnit / kGroups;
#pragma unroll
  for (int block = 0; block < (kTokens + 3) / 4; ++block) {
    const int token = kTokens == 1 ? 0 : block * 4 + lane % 4;
    const float x_scale = x.scales[token];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint32_t pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        pairs[i] = *reinterpret_cast<const uint32_t*>(weights + kCodeBytesPerUnit + group * 128 +
                                                      (lane / 4 + 8 * i) * 4);
      const int negated_sum = x.negated_sums[group * kTokens + token];
      // The low half of a pair is 0x5400 + 16 * z.
      int sums[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sums[half][0] = 0;
        sums[half][1] = static_cast<int>(pairs[2 * half] >> 4 & 15u) * negated_sum;
        sums[half][2] = 0;
        sums[half][3] = static_cast<int>(pairs[2 * half + 1] & 0xf0u) * negated_sum;
      }
      if (group == 0)
        group_sums<kTokens, 0, kTilesPerGroup>(sums, codes, x.chunks, block, lane);
      if (group == 1)
        group_sums<kTokens, kTilesPerGroup % 4, kTilesPerGroup>(sums, codes, x.chunks, block, lane);
      if (group == 2)
        group_sums<kTokens, kTilesPerGroup * 2 % 4, kTilesPerGroup>(sums, codes, x.chunks, block,
                                                                    lane);
      if (group == 3)
        group_sums<kTokens, kTilesPerGroup * 3 % 4, kTilesPerGroup>(sums, codes, x.chunks, block,
                                                                    lane);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int total = sums[half][2 * i] * 256 + sums[half][2 * i + 1];
          const float scale = high_to_float(pairs[2 * half + i]) * x_scale;
          y[block][2 * half + i] += static_cast<float>(total) * scale;
        }
      }
    }
  }
}

// Undoes the factor 16 of rows r + 8 and r + 24.
__device__ __forceinline__ float row_scale(int row_index) {
  return row_index % 2 ? 0.0625f : 1.0f;
}

}  // namespace

#endif
