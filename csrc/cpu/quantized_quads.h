// Products of 16-bit x with the integers of a packed weight, as integers: a step of x (32 columns)
// is a power of two times 16-bit integers, the codes of the weight are unsigned bytes, four
// neighbouring columns to a 32-bit lane, lanes are rows. Sums of integers are exact, so neither the
// instructions nor the number of rows change a bit: AVX-512 multiplies bytes with the upper and the
// lower byte of x (VNNI; for many rows AMX), AVX2 16-bit words.
//
// Integers of 16 bits are as good as the accuracy rule asks where the columns of a step are of a
// kind. Beside larger ones the others keep too few digits, and would decide the result where the
// larger meet zeros: such a step gets a second word for what the first left. Rows that two words
// cannot hold, and infinities, go the way of floats.
//
// With int8_activations a step is one scale, largest / 127, times 8-bit integers.
#pragma once

#include "quantized_decode.h"
#include "quantized_product.h"
#include "quantized_quad_tiles.h"

namespace mllama::MLLAMA_ISA {

constexpr int kQuads = kStepColumns / 4;

template <Encoding kEncoding>
class QuadOperands {
  using Codes = Decoder<kEncoding>;

 public:
  static constexpr bool kSixBits = kEncoding == Encoding::kQ6_K;
  static constexpr bool kHasOffset = kEncoding == Encoding::kQ4_K || kEncoding == Encoding::kInt4;
  // Columns that share a scale, in quads, within a step.
  static constexpr int kRunQuads = kSixBits ? 4 : 8;
  static constexpr int kRuns = kQuads / kRunQuads;
  // What the codes are above the integers of the weight.
  static constexpr int kBias = Codes::kBytes                  ? 128
                               : kSixBits                     ? 32
                               : kEncoding == Encoding::kQ4_0 ? 8
                                                              : 0;

  explicit QuadOperands(const PackedLayout& layout) : layout_(layout) {}

  // The column, of a step, that is byte `byte` of quad `quad`.
  static constexpr int column(int quad, int byte) {
    if (Codes::kBytes) return 4 * quad + byte;
    return quad / 2 * 8 + quad % 2 * 2 + byte % 2 * 4 + byte / 2;
  }

  MLLAMA_METHOD void unpack(const uint8_t* tile, int64_t step, int row, UVec (&out)[kQuads]) const {
    if constexpr (Codes::kBytes) {
#pragma GCC unroll 8
      for (int q = 0; q < kQuads; ++q) out[q] = load_words(tile, step * kQuads + q, row);
    } else {
#pragma GCC unroll 4
      for (int word = 0; word < 4; ++word) {
        const UVec nibbles = load_words(tile, step * 4 + word, row);
        out[2 * word] = nibbles & 0x0f0f0f0f;
        out[2 * word + 1] = nibbles >> 4 & 0x0f0f0f0f;
      }
    }
    if constexpr (kSixBits) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const UVec high = load_words(tile + layout_.high_at, step * 2 + half, row);
        out[4 * half] |= high << 4 & 0x30303030;
        out[4 * half + 1] |= high << 2 & 0x30303030;
        out[4 * half + 2] |= high & 0x30303030;
        out[4 * half + 3] |= high >> 2 & 0x30303030;
      }
    }
  }

 private:
  const PackedLayout& layout_;
};

// A step of a row of x.
struct QuadX {
  // Two words for each quad: with AVX-512 the upper and the lower bytes of its columns, otherwise
  // 16 bits of its even and of its odd columns.
  int32_t words[2][kQuads];
  float scale;
  int32_t sums[2];  // of the halves' integers
  int32_t has_second;
};

template <Encoding kEncoding>
class QuadProduct final : public ReencodedProduct {
  using Operands = QuadOperands<kEncoding>;
  static constexpr int kRunQuads = Operands::kRunQuads, kRuns = Operands::kRuns;
  static constexpr int64_t kTogether = 8;  // steps, for many rows
  static constexpr int64_t kAhead = 2048;

 public:
  QuadProduct(const QuantizedWeight& w, const PackedLayout& layout, bool int8)
      : layout_(layout), decoder_(w, layout), operands_(layout), int8_(int8) {}

