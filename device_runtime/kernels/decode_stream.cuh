// What one warp of decode_attention.cu does with its share of the cached tokens.
#ifndef TURBOJET_DECODE_STREAM_CUH
#define TURBOJET_DECODE_STREAM_CUH

#include "decode_range.cuh"
#include "decode_share.cuh"
#include "fixed_point.cuh"
#include "fragments.cuh"

namespace {

constexpr int kStepTokens = 32;
constexpr int kMostSlots = 4;  // of a warp's ring
constexpr float kLeastScale = 1.0f / (1 << 24);  // of fp16 beside 0, whose codes are 0

template <bool kIsHalf>
struct Sum {
  using Type = int;
};
template <>
struct Sum<true> {
  using Type = float;
};

// Keys and values of steps of 32 tokens come through a ring of the warp's own; query columns 4 tile
// + 0..3 of lane % 4, high and low digits in turn, are operand B.
template <Kv kKv, int kHeadDim, int kColumnTiles, int kWarps>
class Stream {
  using Layout = Unit<kKv, kHeadDim>;
  static constexpr bool kIsHalf = kKv == Kv::kHalf;
  using Accumulator = typename Sum<kIsHalf>::Type;
  static constexpr int kKeys = kStepTokens / 8;  // of a lane
  static constexpr int kChunks = Layout::kRowBytes / 64;
  static constexpr int kChunkBytes = kStepTokens * 64;
  static constexpr int kPartBytes = kChunks * kChunkBytes;  // keys, or values, of a step
  static constexpr int kParameterBytes = kKv == Kv::kOnline ? 4 * kStepTokens : 0;
  static constexpr int kParameterLanes = 2 * kParameterBytes / 16;  // 16 bytes each
  static constexpr int kGroups = kStepTokens / Layout::kGroupTokens;
  static constexpr int kMost = kIsHalf ? kMostSlots / 2 : kMostSlots;
  static constexpr int kEarly = kIsHalf ? kMost : kEarlyParts;

 public:
  static constexpr int kQueries = 4 * kColumnTiles;
  static constexpr int kResultStride = kHeadDim + 8;  // so that four queries are in different banks
  static constexpr int kSlotBytes = kPartBytes + 2 * kParameterBytes;
  static constexpr int kLeastSlots = kIsHalf ? 1 : 2;

  // ring [num_slots][kSlotBytes], kLeastSlots to kMostSlots of them.
  __device__ __forceinline__ Stream(const StepRange& range, int warp, int lane, char* ring,
                                    int num_slots)
      : range_(range),
        lane_(lane),
        first_step_(range.first + warp),
        num_slots_(num_slots),
        copied_step_(range.first + warp - kWarps),
        copied_unit_(nullptr),
        ring_(ring),
        slot_(ring) {}

  // Asks for the first parts, before the kernel before has finished.
  __device__ __forceinline__ void start() {
    copy_next(ring_, false);
    fill<1, kEarly>();
  }

  // Asks for the rest of the ring's.
  __device__ __forceinline__ void start_rest() { fill<kEarly, kMost>(); }

  // columns [2 * kQueries][row bytes], scales and sums [kQueries]: as put_query leaves them; key:
  // what a code of static int8 is times and plus.
  __device__ __forceinline__ void take_queries(const char* columns, const float* scales,
                                               const float* sums, float2 key) {
    column_ = columns + lane_ / 4 * Layout::kRowBytes + lane_ % 4 * 16;
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      const int query = 4 * tile + lane_ % 4;
      scale_[tile] = scales[query];
      query_sum_[tile] = sums[query];
      if (kKv == Kv::kStatic) {
        query_sum_[tile] *= scale_[tile] * key.y;
        scale_[tile] *= key.x;
      }
      top_[tile] = kNothing;
    }
  }

