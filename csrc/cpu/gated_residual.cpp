// gated_residual: out = residual + round(tanh(gate)) * row_mask * x.
// Threads    rows.
// Traffic    x, residual, out: each once; hidden rows of x are not read.
// Aliasing   out may be x or residual.
#include "../gated_residual.h"

#include "common/dtypes.h"
#include "common/rows.h"
#include "common/stores.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

template <typename T, typename Stores>
void run(const GatedResidualParams& p, Stores stores) {
  const Scalar<T> gate = tanh_gate<T>(p.gate);
  parallel_for(0, p.rows, row_grain(p.dim), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      gated_residual_row(static_cast<const T*>(p.x) + row * p.x_row_stride,
                         static_cast<const T*>(p.residual) + row * p.residual_row_stride, gate,
                         !p.row_mask || p.row_mask[row], static_cast<T*>(p.out) + row * p.dim,
                         p.dim, stores);
    }
    stores.finish();
  });
}

}  // namespace

void gated_residual(const GatedResidualParams& p) {
  if (p.rows * p.dim == 0) return;
  const int64_t row_bytes = p.dim * element_size(p.dtype);
  with_stores(past_cache(p.rows, row_bytes, p.out), [&](auto stores) {
    with_dtype(p.dtype, [&]<typename T>(Type<T>) { run<T>(p, stores); });
  });
}

}  // namespace mllama::MLLAMA_ISA
