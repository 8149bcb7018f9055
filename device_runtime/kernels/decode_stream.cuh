// What one warp of decode_attention.cu does with its share of the cached tokens.
#ifndef TURBOJET_DECODE_STREAM_CUH
#define TURBOJET_DECODE_STREAM_CUH

#include "fixed_point.cuh"
#include "fragments.cuh"
#include "kv_cache.cuh"

namespace {

constexpr int kStepTokens = 32;
// Keys or values of a step; half as many when fp16. Nothing is in flight in the plain variant, and
// sm_72 has 96 KiB.
constexpr int kRingParts = TURBOJET_PLAIN ? 2 : 4;
constexpr float kNothing = -1e30f;  // below every score; unlike -inf its differences are numbers

template <bool kIsHalf>
struct Sum {
  using Type = int;
};
template <>
struct Sum<true> {
  using Type = float;
};

// Where the steps of a block lie.
struct StepRange {
  Pages pages;
  const int32_t* page_list;  // of the row, in shared memory
  uint32_t page_inverse;     // 2^32 / units of a page, rounded up
  int head;
  int first;  // the first warp's first step
  int last;
  int num_tokens;  // in the cache

  // Units fit 16 bits and a page's units as well, so that the product is exact.
  __device__ __forceinline__ static uint32_t inverse_of(int units_per_page) {
    return units_per_page == 1 ? 0u
                               : 0xffffffffu / static_cast<uint32_t>(units_per_page) + 1u;
  }

  template <class Layout>
  __device__ __forceinline__ char* unit_address(int unit) const {
    const int place = page_inverse == 0
                          ? unit
                          : static_cast<int>(__umulhi(static_cast<uint32_t>(unit), page_inverse));
    const int per_page = pages.page_size / Layout::kTokens;
    return Layout::address(pages, page_list[place], head, unit - place * per_page);
  }
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
  static constexpr int kSlots = kIsHalf ? kRingParts / 2 : kRingParts;
  static constexpr int kSlotBytes = kPartBytes + kParameterBytes;

 public:
  static constexpr int kQueries = 4 * kColumnTiles;
  static constexpr int kRingBytes = kSlots * kSlotBytes;

  __device__ __forceinline__ Stream(const StepRange& range, char* ring)
      : range_(range),
        warp_(threadIdx.x / kWarpSize),
        lane_(threadIdx.x % kWarpSize),
        ring_(ring) {}

  __device__ __forceinline__ void start() const {
#pragma unroll
    for (int part = 0; part < kSlots; ++part) copy_part(part);
  }

