// 128 rows (query heads of tokens) of one kv head attend to the cache: prefill_attention.cu.
#ifndef TURBOJET_PREFILL_TILE_CUH
#define TURBOJET_PREFILL_TILE_CUH

#include "fragments.cuh"
#include "head_vector.cuh"
#include "kv_cache.cuh"
#include "load_matrix.cuh"

namespace {

constexpr int kPrefillWarps = 8;
constexpr int kPrefillThreads = kPrefillWarps * kWarpSize;
constexpr int kPrefillRows = 16 * kPrefillWarps;
constexpr int kPrefillSlots = 3;
constexpr float kBelowAll = -1e30f;  // below every score; unlike -inf its differences are numbers

struct PrefillArguments {
  fp16* out;
  Pages pages;
  const fp16* qkv;
  const fp16* q_norm;
  const float2* rotation;
  const float* query_scale;
  const float* kv_scale;
  const int32_t* positions;
  const int32_t* query_start;
  const int32_t* tiles;
  const int32_t* page_table;
  int num_heads;
  int max_pages;
  int num_ranks;
  float eps;
};

// The codes of bytes 2 kPair and 2 kPair + 1, less 128, as fp16: 0x64 before a byte is 1024 more.
template <int kPair>
__device__ __forceinline__ uint32_t widen_codes(uint32_t word) {
  return subtract_pairs(__byte_perm(word, 0x64646464u, kPair == 0 ? 0x4140 : 0x4342), 0x64806480u);
}

template <Kv kKv, int kHeadDim>
class PrefillTile {
  using Layout = Unit<kKv, kHeadDim>;
  static constexpr bool kIsHalf = kKv == Kv::kHalf;
  static constexpr int kKeyTiles = Layout::kTokens / 8;
  static constexpr int kChunks = Layout::kRowBytes / 64;
  static constexpr int kChunkDims = kHeadDim / kChunks;
  static constexpr int kLaneDims = kChunkDims / 4;  // consecutive, of a chunk
  static constexpr int kChunkSteps = kChunkDims / 16;
  static constexpr int kOutTiles = kHeadDim / 8;

 public:
  __device__ __forceinline__ explicit PrefillTile(const PrefillArguments& arguments)
      : arguments_(arguments),
        warp_(threadIdx.x / kWarpSize),
        lane_(threadIdx.x % kWarpSize),
        group_(arguments.num_heads / arguments.pages.num_kv_heads) {
    const int sequence = arguments.tiles[2 * blockIdx.y];
    first_row_ = arguments.tiles[2 * blockIdx.y + 1];
    first_token_ = arguments.query_start[sequence];
    num_rows_ = (arguments.query_start[sequence + 1] - first_token_) * group_;
    first_position_ = arguments.positions[first_token_];
    page_list_ = arguments.page_table + static_cast<int64_t>(sequence) * arguments.max_pages;
    length_ = last_position(smaller(first_row_ + kPrefillRows, num_rows_)) + 1;
  }

  __device__ __forceinline__ void run() {
    const int num_units = (length_ + Layout::kTokens - 1) / Layout::kTokens;
    const int warp_row = first_row_ + 16 * warp_;
    const bool has_rows = warp_row < num_rows_;
    const int warp_last = has_rows ? last_position(smaller(warp_row + 16, num_rows_)) : -1;
    const int warp_first = first_position_ + warp_row / group_;
#pragma unroll
    for (int unit = 0; unit < kPrefillSlots - 1; ++unit) copy_unit(unit, num_units);
    load_queries(warp_row);
#pragma unroll 1
    for (int unit = 0; unit < num_units; ++unit) {
      wait_copies<kPrefillSlots - 2>();
      __syncthreads();
      copy_unit(unit + kPrefillSlots - 1, num_units);
      char* const slot = slot_of(unit);
      const int first = unit * Layout::kTokens;
      if (first + Layout::kTokens > length_) {
        clear_behind(slot, length_ - first);
        __syncthreads();
      }
      if (first > warp_last) continue;
      float scores[kKeyTiles][4] = {};
      score(scores, slot);
      if (first + Layout::kTokens - 1 > warp_first) mask(scores, first);
      weigh(scores, slot);
      mix(scores, slot + Layout::kPartBytes);
    }
    wait_copies<0>();
    if (has_rows) store();
  }

 private:
  __device__ __forceinline__ int last_position(int end_row) const {
    return first_position_ + (end_row - 1) / group_;
  }

  __device__ __forceinline__ char* slot_of(int unit) const {
    return dynamic_shared<char>() + unit % kPrefillSlots * Layout::kBytes;
  }

