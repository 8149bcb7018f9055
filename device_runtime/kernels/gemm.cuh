// y[t,m] = sum_k w[k,m] x[t,k] for many tokens: the part that all matrix formats share.
//
// A block computes a tile of kTileOutputs x kTileTokens. Its inputs come through a ring of kStages
// slots in shared memory, kStageInputs at a time, by asynchronous copies. Weights are the A operand
// of the tensor core (16 outputs), tokens the B operand (8 tokens), sums are fp32. How weights lie
// in memory and become A fragments is up to the Weights class (w4a16_gemm.cuh, f16_gemm.cuh).
//
// The first `stream_tiles` tiles are cut, as one row of steps, into equal runs, one for each block;
// the others are taken whole, block after block. A tile of which several blocks have a part is
// finished by the block that comes last: it adds all parts in the order of their inputs, so that
// the result does not depend on who was last. This keeps every SM busy whatever the shape.
//
// What becomes of the sums is decided when they are there: one kernel for all three, since what they
// have in common is most of its code.
#ifndef TURBOJET_GEMM_CUH
#define TURBOJET_GEMM_CUH

#include "fragments.cuh"
#include "load_matrix.cuh"

namespace {

#ifndef TURBOJET_GEMM_PAIRS_AHEAD
#define TURBOJET_GEMM_PAIRS_AHEAD 2
#endif

// Plain copies pass through registers: few at a time.
constexpr int kCopyUnroll = TURBOJET_PLAIN ? 1 : 64;

enum class Output : int32_t { kHalf, kSilu, kAdd };  // twin gemm_shape.py GemmOutput

template <int kWarpsOut_, int kWarpsTokens_, int kWarpOutputs_, int kWarpTokens_,
          int kStageInputs_, int kStages_, int kBlocksPerSm_>
struct Tile {
  static constexpr int kWarpsOut = kWarpsOut_;
  static constexpr int kWarpsTokens = kWarpsTokens_;
  static constexpr int kWarpOutputs = kWarpOutputs_;
  static constexpr int kWarpTokens = kWarpTokens_;
  static constexpr int kStageInputs = kStageInputs_;
  static constexpr int kStages = kStages_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;
  static constexpr int kThreads = kWarpsOut * kWarpsTokens * kWarpSize;
  static constexpr int kOutputs = kWarpsOut * kWarpOutputs;
  static constexpr int kTokens = kWarpsTokens * kWarpTokens;
  static constexpr int kRowTiles = kWarpOutputs / 16;   // A fragments of a warp
  static constexpr int kTokenTiles = kWarpTokens / 8;   // B fragments of a warp
  static constexpr int kPairsAhead = TURBOJET_GEMM_PAIRS_AHEAD;
  static constexpr int kSubSteps = kStageInputs / 16;
  static constexpr int kRowBytes = kStageInputs * 2;    // of the activations of one token
  static constexpr int kActivationBytes = kTokens * kRowBytes;
  static_assert(kWarpOutputs % 32 == 0 && kWarpTokens % 8 == 0, "whole fragments");
  static_assert(kTokenTiles <= 2 || kTokenTiles % 4 == 0, "in pairs, and added in fours");
  static_assert(kStageInputs % 64 == 0, "eight chunks of a row are swizzled");
  static_assert(kStages >= 3, "one slot is read, one was, the others are on their way");
};

struct Shape {
  int num_tokens;
  int inputs;
  int outputs;
};

struct Destination {
  Output output;
  void* result;        // kHalf: fp16 [num_tokens][outputs], kSilu: fp16 [num_tokens][outputs / 2],
                       // kAdd: fp32 [num_tokens][outputs]
  const fp16* bias;    // [outputs] or null, not kSilu
  float* workspace;    // two tiles of sums for each block
  uint32_t* tickets;   // one for each of the stream_tiles, zero before and after
};

// Which steps of which tile a block takes.
struct Schedule {
  int steps;         // of one tile
  int tiles;
  int stream_tiles;
  int token_tiles;

  template <class T>
  static __device__ __forceinline__ Schedule make(const Shape& shape, int stream_tiles) {
    const int token_tiles = (shape.num_tokens + T::kTokens - 1) / T::kTokens;
    const int output_tiles = (shape.outputs + T::kOutputs - 1) / T::kOutputs;
    return Schedule{(shape.inputs + T::kStageInputs - 1) / T::kStageInputs,
                    token_tiles * output_tiles, stream_tiles, token_tiles};
  }
  // First step of a block's run through the streamed tiles.
  __device__ __forceinline__ int begin(int block) const {
    return static_cast<int>(static_cast<int64_t>(stream_tiles) * steps * block / gridDim.x);
  }
  __device__ __forceinline__ int block_of(int step) const {
    return static_cast<int>((static_cast<int64_t>(step + 1) * gridDim.x - 1) /
                            (stream_tiles * steps));
  }
};

// A part of one tile: steps first .. first + count - 1 of it.
struct Segment {
  int tile;
  int first;
  int count;
};

template <class T, class Weights>
struct Pipeline {
  static constexpr int kSlotBytes = T::kActivationBytes + Weights::kStageBytes;
  static constexpr int kRingBytes = kSlotBytes * T::kStages;

