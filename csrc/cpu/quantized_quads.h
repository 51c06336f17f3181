// Products of 16-bit x with the integers of a packed weight, as integers: a step of x (32 columns)
// is a power of two times 16-bit integers, the codes of the weight are unsigned bytes, four
// neighbouring columns to a 32-bit lane, lanes are rows. Sums of integers are exact, so neither the
// instructions nor the number of rows change a bit: AVX-512 multiplies bytes with the upper and the
// lower byte of x (VNNI; for many rows AMX), AVX2 16-bit words, and for one row and codes of 4 bits
// bytes too (quantized_quad_blocks.h).
//
// The values of a table, nf4's and fp4's, are integers of 15 bits over a unit of theirs: AVX2 looks
// up their bytes (quantized_table_blocks.h), AVX-512 the integers, a pair of columns to a lane, and
// multiplies them by 16-bit words for any number of rows; their bits differ between the two.
//
// Integers of 16 bits hold a step whose columns are of a kind. Beside larger ones the others lose
// digits, and would decide the result where the larger meet zeros: such a step gets a second word
// for what the first left (of normal numbers a fifth of the steps in bfloat16, five sixths in
// float16). Rows that two words cannot hold, and infinities, go the way of floats.
//
// With int8_activations a step is one scale, largest / 127, times 8-bit integers.
#pragma once

#include "quantized_product.h"
#include "quantized_quad_blocks.h"
#include "quantized_quad_dots.h"
#include "quantized_quad_tiles.h"
#include "quantized_table_blocks.h"

namespace mllama::MLLAMA_ISA {

template <Encoding kEncoding>
class QuadProduct final : public ReencodedProduct {
  using Operands = QuadOperands<kEncoding>;
  static constexpr int kRunQuads = Operands::kRunQuads, kRuns = Operands::kRuns;
  static constexpr int64_t kTogether = 8;                                   // steps, for many rows
  static constexpr int kVectors = Operands::kTabled ? 2 * kQuads : kQuads;  // of a step of a tile
  // How many bytes ahead they are asked for, into the first cache and long before that into the
  // second. Measured on Zen 4: the second makes one row 4 (q6_k) to 21 % (q4_k) faster.
  static constexpr int64_t kAhead = 2048, kFarAhead = Decoder<kEncoding>::kBytes ? 16384 : 6144;
  static constexpr int64_t kCodeBytes = Decoder<kEncoding>::kBytes ? 512 : 256;  // of a step
  using Groups = GroupScale[kRuns][kTileVectors];
  // Steps whose scales are read together: those that share what they are made of, where that is
  // worth the room.
#ifdef MLLAMA_QUAD_BLOCKS
  static constexpr int kScaleSteps = kEncoding == Encoding::kQ4_K ? 8 : 1;
  using Blocks = typename BlocksOf<kEncoding>::Type;
  // One row: how many tiles take turns of how many steps, and how far ahead they are prefetched,
  // into which cache. Measured: 8 bits like short turns, planes of several kinds long ones.
  static constexpr bool kShortTurns = Decoder<kEncoding>::kBytes;
  static constexpr int64_t kTogetherTiles = 4;
  static constexpr int64_t kTurnSteps = kShortTurns ? 1 : 8;
  static constexpr int64_t kAheadSteps = kShortTurns ? 4 : 8;
  static constexpr int kLocality = kShortTurns ? 3 : 2;
#else
  static constexpr int kScaleSteps = 1;
#endif

 public:
  // `table` is that of nf4 and fp4.
  QuadProduct(const QuantizedWeight& w, const PackedLayout& layout, bool int8,
              const IntegerTable* table = nullptr)
      : layout_(layout),
        decoder_(w, layout),
        operands_(layout, table),
        int8_(int8),
        group_steps_(w.group / kStepColumns) {}

