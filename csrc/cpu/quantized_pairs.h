// Products of 16-bit x on AVX512-BF16 with fp8, and with nf4 and fp4 where integers are not exact
// enough: codes go to bfloat16 exactly, two columns to a 32-bit lane, lanes are rows; their
// products are summed in float32 for the columns that share a scale, and that sum is scaled. So no
// weight is rounded, and a column whose weights are zero adds nothing, whatever x is there. What is
// not exact in one bfloat16 is two: x in float16 (11 bits), and the values of a table (16 of their
// 24 bits).
#pragma once

#include "common/gemm_amx.h"
#include "quantized_decode.h"
#include "quantized_product.h"

#ifdef __AVX512BF16__

namespace mllama::MLLAMA_ISA {

template <Encoding kEncoding>
class PairOperands {
 public:
  static constexpr bool kTabled = Decoder<kEncoding>::kTabled;
  static constexpr int kWords = kTabled ? 2 : 1;
  static constexpr int kPairs = kStepColumns / 2;

  explicit PairOperands(const QuantizedWeight& w) {
    BF16 entries[128], rests[128];
    for (int i = 0; i < 128; ++i) {
      const float value = kTabled ? w.table[i % 16] : fp8_values(HVec{} + (uint16_t)i)[0];
      entries[i] = from_scalar<BF16>(value);
      const float rest = value - to_scalar(entries[i]);
      rests[i] = from_scalar<BF16>(rest == rest ? rest : 0.0f);
    }
    memcpy(table_, entries, sizeof(table_));
    if (kTabled) memcpy(&table_[1], rests, sizeof(table_[1]));
  }

  // The columns of a step in the order of the pairs.
  static constexpr int column(int i) { return kTabled ? i : i / 4 * 4 + i % 2 * 2 + i / 2 % 2; }

  // out[word][pair]
  MLLAMA_METHOD void unpack(const uint8_t* tile, int64_t step,
                            __m512i (&out)[kWords][kPairs]) const {
#pragma GCC unroll 8
    for (int word = 0; word < (kTabled ? 4 : 8); ++word) {
      if constexpr (kTabled) {
        const __m512i nibbles = (__m512i)load_words(tile, step * 4 + word, 0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {  // the lowest five bits count, and the table is there twice
          const __m512i codes = _mm512_srli_epi32(nibbles, 4 * i);
          out[0][4 * word + i] = _mm512_permutexvar_epi16(codes, table_[0]);
          out[kWords - 1][4 * word + i] = _mm512_permutexvar_epi16(codes, table_[1]);
        }
      } else {
        const __m512i bytes = (__m512i)load_words(tile, step * 8 + word, 0);
        out[0][2 * word] = fp8_pairs(bytes, _mm512_slli_epi16(bytes, 8));
        out[0][2 * word + 1] = fp8_pairs(_mm512_srli_epi16(bytes, 8), bytes);
      }
    }
  }

 private:
  // Of codes in the low bytes of 16-bit lanes, whose signs are the highest bits of those of
  // `signs`.
  MLLAMA_METHOD __m512i fp8_pairs(__m512i codes, __m512i signs) const {
    const __m512i low = _mm512_permutex2var_epi16(table_[0], codes, table_[1]);
    const __m512i high = _mm512_permutex2var_epi16(table_[2], codes, table_[3]);
    const __mmask32 upper = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40));
    const __m512i magnitude = _mm512_mask_mov_epi16(low, upper, high);
    return _mm512_ternarylogic_epi32(_mm512_set1_epi16((short)0x8000), signs, magnitude, 0xea);
  }

  __m512i table_[4];
};

// Holds this thread's tile configuration: 0 sums, 4 x, 6 and 7 the weight.
class PairTiles {
 public:
  explicit PairTiles(int64_t rows) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 0, 0, 0, 64, 0, 64, 64};
      uint8_t rows[16] = {};
    } config;
    config.rows[0] = config.rows[4] = (uint8_t)rows;
    config.rows[6] = config.rows[7] = 16;
    asm volatile("" ::"r"(&config) : "memory");  // the intrinsic does not tell what it reads
    _tile_loadconfig(&config);
  }
  PairTiles(const PairTiles&) = delete;
  ~PairTiles() { _tile_release(); }
};

template <bool kAmx>
struct SessionOf {
  using Type = PairTiles;
};
template <>
struct SessionOf<false> {
  struct Type {
    explicit Type(int64_t) {}
  };
};

template <Encoding kEncoding, bool kAmx>
class PairProduct final : public ReencodedProduct {
  using Operands = PairOperands<kEncoding>;
  static constexpr int kPairs = Operands::kPairs;
  static constexpr int64_t kTogether = 8;  // steps that are unpacked, then multiplied by all rows
  static constexpr int64_t kAhead = 2048;
  static constexpr int64_t kCodeBytes = Operands::kTabled ? 256 : 512;  // of a step

 public:
  PairProduct(const QuantizedWeight& w, const PackedLayout& layout)
      : steps_(layout.columns / kStepColumns),
        group_steps_(w.group / kStepColumns),
        tile_bytes_(layout.tile_bytes),
        decoder_(w, layout),
        operands_(w) {}

  // x: [block of 16 rows][step][word][row of the block][column]
  void take(int64_t rows, DType dtype) override {
    rows_ = rows;
    words_ = dtype == DType::kFloat16 ? 2 : 1;
    block_rows_ = min<int64_t>(rows, 16);
    step_elements_ = words_ * block_rows_ * kStepColumns;
    const int64_t blocks = ceil_div<int64_t>(rows, 16);
    x_ = scratch_.take<BF16>(blocks * steps_, step_elements_);
    const int64_t last = (blocks - 1) * steps_ * step_elements_;
    memset(x_ + last, 0, steps_ * step_elements_ * sizeof(BF16));
  }

