// The gradient of a row's cross entropy by its logits:
//   exp(x - lse) * (1 + 2 z_loss lse) - label_smoothing / vocab - (1 - label_smoothing) [x is the
//   label's], times a factor.
#pragma once

#include "../linear_cross_entropy.h"
#include "dtypes.h"
#include "simd.h"

namespace mllama::MLLAMA_ISA {

MLLAMA_INLINE bool ignores(const CrossEntropyTerms& terms, int64_t label) {
  return label == terms.ignore_index || label == terms.masked_token;
}

template <typename T>
struct LogitGradient {
  using S = Scalar<T>;
  S shift, scale, smoothing, target;

  // sum of exp(x - maximum) over the row
  LogitGradient(const CrossEntropyTerms& terms, S maximum, double sum, double factor)
      : shift(maximum),
        scale((S)((1 + 2 * terms.z_loss * ((double)maximum + __builtin_log(sum))) / sum * factor)),
        smoothing((S)(terms.label_smoothing / (double)terms.vocab * factor)),
        target((S)((1 - terms.label_smoothing) * factor)) {}

  // In the place of logits[0 .. count); the label's may lie outside.
  void replace(T* logits, int64_t count, int64_t label) const {
    const bool inside = label >= 0 && label < count;
    // The label's is rounded once, so it waits until the others are stored.
    const S at_label =
        inside ? exp(splat(to_scalar(logits[label]) - shift))[0] * scale - smoothing - target : S{};
    for_vectors(count, [&](int64_t i, auto part) {
      store(logits + i, exp(load(logits + i, part) - shift) * scale - smoothing, part);
    });
    if (inside) logits[label] = from_scalar<T>(at_label);
  }
};

}  // namespace mllama::MLLAMA_ISA
