// One new token per sequence: store its key and value, attend to all cached ones.
//
//   decode_attention_half    fp16 cache
//   decode_attention_static  int8, one scale and zero point per head (quant_policy 4)
//   decode_attention_online  int8, a scale and a zero per token and head (quant_policy 8)
//   q, k = rotate(norm(qkv));  out[row, h] = softmax(query_scale[row] q_h k^T) v
//   over the tokens 0..positions[row], the new one as it reads back from the cache.
//
//   out [rows][num_heads * head_dim] fp16; pages as kv_cache.cuh; partials fp32
//   [rows * num_kv_heads][max_splits][group][head_dim + 2]; tickets uint32 [rows * num_kv_heads],
//   all 0 before and after; qkv [rows][num_ranks][q, k, v heads of the rank][head_dim] fp16, rotary
//   pairs adjacent; q_norm, k_norm [head_dim] fp16, or both null; rotation [rows][head_dim / 2]
//   (cos, sin) fp32; query_scale [rows] fp32, with log2(e) in it; kv_scale [num_kv_heads] (k scale,
//   k zero point, v scale, v zero point) fp32, static only; positions [rows] int32, negative: the
//   row is idle and its output 0; page_table [rows][max_pages] int32.
// Launch: grid (max_splits, num_kv_heads, rows), block kThreads, dynamic shared memory as table.py's
// decode_attention_shared_bytes. head_dim 64 or 128; num_heads / num_kv_heads 1 to 8; page_size a
// multiple of 64. positions and page_table are not written by the step the kernel runs in.
// Bound by DRAM: 2 * head_dim (+ 4 when online) bytes (twice that when fp16) per token and kv head.
// Checked against reference/attention.py decode_attention, relative error 2e-3.
//
// A block takes one kv head and one range of units of tokens; how many ranges there are depends on
// the row's own length alone, so a row's result does not depend on the others. Each warp streams
// its units through a private ring, from before the previous kernel has finished. Codes meet the
// tensor core as they are: queries and probabilities go in as two 8-bit digits of a 16-bit fixed
// point number (fp16: as high and low part), so sums over int8 are exact, and scales are applied to
// sums. The last block of a head to finish adds up the parts in the order of the ranges.

#include "fragments.cuh"
#include "head_vector.cuh"
#include "kv_cache.cuh"

namespace {

#ifndef TURBOJET_ATTENTION_WARPS
#define TURBOJET_ATTENTION_WARPS 4
#endif
#ifndef TURBOJET_ATTENTION_SLOTS
#define TURBOJET_ATTENTION_SLOTS 4
#endif
#ifndef TURBOJET_ATTENTION_BLOCKS
#define TURBOJET_ATTENTION_BLOCKS 1
#endif

constexpr int kWarps = TURBOJET_ATTENTION_WARPS;
constexpr int kSlots = TURBOJET_ATTENTION_SLOTS;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kMergeLoads = 8;
constexpr float kLargestFixed = 127.0f * 256.0f;
constexpr float kNothing = -1e30f;  // below every score; unlike -inf its differences are numbers

struct Arguments {
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

// Two 8-bit digits of round(value), |value| <= kLargestFixed: byte 1 the high, byte 0 the low one.
__device__ __forceinline__ uint32_t to_digits(float value) {
  // Rounding the low digit to -128..127 carries one into the high digit.
  return static_cast<uint32_t>(__float2int_rn(value)) + 0x80u;
}

// Splits four results of to_digits into a word of high and a word of low digits, all int8.
__device__ __forceinline__ uint2 split_digits(const uint32_t (&digits)[4]) {
  const uint32_t pair0 = __byte_perm(digits[0], digits[1], 0x5140);
  const uint32_t pair1 = __byte_perm(digits[2], digits[3], 0x5140);
  return uint2{__byte_perm(pair0, pair1, 0x7632), __byte_perm(pair0, pair1, 0x5410) ^ 0x80808080u};
}

__device__ __forceinline__ float join(int high, int low) {
  return static_cast<float>(high * 256 + low);
}
__device__ __forceinline__ float join(float high, float low) { return high + low; }

// fp16 pairs of the values and of what rounding leaves.
__device__ __forceinline__ uint2 split_halves(float a, float b) {
  const uint32_t high = pack_fp16(a, b);
  return uint2{high, pack_fp16(a - low_to_float(high), b - high_to_float(high))};
}

template <bool kIsHalf>
struct Sum {
  using Type = int;
};
template <>
struct Sum<true> {
  using Type = float;
};

// What the blocks of a head leave for the last one, and where it writes.
struct HeadOutput {
  fp16* out;        // [group * head_dim]
  float* partials;  // [max_splits][group * (head_dim + 2)]
  uint32_t* ticket;
};

template <Kv kKv, int kHeadDim, int kColumnTiles>
class Attention {
  using Layout = Unit<kKv, kHeadDim>;
  static constexpr bool kIsHalf = kKv == Kv::kHalf;
  using Accumulator = typename Sum<kIsHalf>::Type;
  static constexpr int kQueries = 4 * kColumnTiles;
  static constexpr int kKeys = Layout::kTokens / 8;  // of a lane
  static constexpr int kChunks = Layout::kRowBytes / 64;
  static constexpr int kSlotBytes = Layout::kPartBytes + Layout::kParameterBytes;
  static constexpr int kRingBytes = kSlots * kSlotBytes;  // of a warp
  static constexpr int kColumnsBytes = 2 * kQueries * Layout::kRowBytes;

