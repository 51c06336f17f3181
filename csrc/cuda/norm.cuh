// RMSNorm of a row whose squares have been summed, as rms_norm and all kernels that fuse it compute
// it: y = weight * round(x * inverse_rms). Not rms_norm_backward, which has no registers to spare.
#pragma once

#include "vec_math.cuh"

namespace mllama {

// 1 / sqrt(mean + eps), every operation rounded as IEEE says, in the type of the sum. rsqrt would
// save a few instructions, but may be off by two units in the last place, which a whole row shares.
template <typename S>
__device__ __forceinline__ S inverse_rms(S sum_of_squares, int64_t dim, double eps) {
  return S{1} / sqrt(sum_of_squares / static_cast<S>(dim) + static_cast<S>(eps));
}

template <typename T>
__device__ __forceinline__ Vec<T> normalize(const Vec<T>& v, const Vec<T>& weight, float rstd) {
  return multiply(map_f32(v, [rstd](float x) { return __fmul_rn(x, rstd); }), weight);
}

}  // namespace mllama
