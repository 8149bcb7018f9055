// What one block of decode_attention.cu does: prepares a kv head's queries and newest token, lets
// its warps stream the cached ones, and adds up.
#ifndef TURBOJET_DECODE_BLOCK_CUH
#define TURBOJET_DECODE_BLOCK_CUH

#include "decode_share.cuh"
#include "decode_stream.cuh"
#include "head_vector.cuh"

namespace {

constexpr int kStreamWarps = 8;               // each with a ring of its own
constexpr int kKeyWarp = kStreamWarps;        // stores the newest key and scores it
constexpr int kValueWarp = kStreamWarps + 1;  // stores the newest value
constexpr int kDecodeThreads = (kStreamWarps + 2) * kWarpSize;
constexpr int kOnlineBlocks = 2;  // that share an SM
constexpr int kLeastSteps = 2;  // of a split

struct DecodeArguments {
  fp16* out;
  Pages pages;
  float* partials;
  const fp16* qkv;
  const fp16* q_norm;
  const fp16* k_norm;
  const float2* rotation;
  const float* query_scale;
  const float* kv_scale;
  const int32_t* positions;
  const int32_t* page_table;
  int num_heads;
  int max_pages;
  int num_ranks;
  int max_splits;
  int split_units;
  int ring_slots;
  float eps;
};

template <Kv kKv, int kHeadDim, int kColumnTiles>
class DecodeBlock {
  using Layout = Unit<kKv, kHeadDim>;
  using Streamed = Stream<kKv, kHeadDim, kColumnTiles, kStreamWarps>;
  static constexpr bool kIsHalf = kKv == Kv::kHalf;
  static constexpr int kQueries = Streamed::kQueries;
  static constexpr int kQuads = kHeadDim / 4;
  using Places = SharePlaces<kQuads>;
  static constexpr int kStatistics = kQueries * Streamed::kResultStride;  // place of (top, total) in results
  static constexpr int kUnitSteps = 64 / kStepTokens;
  static_assert((kStatistics + 2 * kQueries) * 4 <= Streamed::kLeastSlots * Streamed::kSlotBytes,
                "results fit where the ring was");
  // Copies into rings 48 bytes off took 12.2 us where these take 10.1 (H200, 4096 tokens).
  static_assert((2 * kQueries * Layout::kRowBytes + 4 * (kQueries + 1) * kHeadDim) % 128 == 0,
                "rings begin where a line of shared memory does");
  static_assert(kQueries <= kStreamWarps, "a query for each warp");
  static_assert(kQueries * kQuads <= kDecodeThreads, "four dimensions for each thread");

 public:
  __device__ __forceinline__ explicit DecodeBlock(const DecodeArguments& arguments)
      : arguments_(arguments),
        thread_(threadIdx.x),
        warp_(threadIdx.x / kWarpSize),
        lane_(threadIdx.x % kWarpSize),
        split_(blockIdx.z),
        row_(blockIdx.y),
        head_(static_cast<int>(gridDim.x) == arguments.pages.num_kv_heads
                  ? blockIdx.x
                  : blockIdx.x / (gridDim.x / arguments.pages.num_kv_heads)),
        group_(arguments.num_heads / gridDim.x),
        ring_bytes_(arguments.ring_slots * Streamed::kSlotBytes) {
    columns_ = dynamic_shared<char>();
    queries_ = reinterpret_cast<float*>(columns_ + 2 * kQueries * Layout::kRowBytes);
    newest_value_ = queries_ + kQueries * kHeadDim;
    rings_ = reinterpret_cast<char*>(newest_value_ + kHeadDim);
    query_scales_ = reinterpret_cast<float*>(rings_ + kStreamWarps * ring_bytes_);
    query_sums_ = query_scales_ + kQueries;
    newest_scores_ = query_sums_ + kQueries;
    page_list_ = reinterpret_cast<int32_t*>(newest_scores_ + kQueries);
  }