 public:
  __device__ __forceinline__ explicit Attention(const Arguments& arguments)
      : arguments_(arguments),
        warp_(threadIdx.x / kWarpSize),
        lane_(threadIdx.x % kWarpSize),
        group_(arguments.num_heads / arguments.pages.num_kv_heads) {
    char* const shared = dynamic_shared<char>();
    ring_ = shared + warp_ * kRingBytes;
    columns_ = shared + kWarps * kRingBytes;
    new_rows_ = columns_ + kColumnsBytes;
    query_scales_ = reinterpret_cast<float*>(new_rows_ + 2 * Layout::kRowBytes);
    query_sums_ = query_scales_ + kQueries;
    new_parameters_ = reinterpret_cast<uint32_t*>(query_sums_ + kQueries);
    is_last_ = new_parameters_ + 2;
    page_list_ = reinterpret_cast<int32_t*>(new_parameters_ + 4);
  }

  __device__ __forceinline__ void run() {
    const int head = blockIdx.y;
    const int row = blockIdx.z;
    let_dependents_launch();
    length_ = arguments_.positions[row] + 1;
    for (int i = threadIdx.x; i < arguments_.max_pages; i += kThreads)
      page_list_[i] =
          arguments_.page_table[static_cast<int64_t>(row) * arguments_.max_pages + i];
    const int pair = row * arguments_.pages.num_kv_heads + head;
    HeadOutput output;
    output.out = arguments_.out + static_cast<int64_t>(pair) * group_ * kHeadDim;
    output.partials = arguments_.partials +
                      static_cast<int64_t>(pair) * gridDim.x * group_ * (kHeadDim + 2);
    output.ticket = arguments_.tickets + pair;
    if (length_ <= 0) {
      wait_for_inputs();
      if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < group_ * kHeadDim; i += kThreads) output.out[i] = fp16{0};
      return;
    }
    units_ = (length_ + Layout::kTokens - 1) / Layout::kTokens;
    const int max_splits = gridDim.x;
    const int per_split = larger(arguments_.split_units, (units_ + max_splits - 1) / max_splits);
    const int num_splits = (units_ + per_split - 1) / per_split;
    const int split = blockIdx.x;
    if (split >= num_splits) return;
    first_ = split * per_split;
    last_ = smaller(first_ + per_split, units_);
    __syncthreads();

#pragma unroll
    for (int part = 0; part < kSlots - 1; ++part) copy_part(part);
    wait_for_inputs();
    prepare_inputs(row, head);
    __syncthreads();
    load_columns();
    stream_units(head);
    merge_warps();
    __syncthreads();
    if (num_splits == 1)
      write_block<true>(output.out, nullptr, head);
    else
      finish_split(output, split, num_splits, head);
  }

