// What skinny_linear does to a sum: roundings, SwiGLU and the gated residual, as the operators of
// those names do.
#pragma once

#include "../../skinny_linear.h"
#include "../common/silu.cuh"
#include "../common/vec.cuh"

namespace mllama {

// One element of out. The residual is requested where the element is located, long before the sum
// is known.
template <typename T>
struct SkinnyOutput {
  int64_t index = -1;  // negative: none
  float residual = 0.0f;
  bool visible = true;

  SkinnyOutput() = default;
  __device__ __forceinline__ SkinnyOutput(const SkinnyLinearParams& p, int row, int64_t column)
      : index(row * p.n + column) {
    if (p.residual == nullptr) return;
    residual = to_f32(static_cast<const T*>(p.residual)[row * p.residual_row_stride + column]);
    visible = p.row_mask == nullptr || p.row_mask[row];
  }

  // `gate` is tanh of the gate, 1 without. `up` matters with swiglu alone.
  __device__ __forceinline__ void store(const SkinnyLinearParams& p, float gate, float sum,
                                        float up) const {
    float y = round_to<T>(sum);
    if (p.swiglu) y = round_to<T>(round_to<T>(silu<T>(y)) * round_to<T>(up));
    if (p.residual != nullptr) {
      const float product = round_to<T>(__fmul_rn(gate, visible ? y : 0.0f));
      y = __fadd_rn(residual, product);
    }
    static_cast<T*>(p.out)[index] = from_f32<T>(y);
  }
};

template <typename T>
__device__ __forceinline__ float skinny_gate(const SkinnyLinearParams& p) {
  return p.gate == nullptr ? 1.0f : tanh_gate<T>(p.gate);
}

}  // namespace mllama