  __device__ __forceinline__ void run() {
    if (kTrigger == 0) let_dependents_launch();
    // Loaded with the position, not after it; what a row does not use is 0.
    const int32_t* const pages =
        arguments_.page_table + static_cast<int64_t>(row_) * arguments_.max_pages;
    const int32_t own_page = thread_ < arguments_.max_pages ? pages[thread_] : 0;
    const int cached = arguments_.positions[row_];
    if (warp_ == kValueWarp) prefetch_inputs();
    clear_queries();
    const NewHead own = new_head();
    const Divisor splits(arguments_.max_splits);
    const Divisor page_units(arguments_.pages.page_size / Layout::kTokens);
    fp16* const out = arguments_.out + pair() * group_ * kHeadDim;
    if (cached < 0) {
      let_dependents_launch();
      wait_for_inputs();
      if (split_ == 0)
        for (int i = thread_; i < group_ * kHeadDim; i += kDecodeThreads) out[i] = fp16{0};
      return;
    }
    const int steps = (cached + kStepTokens - 1) / kStepTokens;
    const bool is_split = steps > kUnitSteps * arguments_.split_units &&
                          steps >= kLeastSteps * arguments_.max_splits;
    num_splits_ = is_split ? arguments_.max_splits : 1;
    if (split_ >= num_splits_) return;
    is_last_ = split_ == num_splits_ - 1;
    if (thread_ < arguments_.max_pages) page_list_[thread_] = own_page;
    for (int i = thread_ + kDecodeThreads; i * arguments_.pages.page_size <= cached;
         i += kDecodeThreads)
      page_list_[i] = pages[i];
    __syncthreads();

    const StepRange range{arguments_.pages,
                          page_list_,
                          page_units,
                          head_,
                          is_split ? splits.divide(split_ * steps) : 0,
                          is_split ? splits.divide((split_ + 1) * steps) : steps,
                          cached};
    char* const ring = rings_ + warp_ * ring_bytes_;
    Streamed stream(range, warp_, lane_, ring, arguments_.ring_slots);
    if (warp_ < kStreamWarps) stream.start();
    if (kTrigger == 1 && warp_ == 0) let_dependents_launch();
    prepare(own, range, stream);
    if (kTrigger == 2 && warp_ == 0) let_dependents_launch();
    if (warp_ < kStreamWarps) {
      stream.take_queries(columns_, query_scales_, query_sums_, code_scale(0));
      stream.run();
      stream.write(reinterpret_cast<float*>(ring));
    }
    __syncthreads();
    // Whole warps, whose lanes beyond the last dimension repeat it.
    const int last_item = group_ * kQuads - 1;
    if (warp_ <= last_item / kWarpSize) finish(out, smaller(thread_, last_item));
  }

 private:
  // Static int8: what a code is times and plus, part 0 keys, 1 values.
  __device__ __forceinline__ float2 code_scale(int part) const {
    if (kKv != Kv::kStatic) return float2{1.0f, 0.0f};
    const float2 scale = reinterpret_cast<const float2*>(arguments_.kv_scale)[2 * head_ + part];
    return float2{scale.x, fmaf(-128.0f, scale.x, scale.y)};
  }

  __device__ __forceinline__ int64_t pair() const {
    return static_cast<int64_t>(row_) * gridDim.x + blockIdx.x;
  }

  // Of queries that there are not.
  __device__ __forceinline__ void clear_queries() {
    uint32_t* const words =
        reinterpret_cast<uint32_t*>(columns_ + 2 * group_ * Layout::kRowBytes);
    for (int i = thread_; i < (kQueries - group_) * Layout::kRowBytes / 2; i += kDecodeThreads)
      words[i] = 0;
    if (thread_ < kQueries) {
      query_scales_[thread_] = 0.0f;
      query_sums_[thread_] = 0.0f;
    }
  }

  // The query, key or value that a warp prepares, and what it is normed and turned with.
  struct NewHead {
    const fp16* source;
    const fp16* norm;
    const float2* rotation;
  };

  __device__ __forceinline__ NewHead new_head() const {
    const int num_kv_heads = arguments_.pages.num_kv_heads;
    const int64_t row_heads = arguments_.num_heads + 2 * num_kv_heads;
    const QkvRow qkv{arguments_.qkv + row_ * row_heads * kHeadDim, arguments_.num_heads,
                     num_kv_heads, arguments_.num_ranks};
    const bool is_query = warp_ < group_;
    const bool is_value = warp_ == kValueWarp;
    const int index = is_query ? qkv.head_index(0, blockIdx.x * group_ + warp_)
                               : qkv.head_index(1 + is_value, head_);
    return NewHead{qkv.values + index * kHeadDim,
                   is_query   ? arguments_.q_norm
                   : is_value ? nullptr
                              : arguments_.k_norm,
                   arguments_.rotation + static_cast<int64_t>(row_) * (kHeadDim / 2)};
  }

