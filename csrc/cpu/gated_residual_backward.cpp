// Gradient of gated_residual: grad_x = tanh(gate) * row_mask * grad_out, and
//   grad_gate = (1 - tanh(gate)^2) * sum over visible rows of grad_out * x.
// That of the residual is grad_out.
// Threads    blocks of rows, as many for any number of threads, each with a partial sum of its own.
// Precision  grad_x rounded once; the sum in float64, for 16-bit types from row to row.
// Traffic    grad_out, x, grad_x: each once; hidden rows of the inputs are not read.
#include "../gated_residual.h"
#include "common/dtypes.h"
#include "common/rows.h"
#include "common/stores.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

template <typename T, typename Stores>
void run(const GatedResidualBackwardParams& p, Stores stores) {
  const Scalar<T> gate = tanh_gate<T>(p.gate);
  const int64_t blocks = min(p.rows, kGatePartials);
  const int64_t grain = blocks ? max<int64_t>(1, row_grain(p.dim) * blocks / p.rows) : 1;
  parallel_for(0, blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      DVec sum = {};
      const int64_t end = p.rows * (block + 1) / blocks;
      for (int64_t row = p.rows * block / blocks; row < end; ++row) {
        const bool visible = !p.row_mask || p.row_mask[row];
        const T* grad = static_cast<const T*>(p.grad_out) + row * p.grad_out_row_stride;
        const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
        T* grad_x = static_cast<T*>(p.grad_x) + row * p.dim;
        if (!visible) {
          memset(grad_x, 0, p.dim * sizeof(T));
          continue;
        }
        Vec<Partial<T>> row_sum = {};
        for_vectors(p.dim, [&](int64_t i, auto part) {
          const Vec<T> g = load(grad + i, part);
          stores.store(grad_x + i, g * gate, part);
          row_sum += __builtin_convertvector(g, Vec<Partial<T>>) *
                     __builtin_convertvector(load(x + i, part), Vec<Partial<T>>);
        });
        add(sum, row_sum);
      }
      p.gate_partials[block] = sum_lanes(sum);
    }
    stores.finish();
  });
  store_gate_gradient<T>(p.gate_partials, blocks, p.gate, p.grad_gate);
}

}  // namespace

void gated_residual_backward(const GatedResidualBackwardParams& p) {
  const int64_t row_bytes = p.dim * element_size(p.dtype);
  with_stores(past_cache(p.rows, row_bytes, p.grad_x), [&](auto stores) {
    with_dtype(p.dtype, [&]<typename T>(Type<T>) { run<T>(p, stores); });
  });
}

}  // namespace mllama::MLLAMA_ISA
