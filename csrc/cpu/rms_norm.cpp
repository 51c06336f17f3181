// rms_norm and add_rms_norm. Zhang, Sennrich 2019 (arXiv 1910.07467)
//
// Threads    rows; a row's second pass hits the L1 cache, and fetches the next row to L2.
// Precision  squares in float32 (float64 for float64), added 32 vectors at a time; these sums in
//            float64.
// Traffic    x, y; with a residual also residual and residual_out: each once.
// Aliasing   y may be x, residual_out may be residual or x.
#include "../rms_norm.h"

#include "common/dtypes.h"
#include "common/rows.h"
#include "common/scratch.h"
#include "common/stores.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

template <typename T, typename Stores>
void run(const RmsNormParams& p, Stores stores) {
  const T* weight = static_cast<const T*>(p.weight);
  const Scalar<T> gate = p.gate ? tanh_gate<T>(p.gate) : Scalar<T>{};
  const auto row_of = [&](const void* rows, int64_t outer_stride, int64_t inner_stride,
                          int64_t row) {
    return static_cast<const T*>(rows) + row / p.inner * outer_stride +
           row % p.inner * inner_stride;
  };
  const auto x_row = [&](int64_t row) {
    return row_of(p.x, p.x_outer_stride, p.x_inner_stride, row);
  };
  const auto residual_row = [&](int64_t row) {
    return row_of(p.residual, p.residual_outer_stride, p.residual_inner_stride, row);
  };
  parallel_for(0, p.outer * p.inner, row_grain(p.dim), [&](int64_t begin, int64_t end) {
    Scratch scratch;
    // What is read again is not written past the cache.
    T* kept = Stores::kPastCache && p.residual ? scratch.take<T>(p.dim) : nullptr;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t next = min(row + 1, end - 1);
      const T *x = x_row(row), *next_x = x_row(next), *next_residual = nullptr;
      T* y = static_cast<T*>(p.y) + row * p.dim;
      T* total = nullptr;
      if (p.residual) {
        next_residual = residual_row(next);
        total = static_cast<T*>(p.residual_out) + row * p.dim;
        T* sum = kept ? kept : total;
        const bool visible = !p.row_mask || p.row_mask[row];
        if (p.gate) {
          gated_residual_row(x, residual_row(row), gate, visible, sum, p.dim, ThroughCache{});
        } else {
          add_row(x, residual_row(row), visible, sum, p.dim);
        }
        x = sum;
      }
      normalize_row(x, weight, p.dim, p.eps, [&](int64_t i, auto part, Vec<T> v, Vec<T> normed) {
        __builtin_prefetch(next_x + i, 0, 2);
        if (next_residual) __builtin_prefetch(next_residual + i, 0, 2);
        if (kept) stores.store(total + i, v, part);
        stores.store(y + i, normed, part);
      });
    }
    stores.finish();
  });
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  if (p.outer * p.inner * p.dim == 0) return;
  const int64_t rows = p.outer * p.inner, row_bytes = p.dim * element_size(p.dtype);
  with_stores(past_cache(rows, row_bytes, p.y, p.residual_out), [&](auto stores) {
    with_dtype(p.dtype, [&]<typename T>(Type<T>) { run<T>(p, stores); });
  });
}

}  // namespace mllama::MLLAMA_ISA
