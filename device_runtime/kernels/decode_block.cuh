// What one block of decode_attention.cu does: prepares a kv head's queries and newest token, lets
// its warps stream the cached ones, and adds up.
#ifndef TURBOJET_DECODE_BLOCK_CUH
#define TURBOJET_DECODE_BLOCK_CUH

#include "decode_stream.cuh"
#include "head_vector.cuh"

namespace {

constexpr int kStreamWarps = 8;
constexpr int kKeyWarp = kStreamWarps;        // stores the newest key and scores it
constexpr int kValueWarp = kStreamWarps + 1;  // stores the newest value
constexpr int kDecodeThreads = (kStreamWarps + 2) * kWarpSize;
constexpr int kMergeLoads = 8;
constexpr int kLeastSteps = 4;  // of a block that shares a head with others

struct DecodeArguments {
  fp16* out;
  Pages pages;
  float* partials;
  uint32_t* tickets;
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
  int split_units;
  float eps;
};

template <Kv kKv, int kHeadDim, int kColumnTiles>
class DecodeBlock {
  using Layout = Unit<kKv, kHeadDim>;
  using Streamed = Stream<kKv, kHeadDim, kColumnTiles, kStreamWarps>;
  static constexpr bool kIsHalf = kKv == Kv::kHalf;
  static constexpr int kQueries = Streamed::kQueries;
  static constexpr int kRingBytes = Streamed::kRingBytes;
  static constexpr int kStatistics = kQueries * kHeadDim;  // place of (top, total) in results
  static_assert((kStatistics + 2 * kQueries) * 4 <= kRingBytes, "results fit where the ring was");
  static_assert(kQueries <= kStreamWarps, "a query for each warp");

 public:
  __device__ __forceinline__ explicit DecodeBlock(const DecodeArguments& arguments)
      : arguments_(arguments),
        warp_(threadIdx.x / kWarpSize),
        lane_(threadIdx.x % kWarpSize),
        group_(arguments.num_heads / arguments.pages.num_kv_heads) {
    columns_ = dynamic_shared<char>() + kStreamWarps * kRingBytes;
    queries_ = reinterpret_cast<float*>(columns_ + 2 * kQueries * Layout::kRowBytes);
    newest_value_ = queries_ + kQueries * kHeadDim;
    query_scales_ = newest_value_ + kHeadDim;
    query_sums_ = query_scales_ + kQueries;
    newest_scores_ = query_sums_ + kQueries;
    is_last_ = reinterpret_cast<uint32_t*>(newest_scores_ + kQueries);
    page_list_ = reinterpret_cast<int32_t*>(is_last_ + 4);
  }

  __device__ __forceinline__ void run() {
    const int head = blockIdx.y;
    const int row = blockIdx.z;
    let_dependents_launch();
    // Loaded with the position, not after it; what a row does not use is 0.
    const int32_t* const pages =
        arguments_.page_table + static_cast<int64_t>(row) * arguments_.max_pages;
    const int32_t own_page =
        static_cast<int>(threadIdx.x) < arguments_.max_pages ? pages[threadIdx.x] : 0;
    const int cached = arguments_.positions[row];
    const int pair = row * arguments_.pages.num_kv_heads + head;
    fp16* const out = arguments_.out + static_cast<int64_t>(pair) * group_ * kHeadDim;
    if (cached < 0) {
      wait_for_inputs();
      if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < group_ * kHeadDim; i += kDecodeThreads) out[i] = fp16{0};
      return;
    }
    const int steps = (cached + kStepTokens - 1) / kStepTokens;
    constexpr int kUnitSteps = 64 / kStepTokens;
    const int most = smaller(steps / kLeastSteps, gridDim.x);
    const bool is_alone = steps <= kUnitSteps * arguments_.split_units || most < 2;
    const int per_split = is_alone ? steps : (steps + most - 1) / most;
    const int num_splits = per_split == 0 ? 1 : (steps + per_split - 1) / per_split;
    const int split = blockIdx.x;
    if (split >= num_splits) return;
    has_newest_ = split == num_splits - 1;
    if (static_cast<int>(threadIdx.x) < arguments_.max_pages) page_list_[threadIdx.x] = own_page;
    const int last_page = cached / arguments_.pages.page_size;
    for (int i = threadIdx.x + kDecodeThreads; i <= last_page; i += kDecodeThreads)
      page_list_[i] = pages[i];
    clear_queries();
    __syncthreads();

