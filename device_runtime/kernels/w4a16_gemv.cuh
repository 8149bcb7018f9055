// y = W x for up to 8 tokens, W in 4-bit codes: the linear layers of a decode step.
//
//   w4a16_gemv_norm       out[t,m]      = fp16(y[t,m] + bias[m]),             y from n
//   w4a16_gemv_norm_silu  out[t,i]      = fp16(silu(y[t,2i]) * y[t,2i+1]),    y from n
//   w4a16_gemv_add        residual[t,m] = residual[t,m] + y[t,m] + bias[m],   y from x
//   y[t,m] = sum_k w[k,m] n[t,k] (or x[t,k]),  never rounded before the end
//   n[t,k] = residual[t,k] * norm_weight[k] / sqrt(mean_k(residual[t]^2) + eps)
//   w[k,m] = (q[k,m] - z[k div group_size, m]) * s[k div group_size, m]
//
//   out fp16 [num_tokens][outputs] or [num_tokens][outputs / 2]; residual fp32 [num_tokens][inputs]
//   (read) or [num_tokens][outputs] (updated); x fp16 [num_tokens][inputs]; norm_weight fp16
//   [inputs]; bias fp16 [outputs] or null; codes uint32 [inputs * outputs / 8] and scales_zeros
//   uint32 [inputs / group_size][outputs] as in package_format/SPEC.md; workspace fp32
//   [kTokens][outputs], used only when splits > 1 without clusters.
// One source file for each width (1, 4 or 8 tokens): num_tokens <= its kTokens.
// Launch: block kThreads; grid a multiple of the cluster size, at most one block per SM is useful;
// dynamic shared memory as table.py's w4a16_gemv_shared_bytes. inputs % 32 == outputs % 32 ==
// inputs % group_size == 0; group_size 128, 64 or 32. Launched in clusters of `splits` blocks
// (sm_90 and newer) each block takes a part of the inputs; else it takes the parts in turn.
// Bound by DRAM: inputs * outputs * (1/2 + 4 / group_size) bytes.
// Checked against reference.py w4a16_gemv, relative error 1e-3. For one launch shape a token's
// result does not depend on num_tokens nor on kTokens, bit for bit.
//
// A block (or cluster) owns whole tiles of 32 outputs. The units of all its tiles, tile after tile,
// are shared out among its warps in equal runs, so that only the ends of runs have to be added up
// across warps. Each warp keeps kStages units in flight through a private ring in shared memory,
// which it fills before the previous kernel has finished (programmatic dependent launch).
#ifndef TURBOJET_W4A16_GEMV_CUH
#define TURBOJET_W4A16_GEMV_CUH

#include "activations.cuh"

namespace {

#ifndef TURBOJET_GEMV_WARPS
#define TURBOJET_GEMV_WARPS 16
#endif
#ifndef TURBOJET_GEMV_STAGES
#define TURBOJET_GEMV_STAGES 3
#endif
#ifndef TURBOJET_GEMV_BLOCKS
#define TURBOJET_GEMV_BLOCKS 2
#endif

#ifndef TURBOJET_GROUP_SIZE
#define TURBOJET_GROUP_SIZE 128
#endif

constexpr int kGroupSize = TURBOJET_GROUP_SIZE;
static_assert(kGroupSize == 128 || kGroupSize == 64 || kGroupSize == 32, "groups of w4a16.cuh");
constexpr int kWarps = TURBOJET_GEMV_WARPS;
constexpr int kStages = TURBOJET_GEMV_STAGES;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBlocksPerSm = TURBOJET_GEMV_BLOCKS;  // of two kernels: one prefetches, one works

enum class Output { kHalf, kSilu, kAdd };

struct Arguments {
  fp16* out;                // kHalf, kSilu
  float* residual;          // kAdd: updated; else: read
  const fp16* x;            // kAdd
  const fp16* norm_weight;  // kHalf, kSilu
  const fp16* bias;         // null, or [outputs]
  float* workspace;
  int num_tokens;
  int splits;
  float eps;
};

// Values of a tile that a lane holds once the warp's sums are complete: all four rows of its tokens,
// or, with one token, the row of the four that is its own.
template <int kTokens>
constexpr int kValues = kTokens == 1 ? 1 : 4 * kTokenBlocks<kTokens>;

template <int kTokens>
__device__ __forceinline__ int row_of(int value, int lane) {
  return lane / 4 + 8 * (kTokens == 1 ? lane % 4 : value % 4);
}

template <int kTokens>
__device__ __forceinline__ int token_of(int value, int lane) {
  return kTokens == 1 ? 0 : value / 4 * 4 + lane % 4;
}

// The work of a block in one phase: `units` units of each of its tiles, tile after tile, shared out
// among the warps in equal runs.
struct Phase {
  int first_unit;
  int units;
  int work;