  // Tables that weights may have pushed out of L2 since the last layer used them.
  __device__ __forceinline__ void prefetch_inputs() const {
    constexpr int kTurns = kHeadDim / 32;  // lines of 128 bytes
    const int norm_place = (lane_ - 8) * 64;
    if (lane_ < kTurns)
      prefetch_line(arguments_.rotation + static_cast<int64_t>(row_) * (kHeadDim / 2) + 16 * lane_);
    if (lane_ == kTurns) prefetch_line(arguments_.query_scale + row_);
    if (norm_place >= 0 && norm_place < kHeadDim && arguments_.q_norm != nullptr) {
      prefetch_line(arguments_.q_norm + norm_place);
      prefetch_line(arguments_.k_norm + norm_place);
    }
    if (kKv == Kv::kStatic && lane_ == 16) prefetch_line(arguments_.kv_scale + 4 * head_);
  }

  // Queries become columns of operand B; the newest token goes into its page. The block takes its
  // turn among those of its head, which it needs to know at the end.
  __device__ __forceinline__ void prepare(const NewHead& own, const StepRange& range,
                                          Streamed& stream) {
    const bool is_query = warp_ < group_;
    const bool is_newest = is_last_ && warp_ >= kKeyWarp;
    const bool is_value = warp_ == kValueWarp;
    RawHead<kHeadDim> raw;
    float query_scale = 0.0f;
    float values[4];
    int turn = 0;
    wait_for_inputs();
    if (num_splits_ > 1 && thread_ == kKeyWarp * kWarpSize)
      turn = Places::take_turn(arguments_.partials, pair() * arguments_.max_splits, group_,
                               num_splits_);
    if (is_query || is_newest) {
      raw.load(own.source, own.norm, own.rotation, lane_);
      query_scale = arguments_.query_scale[row_];
    }
    if (warp_ < kStreamWarps) stream.start_rest();
    if (is_query) {
      raw.finish(values, arguments_.eps);
      put_query(warp_, values, query_scale);
    }
    __syncthreads();
    if (is_newest) {
      if (is_value)
        widen_four(values, raw.values);
      else
        raw.finish(values, arguments_.eps);
      store_newest(range, values, is_value);
      if (is_value) {
        if (lane_ < kQuads)
          reinterpret_cast<float4*>(newest_value_)[lane_] =
              float4{values[0], values[1], values[2], values[3]};
      } else {
        score_newest(values, query_scale);
      }
    }
    if (warp_ == kKeyWarp) {
      __syncwarp();  // nobody reads the queries any more
      if (lane_ == 0) *reinterpret_cast<int*>(queries_) = turn;
    }
  }

  __device__ __forceinline__ void put_query(int query, const float (&values)[4],
                                            float query_scale) {
    char* const high = columns_ + 2 * query * Layout::kRowBytes;
    char* const low = high + Layout::kRowBytes;
    const bool is_active = lane_ < kHeadDim / 4;
    if (is_active)
      reinterpret_cast<float4*>(queries_ + query * kHeadDim)[lane_] =
          float4{values[0], values[1], values[2], values[3]};
    if (kIsHalf) {
      const uint2 first = split_halves(values[0], values[1]);
      const uint2 second = split_halves(values[2], values[3]);
      if (is_active) {
        reinterpret_cast<uint2*>(high)[lane_] = uint2{first.x, second.x};
        reinterpret_cast<uint2*>(low)[lane_] = uint2{first.y, second.y};
      }
      if (lane_ == 0) query_scales_[query] = query_scale;
      return;
    }
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t magnitude = __float_as_uint(values[i]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
    const float peak = __uint_as_float(warp_max(largest));
    const bool is_zero = peak < 1e-30f;
    const float inverse = is_zero ? 0.0f : __fdividef(kLargestFixed, peak);
    uint32_t digits[4];
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      digits[i] = to_digits(values[i] * inverse);
      sum += rounded_of(digits[i]);
    }
    const uint2 words = split_digits(digits);
    sum = static_cast<int>(warp_sum(is_active ? static_cast<uint32_t>(sum) : 0u));
    if (is_active) {
      reinterpret_cast<uint32_t*>(high)[lane_] = words.x;
      reinterpret_cast<uint32_t*>(low)[lane_] = words.y;
    }
    if (lane_ == 0) {
      query_scales_[query] = is_zero ? 0.0f : peak * (1.0f / kLargestFixed) * query_scale;
      query_sums_[query] = static_cast<float>(sum);
    }
  }

