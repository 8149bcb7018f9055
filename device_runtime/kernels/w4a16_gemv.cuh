// y = W x for up to 8 tokens, W in 4-bit codes: the linear layers of a decode step.
//
//   w4a16_gemv_norm       out[t,m]      = fp16(y[t,m] + bias[m]),             y from n
//   w4a16_gemv_norm_silu  out[t,i]      = fp16(silu(y[t,2i]) * y[t,2i+1]),    y from n
//   w4a16_gemv_add        residual[t,m] = residual[t,m] + (y[t,m] + bias[m]), y from x
//   y[t,m] = sum_k w[k,m] n[t,k] (or x[t,k]),  never rounded before the end
//   n[t,k] = residual[t,k] * norm_weight[k] / sqrt(mean_k(residual[t]^2) + eps)
//   w[k,m] = (q[k,m] - z[k div group_size, m]) * s[k div group_size, m]
// For one token every block quantizes the activations itself. For more, a launch before does it:
//   w4a16_quantize_norm   activations   = fixed point of residual[t,k] * norm_weight[k]
//   w4a16_quantize        activations   = fixed point of x[t,k]
//
//   out fp16 [num_tokens][outputs] or [num_tokens][outputs / 2]; residual fp32 [num_tokens][inputs]
//   (read) or [num_tokens][outputs] (updated); x fp16 [num_tokens][inputs]; norm_weight fp16
//   [inputs]; bias fp16 [outputs] or null; codes uint32 [inputs * outputs / 8] and scales_zeros
//   uint32 [inputs / group_size][outputs] as in package_format/SPEC.md; workspace fp32
//   [outputs * kTokens], used only when phase_units is less than all; activations
//   StretchActivations [stretches], then fp32 sums of squares [stretches][kTokens], where
//   stretches is twice the number of units.
// One source file for each width (1, 4 or 8 tokens): num_tokens <= its kTokens.
// Launch: block kThreads; grid at most outputs / 32, one block per SM is best; dynamic shared
// memory, phase_units and held_tiles as gemv_shape.py. The quantizing kernels: block
// kQuantizeThreads, a warp for each stretch of each token. inputs % 32 == outputs % 32 ==
// inputs % group_size == 0; group_size 128, 64 or 32.
// Bound by DRAM: inputs * outputs * (1/2 + 4 / group_size) bytes.
// Checked against reference/linear.py, relative error 1e-3. A token's result does not depend on
// num_tokens, kTokens or the launch shape, bit for bit.
//
// A block owns every gridDim-th tile of 32 outputs. The units (256 inputs) of all its tiles, tile
// after tile, are dealt out to its warps in turn, so that neighbouring units are read at the same
// time. Each warp keeps kStages units in flight through a private ring in shared memory, which it
// fills before the previous kernel has finished (programmatic dependent launch). The sum of each
// unit is left in shared memory and the units of a tile are added in their order, whoever made them.
// Activations are quantized for `phase_units` units at once; with more inputs than that the block
// goes over its tiles once for each phase.
#ifndef TURBOJET_W4A16_GEMV_CUH
#define TURBOJET_W4A16_GEMV_CUH

#include "activations.cuh"

namespace {

#ifndef TURBOJET_GROUP_SIZE
#define TURBOJET_GROUP_SIZE 128
#endif
constexpr int kGroupSize = TURBOJET_GROUP_SIZE;
static_assert(kGroupSize == 128 || kGroupSize == 64 || kGroupSize == 32, "groups of w4a16.cuh");
constexpr int kWarps = 16;
// The plain variant's copies are done at once: more than one stage would only take memory.
constexpr int kStages = TURBOJET_PLAIN ? 1 : TURBOJET_GEMV_STAGES;  // the source defines it
constexpr int kEarlyStages = 1;  // of the ring, filled before the activations are there
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kQuantizeThreads = 256;

enum class Output { kHalf, kSilu, kAdd };

struct Arguments {
  fp16* out;                // kHalf, kSilu
  float* residual;          // kAdd: updated; else: read
  const fp16* x;            // kAdd
  const fp16* norm_weight;  // kHalf, kSilu
  const uint4* activations;  // with more than one token, in place of what is read above
  const fp16* bias;         // null, or [outputs]
  float* workspace;
  int num_tokens;
  int phase_units;  // whose activations fit into shared memory at once
  int held_tiles;   // whose units' sums do
  float eps;
};

// What the whole block agrees on.
struct Work {
  int units;        // of the matrix
  int phase_units;  // of a phase; the last one may have fewer
  int block_tiles;  // tiles of this block: blockIdx.x + i * gridDim.x