  void take(int64_t rows, DType dtype) override {
    rows_ = rows;
#ifdef MLLAMA_QUAD_BLOCKS
    encoder_.bytes = Operands::kBytesOfX && rows == 1;
#endif
    if constexpr (Operands::kTabled) encoder_.weight_unit = operands_.table->unit();
    encoder_.unit = dtype == DType::kBFloat16 ? 0x1p-8f : 0x1p-11f;
    block_rows_ = min<int64_t>(rows, 16);
    steps_ = layout_.columns / kStepColumns;
    scale_bytes_ = layout_.scales.row_bytes() * kTileRows / steps_;
    extra_bytes_ = layout_.extras.row_bytes() * kTileRows / steps_;
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
      if (!finite || (most != 0 && (most < 0x1p-80f || most > 0x1p100f))) return leave(row);
      QuadX& first = at(x_, row, step);
      if (int8_) {
        const float scale = most / 127;
        encoder_.write(first, values, nullptr, scale, most == 0 ? 0.0f : 127 / most);
        continue;
      }
      const float scale = encoder_.scale_of(values, most);
      float rest[kStepColumns], none[kStepColumns];
      if (encoder_.write(first, values, rest, scale, 1 / scale)) continue;
      QuadX& second = at(second_, row, step);
      constexpr float kUnits = QuadEncoder<kEncoding>::kSecondUnits;
      if (!encoder_.write(second, rest, none, scale / kUnits, kUnits / scale, values))
        return leave(row);
      first.second_quads = second.quads;
    }
    return true;
  }

  void multiply(const uint8_t* tiles, int64_t count, float* y, int64_t ldy) const override {
#ifdef MLLAMA_QUAD_BLOCKS
    if (rows_ == 1) {
      for (int64_t i = 0; i < count; i += kTogetherTiles) {
        multiply_row(tiles + i * layout_.tile_bytes, min(kTogetherTiles, count - i),
                     y + i * kTileRows);
      }
      return;
    }
#endif
    for (int64_t i = 0; i < count; ++i, y += kTileRows, tiles += layout_.tile_bytes) {
#ifdef MLLAMA_QUAD_TILES
      if constexpr (!Operands::kTabled) {
        if (rows_ >= kManyRows && amx_available()) {
          multiply_in_tiles(tiles, y, ldy);
          continue;
        }
      }
#endif
      for (int64_t row = 0; row < rows_; row += kTogetherRows) {
        multiply_rows(tiles, row, min(kTogetherRows, rows_ - row), y + row * ldy, ldy);
      }
    }
  }

 private:
  static constexpr int64_t kTogetherRows = 16, kManyRows = 4;

  QuadX& at(QuadX* x, int64_t row, int64_t step) const {
    return x[(row / 16 * steps_ + step) * block_rows_ + row % 16];
  }

  // A row that is not taken is multiplied with the others: as zeros, which have no second word.
  bool leave(int64_t row) {
    for (int64_t step = 0; step < steps_; ++step) at(x_, row, step) = {};
    return false;
  }

  // total + the scaled sum of a run; `second` is only called for where x has a second word.
  template <typename Sum, typename Second>
  MLLAMA_METHOD FVec add_run(FVec total, Sum sum, const GroupScale& group, const QuadX& x,
                             int64_t row, int64_t step, int run, const Second& second) const {
    FVec value = unbiased(sum, x, run) * x.scale, ones = splat((float)x.sums[run] * x.scale);
    if (x.second_quads != 0) {
      const QuadX& rest = at(second_, row, step);
      value += unbiased(second(rest), rest, run) * rest.scale;
      ones += splat((float)rest.sums[run] * rest.scale);
    }
    if constexpr (kEncoding == Encoding::kInt4) value -= group.offset * ones;
    total += value * group.scale;
    if constexpr (kEncoding == Encoding::kQ4_K) total -= group.offset * ones;
    return total;
  }

  static MLLAMA_METHOD FVec unbiased(FVec sum, const QuadX&, int) { return sum; }
  MLLAMA_METHOD FVec unbiased(IVec sum, const QuadX& x, int run) const {
    if (Operands::kBias != 0) sum -= x.sums[run];
    return __builtin_convertvector(sum, FVec);
  }

  // The scales of a step and those behind it, where the ones of the steps before end.
  MLLAMA_METHOD void take_scales(const uint8_t* tile, int64_t step, bool first,
                                 Groups (&groups)[kScaleSteps]) const {
    if (kEncoding == Encoding::kInt4 && !first && step % group_steps_ != 0) return;
    if (Operands::kTabled && !first && step % kTableSteps != 0) return;
    if constexpr (kScaleSteps > 1) {
      if (step % kScaleSteps == 0) read_several_scales(tile, step / kScaleSteps, groups);
    } else {
      read_scales(tile, step, groups);
    }
  }