  bool take_row(int64_t row, const float* h) override {
    FVec largest = {}, least = splat(0x1p127f);
    for (int64_t step = 0; step < steps_; ++step) {
      BF16* out = x_ + (row / 16 * steps_ + step) * step_elements_ + row % 16 * kStepColumns;
      float values[kStepColumns];
      for (int i = 0; i < kStepColumns; ++i) {
        values[i] = h[step * kStepColumns + Operands::column(i)];
      }
      for (int i = 0; i < kStepColumns; i += kLanes) {
        const FVec value = load(values + i), high = round_to<BF16>(value);
        const FVec size = value < FVec{} ? -value : value;
        largest = max_vec(size, largest);
        least = (size > FVec{}) & (size < least) ? size : least;
        store(out + i, high);
        // Of an infinity the rest would be NaN.
        const FVec rest = value == high ? FVec{} : value - high;
        if (words_ == 2) store(out + block_rows_ * kStepColumns + i, rest);
      }
    }
    // The instructions take subnormal numbers for zero, x's and those that they make.
    const float most = max_lanes(largest);
    return most == 0 || (most >= 0x1p-60f && -max_lanes(-least) >= 0x1p-100f);
  }

  void multiply(const uint8_t* tiles, int64_t count, float* y, int64_t ldy) const override {
    const typename SessionOf<kAmx>::Type session(block_rows_);
    for (int64_t i = 0; i < count; ++i) {
      multiply_tile(tiles + i * tile_bytes_, y + i * kTileRows, ldy);
    }
  }

 private:
  void multiply_tile(const uint8_t* tile, float* y, int64_t ldy) const {
    for (int64_t first = 0; first < steps_; first += kTogether) {
      const int64_t count = min(kTogether, steps_ - first);
      alignas(64) __m512i weight[kTogether][Operands::kWords][kPairs];
      FVec scales[kTogether];
      for (int64_t i = 0; i < count; ++i) {
        const uint8_t* ahead = tile + (first + i) * kCodeBytes + kAhead;
        for (int64_t j = 0; j < kCodeBytes; j += 64) __builtin_prefetch(ahead + j, 0, 3);
        operands_.unpack(tile, first + i, weight[i]);
        scales[i] = decoder_.scale(tile, first + i, 0, 0).scale;
      }
      for (int64_t row = 0; row < rows_; row += 16) {
        alignas(64) float sums[kTogether][16][16];
        multiply_steps(weight, x_ + (row / 16 * steps_ + first) * step_elements_, first, count,
                       sums);
        for (int64_t r = row; r < min<int64_t>(row + 16, rows_); ++r) {
          FVec total = first == 0 ? FVec{} : load(y + r * ldy);
          for (int64_t i = 0; i < count; ++i) {
            if (ends(first + i, count - i)) total += load(sums[i][r - row]) * scales[i];
          }
          store(y + r * ldy, total);
        }
      }
    }
  }

  // Whether a sum ends with a step: its group does, or what is multiplied together.
  bool ends(int64_t step, int64_t left) const {
    return left == 1 || (Operands::kTabled && (step + 1) % group_steps_ == 0);
  }

  // sums[i][row], for the steps with which one ends.
  void multiply_steps(const __m512i (*weight)[Operands::kWords][kPairs], const BF16* x,
                      int64_t first, int64_t count, float (*sums)[16][16]) const {
    if constexpr (kAmx) {
      asm volatile("" ::: "memory");  // nor do those of the tiles
      _tile_zero(0);
      for (int64_t i = 0; i < count; ++i, x += step_elements_) {
        _tile_loadd(6, weight[i][0], 64);
        _tile_loadd(7, weight[i][Operands::kWords - 1], 64);
        for (int64_t word = 0; word < words_; ++word) {
          _tile_loadd(4, x + word * block_rows_ * kStepColumns, 64);
          _tile_dpbf16ps(0, 4, 6);
          if (Operands::kWords == 2) _tile_dpbf16ps(0, 4, 7);
        }
        if (ends(first + i, count - i)) {
          _tile_stored(0, sums[i], 64);
          _tile_zero(0);
        }
      }
      asm volatile("" ::: "memory");
    } else {
      for (int64_t row = 0; row < block_rows_; ++row) {
        FVec sum = {};
        for (int64_t i = 0; i < count; ++i) {
          sum = add_products(sum, weight[i], x + i * step_elements_ + row * kStepColumns);
          if (!ends(first + i, count - i)) continue;
          store(sums[i][row], sum);
          sum = FVec{};
        }
      }
    }
  }

  FVec add_products(FVec sum, const __m512i (&weight)[Operands::kWords][kPairs],
                    const BF16* x) const {
    __m512 even = (__m512)sum, odd = {};
    for (int64_t word = 0; word < words_; ++word, x += block_rows_ * kStepColumns) {
#pragma GCC unroll 16
      for (int i = 0; i < kPairs; ++i) {
        int32_t both;
        memcpy(&both, x + 2 * i, sizeof(both));
        __m512& half = i % 2 ? odd : even;
#pragma GCC unroll 2
        for (int w = 0; w < Operands::kWords; ++w) {
          half = _mm512_dpbf16_ps(half, (__m512bh)weight[w][i], (__m512bh)_mm512_set1_epi32(both));
        }
      }
    }
    return (FVec)(even + odd);
  }

  const int64_t steps_, group_steps_, tile_bytes_;
  const Decoder<kEncoding> decoder_;
  const Operands operands_;
  int64_t rows_ = 0, words_ = 1, block_rows_ = 0, step_elements_ = 0;
  Scratch scratch_;
  BF16* x_ = nullptr;
};

}  // namespace mllama::MLLAMA_ISA

#endif  // __AVX512BF16__
