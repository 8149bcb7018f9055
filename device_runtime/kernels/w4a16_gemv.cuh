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
// One source file for each width (1, 4 or 8 tokens): num_tokens <= its kTokens; and
// w4a16_gemv_paired_add_1, of half the warps, for small matrices.
// Launch: block kThreads; grid at most outputs / 32, one block per SM is best; dynamic shared
// memory, phase_units and held_tiles as gemv_shape.py. The quantizing kernels: block
// kQuantizeThreads, a warp for each stretch of each token. inputs % 32 == outputs % 32 ==
// inputs % group_size == 0; group_size 128, 64 or 32.
// Bound by DRAM: inputs * outputs * (1/2 + 4 / group_size) bytes.
// Checked against reference/linear.py, relative error 1e-3. A token's result does not depend on
// num_tokens, kTokens or the launch shape, bit for bit.
//
// Weights come as w4a16_ring.cuh tells; the ring is filled before the previous kernel has finished
// (programmatic dependent launch). The sum of each unit is left in shared memory and the units of a
// tile are added in their order, whoever made them. With several tokens the tiles whose sums are held
// are two batches in turn: those of one are added while warps that are done with it go on to the next.
// Activations are quantized for `phase_units` units at once; with more inputs than that the block
// goes over its tiles once for each phase.
#ifndef TURBOJET_W4A16_GEMV_CUH
#define TURBOJET_W4A16_GEMV_CUH

#include "w4a16_quantize.cuh"

