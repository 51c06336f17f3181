// A matrix product by the library, quick on every CPU.
#pragma once

#include "checks.h"

namespace mllama {

// Columns, rows or terms of a product that are in float32 at a time.
constexpr int64_t kPanelElements = int64_t{4} << 20;

inline Tensor narrow(const Tensor& t, int64_t dim, int64_t begin, int64_t count) {
  Tensor whole = t;
  return torch::stable::narrow(whole, dim, begin, count);
}

// The library multiplies bfloat16 by blocks of 32 columns. Where the last block is not whole and
// rows are apart, it reads what lies behind them, and a NaN there times its zero is a NaN.
inline Tensor with_whole_blocks(const Tensor& a) {
  const bool reads_beyond = a.is_cpu() && a.scalar_type() == ScalarType::BFloat16 &&
                            a.size(1) % 32 != 0 && stride(a, 1) == 1 && !a.is_contiguous();
  return reads_beyond ? torch::stable::contiguous(a) : a;
}

// out = a b, in the dtype of all three.
inline void library_product(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(with_whole_blocks(with_packed_vector(a))),
                                    from(with_packed_vector(b)), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the result's handle over
}

// out = a weight^T + bias of a (m, k), weight (n, k) and bias (n,), in the dtype of all, rounded
// once.
inline void library_linear(const Tensor& a, const Tensor& weight, const Tensor& bias,
                           const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(with_whole_blocks(with_packed_vector(a))), from(weight),
                                    from(OptionalTensor(bias)), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::linear", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the result's handle over
}

// Whether PyTorch multiplies matrices of t's dtype by instructions of this CPU; if not, its
// products of 16 bits run at a quarter of float32's rate or less.
inline bool is_multiplied(const Tensor& t) {
  if (!t.is_cpu() || t.element_size() != 2) return true;
  const bool bfloat16 = t.scalar_type() == ScalarType::BFloat16;
  const char* name =
      bfloat16 ? "mkldnn::_is_mkldnn_bf16_supported" : "mkldnn::_is_mkldnn_fp16_supported";
  StableIValue answer = 0;
  const bool answered =
      torch_call_dispatcher(name, "", &answer, TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS;
  return answered && torch::stable::detail::to<bool>(answer);
}

inline Tensor new_float(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

inline Tensor to_float(const Tensor& t) {
  Tensor out = new_float(t, {t.size(0), t.size(1)});
  torch::stable::copy_(out, t);
  return out;
}

// out (m, n) = a (m, k) b (k, n). What a CPU has no 16-bit instructions for goes through float32,
// rounded once, in panels of the longest dimension.
inline void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  if (is_multiplied(a)) return library_product(a, b, out);
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  const auto in_panels = [](int64_t length, int64_t line, auto&& body) {
    const int64_t step = std::max<int64_t>(1, kPanelElements / std::max<int64_t>(1, line));
    for (int64_t i = 0; i < length; i += step) body(i, std::min(step, length - i));
  };
  if (k >= m && k >= n) {
    Tensor sum = new_float(out, {m, n});
    torch::stable::zero_(sum);
    const Tensor part = new_float(out, {m, n});
    in_panels(k, std::max(m, n), [&](int64_t i, int64_t count) {
      library_product(to_float(narrow(a, 1, i, count)), to_float(narrow(b, 0, i, count)), part);
      float* total = sum.mutable_data_ptr<float>();
      const float* term = part.const_data_ptr<float>();
      for (int64_t j = 0; j < m * n; ++j) total[j] += term[j];
    });
    Tensor result = out;
    torch::stable::copy_(result, sum);
    return;
  }
  const bool by_columns = n >= m;
  const Tensor whole = to_float(by_columns ? a : b);
  in_panels(by_columns ? n : m, std::max(k, std::min(m, n)), [&](int64_t i, int64_t count) {
    const Tensor panel = to_float(by_columns ? narrow(b, 1, i, count) : narrow(a, 0, i, count));
    const Tensor part = by_columns ? new_float(out, {m, count}) : new_float(out, {count, n});
    library_product(by_columns ? whole : panel, by_columns ? panel : whole, part);
    Tensor result = narrow(out, by_columns ? 1 : 0, i, count);
    torch::stable::copy_(result, part);
  });
}

}  // namespace mllama
