// Online softmax over blocks of scores (Milakov, Gimelshein 2018, arXiv 1805.02867), with powers
// of 2.
//
// A thread holds kSlots rows, each shared by the four lanes of a quad. `maximum` is the largest
// score so far (16 bits: times scale * log2(e)), equal in the quad; `sum` is this lane's part of
// the sum of weights.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "ptx.cuh"
#include "reduce.cuh"

namespace mllama {

// The scale that turns q k into an exponent of 2; the updates below need it positive.
__host__ __device__ __forceinline__ float softmax_scale_log2(double softmax_scale) {
  return static_cast<float>(softmax_scale * 1.4426950408889634);  // log2(e)
}

// float32 callers get the exact exp2f: the approximation's error would show beside plain float32.
template <typename T>
__device__ __forceinline__ float softmax_exp2(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return exp2f(x);
  } else {
    return exp2_approx(x);
  }
}

// Largest value of a quad of lanes (lanes 4q .. 4q + 3); every lane of it gets it.
__device__ __forceinline__ float quad_max(float x) { return warp_max<4>(x); }
__device__ __forceinline__ float quad_sum(float x) { return warp_sum<4>(x); }

// The natural log of the sum of exp(scale * score), given a row's `maximum` and the total of its
// weights; +infinity for a row that saw nothing, whose weights are then recomputed as 0.
template <typename T>
__device__ __forceinline__ float log_sum_exp(float maximum, float total, float scale_log2) {
  if (total == 0.0f) return INFINITY;
  if constexpr (std::is_same_v<T, float>) {  // one rounding
    constexpr double kLn2 = 0.6931471805599453;
    return static_cast<float>(kLn2 * (static_cast<double>(maximum) * scale_log2) +
                              log(static_cast<double>(total)));
  } else {
    return (maximum + log2f(total)) * 0.693147181f;
  }
}

// kLazy: the maximum follows the largest score only when it lags by more than 2^8. Weights are then
// at most 2^8 instead of 1, and most blocks leave what was summed so far unscaled: factor 1.
template <typename T, int kSlots, bool kLazy = false>
struct OnlineSoftmax {
  // Scaling first makes score and shift one FFMA. float32 scales the difference instead: the
  // rounding of the scale then stays out of large scores, and the largest weight is exactly 1.
  static constexpr bool kScaleFirst = !std::is_same_v<T, float>;
  static_assert(kScaleFirst || !kLazy, "the lag is counted in powers of 2");

  float maximum[kSlots];
  float sum[kSlots];

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      maximum[slot] = -INFINITY;
      sum[slot] = 0.0f;
    }
  }

  // Turns scores into weights in place and gives for each row the factor on everything summed so
  // far. scores[t][n] is the accumulator of an m16n8 tile: elements 0, 1 of slot 2 t, elements 2, 3
  // of 2 t + 1. A row without a score above -inf keeps sum 0 and factor 1: exp2(-inf - -inf) is
  // never formed.
  template <int kTiles>
  __device__ __forceinline__ void update(float (&scores)[kSlots / 2][kTiles][4], float scale_log2,
                                         float (&factor)[kSlots]) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int tile = slot / 2, first = slot % 2 * 2;
      float largest = -INFINITY;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        largest = fmaxf(largest, fmaxf(scores[tile][n][first], scores[tile][n][first + 1]));
      }
      const float previous = maximum[slot];
      maximum[slot] = fmaxf(previous, quad_max(largest) * (kScaleFirst ? scale_log2 : 1.0f));
      if (kLazy && maximum[slot] - previous <= 8.0f) maximum[slot] = previous;
      const float shift = maximum[slot] == -INFINITY ? 0.0f : maximum[slot];
      factor[slot] = previous == maximum[slot]
                         ? 1.0f
                         : softmax_exp2<T>((previous - shift) * (kScaleFirst ? 1.0f : scale_log2));
      float total = 0.0f;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = first; i < first + 2; ++i) {
          float& score = scores[tile][n][i];
          score = softmax_exp2<T>(kScaleFirst ? fmaf(score, scale_log2, -shift)
                                              : (score - shift) * scale_log2);
          total += score;
        }
      }
      sum[slot] = fmaf(sum[slot], factor[slot], total);
    }
  }

  // The row's divisor, the same in the quad; 0 for a row that saw nothing.
  __device__ __forceinline__ float total(int slot) const { return quad_sum(sum[slot]); }
};

}  // namespace mllama