    const StepRange range{arguments_.pages,
                          page_list_,
                          StepRange::inverse_of(arguments_.pages.page_size / Layout::kTokens),
                          head,
                          split * per_split,
                          smaller((split + 1) * per_split, steps),
                          cached};
    Streamed stream(range, dynamic_shared<char>() + warp_ * kRingBytes);
    if (warp_ < kStreamWarps) stream.start();
    prepare(range, row, head);
    if (warp_ < kStreamWarps) {
      stream.load_columns(columns_, query_scales_, query_sums_);
      const float2 k = code_scale(head, 0);
      stream.run(k.x, k.y);
      stream.write(reinterpret_cast<float*>(dynamic_shared<char>() + warp_ * kRingBytes));
    }
    __syncthreads();
    if (num_splits == 1) {
      write_block<true>(out, nullptr, head);
    } else {
      const int stride = group_ * (kHeadDim + 2);
      float* const partials = arguments_.partials + static_cast<int64_t>(pair) * gridDim.x * stride;
      write_block<false>(nullptr, partials + split * stride, head);
      if (is_last_block(arguments_.tickets + pair, num_splits))
        add_partials(out, partials, num_splits, head);
    }
  }

 private:
  // Static int8: what a code is times and plus, part 0 keys, 1 values.
  __device__ __forceinline__ float2 code_scale(int head, int part) const {
    if (kKv != Kv::kStatic) return float2{1.0f, 0.0f};
    const float2 scale = reinterpret_cast<const float2*>(arguments_.kv_scale)[2 * head + part];
    return float2{scale.x, fmaf(-128.0f, scale.x, scale.y)};
  }

  // Of queries that there are not, and of the newest token where it is not in the block's range.
  __device__ __forceinline__ void clear_queries() {
    uint32_t* const words =
        reinterpret_cast<uint32_t*>(columns_ + 2 * group_ * Layout::kRowBytes);
    for (int i = threadIdx.x; i < (kQueries - group_) * Layout::kRowBytes / 2; i += kDecodeThreads)
      words[i] = 0;
    if (threadIdx.x < kQueries) {
      query_scales_[threadIdx.x] = 0.0f;
      query_sums_[threadIdx.x] = 0.0f;
      newest_scores_[threadIdx.x] = kNothing;
    }
    if (threadIdx.x < kHeadDim) newest_value_[threadIdx.x] = 0.0f;
  }

