// What quantized_quads.h multiplies: the codes of a packed weight as unsigned bytes, four
// neighbouring columns to a 32-bit lane, or a table's integers of 16 bits, two; and a step of x.
#pragma once

#include "quantized_decode.h"
#include "quantized_integer_table.h"

namespace mllama::MLLAMA_ISA {

constexpr int kQuads = kStepColumns / 4;
constexpr int kTileVectors = kTileRows / kLanes;

template <Encoding kEncoding>
class QuadOperands {
  using Codes = Decoder<kEncoding>;

 public:
  static constexpr bool kSixBits = kEncoding == Encoding::kQ6_K;
  static constexpr bool kTabled = Codes::kTabled;
  // Columns that share a scale, in quads, within a step.
  static constexpr int kRunQuads = kSixBits ? 4 : 8;
  static constexpr int kRuns = kQuads / kRunQuads;
  // Codes of 4 bits times signed bytes stay within 16 bits over a whole step, so that AVX2 too
  // takes x as bytes; times wider codes its sums of two products may not fit.
#if defined(__AVX512F__)
  static constexpr bool kBytesOfX = !kTabled;
#elif defined(__AVX2__)
  static constexpr bool kBytesOfX = !Codes::kBytes && !kSixBits && !kTabled;
#else
  static constexpr bool kBytesOfX = false;
#endif
  // Columns beside each other whose products with a table's integers are one sum of two in a step;
  // the next ones are the other's.
#if defined(__AVX512F__)
  static constexpr int kNeighbours = 2;
#else
  static constexpr int kNeighbours = 1;
#endif
  // What the codes are above the integers of the weight.
  static constexpr int kBias = Codes::kBytes                  ? 128
                               : kSixBits                     ? 32
                               : kEncoding == Encoding::kQ4_0 ? 8
                                                              : 0;

  QuadOperands(const PackedLayout& layout, const IntegerTable* integers)
      : table(integers), layout_(layout) {}

  // The column, of a step, that is byte `byte` of quad `quad`.
  static constexpr int column(int quad, int byte) {
    if (Codes::kBytes || (kTabled && kNeighbours == 2)) return 4 * quad + byte;
    return quad / 2 * 8 + quad % 2 * 2 + byte % 2 * 4 + byte / 2;
  }

  // Codes of a quad, of the rows from `row` on.
  MLLAMA_METHOD UVec quad(const uint8_t* tile, int64_t step, int row, int quad) const {
    if constexpr (Codes::kBytes) return load_words(tile, step * kQuads + quad, row);
    const UVec nibbles = load_words(tile, step * 4 + quad / 2, row);
    const UVec low = nibbles >> quad % 2 * 4 & 0x0f0f0f0f;
    if constexpr (!kSixBits) return low;
    const UVec high = load_words(tile + layout_.high_at, step * 2 + quad / 4, row);
    const int at = quad % 4 * 2;  // of the two bits
    return low | ((at < 4 ? high << (4 - at) : high >> (at - 4)) & 0x30303030);
  }

  MLLAMA_METHOD void unpack(const uint8_t* tile, int64_t step, int row, UVec (&out)[kQuads]) const {
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) out[q] = quad(tile, step, row, q);
  }

#if defined(__AVX512F__)
  // A table's integers, of two neighbouring columns in the halves of each lane.
  MLLAMA_METHOD void unpack(const uint8_t* tile, int64_t step, int row,
                            UVec (&out)[2 * kQuads]) const {
    const __m512i integers = load_bits<__m512i>(table->integers);
#pragma GCC unroll 4
    for (int word = 0; word < 4; ++word) {
      const UVec nibbles = load_words(tile, step * 4 + word, row);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {  // the lowest five bits count, and the table is there twice
        out[4 * word + i] = (UVec)_mm512_permutexvar_epi16((__m512i)(nibbles >> 4 * i), integers);
      }
    }
  }
#endif

  const IntegerTable* const table;  // of nf4 and fp4

 private:
  const PackedLayout& layout_;
};

// A step of a row of x.
struct QuadX {
  // Two words for each quad: the upper and the lower bytes of its columns, or 16 bits of its even
  // and of its odd columns. For a table the two are neighbours, and have 16 bits of each column.
  int32_t words[2][kQuads];
  float scale;
  int32_t sums[2];  // of the integers of each run, times the bias of the codes if they have one
  uint32_t quads;   // bits of those whose words are not all zero
  uint32_t second_quads;  // those of the second word; 0: there is none
};

// Steps of x to integers.
template <Encoding kEncoding>
struct QuadEncoder {
  using Operands = QuadOperands<kEncoding>;

  bool bytes = Operands::kBytesOfX;  // the words are bytes
  float unit = 0;                    // half the distance of the dtype's numbers, at 1
  float weight_unit = 1;             // of a table's integers

  // The units of a second word in one of the first: its integers, of at most half of these, have 14
  // bits, or 13.
  static constexpr float kSecondUnits = Operands::kTabled ? 0x1p14f : 0x1p15f;

