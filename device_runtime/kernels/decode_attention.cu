// One new token per sequence: store its key and value, attend to all cached ones.
//
//   decode_attention_half    fp16 cache
//   decode_attention_static  int8, one scale and zero point per head (quant_policy 4)
//   decode_attention_online  int8, a scale and a zero per token and head (quant_policy 8)
//   and decode_attention_wide_*, for more than 4 query heads of a block
//   q, k = rotate(norm(qkv));  out[row, h] = softmax(query_scale[row] q_h k^T) v
//   over the tokens 0..positions[row], the new one as it reads back from the cache.
//
//   out [rows][num_heads * head_dim] fp16; pages as kv_cache.cuh; partials fp32
//   [rows * head_blocks][max_splits][query heads of a block][head_dim + 4], all 0 before and after;
//   qkv [rows][num_ranks][q, k, v heads of the rank][head_dim] fp16, rotary pairs adjacent; q_norm,
//   k_norm [head_dim] fp16, or both null; rotation [rows][head_dim / 2] (cos, sin) fp32; query_scale
//   [rows] fp32, with log2(e) in it; kv_scale [num_kv_heads] (k scale, k zero point, v scale, v zero
//   point) fp32, static only; positions [rows] int32, negative: the row is idle and its output 0;
//   page_table [rows][max_pages] int32.
// Launch: grid (head_blocks, rows, max_splits), block kDecodeThreads, ring_slots and dynamic shared
// memory as attention_shape.py's DecodeAttentionShape. head_blocks is a multiple of num_kv_heads, and
// num_heads / head_blocks 1 to 8; head_dim 64 or 128; page_size a multiple of 64. positions and
// page_table are not written by the step the kernel runs in.
// Bound by DRAM: 2 * head_dim (+ 8 when online) bytes (twice 2 * head_dim when fp16) per token and
// kv head.
// Checked against reference/attention.py attend, relative error 2e-3.
//
// A block takes a kv head, up to 8 of its query heads and one split: a range of steps of 32 cached
// tokens. How many splits there are depends on the row's own length alone, so a row's result does not
// depend on the others. Each warp streams its steps through a private ring, from before the previous
// kernel has finished; two more warps store the newest token and attend to it. Codes meet the tensor
// core as they are: queries and probabilities go in as two 8-bit digits of a 16-bit fixed point
// number (fp16: as high and low part), so sums over int8 are exact, and scales are applied to sums.
// Of the blocks that share a head the one that comes last adds up what the others leave in
// `partials`, in the order of the splits, as it comes (decode_share.cuh).

#include "decode_block.cuh"