namespace {

enum class Output { kHalf, kSilu, kAdd };

// Place of a token in a row of sums: tokens t and t + 4, which a lane has, are neighbours.
template <int kTokens>
__device__ __forceinline__ int token_at(int place) {
  return kTokens == 8 ? place / 2 + place % 2 * 4 : place;
}

// Leaves the sums of one unit, as [32 rows][kTokens].
template <int kTokens>
__device__ __forceinline__ void store_sums(float* place,
                                           const float (&y)[kTokenBlocks<kTokens>][4], int lane) {
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

// Tiles of a block whose units' sums are held at once.
struct Batch {
  int first;  // of the block's tiles
  int count;
  float* unit_sums;
};

// Adds up the sums of the units of a batch. With more phases to come they wait in the workspace; the
// same thread goes on with them.
template <int kTokens, Output kOutput>
__device__ __forceinline__ void finish_tiles(const SharedMemory<kTokens>& shared, const Work& work,
                                             const QuantizedMatrix& matrix,
                                             const Arguments& arguments, int first, int size,
                                             const Batch& batch) {
  constexpr int kTileValues = SharedMemory<kTokens>::kTileValues;
#pragma unroll 1
  for (int i = threadIdx.x; i < batch.count * kTileValues; i += kThreads) {
    const int index = i / kTileValues;
    const int within = i % kTileValues;
    const int tile = work.tile(batch.first + index);
    float* const carried = arguments.workspace + tile * kTileValues + within;
    float total = first == 0 ? 0.0f : *carried;
    const float* const sums = batch.unit_sums + index * size * kTileValues + within;
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

// Whether the sums of one batch are added up while the next one is multiplied: held tiles are two
// batches then. For one token all of a block's tiles are held but on small devices.
template <int kTokens>
constexpr bool kAlternates = kTokens > 1;

// The digits of a warp's unit. With several tokens reading them costs as much as reading the weights:
// where a warp has the same unit of one tile after another, as with 2048 or 4096 inputs, it reads them
// once in a phase.
template <int kTokens>
struct UnitDigits {
  static constexpr bool kKeeps = kTokens > 1 && !TURBOJET_PLAIN;

  StretchDigits<kTokens> digits[kUnitStretches];
  int unit = -1;
};

// This warp's units of a batch of tiles: multiplies, and leaves the sums of each. Those of the batch
// before, if it has tiles, are added up when the first unit has been multiplied: until then warps that
// are slower have time to leave theirs. `item` counts the units of all the batch's tiles and is `unit`
// modulo `size`; both go on in the next batch.
template <int kTokens, Output kOutput>
__device__ __forceinline__ void multiply(const SharedMemory<kTokens>& shared, const Work& work,
                                         const QuantizedMatrix& matrix, const Arguments& arguments,
                                         int first, int size, const Batch& batch,
                                         const Batch& before, int parity, UnitDigits<kTokens>& held,
                                         Copier& copier, int& item, int& unit, int& slot, int warp,
                                         int lane) {
  constexpr int kSlot = kUnitBytes<kGroupSize>;
  constexpr int kTileValues = SharedMemory<kTokens>::kTileValues;
  constexpr bool kKeepsDigits = UnitDigits<kTokens>::kKeeps;
  auto& digits = held.digits;
  bool is_behind = kAlternates<kTokens> && before.count > 0;
  const int num_items = batch.count * size;
#pragma unroll 1
  while (item < num_items || is_behind) {
    float y[kTokenBlocks<kTokens>][4] = {};
    if (item < num_items) {
      if (kKeepsDigits && unit != held.unit) {
        held.unit = unit;
#pragma unroll
        for (int i = 0; i < kUnitStretches; ++i)
          digits[i].load(shared.stretch(unit * kUnitStretches + i).chunks(), lane);
      }
      char* const weights = shared.ring_of(warp) + slot;
#pragma unroll
      for (int i = 0; i < kUnitStretches; ++i) {
        constexpr int kScaleBytes = kStretchInputs / kGroupSize * kTileOutputs * 4;
        if (i % kPartStretches == 0) {
          wait_copies<kRingParts - 1>();
          __syncwarp();
        }
        const auto x = shared.stretch(unit * kUnitStretches + i);
        if (!kKeepsDigits) digits[i].load(x.chunks(), lane);
        add_stretch<kTokens, kGroupSize>(y, weights + i * (kStretchInputs / 32) * kTileBytes,
                                         weights + kCodeBytesPerUnit + i * kScaleBytes, digits[i],
                                         x, lane);
        // Every lane has read the part: fill it again.
        if (kParts > 1 && i == 0) {
          __syncwarp();
          copier.template copy_next<0>(weights, matrix, work, warp, lane);
        }
      }
      __syncwarp();
      copier.template copy_next<kParts - 1>(weights, matrix, work, warp, lane);
    }
    if (is_behind) {
      is_behind = false;
      wait_for_all(shared.split_barrier(work, arguments.held_tiles), parity);
      finish_tiles<kTokens, kOutput>(shared, work, matrix, arguments, first, size, before);
    }
    if (item >= num_items) break;
    store_sums<kTokens>(batch.unit_sums + item * kTileValues, y, lane);
    slot = slot == (kStages - 1) * kSlot ? 0 : slot + kSlot;
    item += kWarps;
    unit += kWarps;
    while (unit >= size) unit -= size;
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
  const int late_parts = first == 0 ? kRingParts - kEarlyParts : 0;
  if constexpr (kTokens == 1) {
    ActivationBatch<kHasNorm> batch;
    batch.load(matrix, arguments, first_stretch, warp, num_stretches, lane);
    if (kSplitsSingle && first == 0 && work.is_single()) {
      copier.template copy_stretches<kSingleEarly, kUnitStretches - kSingleEarly>(
          shared.ring_of(warp), matrix, work, warp, lane);
      copier.num_filled = 1;
    }
    fill_ring(shared, work, matrix, copier, late_parts, warp, lane);
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
    fill_ring(shared, work, matrix, copier, late_parts, warp, lane);
    if (first == 0)
      wait_copies<kRingParts - kEarlyParts>();
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
  const bool has_turns = kAlternates<kTokens> && arguments.held_tiles < work.block_tiles;
  const int batch_tiles = has_turns ? arguments.held_tiles / 2 : arguments.held_tiles;
  SplitBarrier* const barrier = shared.split_barrier(work, arguments.held_tiles);
  if (!kTriggersLate) let_dependents_launch();
  if (has_turns && threadIdx.x == 0) start_split_barrier(barrier, kWarps);
  Copier copier(matrix, work, warp, lane);
  if (kTokens == 1 && kSplitsSingle && work.is_single()) {
    if (kSingleEarly > 0)
      copier.template copy_stretches<0, kSingleEarly>(shared.ring_of(warp), matrix, work, warp,
                                                      lane);
  } else {
    fill_ring(shared, work, matrix, copier, kEarlyParts, warp, lane);
  }
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
  int turn = 0;  // counts arrivals at the barrier
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
    Batch batch{0, 0, unit_sums};
    UnitDigits<kTokens> digits;
#pragma unroll 1
    for (;;) {
      const Batch before = batch;
      batch.first += before.count;
      batch.count = smaller(batch_tiles, work.block_tiles - batch.first);
      if (kAlternates<kTokens>)
        batch.unit_sums =
            unit_sums + turn % 2 * (batch_tiles * size * SharedMemory<kTokens>::kTileValues);
      multiply<kTokens, kOutput>(shared, work, matrix, arguments, first, size, batch, before,
                                 (turn + 1) % 2, digits, copier, item, unit, slot, warp, lane);
      item -= batch.count * size;
      const bool is_last = batch.first + batch.count == work.block_tiles;
      if (!kAlternates<kTokens> || is_last) {
        __syncthreads();
        finish_tiles<kTokens, kOutput>(shared, work, matrix, arguments, first, size, batch);
      }
      if (is_last) break;
      if (kAlternates<kTokens>) {
        __syncwarp();
        if (lane == 0) arrive(barrier);
        ++turn;
      } else {
        __syncthreads();
      }
    }
    first += size;
    if (first == work.units) return;
    __syncthreads();
  }
}

}  // namespace

#endif
