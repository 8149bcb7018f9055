// RMSNorm of the residual stream, in front of the matrix products of a prompt.
//
//   out[t,k] = fp16(x[t,k] * weight[k] / sqrt(mean_k(x[t]^2) + eps))
//
//   out fp16 [num_tokens][hidden_size]; x fp32 [num_tokens][hidden_size]; weight fp16 [hidden_size]
// Launch: grid num_tokens, block 256. hidden_size % 4 == 0.
// Bound by DRAM: 6 * num_tokens * hidden_size bytes.
// Checked against reference/linear.py rms_norm, relative error 5e-4 (rounding to fp16).

#include "common.cuh"

namespace {

constexpr int kThreads = 256;

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    rms_norm_f16(fp16* out, const float* x, const fp16* weight, int32_t hidden_size, float eps) {
  __shared__ float warp_sums[kThreads / kWarpSize];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * hidden_size;
  const float4* const values = reinterpret_cast<const float4*>(x + row);
  const uint2* const weights = reinterpret_cast<const uint2*>(weight);
  uint2* const results = reinterpret_cast<uint2*>(out + row);
  const int num_quads = hidden_size / 4;
  let_dependents_launch();
  wait_for_inputs();
  float sum = 0.0f;
#pragma unroll 4
  for (int i = threadIdx.x; i < num_quads; i += kThreads) {
    const float4 v = values[i];
    sum += v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w);
  }
  sum = lanes_sum<kWarpSize>(sum);
  if (threadIdx.x % kWarpSize == 0) warp_sums[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarpSize; ++warp) sum += warp_sums[warp];
  const float factor = rsqrtf(sum / static_cast<float>(hidden_size) + eps);
#pragma unroll 4
  for (int i = threadIdx.x; i < num_quads; i += kThreads) {
    const float4 v = values[i];
    const uint2 w = weights[i];
    results[i] = uint2{pack_fp16(v.x * factor * low_to_float(w.x), v.y * factor * high_to_float(w.x)),
                       pack_fp16(v.z * factor * low_to_float(w.y), v.w * factor * high_to_float(w.y))};
  }
}
