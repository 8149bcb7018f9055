// The activations of a GEMV: from memory to fixed point, by the GEMV itself for one token, by a
// launch of its own for more.
#ifndef TURBOJET_W4A16_QUANTIZE_CUH
#define TURBOJET_W4A16_QUANTIZE_CUH

#include "activations.cuh"
#include "w4a16_ring.cuh"

namespace {

struct Arguments {
  fp16* out;                // kHalf, kSilu
  float* residual;          // kAdd: updated; else: read
  const fp16* x;            // kAdd
  const fp16* norm_weight;  // kHalf, kSilu
  const uint4* activations;  // with more than one token, in place of what is read above
  const fp16* bias;         // null, or [outputs]
  float* workspace;
  int num_tokens;
  int phase_units;  // whose activations fit into shared memory at once
  int held_tiles;   // whose units' sums do
  float eps;
};

// Four values of one token, in the order of `first_input`.
template <bool kHasNorm>
__device__ __forceinline__ void load_activations(float (&values)[4], const Arguments& arguments,
                                                 int64_t row, int input, float& square_sum) {
  if (kHasNorm) {
    const float2 a = *reinterpret_cast<const float2*>(arguments.residual + row + input);
    const float2 b = *reinterpret_cast<const float2*>(arguments.residual + row + input + 8);
    const uint32_t wa = *reinterpret_cast<const uint32_t*>(arguments.norm_weight + input);
    const uint32_t wb = *reinterpret_cast<const uint32_t*>(arguments.norm_weight + input + 8);
    square_sum = a.x * a.x + a.y * a.y + (b.x * b.x + b.y * b.y);
    values[0] = a.x * low_to_float(wa);
    values[1] = b.x * low_to_float(wb);
    values[2] = a.y * high_to_float(wa);
    values[3] = b.y * high_to_float(wb);
  } else {
    const uint32_t a = *reinterpret_cast<const uint32_t*>(arguments.x + row + input);
    const uint32_t b = *reinterpret_cast<const uint32_t*>(arguments.x + row + input + 8);
    values[0] = low_to_float(a);
    values[1] = low_to_float(b);
    values[2] = high_to_float(a);
    values[3] = high_to_float(b);
  }
}

template <int kTokens>
__device__ __forceinline__ void store_stretch(
    const StretchActivations<kTokens, kGroupSize>& place, const FixedPoint& fixed, int token,
    int lane) {
  // Chunk (block of tokens, pair of tiles, column, t), word (tile of the pair, k16).
  const int chunk =
      ((token / 4 * 2 + lane / 16) * kColumns<kTokens> + token % 4 * 2) * 4 + lane % 4;
  const int word = lane / 8 % 2 * 2 + lane / 4 % 2;
  uint32_t* const words = reinterpret_cast<uint32_t*>(place.chunks() + chunk);
  words[word] = fixed.high;
  words[word + 16] = fixed.low;
  if (lane == 0) place.scale(token) = fixed.scale;
  if (lane % (kGroupSize / 4) == 0)
    place.negated_sum(lane / (kGroupSize / 4), token) = fixed.negated_sum;
}

// One stretch of one token for each warp, to memory.
template <int kTokens, bool kHasNorm>
__device__ __forceinline__ void run_quantize(uint4* activations, const Arguments& arguments,
                                             int inputs) {
  using Place = StretchActivations<kTokens, kGroupSize>;
  let_dependents_launch();
  const int lane = threadIdx.x % kWarpSize;
  const int item = (blockIdx.x * kQuantizeThreads + threadIdx.x) / kWarpSize;
  const int num_stretches = (inputs + kUnitInputs - 1) / kUnitInputs * kUnitStretches;
  const int token = item % kTokens;
  const int stretch = item / kTokens;
  const int input = stretch * kStretchInputs + first_input(lane);
  if (kHasNorm && input < inputs) prefetch_line(arguments.norm_weight + input);
  wait_for_inputs();
  if (stretch >= num_stretches) return;
  float values[4] = {};
  float square_sum = 0.0f;
  if (input < inputs && token < arguments.num_tokens)
    load_activations<kHasNorm>(values, arguments, static_cast<int64_t>(token) * inputs, input,
                               square_sum);
  char* const base = reinterpret_cast<char*>(activations);
  store_stretch<kTokens>(Place{base + stretch * Place::kBytes}, to_fixed_point<kGroupSize>(values),
                         token, lane);
  if (kHasNorm) {
    square_sum = lanes_sum<kWarpSize>(square_sum);
    if (lane == 0)
      reinterpret_cast<float*>(base + num_stretches * Place::kBytes)[item] = square_sum;
  }
}

// Activations of one token's stretches on their way from memory to shared memory; their loads are
// in flight together.
template <bool kHasNorm>
struct ActivationBatch {
  // A warp of eight has four stretches of 4096 inputs.
  static constexpr int kBatch = kHasNorm ? 3 : kWarps == 8 ? 4 : 6;

  float values[kBatch][4];
  float square_sums[kBatch];

  __device__ __forceinline__ void load(const QuantizedMatrix& matrix, const Arguments& arguments,
                                       int first_stretch, int start, int count, int lane) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int item = start + i * kWarps;
      const int input = (first_stretch + item) * kStretchInputs + first_input(lane);
      square_sums[i] = 0.0f;
      if (item < count && input < matrix.inputs) {
        load_activations<kHasNorm>(values[i], arguments, 0, input, square_sums[i]);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) values[i][j] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void quantize(const SharedMemory<1>& shared, const Work& work,
                                           int first_stretch, int start, int count, int lane) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int item = start + i * kWarps;
      if (item >= count) break;
      store_stretch<1>(shared.stretch(item), to_fixed_point<kGroupSize>(values[i]), 0, lane);
      if (kHasNorm) {
        const float square_sum = lanes_sum<kWarpSize>(square_sums[i]);
        if (lane == 0) shared.square_sums(work)[first_stretch + item] = square_sum;
      }
    }
  }
};

// Warp t turns the sums of squares of token t, [stretches][kTokens], into 1 / rms.
template <int kTokens>
__device__ __forceinline__ void finish_norm(const SharedMemory<kTokens>& shared,
                                            const float* square_sums, int num_stretches,
                                            int inputs, float eps, int warp, int lane) {
  if (warp >= kTokens) return;
  float sum = 0.0f;
#pragma unroll 1
  for (int i = lane; i < num_stretches; i += kWarpSize) sum += square_sums[i * kTokens + warp];
  sum = lanes_sum<kWarpSize>(sum);
  if (lane == 0) shared.inverse_rms()[warp] = rsqrtf(sum / static_cast<float>(inputs) + eps);
}

}  // namespace

#endif
