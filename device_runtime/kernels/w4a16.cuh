// W4A16 dot products on integers: the part that the GEMV kernels for 1 and for 2-8 tokens share.
//
//   y[m] = sum over k of (q[k,m] - z[g,m]) * s[g,m] * x[k],   g = k div group_size
//
// Activations are held in 16-bit fixed point, one scale for each stretch of 128 inputs:
//   x[k] = scale * (256 * high[k] + low[k]),   high and low int8,   |256 * high + low| <= 32639
// which is finer than fp16 for every value above 1/16 of the stretch's largest. Weight codes are
// the unsigned operand just as they lie in memory: `word & 0x0f0f0f0f` is four codes of output row
// r, the bytes of `word` are these and 16 times the codes of row r + 8. Products and their sums are
// exact 32-bit integers (at most 255 * 32639 * 128 < 2^31), so a result does not depend on how many
// tokens or which instructions made it; scale and zero are applied once per group.
//
// Weights are in TurboMind order (package_format/SPEC.md): a 32 x 32 tile is 512 bytes, one 16-byte
// load per lane, word (k16, m16) of lane (r, t) = row r of the eight low rows, inputs 2t, 2t + 8,
// 2t + 1, 2t + 9 of a sixteen: the A fragment of mma.m16n8k32 with its inputs permuted. The
// activations are permuted likewise when they are quantized.
//
// One warp computes 32 outputs ("tile") x 256 inputs ("unit": two stretches) at a time.
#ifndef TURBOJET_W4A16_CUH
#define TURBOJET_W4A16_CUH

#include "common.cuh"

namespace {

constexpr int kStretchInputs = 128;
constexpr int kUnitStretches = 2;
constexpr int kUnitInputs = kUnitStretches * kStretchInputs;
constexpr int kTileOutputs = 32;
constexpr int kTileBytes = 32 * kTileOutputs / 2;
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

// Activations of one stretch, quantized: 16-byte chunks [blocks of 4 tokens][2][columns][4 lanes],
// where column 2i holds the high digits of token i of the block and column 2i + 1 the low ones;
// then float scales [kTokens] and int negated sums [groups][kTokens].
template <int kTokens, int kGroupSize>
struct StretchActivations {
  static constexpr int kGroups = kStretchInputs / kGroupSize;
  static constexpr int kDigitBytes = 2 * kTokens * kStretchInputs;
  static constexpr int kBytes = (kDigitBytes + (1 + kGroups) * kTokens * 4 + 15) / 16 * 16;

  char* base;

  __device__ __forceinline__ uint4* chunks() const { return reinterpret_cast<uint4*>(base); }
  __device__ __forceinline__ float& scale(int token) const {
    return reinterpret_cast<float*>(base + kDigitBytes)[token];
  }
  __device__ __forceinline__ int& negated_sum(int group, int token) const {
    return reinterpret_cast<int*>(base + kDigitBytes)[(1 + group) * kTokens + token];
  }
};

// Where a lane's bytes of some stretches of a tile lie in memory, in chunks of 16 bytes.
template <int kGroupSize>
struct WeightSource {
  static constexpr int kStretchTiles = kStretchInputs / 32;
  static constexpr int kStretchGroups = kStretchInputs / kGroupSize;

  uint32_t codes;   // of the first 32 inputs
  uint32_t scales;  // of group lane / 8

  __device__ __forceinline__ WeightSource(const QuantizedMatrix& matrix, int tile, int stretch,
                                          int lane)
      : codes(lane), scales(lane / 8 * (matrix.outputs / 4) + lane % 8) {
    move(matrix, tile, stretch);
  }

  __device__ __forceinline__ void move(const QuantizedMatrix& matrix, int tiles, int stretches) {
    codes += stretches * (kStretchTiles * matrix.outputs) + tiles * 32;
    scales += stretches * (kStretchGroups * matrix.outputs / 4) + tiles * (kTileOutputs / 4);
  }

