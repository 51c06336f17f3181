// What follows a product's sum: roundings, SwiGLU and the gated residual, as the operators of those
// names do.
#pragma once

#include "../common/silu.cuh"
#include "../common/vec.cuh"

namespace mllama {

// One element of out. The residual is requested where the element is located, long before the sum
// is known.
template <typename T>
struct LinearOutput {
  int64_t index = -1;  // negative: none
  float residual = 0.0f;
  bool visible = true;

  LinearOutput() = default;
  template <typename Params>
  __device__ __forceinline__ LinearOutput(const Params& p, int row, int64_t column)
      : index(row * p.n + column) {
    if (p.residual == nullptr) return;
    residual = to_f32(static_cast<const T*>(p.residual)[row * p.residual_row_stride + column]);
    visible = p.row_mask == nullptr || p.row_mask[row];
  }

  // `gate` is tanh of the gate, 1 without. `up` matters with swiglu alone.
  template <typename Params>
  __device__ __forceinline__ void store(const Params& p, float gate, float sum, float up) const {
    float y = round_to<T>(sum);
    if (p.swiglu) y = round_to<T>(round_to<T>(silu<T>(y)) * round_to<T>(up));
    if (p.residual != nullptr) {
      const float product = round_to<T>(__fmul_rn(gate, visible ? y : 0.0f));
      y = __fadd_rn(residual, product);
    }
    static_cast<T*>(p.out)[index] = from_f32<T>(y);
  }
};

template <typename T, typename Params>
__device__ __forceinline__ float linear_gate(const Params& p) {
  return p.gate == nullptr ? 1.0f : tanh_gate<T>(p.gate);
}

}  // namespace mllama
