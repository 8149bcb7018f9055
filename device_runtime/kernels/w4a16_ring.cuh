// The weights of a block on their way through shared memory, for the GEMV of w4a16_gemv.cuh.
//
// A block owns every gridDim-th tile of 32 outputs. The units (256 inputs) of all its tiles, tile
// after tile, are dealt out to its warps in turn, so that neighbouring units are read at the same
// time. Each warp keeps kStages units in flight through a private ring.
#ifndef TURBOJET_W4A16_RING_CUH
#define TURBOJET_W4A16_RING_CUH

#include "w4a16.cuh"

namespace {

#ifndef TURBOJET_GROUP_SIZE
#define TURBOJET_GROUP_SIZE 128
#endif
constexpr int kGroupSize = TURBOJET_GROUP_SIZE;
static_assert(kGroupSize == 128 || kGroupSize == 64 || kGroupSize == 32, "groups of w4a16.cuh");
#ifndef TURBOJET_GEMV_WARPS
#define TURBOJET_GEMV_WARPS 16
#endif
constexpr int kWarps = TURBOJET_GEMV_WARPS;
// The plain variant's copies are done at once: more than one stage would only take memory.
constexpr int kStages = TURBOJET_PLAIN ? 1 : TURBOJET_GEMV_STAGES;  // the source defines it
#ifndef TURBOJET_GEMV_PARTS
#define TURBOJET_GEMV_PARTS 1
#endif
constexpr int kParts = TURBOJET_PLAIN ? 1 : TURBOJET_GEMV_PARTS;  // that a unit is copied in
constexpr int kPartStretches = kUnitStretches / kParts;
static_assert(kParts == 1 || kParts == kUnitStretches, "a unit's copy is whole or by stretches");
constexpr int kRingParts = kStages * kParts;
// Parts of the ring that are filled before the activations are there.
#ifndef TURBOJET_GEMV_EARLY_PARTS
#define TURBOJET_GEMV_EARLY_PARTS kParts
#endif
constexpr int kEarlyParts = TURBOJET_GEMV_EARLY_PARTS;
// The same where a warp has one unit only, in stretches: nothing is left to hide the activations'
// loads behind, which queue up behind these. For one token.
#ifndef TURBOJET_GEMV_SINGLE_EARLY
#define TURBOJET_GEMV_SINGLE_EARLY \
  (TURBOJET_GEMV_STAGES > 1 && TURBOJET_GEMV_PARTS == 1 ? 1 : kUnitStretches)
#endif
constexpr int kSingleEarly = TURBOJET_PLAIN ? kUnitStretches : TURBOJET_GEMV_SINGLE_EARLY;
constexpr bool kSplitsSingle = kSingleEarly < kUnitStretches;
static_assert(!kSplitsSingle || kParts == 1, "one way of splitting a unit");
// Whether the next kernel may start when a warp of each block has asked for the last of its weights,
// not before: where its blocks find place beside this one's, their weights would delay this one's
// activations.
#ifndef TURBOJET_GEMV_TRIGGERS_LATE
#define TURBOJET_GEMV_TRIGGERS_LATE 0
#endif
constexpr bool kTriggersLate = TURBOJET_GEMV_TRIGGERS_LATE;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kQuantizeThreads = 256;

// What the whole block agrees on.
struct Work {
  int units;        // of the matrix
  int phase_units;  // of a phase; the last one may have fewer
  int block_tiles;  // tiles of this block: blockIdx.x + i * gridDim.x

  __device__ __forceinline__ int size_of(int first_unit) const {
    return smaller(phase_units, units - first_unit);
  }
  // Whether no warp has a second unit.
  __device__ __forceinline__ bool is_single() const { return units * block_tiles <= kWarps; }
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
  // Between batches of tiles.
  __device__ __forceinline__ SplitBarrier* split_barrier(const Work& work, int held_tiles) const {
    return reinterpret_cast<SplitBarrier*>(unit_sums(work) +
                                           held_tiles * work.phase_units * kTileValues);
  }
};

// Copies a warp's units to its ring, in the order in which they are used: phase after phase, tile
// after tile.
struct Copier {
  WeightSource<kGroupSize> source;
  int unit;    // of the phase
  int index;   // of the tile in the block
  int first;   // unit of the phase; work.units when everything was copied
  int size;    // of the phase
  int num_filled;  // parts, before the main loop
  uint64_t policy;

  __device__ __forceinline__ Copier(const QuantizedMatrix& matrix, const Work& work, int warp,
                                    int lane)
      : source(matrix, blockIdx.x, warp * kUnitStretches, lane),
        unit(warp),
        index(0),
        first(0),
        size(work.size_of(0)),
        num_filled(0),
        policy(weights_policy()) {
    if (unit >= size) next_tile(matrix, work, warp, lane);
  }

  __device__ __forceinline__ void next_tile(const QuantizedMatrix& matrix, const Work& work,
                                            int warp, int lane) {
    do {
      unit -= size;
      if (++index < work.block_tiles) {
        source.move(matrix, gridDim.x, -size * kUnitStretches);
        continue;
      }
      first += size;
      if (first == work.units) return;
      index = 0;
      unit = warp;
      size = work.size_of(first);
      source = WeightSource<kGroupSize>(matrix, blockIdx.x, (first + unit) * kUnitStretches, lane);
    } while (unit >= size);
  }

  // Starts the copy of a part of the next unit; parts come in their order.
  template <int kPart>
  __device__ __forceinline__ void copy_next(char* slot, const QuantizedMatrix& matrix,
                                            const Work& work, int warp, int lane) {
    copy_stretches<kPart * kPartStretches, kPartStretches>(slot, matrix, work, warp, lane);
  }

  template <int kFirst, int kCount>
  __device__ __forceinline__ void copy_stretches(char* slot, const QuantizedMatrix& matrix,
                                                 const Work& work, int warp, int lane) {
    if (first < work.units) {
      source.template copy_async<kFirst, kCount>(
          slot, matrix, matrix.inputs - (first + unit) * kUnitInputs, policy, lane);
      if (kFirst + kCount < kUnitStretches) {
        source.move(matrix, 0, kCount);
      } else {
        source.move(matrix, 0, kWarps * kUnitStretches - kFirst);
        unit += kWarps;
        if (unit >= size) next_tile(matrix, work, warp, lane);
        if (kTriggersLate && first == work.units) let_dependents_launch();
      }
    }
    commit_copies();
  }
};

// Starts the copies of the next `count` parts, which go on where the last call ended.
template <int kTokens>
__device__ __forceinline__ void fill_ring(const SharedMemory<kTokens>& shared, const Work& work,
                                          const QuantizedMatrix& matrix, Copier& copier, int count,
                                          int warp, int lane) {
#pragma unroll 1
  for (; count > 0; --count) {
    const int stage = copier.num_filled / kParts;
    char* const slot = shared.ring_of(warp) + stage * kUnitBytes<kGroupSize>;
    if (copier.num_filled++ % kParts == 0)
      copier.template copy_next<0>(slot, matrix, work, warp, lane);
    else
      copier.template copy_next<kParts - 1>(slot, matrix, work, warp, lane);
  }
}

}  // namespace

#endif