  __device__ __forceinline__ int size_of(int first_unit) const {
    return smaller(phase_units, units - first_unit);
  }
  __device__ __forceinline__ int tile(int index) const { return blockIdx.x + index * gridDim.x; }
};

template <int kTokens>
struct SharedMemory {
  using Activations = StretchActivations<kTokens, kGroupSize>;
  static constexpr int kSlot = kUnitBytes<kGroupSize>;
  static constexpr int kTileValues = kTileOutputs * kTokens;
  static constexpr int kRoundedTokens = (kTokens + 3) / 4 * 4;

  char* base;  // ring [warps][stages][unit bytes]

  __device__ __forceinline__ SharedMemory() { base = dynamic_shared<char>(); }

  __device__ __forceinline__ char* ring_of(int warp) const {
    return base + warp * (kStages * kSlot);
  }
  // 1 / rms of each token.
  __device__ __forceinline__ float* inverse_rms() const {
    return reinterpret_cast<float*>(base + kWarps * kStages * kSlot);
  }
  __device__ __forceinline__ Activations stretch(int index) const {
    return Activations{reinterpret_cast<char*>(inverse_rms() + kRoundedTokens) +
                       index * Activations::kBytes};
  }
  // Sums of squares of all stretches [units][2][kTokens].
  __device__ __forceinline__ float* square_sums(const Work& work) const {
    return reinterpret_cast<float*>(stretch(work.phase_units * kUnitStretches).base);
  }
  // Sums of units [held tiles][units of the phase][kTileValues].
  __device__ __forceinline__ float* unit_sums(const Work& work) const {
    return square_sums(work) + (work.units * kUnitStretches * kTokens + 3) / 4 * 4;
  }
};

// Copies a warp's units to its ring, in the order in which they are used: phase after phase, tile
// after tile.
struct Copier {
  UnitSource<kGroupSize> source;
  int unit;    // of the phase
  int index;   // of the tile in the block
  int first;   // unit of the phase; work.units when everything was copied
  int size;    // of the phase
  int num_filled;  // slots, before the main loop

  __device__ __forceinline__ Copier(const QuantizedMatrix& matrix, const Work& work, int warp,
                                    int lane)
      : source(matrix, blockIdx.x, warp, lane),
        unit(warp),
        index(0),
        first(0),
        size(work.size_of(0)),
        num_filled(0) {
    if (unit >= size) next_tile(matrix, work, warp, lane);
  }

  __device__ __forceinline__ void next_tile(const QuantizedMatrix& matrix, const Work& work,
                                            int warp, int lane) {
    do {
      unit -= size;
      if (++index < work.block_tiles) {
        source.move(matrix, gridDim.x, -size);
        continue;
      }
      first += size;
      if (first == work.units) return;
      index = 0;
      unit = warp;
      size = work.size_of(first);
      source = UnitSource<kGroupSize>(matrix, blockIdx.x, first + unit, lane);
    } while (unit >= size);
  }

