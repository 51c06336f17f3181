// Products of 16-bit x with fp8 on AVX2, in float32. Shifts make float16 of the codes of two
// columns in a 32-bit lane: sign, four bits of exponent and three of fraction, subnormal numbers
// too, are as in float16 with an exponent that is 8 lower. vcvtph2ps widens them out of memory,
// four rows and two columns to a vector, which meets two columns of x. For 4 columns of 8 rows that
// is 16 operations, 3 of which look for NaN, whose code would be 480.
//
// Not taken: shifts to float32, whose subnormal numbers cost an assist each and are lost where the
// caller has them flushed; integers, since the codes have a range of 18 bits.
//
// Neither the weight nor x is rounded, and the scale of a row comes last. A row has four sums, of
// the even and of the odd columns of each half of a step, for one row of x and for many alike. Rows
// of x that are not finite or near the ends of the exponents go the way of floats, and so do
// results of rows of the weight with NaN.
#pragma once

#include "quantized_decode.h"
#include "quantized_product.h"

#if defined(__AVX2__) && !defined(__AVX512F__)

namespace mllama::MLLAMA_ISA {

class HalvesProduct final : public ReencodedProduct {
  static constexpr int kWords = kStepColumns / 4;
  static constexpr int kPairs = kStepColumns / 2;
  static constexpr int kVectors = 2 * kTileRows / kLanes;  // of a pair
  static constexpr int kParts = 2;                         // of a step, that have sums of their own
  static constexpr int64_t kStepBytes = kStepColumns * kTileRows;
  static constexpr int64_t kTogetherTiles = 4, kTurnSteps = 2, kAheadSteps = 4;
  static constexpr int64_t kTogetherRows = 48, kTogetherSteps = 4;  // of many rows
  static constexpr float kUnit = 256;                               // of the weight as float16

  // The weight of a step as float16: lanes are rows, each with two columns.
  struct Step {
    __m128i halves[kPairs][kVectors];
  };
  using Wide = FVec[kPairs][kVectors];
  using Sums = FVec[kParts][kVectors];
  // Of rows that have a NaN, the highest bit of a byte of their lanes is set.
  using Marks = __m256i[kTileRows / kLanes];

 public:
  explicit HalvesProduct(const PackedLayout& layout)
      : layout_(layout), steps_(layout.columns / kStepColumns) {}

  void take(int64_t rows, DType) override {
    rows_ = rows;
    block_rows_ = min(rows, kTogetherRows);
    x_ = scratch_.take<float>(round_up(rows, block_rows_), layout_.columns);
  }

  bool take_row(int64_t row, const float* x) override {
    float most = 0, least = 0x1p100f;
    bool finite = true;
    for (int64_t i = 0; i < layout_.columns; ++i) {
      // The codes of even bytes, then of odd ones.
      const float value = x[i / 4 * 4 + i % 2 * 2 + i / 2 % 2], size = __builtin_fabsf(value);
      at(row, i / kStepColumns)[i % kStepColumns] = value;
      finite &= __builtin_isfinite(value);
      most = max(most, size);
      least = size != 0 ? min(least, size) : least;
    }
    return finite && most <= 0x1p100f && least >= 0x1p-100f;
  }

  void multiply(const uint8_t* tiles, int64_t count, float* y, int64_t ldy) const override {
    if (rows_ == 1) {
      for (int64_t i = 0; i < count; i += kTogetherTiles) {
        multiply_row(tiles + i * layout_.tile_bytes, min(kTogetherTiles, count - i),
                     y + i * kTileRows);
      }
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t row = 0; row < rows_; row += kTogetherRows) {
        multiply_rows(tiles + i * layout_.tile_bytes, row, min(kTogetherRows, rows_ - row),
                      y + row * ldy + i * kTileRows, ldy);
      }
    }
  }

 private:
  // A step of a row of x: beside it are those of the rows that are multiplied together.
  float* at(int64_t row, int64_t step) const {
    const int64_t block = row / kTogetherRows * steps_ + step;
    return x_ + (block * block_rows_ + row % kTogetherRows) * kStepColumns;
  }