 private:
  // Starts the copy of half a unit: part 2i the keys, 2i + 1 the values of the warp's unit i.
  __device__ __forceinline__ void copy_part(int part) {
    const int unit = first_ + warp_ + part / 2 * kWarps;
    if (unit < last_) {
      const char* const source = unit_address(unit);
      char* const slot = ring_ + part % kSlots * kSlotBytes;
      const char* const from = source + part % 2 * Layout::kPartBytes + 16 * lane_;
#pragma unroll
      for (int i = 0; i < Layout::kPartBytes / 512; ++i)
        copy16_async(slot + 16 * lane_ + 512 * i, from + 512 * i);
      if (lane_ < Layout::kParameterBytes / 16)
        copy16_async(slot + Layout::kPartBytes + 16 * lane_,
                     source + 2 * Layout::kPartBytes + part % 2 * Layout::kParameterBytes +
                         16 * lane_);
    }
    commit_copies();
  }

  __device__ __forceinline__ char* unit_address(int unit) const {
    const int per_page = arguments_.pages.page_size / Layout::kTokens;
    const int place = unit / per_page;
    return Layout::address(arguments_.pages, page_list_[place], blockIdx.y,
                           unit - place * per_page);
  }

  // Queries become columns of operand B; the newest token goes into its page.
  __device__ __forceinline__ void prepare_inputs(int row, int head) {
    const int num_kv_heads = arguments_.pages.num_kv_heads;
    const int64_t row_heads = arguments_.num_heads + 2 * num_kv_heads;
    const QkvRow qkv{arguments_.qkv + row * row_heads * kHeadDim, arguments_.num_heads,
                     num_kv_heads, arguments_.num_ranks};
    const float2* const rotation =
        arguments_.rotation + static_cast<int64_t>(row) * (kHeadDim / 2);
    const float query_scale = arguments_.query_scale[row];
#pragma unroll 1
    for (int task = warp_; task < 2 + kQueries; task += kWarps) {
      if (task < 2) {
        if (last_ == units_) store_newest(qkv, rotation, head, task == 1);
        continue;
      }
      const int query = task - 2;
      float values[4] = {};
      if (query < group_) {
        load_head<kHeadDim>(values, qkv.values + qkv.head_index(0, head * group_ + query) * kHeadDim,
                            lane_);
        normalize_head<kHeadDim>(values, arguments_.q_norm, arguments_.eps, lane_);
        rotate_head<kHeadDim>(values, rotation, lane_);
      }
      put_query(query, values, query_scale);
    }
  }

  __device__ __forceinline__ void put_query(int query, const float (&values)[4],
                                            float query_scale) {
    char* const high = columns_ + 2 * query * Layout::kRowBytes;
    char* const low = high + Layout::kRowBytes;
    const bool is_active = lane_ < kHeadDim / 4;
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
    const float peak = __uint_as_float(lanes_max<kWarpSize>(largest));
    const bool is_zero = peak < 1e-30f;
    const float inverse = is_zero ? 0.0f : __fdividef(kLargestFixed, peak);
    uint32_t digits[4];
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      digits[i] = to_digits(values[i] * inverse);
      sum += static_cast<int>(digits[i] - 0x80u);
    }
    const uint2 words = split_digits(digits);
    sum = lanes_sum<kHeadDim / 4>(sum);
    if (is_active) {
      reinterpret_cast<uint32_t*>(high)[lane_] = words.x;
      reinterpret_cast<uint32_t*>(low)[lane_] = words.y;
    }
    if (lane_ == 0) {
      query_scales_[query] = is_zero ? 0.0f : peak * (1.0f / kLargestFixed) * query_scale;
      query_sums_[query] = static_cast<float>(sum);
    }
  }