  __device__ __forceinline__ void copy_next(char* slot, const QuantizedMatrix& matrix,
                                            const Work& work, int warp, int lane) {
    if (first < work.units) {
      source.copy_async(slot, matrix, matrix.inputs - (first + unit) * kUnitInputs, lane);
      source.move(matrix, 0, kWarps);
      unit += kWarps;
      if (unit >= size) next_tile(matrix, work, warp, lane);
    }
    commit_copies();
  }
};

// Starts the copies of the next `count` slots, which go on where the last call ended.
template <int kTokens>
__device__ __forceinline__ void fill_ring(const SharedMemory<kTokens>& shared, const Work& work,
                                          const QuantizedMatrix& matrix, Copier& copier, int count,
                                          int warp, int lane) {
#pragma unroll 1
  for (; count > 0; --count) {
    const int slot = copier.num_filled++ * kUnitBytes<kGroupSize>;
    copier.copy_next(shared.ring_of(warp) + slot, matrix, work, warp, lane);
  }
}

// Four values of one token, in the order of `first_input`.
template <bool kHasNorm>
__device__ __forceinline__ void load_activations(float (&values)[4], const Arguments& arguments,
                                                 int64_t row, int input, float& square_sum) {
  if (kHasNorm) {
    const float2 a = *reinterpret_cast<const float2*>(arguments.residual + row + input);
    const float2 b = *reinterpret_cast<const float2*>(arguments.residual + row + input + 8);
    const uint32_t wa = *reinterpret_cast<const uint32_t*>(arguments.norm_weight + input);
    const uint32_t wb = *reinterpret_cast<const uint32_t*>(arguments.norm_weight + input + 8);
    square_sum = a.x * a.x + a.y * a.y + (b.x * b.x + b.y * b.y);
    values[0] = a.x * low_to_float(wa);
    values[1] = b.x * low_to_float(wb);
    values[2] = a.y * high_to_float(wa);
    values[3] = b.y * high_to_float(wb);
  } else {
    const uint32_t a = *reinterpret_cast<const uint32_t*>(arguments.x + row + input);
    const uint32_t b = *reinterpret_cast<const uint32_t*>(arguments.x + row + input + 8);
    values[0] = low_to_float(a);
    values[1] = low_to_float(b);
    values[2] = high_to_float(a);
    values[3] = high_to_float(b);
  }
}

template <int kTokens>
__device__ __forceinline__ void store_stretch(
    const StretchActivations<kTokens, kGroupSize>& place, const FixedPoint& fixed, int token,
    int lane) {
  // Chunk (block of tokens, pair of tiles, column, t), word (tile of the pair, k16).
  const int chunk =
      ((token / 4 * 2 + lane / 16) * kColumns<kTokens> + token % 4 * 2) * 4 + lane % 4;
  const int word = lane / 8 % 2 * 2 + lane / 4 % 2;
  uint32_t* const words = reinterpret_cast<uint32_t*>(place.chunks() + chunk);
  words[word] = fixed.high;
  words[word + 16] = fixed.low;
  if (lane == 0) place.scale(token) = fixed.scale;
  if (lane % (kGroupSize / 4) == 0)
    place.negated_sum(lane / (kGroupSize / 4), token) = fixed.negated_sum;
}

// One stretch of one token for each warp, to memory.
template <int kTokens, bool kHasNorm>
__device__ __forceinline__ void run_quantize(uint4* activations, const Arguments& arguments,
                                             int inputs) {
  using Place = StretchActivations<kTokens, kGroupSize>;
  let_dependents_launch();
  const int lane = threadIdx.x % kWarpSize;
  const int item = (blockIdx.x * kQuantizeThreads + threadIdx.x) / kWarpSize;
  const int num_stretches = (inputs + kUnitInputs - 1) / kUnitInputs * kUnitStretches;
  const int token = item % kTokens;
  const int stretch = item / kTokens;
  const int input = stretch * kStretchInputs + first_input(lane);
  if (kHasNorm && input < inputs) prefetch_line(arguments.norm_weight + input);
  wait_for_inputs();
  if (stretch >= num_stretches) return;
  float values[4] = {};
  float square_sum = 0.0f;
  if (input < inputs && token < arguments.num_tokens)
    load_activations<kHasNorm>(values, arguments, static_cast<int64_t>(token) * inputs, input,
                               square_sum);
  char* const base = reinterpret_cast<char*>(activations);
  store_stretch<kTokens>(Place{base + stretch * Place::kBytes}, to_fixed_point<kGroupSize>(values),
                         token, lane);
  if (kHasNorm) {
    square_sum = lanes_sum<kWarpSize>(square_sum);
    if (lane == 0)
      reinterpret_cast<float*>(base + num_stretches * Place::kBytes)[item] = square_sum;
  }
}

// Activations of one token's stretches on their way from memory to shared memory; their loads are
// in flight together.
template <bool kHasNorm>
struct ActivationBatch {
  static constexpr int kBatch = kHasNorm ? 3 : 6;

