// swiglu: out = round(gate / (1 + exp(-gate))) * up.                    Shazeer 2020 (arXiv
// 2002.05202) Threads    blocks of kColumns within rows, so that one row of a decode step uses
// every thread. Traffic    gate_up and out: each once.
#include "../swiglu.h"

#include "dtypes.h"
#include "kernels.h"
#include "rows.h"

namespace mllama::MLLAMA_ISA {
namespace {

constexpr int64_t kColumns = 2048;

template <typename T>
void run(const SwigluParams& p) {
  const int64_t blocks = ceil_div(p.dim, kColumns);
  const int64_t grain = max<int64_t>(1, kGrainElements / min(kColumns, p.dim));
  parallel_for(0, p.rows * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / blocks, column = task % blocks * kColumns;
      const T* gate = static_cast<const T*>(p.gate_up) + row * p.gate_up_row_stride + column;
      const T* up = gate + p.dim;
      T* out = static_cast<T*>(p.out) + row * p.dim + column;
      for_vectors(min(kColumns, p.dim - column), [&](int64_t i, auto part) {
        store(out + i, swiglu_product<T>(load(gate + i, part), load(up + i, part)), part);
      });
    }
  });
}

}  // namespace

void swiglu(const SwigluParams& p) {
  if (p.rows * p.dim == 0) return;
  with_dtype(p.dtype, [&]<typename T>(Type<T>) { run<T>(p); });
}

}  // namespace mllama::MLLAMA_ISA