  // Tokens whose number has bit 2 swap places with their neighbours, so that the rows of keys that
  // eight lanes read at once lie on different banks.
  __device__ __forceinline__ void copy_unit(int unit, int num_units) const {
    if (unit < num_units) {
      const int per_page = arguments_.pages.page_size / Layout::kTokens;
      const int place = unit / per_page;
      const char* const source = Layout::address(arguments_.pages, page_list_[place], blockIdx.x,
                                                 unit - place * per_page);
      char* const target = slot_of(unit);
      constexpr int kUnitChunks = Layout::kBytes / 16;
#pragma unroll
      for (int i = 0; i < (kUnitChunks + kPrefillThreads - 1) / kPrefillThreads; ++i) {
        const int chunk = threadIdx.x + i * kPrefillThreads;
        const bool is_key = i * kPrefillThreads < Layout::kPartBytes / 16;
        const int to = is_key ? chunk ^ (chunk >> 4 & 1) << 2 : chunk;
        if ((i + 1) * kPrefillThreads <= kUnitChunks || chunk < kUnitChunks)
          copy16_async(target + 16 * to, source + 16 * chunk);
      }
    }
    commit_copies();
  }

  // 0 times what no token has written yet may be NaN.
  __device__ __forceinline__ void clear_behind(char* slot, int tokens) const {
    if (kKv == Kv::kOnline) {
      uint32_t* const parameters = reinterpret_cast<uint32_t*>(slot + 2 * Layout::kPartBytes +
                                                               Layout::kParameterBytes);
      for (int i = tokens + threadIdx.x; i < Layout::kTokens; i += kPrefillThreads)
        parameters[i] = 0;
    }
    if (kIsHalf) {
      char* const values = slot + Layout::kPartBytes;
      for (int i = tokens * kHeadDim + threadIdx.x; i < Layout::kTokens * kHeadDim;
           i += kPrefillThreads)
        *reinterpret_cast<uint16_t*>(values + Layout::value_offset(i / kHeadDim, i % kHeadDim)) = 0;
    }
  }

