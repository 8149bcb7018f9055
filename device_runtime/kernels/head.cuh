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
// Launch: block kHeadThreads, any grid, dynamic shared memory of head_shape.py's HeadShape.
// 1 <= num_rows <= 8 (or 4); hidden_size % 64 == 0, at most 65536 for int8.
// Bound by DRAM: vocab_size * hidden_size * 2 bytes (or 1).
// Checked against reference/linear.py head, relative error 1e-3. A row's result does not depend on
// num_rows and the grid, bit for bit.
//
// A block owns a range of tiles of 16 vocabulary rows. The units of all its tiles (128 bytes of each
// row), tile after tile, are dealt out to its warps in turn, so that neighbouring units are read at
// the same time. Each warp keeps kHeadStages units in flight through a private ring in shared memory,
// which it fills before the previous kernel has finished (programmatic dependent launch). A lane
// takes 16 bytes of its two rows at a time; these bytes are parts of two A fragments whose inputs are
// permuted, and the activations are taken in the same order. The warps' sums of a batch of tiles meet
// in shared memory, in two buffers by turns.
#ifndef TURBOJET_HEAD_CUH
#define TURBOJET_HEAD_CUH

#include "fragments.cuh"
#include "load_matrix.cuh"
#include "signed_products.cuh"

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

struct HeadMemory {
  char ring[kHeadWarps][kHeadStages][kSlotBytes];
  uint32_t parts[2][kPartWords];  // [tile of the batch][warp][row of activations, digit][tile row]
  RowStatistics statistics;
};

// The units of a block's tiles as one row; a warp takes every kHeadWarps-th of them.
struct Cursor {
  int tile;  // of the block
  int unit;  // of the tile

  __device__ __forceinline__ void move(int units) {
    unit += kHeadWarps;
    while (unit >= units) {
      unit -= units;
      ++tile;
    }
  }
};

// Where the 16-byte chunk of a row lies in a slot: the chunks that lanes read together are in
// different banks.
__device__ __forceinline__ int slot_offset(int row, int chunk) {
  return row * kUnitBytes + ((chunk ^ row % 2 * 4) << 4);
}

// Copies unit after unit of a warp to its ring.
struct UnitReader {
  const char* weights;
  int64_t row_bytes;
  int first_row;  // of the block
  int last_row;   // of the vocabulary; rows past it repeat it
  int tiles;
  int units;
  Cursor cursor;

  __device__ __forceinline__ void copy_next(char* slot, int lane) {
    if (cursor.tile < tiles) {
      const int offset = cursor.unit * kUnitBytes + lane % 8 * 16;
      // A last unit of half the length: the other inputs have weight 0.
      const bool is_inside = offset < row_bytes;
      const char* const column = weights + (is_inside ? offset : 0);
#pragma unroll
      for (int i = 0; i < kTileRows / 4; ++i) {
        const int own = i * 4 + lane / 8;
        const int row = smaller(first_row + cursor.tile * kTileRows + own, last_row);
        copy16_or_zeros_async(slot + slot_offset(own, lane % 8), column + row * row_bytes,
                              is_inside);
      }
      cursor.move(units);
    }
    commit_copies();
  }
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

// Words of the sums that one warp has of one tile.
template <class Format>
__device__ __forceinline__ int part_words(int num_rows) {
  return num_rows * Format::kDigits * kTileRows;
}

template <class Sum>
__device__ __forceinline__ uint32_t to_bits(Sum value);
template <>
__device__ __forceinline__ uint32_t to_bits<float>(float value) {
  return __float_as_uint(value);
}
template <>
__device__ __forceinline__ uint32_t to_bits<int>(int value) {
  return static_cast<uint32_t>(value);
}

// Leaves a warp's sums of one tile; those of columns without a row are dropped.
template <class Format>
__device__ __forceinline__ void leave_part(uint32_t* part,
                                           const typename Format::Sum (&sums)[Format::kBlocks][4],
                                           int num_rows, int lane) {
#pragma unroll
  for (int block = 0; block < Format::kBlocks; ++block) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int column = block * 8 + lane % 4 * 2 + c % 2;
      if (column < num_rows * Format::kDigits)
        part[column * kTileRows + lane / 4 + c / 2 * 8] = to_bits(sums[block][c]);
    }
  }
}

// Sums of one column of a tile over the warps that had units of it, in the order of the units.
__device__ __forceinline__ float sum_parts(const uint32_t* part, int stride, int first, int count,
                                           float total) {
#pragma unroll 4
  for (int i = 0; i < count; ++i)
    total += __uint_as_float(part[(first + i) % kHeadWarps * stride]);
  return total;
}

__device__ __forceinline__ int sum_parts(const uint32_t* part, int stride, int first, int count,
                                         int total) {
#pragma unroll 4
  for (int i = 0; i < count; ++i)
    total += static_cast<int>(part[(first + i) % kHeadWarps * stride]);
  return total;
}

