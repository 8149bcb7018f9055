// Several new tokens of each sequence attend to all cached ones up to their own.
//
//   prefill_attention_half    fp16 cache
//   prefill_attention_static  int8, one scale and zero point per head (quant_policy 4)
//   prefill_attention_online  int8, a scale and a zero per token and head (quant_policy 8)
//   out[i, h] = softmax(query_scale[i] q_h k^T) v, q = rotate(norm(qkv[i])), over the tokens
//   0..positions[i] of its sequence, which store_kv.cu has put into the pages before.
//
//   out [num_tokens][num_heads * head_dim] fp16; pages as kv_cache.cuh; qkv [num_tokens][num_ranks]
//   [q, k, v heads of the rank][head_dim] fp16, rotary pairs adjacent; q_norm [head_dim] fp16 or
//   null; rotation [num_tokens][head_dim / 2] (cos, sin) fp32; query_scale [num_tokens] fp32, with
//   log2(e) in it; kv_scale [num_kv_heads] (k scale, k zero point, v scale, v zero point) fp32,
//   static only; positions [num_tokens] int32, consecutive within a sequence; query_start
//   [num_sequences + 1] int32; tiles [num_tiles] (sequence, first row) int32, the longest first;
//   page_table [num_sequences][max_pages] int32.
//   A row is a query head of a token: of token row / group, head row % group of the kv head.
// Launch: grid (num_kv_heads, num_tiles), block kPrefillThreads, dynamic shared memory as
// attention_shape.py's prefill_shared_bytes. head_dim 64 or 128; num_heads / num_kv_heads 1 to 16;
// page_size a multiple of 64.
// Bound by MACs: 2 * head_dim per query head, token and token before it.
// Checked against reference/attention.py attend, relative error 2e-3.
//
// A warp keeps 32 rows; the block streams units of keys and values through a ring. The cache's order
// is that of operand B: a lane's 16 bytes of keys are four steps of 16 dimensions, its 16 bytes of
// values the tokens whose weights it has just computed. Codes are widened to fp16 without rounding;
// scales are applied to scores and to weights. Sums are scaled anew only when a score is far above
// the largest before it.

#include "prefill_tile.cuh"

namespace {

template <Kv kKv>
__device__ __forceinline__ void run(const PrefillArguments& arguments, int32_t head_dim) {
  let_dependents_launch();
  wait_for_inputs();
  if (head_dim == 128)
    PrefillTile<kKv, 128>(arguments).run();
  else
    PrefillTile<kKv, 64>(arguments).run();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kPrefillThreads, 2)
    prefill_attention_half(fp16* out, const char* pages, const fp16* qkv, const fp16* q_norm,
                           const float2* rotation, const float* query_scale,
                           const int32_t* positions, const int32_t* query_start,
                           const int32_t* tiles, const int32_t* page_table, int32_t num_heads,
                           int32_t num_kv_heads, int32_t head_dim, int32_t num_ranks,
                           int32_t page_size, int32_t max_pages, float eps) {
  run<Kv::kHalf>(
      PrefillArguments{out, Pages{const_cast<char*>(pages), num_kv_heads, page_size}, qkv, q_norm,
                       rotation, query_scale, nullptr, positions, query_start, tiles, page_table,
                       num_heads, max_pages, num_ranks, eps},
      head_dim);
}

extern "C" __global__ void __launch_bounds__(kPrefillThreads, 2)
    prefill_attention_static(fp16* out, const char* pages, const fp16* qkv, const fp16* q_norm,
                             const float2* rotation, const float* query_scale,
                             const float* kv_scale, const int32_t* positions,
                             const int32_t* query_start, const int32_t* tiles,
                             const int32_t* page_table, int32_t num_heads, int32_t num_kv_heads,
                             int32_t head_dim, int32_t num_ranks, int32_t page_size,
                             int32_t max_pages, float eps) {
  run<Kv::kStatic>(
      PrefillArguments{out, Pages{const_cast<char*>(pages), num_kv_heads, page_size}, qkv, q_norm,
                       rotation, query_scale, kv_scale, positions, query_start, tiles, page_table,
                       num_heads, max_pages, num_ranks, eps},
      head_dim);
}

extern "C" __global__ void __launch_bounds__(kPrefillThreads, 2)
    prefill_attention_online(fp16* out, const char* pages, const fp16* qkv, const fp16* q_norm,
                             const float2* rotation, const float* query_scale,
                             const int32_t* positions, const int32_t* query_start,
                             const int32_t* tiles, const int32_t* page_table, int32_t num_heads,
                             int32_t num_kv_heads, int32_t head_dim, int32_t num_ranks,
                             int32_t page_size, int32_t max_pages, float eps) {
  run<Kv::kOnline>(
      PrefillArguments{out, Pages{const_cast<char*>(pages), num_kv_heads, page_size}, qkv, q_norm,
                       rotation, query_scale, nullptr, positions, query_start, tiles, page_table,
                       num_heads, max_pages, num_ranks, eps},
      head_dim);
}
