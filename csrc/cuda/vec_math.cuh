// Arithmetic on 16-byte vectors, every result rounded to the element type. 16-bit elements go in
// pairs: the packed instructions of half2 and bfloat162 give the bits of a float32 operation whose
// result is then rounded, because 24 bits are at least 2 * 11 + 2 (Figueroa 1995), at a fifth of
// its instructions. A memory-bound kernel has few to spare: at 4.3 TB/s and 1.755 GHz each of an
// H200's 132 multiprocessors has 110 issue slots per vector that a warp reads or writes, 14 per
// element.
#pragma once

#include "ptx.cuh"
#include "reduce.cuh"
#include "vec.cuh"

namespace mllama {

// The i-th pair of a vector of 16-bit elements.
template <typename T>
__device__ __forceinline__ uint32_t& pair_word(Vec<T>& v, int i) {
  return reinterpret_cast<uint32_t*>(&v)[i];
}
template <typename T>
__device__ __forceinline__ uint32_t pair_word(const Vec<T>& v, int i) {
  return reinterpret_cast<const uint32_t*>(&v)[i];
}

template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack_pair<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <typename T>
__device__ __forceinline__ Vec<T> multiply(const Vec<T>& a, const Vec<T>& b) {
  Vec<T> product;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) product.data[i] = __fmul_rn(a.data[i], b.data[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t x = pair_word(a, i), y = pair_word(b, i);
      const Pair<T> xy =
          __hmul2_rn(*reinterpret_cast<const Pair<T>*>(&x), *reinterpret_cast<const Pair<T>*>(&y));
      pair_word(product, i) = *reinterpret_cast<const uint32_t*>(&xy);
    }
  }
  return product;
}

template <typename T>
__device__ __forceinline__ Vec<T> add(const Vec<T>& a, const Vec<T>& b) {
  Vec<T> sum;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.data[i] = __fadd_rn(a.data[i], b.data[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t x = pair_word(a, i), y = pair_word(b, i);
      const Pair<T> xy =
          __hadd2_rn(*reinterpret_cast<const Pair<T>*>(&x), *reinterpret_cast<const Pair<T>*>(&y));
      pair_word(sum, i) = *reinterpret_cast<const uint32_t*>(&xy);
    }
  }
  return sum;
}

// f(x), in float32 and then rounded, of every element.
template <typename T, typename F>
__device__ __forceinline__ Vec<T> map_f32(const Vec<T>& v, const F& f) {
  Vec<T> result;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) result.data[i] = f(v.data[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack_pair<T>(pair_word(v, i));
      pair_word(result, i) = pack_pair<T>(f(x.x), f(x.y));
    }
  }
  return result;
}

// (x, y) = f(a, b, c), in float32 and then rounded, of every element.
template <typename T, typename F>
__device__ __forceinline__ void map_f32(const Vec<T>& a, const Vec<T>& b, const Vec<T>& c,
                                        Vec<T>& x, Vec<T>& y, const F& f) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 result = f(a.data[i], b.data[i], c.data[i]);
      x.data[i] = result.x;
      y.data[i] = result.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 as = unpack_pair<T>(pair_word(a, i)), bs = unpack_pair<T>(pair_word(b, i)),
                   cs = unpack_pair<T>(pair_word(c, i));
      const float2 first = f(as.x, bs.x, cs.x), second = f(as.y, bs.y, cs.y);
      pair_word(x, i) = pack_pair<T>(first.x, second.x);
      pair_word(y, i) = pack_pair<T>(first.y, second.y);
    }
  }
}

// `value` is one of T's.
template <typename T>
__device__ __forceinline__ Vec<T> filled_vec(float value) {
  return map_f32(zero_vec<T>(), [value](float) { return value; });
}

// In the order of the elements.
template <typename T>
__device__ __forceinline__ Statistic<T> sum_of_squares(const Vec<T>& v) {
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

}  // namespace mllama
