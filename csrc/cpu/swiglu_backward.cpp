// Gradient of swiglu: with s = sigmoid(gate),
//   grad_up = grad_out * gate * s,   grad_gate = grad_out * up * s * (1 + gate * (1 - s)).
// Threads    as in the forward: blocks of columns within rows.
// Precision  float32 (float64 for float64); each result is rounded once.
// Traffic    grad_out and gate_up read, grad_gate_up written, each once.
#include "../swiglu.h"
#include "common/dtypes.h"
#include "common/simd.h"
#include "common/stores.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

template <typename T, typename Stores>
void run(const SwigluBackwardParams& p, Stores stores) {
  for_row_blocks(p.rows, p.dim, stores, [&](int64_t row, int64_t column, int64_t count) {
    const T* gate = static_cast<const T*>(p.gate_up) + row * p.gate_up_row_stride + column;
    const T* grad = static_cast<const T*>(p.grad_out) + row * p.grad_out_row_stride + column;
    T* grad_gate = static_cast<T*>(p.grad_gate_up) + row * 2 * p.dim + column;
    for_vectors(count, [&](int64_t i, auto part) {
      const Vec<T> g = load(gate + i, part), up = load(gate + p.dim + i, part);
      const Vec<T> dy = load(grad + i, part);
      // s and 1 - s from an exponential that cannot overflow.
      const Vec<T> e = exp(g < 0 ? g : -g), larger = (Scalar<T>)1 / (e + (Scalar<T>)1);
      const Vec<T> s = g < 0 ? e * larger : larger, rest = g < 0 ? larger : e * larger;
      stores.store(grad_gate + i, dy * up * (s + s * (g * rest)), part);
      stores.store(grad_gate + p.dim + i, dy * (g * s), part);
    });
  });
}

}  // namespace

void swiglu_backward(const SwigluBackwardParams& p) {
  if (p.rows * p.dim == 0) return;
  const int64_t row_bytes = p.dim * element_size(p.dtype);
  with_stores(past_cache(2 * p.rows, row_bytes, p.grad_gate_up), [&](auto stores) {
    with_dtype(p.dtype, [&]<typename T>(Type<T>) { run<T>(p, stores); });
  });
}

}  // namespace mllama::MLLAMA_ISA