  __device__ __forceinline__ int begin(int warp) const { return work * warp / kWarps; }
  __device__ __forceinline__ int warp_of(int item) const { return (kWarps * (item + 1) - 1) / work; }
};

// What a block computes: its tiles, and the phases that it goes through.
struct Plan {
  int units;        // of the matrix
  int first_tile;   // the block's tiles are first_tile + i * tile_stride
  int tile_stride;
  int tiles;
  int splits;
  int ranks;        // blocks of the cluster
  int first_phase;
  int end_phase;

  __device__ __forceinline__ int tile(int index) const { return first_tile + index * tile_stride; }
  __device__ __forceinline__ Phase phase(int index) const {
    if (splits == 1) return Phase{0, units, tiles * units};
    const int first_unit = units * index / splits;
    const int count = units * (index + 1) / splits - first_unit;
    return Phase{first_unit, count, tiles * count};
  }
  __device__ __forceinline__ int most_units() const {
    return splits == 1 ? units : (units + splits - 1) / splits;
  }
  // Runs of a warp whose sums are kept until the warps meet. The last one goes over the ring, which
  // is empty then, unless the ring already holds units of the next phase.
  __device__ __forceinline__ bool is_last_run_in_ring() const {
    return kHasClusters || splits == 1;
  }
  __device__ __forceinline__ int held_runs() const {
    if (splits == 1) return 1;
    if (!kHasClusters) return 2;
    const int longest = (tiles * most_units() + kWarps - 1) / kWarps;
    return longest == 0 ? 0 : (longest - 1 + most_units() - 1) / most_units();
  }
};

__device__ __forceinline__ Plan make_plan(const QuantizedMatrix& matrix, int splits) {
  Plan plan;
  plan.ranks = cluster_size();
  plan.units = (matrix.inputs + kUnitInputs - 1) / kUnitInputs;
  plan.first_tile = static_cast<int>(blockIdx.x) / plan.ranks;
  plan.tile_stride = static_cast<int>(gridDim.x) / plan.ranks;
  const int all_tiles = matrix.outputs / kTileOutputs;
  plan.tiles = plan.first_tile < all_tiles
                   ? (all_tiles - 1 - plan.first_tile) / plan.tile_stride + 1
                   : 0;
  plan.splits = splits;
  plan.first_phase = cluster_rank();
  plan.end_phase = kHasClusters ? plan.first_phase + 1 : splits;
  return plan;
}

template <int kTokens>
struct SharedMemory {
  using Activations = UnitActivations<kTokens, kGroupSize>;
  static constexpr int kSlot = kUnitBytes<kGroupSize>;
  static constexpr int kRunFloats = kValues<kTokens> * kWarpSize;

  char* base;  // ring [warps][stages][unit bytes]

  __device__ __forceinline__ SharedMemory() { base = dynamic_shared<char>(); }