  __device__ __forceinline__ void store_newest(const QkvRow& qkv, const float2* rotation, int head,
                                               bool is_value) {
    float values[4];
    load_head<kHeadDim>(values, qkv.values + qkv.head_index(1 + is_value, head) * kHeadDim, lane_);
    if (!is_value) {
      normalize_head<kHeadDim>(values, arguments_.k_norm, arguments_.eps, lane_);
      rotate_head<kHeadDim>(values, rotation, lane_);
    }
    float scale = 1.0f, zero_point = 0.0f;
    if (kKv == Kv::kStatic) {
      scale = arguments_.kv_scale[4 * head + 2 * is_value];
      zero_point = arguments_.kv_scale[4 * head + 2 * is_value + 1];
    }
    const StoredRow stored = to_stored<kKv>(values, scale, zero_point);
    const int token = (length_ - 1) % Layout::kTokens;
    char* const unit = unit_address(units_ - 1);
    if (is_value)
      put_value<kKv, kHeadDim>(unit + Layout::kPartBytes, token, stored, lane_);
    else
      put_key<kKv, kHeadDim>(unit, token, stored, lane_);
    if (lane_ < kHeadDim / 4) {
      uint32_t* const words = reinterpret_cast<uint32_t*>(
          new_rows_ + is_value * Layout::kRowBytes + 4 * Layout::kElementBytes * lane_);
      words[0] = stored.words[0];
      if (kIsHalf) words[1] = stored.words[1];
    }
    if (kKv == Kv::kOnline && lane_ == 0) {
      new_parameters_[is_value] = stored.parameters;
      reinterpret_cast<uint32_t*>(unit + 2 * Layout::kPartBytes +
                                  is_value * Layout::kParameterBytes)[token] = stored.parameters;
    }
  }

