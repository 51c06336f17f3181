// Matrix products on fused multiply-adds: C (rows, n) = A (rows, depth) * B (depth, n), B packed.
//
// Packed B is a row of panels, each (depth, width) contiguous with width kPanel, or what is left
// rounded up to kLanes in the last one. The micro-kernel keeps kRowsPerStep x kPanel of C in
// registers: 24 of the 32 (12 of 16) vector registers, which hides the latency of the multiply-add
// on two ports. Every element of C is the sum, in order, of chains of kChain additions over depth:
// its bits do not depend on its place in the block, and its rounding error stays that of a blocked
// sum.
#pragma once

#include "simd.h"
#include "transpose.h"

namespace mllama::MLLAMA_ISA {

template <typename S>
struct FmaGemm {
  using Element = S;      // of A and of packed B
  using Accumulator = S;  // of C
  struct Session {};      // what a thread holds while it multiplies
  static constexpr int kRowsPerStep = kLanes == 16 ? 8 : 4;
  static constexpr int kVectors = 3;
  static constexpr int kPanel = kVectors * kLanes;

  static constexpr int64_t kChain = 32;

  // B in packed form; multiply() may take its first rows and columns alone.
  struct Packed {
    const S* data;
    int64_t depth, columns;  // as packed
  };

  static int64_t padded_depth(int64_t depth) { return depth; }
  static int64_t padded_columns(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
  static int64_t packed_elements(int64_t depth, int64_t n) { return depth * padded_columns(n); }

  static Vec<S> exp2(Vec<S> x) { return MLLAMA_ISA::exp2(x); }

  static void store_weights(S* p, Vec<S> low, Vec<S> high) {
    store(p, low);
    store(p + kLanes, high);
  }

  // One row of A, times sign (-1, 0 or 1).
  template <typename T>
  static void load_row(const T* x, int64_t depth, S sign, S* out) {
    for_vectors(depth,
                [&](int64_t d, auto part) { store(out + d, load(x + d, part) * sign, part); });
  }

  // B = the transpose of n rows of length depth: row(j) is column j.
  template <typename T, typename Row>
  static void pack_transposed(const Row& row, int64_t n, int64_t depth, S* out) {
    for (int64_t panel = 0; panel < n; panel += kPanel) {
      const int64_t width = min<int64_t>(kPanel, padded_columns(n - panel));
      for (int64_t j = 0; j < width; j += kLanes) {
        const T* columns[kLanes];
        const int64_t count = min<int64_t>(kLanes, n - panel - j);
        for (int64_t i = 0; i < count; ++i) {
          columns[i] = reinterpret_cast<const T*>(row(panel + j + i));
        }
        pack_columns(columns, count, depth, width, out + j);
      }
      out += width * depth;
    }
  }

  // B = depth rows of length n.
  template <typename T, typename Row>
  static void pack(const Row& row, int64_t depth, int64_t n, S* out) {
    for (int64_t k = 0; k < depth; ++k) {
      const T* x = reinterpret_cast<const T*>(row(k));
      for_vectors(n, [&](int64_t i, auto part) {
        const int64_t panel = i / kPanel * kPanel;
        const int64_t width = min<int64_t>(kPanel, padded_columns(n - panel));
        store(out + panel * depth + k * width + i - panel, load(x + i, part));
      });
    }
  }

  // rows is a multiple of kRowsPerStep; columns of C past n may be written, up to a panel's width.
  // accumulate: C += A * B.
  static void multiply(const S* a, int64_t lda, const Packed& b, int64_t rows, int64_t n,
                       int64_t depth, S* c, int64_t ldc, bool accumulate) {
    const S* packed = b.data;
    for (int64_t panel = 0; panel < n; panel += kPanel) {
      const int64_t width = min<int64_t>(kPanel, padded_columns(b.columns - panel));
      for (int64_t r = 0; r < rows; r += kRowsPerStep) {
        const S* a_rows = a + r * lda;
        S* c_block = c + r * ldc + panel;
        if (width == 3 * kLanes) {
          step<3>(a_rows, lda, packed, depth, c_block, ldc, accumulate);
        } else if (width == 2 * kLanes) {
          step<2>(a_rows, lda, packed, depth, c_block, ldc, accumulate);
        } else {
          step<1>(a_rows, lda, packed, depth, c_block, ldc, accumulate);
        }
      }
      packed += width * b.depth;
    }
  }

 private:
  // One vector's width of a panel; zeros from column `count` on.
  template <typename T>
  static void pack_columns(const T* const* columns, int64_t count, int64_t depth, int64_t width,
                           S* out) {
    for_vectors(depth, [&](int64_t d, auto part) {
      S block[kLanes][kLanes] = {};
      for (int64_t i = 0; i < count; ++i) store(block[i], load(columns[i] + d, part));
      const int64_t rows = min<int64_t>(kLanes, depth - d);
#ifdef __AVX512F__
      if constexpr (sizeof(S) == 4) {
        __m512i vectors[16];
        memcpy(vectors, block, sizeof(block));
        transpose(vectors);
        for (int64_t i = 0; i < rows; ++i) memcpy(out + (d + i) * width, &vectors[i], 64);
        return;
      }
#endif
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < kLanes; ++j) out[(d + i) * width + j] = block[j][i];
      }
    });
  }

  template <int kWidth>
  static void step(const S* a, int64_t lda, const S* b, int64_t depth, S* c, int64_t ldc,
                   bool accumulate) {
    for (int64_t k = 0; k < depth; k += kChain) {
      chain<kWidth>(a + k, lda, b + k * kWidth * kLanes, min<int64_t>(kChain, depth - k), c, ldc,
                    accumulate);
      accumulate = true;
    }
  }

  template <int kWidth>
  static void chain(const S* a, int64_t lda, const S* b, int64_t depth, S* c, int64_t ldc,
                    bool accumulate) {
    Vec<S> sums[kRowsPerStep][kWidth] = {};
    for (int64_t k = 0; k < depth; ++k) {
      Vec<S> columns[kWidth];
#pragma GCC unroll 3
      for (int j = 0; j < kWidth; ++j) columns[j] = load(b + k * kWidth * kLanes + j * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRowsPerStep; ++r) {
        const Vec<S> value = splat(a[r * lda + k]);
#pragma GCC unroll 3
        for (int j = 0; j < kWidth; ++j) sums[r][j] += value * columns[j];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRowsPerStep; ++r) {
#pragma GCC unroll 3
      for (int j = 0; j < kWidth; ++j) {
        S* place = c + r * ldc + j * kLanes;
        store(place, accumulate ? load(place) + sums[r][j] : sums[r][j]);
      }
    }
  }
};

}  // namespace mllama::MLLAMA_ISA
