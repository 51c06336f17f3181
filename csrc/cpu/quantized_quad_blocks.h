// Sums of products of codes and integers on AVX2, for quantized_quads.h: of all rows of a tile,
// that is two vectors, and one row of x or a few of them, so that a line of the weight is used up
// when it has come, and a word of x is loaded once for both vectors.
//
// Codes are split into their even and odd columns and multiplied by 16 bits of x: 6 operations for
// a quad, 4 where they were split before, for other rows of x. Codes of 4 bits and one row take x
// as bytes, 4 operations: products with the upper and the lower ones are added up in 16 bits, and
// widened once a step.
#pragma once

#include "quantized_quad_operands.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#define MLLAMA_QUAD_BLOCKS

namespace mllama::MLLAMA_ISA {

// Not known to the compiler: a sum that it would otherwise add up in an order of its own, with all
// products in memory.
MLLAMA_INLINE __m256i in_register(__m256i x) {
  asm("" : "+x"(x));
  return x;
}

template <Encoding kEncoding>
class QuadBlocks {
  using Operands = QuadOperands<kEncoding>;

 public:
  using Sums = IVec[kTileVectors];
  static constexpr int kMostRows = 4;  // whose sums fit into the registers

  // The even and the odd columns of a step of a tile.
  struct Step {
    __m256i codes[2][kQuads][kTileVectors];
  };

  static MLLAMA_METHOD void unpack(const Operands& operands, const uint8_t* tile, int64_t step,
                                   Step& out) {
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) {
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) {
        const __m256i codes = (__m256i)operands.quad(tile, step, v * kLanes, q);
        out.codes[0][q][v] = even(codes);
        out.codes[1][q][v] = odd(codes);
      }
    }
  }

  // Of one row and the quads of a run from `first` on.
  static MLLAMA_METHOD void add(const Operands& operands, const uint8_t* tile, int64_t step,
                                int first, const QuadX& x, Sums& sums) {
    __m256i a[kTileVectors] = {}, b[kTileVectors] = {};
#pragma GCC unroll 8
    for (int q = first; q < first + Operands::kRunQuads; ++q) {
      const __m256i upper = _mm256_set1_epi32(x.words[0][q]);
      const __m256i lower = _mm256_set1_epi32(x.words[1][q]);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) {
        const __m256i codes = (__m256i)operands.quad(tile, step, v * kLanes, q);
        if constexpr (Operands::kBytesOfX) {
          a[v] = in_register(_mm256_add_epi16(a[v], _mm256_maddubs_epi16(codes, upper)));
          b[v] = in_register(_mm256_add_epi16(b[v], _mm256_maddubs_epi16(codes, lower)));
        } else {
          a[v] = in_register(_mm256_add_epi32(a[v], _mm256_madd_epi16(even(codes), upper)));
          b[v] = in_register(_mm256_add_epi32(b[v], _mm256_madd_epi16(odd(codes), lower)));
        }
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) {
      if constexpr (Operands::kBytesOfX) {
        a[v] = _mm256_madd_epi16(a[v], _mm256_set1_epi16(256));
        b[v] = _mm256_madd_epi16(b[v], _mm256_set1_epi16(1));
      }
      sums[v] = (IVec)_mm256_add_epi32(a[v], b[v]);
    }
  }

  // Of kRows rows, whose columns are not bytes.
  template <int kRows>
  static MLLAMA_METHOD void add(const Step& step, int first, const QuadX* x, Sums* sums) {
    __m256i a[kRows][kTileVectors] = {};
#pragma GCC unroll 2
    for (int word = 0; word < 2; ++word) {
#pragma GCC unroll 8
      for (int q = first; q < first + Operands::kRunQuads; ++q) {
        __m256i codes[kTileVectors];
        // Otherwise they are loaded for every row, and the loads take longest.
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) {
          codes[v] = in_register(step.codes[word][q][v]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          const __m256i columns = _mm256_set1_epi32(x[r].words[word][q]);
#pragma GCC unroll 2
          for (int v = 0; v < kTileVectors; ++v) {
            const __m256i products = _mm256_madd_epi16(codes[v], columns);
            a[r][v] = in_register(_mm256_add_epi32(a[r][v], products));
          }
        }
      }
    }
    memcpy(sums, a, sizeof(a));
  }

  // Of one row and the quads whose bits are set.
  static MLLAMA_METHOD void add_some(const Operands& operands, const uint8_t* tile, int64_t step,
                                     uint32_t quads, const QuadX& x, Sums& sums) {
    for (; quads != 0; quads &= quads - 1) {
      const int q = __builtin_ctz(quads);
      const __m256i upper = _mm256_set1_epi32(x.words[0][q]);
      const __m256i lower = _mm256_set1_epi32(x.words[1][q]);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) {
        const __m256i codes = (__m256i)operands.quad(tile, step, v * kLanes, q);
        __m256i a, b;
        if constexpr (Operands::kBytesOfX) {
          a = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, upper), _mm256_set1_epi16(256));
          b = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, lower), _mm256_set1_epi16(1));
        } else {
          a = _mm256_madd_epi16(even(codes), upper);
          b = _mm256_madd_epi16(odd(codes), lower);
        }
        sums[v] += (IVec)_mm256_add_epi32(a, b);
      }
    }
  }

  static MLLAMA_METHOD void add_some(const Step& step, uint32_t quads, const QuadX& x, Sums& sums) {
    for (; quads != 0; quads &= quads - 1) {
      const int q = __builtin_ctz(quads);
#pragma GCC unroll 2
      for (int word = 0; word < 2; ++word) {
        const __m256i columns = _mm256_set1_epi32(x.words[word][q]);
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) {
          sums[v] += (IVec)_mm256_madd_epi16(step.codes[word][q][v], columns);
        }
      }
    }
  }

 private:
  static MLLAMA_METHOD __m256i even(__m256i codes) {
    return _mm256_and_si256(codes, _mm256_set1_epi16(255));
  }
  static MLLAMA_METHOD __m256i odd(__m256i codes) { return _mm256_srli_epi16(codes, 8); }
};

}  // namespace mllama::MLLAMA_ISA

#endif  // AVX2
