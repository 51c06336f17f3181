// Sums and maxima over elements, lanes, warps and blocks. The order of additions depends on the
// number of threads alone, so a row's result does not depend on the grid.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace mllama {

constexpr int kWarpSize = 32;

// What sums over a row of T are kept in. A float32 result would show the order of float32
// additions.
template <typename T>
using Statistic = std::conditional_t<std::is_same_v<T, float>, double, float>;

// Sum over aligned groups of kLanes lanes; every lane gets it. All 32 lanes must call.
template <int kLanes = kWarpSize, typename T>
__device__ __forceinline__ T warp_sum(T x) {
  static_assert(kLanes > 0 && kLanes <= kWarpSize && (kLanes & (kLanes - 1)) == 0);
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, offset);
  }
  return x;
}

template <int kLanes = kWarpSize>
__device__ __forceinline__ float warp_max(float x) {
  static_assert(kLanes > 0 && kLanes <= kWarpSize && (kLanes & (kLanes - 1)) == 0);
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
}

// Adds a . b to `sum`; `lost` carries what rounding took from it (Kahan 1965). The rounding of a
// long plain sum would be the largest error of a float32 score.
__device__ __forceinline__ void add_dot(float& sum, float& lost, const float4& a, const float4& b) {
  const float dot = fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, a.x * b.x)));
  const float corrected = dot - lost;
  const float total = sum + corrected;
  lost = (total - sum) - corrected;
  sum = total;
}

// Sum over a one-dimensional block of whole warps; every thread gets it. To be called once per
// kernel: a second call would overwrite the partial sums while slower warps still read them.
template <typename T>
__device__ __forceinline__ T block_sum_once(T x) {
  __shared__ T warp_sums[kWarpSize];
  x = warp_sum(x);
  if (threadIdx.x % kWarpSize == 0) warp_sums[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  T total = 0;
  for (unsigned w = 0; w < blockDim.x / kWarpSize; ++w) total += warp_sums[w];
  return total;
}

}  // namespace mllama
