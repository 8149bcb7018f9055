// 128 rows (query heads of tokens) of one kv head attend to the cache: prefill_attention.cu.
#ifndef TURBOJET_PREFILL_TILE_CUH
#define TURBOJET_PREFILL_TILE_CUH

#include "fragments.cuh"
#include "load_matrix.cuh"
#include "prefill_rows.cuh"

namespace {

constexpr float kBelowAll = -1e30f;  // below every score; unlike -inf its differences are numbers
constexpr float kHeadroom = 8.0f;    // weights up to 2^8 before the sums are scaled anew

// The codes of bytes 2 kPair and 2 kPair + 1, less 128, as fp16: 0x64 before a byte is 1024 more.
template <int kPair>
__device__ __forceinline__ uint32_t widen_codes(uint32_t word) {
  return subtract_pairs(__byte_perm(word, 0x64646464u, kPair == 0 ? 0x4140 : 0x4342), 0x64806480u);
}

template <Kv kKv, int kHeadDim>
class PrefillTile {
  using Layout = Unit<kKv, kHeadDim>;
  static constexpr bool kIsHalf = kKv == Kv::kHalf;
  using Rows = PrefillRows<kKv, kHeadDim>;
  static constexpr int kRowTiles = kPrefillWarpRows / 16;
  static constexpr int kRows = Rows::kRows;
  static constexpr int kKeyTiles = 4;          // of a step
  static constexpr int kStepKeys = 8 * kKeyTiles;
  static constexpr int kHeldTiles = TURBOJET_PLAIN ? 1 : kKeyTiles;  // in registers at once
  static constexpr int kChunks = Layout::kRowBytes / 64;
  static constexpr int kChunkSteps = Rows::kChunkSteps;
  static constexpr int kDimSteps = Rows::kDimSteps;
  static constexpr int kOutTiles = kHeadDim / 8;

