// Logits of the next token for up to 8 rows: the last norm and the output head in one.
//
//   logits[i,v] = scale[v] * sum_k weights[v,k] n[i,k]          (scale 1 for fp16 weights)
//   n[i,k] = residual[rows[i],k] * norm_weight[k] / sqrt(mean_k(residual[rows[i]]^2) + eps)
//
//   logits fp32 [num_rows][vocab_size]; residual fp32 [num_tokens][hidden_size]; rows int32
//   [num_rows] or null for rows 0, 1, ...; norm_weight fp16 [hidden_size]; weights fp16 or int8
//   [vocab_size][hidden_size]; scales fp16 [vocab_size], of int8 weights.
// fp16 weights: n is rounded to fp16. int8 weights: n is held in 16-bit fixed point, two int8
// digits with one scale for each row, and the sums over k are exact integers.
// Launch: block kHeadThreads, any grid (one block per SM), dynamic shared memory of table.py's
// HeadShape. 1 <= num_rows <= 8 (or 4); hidden_size % 64 == 0, at most 65536 for int8.
// Bound by DRAM: vocab_size * hidden_size * 2 bytes (or 1).
// Checked against reference/linear.py head, relative error 1e-3. A row's result does not depend on
// num_rows, bit for bit.
//
// A block owns a range of tiles of 16 vocabulary rows. The slabs of 64 inputs of all its tiles, tile
// after tile, are shared out among its warps in equal runs, so that only the ends of runs have to be
// added up across warps. A lane loads 16 bytes of its two rows at a time, kDepth slabs ahead and
// before the previous kernel has finished (programmatic dependent launch); these bytes are parts of
// two A fragments whose inputs are permuted, and the activations are taken in the same order.
#ifndef TURBOJET_HEAD_CUH
#define TURBOJET_HEAD_CUH

#include "fragments.cuh"
#include "signed_products.cuh"

namespace {

constexpr int kHeadWarps = 16;
constexpr int kHeadThreads = kHeadWarps * kWarpSize;
constexpr int kSlabInputs = 64;
constexpr int kTileRows = 16;
constexpr int kMaxRows = 8;
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

// Four loads of 16 bytes hold 64 inputs of rows r and r + 8.
struct HalfFormat {
  static constexpr int kLoads = 2;  // for each of the two rows
  static constexpr int kRowBytes = 2 * kSlabInputs;
  static constexpr int kBlocks = 1;  // column blocks of 8
  static constexpr int kRows = 8;
  using Sum = float;
  // Bytes of one column of activations in shared memory: neighbours are half a bank row apart.
  static __device__ __forceinline__ int pitch(int hidden_size) { return 2 * hidden_size + 64; }
};

template <int kBlocks_>
struct ByteFormat {
  static constexpr int kLoads = 1;
  static constexpr int kRowBytes = kSlabInputs;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kRows = 4 * kBlocks;
  using Sum = int;
  static __device__ __forceinline__ int pitch(int hidden_size) {
    return hidden_size + (hidden_size % 128 == 0 ? 64 : 0);
  }
};

__device__ __forceinline__ void multiply_quads(float (&sums)[4], const uint4& low, const uint4& high,
                                               const uint4& x) {
  multiply(sums, low.x, high.x, low.y, high.y, x.x, x.y);
  multiply(sums, low.z, high.z, low.w, high.w, x.z, x.w);
}

__device__ __forceinline__ void multiply_quads(int (&sums)[4], const uint4& low, const uint4& high,
                                               const uint4& x) {
  multiply_signed(sums, low.x, high.x, low.y, high.y, x.x, x.y);
  multiply_signed(sums, low.z, high.z, low.w, high.w, x.z, x.w);
}

// Sums over the block of one float for each row, and maxima of another.
struct RowStatistics {
  float square_sums[kHeadWarps][kMaxRows];
  float peaks[kHeadWarps][kMaxRows];
  float scales[kMaxRows];  // of the fixed point
};

template <class Format>
struct HeadMemory {
  typename Format::Sum parts[kHeadWarps][2][Format::kBlocks * 4][kWarpSize];
  RowStatistics statistics;
};

// One slab of a tile in registers.
template <class Format>
struct Slab {
  uint4 words[2][Format::kLoads];
};

// The run of slabs that one warp multiplies.
template <class Format>
struct Run {
  int slabs;  // of a tile
  int begin;
  int end;
  int first_tile;

  static __device__ __forceinline__ int begin_of(int warp, int work) {
    return static_cast<int>(static_cast<int64_t>(work) * warp / kHeadWarps);
  }
  static __device__ __forceinline__ int warp_of(int slab, int work) {
    return static_cast<int>((static_cast<int64_t>(kHeadWarps) * (slab + 1) - 1) / work);
  }
};

// Loads slab after slab of a run; rows past the last one repeat it.
template <class Format>
struct SlabReader {
  const char* low;
  const char* high;
  int slab;  // in its tile
  int left;  // of the run
  int tile;