  void take(int64_t rows, DType dtype) override {
    rows_ = rows;
    // Less than this a code of x has too few digits.
    least_ = dtype == DType::kBFloat16 ? 1 << 8 : 1 << 11;
    block_rows_ = min<int64_t>(rows, 16);
    steps_ = layout_.columns / kStepColumns;
    const int64_t count = ceil_div<int64_t>(rows, 16) * block_rows_ * steps_;
    x_ = scratch_.take<QuadX>(count);
    second_ = int8_ ? nullptr : scratch_.take<QuadX>(count);
    const int64_t whole = rows / 16 * 16 * steps_;
    memset(x_ + whole, 0, (count - whole) * sizeof(QuadX));
  }

  bool take_row(int64_t row, const float* x) override {
    for (int64_t step = 0; step < steps_; ++step) {
      const float* values = x + step * kStepColumns;
      FVec largest = {};
      bool finite = true;
      for (int i = 0; i < kStepColumns; i += kLanes) {
        const FVec v = load(values + i);
        largest = max_vec(v < FVec{} ? -v : v, largest);
      }
      for (int i = 0; i < kStepColumns; ++i) finite &= __builtin_isfinite(values[i]);
      const float most = max_lanes(largest);
      // Scales and their reciprocals stay far from the ends of the exponents.
      if (!finite || (most != 0 && (most < 0x1p-80f || most > 0x1p100f))) return false;
      QuadX& first = at(x_, row, step);
      if (int8_) {
        const float scale = most / 127;
        write(first, values, nullptr, scale, most == 0 ? 0.0f : 127 / most);
        continue;
      }
      // 2^14 times the largest's power of two; the largest code is 127 * 256 + 127.
      float scale = power_of_two(most) * 0x1p-14f;
      if (most > 32639 * scale) scale *= 2;
      if (most == 0) scale = 1;
      float rest[kStepColumns], none[kStepColumns];
      first.has_second = !write(first, values, rest, scale, 1 / scale, values);
      if (!first.has_second) continue;
      QuadX& second = at(second_, row, step);
      if (!write(second, rest, none, scale * 0x1p-15f, 0x1p15f / scale, values)) return false;
    }
    return true;
  }

  void multiply(const uint8_t* tile, float* y, int64_t ldy) const override {
#ifdef MLLAMA_QUAD_TILES
    if (rows_ >= kManyRows && amx_available()) return multiply_in_tiles(tile, y, ldy);
#endif
    for (int64_t row = 0; row < rows_; row += kTogetherRows) {
      const int64_t count = min(kTogetherRows, rows_ - row);
      for (int lane = 0; lane < kTileRows; lane += kLanes) {
        if (count == 1) {
          multiply_rows<1>(tile, row, 1, lane, y + row * ldy + lane, ldy);
        } else {
          multiply_rows<kTogetherRows>(tile, row, count, lane, y + row * ldy + lane, ldy);
        }
      }
    }
  }

 private:
  static constexpr int64_t kTogetherRows = 16, kManyRows = 4;

  QuadX& at(QuadX* x, int64_t row, int64_t step) const {
    return x[(row / 16 * steps_ + step) * block_rows_ + row % 16];
  }

  static float power_of_two(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits &= 0x7f800000;
    memcpy(&x, &bits, 4);
    return x;
  }