  // Starts the copy of stretches kFirst to kFirst + kCount of a unit, where this is, to their
  // places in shared memory. `inputs_left` are the matrix's from the unit on. Groups past the end
  // are not copied: their activations are zero, and their scales those of the unit's first group,
  // which are finite.
  template <int kFirst, int kCount>
  __device__ __forceinline__ void copy_async(char* slot, const QuantizedMatrix& matrix,
                                             int inputs_left, uint64_t policy, int lane) const {
    constexpr int kFirstTile = kFirst * kStretchTiles;
    constexpr int kFirstGroup = kFirst * kStretchGroups;
    constexpr int kGroups = kCount * kStretchGroups;
    const CopyTarget target = copy_target(slot + lane * 16, lane);
    const uint4* row = matrix.codes + codes;
#pragma unroll
    for (int j = kFirstTile; j < kFirstTile + kCount * kStretchTiles; ++j, row += matrix.outputs) {
      if (j < kGroupSize / 32 || j / (kGroupSize / 32) * kGroupSize < inputs_left)
        copy16_weights_async(target, j * kTileBytes, row, policy);
    }
    const uint4* const pairs = reinterpret_cast<const uint4*>(matrix.scales_zeros) + scales;
#pragma unroll
    for (int i = 0; i < kGroups; i += 4) {
      const int group = kFirstGroup + i + lane / 8;
      const int back = group * kGroupSize < inputs_left ? i : i - group;
      if (i + lane / 8 < kGroups)
        copy16_weights_async(target, kCodeBytesPerUnit + (kFirstGroup + i) * 128,
                             pairs + static_cast<int64_t>(matrix.outputs / 4) * back, policy);
    }
  }
};

__device__ __forceinline__ uint32_t word_of(const uint4& words, int index) {
  return index == 0 ? words.x : index == 1 ? words.y : index == 2 ? words.z : words.w;
}

// The plain variant has more instructions for a row of inputs and would run out of registers.
constexpr int kRowUnroll = TURBOJET_PLAIN ? 1 : 4;

// Tokens are taken in blocks of four, because a fragment has eight columns for two digits each.
template <int kTokens>
constexpr int kTokenBlocks = (kTokens + 3) / 4;

template <int kTokens>
constexpr int kColumns = kTokens < 4 ? 2 * kTokens : 8;

// The digits of a stretch as a warp multiplies by them. Default: the lane's B fragments, in
// registers. Plain: where they are.
template <int kTokens>
struct StretchDigits {
#if !TURBOJET_PLAIN
  uint4 words[kTokenBlocks<kTokens>][2];  // [][pair of 32 x 32 tiles]

  __device__ __forceinline__ void load(const uint4* chunks, int lane) {
    const int column = (lane / 4) % kColumns<kTokens>;
#pragma unroll
    for (int block = 0; block < kTokenBlocks<kTokens>; ++block) {
#pragma unroll
      for (int pair = 0; pair < 2; ++pair)
        words[block][pair] =
            chunks[((block * 2 + pair) * kColumns<kTokens> + column) * 4 + lane % 4];
    }
  }
#else
  const uint4* chunks;

