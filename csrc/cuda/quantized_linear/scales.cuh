// Arithmetic of scales and zeros, for weight.cuh.
#pragma once

#include "decode.cuh"

namespace mllama {

// What is subtracted from codes that decode to zero at `zero`: that if it is one of the codes,
// else the half between the codes beside it. `rest` is what `whole` leaves of it, times `factor`.
__device__ __forceinline__ float whole_zero(float zero) {
  constexpr float kOnes = 0x1.8p23f;  // a number whose last place is 1
  return fminf(fmaxf(__fadd_rn(zero, kOnes) - kOnes, 0.0f), 15.0f);
}

__device__ __forceinline__ float doubled_zero(float whole, float rest, float factor) {
  const uint32_t sign = (__float_as_uint(rest) ^ __float_as_uint(factor)) & 0x80000000u;
  return fmaf(2.0f, whole, rest == 0.0f ? 0.0f : __uint_as_float(sign | 0x3f800000u));
}

__device__ __forceinline__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float zero_unless_finite(float sum) {
  return fabsf(sum) <= 0x1.fffffep127f ? sum : 0.0f;
}

// Of a scale: a sum times infinity would be one where products of both signs make NaN.
__device__ __forceinline__ float nan_if_infinite(float scale) { return fmaf(scale, 0.0f, scale); }

__device__ __forceinline__ float2 load_half_pair(const uint8_t* address) {
  const float2 pair = load_pair(address);
  return make_float2(nan_if_infinite(pair.x), nan_if_infinite(pair.y));
}

}  // namespace mllama