 public:
  __device__ __forceinline__ explicit PrefillTile(const PrefillArguments& arguments)
      : arguments_(arguments),
        rows_(arguments),
        warp_(threadIdx.x / kWarpSize),
        lane_(threadIdx.x % kWarpSize) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) top_[i] = kBelowAll;
    length_ = rows_.last_position(smaller(rows_.first_row + kPrefillRows, rows_.num_rows)) + 1;
    queries_ = reinterpret_cast<uint4*>(dynamic_shared<char>() + kPrefillSlots * Layout::kBytes) +
               warp_ * kRowTiles * kDimSteps * kWarpSize + lane_;
  }

  __device__ __forceinline__ void run() {
    const int num_units = (length_ + Layout::kTokens - 1) / Layout::kTokens;
    const bool has_rows = rows_.warp_row < rows_.num_rows;
    const int warp_last =
        has_rows ? rows_.last_position(smaller(rows_.warp_row + kPrefillWarpRows, rows_.num_rows)) : -1;
    const int warp_first = rows_.first_position + rows_.warp_row / rows_.group;
#pragma unroll
    for (int unit = 0; unit < kPrefillSlots - 1; ++unit) copy_unit(unit, num_units);
    rows_.load_queries(queries_, query_sums());
#pragma unroll 1
    for (int unit = 0; unit < num_units; ++unit) {
      wait_copies<kPrefillSlots - 2>();
      __syncthreads();
      copy_unit(unit + kPrefillSlots - 1, num_units);
      char* const slot = slot_of(unit);
      const int unit_begin = unit * Layout::kTokens;
      if (unit_begin + Layout::kTokens > length_) {
        clear_behind(slot, length_ - unit_begin);
        __syncthreads();
      }
      if (unit_begin > warp_last) continue;
      if (kKv == Kv::kOnline) raise_peak(slot);
#pragma unroll 1
      for (int key = 0; key < Layout::kTokens; key += kStepKeys) {
        const int first = unit_begin + key;
        if (first > warp_last) break;
        float scores[kRowTiles][kKeyTiles][4] = {};
        score(scores, slot, key);
        if (first + kStepKeys - 1 > warp_first) mask(scores, first);
        weigh(scores, slot, key);
        mix(scores, slot + Layout::kPartBytes + key / Layout::kGroupTokens * kDimSteps * 512);
      }
    }
    wait_copies<0>();
    if (has_rows) store();
  }

 private:
  __device__ __forceinline__ char* slot_of(int unit) const {
    return dynamic_shared<char>() + unit % kPrefillSlots * Layout::kBytes;
  }

  // Of this lane's rows, after all queries.
  __device__ __forceinline__ float* query_sums() const {
    return reinterpret_cast<float*>(dynamic_shared<char>() + kPrefillSlots * Layout::kBytes +
                                    kPrefillRows * kHeadDim * 2) +
           kRows * threadIdx.x;
  }

  // (scale, zero) of a unit's keys, or of its values.
  static __device__ __forceinline__ const uint32_t* parameters_of(const char* slot, bool is_value) {
    return reinterpret_cast<const uint32_t*>(slot + 2 * Layout::kPartBytes +
                                             is_value * Layout::kParameterBytes);
  }

  // Tokens whose number has bit 2 swap places with their neighbours, so that the rows of keys that
  // eight lanes read at once lie on different banks.
  __device__ __forceinline__ void copy_unit(int unit, int num_units) const {
    if (unit < num_units) {
      const int per_page = arguments_.pages.page_size / Layout::kTokens;
      const int place = unit / per_page;
      const char* const source = Layout::address(arguments_.pages, rows_.page_list[place], blockIdx.x,
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
      uint32_t* const parameters = const_cast<uint32_t*>(parameters_of(slot, true));
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

  static __device__ __forceinline__ void load_words(uint32_t (&words)[4], const void* shared) {
    const uint4 loaded = *static_cast<const uint4*>(shared);
    words[0] = loaded.x;
    words[1] = loaded.y;
    words[2] = loaded.z;
    words[3] = loaded.w;
  }

  // scores[m][j] = of rows 16 m + lane / 4 (0, 1) and + 8 (2, 3) for keys 8 j + t (0, 2) and + 4
  // (1, 3), t = lane % 4, times log2(e).
  __device__ __forceinline__ void score(float (&scores)[kRowTiles][kKeyTiles][4], const char* slot,
                                        int key) const {
    const int column = lane_ / 4;
    const int row = column % 2 * 4 + (column / 2 ^ column % 2);  // swapped as in copy_unit
    const char* const keys = slot + (key + row) * 64 + lane_ % 4 * 16;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
      for (int first = 0; first < kKeyTiles; first += kHeldTiles) {
        uint32_t words[kHeldTiles][4];
#pragma unroll
        for (int j = 0; j < kHeldTiles; ++j)
          load_words(words[j], keys + (chunk * Layout::kTokens + 8 * (first + j)) * 64);
#pragma unroll
        for (int step = 0; step < kChunkSteps; ++step) {
          uint32_t q[kRowTiles][4];
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m)
            load_words(q[m], queries_ + (m * kDimSteps + chunk * kChunkSteps + step) * kWarpSize);
#pragma unroll
          for (int j = 0; j < kHeldTiles; ++j) {
            const uint32_t b0 = kIsHalf ? words[j][2 * step % 4] : widen_codes<0>(words[j][step]);
            const uint32_t b1 =
                kIsHalf ? words[j][(2 * step + 1) % 4] : widen_codes<1>(words[j][step]);
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m)
              multiply(scores[m][first + j], q[m][0], q[m][1], q[m][2], q[m][3], b0, b1);
          }
        }
      }
    if (kKv != Kv::kOnline) return;
    const uint32_t* const parameters = parameters_of(slot, false) + key + lane_ % 4;
    const float4 loaded = *reinterpret_cast<const float4*>(query_sums());
    const float sums[kRows] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word = parameters[8 * j + 4 * i];
        const float scale = low_to_float(word);
        const float middle = fmaf(128.0f, scale, high_to_float(word));
#pragma unroll
        for (int own = 0; own < kRows; ++own) {
          float& value = scores[own / 2][j][own % 2 * 2 + i];
          value = fmaf(scale, value, middle * sums[own]);
        }
      }
  }

  __device__ __forceinline__ void mask(float (&scores)[kRowTiles][kKeyTiles][4], int first) const {
#pragma unroll
    for (int own = 0; own < kRows; ++own) {
      const int limit = rows_.last_position(rows_.warp_row + lane_ / 4 + 8 * own + 1) - first - lane_ % 4;
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (8 * j + 4 * i > limit) scores[own / 2][j][own % 2 * 2 + i] = kBelowAll;
    }
  }

  // From scores to weights: 2^(score - top), for online int8 times the value's scale / peak_.
  __device__ __forceinline__ void weigh(float (&scores)[kRowTiles][kKeyTiles][4], const char* slot,
                                        int key) {
    float tops[kRows];
    bool is_above = false;
#pragma unroll
    for (int own = 0; own < kRows; ++own) {
      tops[own] = kBelowAll;
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          tops[own] = fmaxf(tops[own], scores[own / 2][j][own % 2 * 2 + i]);
      is_above |= tops[own] > top_[own] + kHeadroom;
    }
    if (__any_sync(kFullMask, is_above)) raise_tops(tops);
#pragma unroll
    for (int own = 0; own < kRows; ++own)
#pragma unroll
      for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& value = scores[own / 2][j][own % 2 * 2 + i];
          value = exp2_fast(value - top_[own]);
          total_[own] += value;
        }
    if (kKv != Kv::kOnline) return;
    const uint32_t* const parameters = parameters_of(slot, true) + key + lane_ % 4;
    const float inverse_peak = peak_ > 0.0f ? __fdividef(1.0f, peak_) : 0.0f;