  const Weights& weights;
  const fp16* x;
  const Shape& shape;
  char* ring;
  int first_token;
  int first_output;

  __device__ __forceinline__ char* slot(int index) const { return ring + index * kSlotBytes; }

  // Rows past the last token repeat it: what they give is not stored. Inputs past the end are zero.
  __device__ __forceinline__ void copy_step(int slot_index, int step) const {
    constexpr int kChunks = T::kRowBytes / 16;
    constexpr int kRows = T::kThreads / kChunks;
    const int chunk = threadIdx.x % kChunks;
    const int row = threadIdx.x / kChunks;
    const int input = step * T::kStageInputs + chunk * 8;
    const bool is_inside = input < shape.inputs;
    const char* const source = reinterpret_cast<const char*>(
        x + static_cast<int64_t>(first_token) * shape.inputs + (is_inside ? input : 0));
    const int last = smaller(shape.num_tokens - first_token, T::kTokens) - 1;
    char* const target = slot(slot_index);
#pragma unroll kCopyUnroll
    for (int i = 0; i < (T::kTokens + kRows - 1) / kRows; ++i) {
      const int own = row + i * kRows;
      if (T::kTokens % kRows == 0 || own < T::kTokens)
        copy16_or_zeros_async(target + own * T::kRowBytes + ((chunk ^ (own & 7)) << 4),
                              source + static_cast<uint32_t>(smaller(own, last) * shape.inputs * 2),
                              is_inside);
    }
    weights.copy_step(target + T::kActivationBytes, step, first_output);
  }

#if TURBOJET_PLAIN
  // sums += the products of one segment: two slots in turn, and a row's weights come from the lanes
  // that have them.
  __device__ __forceinline__ void multiply_segment(
      float (&sums)[T::kRowTiles][T::kTokenTiles][4], const Segment& segment) const {
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int token = warp / T::kWarpsOut * T::kWarpTokens + lane % 4 * 2;
    typename Weights::Fragments source(warp % T::kWarpsOut * T::kWarpOutputs, lane);
#pragma unroll 1
    for (int step = 0; step < segment.count; ++step) {
      char* const own = slot(step % 2);
      copy_step(step % 2, segment.first + step);
      __syncthreads();
#pragma unroll 1
      for (int k = 0; k < T::kSubSteps; ++k) {
        uint32_t a[T::kRowTiles][4];
        source.load(own + T::kActivationBytes, k);
        source.make(a, k);
#pragma unroll 1
        for (int lanes = 0; lanes < 4; ++lanes) multiply_columns(sums, a, own, token, k, lanes);
      }
    }
    __syncthreads();
  }

  // The four inputs of a sub-step whose weights lane 4 r + `column` has.
  static __device__ __forceinline__ void multiply_columns(
      float (&sums)[T::kRowTiles][T::kTokenTiles][4], const uint32_t (&a)[T::kRowTiles][4],
      const char* slot, int token, int k, int column) {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < T::kRowTiles; ++i) {
      uint32_t w[4];
#pragma unroll
      for (int word = 0; word < 4; ++word)
        w[word] = __shfl_sync(kFullMask, a[i][word], (lane & ~3) | column);
#pragma unroll
      for (int j = 0; j < T::kTokenTiles; ++j) {
        __syncwarp();  // so that the compiler does not load all tokens at once and spill them
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int row = token + j * 8 + c;
          const char* const values = slot + row * T::kRowBytes + column * 4;
          const uint32_t low =
              *reinterpret_cast<const uint32_t*>(values + ((2 * k ^ (row & 7)) << 4));
          const uint32_t high =
              *reinterpret_cast<const uint32_t*>(values + (((2 * k + 1) ^ (row & 7)) << 4));
          sums[i][j][c] = dot2_f16(w[0], low, dot2_f16(w[2], high, sums[i][j][c]));
          sums[i][j][2 + c] = dot2_f16(w[1], low, dot2_f16(w[3], high, sums[i][j][2 + c]));
        }
      }
    }
  }
