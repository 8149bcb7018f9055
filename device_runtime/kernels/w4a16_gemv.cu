// y = W x for one token, W in 4-bit codes: the linear layers of a decode step at batch 1.
//
//   w4a16_gemv_norm       out[m]      = fp16(sum_k w[k,m] n[k] + bias[m])
//   w4a16_gemv_norm_silu  out[i]      = fp16(silu(y[2i]) * y[2i+1]),  y[m] = sum_k w[k,m] n[k]
//   w4a16_gemv_add        residual[m] = residual[m] + sum_k w[k,m] x[k] + bias[m]
//   n[k] = residual[k] * norm_weight[k] / sqrt(mean(residual^2) + eps)
//   w[k,m] = (q[k,m] - z[k div group_size, m]) * s[k div group_size, m], never rounded
//
//   out [outputs] or [outputs / 2] fp16, residual [inputs] (read) or [outputs] (updated) fp32,
//   x [inputs] fp16, norm_weight [inputs] fp16, bias [outputs] fp16 or null,
//   codes uint32 [inputs * outputs / 8] and scales_zeros uint32 [inputs / group_size][outputs] as in
//   package_format/SPEC.md.
// Launch: grid min(outputs / 32, number of SMs), block kThreads, dynamic shared memory as
// table.py's w4a16_gemv_shared_bytes. inputs % 32 == outputs % 32 == inputs % group_size == 0;
// group_size 128, 64 or 32.
// Bound by DRAM: inputs * outputs * (1/2 + 4 / group_size) bytes.
// Checked against reference.py w4a16_gemv, relative error 1e-3.
//
// A block owns whole tiles of 32 outputs; its warps take the units of 128 inputs in turn and keep
// kStages of them in flight through a private ring in shared memory, across the tiles and, with
// programmatic dependent launch, from before the previous kernel has finished. Sums across warps
// are added in a fixed order.

#include "activations.cuh"

namespace {

#ifndef TURBOJET_GEMV_WARPS
#define TURBOJET_GEMV_WARPS 8
#endif
#ifndef TURBOJET_GEMV_STAGES
#define TURBOJET_GEMV_STAGES 4
#endif
#ifndef TURBOJET_GEMV_BLOCKS
#define TURBOJET_GEMV_BLOCKS 2
#endif

constexpr int kWarps = TURBOJET_GEMV_WARPS;
constexpr int kStages = TURBOJET_GEMV_STAGES;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBlocksPerSm = TURBOJET_GEMV_BLOCKS;

enum class Output { kHalf, kSilu, kAdd };

struct Arguments {
  fp16* out;                // kHalf, kSilu
  float* residual;          // kAdd: updated; else: read
  const fp16* x;            // kAdd
  const fp16* norm_weight;  // kHalf, kSilu
  const fp16* bias;         // null, or [outputs]
  float eps;
};

template <int kGroupSize, Output kOutput>
__device__ __forceinline__ void run(const QuantizedMatrix& matrix, const Arguments& arguments) {
  constexpr int kGroups = kUnitInputs / kGroupSize;
  constexpr bool kHasNorm = kOutput != Output::kAdd;
  uint4* const shared = dynamic_shared<uint4>();
  const int warp = threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize;
  const int units = (matrix.inputs + kUnitInputs - 1) / kUnitInputs;
  const int tiles = matrix.outputs / kTileOutputs;

  char* const ring = reinterpret_cast<char*>(shared) + warp * kStages * kUnitBytes<kGroupSize>;
  uint4* const chunks = shared + kWarps * kStages * kUnitBytes<kGroupSize> / 16;
  float* const x_scales = reinterpret_cast<float*>(chunks + units * (kActivationBytes<1> / 16));
  int* const negated_sums = reinterpret_cast<int*>(x_scales + units);
  float* const partial = reinterpret_cast<float*>(negated_sums + units * kGroups);
  float* const square_sums = partial + 2 * kWarps * kTileOutputs;

  let_dependents_launch();
  // A warp beyond the last unit only helps to add up.
  int to_copy = warp < units ? (tiles - static_cast<int>(blockIdx.x) + gridDim.x - 1) / gridDim.x *
                                   ((units - warp + kWarps - 1) / kWarps)
                             : 0;
  UnitStream<kGroupSize> stream;
  stream.seek(matrix, blockIdx.x, warp, lane);
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (to_copy > 0) {
      stream.copy_async(ring + stage * kUnitBytes<kGroupSize>, matrix, lane);
      stream.advance(matrix, units, warp, kWarps, lane);
      --to_copy;
    }
    commit_copies();
  }
  wait_for_inputs();

