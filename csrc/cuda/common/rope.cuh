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

// Rotates pairs (x, y) by angles with cosine c and sine s, rounding both products and their sum to
// T, as a chain of PyTorch operators does.
__device__ __forceinline__ void rotate_pairs(float& x, float& y, float c, float s) {
  const float xc = __fmul_rn(x, c), ys = __fmul_rn(y, s);
  const float yc = __fmul_rn(y, c), xs = __fmul_rn(x, s);
  x = __fsub_rn(xc, ys);
  y = __fadd_rn(yc, xs);
}

// 16 bits: two pairs at a time, in instructions that round to 16 bits. The bits are those of
// float32 arithmetic rounded afterwards: its 24 bits are enough for the second rounding to be
// harmless, 2 p + 2 for p of 8 and 11 (Figueroa 1995).
template <typename T2>
__device__ __forceinline__ void rotate_pairs(T2& x, T2& y, T2 c, T2 s) {
  const T2 xc = __hmul2_rn(x, c), ys = __hmul2_rn(y, s);
  const T2 yc = __hmul2_rn(y, c), xs = __hmul2_rn(x, s);
  x = __hsub2_rn(xc, ys);
  y = __hadd2_rn(yc, xs);
}

// What holds the elements that rotate_pairs takes at once.
template <typename T>
struct RopePairs {
  using Type = T;
};
template <>
struct RopePairs<__half> {
  using Type = __half2;
};
template <>
struct RopePairs<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};

// x = (a.x, b.x), y = (a.y, b.y); its own inverse.
template <typename T2>
__device__ __forceinline__ void transpose_pairs(T2& a, T2& b) {
  const T2 x(a.x, b.x), y(a.y, b.y);
  a = x;
  b = y;
}

// Rotates one chunk in place; cos and sin hold the chunk's angles.
template <typename T>
__device__ __forceinline__ void rotate_chunk(Vec<T>& first, Vec<T>& second, const Vec<T>& cos,
                                             const Vec<T>& sin, bool interleaved) {
  using Pairs = typename RopePairs<T>::Type;
  constexpr int kCount = 16 / sizeof(Pairs), kHalf = kCount / 2;
  Pairs* const a = reinterpret_cast<Pairs*>(&first);
  Pairs* const b = reinterpret_cast<Pairs*>(&second);
  const Pairs* const c = reinterpret_cast<const Pairs*>(&cos);
  const Pairs* const s = reinterpret_cast<const Pairs*>(&sin);
  if (interleaved) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      if constexpr (sizeof(T) == 2) {
        transpose_pairs(a[2 * i], a[2 * i + 1]);
        transpose_pairs(b[2 * i], b[2 * i + 1]);
      }
      rotate_pairs(a[2 * i], a[2 * i + 1], c[i], s[i]);
      rotate_pairs(b[2 * i], b[2 * i + 1], c[kHalf + i], s[kHalf + i]);
      if constexpr (sizeof(T) == 2) {
        transpose_pairs(a[2 * i], a[2 * i + 1]);
        transpose_pairs(b[2 * i], b[2 * i + 1]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) rotate_pairs(a[i], b[i], c[i], s[i]);
  }
}

}  // namespace mllama