  // Apart, or the compiler computes all their places in the loop over steps.
  __attribute__((noinline)) void read_several_scales(const uint8_t* tile, int64_t first,
                                                     Groups (&groups)[kScaleSteps]) const {
    read_scales(tile, first * kScaleSteps, groups);
  }

  MLLAMA_METHOD void read_scales(const uint8_t* tile, int64_t step,
                                 Groups (&groups)[kScaleSteps]) const {
#pragma GCC unroll 8
    for (int i = 0; i < kScaleSteps; ++i) {
#pragma GCC unroll 2
      for (int run = 0; run < kRuns; ++run) {
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) {
          groups[i][run][v] = decoder_.scale(tile, step + i, v * kLanes, run);
        }
      }
    }
  }

#ifdef MLLAMA_QUAD_BLOCKS
  // What is read kAheadSteps later, of this tile or the one `next` tiles further on: of planes that
  // are read slowly a line more often than need be.
  MLLAMA_METHOD void prefetch_planes(const uint8_t* tile, int64_t step, int64_t next) const {
    int64_t ahead = step + kAheadSteps;
    if (ahead >= steps_) {
      ahead -= steps_;
      tile += next * layout_.tile_bytes;
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < kCodeBytes; i += 64) {
      __builtin_prefetch(tile + ahead * kCodeBytes + i, 0, kLocality);
    }
    if constexpr (Operands::kSixBits) {
      __builtin_prefetch(tile + layout_.high_at + ahead * 128, 0, kLocality);
      __builtin_prefetch(tile + layout_.high_at + ahead * 128 + 64, 0, kLocality);
    }
    if constexpr (!Decoder<kEncoding>::kRowScale) {
      __builtin_prefetch(tile + layout_.scales_at + ahead * scale_bytes_, 0, kLocality);
      if (extra_bytes_ != 0) {
        __builtin_prefetch(tile + layout_.extras_at + ahead * extra_bytes_, 0, kLocality);
      }
    }
  }

  // Several tiles in turn, some steps of each, since memory serves several readers faster.
  void multiply_row(const uint8_t* tiles, int64_t count, float* y) const {
    FVec totals[kTogetherTiles][kTileVectors] = {};
    for (int64_t first = 0; first < steps_; first += kTurnSteps) {
      for (int64_t i = 0; i < count; ++i) {
        add_steps(tiles + i * layout_.tile_bytes, first, min(first + kTurnSteps, steps_), count,
                  totals[i]);
      }
    }
    memcpy(y, totals, count * sizeof(totals[0]));
  }

  // Apart, or the compiler keeps places of all tiles in registers that the sums need.
  __attribute__((noinline)) void add_steps(const uint8_t* tile, int64_t first, int64_t end,
                                           int64_t tiles, FVec (&totals)[kTileVectors]) const {
    FVec sums[kTileVectors];
    memcpy(sums, totals, sizeof(sums));
    Groups scales[kScaleSteps];
    for (int64_t step = first; step < end; ++step) {
      prefetch_planes(tile, step, tiles);
      take_scales(tile, step, step == first, scales);
      const QuadX& x = x_[step];
#pragma GCC unroll 2
      for (int run = 0; run < kRuns; ++run) {
        typename Blocks::Sums products, seconds = {};
        Blocks::add(operands_, tile, step, run * kRunQuads, x, products);
        if (const uint32_t quads = second_quads(x, run); quads != 0) {
          add_second(tile, step, quads, second_[step], seconds);
        }
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) {
          const auto second = [&](const QuadX&) { return seconds[v]; };
          sums[v] = add_run(sums[v], products[v], scales[step % kScaleSteps][run][v], x, 0, step,
                            run, second);
        }
      }
    }
    memcpy(totals, sums, sizeof(sums));
  }

  static MLLAMA_METHOD uint32_t second_quads(const QuadX& x, int run) {
    return x.second_quads & ((1u << kRunQuads) - 1) << run * kRunQuads;
  }

  // Apart, so that what is seldom called takes no registers.
  __attribute__((noinline)) void add_second(const uint8_t* tile, int64_t step, uint32_t quads,
                                            const QuadX& rest,
                                            typename Blocks::Sums& seconds) const {
    Blocks::add_some(operands_, tile, step, quads, rest, seconds);
  }

  __attribute__((noinline)) void add_second(const typename Blocks::Step& weight, uint32_t quads,
                                            const QuadX& rest,
                                            typename Blocks::Sums& seconds) const {
    Blocks::add_some(weight, quads, rest, seconds);
  }

  void multiply_rows(const uint8_t* tile, int64_t first_row, int64_t count, float* y,
                     int64_t ldy) const {
    FVec totals[kTogetherRows][kTileVectors];
    Groups scales[kScaleSteps];
    memset(totals, 0, count * sizeof(totals[0]));
    for (int64_t step = 0; step < steps_; ++step) {
      if (first_row == 0) prefetch_planes(tile, step, 1);
      typename Blocks::Step weight;
      Blocks::unpack(operands_, tile, step, weight);
      take_scales(tile, step, step == 0, scales);
      const Groups& groups = scales[step % kScaleSteps];
      int64_t r = 0;
      if constexpr (Blocks::kMostRows == 4) {
        for (; r + 4 <= count; r += 4) add_rows<4>(weight, groups, first_row + r, step, &totals[r]);
      }
      for (; r + 2 <= count; r += 2) add_rows<2>(weight, groups, first_row + r, step, &totals[r]);
      if (r < count) add_rows<1>(weight, groups, first_row + r, step, &totals[r]);
    }
    for (int64_t r = 0; r < count; ++r) memcpy(y + r * ldy, totals[r], sizeof(totals[r]));
  }

  template <int kRows>
  __attribute__((noinline)) void add_rows(const typename Blocks::Step& weight, const Groups& groups,
                                          int64_t row, int64_t step,
                                          FVec (*totals)[kTileVectors]) const {
    const QuadX* x = &at(x_, row, step);
#pragma GCC unroll 2
    for (int run = 0; run < kRuns; ++run) {
      typename Blocks::Sums sums[kRows];
      Blocks::template add<kRows>(weight, run * kRunQuads, x, sums);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        typename Blocks::Sums seconds = {};
        if (const uint32_t quads = second_quads(x[r], run); quads != 0) {
          add_second(weight, quads, at(second_, row + r, step), seconds);
        }
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) {
          const auto second = [&](const QuadX&) { return seconds[v]; };
          totals[r][v] =
              add_run(totals[r][v], sums[r][v], groups[run][v], x[r], row + r, step, run, second);
        }
      }
    }
  }
