// Sums of products of a table's integers and x on AVX2, for quantized_quads.h: of nf4 and fp4, of
// all rows of a tile and one row of x or a few of them.
//
// vpshufb looks up the upper and the lower bytes of four columns of eight rows. Interleaved they
// are 16-bit lanes, four neighbouring ones a row's columns, which vpmaddwd multiplies by four
// columns of x: 10 operations for a quad, 4 where it was looked up before, for other rows of x. The
// sums stay within 32 bits (QuadEncoder::fits); an addition across lanes ends a step.
#pragma once

#include "quantized_quad_blocks.h"

#ifdef MLLAMA_QUAD_BLOCKS

namespace mllama::MLLAMA_ISA {

class TableBlocks {
  using Operands = QuadOperands<Encoding::kNf4>;

 public:
  using Sums = FVec[kTileVectors];
  static constexpr int kMostRows = 2;

  // The integers of a step of a tile: of the upper and the lower rows of each half of a vector.
  struct Step {
    __m256i words[kQuads][kTileVectors][2];
  };

  static MLLAMA_METHOD void unpack(const Operands& operands, const uint8_t* tile, int64_t step,
                                   Step& out) {
    const Table table(operands);
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) {
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) {
        table.look_up((__m256i)operands.quad(tile, step, v * kLanes, q), out.words[q][v]);
      }
    }
  }

  // Of one row.
  static MLLAMA_METHOD void add(const Operands& operands, const uint8_t* tile, int64_t step, int,
                                const QuadX& x, Sums& sums) {
    const Table table(operands);
    __m256i a[kTileVectors][2] = {};
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) {
      const __m256i columns = columns_of(x, q);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) {
        __m256i words[2];
        table.look_up((__m256i)operands.quad(tile, step, v * kLanes, q), words);
        add_products(a[v][0], words[0], columns);
        add_products(a[v][1], words[1], columns);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) sums[v] = sum_of(a[v]);
  }

  // Of kRows rows.
  template <int kRows>
  static MLLAMA_METHOD void add(const Step& step, int, const QuadX* x, Sums* sums) {
    __m256i a[kRows][kTileVectors][2] = {};
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) {
      __m256i columns[kRows];
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) columns[r] = in_register(columns_of(x[r], q));
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const __m256i words = in_register(step.words[q][v][half]);
#pragma GCC unroll 2
          for (int r = 0; r < kRows; ++r) add_products(a[r][v][half], words, columns[r]);
        }
      }
    }
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) sums[r][v] = sum_of(a[r][v]);
    }
  }

  // Of one row and the quads whose bits are set.
  static MLLAMA_METHOD void add_some(const Operands& operands, const uint8_t* tile, int64_t step,
                                     uint32_t quads, const QuadX& x, Sums& sums) {
    const Table table(operands);
    add_some(quads, x, sums, [&](int q, int v, __m256i(&words)[2]) {
      table.look_up((__m256i)operands.quad(tile, step, v * kLanes, q), words);
    });
  }

  static MLLAMA_METHOD void add_some(const Step& step, uint32_t quads, const QuadX& x, Sums& sums) {
    add_some(quads, x, sums, [&](int q, int v, __m256i(&words)[2]) {
      words[0] = step.words[q][v][0];
      words[1] = step.words[q][v][1];
    });
  }

 private:
  template <typename F>
  static MLLAMA_METHOD void add_some(uint32_t quads, const QuadX& x, Sums& sums,
                                     const F& words_of) {
    __m256i a[kTileVectors][2] = {};
    for (; quads != 0; quads &= quads - 1) {
      const int q = __builtin_ctz(quads);
      const __m256i columns = columns_of(x, q);
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) {
        __m256i words[2];
        words_of(q, v, words);
        add_products(a[v][0], words[0], columns);
        add_products(a[v][1], words[1], columns);
      }
    }
#pragma GCC unroll 2
    for (int v = 0; v < kTileVectors; ++v) sums[v] = sum_of(a[v]);
  }

  struct Table {
    __m256i low, high;

    explicit MLLAMA_METHOD Table(const Operands& operands)
        : low(load_bits<__m256i>(operands.table->low)),
          high(load_bits<__m256i>(operands.table->high)) {}

    // Rows 0 and 1 of each half of a vector, then 2 and 3.
    MLLAMA_METHOD void look_up(__m256i codes, __m256i (&words)[2]) const {
      const __m256i lower = _mm256_shuffle_epi8(low, codes);
      const __m256i upper = _mm256_shuffle_epi8(high, codes);
      words[0] = _mm256_unpacklo_epi8(lower, upper);
      words[1] = _mm256_unpackhi_epi8(lower, upper);
    }
  };

  static MLLAMA_METHOD __m256i columns_of(const QuadX& x, int quad) {
    int64_t four;
    memcpy(&four, &x.words[0][0] + 2 * quad, sizeof(four));
    return _mm256_set1_epi64x(four);
  }

  static MLLAMA_METHOD void add_products(__m256i& sum, __m256i words, __m256i columns) {
    sum = in_register(_mm256_add_epi32(sum, _mm256_madd_epi16(words, columns)));
  }

  // A row's even and odd columns are neighbours; together they may take more than 32 bits.
  static MLLAMA_METHOD FVec sum_of(const __m256i (&sums)[2]) {
    return (FVec)_mm256_hadd_ps(_mm256_cvtepi32_ps(sums[0]), _mm256_cvtepi32_ps(sums[1]));
  }
};

template <Encoding kEncoding>
struct BlocksOf {
  using Type = QuadBlocks<kEncoding>;
};
template <>
struct BlocksOf<Encoding::kNf4> {
  using Type = TableBlocks;
};

}  // namespace mllama::MLLAMA_ISA

#endif  // MLLAMA_QUAD_BLOCKS