  // Rows lane / 4 and + 8 of the warp as operand A: a step's four words of a lane are dimensions
  // 4 s .. 4 s + 3 of the kLaneDims that it has of a chunk.
  __device__ __forceinline__ void load_queries(int warp_row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = smaller(warp_row + lane_ / 4 + 8 * half, num_rows_ - 1);
      const int token = row / group_;
      limit_[half] = first_position_ + token;
      const int64_t index = first_token_ + token;
      const int head = blockIdx.x * group_ + row - token * group_;
      const int num_kv_heads = arguments_.pages.num_kv_heads;
      const int64_t row_heads = arguments_.num_heads + 2 * num_kv_heads;
      const QkvRow qkv{arguments_.qkv + index * row_heads * kHeadDim, arguments_.num_heads,
                       num_kv_heads, arguments_.num_ranks};
      const fp16* const query = qkv.values + qkv.head_index(0, head) * kHeadDim;
      const float2* const rotation = arguments_.rotation + index * (kHeadDim / 2);
      float factor = 1.0f;
      if (arguments_.q_norm != nullptr) factor = norm_factor(query);
      float scale = arguments_.query_scale[index];
      if (kKv == Kv::kStatic) scale *= arguments_.kv_scale[4 * blockIdx.x];
      float sum = 0.0f;
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        const int dim = step / kChunkSteps * kChunkDims + lane_ % 4 * kLaneDims +
                        step % kChunkSteps * 4;
        float values[4];
        load_four(values, query + dim);
        if (arguments_.q_norm != nullptr) {
          float weights[4];
          load_four(weights, arguments_.q_norm + dim);
#pragma unroll
          for (int i = 0; i < 4; ++i) values[i] *= factor * weights[i];
        }
        const float4 turn = *reinterpret_cast<const float4*>(rotation + dim / 2);
        query_[step][half] = pack_fp16((values[0] * turn.x - values[1] * turn.y) * scale,
                                       (values[0] * turn.y + values[1] * turn.x) * scale);
        query_[step][half + 2] = pack_fp16((values[2] * turn.z - values[3] * turn.w) * scale,
                                           (values[2] * turn.w + values[3] * turn.z) * scale);
        sum += low_to_float(query_[step][half]) + high_to_float(query_[step][half]) +
               low_to_float(query_[step][half + 2]) + high_to_float(query_[step][half + 2]);
      }
      query_sum_[half] = lanes_sum<4>(sum);
    }
  }

  static __device__ __forceinline__ void load_four(float (&values)[4], const fp16* source) {
    const uint2 words = *reinterpret_cast<const uint2*>(source);
    values[0] = low_to_float(words.x);
    values[1] = high_to_float(words.x);
    values[2] = low_to_float(words.y);
    values[3] = high_to_float(words.y);
  }

  __device__ __forceinline__ float norm_factor(const fp16* query) const {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      float values[4];
      load_four(values, query + 4 * (lane_ % 4 + 4 * i));
#pragma unroll
      for (int j = 0; j < 4; ++j) squares = fmaf(values[j], values[j], squares);
    }
    return rsqrtf(lanes_sum<4>(squares) / static_cast<float>(kHeadDim) + arguments_.eps);
  }

  // scores[j] = of rows lane / 4 (0, 1) and + 8 (2, 3) for keys 8 j + t (0, 2) and + 4 (1, 3),
  // t = lane % 4, times log2(e).
  __device__ __forceinline__ void score(float (&scores)[kKeyTiles][4], const char* slot) const {
    const int column = lane_ / 4;
    const int row = column % 2 * 4 + (column / 2 ^ column % 2);  // swapped as in copy_unit
    const char* const keys = slot + row * 64 + lane_ % 4 * 16;
    const uint32_t* const parameters =
        reinterpret_cast<const uint32_t*>(slot + 2 * Layout::kPartBytes) + lane_ % 4;
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j) {
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const uint4 loaded =
            *reinterpret_cast<const uint4*>(keys + (chunk * Layout::kTokens + 8 * j) * 64);
        const uint32_t words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
        for (int step = 0; step < kChunkSteps; ++step) {
          const uint32_t(&q)[4] = query_[chunk * kChunkSteps + step];
          const uint32_t b0 = kIsHalf ? words[2 * step % 4] : widen_codes<0>(words[step]);
          const uint32_t b1 = kIsHalf ? words[(2 * step + 1) % 4] : widen_codes<1>(words[step]);
          multiply(scores[j], q[0], q[1], q[2], q[3], b0, b1);
        }
      }
      if (kKv == Kv::kOnline) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t word = parameters[8 * j + 4 * i];
          const float scale = low_to_float(word);
          const float middle = fmaf(128.0f, scale, high_to_float(word));
          scores[j][i] = fmaf(scale, scores[j][i], middle * query_sum_[0]);
          scores[j][i + 2] = fmaf(scale, scores[j][i + 2], middle * query_sum_[1]);
        }
      }
    }
  }

  __device__ __forceinline__ void mask(float (&scores)[kKeyTiles][4], int first) const {
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (first + 8 * j + lane_ % 4 + i % 2 * 4 > limit_[i / 2]) scores[j][i] = kBelowAll;
  }

  // From scores to weights: 2^(score - top), for online int8 times the value's scale / peak_.
  __device__ __forceinline__ void weigh(float (&scores)[kKeyTiles][4], const char* slot) {
    float keep[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = fmaxf(scores[0][2 * half], scores[0][2 * half + 1]);
#pragma unroll
      for (int j = 1; j < kKeyTiles; ++j)
        top = fmaxf(top, fmaxf(scores[j][2 * half], scores[j][2 * half + 1]));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
      top = fmaxf(top_[half], fmaxf(top, __shfl_xor_sync(kFullMask, top, 2)));
      keep[half] = exp2_fast(top_[half] - top);
      top_[half] = top;
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[j][i] = exp2_fast(scores[j][i] - top);
          total += scores[j][i];
        }
      total_[half] = fmaf(total_[half], keep[half], total);
    }
    if (kKv == Kv::kOnline) apply_value_scales(scores, slot, keep);
    if (!__any_sync(kFullMask, keep[0] != 1.0f || keep[1] != 1.0f)) return;