  // Queries become columns of operand B; the newest token goes into its page.
  __device__ __forceinline__ void prepare(const StepRange& range, int row, int head) {
    const int num_kv_heads = arguments_.pages.num_kv_heads;
    const int64_t row_heads = arguments_.num_heads + 2 * num_kv_heads;
    const QkvRow qkv{arguments_.qkv + row * row_heads * kHeadDim, arguments_.num_heads,
                     num_kv_heads, arguments_.num_ranks};
    const bool is_query = warp_ < group_;
    const bool is_newest = has_newest_ && warp_ >= kKeyWarp;
    const bool is_value = warp_ == kValueWarp;
    const int part = is_query ? 0 : 1 + is_value;
    const fp16* const source =
        qkv.values +
        qkv.head_index(part, is_query ? head * group_ + warp_ : head) * kHeadDim;
    const float2* const rotation =
        arguments_.rotation + static_cast<int64_t>(row) * (kHeadDim / 2);
    RawHead<kHeadDim> raw;
    float query_scale = 0.0f;
    float values[4];
    wait_for_inputs();
    if (is_query || is_newest) {
      raw.load(source, is_query ? arguments_.q_norm : is_value ? nullptr : arguments_.k_norm,
               rotation, lane_);
      query_scale = arguments_.query_scale[row];
    }
    if (is_query) {
      raw.finish(values, arguments_.eps);
      put_query(warp_, values, query_scale);
    }
    __syncthreads();
    if (!is_newest) return;
    if (is_value)
      widen_four(values, raw.values);
    else
      raw.finish(values, arguments_.eps);
    store_newest(range, values, is_value);
    if (is_value) {
      if (lane_ < kHeadDim / 4)
        reinterpret_cast<float4*>(newest_value_)[lane_] =
            float4{values[0], values[1], values[2], values[3]};
    } else {
      score_newest(values, query_scale);
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

  // Adds up the warps and the newest token; kIsFinal: writes fp16, else sums, then (top, total) of
  // each query.
  template <bool kIsFinal>
  __device__ __forceinline__ void write_block(fp16* out, float* partial, int head) {
    const float* const results = reinterpret_cast<const float*>(dynamic_shared<char>());
    for (int i = threadIdx.x; i < group_ * kHeadDim; i += kDecodeThreads) {
      const int query = i / kHeadDim;
      float2 statistics[kStreamWarps];
      float top = newest_scores_[query];
      const float newest = top;
#pragma unroll
      for (int warp = 0; warp < kStreamWarps; ++warp) {
        statistics[warp] = reinterpret_cast<const float2*>(results + warp * (kRingBytes / 4) +
                                                           kStatistics)[query];
        top = fmaxf(top, statistics[warp].x);
      }
      float total = exp2_fast(newest - top);
      float sum = total * newest_value_[i % kHeadDim];
#pragma unroll
      for (int warp = 0; warp < kStreamWarps; ++warp) {
        const float weight = exp2_fast(statistics[warp].x - top);
        sum = fmaf(weight, results[warp * (kRingBytes / 4) + i], sum);
        total = fmaf(weight, statistics[warp].y, total);
      }
      if (kIsFinal) {
        out[i] = to_fp16(value_of(__fdividef(sum, total), head));
      } else {
        partial[i] = sum;
        if (i % kHeadDim == 0) {
          partial[group_ * kHeadDim + 2 * query] = top;
          partial[group_ * kHeadDim + 2 * query + 1] = total;
        }
      }
    }
  }

  // From a weighted mean of codes to one of values.
  __device__ __forceinline__ float value_of(float mean, int head) const {
    if (kKv != Kv::kStatic) return mean;
    const float2 scale = code_scale(head, 1);
    return fmaf(mean, scale.x, scale.y);
  }

  __device__ __forceinline__ bool is_last_block(uint32_t* ticket, int num_splits) {
    __syncthreads();
    if (threadIdx.x == 0) {
      *is_last_ = take_ticket(ticket) == static_cast<uint32_t>(num_splits - 1);
      if (*is_last_) *ticket = 0;
    }
    __syncthreads();
    return *is_last_ != 0;
  }

  __device__ __forceinline__ void add_partials(fp16* out, const float* partials, int num_splits,
                                               int head) const {
    const int stride = group_ * (kHeadDim + 2);
    for (int i = threadIdx.x; i < group_ * kHeadDim; i += kDecodeThreads) {
      const int statistics = group_ * kHeadDim + 2 * (i / kHeadDim);
      float top = kNothing, total = 0.0f, sum = 0.0f;
      for (int start = 0; start < num_splits; start += kMergeLoads) {
        float tops[kMergeLoads], totals[kMergeLoads], sums[kMergeLoads];
#pragma unroll
        for (int j = 0; j < kMergeLoads; ++j) {
          const bool is_there = start + j < num_splits;
          const float* const partial = partials + (start + j) * stride;
          tops[j] = is_there ? load_shared_by_blocks(partial + statistics) : kNothing;
          totals[j] = is_there ? load_shared_by_blocks(partial + statistics + 1) : 0.0f;
          sums[j] = is_there ? load_shared_by_blocks(partial + i) : 0.0f;
        }
        float new_top = top;
#pragma unroll
        for (int j = 0; j < kMergeLoads; ++j) new_top = fmaxf(new_top, tops[j]);
        const float keep = exp2_fast(top - new_top);
        total *= keep;
        sum *= keep;
        top = new_top;
#pragma unroll
        for (int j = 0; j < kMergeLoads; ++j) {
          const float weight = exp2_fast(tops[j] - top);
          total = fmaf(weight, totals[j], total);
          sum = fmaf(weight, sums[j], sum);
        }
      }
      out[i] = to_fp16(value_of(sum / total, head));
    }
  }

  const DecodeArguments& arguments_;
  const int warp_;
  const int lane_;
  const int group_;  // query heads of a kv head
  bool has_newest_;
  char* columns_;        // [2 * kQueries][row bytes]: high and low digits of each query in turn
  float* queries_;       // [kQueries][head_dim] rotated
  float* newest_value_;  // [head_dim]
  float* query_scales_;
  float* query_sums_;
  float* newest_scores_;
  uint32_t* is_last_;
  int32_t* page_list_;
};

}  // namespace

#endif
