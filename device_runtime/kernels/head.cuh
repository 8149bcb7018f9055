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
// the same time. Each warp keeps kHeadStages units in flight through a private ring in shared
// memory, which it fills before the previous kernel has finished (programmatic dependent launch). A
// lane takes 16 bytes of its two rows at a time; these bytes are parts of two A fragments whose
// inputs are permuted, and the activations are taken in the same order. The warps' sums of a batch
// of tiles meet in shared memory, in two buffers by turns.
#ifndef TURBOJET_HEAD_CUH
#define TURBOJET_HEAD_CUH

#include "fragments.cuh"
#include "head_rows.cuh"
#include "load_matrix.cuh"
#include "signed_products.cuh"

namespace {

__device__ __forceinline__ void multiply_quads(float (&sums)[4], const uint4& low,
                                               const uint4& high, const uint4& x) {
  multiply(sums, low.x, high.x, low.y, high.y, x.x, x.y);
  multiply(sums, low.z, high.z, low.w, high.w, x.z, x.w);
}

__device__ __forceinline__ void multiply_quads(int (&sums)[4], const uint4& low,
                                               const uint4& high, const uint4& x) {
  multiply_signed(sums, low.x, high.x, low.y, high.y, x.x, x.y);
  multiply_signed(sums, low.z, high.z, low.w, high.w, x.z, x.w);
}

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