  // Several tiles in turn, some steps of each, since memory serves several readers faster.
  void multiply_row(const uint8_t* tiles, int64_t count, float* y) const {
    Sums sums[kTogetherTiles] = {};
    Marks marks[kTogetherTiles] = {};
    for (int64_t first = 0; first < steps_; first += kTurnSteps) {
      for (int64_t i = 0; i < count; ++i) {
        add_steps(tiles + i * layout_.tile_bytes, first, min(first + kTurnSteps, steps_), count,
                  sums[i], marks[i]);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      finish(tiles + i * layout_.tile_bytes, sums[i], marks[i], y + i * kTileRows);
    }
  }

  __attribute__((noinline)) void add_steps(const uint8_t* tile, int64_t first, int64_t end,
                                           int64_t tiles, Sums& totals, Marks& marks) const {
    FVec sums[kParts][kVectors];
    for_each_sum([&](int part, int v) { sums[part][v] = totals[part][v]; });
    for (int64_t i = first; i < end; ++i) {
      prefetch(tile, i, tiles);
      Step step;
      unpack(tile, i, step, marks);
      const float* x = at(0, i);
#pragma GCC unroll 8
      for (int pair = 0; pair < kPairs / kParts; ++pair) {
        FVec columns[kParts];
#pragma GCC unroll 2
        for (int part = 0; part < kParts; ++part) {
          columns[part] = columns_of(x, part * (kPairs / kParts) + pair);
        }
        for_each_sum([&](int part, int v) {
          sums[part][v] += widened(step.halves[part * (kPairs / kParts) + pair][v]) * columns[part];
        });
      }
    }
    for_each_sum([&](int part, int v) { totals[part][v] = sums[part][v]; });
  }

  template <typename F>
  static MLLAMA_METHOD void for_each_sum(const F& f) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) f(part, v);
    }
  }

  void multiply_rows(const uint8_t* tile, int64_t first_row, int64_t count, float* y,
                     int64_t ldy) const {
    Sums sums[kTogetherRows];
    memset(sums, 0, count * sizeof(Sums));
    Marks marks = {};
    for (int64_t first = 0; first < steps_; first += kTogetherSteps) {
      const int64_t steps = min(kTogetherSteps, steps_ - first);
      Wide weight[kTogetherSteps];
      for (int64_t i = 0; i < steps; ++i) {
        if (first_row == 0) prefetch(tile, first + i, 1);
        Step step;
        unpack(tile, first + i, step, marks);
        for (int pair = 0; pair < kPairs; ++pair) {
          for (int v = 0; v < kVectors; ++v) {
            weight[i][pair][v] = widened(step.halves[pair][v]);
          }
        }
      }
      int64_t r = 0;
      for (; r + 6 <= count && r + 8 != count; r += 6) {
        add_rows<6>(weight, first_row + r, first, steps, sums + r);
      }
      for (; r + 4 <= count; r += 4) add_rows<4>(weight, first_row + r, first, steps, sums + r);
      if (r + 2 <= count) {
        add_rows<2>(weight, first_row + r, first, steps, sums + r);
        r += 2;
      }
      if (r < count) add_rows<1>(weight, first_row + r, first, steps, sums + r);
    }
    for (int64_t r = 0; r < count; ++r) finish(tile, sums[r], marks, y + r * ldy);
  }

  template <int kRows>
  __attribute__((noinline)) void add_rows(const Wide* weight, int64_t row, int64_t first,
                                          int64_t steps, Sums* sums) const {
    const int64_t x_stride = block_rows_ * kStepColumns;
    for (int part = 0; part < kParts; ++part) {
      for (int v = 0; v < kVectors; v += 2) {
        FVec a[kRows][2];
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
          a[r][0] = sums[r][part][v];
          a[r][1] = sums[r][part][v + 1];
        }
        const FVec* w = &weight[0][part * kPairs / kParts][v];
        const float* x = at(row, first) + part * kStepColumns / kParts;
        for (int64_t i = 0; i < steps; ++i, w += kPairs * kVectors, x += x_stride) {
#pragma GCC unroll 8
          for (int pair = 0; pair < kPairs / kParts; ++pair) {
            const FVec one = w[pair * kVectors], two = w[pair * kVectors + 1];
#pragma GCC unroll 6
            for (int r = 0; r < kRows; ++r) {
              const FVec columns = columns_of(x + r * kStepColumns, pair);
              a[r][0] += one * columns;
              a[r][1] += two * columns;
            }
          }
        }
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
          sums[r][part][v] = a[r][0];
          sums[r][part][v + 1] = a[r][1];
        }
      }
    }
  }

  // What is read kAheadSteps later, of this tile or the one `next` tiles further on.
  MLLAMA_METHOD void prefetch(const uint8_t* tile, int64_t step, int64_t next) const {
    int64_t ahead = step + kAheadSteps;
    if (ahead >= steps_) {
      ahead -= steps_;
      tile += next * layout_.tile_bytes;
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < kStepBytes; i += 64) {
      __builtin_prefetch(tile + ahead * kStepBytes + i, 0, 3);
    }
  }

  static MLLAMA_METHOD void unpack(const uint8_t* tile, int64_t step, Step& out, Marks& marks) {
    const __m256i sign_and_code = _mm256_set1_epi16((short)0xbf80);
    __m256i seen[kTileRows / kLanes] = {marks[0], marks[1]};
    const __m256i magnitude = _mm256_set1_epi8(0x7f), one = _mm256_set1_epi8(1);
    const __m256i upward = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(-1, 0, -1, 2, -1, 4, -1, 6, -1, 8, -1, 10, -1, 12, -1, 14));