  // Each warp quantizes the activations of its own units; no other warp reads them.
  float square_sum = 0.0f;
#pragma unroll 1
  for (int unit = warp; unit < units; unit += kWarps) {
    const int input = unit * kUnitInputs + first_input(lane);
    float values[4] = {};
    if (input < matrix.inputs) {
      if (kHasNorm) {
        const float2 a = *reinterpret_cast<const float2*>(arguments.residual + input);
        const float2 b = *reinterpret_cast<const float2*>(arguments.residual + input + 8);
        const uint32_t wa = *reinterpret_cast<const uint32_t*>(arguments.norm_weight + input);
        const uint32_t wb = *reinterpret_cast<const uint32_t*>(arguments.norm_weight + input + 8);
        square_sum += a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y;
        values[0] = a.x * low_to_float(wa);
        values[1] = b.x * low_to_float(wb);
        values[2] = a.y * high_to_float(wa);
        values[3] = b.y * high_to_float(wb);
      } else {
        const uint32_t a = *reinterpret_cast<const uint32_t*>(arguments.x + input);
        const uint32_t b = *reinterpret_cast<const uint32_t*>(arguments.x + input + 8);
        values[0] = low_to_float(a);
        values[1] = low_to_float(b);
        values[2] = high_to_float(a);
        values[3] = high_to_float(b);
      }
    }
    const FixedPoint fixed = to_fixed_point<kGroupSize>(values);
    uint32_t* const words = reinterpret_cast<uint32_t*>(chunks + unit * (kActivationBytes<1> / 16));
    // Chunk (pair of tiles, column, t), word (tile of the pair, k16).
    const int word = lane / 16 * 32 + lane % 4 * 4 + lane / 8 % 2 * 2 + lane / 4 % 2;
    words[word] = fixed.high;
    words[word + 16] = fixed.low;
    if (lane == 0) x_scales[unit] = fixed.scale;
    if (lane % (kGroupSize / 4) == 0)
      negated_sums[unit * kGroups + lane / (kGroupSize / 4)] = fixed.negated_sum;
  }
  if (kHasNorm) {
    square_sum = lanes_sum<kWarpSize>(square_sum);
    if (lane == 0) square_sums[warp] = square_sum;
  }
  __syncwarp();

  int slot = 0;
  int refill = (kStages - 1) * kUnitBytes<kGroupSize>;
  int turn = 0;
#pragma unroll 1
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, ++turn) {
    float y[1][4] = {};
#pragma unroll 1
    for (int unit = warp; unit < units; unit += kWarps) {
      wait_copies<kStages - 2>();
      __syncwarp();
      // Every lane has read the slot of the last turn: fill it again.
      if (to_copy > 0) {
        stream.copy_async(ring + refill, matrix, lane);
        stream.advance(matrix, units, warp, kWarps, lane);
        --to_copy;
      }
      commit_copies();
      const UnitActivations activations{chunks + unit * (kActivationBytes<1> / 16),
                                        x_scales + unit, negated_sums + unit * kGroups};
      add_unit<1, kGroupSize>(y, ring + slot, activations, lane);
      refill = slot;
      slot += kUnitBytes<kGroupSize>;
      if (slot == kStages * kUnitBytes<kGroupSize>) slot = 0;
    }

    // Partial sums are double buffered: one barrier a tile.
    float* const sums = partial + turn % 2 * kWarps * kTileOutputs;
    if (lane % 4 == 0) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[warp * kTileOutputs + lane / 4 + 8 * i] = y[0][i] * row_scale(i);
    }
    __syncthreads();
    if (warp == turn % kWarps) {
      float total = 0.0f;
#pragma unroll
      for (int other = 0; other < kWarps; ++other) total += sums[other * kTileOutputs + lane];
      const int output = tile * kTileOutputs + lane;
      if (kHasNorm) {
        const float squares = lanes_sum<kWarpSize>(lane < kWarps ? square_sums[lane] : 0.0f);
        total *= rsqrtf(squares / static_cast<float>(matrix.inputs) + arguments.eps);
      }
      if (arguments.bias != nullptr) total += to_float(arguments.bias[output]);
      if (kOutput == Output::kHalf) arguments.out[output] = to_fp16(total);
      if (kOutput == Output::kAdd) arguments.residual[output] += total;
      if (kOutput == Output::kSilu) {
        const float up = __shfl_down_sync(kFullMask, total, 1);
        const float activated = total / (1.0f + __expf(-total)) * up;
        if (lane % 2 == 0) arguments.out[output / 2] = to_fp16(activated);
      }
    }
  }
}

template <Output kOutput>
__device__ __forceinline__ void run_group_size(const QuantizedMatrix& matrix, int32_t group_size,
                                               const Arguments& arguments) {
  if (group_size == 128)
    run<128, kOutput>(matrix, arguments);
  else if (group_size == 64)
    run<64, kOutput>(matrix, arguments);
  else
    run<32, kOutput>(matrix, arguments);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    w4a16_gemv_norm(fp16* out, const float* residual, const fp16* norm_weight, const fp16* bias,
                    const uint4* codes, const uint32_t* scales_zeros, int32_t inputs,
                    int32_t outputs, int32_t group_size, float eps) {
  run_group_size<Output::kHalf>(
      QuantizedMatrix{codes, scales_zeros, inputs, outputs}, group_size,
      Arguments{out, const_cast<float*>(residual), nullptr, norm_weight, bias, eps});
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    w4a16_gemv_norm_silu(fp16* out, const float* residual, const fp16* norm_weight,
                         const uint4* codes, const uint32_t* scales_zeros, int32_t inputs,
                         int32_t outputs, int32_t group_size, float eps) {
  run_group_size<Output::kSilu>(
      QuantizedMatrix{codes, scales_zeros, inputs, outputs}, group_size,
      Arguments{out, const_cast<float*>(residual), nullptr, norm_weight, nullptr, eps});
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    w4a16_gemv_add(float* residual, const fp16* x, const fp16* bias, const uint4* codes,
                   const uint32_t* scales_zeros, int32_t inputs, int32_t outputs,
                   int32_t group_size) {
  run_group_size<Output::kAdd>(QuantizedMatrix{codes, scales_zeros, inputs, outputs}, group_size,
                               Arguments{nullptr, residual, x, nullptr, bias, 0.0f});
}