  // Writes the newest token's row; values become what reads back, of static int8 values the code.
  __device__ __forceinline__ void store_newest(const StepRange& range, float (&values)[4],
                                               bool is_value) const {
    float scale = 1.0f, zero_point = 0.0f;
    if (kKv == Kv::kStatic) {
      scale = arguments_.kv_scale[4 * range.head + 2 * is_value];
      zero_point = arguments_.kv_scale[4 * range.head + 2 * is_value + 1];
    }
    const StoredRow stored = to_stored<kKv>(values, scale, zero_point);
    const int token = range.num_tokens % Layout::kTokens;
    char* const unit = range.unit_address<Layout>(range.num_tokens / Layout::kTokens);
    if (is_value)
      put_value<kKv, kHeadDim>(unit + Layout::kPartBytes, token, stored, lane_);
    else
      put_key<kKv, kHeadDim>(unit, token, stored, lane_);
    if (kKv == Kv::kOnline && lane_ == 0)
      reinterpret_cast<uint32_t*>(unit + 2 * Layout::kPartBytes +
                                  is_value * Layout::kParameterBytes)[token] = stored.parameters;
    if (is_value)
      from_stored<kKv>(values, stored, 1.0f, 0.0f);
    else
      from_stored<kKv>(values, stored, scale, fmaf(-128.0f, scale, zero_point));
  }

  __device__ __forceinline__ void score_newest(const float (&key)[4], float query_scale) {
#pragma unroll 4
    for (int query = 0; query < group_; ++query) {
      const float4 q = reinterpret_cast<const float4*>(
          queries_ + query * kHeadDim)[lane_ % (kHeadDim / 4)];
      const float dot =
          lanes_sum<kHeadDim / 4>(q.x * key[0] + q.y * key[1] + q.z * key[2] + q.w * key[3]);
      if (lane_ == 0) newest_scores_[query] = dot * query_scale;
    }
  }

  // Four dimensions of a split: the block that had the last turn adds those of the others to its own
  // and writes fp16.
  __device__ __forceinline__ void finish(fp16* out, int item) const {
    const int query = item / kQuads;
    const int quad = item % kQuads;
    Share share = add_warps(query, quad);
    if (num_splits_ > 1) {
      const Places places(arguments_.partials, pair() * arguments_.max_splits, group_, query, quad);
      if (*reinterpret_cast<const int*>(queries_) < num_splits_ - 1) {
        // A second store of the same might come after the last block has cleared the place.
        if (item == thread_) places.give(share, split_);
        return;
      }
      share = places.take(share, split_, num_splits_);
    }
    const float inverse = 1.0f / share.total;
    uint2 words;
    words.x = pack_fp16(value_of(share.sums.x * inverse), value_of(share.sums.y * inverse));
    words.y = pack_fp16(value_of(share.sums.z * inverse), value_of(share.sums.w * inverse));
    reinterpret_cast<uint2*>(out)[item] = words;
  }

  // Of the block's warps, and of the newest token where it belongs to the split.
  __device__ __forceinline__ Share add_warps(int query, int quad) const {
    float2 statistics[kStreamWarps];
    const float newest = is_last_ ? newest_scores_[query] : kNothing;
    Share share = {};
    share.top = newest;
#pragma unroll
    for (int warp = 0; warp < kStreamWarps; ++warp) {
      const float* const own = reinterpret_cast<const float*>(rings_ + warp * ring_bytes_);
      statistics[warp] = reinterpret_cast<const float2*>(own + kStatistics)[query];
      share.top = fmaxf(share.top, statistics[warp].x);
    }
    if (is_last_)
      share.add(reinterpret_cast<const float4*>(newest_value_)[quad], 1.0f,
                exp2_fast(newest - share.top));
#pragma unroll
    for (int warp = 0; warp < kStreamWarps; ++warp) {
      const float4* const own = reinterpret_cast<const float4*>(rings_ + warp * ring_bytes_);
      share.add(own[query * (Streamed::kResultStride / 4) + quad], statistics[warp].y,
                exp2_fast(statistics[warp].x - share.top));
    }
    return share;
  }

  // From a weighted mean of codes to one of values.
  __device__ __forceinline__ float value_of(float mean) const {
    if (kKv != Kv::kStatic) return mean;
    const float2 scale = code_scale(1);
    return fmaf(mean, scale.x, scale.y);
  }

  const DecodeArguments& arguments_;
  const int thread_;
  const int warp_;
  const int lane_;
  const int split_;
  const int row_;
  const int head_;   // of keys and values
  const int group_;  // query heads of the block
  const int ring_bytes_;  // of a warp
  int num_splits_;        // of the row
  bool is_last_;          // of them, which has the newest token
  char* columns_;        // [2 * kQueries][row bytes]: high and low digits of each query in turn
  float* queries_;       // [kQueries][head_dim] rotated; at the end the block's turn
  float* newest_value_;  // [head_dim]
  float* query_scales_;
  float* query_sums_;
  float* newest_scores_;
  char* rings_;  // at the end each warp's results
  int32_t* page_list_;
};

}  // namespace

#endif