  __device__ __forceinline__ void load_columns() {
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      const char* const column =
          columns_ + (8 * tile + lane_ / 4) * Layout::kRowBytes + lane_ % 4 * 16;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const uint4 words = *reinterpret_cast<const uint4*>(column + 64 * chunk);
        query_[tile][chunk][0] = words.x;
        query_[tile][chunk][1] = words.y;
        query_[tile][chunk][2] = words.z;
        query_[tile][chunk][3] = words.w;
      }
      const int query = 4 * tile + lane_ % 4;
      scale_[tile] = query_scales_[query];
      query_sum_[tile] = kIsHalf ? 0.0f : query_sums_[query];
      top_[tile] = kNothing;
      total_[tile] = 0.0f;
      zeros_[tile] = 0.0f;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) mixed_[tile][i] = 0.0f;
    }
  }

  __device__ __forceinline__ void stream_units(int head) {
    float k_scale = 1.0f, k_zero = 0.0f;
    if (kKv == Kv::kStatic) {
      k_scale = arguments_.kv_scale[4 * head];
      k_zero = arguments_.kv_scale[4 * head + 1] - 128.0f * k_scale;
    }
    int part = 0;
#pragma unroll 1
    for (int unit = first_ + warp_; unit < last_; unit += kWarps, part += 2) {
      const int tokens = smaller(length_ - unit * Layout::kTokens, Layout::kTokens);
      const bool is_newest = unit == units_ - 1;
      float weights[kColumnTiles][kKeys];
      next_part(part);
      char* const keys = ring_ + part % kSlots * kSlotBytes;
      if (is_newest) patch(keys, tokens, false);
      score(weights, keys, k_scale, k_zero);
      if (is_newest) {
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile)
#pragma unroll
          for (int key = 0; key < kKeys; ++key)
            if (8 * key + lane_ / 4 >= tokens) weights[tile][key] = kNothing;
      }
      next_part(part + 1);
      char* const values = ring_ + (part + 1) % kSlots * kSlotBytes;
      if (is_newest) patch(values, tokens, true);
      mix(weights, values);
    }
  }

  // Waits for a part; every lane has then read the one before, whose slot is filled again.
  __device__ __forceinline__ void next_part(int part) {
    wait_copies<kSlots - 2>();
    __syncwarp();
    copy_part(part + kSlots - 1);
  }

  // Puts the newest token into its unit in shared memory; what lies behind it becomes 0.
  __device__ __forceinline__ void patch(char* slot, int tokens, bool is_value) {
    StoredRow row = {};
    if (lane_ < kHeadDim / 4) {
      const uint32_t* const words = reinterpret_cast<const uint32_t*>(
          new_rows_ + is_value * Layout::kRowBytes + 4 * Layout::kElementBytes * lane_);
      row.words[0] = words[0];
      if (kIsHalf) row.words[1] = words[1];
    }
    if (is_value)
      put_value<kKv, kHeadDim>(slot, tokens - 1, row, lane_);
    else
      put_key<kKv, kHeadDim>(slot, tokens - 1, row, lane_);
    if (kKv == Kv::kOnline) {
      uint32_t* const parameters = reinterpret_cast<uint32_t*>(slot + Layout::kPartBytes);
      for (int i = tokens + lane_; i < Layout::kTokens; i += kWarpSize) parameters[i] = 0;
      if (lane_ == 0) parameters[tokens - 1] = new_parameters_[is_value];
    }
    if (kIsHalf && is_value) {  // 0 times what was never written may be NaN
      const StoredRow nothing = {};
      for (int i = tokens; i < Layout::kTokens; ++i)
        put_value<kKv, kHeadDim>(slot, i, nothing, lane_);
    }
    __syncwarp();
  }

  // weights[tile][j] = score of key 8 j + lane / 4 for query 4 tile + lane % 4, times log2(e).
  __device__ __forceinline__ void score(float (&weights)[kColumnTiles][kKeys], const char* keys,
                                        float k_scale, float k_zero) {
    const char* const rows = keys + lane_ * 16;
#pragma unroll
    for (int m = 0; m < kKeys / 2; ++m) {
      Accumulator sums[kColumnTiles][4] = {};
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const uint4 a = *reinterpret_cast<const uint4*>(rows + (chunk * Layout::kTokens + 16 * m) * 64);
        const uint4 b =
            *reinterpret_cast<const uint4*>(rows + (chunk * Layout::kTokens + 16 * m + 8) * 64);
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
          const uint32_t word = reinterpret_cast<const uint32_t*>(
              keys + Layout::kPartBytes)[8 * key + lane_ / 4];
          k_scale = low_to_float(word);
          k_zero = high_to_float(word);
        }
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) {
          const float dot = join(sums[tile][2 * i], sums[tile][2 * i + 1]);
          weights[tile][key] =
              scale_[tile] * (kIsHalf ? dot : fmaf(k_scale, dot, k_zero * query_sum_[tile]));
        }
      }
    }
  }

  // Adds a unit's values, weighted by 2^score, to the running sums.
  __device__ __forceinline__ void mix(float (&weights)[kColumnTiles][kKeys], const char* values) {
    constexpr int kGroups = Layout::kTokens / Layout::kGroupTokens;
    constexpr int kGroupKeys = kKeys / kGroups;
    const uint32_t* const parameters =
        reinterpret_cast<const uint32_t*>(values + Layout::kPartBytes);
    uint32_t operand[kColumnTiles][kGroups][2];
    float keep[kColumnTiles], add[kColumnTiles];
#pragma unroll
    for (int tile = 0; tile < kColumnTiles; ++tile) {
      float (&w)[kKeys] = weights[tile];
      float top = w[0];
#pragma unroll
      for (int key = 1; key < kKeys; ++key) top = fmaxf(top, w[key]);
      top = max_over_keys(top);
      const float new_top = fmaxf(top_[tile], top);
      keep[tile] = exp2_fast(top_[tile] - new_top);
      add[tile] = exp2_fast(top - new_top);
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
      total_[tile] = fmaf(total_[tile], keep[tile], total * add[tile]);
      if (kKv == Kv::kOnline) zeros_[tile] = fmaf(zeros_[tile], keep[tile], zeros * add[tile]);
      // The largest static weight is 2^0.
      peak = kKv == Kv::kOnline ? max_over_keys(peak) : 1.0f;
      const bool is_zero = peak < 1e-30f;
      const float inverse = is_zero ? 0.0f : __fdividef(kLargestFixed, peak);
      if (!kIsHalf) add[tile] *= peak * (1.0f / kLargestFixed);
      const int source = lane_ % 4 * 4 + lane_ / 8;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        uint2 words;
        if (kIsHalf) {
          words = split_halves(w[group * kGroupKeys], w[group * kGroupKeys + 1]);
        } else {
          uint32_t digits[4];
#pragma unroll
          for (int i = 0; i < 4; ++i)
            digits[i] = to_digits(w[group * kGroupKeys + i % kGroupKeys] * inverse);
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
          mixed = fmaf(mixed, keep[tile], join(sums[tile][2 * i], sums[tile][2 * i + 1]) * add[tile]);
        }
    }
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

  // A warp's results: [group][head_dim] sums, then (top, total) of each query; in its own ring.
  static constexpr int kResultFloats = kQueries * (kHeadDim + 2);
  static_assert(kResultFloats * 4 <= kRingBytes, "results fit where the ring was");

  __device__ __forceinline__ void merge_warps() {
    wait_copies<0>();
    __syncwarp();
    float* const results = reinterpret_cast<float*>(ring_);
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

  // Adds up the warps; kIsFinal: writes fp16, else sums, then (top, total) of each query.
  template <bool kIsFinal>
  __device__ __forceinline__ void write_block(fp16* out, float* partial, int head) {
    const float* const results = reinterpret_cast<const float*>(dynamic_shared<char>());
    for (int i = threadIdx.x; i < group_ * kHeadDim; i += kThreads) {
      const int query = i / kHeadDim;
      float tops[kWarps], top = kNothing;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        tops[warp] = results[warp * (kRingBytes / 4) + kQueries * kHeadDim + 2 * query];
        top = fmaxf(top, tops[warp]);
      }
      float sum = 0.0f, total = 0.0f;
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        const float* const of_warp = results + warp * (kRingBytes / 4);
        const float weight = exp2_fast(tops[warp] - top);
        sum = fmaf(weight, of_warp[i], sum);
        total = fmaf(weight, of_warp[kQueries * kHeadDim + 2 * query + 1], total);
      }
      if (kIsFinal) {
        out[i] = to_fp16(value_of(sum / total, head));
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
    const float scale = arguments_.kv_scale[4 * head + 2];
    return fmaf(mean, scale, arguments_.kv_scale[4 * head + 3] - 128.0f * scale);
  }

  __device__ __forceinline__ void finish_split(const HeadOutput& output, int split, int num_splits,
                                               int head) {
    const int stride = group_ * (kHeadDim + 2);
    write_block<false>(nullptr, output.partials + split * stride, head);
    __syncthreads();
    if (threadIdx.x == 0)
      *is_last_ = take_ticket(output.ticket) == static_cast<uint32_t>(num_splits - 1);
    __syncthreads();
    if (*is_last_ == 0) return;
    if (threadIdx.x == 0) *output.ticket = 0;
    for (int i = threadIdx.x; i < group_ * kHeadDim; i += kThreads) {
      const int statistics = group_ * kHeadDim + 2 * (i / kHeadDim);
      float top = kNothing, total = 0.0f, sum = 0.0f;
      for (int start = 0; start < num_splits; start += kMergeLoads) {
        float tops[kMergeLoads], totals[kMergeLoads], sums[kMergeLoads];
#pragma unroll
        for (int j = 0; j < kMergeLoads; ++j) {
          const bool is_there = start + j < num_splits;
          const float* const partial = output.partials + (start + j) * stride;
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
      output.out[i] = to_fp16(value_of(sum / total, head));
    }
  }

  const Arguments& arguments_;
  const int warp_;
  const int lane_;
  const int group_;  // query heads of a kv head
  char* ring_;
  char* columns_;     // [2 * kQueries][row bytes]: high and low digits of each query in turn
  char* new_rows_;    // the newest key and value, dimensions in order
  float* query_scales_;
  float* query_sums_;
  uint32_t* new_parameters_;
  uint32_t* is_last_;
  int32_t* page_list_;
  int length_;
  int units_;
  int first_;
  int last_;
  uint32_t query_[kColumnTiles][kChunks][4];
  float scale_[kColumnTiles];
  float query_sum_[kColumnTiles];
  float top_[kColumnTiles];
  float total_[kColumnTiles];  // of this lane's keys
  float zeros_[kColumnTiles];  // sum of weight * zero, this lane's keys
  float mixed_[kColumnTiles][kHeadDim / 8];
};

template <Kv kKv>
__device__ __forceinline__ void run(const Arguments& arguments, int32_t head_dim) {
  const bool is_wide = arguments.num_heads > 4 * arguments.pages.num_kv_heads;
  if (head_dim == 128) {
    if (is_wide)
      Attention<kKv, 128, 2>(arguments).run();
    else
      Attention<kKv, 128, 1>(arguments).run();
  } else {
    if (is_wide)
      Attention<kKv, 64, 2>(arguments).run();
    else
      Attention<kKv, 64, 1>(arguments).run();
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, TURBOJET_ATTENTION_BLOCKS)
    decode_attention_half(fp16* out, char* pages, float* partials, uint32_t* tickets,
                          const fp16* qkv, const fp16* q_norm, const fp16* k_norm,
                          const float2* rotation, const float* query_scale,
                          const int32_t* positions, const int32_t* page_table, int32_t num_heads,
                          int32_t num_kv_heads, int32_t head_dim, int32_t num_ranks,
                          int32_t page_size, int32_t max_pages, int32_t split_units, float eps) {
  run<Kv::kHalf>(Arguments{out, Pages{pages, num_kv_heads, page_size}, partials, tickets, qkv,
                           q_norm, k_norm, rotation, query_scale, nullptr, positions, page_table,
                           num_heads, max_pages, num_ranks, split_units, eps},
                 head_dim);
}

extern "C" __global__ void __launch_bounds__(kThreads, TURBOJET_ATTENTION_BLOCKS)
    decode_attention_static(fp16* out, char* pages, float* partials, uint32_t* tickets,
                            const fp16* qkv, const fp16* q_norm, const fp16* k_norm,
                            const float2* rotation, const float* query_scale,
                            const float* kv_scale, const int32_t* positions,
                            const int32_t* page_table, int32_t num_heads, int32_t num_kv_heads,
                            int32_t head_dim, int32_t num_ranks, int32_t page_size,
                            int32_t max_pages, int32_t split_units, float eps) {
  run<Kv::kStatic>(Arguments{out, Pages{pages, num_kv_heads, page_size}, partials, tickets, qkv,
                             q_norm, k_norm, rotation, query_scale, kv_scale, positions,
                             page_table, num_heads, max_pages, num_ranks, split_units, eps},
                   head_dim);
}

extern "C" __global__ void __launch_bounds__(kThreads, TURBOJET_ATTENTION_BLOCKS)
    decode_attention_online(fp16* out, char* pages, float* partials, uint32_t* tickets,
                            const fp16* qkv, const fp16* q_norm, const fp16* k_norm,
                            const float2* rotation, const float* query_scale,
                            const int32_t* positions, const int32_t* page_table, int32_t num_heads,
                            int32_t num_kv_heads, int32_t head_dim, int32_t num_ranks,
                            int32_t page_size, int32_t max_pages, int32_t split_units, float eps) {
  run<Kv::kOnline>(Arguments{out, Pages{pages, num_kv_heads, page_size}, partials, tickets, qkv,
                             q_norm, k_norm, rotation, query_scale, nullptr, positions, page_table,
                             num_heads, max_pages, num_ranks, split_units, eps},
                   head_dim);
}