  // The plan, so that it takes no registers in the main loop.
  __device__ __forceinline__ int* plan_words() const {
    return reinterpret_cast<int*>(base + kWarps * kStages * kSlot);
  }
  __device__ __forceinline__ void store(const Plan& plan) const {
    *reinterpret_cast<int4*>(plan_words()) =
        int4{plan.units, plan.first_tile, plan.tile_stride, plan.tiles};
    *reinterpret_cast<int4*>(plan_words() + 4) =
        int4{plan.splits, plan.ranks, plan.first_phase, plan.end_phase};
  }
  __device__ __forceinline__ Plan plan() const {
    const int4 a = load_shared_again(plan_words());
    const int4 b = load_shared_again(plan_words() + 4);
    return Plan{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  }
  // Sums of squares [kTokens].
  __device__ __forceinline__ float* totals() const {
    return reinterpret_cast<float*>(plan_words() + 8);
  }
  __device__ __forceinline__ Activations unit(int index) const {
    return Activations{reinterpret_cast<char*>(totals() + (kTokens + 3) / 4 * 4) +
                       index * Activations::kBytes};
  }
  __device__ __forceinline__ char* ring_of(int warp) const {
    return base + warp * (kStages * kSlot);
  }
  // Where a warp leaves the sum of a run that shares its tile with other warps.
  __device__ __forceinline__ float* run(const Plan& plan, const Phase& phase, int warp,
                                        int tile_index) const {
    const bool is_last = tile_index == (phase.begin(warp + 1) - 1) / phase.units;
    if (is_last && plan.is_last_run_in_ring()) return reinterpret_cast<float*>(ring_of(warp));
    // Outside a cluster whole tiles are not left here: only the first run and the last.
    const int index = kHasClusters ? tile_index - phase.begin(warp) / phase.units : is_last;
    return reinterpret_cast<float*>(unit(plan.most_units()).base) +
           (warp * plan.held_runs() + index) * kRunFloats;
  }
};

// Copies a warp's units of all phases to its ring, in the order in which they are used.
struct Copier {
  UnitSource<kGroupSize> source;
  int left;         // units of the current tile still to be copied; 0 when everything was
  int next_item;    // of the phase: the first one of the next tile
  int phase_index;

  // Goes to an item of a phase, or to the next phase if it is the end of this warp's run.
  __device__ __forceinline__ void seek(const QuantizedMatrix& matrix, const Plan& plan, int warp,
                                       int lane) {
    left = 0;
#pragma unroll 1
    for (;;) {
      const Phase phase = plan.phase(phase_index);
      const int end = phase.begin(warp + 1);
      if (next_item < 0) next_item = phase.begin(warp);
      if (next_item < end) {
        const int tile_index = next_item / phase.units;
        const int offset = next_item - tile_index * phase.units;
        source.seek(matrix, plan.tile(tile_index), phase.first_unit + offset, lane);
        left = smaller(phase.units - offset, end - next_item);
        next_item += left;
        return;
      }
      if (kHasClusters || phase_index + 1 == plan.end_phase) return;
      next_item = -1;
      ++phase_index;
    }
  }

