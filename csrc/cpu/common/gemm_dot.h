// The products of gemm_bf16.h on AVX-512 dot products of pairs (vdpbf16ps): twice the multiply-adds
// of float32 per instruction. 8 x 32 of C stay in registers: 16 sums hide the latency, and a row's
// pair is broadcast for two of them. Sums of a call start at 0 and are then added to C.
#pragma once

#include "gemm_bf16.h"

#ifdef __AVX512BF16__

namespace mllama::MLLAMA_ISA {

struct DotGemm : Bf16Panels {
  struct Session {};  // what a thread holds while it multiplies
  static constexpr int kRowsPerStep = 8;

  // rows is a multiple of 8, depth of 32; columns of C past n may be written, up to a panel's
  // width. accumulate: C += A * B.
  static void multiply(const BF16* a, int64_t lda, const Packed& b, int64_t rows, int64_t n,
                       int64_t depth, float* c, int64_t ldc, bool accumulate) {
    const BF16* packed = b.data;
    for (int64_t panel = 0; panel < n; panel += kPanel) {
      const int64_t tiles = min<int64_t>(2, (b.columns - panel + 15) / 16);
      for (int64_t r = 0; r < rows; r += kRowsPerStep) {
        if (tiles == 2) {
          step<2>(a + r * lda, lda, packed, depth, c + r * ldc + panel, ldc, accumulate);
        } else {
          step<1>(a + r * lda, lda, packed, depth, c + r * ldc + panel, ldc, accumulate);
        }
      }
      packed += tiles * 16 * padded_depth(b.depth);
    }
  }

 private:
  template <int kTiles>
  static void step(const BF16* a, int64_t lda, const BF16* b, int64_t depth, float* c, int64_t ldc,
                   bool accumulate) {
    __m512 sums[kRowsPerStep][kTiles] = {};
    for (int64_t k = 0; k < depth; k += 32) {
      for (int64_t pair = 0; pair < 32; pair += 2) {
        __m512bh columns[kTiles];
#pragma GCC unroll 2
        for (int t = 0; t < kTiles; ++t) {
          columns[t] = (__m512bh)_mm512_loadu_si512(b + (k * kTiles + t * 32 + pair) * 16);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRowsPerStep; ++r) {
          int32_t both;
          memcpy(&both, a + r * lda + k + pair, sizeof(both));
          const __m512bh row = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 2
          for (int t = 0; t < kTiles; ++t) {
            sums[r][t] = _mm512_dpbf16_ps(sums[r][t], columns[t], row);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRowsPerStep; ++r) {
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) {
        float* place = c + r * ldc + t * 16;
        const __m512 sum = sums[r][t];
        _mm512_storeu_ps(place, accumulate ? _mm512_add_ps(_mm512_loadu_ps(place), sum) : sum);
      }
    }
  }
};

}  // namespace mllama::MLLAMA_ISA

#endif  // __AVX512BF16__