namespace {

template <Kv kKv, int kColumnTiles>
__device__ __forceinline__ void run(const DecodeArguments& arguments, int32_t head_dim) {
  if (head_dim == 128)
    DecodeBlock<kKv, 128, kColumnTiles>(arguments).run();
  else
    DecodeBlock<kKv, 64, kColumnTiles>(arguments).run();
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kDecodeThreads, 1)
    decode_attention_half(fp16* out, char* pages, float* partials, const fp16* qkv,
                            const fp16* q_norm, const fp16* k_norm, const float2* rotation,
                            const float* query_scale, const int32_t* positions,
                            const int32_t* page_table, int32_t num_heads, int32_t num_kv_heads,
                            int32_t head_dim, int32_t num_ranks, int32_t page_size,
                            int32_t max_pages, int32_t max_splits, int32_t split_units,
                            int32_t ring_slots, float eps) {
  run<Kv::kHalf, 1>(
      DecodeArguments{out, Pages{pages, num_kv_heads, page_size}, partials, qkv, q_norm, k_norm,
                      rotation, query_scale, nullptr, positions, page_table, num_heads, max_pages,
                      num_ranks, max_splits, split_units, ring_slots, eps},
      head_dim);
}

extern "C" __global__ void __launch_bounds__(kDecodeThreads, 1)
    decode_attention_static(fp16* out, char* pages, float* partials, const fp16* qkv,
                            const fp16* q_norm, const fp16* k_norm, const float2* rotation,
                            const float* query_scale, const float* kv_scale, const int32_t* positions,
                            const int32_t* page_table, int32_t num_heads, int32_t num_kv_heads,
                            int32_t head_dim, int32_t num_ranks, int32_t page_size,
                            int32_t max_pages, int32_t max_splits, int32_t split_units,
                            int32_t ring_slots, float eps) {
  run<Kv::kStatic, 1>(
      DecodeArguments{out, Pages{pages, num_kv_heads, page_size}, partials, qkv, q_norm, k_norm,
                      rotation, query_scale, kv_scale, positions, page_table, num_heads, max_pages,
                      num_ranks, max_splits, split_units, ring_slots, eps},
      head_dim);
}

extern "C" __global__ void __launch_bounds__(kDecodeThreads, kOnlineBlocks)
    decode_attention_online(fp16* out, char* pages, float* partials, const fp16* qkv,
                            const fp16* q_norm, const fp16* k_norm, const float2* rotation,
                            const float* query_scale, const int32_t* positions,
                            const int32_t* page_table, int32_t num_heads, int32_t num_kv_heads,
                            int32_t head_dim, int32_t num_ranks, int32_t page_size,
                            int32_t max_pages, int32_t max_splits, int32_t split_units,
                            int32_t ring_slots, float eps) {
  run<Kv::kOnline, 1>(
      DecodeArguments{out, Pages{pages, num_kv_heads, page_size}, partials, qkv, q_norm, k_norm,
                      rotation, query_scale, nullptr, positions, page_table, num_heads, max_pages,
                      num_ranks, max_splits, split_units, ring_slots, eps},
      head_dim);
}

extern "C" __global__ void __launch_bounds__(kDecodeThreads, 1)
    decode_attention_wide_half(fp16* out, char* pages, float* partials, const fp16* qkv,
                            const fp16* q_norm, const fp16* k_norm, const float2* rotation,
                            const float* query_scale, const int32_t* positions,
                            const int32_t* page_table, int32_t num_heads, int32_t num_kv_heads,
                            int32_t head_dim, int32_t num_ranks, int32_t page_size,
                            int32_t max_pages, int32_t max_splits, int32_t split_units,
                            int32_t ring_slots, float eps) {
  run<Kv::kHalf, 2>(
      DecodeArguments{out, Pages{pages, num_kv_heads, page_size}, partials, qkv, q_norm, k_norm,
                      rotation, query_scale, nullptr, positions, page_table, num_heads, max_pages,
                      num_ranks, max_splits, split_units, ring_slots, eps},
      head_dim);
}

extern "C" __global__ void __launch_bounds__(kDecodeThreads, 1)
    decode_attention_wide_static(fp16* out, char* pages, float* partials, const fp16* qkv,
                            const fp16* q_norm, const fp16* k_norm, const float2* rotation,
                            const float* query_scale, const float* kv_scale, const int32_t* positions,
                            const int32_t* page_table, int32_t num_heads, int32_t num_kv_heads,
                            int32_t head_dim, int32_t num_ranks, int32_t page_size,
                            int32_t max_pages, int32_t max_splits, int32_t split_units,
                            int32_t ring_slots, float eps) {
  run<Kv::kStatic, 2>(
      DecodeArguments{out, Pages{pages, num_kv_heads, page_size}, partials, qkv, q_norm, k_norm,
                      rotation, query_scale, kv_scale, positions, page_table, num_heads, max_pages,
                      num_ranks, max_splits, split_units, ring_slots, eps},
      head_dim);
}

extern "C" __global__ void __launch_bounds__(kDecodeThreads, 1)
    decode_attention_wide_online(fp16* out, char* pages, float* partials, const fp16* qkv,
                            const fp16* q_norm, const fp16* k_norm, const float2* rotation,
                            const float* query_scale, const int32_t* positions,
                            const int32_t* page_table, int32_t num_heads, int32_t num_kv_heads,
                            int32_t head_dim, int32_t num_ranks, int32_t page_size,
                            int32_t max_pages, int32_t max_splits, int32_t split_units,
                            int32_t ring_slots, float eps) {
  run<Kv::kOnline, 2>(
      DecodeArguments{out, Pages{pages, num_kv_heads, page_size}, partials, qkv, q_norm, k_norm,
                      rotation, query_scale, nullptr, positions, page_table, num_heads, max_pages,
                      num_ranks, max_splits, split_units, ring_slots, eps},
      head_dim);
}