  __device__ __forceinline__ void run() {
    wait_for_part(num_slots_ - 1);
    __syncwarp();
#pragma unroll 1
    for (int step = first_step_; step < range_.last;) {
      const int tokens = range_.num_tokens - step * kStepTokens;  // 32 or more but for the last
      float scores[kColumnTiles][kKeys];
      score(scores, slot_);
      if (tokens < kStepTokens) {
#pragma unroll
        for (int key = 0; key < kKeys; ++key)
          if (8 * key + lane_ / 4 >= tokens)
#pragma unroll
            for (int tile = 0; tile < kColumnTiles; ++tile) scores[tile][key] = kNothing;
        if (kKv == Kv::kOnline) clear_parameters(slot_, tokens);
      }
      Weights weights;
      weigh(weights, scores, slot_);
      next_part(false);
      if (kIsHalf && tokens < kStepTokens) clear_values(slot_, tokens);
      mix(weights, slot_);
      step += kWarps;
      if (step < range_.last) next_part(true);
    }
    wait_copies<0>();
    __syncwarp();
  }

  // [kQueries][kResultStride] sums, then (top, total) of each query.
  __device__ __forceinline__ void write(float* results) const {
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      const int query = 4 * tile + lane_ % 4;
      const float total = sum_over_keys(total_[tile]);
      const float zeros = kKv == Kv::kOnline ? sum_over_keys(zeros_[tile]) : 0.0f;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i)
        results[query * kResultStride + 8 * i + lane_ / 4] = mixed_[tile][i] + zeros;
      if (lane_ < 4) {
        results[kQueries * kResultStride + 2 * query] = top_[tile];
        results[kQueries * kResultStride + 2 * query + 1] = total;
      }
    }
  }

 private:
  template <int kFirst, int kLast>
  __device__ __forceinline__ void fill() {
#pragma unroll
    for (int part = kFirst; part < kLast; ++part)
      if (part < num_slots_) copy_next(ring_ + part * kSlotBytes, part % 2 == 1);
  }

  // Starts the copy of the keys of the warp's next step, or of the values that belong to the keys
  // before.
  __device__ __forceinline__ void copy_next(char* slot, bool is_value) {
    constexpr int kUnitSteps = Layout::kTokens / kStepTokens;
    if (!is_value) {
      copied_step_ += kWarps;
      if (copied_step_ < range_.last)
        copied_unit_ = range_.unit_address<Layout>(copied_step_ / kUnitSteps) + 16 * lane_;
    }
    if (copied_step_ < range_.last) {
      const int in_unit = copied_step_ % kUnitSteps;
      char* const to = slot + 16 * lane_;
      // Chunks of keys are as far apart as a unit has tokens; values are in one piece.
      const int stride = is_value ? kChunkBytes : kUnitSteps * kChunkBytes;
      const char* const from =
          copied_unit_ +
          (is_value ? Layout::kPartBytes + in_unit * kPartBytes : in_unit * kChunkBytes);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
        for (int i = 0; i < kChunkBytes; i += 512)
          copy16_async(to + chunk * kChunkBytes + i, from + chunk * stride + i);
      // Those of the values come with the keys, so that weights are there before the values.
      if (!is_value && lane_ < kParameterLanes) {
        const bool is_of_value = lane_ >= kParameterLanes / 2;
        copy16_async(to + kPartBytes,
                     copied_unit_ + 2 * Layout::kPartBytes + in_unit * kParameterBytes +
                         is_of_value * (Layout::kParameterBytes - kParameterBytes));
      }
    }
    commit_copies();
  }

  // Goes on from keys to values, or from values to the next keys, and waits for them. When every lane
  // has read what was in the slot before it is filled again, first.
  __device__ __forceinline__ void next_part(bool was_value) {
    char* const before = slot_;
    slot_ = before == ring_ + (num_slots_ - 1) * kSlotBytes ? ring_ : before + kSlotBytes;
    __syncwarp();
    copy_next(before, was_value != (num_slots_ % 2 != 0));
    wait_for_part(num_slots_ - 1);
    __syncwarp();
  }

  // The oldest in flight, when so many came after it.
  static __device__ __forceinline__ void wait_for_part(int num_newer) {
    static_assert(kMostSlots == 4, "a case for each");
    if (num_newer == 0) wait_copies<0>();
    if (num_newer == 1) wait_copies<1>();
    if (num_newer == 2) wait_copies<2>();
    if (num_newer == 3) wait_copies<3>();
  }

  // A step is copied whole: what lies behind the cached tokens counts for nothing, and the newest,
  // which this kernel stores there at the same time, may come along or not. Bytes of other tokens in
  // the same word stay as they are. Scores behind are kNothing, weights 0; but 0 times what no token
  // has written yet may be NaN.
  __device__ __forceinline__ void clear_parameters(char* keys, int tokens) const {
    if (lane_ >= tokens)
      reinterpret_cast<uint32_t*>(keys + kPartBytes + kParameterBytes)[lane_] = 0;
    __syncwarp();
  }

  __device__ __forceinline__ void clear_values(char* values, int tokens) const {
    const StoredRow nothing = {};
#pragma unroll 1
    for (int i = tokens; i < kStepTokens; ++i)
      put_value<kKv, kHeadDim>(values, i, nothing, lane_);
    __syncwarp();
  }

  // scores[tile][j] = score of key 8 j + lane / 4 for query 4 tile + lane % 4, times log2(e).
  __device__ __forceinline__ void score(float (&scores)[kColumnTiles][kKeys],
                                        const char* keys) const {
    const char* const rows = keys + lane_ * 16;
#pragma unroll
    for (int m = 0; m < kKeys / 2; ++m) {
      Accumulator sums[kColumnTiles][4] = {};
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const char* const row = rows + chunk * kChunkBytes + m * 1024;
        const uint4 a = *reinterpret_cast<const uint4*>(row);
        const uint4 b = *reinterpret_cast<const uint4*>(row + 512);
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) {
          // Read for each step: while values are added their registers are for others.
          const uint4 q = *reinterpret_cast<const uint4*>(column_ + 8 * tile * Layout::kRowBytes +
                                                          64 * chunk);
          multiply(sums[tile], a.x, b.x, a.y, b.y, q.x, q.y);
          multiply(sums[tile], a.z, b.z, a.w, b.w, q.z, q.w);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = 2 * m + i;
        uint32_t word = 0;
        if (kKv == Kv::kOnline)
          word = reinterpret_cast<const uint32_t*>(keys + kPartBytes)[8 * key + lane_ / 4];
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) {
          const float dot = join_digits(sums[tile][2 * i], sums[tile][2 * i + 1]);
          if (kKv == Kv::kHalf) scores[tile][key] = scale_[tile] * dot;
          if (kKv == Kv::kStatic) scores[tile][key] = fmaf(scale_[tile], dot, query_sum_[tile]);
          if (kKv == Kv::kOnline)
            scores[tile][key] =
                scale_[tile] *
                fmaf(low_to_float(word), dot, high_to_float(word) * query_sum_[tile]);
        }
      }
    }
  }

  // Weights of a step as operand B of the product with values, and what the sums so far and the step's
  // are to be multiplied by.
  struct Weights {
    uint32_t operand[kColumnTiles][kGroups][2];
    float keep[kColumnTiles], add[kColumnTiles];
  };

  // From scores to weights: 2^score. keys: the step's, whose values' parameters are beside them.
  __device__ __forceinline__ void weigh(Weights& weights, float (&scores)[kColumnTiles][kKeys],
                                        const char* keys) {
    constexpr int kGroupKeys = kKeys / kGroups;
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      float(&w)[kKeys] = scores[tile];
      weigh_tile(w, tile, keys, weights.keep[tile], weights.add[tile]);
      const int source = lane_ % 4 * 4 + lane_ / 8;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const int first = group * kGroupKeys;
        uint2 words;
        if (kIsHalf) {
          words = split_halves(w[first], w[first + 1]);
        } else {
          const uint32_t digits[4] = {to_digits(w[0]), to_digits(w[1]), to_digits(w[2]),
                                      to_digits(w[3])};
          words = split_digits(digits);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t high = __shfl_sync(kFullMask, words.x, source + 16 * i);
          const uint32_t low = __shfl_sync(kFullMask, words.y, source + 16 * i);
          weights.operand[tile][group][i] = lane_ / 4 % 2 == 0 ? high : low;
        }
      }
    }
  }

  // Adds a step's values, weighted, to the running sums.
  __device__ __forceinline__ void mix(const Weights& weights, const char* values) {
#pragma unroll
    for (int m = 0; m < kHeadDim / 16; ++m) {
      Accumulator sums[kColumnTiles][4] = {};
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const uint4 a = *reinterpret_cast<const uint4*>(
            values + ((group * (kHeadDim / 16) + m) * kWarpSize + lane_) * 16);
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile)
          multiply(sums[tile], a.x, a.y, a.z, a.w, weights.operand[tile][group][0],
                   weights.operand[tile][group][1]);
      }
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& mixed = mixed_[tile][2 * m + i];
          mixed = fmaf(mixed, weights.keep[tile],
                       join_digits(sums[tile][2 * i], sums[tile][2 * i + 1]) * weights.add[tile]);
        }
    }
  }

  // 2^(score - top), for online int8 times the values' scales; int8: as large as fixed point holds,
  // which is what `top` is chosen for.
  __device__ __forceinline__ void weigh_tile(float (&w)[kKeys], int tile, const char* keys,
                                             float& keep, float& add) {
    const uint32_t* const parameters =
        reinterpret_cast<const uint32_t*>(keys + kPartBytes + kParameterBytes);
    float scales[kKeys];
    float top = kNothing;
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
      scales[key] = 1.0f;
      float level = w[key];
      if (kKv == Kv::kOnline) {
        scales[key] = fmaxf(low_to_float(parameters[8 * key + lane_ / 4]), kLeastScale);
        level += log2_fast(scales[key]);
      }
      top = fmaxf(top, level);
    }
    top = max_over_keys(top);
    const float new_top = fmaxf(top_[tile], top);
    keep = exp2_fast(top_[tile] - new_top);
    add = exp2_fast(top - new_top);
    top_[tile] = new_top;
    float total = 0.0f, zeros = 0.0f;
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
      w[key] = exp2_fast(w[key] - top);
      total += w[key];
      if (kKv == Kv::kOnline)
        zeros = fmaf(w[key], high_to_float(parameters[8 * key + lane_ / 4]), zeros);
      if (!kIsHalf) w[key] *= scales[key] * kLargestFixed;
    }
    total_[tile] = fmaf(total_[tile], keep, total * add);
    if (kKv == Kv::kOnline) zeros_[tile] = fmaf(zeros_[tile], keep, zeros * add);
    if (!kIsHalf) add *= 1.0f / kLargestFixed;
  }

  // Over the lanes that hold the same query.
  __device__ __forceinline__ static float max_over_keys(float value) {
#pragma unroll
    for (int offset = 4; offset < kWarpSize; offset *= 2)
      value = fmaxf(value, __shfl_xor_sync(kFullMask, value, offset));
    return value;
  }

  __device__ __forceinline__ static float sum_over_keys(float value) {
#pragma unroll
    for (int offset = 4; offset < kWarpSize; offset *= 2)
      value += __shfl_xor_sync(kFullMask, value, offset);
    return value;
  }

  const StepRange& range_;
  const int lane_;
  const int first_step_;
  const int num_slots_;
  int copied_step_;          // last one whose copy was started
  const char* copied_unit_;  // where it lies, for this lane
  char* const ring_;
  char* slot_;  // of the part at hand
  const char* column_;  // of the queries, where this lane's begins
  float scale_[kColumnTiles];
  float query_sum_[kColumnTiles];  // static int8: what each score has on top
  float top_[kColumnTiles];
  float total_[kColumnTiles] = {};  // of this lane's keys
  float zeros_[kColumnTiles] = {};  // sum of weight * zero, this lane's keys
  float mixed_[kColumnTiles][kHeadDim / 8] = {};
};

}  // namespace

#endif