  float values[kBatch][4];
  float square_sums[kBatch];

  __device__ __forceinline__ void load(const QuantizedMatrix& matrix, const Arguments& arguments,
                                       int first_stretch, int start, int count, int lane) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int item = start + i * kWarps;
      const int input = (first_stretch + item) * kStretchInputs + first_input(lane);
      square_sums[i] = 0.0f;
      if (item < count && input < matrix.inputs) {
        load_activations<kHasNorm>(values[i], arguments, 0, input, square_sums[i]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) values[i][j] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void quantize(const SharedMemory<1>& shared, const Work& work,
                                           int first_stretch, int start, int count, int lane) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int item = start + i * kWarps;
      if (item >= count) break;
      store_stretch<1>(shared.stretch(item), to_fixed_point<kGroupSize>(values[i]), 0, lane);
      if (kHasNorm) {
        const float square_sum = lanes_sum<kWarpSize>(square_sums[i]);
        if (lane == 0) shared.square_sums(work)[first_stretch + item] = square_sum;
      }
    }
  }
};

// Warp t turns the sums of squares of token t, [stretches][kTokens], into 1 / rms.
template <int kTokens>
__device__ __forceinline__ void finish_norm(const SharedMemory<kTokens>& shared,
                                            const float* square_sums, int num_stretches,
                                            int inputs, float eps, int warp, int lane) {
  if (warp >= kTokens) return;
  float sum = 0.0f;
#pragma unroll 1
  for (int i = lane; i < num_stretches; i += kWarpSize) sum += square_sums[i * kTokens + warp];
  sum = lanes_sum<kWarpSize>(sum);
  if (lane == 0) shared.inverse_rms()[warp] = rsqrtf(sum / static_cast<float>(inputs) + eps);
}

// Place of a token in a row of sums: tokens t and t + 4, which a lane has, are neighbours.
template <int kTokens>
__device__ __forceinline__ int token_at(int place) {
  return kTokens == 8 ? place / 2 + place % 2 * 4 : place;
}

// Leaves the sums of one unit, as [32 rows][kTokens].
template <int kTokens>
__device__ __forceinline__ void store_sums(float* place,
                                              const float (&y)[kTokenBlocks<kTokens>][4],
                                              int lane) {
  if (kTokens == 1) {
    const int own = lane % 4;
    const float value = own == 0 ? y[0][0] : own == 1 ? y[0][1] : own == 2 ? y[0][2] : y[0][3];
    place[lane / 4 + 8 * own] = value * row_scale(own);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* const row = place + (lane / 4 + 8 * i) * kTokens;
      if (kTokens == 4) row[lane % 4] = y[0][i] * row_scale(i);
      if (kTokens == 8)
        *reinterpret_cast<float2*>(row + lane % 4 * 2) =
            float2{y[0][i] * row_scale(i), y[kTokenBlocks<kTokens> - 1][i] * row_scale(i)};
    }
  }
}

// The last step: what becomes of one sum. All lanes of a warp come here together.
template <int kTokens, Output kOutput>
__device__ __forceinline__ void finish_value(float value, const SharedMemory<kTokens>& shared,
                                             const QuantizedMatrix& matrix,
                                             const Arguments& arguments, int output, int token) {
  if (kOutput != Output::kAdd) value *= shared.inverse_rms()[token];
  if (kOutput != Output::kSilu && arguments.bias != nullptr)
    value += to_float(arguments.bias[output]);
  // The next row is gate's up.
  const float up =
      kOutput == Output::kSilu ? __shfl_xor_sync(kFullMask, value, kTokens) : 0.0f;
  if (token >= arguments.num_tokens) return;
  const int64_t index = static_cast<int64_t>(token) * matrix.outputs + output;
  if (kOutput == Output::kHalf) arguments.out[index] = to_fp16(value);
  if (kOutput == Output::kAdd) add_to_memory(arguments.residual + index, value);
  if (kOutput == Output::kSilu && output % 2 == 0)
    arguments.out[index / 2] = to_fp16(value / (1.0f + __expf(-value)) * up);
}

