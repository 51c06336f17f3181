// linear_cross_entropy: a chunk of classes' logits to their gradient, in place.
// Threads    rows.
// Traffic    logits read once and written once.
#include "cross_entropy.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

template <typename T>
void run_row(const LinearCrossEntropyBackwardParams& p, int64_t row) {
  using S = Scalar<T>;
  const int64_t label = p.labels[row];
  T* logits = static_cast<T*>(p.logits) + row * p.logits_row_stride;
  if (ignores(p.terms, label)) {
    memset(logits, 0, p.classes * sizeof(T));
    return;
  }
  const S maximum = static_cast<const S*>(p.maximum)[row], sum = static_cast<const S*>(p.sum)[row];
  const S factor = static_cast<const S*>(p.grad_loss)[row];
  const LogitGradient<T> gradient(p.terms, maximum, (double)sum, (double)factor);
  gradient.replace(logits, p.classes, label - p.first_class);
}

}  // namespace

void linear_cross_entropy_backward(const LinearCrossEntropyBackwardParams& p) {
  with_dtype(p.dtype, [&]<typename T>(Type<T>) {
    parallel_for(0, p.rows, row_grain(p.classes), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) run_row<T>(p, row);
    });
  });
}

}  // namespace mllama::MLLAMA_ISA
