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

constexpr int kThreads = 256;
constexpr int kSpanTokens = 64;

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

template <Kv kKv, int kHeadDim>
__device__ __forceinline__ void store_token(const Arguments& arguments, int64_t index, char* unit,
                                            char* values_unit, int token) {
  using Layout = Unit<kKv, kHeadDim>;
  const int lane = threadIdx.x % kWarpSize;
  const int head = blockIdx.x;
  const int num_kv_heads = arguments.pages.num_kv_heads;
  const int64_t row_heads = arguments.num_heads + 2 * num_kv_heads;
  const QkvRow qkv{arguments.qkv + index * row_heads * kHeadDim, arguments.num_heads, num_kv_heads,
                   arguments.num_ranks};
  float keys[4], values[4];
  load_head<kHeadDim>(keys, qkv.values + qkv.head_index(1, head) * kHeadDim, lane);
  load_head<kHeadDim>(values, qkv.values + qkv.head_index(2, head) * kHeadDim, lane);
  normalize_head<kHeadDim>(keys, arguments.k_norm, arguments.eps, lane);
  rotate_head<kHeadDim>(keys, arguments.rotation + index * (kHeadDim / 2), lane);
  float4 scale = {1.0f, 0.0f, 1.0f, 0.0f};
  if (kKv == Kv::kStatic) scale = reinterpret_cast<const float4*>(arguments.kv_scale)[head];
  const StoredRow key = to_stored<kKv>(keys, scale.x, scale.y);
  const StoredRow value = to_stored<kKv>(values, scale.z, scale.w);
  put_key<kKv, kHeadDim>(unit, token, key, lane);
  put_value<kKv, kHeadDim>(values_unit, token, value, lane);
  if (kKv == Kv::kOnline && lane == 0) {
    uint32_t* const parameters = reinterpret_cast<uint32_t*>(unit + 2 * Layout::kPartBytes);
    parameters[token] = key.parameters;
    parameters[Layout::kTokens + token] = value.parameters;
  }
}

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
#pragma unroll 2
  for (int position = begin + threadIdx.x / kWarpSize; position < end;
       position += kThreads / kWarpSize) {
    const int unit = (position - span_begin) / Layout::kTokens;
    store_token<kKv, kHeadDim>(arguments, first_token + position - first_position,
                               units + unit * Layout::kBytes, staged + unit * Layout::kPartBytes,
                               position % Layout::kTokens);
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

extern "C" __global__ void __launch_bounds__(kThreads)
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

extern "C" __global__ void __launch_bounds__(kThreads)
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

extern "C" __global__ void __launch_bounds__(kThreads)
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
