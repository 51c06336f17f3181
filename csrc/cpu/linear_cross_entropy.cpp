// linear_cross_entropy: a chunk of logits, once the library has made them, to losses and gradient.
// Threads    rows. Largest logit, sum of exponentials, gradient: three passes over a row that
//            stays in the L2 cache (vocabulary 128256 in 16 bits: 257 KB).
// Precision  runs of 64 vectors are summed in the compute type, runs in double.
// Traffic    logits read once and written once.
#include "../linear_cross_entropy.h"

#include "cross_entropy.h"
#include "ops.h"

namespace mllama::MLLAMA_ISA {
namespace {

// v with `value` in the lanes behind the row's end.
template <typename V, typename S>
MLLAMA_INLINE V fill_behind(V v, S, Whole) {
  return v;
}
template <typename V, typename S>
MLLAMA_INLINE V fill_behind(V v, S value, First first) {
  for (int64_t i = first.n; i < kLanes; ++i) v[i] = value;
  return v;
}

template <typename T>
MLLAMA_INLINE Scalar<T> largest(const T* logits, int64_t vocab) {
  const Scalar<T> least = -(Scalar<T>)__builtin_inf();
  Vec<T> best = splat(least);
  for_vectors(vocab, [&](int64_t i, auto part) {
    best = max_vec(fill_behind(load(logits + i, part), least, part), best);
  });
  return max_lanes(best);
}

// The sum of f over the row's vectors.
template <typename T, typename F>
MLLAMA_INLINE double sum_of(const T* logits, int64_t vocab, const F& f) {
  constexpr int64_t kRun = 64 * kLanes;
  double total = 0;
  for (int64_t begin = 0; begin < vocab; begin += kRun) {
    Vec<T> sum = {};
    for_vectors(min(kRun, vocab - begin), [&](int64_t i, auto part) {
      sum += fill_behind(f(load(logits + begin + i, part)), (Scalar<T>)0, part);
    });
    total += (double)sum_lanes(sum);
  }
  return total;
}

template <typename T>
void run_row(const LinearCrossEntropyParams& p, int64_t row) {
  using S = Scalar<T>;
  const CrossEntropyTerms& terms = p.terms;
  const int64_t label = p.labels[row], vocab = terms.vocab;
  T* logits = static_cast<T*>(p.logits) + row * p.logits_row_stride;
  S& loss = static_cast<S*>(p.loss)[row];
  S &maximum = static_cast<S*>(p.maximum)[row], &sum_out = static_cast<S*>(p.sum)[row];
  if (ignores(terms, label)) {
    loss = maximum = sum_out = 0;
    if (p.with_grad) memset(logits, 0, vocab * sizeof(T));
    return;
  }
  maximum = largest(logits, vocab);
  const S shift = maximum;
  const double sum = sum_of<T>(logits, vocab, [=](Vec<T> x) { return exp(x - shift); });
  const double lse = (double)maximum + __builtin_log(sum);
  double mean = 0;
  if (terms.label_smoothing != 0) {
    mean = sum_of<T>(logits, vocab, [](Vec<T> x) { return x; }) / (double)vocab;
  }
  loss = (S)(lse - (1 - terms.label_smoothing) * (double)to_scalar(logits[label]) -
             terms.label_smoothing * mean + terms.z_loss * lse * lse);
  sum_out = (S)sum;
  if (p.with_grad) {
    const LogitGradient<T> gradient(terms, shift, sum, 1);
    gradient.replace(logits, vocab, label);
  }
}

}  // namespace

void linear_cross_entropy(const LinearCrossEntropyParams& p) {
  with_dtype(p.dtype, [&]<typename T>(Type<T>) {
    parallel_for(0, p.rows, row_grain(p.terms.vocab), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) run_row<T>(p, row);
    });
  });
}

}  // namespace mllama::MLLAMA_ISA
