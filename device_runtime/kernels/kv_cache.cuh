// The paged KV cache in GPU memory: where a token's key and value lie, and how they are quantized.
//
// A layer's pages are [num_pages][num_kv_heads][page_size / kUnitTokens] units. A unit holds the
// keys and values of consecutive tokens of one head, each in the order in which a warp loads them:
//   keys    [row bytes / 64][unit tokens][64 bytes]: 16 bytes a lane are operand A of two products
//   values  [unit tokens / group][head_dim / 16][32 lanes][4 words]: operand A, transposed; a word
//           packs the tokens r, r + 8, .. of a group for one dimension
//   then, online int8 only, (scale, zero) fp16 of each key, and of each value
// fp16: units of 32 tokens, groups of 16; int8: units of 64, groups of 32. Either way keys take
// 64 * head_dim bytes. Twin: reference/kv_pages.py.
#ifndef TURBOJET_KV_CACHE_CUH
#define TURBOJET_KV_CACHE_CUH

#include "common.cuh"

namespace {

enum class Kv { kHalf, kStatic, kOnline };

// What one layer's cache looks like; page_size in tokens.
struct Pages {
  char* bytes;
  int num_kv_heads;
  int page_size;
};

template <Kv kKv, int kHeadDim>
struct Unit {
  static constexpr int kElementBytes = kKv == Kv::kHalf ? 2 : 1;
  static constexpr int kTokens = 64 / kElementBytes;
  static constexpr int kGroupTokens = 32 / kElementBytes;
  static constexpr int kRowBytes = kHeadDim * kElementBytes;
  static constexpr int kPartBytes = kTokens * kRowBytes;  // keys, or values
  static constexpr int kParameterBytes = kKv == Kv::kOnline ? 4 * kTokens : 0;
  static constexpr int kBytes = 2 * (kPartBytes + kParameterBytes);
  static_assert(kPartBytes == 64 * kHeadDim, "the same for every format");

  static __device__ __forceinline__ char* address(const Pages& pages, int page, int head,
                                                  int unit_of_page) {
    const int per_page = pages.page_size / kTokens;
    const int64_t index =
        (static_cast<int64_t>(page) * pages.num_kv_heads + head) * per_page + unit_of_page;
    return pages.bytes + index * kBytes;
  }

  // Byte of a key element inside the keys; four dimensions from a multiple of 4 are adjacent.
  static __device__ __forceinline__ int key_offset(int token, int dim) {
    const int byte = dim * kElementBytes;
    return (byte / 64 * kTokens + token) * 64 + byte % 64;
  }

  // Byte of a value element inside the values.
  static __device__ __forceinline__ int value_offset(int token, int dim) {
    const int group = token / kGroupTokens;
    const int row = token % 8;
    const int lane = dim % 8 * 4 + row % 4;
    const int word = dim / 8 % 2 + row / 4 * 2;
    return ((group * (kHeadDim / 16) + dim / 16) * kWarpSize + lane) * 16 + word * 4 +
           token % kGroupTokens / 8 * kElementBytes;
  }
};

// One key or value in the cache's format, four dimensions a lane (lane < head_dim / 4).
struct StoredRow {
  uint32_t words[2];    // fp16: two pairs; int8: four codes in the first
  uint32_t parameters;  // online int8: scale, zero; the same on every lane
};

// Codes as spec section 4.4: round((x - zero_point) / scale + 128), half to even.
__device__ __forceinline__ uint32_t quantize_static(const float (&values)[4], float scale,
                                                    float zero_point) {
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float code = rintf(__fdiv_rn(values[i] - zero_point, scale) + 128.0f);
    codes |= static_cast<uint32_t>(fminf(fmaxf(code, 0.0f), 255.0f)) << (8 * i);
  }
  return codes;
}

// Over the warp, through words that are in the order of the numbers.
__device__ __forceinline__ float warp_largest(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t largest = warp_max(bits >> 31 ? ~bits : bits | 0x80000000u);
  return __uint_as_float(largest >> 31 ? largest & 0x7fffffffu : ~largest);
}

// Codes, scale and zero as spec section 4.5; inactive lanes repeat a value of an active one.
__device__ __forceinline__ StoredRow quantize_online(const float (&values)[4]) {
  float low = fminf(fminf(values[0], values[1]), fminf(values[2], values[3]));
  float high = fmaxf(fmaxf(values[0], values[1]), fmaxf(values[2], values[3]));
  low = -warp_largest(-low);
  high = warp_largest(high);
  const fp16 scale = to_fp16(__fdiv_rn(high - low, 255.0f));
  const fp16 zero = to_fp16(low);
  const float step = to_float(scale);
  // A scale of 0 stores code 0; an inverse beyond fp16 becomes the largest fp16.
  const float inverse =
      step == 0.0f ? 0.0f : fminf(to_float(to_fp16(__fdiv_rn(1.0f, step))), 65504.0f);
  StoredRow row = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float code = rintf((values[i] - to_float(zero)) * inverse);
    row.words[0] |= static_cast<uint32_t>(fminf(fmaxf(code, 0.0f), 255.0f)) << (8 * i);
  }
  row.parameters = static_cast<uint32_t>(scale.bits) | static_cast<uint32_t>(zero.bits) << 16;
  return row;
}

template <Kv kKv>
__device__ __forceinline__ StoredRow to_stored(const float (&values)[4], float scale,
                                               float zero_point) {
  if (kKv == Kv::kOnline) return quantize_online(values);
  StoredRow row = {};
  if (kKv == Kv::kStatic) {
    row.words[0] = quantize_static(values, scale, zero_point);
  } else {
    row.words[0] = pack_fp16(values[0], values[1]);
    row.words[1] = pack_fp16(values[2], values[3]);
  }
  return row;
}

// What reads back: code * scale + zero; online int8 has its own scale and zero, fp16 none.
template <Kv kKv>
__device__ __forceinline__ void from_stored(float (&values)[4], const StoredRow& row, float scale,
                                            float zero) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (kKv == Kv::kHalf) {
      const uint32_t word = row.words[i / 2];
      values[i] = i % 2 == 0 ? low_to_float(word) : high_to_float(word);
    } else {
      if (kKv == Kv::kOnline) {
        scale = low_to_float(row.parameters);
        zero = high_to_float(row.parameters);
      }
      values[i] = fmaf(static_cast<float>(row.words[0] >> (8 * i) & 0xffu), scale, zero);
    }
  }
}

// Writes a token's row into a unit's keys, in global or shared memory. One warp.
template <Kv kKv, int kHeadDim>
__device__ __forceinline__ void put_key(char* keys, int token, const StoredRow& row, int lane) {
  using Layout = Unit<kKv, kHeadDim>;
  if (lane >= kHeadDim / 4) return;
  uint32_t* const words =
      reinterpret_cast<uint32_t*>(keys + Layout::key_offset(token, 4 * lane));
  words[0] = row.words[0];
  if (kKv == Kv::kHalf) words[1] = row.words[1];
}

template <Kv kKv, int kHeadDim>
__device__ __forceinline__ void put_value(char* values, int token, const StoredRow& row,
                                          int lane) {
  using Layout = Unit<kKv, kHeadDim>;
  if (lane >= kHeadDim / 4) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    char* const element = values + Layout::value_offset(token, 4 * lane + i);
    if (kKv == Kv::kHalf)
      *reinterpret_cast<uint16_t*>(element) =
          static_cast<uint16_t>(row.words[i / 2] >> (i % 2 * 16));
    else
      *reinterpret_cast<uint8_t*>(element) = static_cast<uint8_t>(row.words[0] >> (8 * i));
  }
}

}  // namespace

#endif