  __device__ __forceinline__ void seek_tile(const char* weights, int hidden_size, int vocab_size,
                                            int lane) {
    constexpr int kElementBytes = Format::kRowBytes / kSlabInputs;
    const int row = tile * kTileRows + lane / 4;
    const int64_t row_bytes = static_cast<int64_t>(hidden_size) * kElementBytes;
    const int64_t offset = slab * Format::kRowBytes + lane % 4 * 16;
    low = weights + smaller(row, vocab_size - 1) * row_bytes + offset;
    high = weights + smaller(row + 8, vocab_size - 1) * row_bytes + offset;
  }

  __device__ __forceinline__ void read(Slab<Format>& target, const char* weights, int hidden_size,
                                       int vocab_size, int lane) {
    if (left <= 0) return;
#pragma unroll
    for (int j = 0; j < Format::kLoads; ++j) {
      target.words[0][j] = load_streaming(reinterpret_cast<const uint4*>(low + j * 64));
      target.words[1][j] = load_streaming(reinterpret_cast<const uint4*>(high + j * 64));
    }
    --left;
    low += Format::kRowBytes;
    high += Format::kRowBytes;
    if (++slab == hidden_size / kSlabInputs) {
      slab = 0;
      ++tile;
      seek_tile(weights, hidden_size, vocab_size, lane);
    }
  }
};

__device__ __forceinline__ const float* residual_row(const HeadArguments& arguments, int i) {
  const int row = arguments.rows == nullptr ? i : arguments.rows[i];
  return arguments.residual + static_cast<int64_t>(row) * arguments.hidden_size;
}

__device__ __forceinline__ float4 weighted(const float4& v, const uint2& w) {
  return float4{v.x * low_to_float(w.x), v.y * high_to_float(w.x), v.z * low_to_float(w.y),
                v.w * high_to_float(w.y)};
}

// Per row: 1 / rms, and the largest |n| of it.
__device__ __forceinline__ void measure_rows(float (&factors)[kMaxRows], float (&peaks)[kMaxRows],
                                             RowStatistics& shared, const HeadArguments& arguments) {
  const uint2* const norm = reinterpret_cast<const uint2*>(arguments.norm_weight);
  const int warp = threadIdx.x / kWarpSize;
  float sums[kMaxRows] = {};
#pragma unroll
  for (int i = 0; i < kMaxRows; ++i) peaks[i] = 0.0f;
  for (int quad = threadIdx.x; quad < arguments.hidden_size / 4; quad += kHeadThreads) {
    const uint2 w = norm[quad];
#pragma unroll
    for (int i = 0; i < kMaxRows; ++i) {
      if (i < arguments.num_rows) {
        const float4 v = reinterpret_cast<const float4*>(residual_row(arguments, i))[quad];
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
  constexpr bool kIsByte = Format::kRowBytes == kSlabInputs;
  float factors[kMaxRows];
  float peaks[kMaxRows];
  measure_rows(factors, peaks, shared, arguments);
  const int pitch = Format::pitch(arguments.hidden_size);
  const uint2* const norm = reinterpret_cast<const uint2*>(arguments.norm_weight);
#pragma unroll
  for (int i = 0; i < Format::kRows; ++i) {
    if (i >= arguments.num_rows) break;
    const float4* const row = reinterpret_cast<const float4*>(residual_row(arguments, i));
    const bool is_zero = peaks[i] < 1e-30f;
    const float inverse = is_zero ? 0.0f : __fdividef(kFixedPointMax, peaks[i]) * factors[i];
    if (kIsByte && threadIdx.x == 0)
      shared.scales[i] = is_zero ? 0.0f : peaks[i] * (1.0f / kFixedPointMax);
    for (int quad = threadIdx.x; quad < arguments.hidden_size / 4; quad += kHeadThreads) {
      const float4 n = weighted(row[quad], norm[quad]);
      if (kIsByte) {
        uint32_t high, low;
        split_digits(high, low, n, inverse);
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

__device__ __forceinline__ void store_sums(const float (&sums)[1][4], const HeadArguments& arguments,
                                           const RowStatistics&, int tile, int lane) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int i = lane % 4 * 2 + c % 2;
    const int vocab_row = tile * kTileRows + lane / 4 + c / 2 * 8;
    if (i < arguments.num_rows && vocab_row < arguments.vocab_size)
      arguments.logits[static_cast<int64_t>(i) * arguments.vocab_size + vocab_row] = sums[0][c];
  }
}

template <int kBlocks>
__device__ __forceinline__ void store_sums(const int (&sums)[kBlocks][4],
                                           const HeadArguments& arguments,
                                           const RowStatistics& statistics, int tile, int lane) {
#pragma unroll
  for (int block = 0; block < kBlocks; ++block) {
    const int i = block * 4 + lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int vocab_row = tile * kTileRows + lane / 4 + half * 8;
      if (i < arguments.num_rows && vocab_row < arguments.vocab_size) {
        const float total = __fmaf_rn(static_cast<float>(sums[block][2 * half]), 256.0f,
                                      static_cast<float>(sums[block][2 * half + 1]));
        arguments.logits[static_cast<int64_t>(i) * arguments.vocab_size + vocab_row] =
            total * (statistics.scales[i] * to_float(arguments.scales[vocab_row]));
      }
    }
  }
}

template <class Format, int kDepth>
__device__ __forceinline__ void run_head(const char* weights, const HeadArguments& arguments) {
  using Sum = typename Format::Sum;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  HeadMemory<Format>& memory = *dynamic_shared<HeadMemory<Format>>();
  char* const columns = dynamic_shared<char>() + sizeof(HeadMemory<Format>);

  const int slabs = arguments.hidden_size / kSlabInputs;
  const int num_tiles = (arguments.vocab_size + kTileRows - 1) / kTileRows;
  const int first_tile = static_cast<int>(static_cast<int64_t>(num_tiles) * blockIdx.x / gridDim.x);
  const int end_tile = static_cast<int>(static_cast<int64_t>(num_tiles) * (blockIdx.x + 1) / gridDim.x);
  const int work = (end_tile - first_tile) * slabs;
  const int begin = Run<Format>::begin_of(warp, work);
  const int end = Run<Format>::begin_of(warp + 1, work);

  let_dependents_launch();
  SlabReader<Format> reader;
  reader.tile = first_tile + begin / slabs;
  reader.slab = begin % slabs;
  reader.left = end - begin;
  reader.seek_tile(weights, arguments.hidden_size, arguments.vocab_size, lane);
  Slab<Format> ahead[kDepth];
#pragma unroll
  for (int depth = 0; depth < kDepth; ++depth)
    reader.read(ahead[depth], weights, arguments.hidden_size, arguments.vocab_size, lane);
  wait_for_inputs();
  prepare_rows<Format>(columns, memory.statistics, arguments);
  __syncthreads();

  // Columns without a row repeat another one; what they give is not stored.
  const int num_columns = Format::kLoads == 1 ? 2 * arguments.num_rows : arguments.num_rows;
  const int pitch = Format::pitch(arguments.hidden_size);
  int column_offset[Format::kBlocks];
#pragma unroll
  for (int block = 0; block < Format::kBlocks; ++block)
    column_offset[block] = (block * 8 + lane / 4) % num_columns * pitch + lane % 4 * 16;

  int tile = first_tile + begin / slabs;
  int slab = begin % slabs;
  bool is_from_start = slab == 0;
  Sum sums[Format::kBlocks][4] = {};
#pragma unroll 1
  for (int item = begin; item < end; item += kDepth) {
#pragma unroll
    for (int depth = 0; depth < kDepth; ++depth) {
      if (item + depth >= end) break;
#pragma unroll
      for (int j = 0; j < Format::kLoads; ++j) {
#pragma unroll
        for (int block = 0; block < Format::kBlocks; ++block) {
          const uint4 x = *reinterpret_cast<const uint4*>(columns + column_offset[block] +
                                                          slab * Format::kRowBytes + j * 64);
          multiply_quads(sums[block], ahead[depth].words[0][j], ahead[depth].words[1][j], x);
        }
      }
      reader.read(ahead[depth], weights, arguments.hidden_size, arguments.vocab_size, lane);
      ++slab;
      const bool is_whole = slab == slabs;
      if (is_whole || item + depth + 1 == end) {
        if (is_whole && is_from_start) {
          store_sums(sums, arguments, memory.statistics, tile, lane);
        } else {
#pragma unroll
          for (int c = 0; c < 4 * Format::kBlocks; ++c)
            memory.parts[warp][is_from_start][c][lane] = sums[c / 4][c % 4];
        }
#pragma unroll
        for (int c = 0; c < 4 * Format::kBlocks; ++c) sums[c / 4][c % 4] = 0;
        slab = 0;
        ++tile;
        is_from_start = true;
      }
    }
  }
  __syncthreads();
  // Tiles that several warps have worked on.
#pragma unroll 1
  for (int index = warp; index < end_tile - first_tile; index += kHeadWarps) {
    const int first = Run<Format>::warp_of(index * slabs, work);
    const int last = Run<Format>::warp_of((index + 1) * slabs - 1, work);
    if (first == last) continue;
#pragma unroll 1
    for (int other = first; other <= last; ++other) {
      if (Run<Format>::begin_of(other, work) == Run<Format>::begin_of(other + 1, work)) continue;
#pragma unroll
      for (int c = 0; c < 4 * Format::kBlocks; ++c)
        sums[c / 4][c % 4] += memory.parts[other][other == first][c][lane];
    }
    store_sums(sums, arguments, memory.statistics, first_tile + index, lane);
#pragma unroll
    for (int c = 0; c < 4 * Format::kBlocks; ++c) sums[c / 4][c % 4] = 0;
  }
}

}  // namespace

#endif