// This warp's units of a batch of tiles: multiplies, and leaves the sums of each. `item` counts the
// units of all the batch's tiles and is `unit` modulo `size`; both go on in the next batch.
template <int kTokens>
__device__ __forceinline__ void multiply(const SharedMemory<kTokens>& shared, const Work& work,
                                         const QuantizedMatrix& matrix, int size, int num_items,
                                         float* unit_sums, Copier& copier, int& item, int& unit, int& slot, int warp,
                                         int lane) {
  constexpr int kSlot = kUnitBytes<kGroupSize>;
  constexpr int kTileValues = SharedMemory<kTokens>::kTileValues;
#pragma unroll 1
  for (; item < num_items; item += kWarps) {
    wait_copies<kStages - 1>();
    __syncwarp();
    char* const weights = shared.ring_of(warp) + slot;
    float y[kTokenBlocks<kTokens>][4] = {};
#pragma unroll
    for (int i = 0; i < kUnitStretches; ++i) {
      constexpr int kScaleBytes = kStretchInputs / kGroupSize * kTileOutputs * 4;
      add_stretch<kTokens, kGroupSize>(y, weights + i * (kStretchInputs / 32) * kTileBytes,
                                       weights + kCodeBytesPerUnit + i * kScaleBytes,
                                       shared.stretch(unit * kUnitStretches + i), lane);
    }
    __syncwarp();
    // Every lane has read the slot: fill it again.
    copier.copy_next(weights, matrix, work, warp, lane);
    store_sums<kTokens>(unit_sums + item * kTileValues, y, lane);
    slot = slot == (kStages - 1) * kSlot ? 0 : slot + kSlot;
    unit += kWarps;
    while (unit >= size) unit -= size;
  }
}

// Adds up the sums of the units of `count` tiles. With more phases to come they wait in the
// workspace; the same thread goes on with them.
template <int kTokens, Output kOutput>
__device__ __forceinline__ void finish_tiles(const SharedMemory<kTokens>& shared, const Work& work,
                                             const QuantizedMatrix& matrix,
                                             const Arguments& arguments, int first, int size,
                                             const float* unit_sums, int first_index,
                                             int count) {
  constexpr int kTileValues = SharedMemory<kTokens>::kTileValues;
#pragma unroll 1
  for (int i = threadIdx.x; i < count * kTileValues; i += kThreads) {
    const int index = i / kTileValues;
    const int within = i % kTileValues;
    const int tile = work.tile(first_index + index);
    float* const carried = arguments.workspace + tile * kTileValues + within;
    float total = first == 0 ? 0.0f : *carried;
    const float* const sums = unit_sums + index * size * kTileValues + within;
#pragma unroll 8
    for (int unit = 0; unit < size; ++unit) total += sums[unit * kTileValues];
    if (first + size < work.units)
      *carried = total;
    else
      finish_value<kTokens, kOutput>(total, shared, matrix, arguments,
                                     tile * kTileOutputs + within / kTokens,
                                     token_at<kTokens>(within % kTokens));
  }
}