  __device__ __forceinline__ void load(const uint4* chunks_, int) { chunks = chunks_; }
#endif
};

// Adds 32 inputs x 32 outputs to the sums of a group: sums[block][0] are those of the low halves of
// the code bytes, sums[block][1] those of whole bytes, each (row r high digit, row r low digit, row
// r + 16 high, low). A whole byte is the row's code and 16 times that of the row 8 further on. So
// words are operands just as they come from memory, and four masks make the others. A lane
// (r = lane / 4, t = lane % 4) holds token 4 * block + t; with one token every lane of a row holds
// the same. `inputs_index` is the place of the 32 inputs in the stretch.
template <int kTokens>
__device__ __forceinline__ void add_products(int (&sums)[kTokenBlocks<kTokens>][2][4],
                                             const uint4& codes,
                                             const StretchDigits<kTokens>& digits,
                                             int inputs_index, int lane) {
  constexpr uint32_t kLow = 0x0f0f0f0fu;
#if !TURBOJET_PLAIN
  const uint4 low{codes.x & kLow, codes.y & kLow, codes.z & kLow, codes.w & kLow};
#pragma unroll
  for (int block = 0; block < kTokenBlocks<kTokens>; ++block) {
    const uint4& words = digits.words[block][inputs_index / 2];
    const uint32_t first = word_of(words, inputs_index % 2 * 2);
    const uint32_t second = word_of(words, inputs_index % 2 * 2 + 1);
    mma_u8_s8(sums[block][0], low.x, low.y, low.z, low.w, first, second);
    mma_u8_s8(sums[block][1], codes.x, codes.y, codes.z, codes.w, first, second);
  }
#else
  // Each lane sums the inputs of its own t for every token, then the four lanes of a row add up.
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int part[2][2] = {};
#pragma unroll
      for (int digit = 0; digit < 2; ++digit) {
        const int column = token % 4 * 2 + digit;
        const int chunk = (token / 4 * 2 + inputs_index / 2) * kColumns<kTokens> + column;
        const uint4 words = digits.chunks[chunk * 4 + lane % 4];
#pragma unroll
        for (int k16 = 0; k16 < 2; ++k16) {
          const uint32_t word = word_of(codes, 2 * k16 + half);
          const uint32_t digit_word = word_of(words, inputs_index % 2 * 2 + k16);
          part[0][digit] = dot4_u8_s8(word & kLow, digit_word, part[0][digit]);
          part[1][digit] = dot4_u8_s8(word, digit_word, part[1][digit]);
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int total = lanes_sum<4>(part[i / 2][i % 2]);
        if (kTokens == 1 || lane % 4 == token % 4)
          sums[token / 4][i / 2][2 * half + i % 2] += total;
      }
    }
  }
#endif
}

// y[block][i] += the stretch's share of row (r, r + 8, r + 16, r + 24)[i] for token 4 * block + t.
// Rows 1 and 3 are kept 16 times too large; `row_scale` undoes it once at the end.
template <int kTokens, int kGroupSize>
__device__ __forceinline__ void add_stretch(float (&y)[kTokenBlocks<kTokens>][4],
                                            const char* codes, const char* scales,
                                            const StretchDigits<kTokens>& digits,
                                            const StretchActivations<kTokens, kGroupSize>& x,
                                            int lane) {
  constexpr int kTilesPerGroup = kGroupSize / 32;
#pragma unroll kRowUnroll
  for (int group = 0; group < kStretchInputs / kGroupSize; ++group) {
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      pairs[i] = *reinterpret_cast<const uint32_t*>(scales + group * 128 + (lane / 4 + 8 * i) * 4);
    int sums[kTokenBlocks<kTokens>][2][4] = {};
#pragma unroll kRowUnroll
    for (int j = group * kTilesPerGroup; j < (group + 1) * kTilesPerGroup; ++j) {
      const uint4 words = *reinterpret_cast<const uint4*>(codes + j * kTileBytes + lane * 16);
      add_products<kTokens>(sums, words, digits, j, lane);
    }
#pragma unroll
    for (int block = 0; block < kTokenBlocks<kTokens>; ++block) {
      const int token = kTokens == 1 ? 0 : block * 4 + lane % 4;
      const float x_scale = x.scale(token);
      const int negated_sum = x.negated_sum(group, token);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int low = sums[block][0][2 * half] * 256 + sums[block][0][2 * half + 1];
        const int whole = sums[block][1][2 * half] * 256 + sums[block][1][2 * half + 1];
        // The low half of a pair is 0x5400 + 16 * z.
        const int totals[2] = {
            static_cast<int>(pairs[2 * half] >> 4 & 15u) * negated_sum + low,
            static_cast<int>(pairs[2 * half + 1] & 0xf0u) * negated_sum + (whole - low)};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float scale = high_to_float(pairs[2 * half + i]) * x_scale;
          y[block][2 * half + i] =
              __fmaf_rn(static_cast<float>(totals[i]), scale, y[block][2 * half + i]);
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
