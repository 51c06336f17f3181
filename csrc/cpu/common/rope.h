// Rotary embedding of one row, and of its gradient. Pairs are (i, i + half), or (2 i, 2 i + 1).
#pragma once

#include "simd.h"

namespace mllama::MLLAMA_ISA {

// Each product and the sum are rounded to the storage type, as plain PyTorch rounds them.
template <typename T>
void rotate_halves(const T* x, const T* cos, const T* sin, int64_t half, T* out) {
  for_vectors(half, [&](int64_t i, auto part) {
    const Vec<T> a = load(x + i, part), b = load(x + half + i, part);
    const Vec<T> c = load(cos + i, part), s = load(sin + i, part);
    store(out + i, round_to<T>(a * c) - round_to<T>(b * s), part);
    store(out + half + i, round_to<T>(b * c) + round_to<T>(a * s), part);
  });
}

template <typename T>
void rotate_pairs(const T* x, const T* cos, const T* sin, int64_t half, T* out) {
  T split[2 * kLanes], rotated[2 * kLanes];
  for_vectors(half, [&](int64_t i, auto part) {
    const int64_t count = min<int64_t>(kLanes, half - i);
    for (int64_t j = 0; j < count; ++j) {
      split[j] = x[2 * (i + j)];
      split[kLanes + j] = x[2 * (i + j) + 1];
    }
    const Vec<T> a = load(split, part), b = load(split + kLanes, part);
    const Vec<T> c = load(cos + i, part), s = load(sin + i, part);
    store(rotated, round_to<T>(a * c) - round_to<T>(b * s));
    store(rotated + kLanes, round_to<T>(b * c) + round_to<T>(a * s));
    for (int64_t j = 0; j < count; ++j) {
      out[2 * (i + j)] = rotated[j];
      out[2 * (i + j) + 1] = rotated[kLanes + j];
    }
  });
}

// The gradient of x from that of its rotation, times scale: the rotation back, rounded once.
template <typename T>
void unrotate_halves(const Scalar<T>* grad, const T* cos, const T* sin, int64_t half,
                     Scalar<T> scale, T* out) {
  for_vectors(half, [&](int64_t i, auto part) {
    const Vec<T> a = load(grad + i, part) * scale, b = load(grad + half + i, part) * scale;
    const Vec<T> c = load(cos + i, part), s = load(sin + i, part);
    store(out + i, a * c + b * s, part);
    store(out + half + i, b * c - a * s, part);
  });
}

template <typename T>
void unrotate_pairs(const Scalar<T>* grad, const T* cos, const T* sin, int64_t half,
                    Scalar<T> scale, T* out) {
  for (int64_t i = 0; i < half; ++i) {
    const Scalar<T> a = grad[2 * i] * scale, b = grad[2 * i + 1] * scale;
    const Scalar<T> c = to_scalar(cos[i]), s = to_scalar(sin[i]);
    out[2 * i] = from_scalar<T>(a * c + b * s);
    out[2 * i + 1] = from_scalar<T>(b * c - a * s);
  }
}

}  // namespace mllama::MLLAMA_ISA