#else
  // sums += the products of one segment.
  //
  // While the fragments of a sub-step (16 inputs) multiply pair after pair of token tiles, those of
  // the next one are made, and tokens are loaded kPairsAhead pairs before they are used.
  __device__ __forceinline__ void multiply_segment(
      float (&sums)[T::kRowTiles][T::kTokenTiles][4], const Segment& segment) const {
    constexpr int kPairs = (T::kTokenTiles + 1) / 2;
    constexpr int kAhead = kPairs % 4 == 0 ? T::kPairsAhead : kPairs % 2 == 0 ? 2 : 1;
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int warp_output = warp % T::kWarpsOut * T::kWarpOutputs;
    const int warp_token = warp / T::kWarpsOut * T::kWarpTokens;
    // Row and chunk of the activations that this lane points ldmatrix to.
    const int row = warp_token + (T::kTokenTiles == 1 ? lane % 8 : lane / 16 * 8 + lane % 8);
    const int offset = row * T::kRowBytes + ((lane / 8 % 2 ^ lane % 8) << 4);

#pragma unroll
    for (int stage = 0; stage < T::kStages - 1; ++stage) {
      if (stage < segment.count) copy_step(stage, segment.first + stage);
      commit_copies();
    }
    wait_copies<T::kStages - 2>();
    __syncthreads();

    uint32_t a[2][T::kRowTiles][4];
    uint32_t b[kAhead][4];
    typename Weights::Fragments source(warp_output, lane);
    source.load(slot(0) + T::kActivationBytes, 0);
#pragma unroll
    for (int pair = 0; pair < kAhead; ++pair)
      load_tokens(b[pair], slot(0) + offset + pair * kPairBytes);
    source.make(a[0], 0);

    int read_slot = 0;
    int write_slot = T::kStages - 1;
#pragma unroll 1
    for (int step = 0; step < segment.count; ++step) {
#pragma unroll
      for (int k = 0; k < T::kSubSteps; ++k) {
        const char* own_slot = slot(read_slot);
        if (k == T::kSubSteps - 1) {
          wait_copies<T::kStages - 3>();
          __syncthreads();
          read_slot = read_slot == T::kStages - 1 ? 0 : read_slot + 1;
          // All have read what is overwritten here: it was used in the step before.
          if (step + T::kStages - 1 < segment.count)
            copy_step(write_slot, segment.first + step + T::kStages - 1);
          commit_copies();
          write_slot = write_slot == T::kStages - 1 ? 0 : write_slot + 1;
        }
        const int next = (k + 1) % T::kSubSteps;
        const char* const next_slot = slot(read_slot);
        source.load(next_slot + T::kActivationBytes, next);
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
          uint32_t(&own)[4] = b[(k * kPairs + pair) % kAhead];
#pragma unroll
          for (int i = 0; i < T::kRowTiles; ++i) {
            const uint32_t(&w)[4] = a[k % 2][i];
            multiply(sums[i][2 * pair], w[0], w[1], w[2], w[3], own[0], own[1]);
            if (2 * pair + 1 < T::kTokenTiles)
              multiply(sums[i][T::kTokenTiles == 1 ? 0 : 2 * pair + 1], w[0], w[1], w[2], w[3],
                       own[2], own[3]);
          }
          const int later = pair + kAhead;
          if (later < kPairs)
            load_tokens(own, own_slot + (offset ^ k * 32) + later * kPairBytes);
          else
            load_tokens(own, next_slot + (offset ^ next * 32) + (later - kPairs) * kPairBytes);
          if (pair == (kPairs - 1) / 2) source.make(a[(k + 1) % 2], next);
        }
      }
    }
    wait_copies<0>();
    __syncthreads();
  }

  static constexpr int kPairBytes = 16 * T::kRowBytes;

  // The B fragments of two neighbouring token tiles, or of the only one.
  static __device__ __forceinline__ void load_tokens(uint32_t (&b)[4], const char* row) {
    if (T::kTokenTiles == 1) {
      uint32_t words[2];
      load_two_matrices(words, row);
      b[0] = words[0];
      b[1] = words[1];
    } else {
      load_matrices(b, row);
    }
  }
#endif
};