  // The unit of the first word for columns of at most `most`.
  static float scale_of(const float* values, float most) {
    if (most == 0) return 1;
    // 2^14 times the largest's power of two; the largest code is 127 * 256 + 127.
    float scale = power_of_two(most) * 0x1p-14f;
    if (most > 32639 * scale) scale *= 2;
    if constexpr (Operands::kTabled) {
      while (!fits(values, 1 / scale)) scale *= 2;
    }
    return scale;
  }

  // The integers nearest to values times `inverse`, as that is rounded: where rounding is an
  // addition the compiler would fuse the product with it, and CPUs differ.
  static FVec integers_of(const float* values, float inverse) {
    FVec scaled = load(values) * inverse;
    asm("" : "+m"(scaled));
    return round_nearest(scaled);
  }

  static float power_of_two(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits &= 0x7f800000;
    memcpy(&x, &bits, 4);
    return x;
  }

  // Whether the two sums of products with a table's integers, which are below 2^14, stay within 32
  // bits. Those of integers of 13 bits do, whatever these are.
  static bool fits(const float* values, float inverse) {
    static_assert(kLanes % 4 == 0);
    FVec sizes = {};
    for (int i = 0; i < kStepColumns; i += kLanes) {
      const FVec code = integers_of(values + i, inverse);
      sizes += code < FVec{} ? -code : code;
    }
    float sums[2] = {};
    for (int i = 0; i < kLanes; ++i) sums[i / Operands::kNeighbours % 2] += sizes[i];
    return max(sums[0], sums[1]) <= 0x1p17f;
  }

  // The integers nearest to values / scale, and what they leave. Returns whether that is nothing;
  // or, of what a first word has left of the columns `whole`, whether they have digits enough.
  //
  // A first word leaves nothing or has a second: errors of several columns may be alike, and single
  // columns may decide the result, so that no share of a unit of the dtype keeps to the rule. A
  // second word's integers are off by 1 / sqrt(12) in the root mean square, its column by that over
  // its size. Plain PyTorch rounds the weight and the result, each by some 0.4 units of the dtype:
  // within half a unit in the mean of all columns, and three times that of any, few inputs are seen
  // to have larger errors, of columns 2^-20 below the largest.
  bool write(QuadX& out, const float* values, float* rest, float scale, float inverse,
             const float* whole = nullptr) const {
    int32_t codes[kStepColumns];
    FVec most_left = {};
    FVec squares = {}, largest = {};  // of one over the size of columns that are not exact
    IVec nonzero = {};                // less 1 for each
    for (int i = 0; i < kStepColumns; i += kLanes) {
      const FVec code = integers_of(values + i, inverse);
      const IVec integers = __builtin_convertvector(code, IVec);
      memcpy(codes + i, &integers, sizeof(integers));
      if (!rest) continue;
      const FVec left = load(values + i) - code * scale;
      store(rest + i, left);
      most_left = max_vec(left < FVec{} ? -left : left, most_left);
      if (!whole) continue;
      const FVec all = load(whole + i), size = (all < FVec{} ? -all : all) * inverse;
      const FVec parts = left != FVec{} ? 1 / size : FVec{};
      squares += parts * parts;
      largest = max_vec(parts, largest);
      nonzero += all != FVec{};
    }
    const float square = 3 * unit * unit, most = max_lanes(largest);
    const bool enough = whole ? sum_lanes(squares) <= square * (float)-sum_lanes(nonzero) &&
                                    most * most <= 8 * square
                              : max_lanes(most_left) == 0;
    constexpr int kColumns = Operands::kRunQuads * 4;
    out.scale = scale * weight_unit;
    out.quads = out.second_quads = 0;
    for (int run = 0; run < Operands::kRuns; ++run) {
      int32_t sum = 0;
      for (int i = 0; i < kColumns; ++i) sum += codes[run * kColumns + i];
      out.sums[run] = max(Operands::kBias, 1) * sum;
    }
    for (int q = 0; q < kQuads; ++q) {
      uint32_t a = 0, b = 0;
      for (int byte = 0; byte < 4; ++byte) {
        const int32_t code = codes[Operands::column(q, byte)];
        if (bytes) {
          const int32_t low = (int8_t)code;
          a |= (uint32_t)(uint8_t)((code - low) >> 8) << byte * 8;
          b |= (uint32_t)(uint8_t)low << byte * 8;
        } else if (Operands::kTabled) {
          (byte / 2 ? b : a) |= (uint32_t)(uint16_t)code << byte % 2 * 16;
        } else {
          (byte % 2 ? b : a) |= (uint32_t)(uint16_t)code << byte / 2 * 16;
        }
      }
      const int at = Operands::kTabled ? 2 * q : q, next = Operands::kTabled ? at + 1 : at + kQuads;
      out.words[at / kQuads][at % kQuads] = (int32_t)a;
      out.words[next / kQuads][next % kQuads] = (int32_t)b;
      out.quads |= (uint32_t)((a | b) != 0) << q;
    }
    return enough;
  }
};

}  // namespace mllama::MLLAMA_ISA