#pragma unroll
    for (int j = 0; j < kKeyTiles; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word = parameters[8 * j + 4 * i];
        const float scale = low_to_float(word);
        const float middle = fmaf(128.0f, scale, high_to_float(word));
        const float relative = scale * inverse_peak;
#pragma unroll
        for (int own = 0; own < kRows; ++own) {
          float& weight = scores[own / 2][j][own % 2 * 2 + i];
          middles_[own] = fmaf(weight, middle, middles_[own]);
          weight *= relative;
        }
      }
  }

  // Makes a row's largest score so far what its weights are relative to.
  __device__ __forceinline__ void raise_tops(float (&tops)[kRows]) {
#pragma unroll
    for (int own = 0; own < kRows; ++own) {
      float top = fmaxf(tops[own], __shfl_xor_sync(kFullMask, tops[own], 1));
      top = fmaxf(top_[own], fmaxf(top, __shfl_xor_sync(kFullMask, top, 2)));
      const float keep = exp2_fast(top_[own] - top);
      top_[own] = top;
      total_[own] *= keep;
      if (kKv == Kv::kOnline) middles_[own] *= keep;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) mixed_[own / 2][n][own % 2 * 2 + i] *= keep;
    }
  }

  // Makes the largest scale of values so far what mixed_ is in units of.
  __device__ __forceinline__ void raise_peak(const char* slot) {
    const uint32_t* const parameters = parameters_of(slot, true);
    uint32_t largest = 0;  // scales are not negative: their bits are in order
#pragma unroll
    for (int i = 0; i < Layout::kTokens / kWarpSize; ++i) {
      const uint32_t scale = parameters[i * kWarpSize + lane_] & 0xffffu;
      largest = scale > largest ? scale : largest;
    }
    const float peak = low_to_float(warp_max(largest));
    if (peak <= peak_) return;
    const float ratio = peak_ / peak;
    peak_ = peak;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) mixed_[m][n][i] *= ratio;
  }

  // mixed_ += weights * values.
  __device__ __forceinline__ void mix(const float (&weights)[kRowTiles][kKeyTiles][4],
                                      const char* values) {
    // Products of 16 keys: int8 has them in words 0, 1 and 2, 3 of a lane's 16 bytes of 32 tokens,
    // fp16 in words 0, 2 and 1, 3 of its 16 bytes of 16 tokens, twice.
    uint32_t a[2][kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int tile = kIsHalf ? 2 * step : i / 2 * 2;
          const int column = i % 2 * 2 + (kIsHalf ? i / 2 : step);
          a[step][m][i] = pack_fp16(weights[m][tile][column], weights[m][tile + 1][column]);
        }
    const char* const own = values + 16 * lane_;
#pragma unroll
    for (int dims = 0; dims < kDimSteps; ++dims) {
      uint32_t words[kIsHalf ? 2 : 1][4];
      load_words(words[0], own + dims * 512);
      if (kIsHalf) load_words(words[kIsHalf], own + (kDimSteps + dims) * 512);
#pragma unroll
      for (int step = 0; step < 2; ++step)
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint32_t word = kIsHalf ? words[kIsHalf * step][n] : words[0][n + 2 * step];
          const uint32_t b0 = kIsHalf ? word : widen_codes<0>(word);
          const uint32_t b1 = kIsHalf ? words[kIsHalf * step][n + 2] : widen_codes<1>(word);
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
            const uint32_t(&w)[4] = a[step][m];
            multiply(mixed_[m][2 * dims + n], w[0], w[1], w[2], w[3], b0, b1);
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
    for (int i = 0; i < kRows; ++i) {
      const float inverse = 1.0f / lanes_sum<4>(total_[i]);
      const float factor = inverse * (kKv == Kv::kOnline ? peak_ : scale);
      const float offset = kKv == Kv::kOnline ? lanes_sum<4>(middles_[i]) * inverse : zero;
      const int row = rows_.warp_row + lane_ / 4 + 8 * i;
      if (row >= rows_.num_rows) continue;
      fp16* const out = rows_.out_of(row) + lane_ % 4 * 2;
#pragma unroll
      for (int n = 0; n < kOutTiles; ++n) {
        const float(&sums)[4] = mixed_[i / 2][n];
        *reinterpret_cast<uint32_t*>(out + 8 * n) =
            pack_fp16(fmaf(sums[i % 2 * 2], factor, offset),
                      fmaf(sums[i % 2 * 2 + 1], factor, offset));
      }
    }
  }

  const PrefillArguments& arguments_;
  const Rows rows_;
  const int warp_;
  const int lane_;
  int length_;
  uint4* queries_;
  float top_[kRows];
  float total_[kRows] = {};    // of this lane's keys
  float middles_[kRows] = {};  // sum of weight * what code 128 stands for, this lane's keys
  float peak_ = 0.0f;
  float mixed_[kRowTiles][kOutTiles][4] = {};
};

}  // namespace

#endif