// Leaves a part of a tile in the workspace; on the block that comes last adds up all parts and
// returns true. A block begins at most one part that is not the start of its run.
template <class T>
__device__ __forceinline__ bool combine_parts(float (&sums)[T::kRowTiles][T::kTokenTiles][4],
                                              const Schedule& schedule, const Segment& segment,
                                              const Destination& destination, int* shared_flag) {
  constexpr int kQuads = T::kRowTiles * T::kTokenTiles;
  constexpr int kPartQuads = kQuads * T::kThreads;
  float4* const parts = reinterpret_cast<float4*>(destination.workspace);
  const int tile_begin = segment.tile * schedule.steps;
  const int first_block = schedule.block_of(tile_begin);
  const int last_block = schedule.block_of(tile_begin + schedule.steps - 1);
  const auto part_of = [&](int block) -> float4* {
    const bool is_start = schedule.begin(block) >= tile_begin;
    return parts + (static_cast<int64_t>(2 * block + is_start) * kPartQuads + threadIdx.x);
  };

  float4* const own = part_of(blockIdx.x);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const float(&c)[4] = sums[q / T::kTokenTiles][q % T::kTokenTiles];
    own[q * T::kThreads] = float4{c[0], c[1], c[2], c[3]};
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t before = take_ticket(destination.tickets + segment.tile);
    const bool is_last = before == static_cast<uint32_t>(last_block - first_block);
    if (is_last) destination.tickets[segment.tile] = 0;
    *shared_flag = is_last;
  }
  __syncthreads();
  const bool is_last = *shared_flag != 0;
  __syncthreads();
  if (!is_last) return false;

#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    float(&c)[4] = sums[q / T::kTokenTiles][q % T::kTokenTiles];
    c[0] = c[1] = c[2] = c[3] = 0.0f;
  }
  // Up to sixteen loads at once: of several parts where they are small, of a slice of a large one.
  constexpr int kSlice = kQuads < 16 ? kQuads : 8;
  constexpr int kBatch = kQuads < 16 ? 16 / kQuads : 1;
#pragma unroll 1
  for (int first = first_block; first <= last_block; first += kBatch) {
#pragma unroll
    for (int slice = 0; slice < kQuads; slice += kSlice) {
      float4 values[kBatch][kSlice];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float4* const part = part_of(smaller(first + i, last_block));
#pragma unroll
        for (int q = 0; q < kSlice; ++q)
          values[i][q] = load_quad_shared_by_blocks(part + (slice + q) * T::kThreads);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + i > last_block) break;
#pragma unroll
        for (int q = 0; q < kSlice; ++q) {
          float(&c)[4] = sums[(slice + q) / T::kTokenTiles][(slice + q) % T::kTokenTiles];
          c[0] += values[i][q].x;
          c[1] += values[i][q].y;
          c[2] += values[i][q].z;
          c[3] += values[i][q].w;
        }
      }
    }
  }
  return true;
}

__device__ __forceinline__ float silu(float value) { return value / (1.0f + __expf(-value)); }

// fp16 results, laid out token by token in shared memory and stored in 16-byte chunks.
template <class T, Output kOutput>
__device__ __forceinline__ void store_half(const float (&sums)[T::kRowTiles][T::kTokenTiles][4],
                                           const Shape& shape, const Destination& destination,
                                           int first_token, int first_output, char* shared) {
  constexpr int kWidth = kOutput == Output::kSilu ? T::kOutputs / 2 : T::kOutputs;
  constexpr int kPitch = kWidth * 2 + 16;  // tokens on different banks
  const int thread = thread_index_here();
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const bool is_odd = lane / 4 % 2;
#pragma unroll
  for (int i = 0; i < T::kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // This lane's pair of outputs, after rows r and r ^ 1 have exchanged a token.
      const int output = warp % T::kWarpsOut * T::kWarpOutputs + i * 16 + half * 8 + (lane / 4 & ~1);
      uint32_t biases = 0;
      if (kOutput == Output::kHalf && destination.bias != nullptr &&
          first_output + output < shape.outputs)
        biases = *reinterpret_cast<const uint32_t*>(destination.bias + first_output + output);
#pragma unroll
      for (int j = 0; j < T::kTokenTiles; ++j) {
        const float first = sums[i][j][2 * half];
        const float second = sums[i][j][2 * half + 1];
        const float mine = is_odd ? second : first;
        const float sent = is_odd ? first : second;
        const float received = __shfl_xor_sync(kFullMask, sent, 4);
        const float low = is_odd ? received : mine;
        const float high = is_odd ? mine : received;
        const int token = warp / T::kWarpsOut * T::kWarpTokens + j * 8 + lane % 4 * 2 + is_odd;
        char* const row = shared + token * kPitch;
        if (kOutput == Output::kSilu)
          reinterpret_cast<fp16*>(row)[output / 2] = to_fp16(silu(low) * high);
        else
          reinterpret_cast<uint32_t*>(row)[output / 2] =
              pack_fp16(low + low_to_float(biases), high + high_to_float(biases));
      }
    }
  }
  __syncthreads();
  constexpr int kChunks = kWidth * 2 / 16;
  const int width = kOutput == Output::kSilu ? shape.outputs / 2 : shape.outputs;
  const int first_column = kOutput == Output::kSilu ? first_output / 2 : first_output;