  // The integers nearest to values / scale, and what they leave. Returns whether the columns
  // `whole`, of which that is all or the rest, have digits enough. Of those that are not zero 3 in
  // 8 may be inexact with fewer digits than enough, 2 in 8 with one bit less, 1 in 8 with two.
  bool write(QuadX& out, const float* values, float* rest, float scale, float inverse,
             const float* whole = nullptr) const {
    int32_t codes[kStepColumns];
    IVec fewer[3] = {}, nonzero = {};  // less 1 for each
    for (int i = 0; i < kStepColumns; i += kLanes) {
      const FVec code = round_nearest(load(values + i) * inverse);
      const IVec integers = __builtin_convertvector(code, IVec);
      memcpy(codes + i, &integers, sizeof(integers));
      if (!rest) continue;
      const FVec left = load(values + i) - code * scale;
      store(rest + i, left);
      const FVec all = load(whole + i), size = (all < FVec{} ? -all : all) * inverse;
      const IVec inexact = left != FVec{};
      fewer[2] += inexact & (size < least_);
      fewer[1] += inexact & (size < least_ / 2);
      fewer[0] += inexact & (size < least_ / 4);
      nonzero += all != FVec{};
    }
    bool enough = true;
    for (int i = 0; i < 3; ++i) enough &= -8 * sum_lanes(fewer[i]) <= -(i + 1) * sum_lanes(nonzero);
    out.scale = scale;
    out.has_second = 0;
    for (int half = 0; half < 2; ++half) {
      out.sums[half] = 0;
      for (int i = 0; i < 16; ++i) out.sums[half] += codes[half * 16 + i];
    }
    for (int q = 0; q < kQuads; ++q) {
      uint32_t a = 0, b = 0;
      for (int byte = 0; byte < 4; ++byte) {
        const int32_t code = codes[Operands::column(q, byte)];
#if defined(__AVX512F__)
        const int32_t low = (int8_t)code;
        a |= (uint32_t)(uint8_t)((code - low) >> 8) << byte * 8;
        b |= (uint32_t)(uint8_t)low << byte * 8;
#else
        (byte % 2 ? b : a) |= (uint32_t)(uint16_t)code << byte / 2 * 16;
#endif
      }
      out.words[0][q] = (int32_t)a;
      out.words[1][q] = (int32_t)b;
    }
    return enough;
  }

  static int sum_lanes(IVec v) {
    int sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += v[i];
    return sum;
  }

  // Of `count` quads from `first` on: codes times integers.
  MLLAMA_METHOD IVec dot(const UVec (&weight)[kQuads], const QuadX& x, int first) const {
#if defined(__AVX512F__)
    __m512i high = {}, low = {};
#pragma GCC unroll 8
    for (int q = first; q < first + kRunQuads; ++q) {
      const __m512i codes = (__m512i)weight[q];
      if (!int8_) high = _mm512_dpbusd_epi32(high, codes, _mm512_set1_epi32(x.words[0][q]));
      low = _mm512_dpbusd_epi32(low, codes, _mm512_set1_epi32(x.words[1][q]));
    }
    return ((IVec)high << 8) + (IVec)low;
#elif defined(__AVX2__)
    __m256i even = {}, odd = {};
#pragma GCC unroll 8
    for (int q = first; q < first + kRunQuads; ++q) {
      const __m256i codes = (__m256i)weight[q];
      even =
          _mm256_add_epi32(even, _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi16(255)),
                                                   _mm256_set1_epi32(x.words[0][q])));
      odd = _mm256_add_epi32(
          odd, _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_set1_epi32(x.words[1][q])));
    }
    return (IVec)_mm256_add_epi32(even, odd);
#else
    IVec sum = {};
    for (int q = first; q < first + kRunQuads; ++q) {
      const IVec codes = (IVec)weight[q];
      sum += (codes & 255) * (int16_t)x.words[0][q] + (codes >> 16 & 255) * (x.words[0][q] >> 16) +
             (codes >> 8 & 255) * (int16_t)x.words[1][q] +
             (codes >> 24 & 255) * (x.words[1][q] >> 16);
    }
    return sum;
