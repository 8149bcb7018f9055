// Keys and values of several new tokens of each sequence go into the paged cache.
//
//   store_kv_half, store_kv_static, store_kv_online (as in prefill_attention.cu)
//   k = rotate(norm(qkv)), v = qkv of each token, quantized as kv_cache.cuh says.
//
//   pages as kv_cache.cuh; qkv [num_tokens][num_ranks][q, k, v heads of the rank][head_dim] fp16,
//   rotary pairs adjacent; k_norm [head_dim] fp16 or null; rotation [num_tokens][head_dim / 2]
//   (cos, sin) fp32; kv_scale [num_kv_heads] (k scale, k zero point, v scale, v zero point) fp32,
//   static only; positions [num_tokens] int32, consecutive within a sequence; query_start
//   [num_sequences + 1] int32; spans [num_spans] (sequence, index) int32: positions 64 * index to
//   + 63 of it, every span that has new tokens once; page_table [num_sequences][max_pages] int32.
// Launch: grid (num_kv_heads, num_spans), block kThreads. head_dim 64 or 128; page_size a multiple
// of 64.
// Bound by DRAM: 4 * head_dim bytes in and 2 * head_dim (+ 8) out per token and kv head, int8.
// Checked against reference/attention.py store: equal codes but for rounding of fp32.
//
// Values are transposed in shared memory, on top of what the span held before.

#include "fragments.cuh"
#include "head_vector.cuh"
#include "kv_cache.cuh"

namespace {

constexpr int kThreads = 256;  // a warp for each token modulo 8
constexpr int kSpanTokens = 64;
constexpr int kBlocks = TURBOJET_PLAIN ? 2 : 3;  // of an SM, by registers; 3 would spill on sm_72

struct Arguments {
  Pages pages;
  const fp16* qkv;
  const fp16* k_norm;
  const float2* rotation;
  const float* kv_scale;
  const int32_t* positions;
  const int32_t* query_start;
  const int32_t* spans;
  const int32_t* page_table;
  int num_heads;
  int max_pages;
  int num_ranks;
  float eps;
};

// Loads, quantizes and stores the tokens row, row + 8, .. of a group; their values go to `staged`.
template <Kv kKv, int kHeadDim>
class Store {
  using Layout = Unit<kKv, kHeadDim>;
  static constexpr int kTogether = Layout::kGroupTokens / 8;

 public:
  __device__ __forceinline__ explicit Store(const Arguments& arguments)
      : arguments_(arguments), lane_(threadIdx.x % kWarpSize) {
    const int num_kv_heads = arguments.pages.num_kv_heads;
    const QkvRow row{nullptr, arguments.num_heads, num_kv_heads, arguments.num_ranks};
    row_stride_ = static_cast<int64_t>(arguments.num_heads + 2 * num_kv_heads) * kHeadDim;
    keys_ = arguments.qkv + row.head_index(1, blockIdx.x) * kHeadDim;
    values_ = arguments.qkv + row.head_index(2, blockIdx.x) * kHeadDim;
    if (kKv == Kv::kStatic) scale_ = reinterpret_cast<const float4*>(arguments.kv_scale)[blockIdx.x];
  }

  // first_index: of position `begin` among the step's tokens; group_begin: a position.
  __device__ __forceinline__ void run(char* unit, char* staged, int group_begin, int row,
                                      int begin, int end, int64_t first_index) const {
    StoredRow keys[kTogether], values[kTogether];
    RawHead<kHeadDim> raw[kTogether];
    float loaded[kTogether][4];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int position = smaller(larger(group_begin + row + 8 * i, begin), end - 1);
      const int64_t index = first_index + position - begin;
      raw[i].load(keys_ + index * row_stride_, arguments_.k_norm,
                  arguments_.rotation + index * (kHeadDim / 2), lane_);
      load_head<kHeadDim>(loaded[i], values_ + index * row_stride_, lane_);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      values[i] = to_stored<kKv>(loaded[i], scale_.z, scale_.w);
      raw[i].finish(loaded[i], arguments_.eps);
      keys[i] = to_stored<kKv>(loaded[i], scale_.x, scale_.y);
    }
    const int token = group_begin % Layout::kTokens + row;
    const bool is_whole = group_begin + row >= begin && group_begin + row + 8 * kTogether - 8 < end;
    if (is_whole) put_values(staged, token, values);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int position = group_begin + row + 8 * i;
      if (position < begin || position >= end) continue;
      put_key<kKv, kHeadDim>(unit, token + 8 * i, keys[i], lane_);
      if (!is_whole) put_value<kKv, kHeadDim>(staged, token + 8 * i, values[i], lane_);
      if (kKv == Kv::kOnline && lane_ == 0) {
        uint32_t* const parameters = reinterpret_cast<uint32_t*>(unit + 2 * Layout::kPartBytes);
        parameters[token + 8 * i] = keys[i].parameters;
        parameters[Layout::kTokens + token + 8 * i] = values[i].parameters;
      }
    }
  }

 private:
  // put_value of all of them: each dimension's are a word.
  __device__ __forceinline__ void put_values(char* staged, int token,
                                             const StoredRow (&rows)[kTogether]) const {
    if (lane_ >= kHeadDim / 4) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t word;
      if (kKv == Kv::kHalf) {
        word = __byte_perm(rows[0].words[i / 2], rows[1].words[i / 2], i % 2 == 0 ? 0x5410 : 0x7632);
      } else {
        const uint32_t select = i | (i + 4) << 4;
        const uint32_t low = __byte_perm(rows[0].words[0], rows[1].words[0], select);
        const uint32_t high =
            __byte_perm(rows[kTogether - 2].words[0], rows[kTogether - 1].words[0], select);
        word = __byte_perm(low, high, 0x5410);
      }
      *reinterpret_cast<uint32_t*>(staged + Layout::value_offset(token, 4 * lane_ + i)) = word;
    }
  }

  const Arguments& arguments_;
  const int lane_;
  int64_t row_stride_;
  const fp16* keys_;
  const fp16* values_;
  float4 scale_ = {1.0f, 0.0f, 1.0f, 0.0f};
};

