// What the two kernels of linear_cross_entropy share: exponentials, and the gradient of a row's
// cross entropy by its logits,
//   exp(x - lse) * (1 + 2 z_loss lse) - label_smoothing / vocab - (1 - label_smoothing) [x is the
//   label's], times a factor.
#pragma once

#include <cmath>
#include <type_traits>

#include "../../linear_cross_entropy.h"
#include "../common/ptx.cuh"
#include "../common/vec_math.cuh"

namespace mllama {

__device__ __forceinline__ bool ignores(const CrossEntropyTerms& terms, int64_t label) {
  return label == terms.ignore_index || label == terms.masked_token;
}

// exp(x - shift). 16-bit elements: one FFMA and the approximate power of 2, whose error of 2^-19 at
// worst (|shift| below 90) is far below the rounding of the logits.
template <typename T>
struct ShiftedExp {
  static constexpr bool kExact = std::is_same_v<T, float>;
  static constexpr float kLog2E = 1.4426950408889634f;
  float shift;

  __device__ __forceinline__ explicit ShiftedExp(float by) : shift(kExact ? by : by * kLog2E) {}
  __device__ __forceinline__ float operator()(float x) const {
    return kExact ? expf(x - shift) : exp2_approx(fmaf(x, kLog2E, -shift));
  }
};

template <typename T>
struct LogitGradient {
  ShiftedExp<T> exponential;
  float scale, smoothing, target;

  // sum of exp(x - maximum) over the row
  __device__ __forceinline__ LogitGradient(const CrossEntropyTerms& terms, float maximum, float sum,
                                           float factor)
      : exponential(maximum),
        scale(fmaf(2 * static_cast<float>(terms.z_loss), maximum + logf(sum), 1.0f) / sum * factor),
        smoothing(static_cast<float>(terms.label_smoothing) / static_cast<float>(terms.vocab) *
                  factor),
        target(static_cast<float>(1 - terms.label_smoothing) * factor) {}

  __device__ __forceinline__ float operator()(float x) const {
    return fmaf(exponential(x), scale, -smoothing);
  }

  // Of the elements from `first` on; `label` is the label's element, wherever it lies.
  __device__ __forceinline__ Vec<T> operator()(const Vec<T>& logits, int64_t first,
                                               int64_t label) const {
    Vec<T> gradient = map_f32(logits, *this);
    if (label >= first && label < first + Vec<T>::kSize) {
#pragma unroll
      for (int i = 0; i < Vec<T>::kSize; ++i) {
        if (first + i == label) {
          gradient.data[i] = from_f32<T>((*this)(to_f32(logits.data[i])) - target);
        }
      }
    }
    return gradient;
  }
};

}  // namespace mllama