#endif
  }

  // total + the scaled sum of a run; `second` is only called for where x has a second word.
  template <typename Second>
  MLLAMA_METHOD FVec add_run(FVec total, IVec sum, const GroupScale& group, const QuadX& x,
                             int64_t row, int64_t step, int run, const Second& second) const {
    FVec value = unbiased(sum, x, run) * x.scale, ones = splat((float)sum_of(x, run) * x.scale);
    if (x.has_second) {
      const QuadX& rest = at(second_, row, step);
      value += unbiased(second(rest), rest, run) * rest.scale;
      ones += splat((float)sum_of(rest, run) * rest.scale);
    }
    if constexpr (kEncoding == Encoding::kInt4) value -= group.offset * ones;
    total += value * group.scale;
    if constexpr (kEncoding == Encoding::kQ4_K) total -= group.offset * ones;
    return total;
  }

  static int32_t sum_of(const QuadX& x, int run) {
    return kRuns == 1 ? x.sums[0] + x.sums[1] : x.sums[run];
  }
  MLLAMA_METHOD FVec unbiased(IVec sum, const QuadX& x, int run) const {
    if (Operands::kBias != 0) sum -= Operands::kBias * sum_of(x, run);
    return __builtin_convertvector(sum, FVec);
  }

  void prefetch(const uint8_t* tile, int64_t step) const {
    constexpr int64_t kBytes = Decoder<kEncoding>::kBytes ? 512 : 256;
    const uint8_t* place = tile + step * kBytes + kAhead;
#pragma GCC unroll 8
    for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(place + i, 0, 3);
  }

  template <int kRows>
  void multiply_rows(const uint8_t* tile, int64_t first_row, int64_t count, int lane, float* y,
                     int64_t ldy) const {
    FVec totals[kRows] = {};
    for (int64_t step = 0; step < steps_; ++step) {
      if (lane == 0) prefetch(tile, step);
      UVec weight[kQuads];
      operands_.unpack(tile, step, lane, weight);
#pragma GCC unroll 2
      for (int run = 0; run < kRuns; ++run) {
        const GroupScale group = decoder_.scale(tile, step, lane, run);
        const auto add = [&](int64_t r) {
          const QuadX& x = at(x_, first_row + r, step);
          const auto second = [&](const QuadX& rest) { return dot(weight, rest, run * kRunQuads); };
          totals[r] = add_run(totals[r], dot(weight, x, run * kRunQuads), group, x, first_row + r,
                              step, run, second);
        };
        if constexpr (kRows == 1) {
          add(0);
        } else {
          for (int64_t r = 0; r < count; ++r) add(r);
        }
      }
    }
    for (int64_t r = 0; r < count; ++r) store(y + r * ldy, totals[r]);
  }

#ifdef MLLAMA_QUAD_TILES
  void multiply_in_tiles(const uint8_t* tile, float* y, int64_t ldy) const {
    const QuadTiles session(block_rows_, kRunQuads);
    for (int64_t first = 0; first < steps_; first += kTogether) {
      const int64_t count = min(kTogether, steps_ - first);
      alignas(64) UVec weight[kTogether][kQuads];
      GroupScale groups[kTogether][kRuns];
      for (int64_t i = 0; i < count; ++i) {
        prefetch(tile, first + i);
        operands_.unpack(tile, first + i, 0, weight[i]);
        for (int run = 0; run < kRuns; ++run) {
          groups[i][run] = decoder_.scale(tile, first + i, 0, run);
        }
      }
      for (int64_t row = 0; row < rows_; row += 16) {
        alignas(64) int32_t high[kTogether][kRuns][16][16], low[kTogether][kRuns][16][16];
        QuadTiles::fence();
        for (int64_t i = 0; i < count; ++i) {
          const QuadX& x = at(x_, row, first + i);
          for (int run = 0; run < kRuns; ++run) {
            const int quad = run * kRunQuads;
            QuadTiles::multiply(&weight[i][quad], x.words[1] + quad, sizeof(QuadX), low[i][run][0]);
            if (int8_) continue;
            QuadTiles::multiply(&weight[i][quad], x.words[0] + quad, sizeof(QuadX),
                                high[i][run][0]);
          }
        }
        QuadTiles::fence();
        for (int64_t r = row; r < min<int64_t>(row + 16, rows_); ++r) {
          FVec total = first == 0 ? FVec{} : load(y + r * ldy);
          for (int64_t i = 0; i < count; ++i) {
            const QuadX& x = at(x_, r, first + i);
            for (int run = 0; run < kRuns; ++run) {
              IVec sum = load_bits<IVec>(low[i][run][r - row]);
              if (!int8_) sum += load_bits<IVec>(high[i][run][r - row]) << 8;
              const auto second = [&](const QuadX& rest) {
                return dot(weight[i], rest, run * kRunQuads);
              };
              total = add_run(total, sum, groups[i][run], x, r, first + i, run, second);
            }
          }
          store(y + r * ldy, total);
        }
      }
    }
  }
#endif

  const PackedLayout& layout_;
  const Decoder<kEncoding> decoder_;
  const Operands operands_;
  const bool int8_;
  float least_ = 0;
  int64_t rows_ = 0, block_rows_ = 0, steps_ = 0;
  Scratch scratch_;
  QuadX *x_ = nullptr, *second_ = nullptr;
};

}  // namespace mllama::MLLAMA_ISA
