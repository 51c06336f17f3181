// RMSNorm as rms_norm, its gradient and all kernels that fuse it compute it, to the same bits: y =
// weight * round(x * rstd), rstd = 1 / sqrt(mean(x^2) + eps).
//
// Order      The squares of a 16-byte vector, counted from the start of the row, are added in the
//            order of its elements, in float32 for 16-bit types; the sums of vectors in float64,
//            where no order shows, whoever has which vectors of a row: float64 adds those of 4096
//            elements exactly where the smallest is at least a millionth of the largest. Where it
//            is not, and for float32 rows, another order may change the last of 53 bits, and with
//            it a float32 once in some 10^8 rows.
// Rounding   The mean and 1 / sqrt once each, in float32 for 16-bit types; for float32 in float64,
//            whose result is rounded. An approximate rsqrt may be off by two units in the last
//            place, which a whole row shares.
#pragma once

#include "vec_math.cuh"

namespace mllama {

template <typename T>
__device__ __forceinline__ double sum_of_squares(const Vec<T>& v) {
  Statistic<T> sum = 0;
  const auto take = [&sum](Statistic<T> x) { sum = fma(x, x, sum); };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      take(v.data[i]);
    } else {
      const float2 x = unpack_pair<T>(pair_word(v, i));
      take(x.x);
      take(x.y);
    }
  }
  return sum;
}

template <typename T, typename Dim>
__device__ __forceinline__ float inverse_rms(double sum_of_squares, Dim dim, double eps) {
  using S = Statistic<T>;
  const S square = static_cast<S>(sum_of_squares) / static_cast<S>(dim) + static_cast<S>(eps);
  if constexpr (std::is_same_v<S, float>) return __frsqrt_rn(square);
  return static_cast<float>(rsqrt(square));
}

template <typename T>
__device__ __forceinline__ Vec<T> normalize(const Vec<T>& v, const Vec<T>& weight, float rstd) {
  return multiply(map_f32(v, [rstd](float x) { return __fmul_rn(x, rstd); }), weight);
}

// All of it for a row of `dim` elements that eight lanes hold, zeros behind its end; all lanes of
// the warp call it.
template <typename T, int kVecs>
__device__ __forceinline__ void normalize_row(Vec<T> (&v)[kVecs], const Vec<T> (&weight)[kVecs],
                                              int dim, double eps) {
  double sum = 0;
#pragma unroll
  for (int c = 0; c < kVecs; ++c) sum += sum_of_squares(v[c]);
  const float rstd = inverse_rms<T>(warp_sum<8>(sum), dim, eps);
#pragma unroll
  for (int c = 0; c < kVecs; ++c) v[c] = normalize(v[c], weight[c], rstd);
}

}  // namespace mllama
