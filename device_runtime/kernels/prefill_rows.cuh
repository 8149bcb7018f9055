// The rows of prefill_attention.cu, query heads of tokens: which there are, and their queries.
#ifndef TURBOJET_PREFILL_ROWS_CUH
#define TURBOJET_PREFILL_ROWS_CUH

#include "head_vector.cuh"
#include "kv_cache.cuh"

namespace {

constexpr int kPrefillWarps = 4;
constexpr int kPrefillThreads = kPrefillWarps * kWarpSize;
constexpr int kPrefillWarpRows = 32;
constexpr int kPrefillRows = kPrefillWarpRows * kPrefillWarps;
constexpr int kPrefillSlots = 2;

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

// 32 rows of a warp, those from num_rows on repeat the last; a lane has rows lane / 4 + 8 i.
template <Kv kKv, int kHeadDim>
struct PrefillRows {
  using Layout = Unit<kKv, kHeadDim>;
  static constexpr int kRows = kPrefillWarpRows / 8;  // of a lane
  static constexpr int kChunkDims = 64 / Layout::kElementBytes;
  static constexpr int kLaneDims = kChunkDims / 4;  // consecutive, of a chunk
  static constexpr int kChunkSteps = kChunkDims / 16;
  static constexpr int kDimSteps = kHeadDim / 16;

  const PrefillArguments& arguments;
  int lane;
  int group;  // query heads of a kv head
  int first_row;
  int warp_row;
  int first_token;
  int num_rows;
  int first_position;
  const int32_t* page_list;

  __device__ __forceinline__ explicit PrefillRows(const PrefillArguments& all)
      : arguments(all),
        lane(threadIdx.x % kWarpSize),
        group(all.num_heads / all.pages.num_kv_heads) {
    const int sequence = all.tiles[2 * blockIdx.y];
    first_row = all.tiles[2 * blockIdx.y + 1];
    warp_row = first_row + kPrefillWarpRows * (threadIdx.x / kWarpSize);
    first_token = all.query_start[sequence];
    num_rows = (all.query_start[sequence + 1] - first_token) * group;
    first_position = all.positions[first_token];
    page_list = all.page_table + static_cast<int64_t>(sequence) * all.max_pages;
  }

  __device__ __forceinline__ int last_position(int end_row) const {
    return first_position + (end_row - 1) / group;
  }

  // The warp's rows as operand A, in shared memory; only the lane that wrote a word reads it. Its
  // words of a step are dimensions 4 s .. 4 s + 3 of the kLaneDims that it has of a chunk.
  __device__ __forceinline__ void load_queries(uint4* queries, float* sums) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = smaller(warp_row + lane / 4 + 8 * i, num_rows - 1);
      const int token = row / group;
      const int64_t index = first_token + token;
      const int head = blockIdx.x * group + row - token * group;
      const int num_kv_heads = arguments.pages.num_kv_heads;
      const int64_t row_heads = arguments.num_heads + 2 * num_kv_heads;
      const QkvRow qkv{arguments.qkv + index * row_heads * kHeadDim, arguments.num_heads,
                       num_kv_heads, arguments.num_ranks};
      const fp16* const query = qkv.values + qkv.head_index(0, head) * kHeadDim;
      const float2* const rotation = arguments.rotation + index * (kHeadDim / 2);
      float scale = arguments.query_scale[index];
      if (kKv == Kv::kStatic) scale *= arguments.kv_scale[4 * blockIdx.x];
      const float factor = arguments.q_norm == nullptr ? 1.0f : norm_factor(query);
      float sum = 0.0f;
#pragma unroll
      for (int step = 0; step < kDimSteps; ++step) {
        const int dim = step / kChunkSteps * kChunkDims + lane % 4 * kLaneDims +
                        step % kChunkSteps * 4;
        float values[4];
        load_four(values, query + dim);
        if (arguments.q_norm != nullptr) {
          float weights[4];
          load_four(weights, arguments.q_norm + dim);
#pragma unroll
          for (int j = 0; j < 4; ++j) values[j] *= factor * weights[j];
        }
        const float4 turn = *reinterpret_cast<const float4*>(rotation + dim / 2);
        const uint32_t low = pack_fp16((values[0] * turn.x - values[1] * turn.y) * scale,
                                       (values[0] * turn.y + values[1] * turn.x) * scale);
        const uint32_t high = pack_fp16((values[2] * turn.z - values[3] * turn.w) * scale,
                                        (values[2] * turn.w + values[3] * turn.z) * scale);
        uint32_t* const words =
            reinterpret_cast<uint32_t*>(queries + (i / 2 * kDimSteps + step) * kWarpSize);
        words[i % 2] = low;
        words[i % 2 + 2] = high;
        sum += low_to_float(low) + high_to_float(low) + low_to_float(high) + high_to_float(high);
      }
      sums[i] = lanes_sum<4>(sum);
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
    for (int i = 0; i < kDimSteps; ++i) {
      float values[4];
      load_four(values, query + 4 * (lane % 4 + 4 * i));
#pragma unroll
      for (int j = 0; j < 4; ++j) squares = fmaf(values[j], values[j], squares);
    }
    return rsqrtf(lanes_sum<4>(squares) / static_cast<float>(kHeadDim) + arguments.eps);
  }

  // Where a row's result goes.
  __device__ __forceinline__ fp16* out_of(int row) const {
    const int token = row / group;
    const int head = blockIdx.x * group + row - token * group;
    return arguments.out +
           (static_cast<int64_t>(first_token + token) * arguments.num_heads + head) * kHeadDim;
  }
};

}  // namespace

#endif
