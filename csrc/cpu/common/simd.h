// One SIMD vector per instruction set, conversions of the storage types to it, and exp2.
//
// Everything here is static or lives in the namespace of its instruction set: the file is compiled
// once per set, and a weak symbol shared between sets would let the linker pick code the machine
// cannot run.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#ifndef __clang__
// GCC 12 warns of its own header.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#endif

#ifndef MLLAMA_ISA
#define MLLAMA_ISA generic
#endif

#define MLLAMA_INLINE static inline __attribute__((always_inline))

namespace mllama::MLLAMA_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// Vectors of kLanes elements. Doubles take several registers: float64 is for gradient checks.
typedef float FVec __attribute__((vector_size(kLanes * 4)));
typedef double DVec __attribute__((vector_size(kLanes * 8)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HVec __attribute__((vector_size(kLanes * 2)));

template <typename T>
struct ComputeOf {
  using Scalar = float;
  using Vec = FVec;
};
template <>
struct ComputeOf<double> {
  using Scalar = double;
  using Vec = DVec;
};
template <typename T>
using Scalar = typename ComputeOf<T>::Scalar;
template <typename T>
using Vec = typename ComputeOf<T>::Vec;

template <typename A>
MLLAMA_INLINE A min(A a, A b) {
  return b < a ? b : a;
}
template <typename A>
MLLAMA_INLINE A max(A a, A b) {
  return a < b ? b : a;
}

// Not a sum with zero, which would keep the compiler from broadcasting out of memory.
MLLAMA_INLINE FVec splat(float x) {
#if defined(__AVX512F__)
  return (FVec)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (FVec)_mm256_set1_ps(x);
#else
  return FVec{x, x, x, x};
#endif
}
MLLAMA_INLINE DVec splat(double x) {
  DVec v;
  for (int i = 0; i < kLanes; ++i) v[i] = x;
  return v;
}

// ---- float16 and bfloat16 <-> float32, round to nearest even ----

MLLAMA_INLINE FVec widen(HVec bits, BF16*) {
#if defined(__AVX512F__)
  return (FVec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#elif defined(__AVX2__)
  return (FVec)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
  return (FVec)(__builtin_convertvector(bits, UVec) << 16);
#endif
}

// The upper half of each element is the rounded value.
MLLAMA_INLINE UVec round_bits(FVec x, BF16*) {
  const UVec u = (UVec)x;
  return x == x ? u + 0x7fff + ((u >> 16) & 1) : u | 0x400000;
}

MLLAMA_INLINE HVec narrow(FVec x, BF16* type) {
  const UVec bits = round_bits(x, type) >> 16;
#if defined(__AVX512F__)
  return (HVec)_mm512_cvtepi32_epi16((__m512i)bits);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
  return (HVec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(bits, HVec);
#endif
}

MLLAMA_INLINE FVec widen(HVec bits, F16*) {
#if defined(__AVX512F__)
  return (FVec)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__)
  return (FVec)_mm256_cvtph_ps((__m128i)bits);
#else
  const UVec u = __builtin_convertvector(bits, UVec);
  const UVec magnitude = (u & 0x7fff) << 13;
  // A product rebiases the exponent and normalises subnormals; infinities and NaNs get theirs by
  // hand.
  const UVec finite = (UVec)((FVec)magnitude * splat(0x1p112f));
  const UVec special = magnitude | 0x7f800000u;
  return (FVec)((magnitude >= (UVec{} + 0x0f800000u) ? special : finite) | ((u & 0x8000) << 16));
#endif
}

MLLAMA_INLINE HVec narrow(FVec x, F16*) {
#if defined(__AVX512F__)
  return (HVec)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (HVec)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  const UVec u = (UVec)x;
  const UVec sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
  // Subnormal results: adding 0.5 aligns the mantissa to half's last place, with hardware rounding.
  const UVec subnormal = (UVec)((FVec)magnitude + splat(0.5f)) - 0x3f000000u;
  const UVec normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const UVec special = magnitude > (UVec{} + 0x7f800000u) ? (UVec{} + 0x7e00u) : (UVec{} + 0x7c00u);
  UVec bits = magnitude < (UVec{} + 0x38800000u) ? subnormal : normal;
  bits = magnitude >= (UVec{} + 0x477ff000u) ? special : bits;
  return __builtin_convertvector(bits | sign, HVec);
#endif
}

// ---- loads and stores: a whole vector, or its first n elements (the rest reads as zero) ----

struct Whole {};
struct First {
  int64_t n;
};

template <typename V, typename T>
MLLAMA_INLINE V load_bits(const T* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

MLLAMA_INLINE FVec load(const float* p) { return load_bits<FVec>(p); }
MLLAMA_INLINE DVec load(const double* p) { return load_bits<DVec>(p); }
template <typename T>
MLLAMA_INLINE FVec load(const T* p) {
  return widen(load_bits<HVec>(p), (T*)nullptr);
}

MLLAMA_INLINE void store(float* p, FVec v) { memcpy(p, &v, sizeof(v)); }
MLLAMA_INLINE void store(double* p, DVec v) { memcpy(p, &v, sizeof(v)); }
template <typename T>
MLLAMA_INLINE void store(T* p, FVec v) {
  const HVec bits = narrow(v, (T*)nullptr);
  memcpy(p, &bits, sizeof(bits));
}

template <typename T>
MLLAMA_INLINE Vec<T> load(const T* p, Whole) {
  return load(p);
}
template <typename T>
MLLAMA_INLINE Vec<T> load(const T* p, First first) {
  T tail[kLanes] = {};
  for (int64_t i = 0; i < first.n; ++i) tail[i] = p[i];
  return load(tail);
}
template <typename T>
MLLAMA_INLINE void store(T* p, Vec<T> v, Whole) {
  store(p, v);
}
template <typename T>
MLLAMA_INLINE void store(T* p, Vec<T> v, First first) {
  T tail[kLanes];
  store(tail, v);
  for (int64_t i = 0; i < first.n; ++i) p[i] = tail[i];
}

// x in the elements that the part covers, zero elsewhere.
template <typename S>
MLLAMA_INLINE auto splat_part(S x, Whole) {
  return splat(x);
}
template <typename S>
MLLAMA_INLINE auto splat_part(S x, First first) {
  decltype(splat(x)) v = {};
  for (int64_t i = 0; i < first.n; ++i) v[i] = x;
  return v;
}

// f(offset, Whole or First) for each vector of dim elements.
template <typename F>
MLLAMA_INLINE void for_vectors(int64_t dim, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) f(i, Whole{});
  if (i < dim) f(i, First{dim - i});
}

// The value after a round trip through T.
MLLAMA_INLINE FVec round_to(FVec v, float*) { return v; }
MLLAMA_INLINE DVec round_to(DVec v, double*) { return v; }
MLLAMA_INLINE FVec round_to(FVec v, BF16* type) {
  return (FVec)(round_bits(v, type) & 0xffff0000u);
}
MLLAMA_INLINE FVec round_to(FVec v, F16* type) { return widen(narrow(v, type), type); }
template <typename T>
MLLAMA_INLINE Vec<T> round_to(Vec<T> v) {
  return round_to(v, (T*)nullptr);
}

template <typename T>
MLLAMA_INLINE Scalar<T> to_scalar(T x) {
  return load(&x, First{1})[0];
}
template <typename T>
MLLAMA_INLINE T from_scalar(Scalar<T> x) {
  T out;
  store(&out, splat(x), First{1});
  return out;
}
template <typename T>
MLLAMA_INLINE Scalar<T> round_scalar(Scalar<T> x) {
  return to_scalar(from_scalar<T>(x));
}

// ---- reductions, in an order that depends on nothing but kLanes ----

template <typename V>
MLLAMA_INLINE auto sum_lanes(V v) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  }
  return v[0];
}
#if defined(__AVX512F__)
MLLAMA_INLINE float sum_lanes(FVec v) { return _mm512_reduce_add_ps((__m512)v); }
#endif

// The sum of each of kLanes vectors.
template <typename V>
MLLAMA_INLINE V sum_each(const V (&v)[kLanes]) {
  V sums;
  for (int i = 0; i < kLanes; ++i) sums[i] = sum_lanes(v[i]);
  return sums;
}
#if defined(__AVX512F__)
// Halves of pairs are added, then quarters, eighths and sixteenths: 15 sums in place of 64.
MLLAMA_INLINE FVec sum_each(const FVec (&v)[kLanes]) {
  __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const int low = i % 4 + i / 4 * 8;
    const __m512 x = (__m512)v[low], y = (__m512)v[low + 4];
    a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88),
                         _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    c[i] = _mm512_add_ps(_mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0x44),
                         _mm512_shuffle_ps(b[2 * i], b[2 * i + 1], 0xee));
  }
  return (FVec)_mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88),
                             _mm512_shuffle_ps(c[0], c[1], 0xdd));
}
#endif