template <Kv kKv, int kHeadDim>
__device__ __forceinline__ void store_span(const Arguments& arguments, char* staged) {
  using Layout = Unit<kKv, kHeadDim>;
  constexpr int kUnits = kSpanTokens / Layout::kTokens;
  constexpr int kUnitChunks = Layout::kPartBytes / 16;
  const int sequence = arguments.spans[2 * blockIdx.y];
  const int span_begin = arguments.spans[2 * blockIdx.y + 1] * kSpanTokens;
  const int first_token = arguments.query_start[sequence];
  const int num_tokens = arguments.query_start[sequence + 1] - first_token;
  const int first_position = arguments.positions[first_token];
  const int begin = larger(first_position, span_begin);
  const int end = smaller(first_position + num_tokens, span_begin + kSpanTokens);
  const int place = span_begin / arguments.pages.page_size;
  const int page =
      arguments.page_table[static_cast<int64_t>(sequence) * arguments.max_pages + place];
  char* const units =
      Layout::address(arguments.pages, page, blockIdx.x,
                      (span_begin - place * arguments.pages.page_size) / Layout::kTokens);
  if (end - begin < kSpanTokens) {
    for (int i = threadIdx.x; i < kUnits * kUnitChunks; i += kThreads)
      reinterpret_cast<uint4*>(staged)[i] = *reinterpret_cast<const uint4*>(
          units + i / kUnitChunks * Layout::kBytes + Layout::kPartBytes + i % kUnitChunks * 16);
    __syncthreads();
  }
  const Store<kKv, kHeadDim> store(arguments);
  const int64_t first_index = first_token + begin - first_position;
#pragma unroll 1
  for (int group = 0; group < kSpanTokens; group += Layout::kGroupTokens) {
    const int unit = group / Layout::kTokens;
    store.run(units + unit * Layout::kBytes, staged + unit * Layout::kPartBytes,
              span_begin + group, threadIdx.x / kWarpSize, begin, end, first_index);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kUnits * kUnitChunks; i += kThreads)
    *reinterpret_cast<uint4*>(units + i / kUnitChunks * Layout::kBytes + Layout::kPartBytes +
                              i % kUnitChunks * 16) = reinterpret_cast<const uint4*>(staged)[i];
}

template <Kv kKv>
__device__ __forceinline__ void run(const Arguments& arguments, int32_t head_dim) {
  __shared__ uint4 staged[kSpanTokens * 128 * (kKv == Kv::kHalf ? 2 : 1) / 16];
  let_dependents_launch();
  wait_for_inputs();
  if (head_dim == 128)
    store_span<kKv, 128>(arguments, reinterpret_cast<char*>(staged));
  else
    store_span<kKv, 64>(arguments, reinterpret_cast<char*>(staged));
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    store_kv_half(char* pages, const fp16* qkv, const fp16* k_norm, const float2* rotation,
                  const int32_t* positions, const int32_t* query_start, const int32_t* spans,
                  const int32_t* page_table, int32_t num_heads, int32_t num_kv_heads,
                  int32_t head_dim, int32_t num_ranks, int32_t page_size, int32_t max_pages,
                  float eps) {
  run<Kv::kHalf>(
      Arguments{Pages{pages, num_kv_heads, page_size}, qkv, k_norm, rotation, nullptr, positions,
                query_start, spans, page_table, num_heads, max_pages, num_ranks, eps},
      head_dim);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    store_kv_static(char* pages, const fp16* qkv, const fp16* k_norm, const float2* rotation,
                    const float* kv_scale, const int32_t* positions, const int32_t* query_start,
                    const int32_t* spans, const int32_t* page_table, int32_t num_heads,
                    int32_t num_kv_heads, int32_t head_dim, int32_t num_ranks, int32_t page_size,
                    int32_t max_pages, float eps) {
  run<Kv::kStatic>(
      Arguments{Pages{pages, num_kv_heads, page_size}, qkv, k_norm, rotation, kv_scale, positions,
                query_start, spans, page_table, num_heads, max_pages, num_ranks, eps},
      head_dim);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks)
    store_kv_online(char* pages, const fp16* qkv, const fp16* k_norm, const float2* rotation,
                    const int32_t* positions, const int32_t* query_start, const int32_t* spans,
                    const int32_t* page_table, int32_t num_heads, int32_t num_kv_heads,
                    int32_t head_dim, int32_t num_ranks, int32_t page_size, int32_t max_pages,
                    float eps) {
  run<Kv::kOnline>(
      Arguments{Pages{pages, num_kv_heads, page_size}, qkv, k_norm, rotation, nullptr, positions,
                query_start, spans, page_table, num_heads, max_pages, num_ranks, eps},
      head_dim);
}
