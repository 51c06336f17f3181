// The gradient of a row's cross entropy by its logits:
//   exp(x - lse) * (1 + 2 z_loss lse) - label_smoothing / vocab - (1 - label_smoothing) [x is the
//   label's], times a factor.
#pragma once

#include "../linear_cross_entropy.h"
#include "common/dtypes.h"
#include "common/simd.h"

namespace mllama::MLLAMA_ISA {

MLLAMA_INLINE bool ignores(const CrossEntropyTerms& terms, int64_t label) {
  return label == terms.ignore_index || label == terms.masked_token;
}

template <typename T>
struct LogitGradient {
  using S = Scalar<T>;
  S shift, scale, smoothing;
  double label_scale, label_target;

  // sum of exp(x - maximum) over the row
  LogitGradient(const CrossEntropyTerms& terms, S maximum, double sum, double factor)
      : shift(maximum),
        smoothing((S)(terms.label_smoothing / (double)terms.vocab * factor)),
        label_scale((1 + 2 * terms.z_loss * ((double)maximum + __builtin_log(sum))) / sum * factor),
        label_target((1 - terms.label_smoothing + terms.label_smoothing / (double)terms.vocab) *
                     factor) {
    scale = (S)label_scale;
  }

  // In the place of logits[0 .. count); the label's may lie outside.
  void replace(T* logits, int64_t count, int64_t label) const {
    const bool inside = label >= 0 && label < count;
    // The label's waits until the others are stored. Where it is all but certain, what is left of
    // the difference is far below the rounding of its terms, so that is taken in double.
    const S at_label =
        inside ? (S)((double)exp(splat(to_scalar(logits[label]) - shift))[0] * label_scale -
                     label_target)
               : S{};
    for_vectors(count, [&](int64_t i, auto part) {
      store(logits + i, exp(load(logits + i, part) - shift) * scale - smoothing, part);
    });
    if (inside) logits[label] = from_scalar<T>(at_label);
  }
};

}  // namespace mllama::MLLAMA_ISA