#pragma unroll
    for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) mixed_[n][i] *= keep[i / 2];
  }

  __device__ __forceinline__ void apply_value_scales(float (&weights)[kKeyTiles][4],
                                                     const char* slot, float (&keep)[2]) {
    const uint32_t* const parameters = reinterpret_cast<const uint32_t*>(
        slot + 2 * Layout::kPartBytes + Layout::kParameterBytes);
    uint32_t largest = 0;  // scales are not negative: their bits are in order
#pragma unroll
    for (int i = 0; i < Layout::kTokens / kWarpSize; ++i) {
      const uint32_t scale = parameters[i * kWarpSize + lane_] & 0xffffu;
      largest = scale > largest ? scale : largest;
    }
    const float peak = fmaxf(peak_, low_to_float(warp_max(largest)));
    const float inverse = peak > 0.0f ? 1.0f / peak : 0.0f;
    const float ratio = peak_ * inverse;
    peak_ = peak;
#pragma unroll
    for (int half = 0; half < 2; ++half) middles_[half] *= keep[half];
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word = parameters[8 * j + 4 * i + lane_ % 4];
        const float scale = low_to_float(word);
        const float middle = fmaf(128.0f, scale, high_to_float(word));
        const float relative = scale * inverse;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& weight = weights[j][2 * half + i];
          middles_[half] = fmaf(weight, middle, middles_[half]);
          weight *= relative;
        }
      }
    // Before the first unit there is nothing to keep, and a peak of 0 stays exact.
    keep[0] *= ratio;
    keep[1] *= ratio;
  }

  // mixed_ += weights * values.
  __device__ __forceinline__ void mix(const float (&weights)[kKeyTiles][4], const char* values) {
    constexpr int kGroups = Layout::kTokens / Layout::kGroupTokens;
    constexpr int kGroupTiles = kKeyTiles / kGroups;
    constexpr int kSteps = kIsHalf ? 1 : 2;  // of a group
    const char* const own = values + 16 * lane_;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const auto pair = [&](int tile, int i) {
        return pack_fp16(weights[group * kGroupTiles + tile][i],
                         weights[group * kGroupTiles + tile + 1][i]);
      };
      uint32_t a[kSteps][4];
      if (kIsHalf) {
        a[0][0] = pair(0, 0);
        a[0][1] = pair(0, 2);
        a[0][2] = pair(0, 1);
        a[0][3] = pair(0, 3);
      } else {
#pragma unroll
        for (int step = 0; step < kSteps; ++step)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            a[step][i] = pair(i / 2 * (kGroupTiles - 2), i % 2 * 2 + step);
      }
#pragma unroll
      for (int m = 0; m < kHeadDim / 16; ++m) {
        const uint4 words =
            *reinterpret_cast<const uint4*>(own + (group * (kHeadDim / 16) + m) * 512);
        float(&even)[4] = mixed_[2 * m];
        float(&odd)[4] = mixed_[2 * m + 1];
        if (kIsHalf) {
          multiply(even, a[0][0], a[0][1], a[0][2], a[0][3], words.x, words.z);
          multiply(odd, a[0][0], a[0][1], a[0][2], a[0][3], words.y, words.w);
        } else {
          const auto product = [&](float(&sums)[4], int step, uint32_t word) {
            multiply(sums, a[step][0], a[step][1], a[step][2], a[step][3], widen_codes<0>(word),
                     widen_codes<1>(word));
          };
          product(even, 0, words.x);
          product(odd, 0, words.y);
          product(even, kSteps - 1, words.z);
          product(odd, kSteps - 1, words.w);
        }
      }
    }
  }

  __device__ __forceinline__ void store() const {
    float scale = 1.0f, zero = 0.0f;
    if (kKv == Kv::kStatic) {
      scale = arguments_.kv_scale[4 * blockIdx.x + 2];
      zero = arguments_.kv_scale[4 * blockIdx.x + 3];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float inverse = 1.0f / lanes_sum<4>(total_[half]);
      const float factor = inverse * (kKv == Kv::kOnline ? peak_ : scale);
      const float offset = kKv == Kv::kOnline ? lanes_sum<4>(middles_[half]) * inverse : zero;
      const int row = first_row_ + 16 * warp_ + lane_ / 4 + 8 * half;
      if (row >= num_rows_) continue;
      const int token = row / group_;
      const int head = blockIdx.x * group_ + row - token * group_;
      fp16* const out = arguments_.out +
                        (static_cast<int64_t>(first_token_ + token) * arguments_.num_heads + head) *
                            kHeadDim +
                        lane_ % 4 * 2;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n)
        *reinterpret_cast<uint32_t*>(out + 8 * n) =
            pack_fp16(fmaf(mixed_[n][2 * half], factor, offset),
                      fmaf(mixed_[n][2 * half + 1], factor, offset));
    }
  }

  const PrefillArguments& arguments_;
  const int warp_;
  const int lane_;
  const int group_;  // query heads of a kv head
  int first_row_;
  int first_token_;
  int num_rows_;
  int first_position_;
  int length_;
  const int32_t* page_list_;
  uint32_t query_[kHeadDim / 16][4];
  float query_sum_[2];
  int limit_[2];  // position of the row's token
  float top_[2] = {kBelowAll, kBelowAll};
  float total_[2] = {};    // of this lane's keys
  float middles_[2] = {};  // sum of weight * what code 128 stands for, this lane's keys
  float peak_ = 0.0f;      // mixed_ is in units of it
  float mixed_[kOutTiles][4] = {};
};

}  // namespace

#endif
