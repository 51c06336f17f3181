// Gradient of swiglu: with s = sigmoid(gate),
//   grad_up = grad_out * gate * s,   grad_gate = grad_out * up * s * (1 + gate * (1 - s)).
// Threads    as in the forward: blocks of kColumns within rows.
// Precision  float32 (float64 for float64); each result is rounded once.
// Traffic    grad_out and gate_up read, grad_gate_up written, each once.
#include "../swiglu.h"
#include "dtypes.h"
#include "kernels.h"
#include "simd.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int64_t kColumns = 2048;

template <typename T>
void run(const SwigluBackwardParams& p) {
  const int64_t blocks = ceil_div(p.dim, kColumns);
  const int64_t grain = max<int64_t>(1, kGrainElements / min(kColumns, p.dim));
  parallel_for(0, p.rows * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / blocks, column = task % blocks * kColumns;
      const T* gate = static_cast<const T*>(p.gate_up) + row * p.gate_up_row_stride + column;
      const T* grad = static_cast<const T*>(p.grad_out) + row * p.grad_out_row_stride + column;
      T* grad_gate = static_cast<T*>(p.grad_gate_up) + row * 2 * p.dim + column;
      for_vectors(min(kColumns, p.dim - column), [&](int64_t i, auto part) {
        const Vec<T> g = load(gate + i, part), up = load(gate + p.dim + i, part);
        const Vec<T> dy = load(grad + i, part);
        // s and 1 - s from an exponential that cannot overflow.
        const Vec<T> e = exp(g < 0 ? g : -g), larger = (Scalar<T>)1 / (e + (Scalar<T>)1);
        const Vec<T> s = g < 0 ? e * larger : larger, rest = g < 0 ? larger : e * larger;
        store(grad_gate + i, dy * up * (s + s * (g * rest)), part);
        store(grad_gate + p.dim + i, dy * (g * s), part);
      });
    }
  });
}

}  // namespace

void swiglu_backward(const SwigluBackwardParams& p) {
  if (p.rows * p.dim == 0) return;
  with_dtype(p.dtype, [&]<typename T>(Type<T>) { run<T>(p); });
}

}  // namespace mllama::MLLAMA_ISA
