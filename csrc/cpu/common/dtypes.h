// From a run-time dtype to a template argument.
#pragma once

#include "../../common.h"
#include "simd.h"

namespace mllama::MLLAMA_ISA {

template <typename T>
struct Type {};

// f(Type<T>) with T the storage type of dtype.
template <typename F>
MLLAMA_INLINE void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Type<float>{});
    case DType::kFloat16:
      return f(Type<F16>{});
    case DType::kBFloat16:
      return f(Type<BF16>{});
    case DType::kFloat64:
      return f(Type<double>{});
  }
}

// Elements that one task of an elementwise kernel should have at least: below, threads cost more.
constexpr int64_t kGrainElements = 16384;

// f(row, column, count) for blocks of columns within rows, so that one long row uses every thread.
template <typename Stores, typename F>
MLLAMA_INLINE void for_row_blocks(int64_t rows, int64_t dim, Stores stores, const F& f) {
  constexpr int64_t kColumns = 2048;
  const int64_t blocks = ceil_div(dim, kColumns);
  const int64_t grain = max<int64_t>(1, kGrainElements / min(kColumns, dim));
  parallel_for(0, rows * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task % blocks * kColumns;
      f(task / blocks, column, min(kColumns, dim - column));
    }
    stores.finish();
  });
}

MLLAMA_INLINE int64_t row_grain(int64_t dim) {
  return max<int64_t>(1, kGrainElements / max<int64_t>(1, dim));
}

}  // namespace mllama::MLLAMA_ISA