#pragma GCC unroll 8
    for (int word = 0; word < kWords; ++word) {
#pragma GCC unroll 2
      for (int v = 0; v < kTileRows / kLanes; ++v) {
        const __m256i codes = (__m256i)load_words(tile, step * kWords + word, v * kLanes);
        const __m256i above = _mm256_add_epi8(_mm256_and_si256(codes, magnitude), one);
        seen[v] = _mm256_or_si256(seen[v], above);
        const __m256i even = _mm256_srai_epi16(_mm256_shuffle_epi8(codes, upward), 1);
        const __m256i odd = _mm256_srai_epi16(codes, 1);
        const __m256i pairs[2] = {_mm256_and_si256(even, sign_and_code),
                                  _mm256_and_si256(odd, sign_and_code)};
        memcpy(&out.halves[2 * word][2 * v], &pairs[0], sizeof(pairs[0]));
        memcpy(&out.halves[2 * word + 1][2 * v], &pairs[1], sizeof(pairs[1]));
      }
    }
    marks[0] = seen[0];
    marks[1] = seen[1];
    asm volatile("" : "+m"(out));  // or they are taken apart in registers, which takes longer
  }

  // Out of memory, which takes one operation fewer than out of a register.
  static MLLAMA_METHOD FVec widened(const __m128i& halves) {
    FVec values;
    asm("vcvtph2ps %1, %0" : "=x"(values) : "m"(halves));
    return values;
  }

  static MLLAMA_METHOD FVec columns_of(const float* x, int pair) {
    double two;
    memcpy(&two, x + 2 * pair, sizeof(two));
    return (FVec)_mm256_set1_pd(two);
  }

  void finish(const uint8_t* tile, const Sums& sums, const Marks& marks, float* y) const {
    const float* scales = reinterpret_cast<const float*>(tile + layout_.scales_at);
    for (int v = 0; v < kTileRows / kLanes; ++v) {
      const __m256 pairs = _mm256_hadd_ps((__m256)(sums[0][2 * v] + sums[1][2 * v]),
                                          (__m256)(sums[0][2 * v + 1] + sums[1][2 * v + 1]));
      const FVec rows = (FVec)_mm256_permute4x64_pd((__m256d)pairs, 0xd8);
      const FVec value = rows * kUnit * load(scales + v * kLanes);
      store(y + v * kLanes,
            ((UVec)marks[v] & 0x80808080) != UVec{} ? splat(__builtin_nanf("")) : value);
    }
  }

  const PackedLayout& layout_;
  const int64_t steps_;
  int64_t rows_ = 0, block_rows_ = 0;
  Scratch scratch_;
  float* x_ = nullptr;
};

}  // namespace mllama::MLLAMA_ISA

#endif  // AVX2