template <typename V>
MLLAMA_INLINE auto max_lanes(V v) {
  auto best = v[0];
  for (int i = 1; i < kLanes; ++i) best = best < v[i] ? v[i] : best;
  return best;
}
#if defined(__AVX512F__)
MLLAMA_INLINE float max_lanes(FVec v) { return _mm512_reduce_max_ps((__m512)v); }
#endif

template <typename V>
MLLAMA_INLINE V max_vec(V a, V b) {
  return a < b ? b : a;
}
#if defined(__AVX512F__)
MLLAMA_INLINE FVec max_vec(FVec a, FVec b) { return (FVec)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
MLLAMA_INLINE FVec max_vec(FVec a, FVec b) { return (FVec)_mm256_max_ps((__m256)a, (__m256)b); }
#endif

// To [-bound, bound]; NaN passes.
MLLAMA_INLINE FVec clamp(FVec x, float bound) {
#if defined(__AVX512F__)
  const __m512 above = _mm512_max_ps(_mm512_set1_ps(-bound), (__m512)x);  // of a NaN: the second
  return (FVec)_mm512_min_ps(_mm512_set1_ps(bound), above);
#elif defined(__AVX2__)
  const __m256 above = _mm256_max_ps(_mm256_set1_ps(-bound), (__m256)x);
  return (FVec)_mm256_min_ps(_mm256_set1_ps(bound), above);
#else
  x = x < -bound ? splat(-bound) : x;
  return x > bound ? splat(bound) : x;
#endif
}

// ---- exp2 and exp, about 1 ulp; infinities, zeros, subnormals and NaN come out right ----

// 2^r for |r| <= 0.5: minimax polynomial, relative error 1.3e-8 before rounding.
MLLAMA_INLINE FVec exp2_fraction(FVec r) {
  FVec p = splat(1.5353362e-4f);
  p = p * r + 1.3398874e-3f;
  p = p * r + 9.6184373e-3f;
  p = p * r + 5.5503324e-2f;
  p = p * r + 2.4022648e-1f;
  p = p * r + 6.9314720e-1f;
  return p * r + 1.0f;
}

#if defined(__AVX512F__)
MLLAMA_INLINE FVec round_nearest(FVec x) {
  return (FVec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MLLAMA_INLINE FVec scale_by_power(FVec x, FVec n) {
  return (FVec)_mm512_scalef_ps((__m512)x, (__m512)n);
}
#else
MLLAMA_INLINE FVec round_nearest(FVec x) {
  const FVec magic = splat(12582912.0f);  // 1.5 * 2^23: the sum's last place is 1
  return (x + magic) - magic;
}
// In two steps, so that neither factor leaves the exponent range before the product does.
MLLAMA_INLINE FVec scale_by_power(FVec x, FVec n) {
  const IVec whole = __builtin_convertvector(n, IVec), half = whole >> 1;
  const FVec first = (FVec)((half + 127) << 23), second = (FVec)((whole - half + 127) << 23);
  return x * first * second;
}
#endif

MLLAMA_INLINE FVec exp2(FVec x) {
  x = clamp(x, 160.0f);
  const FVec n = round_nearest(x);
  return scale_by_power(exp2_fraction(x - n), n);
}
MLLAMA_INLINE DVec exp2(DVec x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

MLLAMA_INLINE FVec exp(FVec x) {
  x = clamp(x, 110.0f);
  const FVec n = round_nearest(x * 1.44269504f);
  // n * 0.693359375 is exact: the constant has 10 bits.
  const FVec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  return scale_by_power(exp2_fraction(r * 1.44269504f), n);
}
MLLAMA_INLINE DVec exp(DVec x) {
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

}  // namespace mllama::MLLAMA_ISA
