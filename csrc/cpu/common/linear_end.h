// What stands behind a linear layer's product: bias, SwiGLU, gate and residual.
#pragma once

#include "rows.h"

namespace mllama::MLLAMA_ISA {

template <typename T>
class LinearEnd {
  using S = Scalar<T>;

 public:
  // Of the params of skinny_linear or quantized_linear.
  template <typename Params>
  explicit LinearEnd(const Params& p, const void* bias = nullptr)
      : bias_(static_cast<const T*>(bias)),
        residual_(static_cast<const T*>(p.residual)),
        row_mask_(p.row_mask),
        out_(static_cast<T*>(p.out)),
        n_(p.n),
        residual_row_stride_(p.residual_row_stride),
        gated_(p.gate != nullptr),
        gate_(gated_ ? tanh_gate<T>(p.gate) : S{}) {}

  // Columns first, ... of a row of out, from their sums; up: of n columns further on, for SwiGLU.
  void finish(int64_t row, int64_t first, int64_t columns, const S* y, const S* up) const {
    const bool visible = !row_mask_ || row_mask_[row];
    const T* residual = residual_ ? residual_ + row * residual_row_stride_ + first : nullptr;
    T* out = out_ + row * n_ + first;
    const auto rounded = [&](const S* sums, int64_t bias, int64_t i, auto part) {
      const Vec<T> sum = load(sums + i);
      return round_to<T>(bias_ ? sum + load(bias_ + bias + i, part) : sum);
    };
    for_vectors(columns, [&](int64_t i, auto part) {
      Vec<T> value = rounded(y, first, i, part);
      if (up) value = round_to<T>(swiglu_product<T>(value, rounded(up, n_ + first, i, part)));
      if (gated_) {
        value = gated_sum<T>(value, load(residual + i, part), gate_, visible);
      } else if (residual) {
        value += load(residual + i, part);
      }
      store(out + i, value, part);
    });
  }

 private:
  const T *bias_, *residual_;
  const bool* row_mask_;
  T* out_;
  const int64_t n_, residual_row_stride_;
  const bool gated_;
  const S gate_;
};

}  // namespace mllama::MLLAMA_ISA
