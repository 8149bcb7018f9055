// The activations of the output head of head.cuh: rows of the residual stream, normed, in shared
// memory as the columns that weights are multiplied by.
#ifndef TURBOJET_HEAD_ROWS_CUH
#define TURBOJET_HEAD_ROWS_CUH

#include "common.cuh"

namespace {

#ifndef TURBOJET_HEAD_STAGES
#define TURBOJET_HEAD_STAGES 4
#endif
constexpr int kHeadWarps = 8;
constexpr int kHeadStages = TURBOJET_HEAD_STAGES;
constexpr int kHeadThreads = kHeadWarps * kWarpSize;
constexpr int kUnitBytes = 128;  // of a vocabulary row
constexpr int kTileRows = 16;
constexpr int kSlotBytes = kTileRows * kUnitBytes;
constexpr int kMaxRows = 8;
constexpr int kPartWords = 2048;  // of one buffer of sums
constexpr float kFixedPointMax = 32639.0f;  // 127 * 256 + 127: both digits fit int8

struct HeadArguments {
  float* logits;
  const float* residual;
  const int* rows;
  const fp16* norm_weight;
  const fp16* scales;  // of int8 weights
  int num_rows;
  int hidden_size;
  int vocab_size;
  float eps;
};

// Four loads of 16 bytes hold a unit of rows r and r + 8.
struct HalfFormat {
  static constexpr int kUnitInputs = 64;
  static constexpr int kBlocks = 1;  // column blocks of 8
  static constexpr int kRows = 8;
  static constexpr int kDigits = 1;  // columns of a row of activations
  using Sum = float;
  // Bytes of one column of activations in shared memory: neighbours are half a bank row apart.
  static __device__ __forceinline__ int pitch(int hidden_size) { return 2 * hidden_size + 64; }
};

template <int kBlocks_>
struct ByteFormat {
  static constexpr int kUnitInputs = 128;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kRows = 4 * kBlocks;
  static constexpr int kDigits = 2;
  using Sum = int;
  static __device__ __forceinline__ int pitch(int hidden_size) {
    return hidden_size + (hidden_size % 128 == 0 ? 64 : 0);
  }
};

// Sums over the block of one float for each row, and maxima of another.
struct RowStatistics {
  float square_sums[kHeadWarps][kMaxRows];
  float peaks[kHeadWarps][kMaxRows];
  float scales[kMaxRows];  // of the fixed point
};

// The rows of the residual stream that logits are asked for; the last one stands in for the others.
struct Rows {
  const float4* quads[kMaxRows];

  __device__ __forceinline__ explicit Rows(const HeadArguments& arguments) {
#pragma unroll
    for (int i = 0; i < kMaxRows; ++i) {
      const int own = smaller(i, arguments.num_rows - 1);
      const int row = arguments.rows == nullptr ? own : arguments.rows[own];
      quads[i] = reinterpret_cast<const float4*>(
          arguments.residual + static_cast<int64_t>(row) * arguments.hidden_size);
    }
  }

  // All loads before their first use.
  template <int kRows>
  __device__ __forceinline__ void load(float4 (&values)[kRows], int quad, int num_rows) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (i < num_rows) values[i] = quads[i][quad];
    }
  }
};

__device__ __forceinline__ float4 weighted(const float4& v, const uint2& w) {
  return float4{v.x * low_to_float(w.x), v.y * high_to_float(w.x), v.z * low_to_float(w.y),
                v.w * high_to_float(w.y)};
}

