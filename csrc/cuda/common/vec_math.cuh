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

// f32(x, y) of float32 elements, pairs(x, y) of pairs of others.
template <typename T, typename F32, typename Pairs>
__device__ __forceinline__ Vec<T> combine(const Vec<T>& a, const Vec<T>& b, const F32& f32,
                                          const Pairs& pairs) {
  Vec<T> result;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      result.data[i] = f32(a.data[i], b.data[i]);
    } else {
      const uint32_t x = pair_word(a, i), y = pair_word(b, i);
      const Pair<T> xy =
          pairs(*reinterpret_cast<const Pair<T>*>(&x), *reinterpret_cast<const Pair<T>*>(&y));
      pair_word(result, i) = *reinterpret_cast<const uint32_t*>(&xy);
    }
  }
  return result;
}

template <typename T>
__device__ __forceinline__ Vec<T> multiply(const Vec<T>& a, const Vec<T>& b) {
  return combine(
      a, b, [](float x, float y) { return __fmul_rn(x, y); },
      [](Pair<T> x, Pair<T> y) { return __hmul2_rn(x, y); });
}

template <typename T>
__device__ __forceinline__ Vec<T> add(const Vec<T>& a, const Vec<T>& b) {
  return combine(
      a, b, [](float x, float y) { return __fadd_rn(x, y); },
      [](Pair<T> x, Pair<T> y) { return __hadd2_rn(x, y); });
}

// The elements of a vector's i-th 32-bit word in float32, and back with rounding.
template <typename T>
constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
template <typename T>
__device__ __forceinline__ void unpack_word(const Vec<T>& v, int i, float (&x)[kPerWord<T>]) {
  if constexpr (std::is_same_v<T, float>) {
    x[0] = v.data[i];
  } else {
    const float2 pair = unpack_pair<T>(pair_word(v, i));
    x[0] = pair.x;
    x[1] = pair.y;
  }
}
template <typename T>
__device__ __forceinline__ void pack_word(Vec<T>& v, int i, const float (&x)[kPerWord<T>]) {
  if constexpr (std::is_same_v<T, float>) {
    v.data[i] = x[0];
  } else {
    pair_word(v, i) = pack_pair<T>(x[0], x[1]);
  }
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

}  // namespace mllama