  template <typename Shared>
  __device__ __forceinline__ void copy_next(char* slot, const QuantizedMatrix& matrix,
                                            const Shared& shared, int warp, int lane) {
    if (left > 0) {
      source.copy_async(slot, matrix, lane);
      source.next_unit(matrix);
      if (--left == 0) seek(matrix, shared.plan(), warp, lane);
    }
    commit_copies();
  }
};

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

// Quantizes the activations of a phase into shared memory. A warp takes several units at once, so
// that their loads are in flight together.
template <int kTokens, bool kHasNorm>
__device__ __forceinline__ void quantize(const SharedMemory<kTokens>& shared,
                                         const QuantizedMatrix& matrix, const Arguments& arguments,
                                         const Phase& phase, int warp, int lane) {
  constexpr int kBatch = kHasNorm ? 4 : 6;
  constexpr int kStride = kWarps / kTokens;
  const int token = warp % kTokens;
  const int64_t row = static_cast<int64_t>(token) * matrix.inputs;
#pragma unroll 1
  for (int first = warp / kTokens; first < phase.units; first += kStride * kBatch) {
    float values[kBatch][4] = {};
    float square_sums[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int unit = first + i * kStride;
      const int input = (phase.first_unit + unit) * kUnitInputs + first_input(lane);
      if (unit < phase.units && input < matrix.inputs && token < arguments.num_tokens)
        load_activations<kHasNorm>(values[i], arguments, row, input, square_sums[i]);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int unit = first + i * kStride;
      if (unit >= phase.units) break;
      const FixedPoint fixed = to_fixed_point<kGroupSize>(values[i]);
      // Chunk (block of tokens, pair of tiles, column, t), word (tile of the pair, k16).
      const int chunk =
          ((token / 4 * 2 + lane / 16) * kColumns<kTokens> + token % 4 * 2) * 4 + lane % 4;
      const int word = lane / 8 % 2 * 2 + lane / 4 % 2;
      const UnitActivations<kTokens, kGroupSize> place = shared.unit(unit);
      uint32_t* const words = reinterpret_cast<uint32_t*>(place.chunks() + chunk);
      words[word] = fixed.high;
      words[word + 16] = fixed.low;
      if (lane == 0) place.scale(token) = fixed.scale;
      if (lane % (kGroupSize / 4) == 0)
        place.negated_sum(lane / (kGroupSize / 4), token) = fixed.negated_sum;
      if (kHasNorm) {
        const float square_sum = lanes_sum<kWarpSize>(square_sums[i]);
        if (lane == 0) place.square_sum(token) = square_sum;
      }
    }
  }
}

// Adds the sum of squares of the phase, for the tokens of this lane, in an order that does not
// depend on how many tokens or warps there are.
template <int kTokens>
__device__ __forceinline__ void add_squares(float (&totals)[kTokenBlocks<kTokens>],
                                            const SharedMemory<kTokens>& shared,
                                            int units, int lane) {
#pragma unroll
  for (int block = 0; block < kTokenBlocks<kTokens>; ++block) {
    float sum = 0.0f;
#pragma unroll 1
    for (int unit = lane / 4; unit < units; unit += 8)
      sum += shared.unit(unit).square_sum(token_of<kTokens>(4 * block, lane));
#pragma unroll
    for (int offset = 4; offset < kWarpSize; offset *= 2)
      sum += __shfl_xor_sync(kFullMask, sum, offset);
    totals[block] += sum;
  }
}

// The last step: what becomes of the sums of one tile.
template <int kTokens, Output kOutput>
__device__ __forceinline__ void finish_tile(const float (&values)[kValues<kTokens>],
                                            const float (&totals)[kTokenBlocks<kTokens>],
                                            const QuantizedMatrix& matrix,
                                            const Arguments& arguments, int tile, int lane) {
#pragma unroll
  for (int i = 0; i < kValues<kTokens>; ++i) {
    float value = values[i];
    const int token = token_of<kTokens>(i, lane);
    const int output = tile * kTileOutputs + row_of<kTokens>(i, lane);
    if (kOutput != Output::kAdd)
      value *= rsqrtf(totals[i / 4] / static_cast<float>(matrix.inputs) + arguments.eps);
    if (kOutput != Output::kSilu && arguments.bias != nullptr)
      value += to_float(arguments.bias[output]);
    // The next row is gate's up.
    const float up = kOutput == Output::kSilu ? __shfl_xor_sync(kFullMask, value, 4) : 0.0f;
    if (token >= arguments.num_tokens) continue;
    const int64_t index = static_cast<int64_t>(token) * matrix.outputs + output;
    if (kOutput == Output::kHalf) arguments.out[index] = to_fp16(value);
    if (kOutput == Output::kAdd) arguments.residual[index] += value;
    if (kOutput == Output::kSilu && output % 2 == 0)
      arguments.out[index / 2] = to_fp16(value / (1.0f + __expf(-value)) * up);
  }
}

// A complete sum of one phase; with more phases to come it waits in the workspace.
template <int kTokens, Output kOutput>
__device__ __forceinline__ void finish_phase(float (&values)[kValues<kTokens>],
                                             const float (&totals)[kTokenBlocks<kTokens>],
                                             const QuantizedMatrix& matrix,
                                             const Arguments& arguments, const Plan& plan,
                                             int phase_index, int tile, int lane) {
  if (!kHasClusters && plan.splits > 1) {
#pragma unroll
    for (int i = 0; i < kValues<kTokens>; ++i) {
      float* const place = arguments.workspace +
                           static_cast<int64_t>(token_of<kTokens>(i, lane)) * matrix.outputs +
                           tile * kTileOutputs + row_of<kTokens>(i, lane);
      if (phase_index > 0) values[i] = *place + values[i];
      if (phase_index + 1 < plan.splits) *place = values[i];
    }
    if (phase_index + 1 < plan.splits) return;
  }
  finish_tile<kTokens, kOutput>(values, totals, matrix, arguments, tile, lane);
}

// This warp's run of units: multiplies, and leaves or finishes the sum of each tile it touches.
template <int kTokens, Output kOutput>
__device__ __forceinline__ void multiply(const SharedMemory<kTokens>& shared,
                                         const QuantizedMatrix& matrix, const Arguments& arguments,
                                         int phase_index, const float (&totals)[kTokenBlocks<kTokens>],
                                         Copier& copier, int& slot, int warp, int lane) {
  constexpr int kSlot = kUnitBytes<kGroupSize>;
  char* const ring = shared.ring_of(warp);
  const Phase first_phase = shared.plan().phase(phase_index);
  const int begin = first_phase.begin(warp);
  const int end = first_phase.begin(warp + 1);
  if (begin == end) return;
  int tile_index = begin / first_phase.units;
  int unit = begin - tile_index * first_phase.units;
  const int units = first_phase.units;
#pragma unroll 1
  for (int item = begin; item < end; ++tile_index) {
    const int first_item = item;
    const int end_of_tile = smaller(end, item + units - unit);
    float y[kTokenBlocks<kTokens>][4] = {};
    UnitActivations<kTokens, kGroupSize> activations = shared.unit(unit);
#pragma unroll 1
    for (; item < end_of_tile; ++item) {
      wait_copies<kStages - 2>();
      __syncwarp();
      // Every lane has read the slot of the last turn: fill it again.
      copier.copy_next(ring + (slot == 0 ? (kStages - 1) * kSlot : slot - kSlot), matrix, shared, warp,
                       lane);
      add_unit<kTokens, kGroupSize>(y, ring + slot, activations, lane);
      activations.base += UnitActivations<kTokens, kGroupSize>::kBytes;
      slot = slot == (kStages - 1) * kSlot ? 0 : slot + kSlot;
    }
    unit = 0;

    float values[kValues<kTokens>];
    if (kTokens == 1) {
      const int own = lane % 4;
      values[0] = (own == 0 ? y[0][0] : own == 1 ? y[0][1] : own == 2 ? y[0][2] : y[0][3]) *
                  row_scale(own);
    } else {
#pragma unroll
      for (int i = 0; i < kValues<kTokens>; ++i) values[i] = y[i / 4][i % 4] * row_scale(i);
    }
    const Plan plan = shared.plan();
    if (item - first_item == units && plan.ranks == 1) {
      finish_phase<kTokens, kOutput>(values, totals, matrix, arguments, plan, phase_index,
                                     plan.tile(tile_index), lane);
    } else {
      __syncwarp();
      float* const run = shared.run(plan, plan.phase(phase_index), warp, tile_index);
#pragma unroll
      for (int i = 0; i < kValues<kTokens>; ++i) run[i * kWarpSize + lane] = values[i];
    }
  }
}

// Adds up the runs of one tile that the warps of one block have left.
template <int kTokens>
__device__ __forceinline__ void add_runs(float (&values)[kValues<kTokens>],
                                         const SharedMemory<kTokens>& shared,
                                         const Plan& plan, const Phase& phase, int tile_index,
                                         int rank, int lane) {
  const int first = phase.warp_of(tile_index * phase.units);
  const int last = phase.warp_of((tile_index + 1) * phase.units - 1);
  float sums[kValues<kTokens>] = {};
#pragma unroll 1
  for (int warp = first; warp <= last; ++warp) {
    if (phase.begin(warp) == phase.begin(warp + 1)) continue;
    const float* const run = shared.run(plan, phase, warp, tile_index);
#pragma unroll
    for (int i = 0; i < kValues<kTokens>; ++i) sums[i] += load_of_rank(run + i * kWarpSize + lane, rank);
  }
#pragma unroll
  for (int i = 0; i < kValues<kTokens>; ++i) values[i] += sums[i];
}

// The tiles that several warps of the block have worked on.
template <int kTokens, Output kOutput>
__device__ __forceinline__ void finish_shared_tiles(
    const SharedMemory<kTokens>& shared, const QuantizedMatrix& matrix,
    const Arguments& arguments, const float (&totals)[kTokenBlocks<kTokens>], int phase_index,
    int warp, int lane) {
  const Plan plan = shared.plan();
  const Phase phase = plan.phase(phase_index);
#pragma unroll 1
  for (int tile_index = warp; tile_index < plan.tiles; tile_index += kWarps) {
    const int first = phase.warp_of(tile_index * phase.units);
    const int last = phase.warp_of((tile_index + 1) * phase.units - 1);
    if (first == last) continue;  // that warp finished it
    float values[kValues<kTokens>] = {};
    add_runs(values, shared, plan, phase, tile_index, 0, lane);
    finish_phase<kTokens, kOutput>(values, totals, matrix, arguments, plan, phase_index,
                                   plan.tile(tile_index), lane);
  }
}

// The tiles of a cluster: each block finishes every ranks-th one.
template <int kTokens, Output kOutput>
__device__ __forceinline__ void finish_cluster_tiles(
    const SharedMemory<kTokens>& shared, const QuantizedMatrix& matrix,
    const Arguments& arguments, float (&totals)[kTokenBlocks<kTokens>], int warp, int lane) {
  constexpr bool kHasNorm = kOutput != Output::kAdd;
  if (kHasNorm && warp == 0 && lane < (kTokens == 1 ? 1 : 4)) {
#pragma unroll
    for (int block = 0; block < kTokenBlocks<kTokens>; ++block)
      shared.totals()[token_of<kTokens>(4 * block, lane)] = totals[block];
  }
  cluster_arrive();
  cluster_wait();
  const Plan plan = shared.plan();
  if (kHasNorm) {
#pragma unroll
    for (int block = 0; block < kTokenBlocks<kTokens>; ++block) {
      totals[block] = 0.0f;
#pragma unroll 1
      for (int rank = 0; rank < plan.ranks; ++rank)
        totals[block] += load_of_rank(shared.totals() + token_of<kTokens>(4 * block, lane), rank);
    }
  }
  const int stride = plan.ranks * kWarps;
  int tile_index = plan.first_phase + plan.ranks * warp;
  bool is_last;
  do {
    is_last = tile_index + stride >= plan.tiles;
    float values[kValues<kTokens>] = {};
    if (tile_index < plan.tiles) {
#pragma unroll 1
      for (int rank = 0; rank < plan.ranks; ++rank)
        add_runs(values, shared, plan, plan.phase(rank), tile_index, rank, lane);
    }
    // No block may leave while another one reads its shared memory.
    if (is_last) cluster_arrive();
    if (tile_index < plan.tiles)
      finish_tile<kTokens, kOutput>(values, totals, matrix, arguments, plan.tile(tile_index), lane);
    tile_index += stride;
  } while (!is_last);
  cluster_wait();
}

template <int kTokens, Output kOutput>
__device__ __forceinline__ void run_gemv(const QuantizedMatrix& matrix,
                                         const Arguments& arguments) {
  constexpr bool kHasNorm = kOutput != Output::kAdd;
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const SharedMemory<kTokens> shared;

  let_dependents_launch();
  Copier copier;
  int end_phase;
  {
    const Plan plan = make_plan(matrix, arguments.splits);
    if (threadIdx.x == 0) shared.store(plan);
    __syncthreads();
    copier.phase_index = plan.first_phase;
    copier.next_item = -1;
    copier.seek(matrix, plan, warp, lane);
    end_phase = plan.end_phase;
  }
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage)
    copier.copy_next(shared.ring_of(warp) + stage * kUnitBytes<kGroupSize>, matrix, shared, warp,
                     lane);
  wait_for_inputs();

  float totals[kTokenBlocks<kTokens>] = {};
  int slot = 0;
  int index = shared.plan().first_phase;
#pragma unroll 1
  for (;;) {
    const Phase phase = shared.plan().phase(index);
    quantize<kTokens, kHasNorm>(shared, matrix, arguments, phase, warp, lane);
    __syncthreads();
    if (kHasNorm) add_squares(totals, shared, phase.units, lane);
    multiply<kTokens, kOutput>(shared, matrix, arguments, index, totals, copier, slot,
                                           warp, lane);
    if (kHasClusters && shared.plan().ranks > 1) {
      finish_cluster_tiles<kTokens, kOutput>(shared, matrix, arguments, totals, warp,
                                                         lane);
      return;
    }
    __syncthreads();
    finish_shared_tiles<kTokens, kOutput>(shared, matrix, arguments, totals, index,
                                                      warp, lane);
    if (kHasClusters || ++index == end_phase) return;
    __syncthreads();
  }
}

}  // namespace

#endif
