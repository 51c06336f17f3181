// The last step of a gate's gradient: the partial sums of blocks, added up by one warp in an order
// that depends on their number alone.
#pragma once

#include "reduce.cuh"
#include "vec.cuh"

namespace mllama {

// grad_gate = (1 - tanh(gate)^2) * sum of the partial sums, rounded once. A whole warp calls.
template <typename T>
__device__ __forceinline__ void store_gate_gradient(const double* partials, int count,
                                                    const void* gate, void* grad_gate) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  double sum = 0;
  for (int i = lane; i < count; i += kWarpSize) sum += partials[i];
  sum = warp_sum(sum);
  if (lane == 0) {
    // 1 / cosh^2: 1 - tanh^2 would lose its digits where tanh is near 1.
    const double cosine = cosh(static_cast<double>(to_f32(*static_cast<const T*>(gate))));
    *static_cast<T*>(grad_gate) = from_f32<T>(static_cast<float>(sum / cosine / cosine));
  }
}

}  // namespace mllama