// Adds up and stores the logits of tiles `begin` to `end` of a block, all threads together.
template <class Format>
__device__ __forceinline__ void store_batch(const uint32_t* parts, const HeadArguments& arguments,
                                            const RowStatistics& statistics, int first_row,
                                            int begin, int end, int units) {
  using Sum = typename Format::Sum;
  const int stride = part_words<Format>(arguments.num_rows);
  const int tile_values = kTileRows * arguments.num_rows;
#pragma unroll 1
  for (int index = threadIdx.x; index < (end - begin) * tile_values; index += kHeadThreads) {
    const int tile = index / tile_values;
    const int i = index % tile_values / kTileRows;
    const int row = index % kTileRows;
    const int vocab_row = first_row + (begin + tile) * kTileRows + row;
    if (vocab_row >= arguments.vocab_size) continue;
    const uint32_t* const part =
        parts + tile * kHeadWarps * stride + i * Format::kDigits * kTileRows + row;
    const int first = (begin + tile) * units % kHeadWarps;
    const int count = smaller(units, kHeadWarps);
    const Sum high = sum_parts(part, stride, first, count, Sum{0});
    float value = static_cast<float>(high);
    if (Format::kDigits == 2) {
      const Sum low = sum_parts(part + kTileRows, stride, first, count, Sum{0});
      value = __fmaf_rn(value, 256.0f, static_cast<float>(low)) *
              (statistics.scales[i] * to_float(arguments.scales[vocab_row]));
    }
    arguments.logits[static_cast<int64_t>(i) * arguments.vocab_size + vocab_row] = value;
  }
}

template <class Format>
__device__ __forceinline__ void run_head(const char* weights, const HeadArguments& arguments) {
  using Sum = typename Format::Sum;
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  HeadMemory& memory = *dynamic_shared<HeadMemory>();
  char* const columns = dynamic_shared<char>() + sizeof(HeadMemory);

  const int units = (arguments.hidden_size + Format::kUnitInputs - 1) / Format::kUnitInputs;
  const int num_tiles = (arguments.vocab_size + kTileRows - 1) / kTileRows;
  const int first_tile = static_cast<int>(static_cast<int64_t>(num_tiles) * blockIdx.x / gridDim.x);
  const int end_tile =
      static_cast<int>(static_cast<int64_t>(num_tiles) * (blockIdx.x + 1) / gridDim.x);
  const int tiles = end_tile - first_tile;
  const int first_row = first_tile * kTileRows;

  let_dependents_launch();
  Cursor cursor{0, warp - kHeadWarps};
  cursor.move(units);
  UnitReader reader{
      weights,
      static_cast<int64_t>(arguments.hidden_size) * (kUnitBytes / Format::kUnitInputs),
      first_row,
      arguments.vocab_size - 1,
      tiles,
      units,
      cursor};
  char* const ring = memory.ring[warp][0];
#pragma unroll
  for (int stage = 0; stage < kHeadStages; ++stage)
    reader.copy_next(ring + stage * kSlotBytes, lane);
  wait_for_inputs();
  prepare_rows<Format>(columns, memory.statistics, arguments);
  __syncthreads();

  // Columns without a row repeat another one; what they give is not stored.
  const int num_columns = Format::kDigits * arguments.num_rows;
  const int pitch = Format::pitch(arguments.hidden_size);
  int column_offset[Format::kBlocks];
#pragma unroll
  for (int block = 0; block < Format::kBlocks; ++block)
    column_offset[block] = (block * 8 + lane / 4) % num_columns * pitch + lane % 4 * 16;

  const int stride = part_words<Format>(arguments.num_rows);
  const int batch_tiles = kPartWords / (kHeadWarps * stride);
  int batch = 0;  // first tile of it
  int buffer = 0;
  int tile = cursor.tile;  // whose sums these are
  Sum sums[Format::kBlocks][4] = {};

  const auto leave_tile = [&] {
    if (tile < tiles)
      leave_part<Format>(
          memory.parts[buffer] + ((tile - batch) * kHeadWarps + warp) * stride, sums,
          arguments.num_rows, lane);
#pragma unroll
    for (int c = 0; c < 4 * Format::kBlocks; ++c) sums[c / 4][c % 4] = 0;
  };
  // The barrier of a batch also says that the batch before it has been stored.
  const auto finish_batch = [&] {
    __syncthreads();
    store_batch<Format>(memory.parts[buffer], arguments, memory.statistics, first_row, batch,
                        smaller(batch + batch_tiles, tiles), units);
    batch += batch_tiles;
    buffer ^= 1;
  };

  while (tile >= batch + batch_tiles && batch < tiles) finish_batch();
  int slot = 0;
#pragma unroll 1
  while (cursor.tile < tiles) {
    if (cursor.tile != tile) {
      leave_tile();
      tile = cursor.tile;
#pragma unroll 1
      while (tile >= batch + batch_tiles) finish_batch();
    }
    wait_copies<kHeadStages - 1>();
    __syncwarp();
    char* const weights_of_unit = ring + slot;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const char* const own = weights_of_unit + slot_offset(lane / 4, j * 4 + lane % 4);
      const uint4 low = *reinterpret_cast<const uint4*>(own);
      const uint4 high = *reinterpret_cast<const uint4*>(own + 8 * kUnitBytes);
#pragma unroll
      for (int block = 0; block < Format::kBlocks; ++block) {
        const uint4 x = *reinterpret_cast<const uint4*>(columns + column_offset[block] +
                                                        cursor.unit * kUnitBytes + j * 64);
        multiply_quads(sums[block], low, high, x);
      }
    }
    __syncwarp();
    // Every lane has read the slot: fill it again.
    reader.copy_next(weights_of_unit, lane);
    slot = slot == (kHeadStages - 1) * kSlotBytes ? 0 : slot + kSlotBytes;
    cursor.move(units);
  }
  leave_tile();
#pragma unroll 1
  while (batch < tiles) finish_batch();
}

}  // namespace

#endif