// Per row: 1 / rms, and the largest |n| of it.
__device__ __forceinline__ void measure_rows(float (&factors)[kMaxRows], float (&peaks)[kMaxRows],
                                             RowStatistics& shared, const Rows& rows,
                                             const HeadArguments& arguments) {
  const uint2* const norm = reinterpret_cast<const uint2*>(arguments.norm_weight);
  const int warp = threadIdx.x / kWarpSize;
  float sums[kMaxRows] = {};
#pragma unroll
  for (int i = 0; i < kMaxRows; ++i) peaks[i] = 0.0f;
  for (int quad = threadIdx.x; quad < arguments.hidden_size / 4; quad += kHeadThreads) {
    const uint2 w = norm[quad];
    float4 values[kMaxRows];
    rows.load(values, quad, arguments.num_rows);
#pragma unroll
    for (int i = 0; i < kMaxRows; ++i) {
      if (i < arguments.num_rows) {
        const float4& v = values[i];
        sums[i] += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
        const float4 n = weighted(v, w);
        peaks[i] = max_or_nan(peaks[i], max_or_nan(max_or_nan(fabsf(n.x), fabsf(n.y)),
                                                   max_or_nan(fabsf(n.z), fabsf(n.w))));
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kMaxRows; ++i) {
    if (i < arguments.num_rows) {
      const float sum = lanes_sum<kWarpSize>(sums[i]);
      // Magnitudes compare as integers do, NaN above all.
      const float peak = __uint_as_float(warp_max(__float_as_uint(peaks[i])));
      if (threadIdx.x % kWarpSize == 0) {
        shared.square_sums[warp][i] = sum;
        shared.peaks[warp][i] = peak;
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kMaxRows; ++i) {
    if (i < arguments.num_rows) {
      float sum = 0.0f;
      float peak = 0.0f;
#pragma unroll
      for (int other = 0; other < kHeadWarps; ++other) {
        sum += shared.square_sums[other][i];
        peak = max_or_nan(peak, shared.peaks[other][i]);
      }
      factors[i] = rsqrtf(sum / static_cast<float>(arguments.hidden_size) + arguments.eps);
      peaks[i] = peak * factors[i];
    }
  }
}

// Four values as two words of int8 digits: value = scale * (256 * high + low).
__device__ __forceinline__ void split_digits(uint32_t& high, uint32_t& low, const float4& v,
                                             float inverse) {
  // Added to 1.5 * 2^23 a value is rounded to an integer in the low bits. The 128 on top carries
  // one into the high digit where the low digit, -128..127, is to be negative.
  constexpr float kRounder = 12582912.0f + 128.0f;
  const uint32_t d0 = __float_as_uint(__fmaf_rn(v.x, inverse, kRounder));
  const uint32_t d1 = __float_as_uint(__fmaf_rn(v.y, inverse, kRounder));
  const uint32_t d2 = __float_as_uint(__fmaf_rn(v.z, inverse, kRounder));
  const uint32_t d3 = __float_as_uint(__fmaf_rn(v.w, inverse, kRounder));
  const uint32_t pair0 = __byte_perm(d0, d1, 0x5140);  // low 0, low 1, high 0, high 1
  const uint32_t pair1 = __byte_perm(d2, d3, 0x5140);
  low = __byte_perm(pair0, pair1, 0x5410) ^ 0x80808080u;
  high = __byte_perm(pair0, pair1, 0x7632);
}

// Writes the activations of all rows to shared memory, a column for each row or digit.
template <class Format>
__device__ __forceinline__ void prepare_rows(char* columns, RowStatistics& shared,
                                             const HeadArguments& arguments) {
  constexpr bool kIsByte = Format::kDigits == 2;
  float factors[kMaxRows];
  float peaks[kMaxRows];
  const Rows rows(arguments);
  measure_rows(factors, peaks, shared, rows, arguments);
  const int pitch = Format::pitch(arguments.hidden_size);
  const uint2* const norm = reinterpret_cast<const uint2*>(arguments.norm_weight);
  float inverses[Format::kRows];
#pragma unroll
  for (int i = 0; i < Format::kRows; ++i) {
    if (i >= arguments.num_rows) break;
    const bool is_zero = peaks[i] < 1e-30f;
    inverses[i] = is_zero ? 0.0f : __fdividef(kFixedPointMax, peaks[i]) * factors[i];
    if (kIsByte && threadIdx.x == 0)
      shared.scales[i] = is_zero ? 0.0f : peaks[i] * (1.0f / kFixedPointMax);
  }
  for (int quad = threadIdx.x; quad < arguments.hidden_size / 4; quad += kHeadThreads) {
    const uint2 w = norm[quad];
    float4 values[Format::kRows];
    rows.load(values, quad, arguments.num_rows);
#pragma unroll
    for (int i = 0; i < Format::kRows; ++i) {
      if (i >= arguments.num_rows) break;
      const float4 n = weighted(values[i], w);
      if (kIsByte) {
        uint32_t high, low;
        split_digits(high, low, n, inverses[i]);
        reinterpret_cast<uint32_t*>(columns + (2 * i) * pitch)[quad] = high;
        reinterpret_cast<uint32_t*>(columns + (2 * i + 1) * pitch)[quad] = low;
      } else {
        reinterpret_cast<uint2*>(columns + i * pitch)[quad] =
            uint2{pack_fp16(n.x * factors[i], n.y * factors[i]),
                  pack_fp16(n.z * factors[i], n.w * factors[i])};
      }
    }
  }
}

}  // namespace

#endif
