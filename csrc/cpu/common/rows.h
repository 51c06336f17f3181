// Row arithmetic that several ops share; each step rounds to the storage type as plain PyTorch
// does.
#pragma once

#include "simd.h"
#include "stores.h"

namespace mllama::MLLAMA_ISA {

MLLAMA_INLINE void add(FVec& sum, FVec v) { sum += v; }
MLLAMA_INLINE void add(DVec& sum, FVec v) { sum += __builtin_convertvector(v, DVec); }
MLLAMA_INLINE void add(DVec& sum, DVec v) { sum += v; }

// 1 / sqrt(mean(x^2) + eps) of a row in storage type T. Sums of 32 vectors, then their sum in
// float64: four chains hide the latency of the add, short ones keep the rounding error small, which
// the whole row would share.
template <typename T>
MLLAMA_INLINE double inverse_rms(const T* x, int64_t dim, double eps) {
  DVec total = {};
  int64_t i = 0;
  for (; i + 32 * kLanes <= dim; i += 32 * kLanes) {
    Vec<T> sums[4] = {};
    for (int j = 0; j < 32; ++j) {
      const Vec<T> v = load(x + i + j * kLanes);
      sums[j % 4] += v * v;
    }
    add(total, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  Vec<T> rest = {};
  for_vectors(dim - i, [&](int64_t offset, auto part) {
    const Vec<T> v = load(x + i + offset, part);
    rest += v * v;
  });
  add(total, rest);
  return 1 / __builtin_sqrt(sum_lanes(total) / (double)dim + eps);
}

// each(offset, part, x, y) for the vectors of a row and of y = weight * round(x / rms).
template <typename T, typename F>
MLLAMA_INLINE void normalize_row(const T* x, const T* weight, int64_t dim, double eps,
                                 const F& each) {
  // The factor in two parts: all elements of the row would share its rounding error.
  const double factor = inverse_rms(x, dim, eps);
  const Scalar<T> high = (Scalar<T>)factor, low = (Scalar<T>)(factor - (double)high);
  for_vectors(dim, [&](int64_t i, auto part) {
    const Vec<T> v = load(x + i, part);
    each(i, part, v, round_to<T>(v * high + v * low) * load(weight + i, part));
  });
}

// y = weight * round(x / rms). y may be x.
template <typename T>
MLLAMA_INLINE void rms_norm_row(const T* x, const T* weight, T* y, int64_t dim, double eps) {
  normalize_row(x, weight, dim, eps,
                [&](int64_t i, auto part, Vec<T>, Vec<T> normed) { store(y + i, normed, part); });
}

// silu(gate) * up, for the caller to round.
template <typename T>
MLLAMA_INLINE Vec<T> swiglu_product(Vec<T> gate, Vec<T> up) {
  return round_to<T>(gate / (exp(-gate) + (Scalar<T>)1)) * up;
}

// residual + gate * x; visible false: residual + gate * 0.
template <typename T>
MLLAMA_INLINE Vec<T> gated_sum(Vec<T> x, Vec<T> residual, Scalar<T> gate, bool visible) {
  return residual + round_to<T>((visible ? x : Vec<T>{}) * gate);
}

template <typename T, typename Stores>
MLLAMA_INLINE void gated_residual_row(const T* x, const T* residual, Scalar<T> gate, bool visible,
                                      T* out, int64_t dim, Stores stores) {
  for_vectors(dim, [&](int64_t i, auto part) {
    const Vec<T> value = visible ? load(x + i, part) : Vec<T>{};
    stores.store(out + i, gated_sum<T>(value, load(residual + i, part), gate, visible), part);
  });
}

template <typename T>
MLLAMA_INLINE void add_row(const T* x, const T* residual, bool visible, T* out, int64_t dim) {
  for_vectors(dim, [&](int64_t i, auto part) {
    const Vec<T> value = visible ? load(x + i, part) : Vec<T>{};
    store(out + i, load(residual + i, part) + value, part);
  });
}

// tanh of the one-element tensor gate, rounded.
template <typename T>
MLLAMA_INLINE Scalar<T> tanh_gate(const void* gate) {
  // In double: the whole tensor shares the factor's error.
  return round_scalar<T>(
      (Scalar<T>)__builtin_tanh((double)to_scalar(*static_cast<const T*>(gate))));
}

// What sums over the rows of T are kept in.
template <typename T>
struct PartialOf {
  using Type = double;
};
template <>
struct PartialOf<BF16> {
  using Type = float;
};
template <>
struct PartialOf<F16> {
  using Type = float;
};
template <typename T>
using Partial = typename PartialOf<T>::Type;

// (1 - tanh(gate)^2) times the sum of the partial sums, in their order, rounded.
template <typename T>
MLLAMA_INLINE void store_gate_gradient(const double* partials, int64_t count, const void* gate,
                                       void* grad_gate) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += partials[i];
  // 1 / cosh^2: 1 - tanh^2 would lose its digits where tanh is near 1.
  const double cosine = __builtin_cosh((double)to_scalar(*static_cast<const T*>(gate)));
  *static_cast<T*>(grad_gate) = from_scalar<T>((Scalar<T>)(sum / cosine / cosine));
}

}  // namespace mllama::MLLAMA_ISA
