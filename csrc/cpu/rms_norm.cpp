// rms_norm and add_rms_norm. Zhang, Sennrich 2019 (arXiv 1910.07467)
//
// Threads    rows; a row's second pass hits the L1 cache.
// Precision  squares and sum in float32 (float64 for float64).
// Traffic    x, y; with a residual also residual and residual_out: each once.
// Aliasing   y may be x, residual_out may be residual or x.
#include "../rms_norm.h"

#include "dtypes.h"
#include "kernels.h"
#include "rows.h"

namespace mllama::MLLAMA_ISA {
namespace {

template <typename T>
void run(const RmsNormParams& p) {
  const T* weight = static_cast<const T*>(p.weight);
  const Scalar<T> gate = p.gate ? tanh_gate<T>(p.gate) : Scalar<T>{};
  parallel_for(0, p.outer * p.inner, row_grain(p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t outer = row / p.inner, inner = row % p.inner;
      const T* x = static_cast<const T*>(p.x) + outer * p.x_outer_stride + inner * p.x_inner_stride;
      T* y = static_cast<T*>(p.y) + row * p.dim;
      if (p.residual) {
        const T* residual = static_cast<const T*>(p.residual) + outer * p.residual_outer_stride +
                            inner * p.residual_inner_stride;
        T* total = static_cast<T*>(p.residual_out) + row * p.dim;
        const bool visible = !p.row_mask || p.row_mask[row];
        if (p.gate) {
          gated_residual_row(x, residual, gate, visible, total, p.dim);
        } else {
          add_row(x, residual, visible, total, p.dim);
        }
        x = total;
      }
      rms_norm_row(x, weight, y, p.dim, p.eps);
    }
  });
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  if (p.outer * p.inner * p.dim == 0) return;
  with_dtype(p.dtype, [&]<typename T>(Type<T>) { run<T>(p); });
}

}  // namespace mllama::MLLAMA_ISA
