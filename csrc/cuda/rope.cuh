// Rotary position embedding of parts of a row. Su et al. 2021 (arXiv 2104.09864)
#pragma once

#include "vec.cuh"

namespace mllama {

// A row of head_dim elements has head_dim / 2 pairs: (i, i + head_dim / 2) or, interleaved,
// (2 i, 2 i + 1). A chunk is Vec<T>::kSize pairs; they fill two vectors of the row, whose first
// elements are:
template <typename T>
struct RopeChunk {
  int first, second;

  __device__ __forceinline__ RopeChunk(int chunk, int head_dim, bool interleaved)
      : first((interleaved ? 2 : 1) * chunk * Vec<T>::kSize),
        second(interleaved ? first + Vec<T>::kSize : first + head_dim / 2) {}
};

// Rotates one chunk in place; cos and sin hold the chunk's angles. Both products and their sum are
// rounded to T, as a chain of PyTorch operators does.
template <typename T>
__device__ __forceinline__ void rotate_chunk(Vec<T>& first, Vec<T>& second, const Vec<T>& cos,
                                             const Vec<T>& sin, bool interleaved) {
  constexpr int kSize = Vec<T>::kSize;
  const auto rotate = [](T& a, T& b, float c, float s) {
    const float x = to_f32(a), y = to_f32(b);
    a = from_f32<T>(__fsub_rn(round_to<T>(__fmul_rn(x, c)), round_to<T>(__fmul_rn(y, s))));
    b = from_f32<T>(__fadd_rn(round_to<T>(__fmul_rn(y, c)), round_to<T>(__fmul_rn(x, s))));
  };
  if (interleaved) {
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      rotate(first.data[2 * i], first.data[2 * i + 1], to_f32(cos.data[i]), to_f32(sin.data[i]));
      rotate(second.data[2 * i], second.data[2 * i + 1], to_f32(cos.data[kSize / 2 + i]),
             to_f32(sin.data[kSize / 2 + i]));
    }
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      rotate(first.data[i], second.data[i], to_f32(cos.data[i]), to_f32(sin.data[i]));
    }
  }
}

}  // namespace mllama