  // columns [2 * kQueries][row bytes], scales and sums [kQueries]: as put_query leaves them.
  __device__ __forceinline__ void load_columns(const char* columns, const float* scales,
                                               const float* sums) {
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      const char* const column =
          columns + (8 * tile + lane_ / 4) * Layout::kRowBytes + lane_ % 4 * 16;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const uint4 words = *reinterpret_cast<const uint4*>(column + 64 * chunk);
        query_[tile][chunk][0] = words.x;
        query_[tile][chunk][1] = words.y;
        query_[tile][chunk][2] = words.z;
        query_[tile][chunk][3] = words.w;
      }
      const int query = 4 * tile + lane_ % 4;
      scale_[tile] = scales[query];
      query_sum_[tile] = sums[query];
      top_[tile] = kNothing;
    }
  }

  // k_scale, k_zero: of static int8, for codes.
  __device__ __forceinline__ void run(float k_scale, float k_zero) {
    int part = 0;
#pragma unroll 1
    for (int step = range_.first + warp_; step < range_.last; step += kWarps, part += 2) {
      const int tokens = range_.num_tokens - step * kStepTokens;  // 32 or more but for the last
      float weights[kColumnTiles][kKeys];
      score(weights, next_part(part), k_scale, k_zero);
      char* const values = next_part(part + 1);
      if (tokens < kStepTokens) {
#pragma unroll
        for (int key = 0; key < kKeys; ++key)
          if (8 * key + lane_ / 4 >= tokens)
#pragma unroll
            for (int tile = 0; tile < kColumnTiles; ++tile) weights[tile][key] = kNothing;
        clear_behind(values, tokens);
      }
      mix(weights, values);
    }
    wait_copies<0>();
    __syncwarp();
  }

  // [kQueries][head_dim] sums, then (top, total) of each query.
  __device__ __forceinline__ void write(float* results) const {
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      const int query = 4 * tile + lane_ % 4;
      const float total = sum_over_keys(total_[tile]);
      const float zeros = kKv == Kv::kOnline ? sum_over_keys(zeros_[tile]) : 0.0f;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i)
        results[query * kHeadDim + 8 * i + lane_ / 4] = mixed_[tile][i] + zeros;
      if (lane_ < 4) {
        results[kQueries * kHeadDim + 2 * query] = top_[tile];
        results[kQueries * kHeadDim + 2 * query + 1] = total;
      }
    }
  }

 private:
  // Starts the copy of half a step: part 2i the keys, 2i + 1 the values of the warp's step i.
  __device__ __forceinline__ void copy_part(int part) const {
    const int step = range_.first + warp_ + part / 2 * kWarps;
    if (step < range_.last) {
      constexpr int kUnitSteps = Layout::kTokens / kStepTokens;
      const int in_unit = step % kUnitSteps;
      const char* const unit = range_.unit_address<Layout>(step / kUnitSteps) + 16 * lane_;
      char* const slot = ring_ + part % kSlots * kSlotBytes + 16 * lane_;
      const bool is_value = part % 2;
      // Chunks of keys are as far apart as a unit has tokens; values are in one piece.
      const int stride = is_value ? kChunkBytes : kUnitSteps * kChunkBytes;
      const char* const from =
          unit + is_value * Layout::kPartBytes + in_unit * (is_value ? kPartBytes : kChunkBytes);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
        for (int i = 0; i < kChunkBytes; i += 512)
          copy16_async(slot + chunk * kChunkBytes + i, from + chunk * stride + i);
      if (lane_ < kParameterBytes / 16)
        copy16_async(slot + kPartBytes, unit + 2 * Layout::kPartBytes +
                                            is_value * Layout::kParameterBytes +
                                            in_unit * kParameterBytes);
    }
    commit_copies();
  }

  // Waits for a part; every lane has then read the one before, whose slot is filled again.
  __device__ __forceinline__ char* next_part(int part) const {
    if (part == 0) {
      wait_copies<kSlots - 1>();
      __syncwarp();
    } else {
      wait_copies<kSlots - 2>();
      __syncwarp();
      copy_part(part - 1 + kSlots);
      if (kSlots == 1) __syncwarp();
    }
    return ring_ + part % kSlots * kSlotBytes;
  }

  // 0 times what no token has written yet may be NaN.
  __device__ __forceinline__ void clear_behind(char* values, int tokens) const {
    if (kKv == Kv::kOnline && lane_ >= tokens)
      reinterpret_cast<uint32_t*>(values + kPartBytes)[lane_] = 0;
    if (kIsHalf) {
      const StoredRow nothing = {};
#pragma unroll 1
      for (int i = tokens; i < kStepTokens; ++i)
        put_value<kKv, kHeadDim>(values, i, nothing, lane_);
    }
    __syncwarp();
  }

  // weights[tile][j] = score of key 8 j + lane / 4 for query 4 tile + lane % 4, times log2(e).
  __device__ __forceinline__ void score(float (&weights)[kColumnTiles][kKeys], const char* keys,
                                        float k_scale, float k_zero) const {
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
          const uint32_t(&q)[4] = query_[tile][chunk];
          multiply(sums[tile], a.x, b.x, a.y, b.y, q[0], q[1]);
          multiply(sums[tile], a.z, b.z, a.w, b.w, q[2], q[3]);
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = 2 * m + i;
        if (kKv == Kv::kOnline) {
          const uint32_t word =
              reinterpret_cast<const uint32_t*>(keys + kPartBytes)[8 * key + lane_ / 4];
          k_scale = low_to_float(word);
          k_zero = high_to_float(word);
        }
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) {
          const float dot = join_digits(sums[tile][2 * i], sums[tile][2 * i + 1]);
          weights[tile][key] =
              scale_[tile] * (kIsHalf ? dot : fmaf(k_scale, dot, k_zero * query_sum_[tile]));
        }
      }
    }
  }

  // Adds a step's values, weighted by 2^score, to the running sums.
  __device__ __forceinline__ void mix(float (&weights)[kColumnTiles][kKeys], const char* values) {
    constexpr int kGroups = kStepTokens / Layout::kGroupTokens;
    constexpr int kGroupKeys = kKeys / kGroups;
    uint32_t operand[kColumnTiles][kGroups][2];
    float keep[kColumnTiles], add[kColumnTiles];
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      float(&w)[kKeys] = weights[tile];
      weigh(w, tile, values, keep[tile], add[tile]);
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
          operand[tile][group][i] = lane_ / 4 % 2 == 0 ? high : low;
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kHeadDim / 16; ++m) {
      Accumulator sums[kColumnTiles][4] = {};
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const uint4 a = *reinterpret_cast<const uint4*>(
            values + ((group * (kHeadDim / 16) + m) * kWarpSize + lane_) * 16);
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile)
          multiply(sums[tile], a.x, a.y, a.z, a.w, operand[tile][group][0],
                   operand[tile][group][1]);
      }
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& mixed = mixed_[tile][2 * m + i];
          mixed = fmaf(mixed, keep[tile],
                       join_digits(sums[tile][2 * i], sums[tile][2 * i + 1]) * add[tile]);
        }
    }
  }

  // From scores to weights for the product: 2^(score - top of the step), for online int8 times the
  // values' scales; for int8 as large as fixed point holds. keep, add: what the sums so far and the
  // step's are to be multiplied by.
  __device__ __forceinline__ void weigh(float (&w)[kKeys], int tile, const char* values,
                                        float& keep, float& add) {
    const uint32_t* const parameters = reinterpret_cast<const uint32_t*>(values + kPartBytes);
    float top = w[0];
#pragma unroll
    for (int key = 1; key < kKeys; ++key) top = fmaxf(top, w[key]);
    top = max_over_keys(top);
    const float new_top = fmaxf(top_[tile], top);
    keep = exp2_fast(top_[tile] - new_top);
    add = exp2_fast(top - new_top);
    top_[tile] = new_top;
    float total = 0.0f, zeros = 0.0f, peak = 0.0f;
#pragma unroll
    for (int key = 0; key < kKeys; ++key) {
      w[key] = exp2_fast(w[key] - top);
      total += w[key];
      if (kKv == Kv::kOnline) {
        const uint32_t word = parameters[8 * key + lane_ / 4];
        zeros = fmaf(w[key], high_to_float(word), zeros);
        w[key] *= low_to_float(word);
        peak = fmaxf(peak, w[key]);
      }
    }
    total_[tile] = fmaf(total_[tile], keep, total * add);
    if (kIsHalf) return;
    if (kKv == Kv::kOnline) {
      zeros_[tile] = fmaf(zeros_[tile], keep, zeros * add);
      peak = max_over_keys(peak);
    } else {
      peak = 1.0f;  // the largest weight is 2^0
    }
    const float inverse = peak < 1e-30f ? 0.0f : __fdividef(kLargestFixed, peak);
    add *= peak * (1.0f / kLargestFixed);
#pragma unroll
    for (int key = 0; key < kKeys; ++key) w[key] *= inverse;
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
  const int warp_;
  const int lane_;
  char* const ring_;
  uint32_t query_[kColumnTiles][kChunks][4];
  float scale_[kColumnTiles];
  float query_sum_[kColumnTiles];
  float top_[kColumnTiles];
  float total_[kColumnTiles] = {};  // of this lane's keys
  float zeros_[kColumnTiles] = {};  // sum of weight * zero, this lane's keys
  float mixed_[kColumnTiles][kHeadDim / 8] = {};
};

}  // namespace

#endif