#pragma unroll 4
  for (int index = thread; index < T::kTokens * kChunks; index += T::kThreads) {
    const int token = index / kChunks;
    const int column = first_column + index % kChunks * 8;
    if (first_token + token < shape.num_tokens && column < width)
      *reinterpret_cast<uint4*>(static_cast<fp16*>(destination.result) +
                                static_cast<int64_t>(first_token + token) * width + column) =
          *reinterpret_cast<const uint4*>(shared + token * kPitch + index % kChunks * 16);
  }
}

// residual += sums: eight lanes share 32 bytes of a token's row.
template <class T>
__device__ __forceinline__ void add_residual(const float (&sums)[T::kRowTiles][T::kTokenTiles][4],
                                             const Shape& shape, const Destination& destination,
                                             int first_token, int first_output) {
  constexpr int kBatch = T::kTokenTiles < 4 ? T::kTokenTiles : 4;  // token tiles loaded at once
  const int thread = thread_index_here();
  const int lane = thread % kWarpSize;
  const int warp = thread / kWarpSize;
  const int token = first_token + warp / T::kWarpsOut * T::kWarpTokens + lane % 4 * 2;
  const int output = first_output + warp % T::kWarpsOut * T::kWarpOutputs + lane / 4;
#pragma unroll
  for (int i = 0; i < T::kRowTiles; ++i) {
    float bias[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = output + i * 16 + half * 8;
      if (destination.bias != nullptr && own < shape.outputs)
        bias[half] = to_float(destination.bias[own]);
    }
#pragma unroll
    for (int first = 0; first < T::kTokenTiles; first += kBatch) {
      float old[kBatch][4];
      // All loads before the first store: the compiler cannot know that they do not overlap.
#pragma unroll
      for (int part = 0; part < 2; ++part) {
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int own_token = token + (first + j) * 8 + c % 2;
            const int own = output + i * 16 + c / 2 * 8;
            float* const place =
                static_cast<float*>(destination.result) +
                static_cast<int64_t>(own_token) * shape.outputs + own;
            if (own_token < shape.num_tokens && own < shape.outputs) {
              if (part == 0)
                old[j][c] = *place;
              else
                *place = old[j][c] + (sums[i][first + j][c] + bias[c / 2]);
            }
          }
        }
      }
    }
  }
}

template <class T, class Weights>
__device__ __forceinline__ void run_gemm(const Weights& weights, const fp16* x, const Shape& shape,
                                         const Destination& destination, int stream_tiles) {
  char* const shared = dynamic_shared_bytes();
  // Dependents launch when all blocks are through: earlier ones would share the SMs unevenly.
  wait_for_inputs();
  const Schedule schedule = Schedule::make<T>(shape, stream_tiles);
  int unit = schedule.begin(blockIdx.x);
  const int end = schedule.begin(blockIdx.x + 1);
  int whole_tile = stream_tiles + blockIdx.x;
#pragma unroll 1
  for (;;) {
    Segment segment;
    if (unit < end) {
      segment.tile = unit / schedule.steps;
      segment.first = unit - segment.tile * schedule.steps;
      segment.count = smaller(schedule.steps - segment.first, end - unit);
      unit += segment.count;
    } else if (whole_tile < schedule.tiles) {
      segment = Segment{whole_tile, 0, schedule.steps};
      whole_tile += gridDim.x;
    } else {
      return;
    }
    const int output_tile = segment.tile / schedule.token_tiles;
    const int token_tile = segment.tile - output_tile * schedule.token_tiles;
    const int first_output = output_tile * T::kOutputs;
    const int first_token = token_tile * T::kTokens;
    float sums[T::kRowTiles][T::kTokenTiles][4] = {};
    Pipeline<T, Weights>{weights, x, shape, shared, first_token, first_output}.multiply_segment(
        sums, segment);
    if (segment.count != schedule.steps &&
        !combine_parts<T>(sums, schedule, segment, destination, reinterpret_cast<int*>(shared)))
      continue;
    if (destination.output == Output::kAdd)
      add_residual<T>(sums, shape, destination, first_token, first_output);
    else if (destination.output == Output::kSilu)
      store_half<T, Output::kSilu>(sums, shape, destination, first_token, first_output, shared);
    else
      store_half<T, Output::kHalf>(sums, shape, destination, first_token, first_output, shared);
    __syncthreads();
  }
}

}  // namespace

#endif