// Brings the activations of a phase to shared memory, and fills the rest of the ring. In the first
// phase their loads go before most of the weights', behind which they would queue up.
template <int kTokens, bool kHasNorm>
__device__ __forceinline__ void load_phase(const SharedMemory<kTokens>& shared, const Work& work,
                                           const QuantizedMatrix& matrix,
                                           const Arguments& arguments, int first, int size,
                                           Copier& copier, int warp, int lane) {
  const int first_stretch = first * kUnitStretches;
  const int num_stretches = size * kUnitStretches;
  const int late_stages = first == 0 ? kStages - kEarlyStages : 0;
  if constexpr (kTokens == 1) {
    ActivationBatch<kHasNorm> batch;
    batch.load(matrix, arguments, first_stretch, warp, num_stretches, lane);
    fill_ring(shared, work, matrix, copier, late_stages, warp, lane);
#pragma unroll 1
    for (int start = warp;;) {
      batch.quantize(shared, work, first_stretch, start, num_stretches, lane);
      start += kWarps * batch.kBatch;
      if (start >= num_stretches) break;
      batch.load(matrix, arguments, first_stretch, start, num_stretches, lane);
    }
  } else {
    constexpr int kChunks = StretchActivations<kTokens, kGroupSize>::kBytes / 16;
    const uint4* const source = arguments.activations + first_stretch * kChunks;
    uint4* const target = shared.stretch(0).chunks();
#pragma unroll 4
    for (int i = threadIdx.x; i < num_stretches * kChunks; i += kThreads)
      copy16_async(target + i, source + i);
    commit_copies();
    fill_ring(shared, work, matrix, copier, late_stages, warp, lane);
    if (first == 0)
      wait_copies<kStages - kEarlyStages>();
    else
      wait_copies<0>();
  }
}

template <int kTokens, Output kOutput>
__device__ __forceinline__ void run_gemv(const QuantizedMatrix& matrix,
                                         const Arguments& arguments) {
  constexpr bool kHasNorm = kOutput != Output::kAdd;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const SharedMemory<kTokens> shared;
  const int grid = gridDim.x;
  const Work work{(matrix.inputs + kUnitInputs - 1) / kUnitInputs, arguments.phase_units,
                  (matrix.outputs / kTileOutputs - static_cast<int>(blockIdx.x) + grid - 1) / grid};
  let_dependents_launch();
  Copier copier(matrix, work, warp, lane);
  fill_ring(shared, work, matrix, copier, kEarlyStages, warp, lane);
  if (kHasNorm && kTokens == 1) {
#pragma unroll 1
    for (int i = threadIdx.x * 64; i < matrix.inputs; i += kThreads * 64)
      prefetch_line(arguments.norm_weight + i);
  }
  if (kOutput != Output::kSilu && arguments.bias != nullptr) {
#pragma unroll 1
    for (int i = threadIdx.x; i < work.block_tiles; i += kThreads)
      prefetch_line(arguments.bias + work.tile(i) * kTileOutputs);
  }
  wait_for_inputs();

  int slot = 0;
  int first = 0;
#pragma unroll 1
  for (;;) {
    const int size = work.size_of(first);
    load_phase<kTokens, kHasNorm>(shared, work, matrix, arguments, first, size, copier, warp, lane);
    __syncthreads();
    if (kHasNorm && first + size == work.units) {
      const int num_stretches = work.units * kUnitStretches;
      const float* const square_sums =
          kTokens == 1 ? shared.square_sums(work)
                       : reinterpret_cast<const float*>(
                             reinterpret_cast<const char*>(arguments.activations) +
                             num_stretches * StretchActivations<kTokens, kGroupSize>::kBytes);
      finish_norm(shared, square_sums, num_stretches, matrix.inputs, arguments.eps, warp, lane);
    }
    int item = warp;
    int unit = warp;
    while (unit >= size) unit -= size;
    float* const unit_sums = shared.unit_sums(work);
    int index = 0;
#pragma unroll 1
    for (;;) {
      const int count = smaller(arguments.held_tiles, work.block_tiles - index);
      multiply(shared, work, matrix, size, count * size, unit_sums, copier, item, unit, slot, warp,
               lane);
      __syncthreads();
      finish_tiles<kTokens, kOutput>(shared, work, matrix, arguments, first, size, unit_sums, index,
                                     count);
      item -= count * size;
      index += count;
      if (index == work.block_tiles) break;
      __syncthreads();
    }
    first += size;
    if (first == work.units) return;
    __syncthreads();
  }
}

}  // namespace

#endif