#else
  MLLAMA_METHOD auto dot(const UVec (&weight)[kVectors], const QuadX& x, int first) const {
    return quad_dot<Operands>(weight, x, first, int8_);
  }

  void prefetch(const uint8_t* tile, int64_t step) const {
    const uint8_t* place = tile + step * kCodeBytes;
#pragma GCC unroll 8
    for (int64_t i = 0; i < kCodeBytes; i += 64) {
      __builtin_prefetch(place + kAhead + i, 0, 3);
      __builtin_prefetch(place + kFarAhead + i, 0, 2);
    }
  }

  void multiply_rows(const uint8_t* tile, int64_t first_row, int64_t count, float* y,
                     int64_t ldy) const {
    for (int lane = 0; lane < kTileRows; lane += kLanes) {
      if (count == 1) {
        multiply_lanes<1>(tile, first_row, 1, lane, y + lane, ldy);
      } else {
        multiply_lanes<kTogetherRows>(tile, first_row, count, lane, y + lane, ldy);
      }
    }
  }

  template <int kRows>
  void multiply_lanes(const uint8_t* tile, int64_t first_row, int64_t count, int lane, float* y,
                      int64_t ldy) const {
    FVec totals[kRows] = {};
    Groups scales[kScaleSteps];
    for (int64_t step = 0; step < steps_; ++step) {
      if (lane == 0) prefetch(tile, step);
      take_scales(tile, step, step == 0, scales);
      UVec weight[kVectors];
      operands_.unpack(tile, step, lane, weight);
#pragma GCC unroll 2
      for (int run = 0; run < kRuns; ++run) {
        const GroupScale& group = scales[step % kScaleSteps][run][lane / kLanes];
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
#endif

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
  QuadEncoder<kEncoding> encoder_;
  int64_t rows_ = 0, block_rows_ = 0, steps_ = 0;
  const int64_t group_steps_;
  int64_t scale_bytes_ = 0, extra_bytes_ = 0;  // of a step, rounded down
  Scratch scratch_;
  QuadX *x_ = nullptr, *second_ = nullptr;
};

}  // namespace mllama::MLLAMA_ISA
