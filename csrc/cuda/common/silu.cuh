// silu(x) = x / (1 + exp(-x)) and its sigmoid in float32, for a result that is then rounded to T.
#pragma once

#include <type_traits>

#include "ptx.cuh"

namespace mllama {

// float32: full-precision exponential and division. 16 bits: the approximate ones, whose relative
// error of 2^-19 where the result does not underflow in float16, 2^-16 at worst (x near -88,
// bfloat16), is far below the rounding to T. They take a third of the instructions, which would
// otherwise fill most of the issue slots that a memory-bound kernel has per element.
template <typename T>
__device__ __forceinline__ float silu(float x) {
  if constexpr (std::is_same_v<T, float>) return x / (1.0f + expf(-x));
  constexpr float kLog2E = 1.4426950408889634f;
  return x * reciprocal_approx(1.0f + exp2_approx(-kLog2E * x));
}

// (sigmoid(x), 1 - sigmoid(x)), both to full relative precision: the exponential cannot overflow.
template <typename T>
__device__ __forceinline__ float2 sigmoid_pair(float x) {
  constexpr float kLog2E = 1.4426950408889634f;
  constexpr bool kExact = std::is_same_v<T, float>;
  const float e = kExact ? expf(-fabsf(x)) : exp2_approx(-kLog2E * fabsf(x));
  const float larger = kExact ? 1.0f / (1.0f + e) : reciprocal_approx(1.0f + e);
  return x < 0 ? make_float2(e * larger, larger) : make_float2(larger, e * larger);
}

}  // namespace mllama
