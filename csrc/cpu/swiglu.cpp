// swiglu: out = round(gate / (1 + exp(-gate))) * up. Shazeer 2020 (arXiv 2002.05202)
//
// Threads    blocks of columns within rows, so that one row of a decode step uses every thread.
// Traffic    gate_up and out: each once.
#include "../swiglu.h"

#include "common/dtypes.h"
#include "common/rows.h"
#include "common/stores.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

template <typename T, typename Stores>
void run(const SwigluParams& p, Stores stores) {
  for_row_blocks(p.rows, p.dim, stores, [&](int64_t row, int64_t column, int64_t count) {
    const T* gate = static_cast<const T*>(p.gate_up) + row * p.gate_up_row_stride + column;
    const T* up = gate + p.dim;
    T* out = static_cast<T*>(p.out) + row * p.dim + column;
    for_vectors(count, [&](int64_t i, auto part) {
      stores.store(out + i, swiglu_product<T>(load(gate + i, part), load(up + i, part)), part);
    });
  });
}

}  // namespace

void swiglu(const SwigluParams& p) {
  if (p.rows * p.dim == 0) return;
  const int64_t row_bytes = p.dim * element_size(p.dtype);
  with_stores(past_cache(p.rows, row_bytes, p.out), [&](auto stores) {
    with_dtype(p.dtype, [&]<typename T>(Type<T>) { run<T>(p, stores); });
  });
}

}  // namespace mllama::MLLAMA_ISA
